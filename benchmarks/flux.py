"""FLUX.1 of the real ComfyUI over random weights in any scheme: state dicts, blocks, MODELs.

Weights are made on the device layer by layer and kept where the caller wants them, so that 12 B
parameters cost seconds and never exist as floats.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from forms import FORMS, weight_of

__all__ = ["BLOCK_LAYERS", "Size", "block", "latent", "model", "state_dict"]

BLOCK_LAYERS = ("double_blocks.", "single_blocks.")
"""Where quantized layers stand; SDNQ and the others leave the first and last layers alone."""
SPREAD = 0.02


@dataclass(frozen=True)
class Size:
    """How large: FLUX.1 itself by default."""

    hidden: int = 3072
    double: int = 19
    single: int = 38
    side: int = 1024
    text: int = 512

    @property
    def params(self) -> dict:
        """Arguments of ComfyUI's ``Flux``."""
        return {
            "in_channels": 16,
            "out_channels": 16,
            "vec_in_dim": 768,
            "context_in_dim": 4096,
            "hidden_size": self.hidden,
            "mlp_ratio": 4.0,
            "num_heads": self.hidden // 128,
            "depth": self.double,
            "depth_single_blocks": self.single,
            "axes_dim": [16, 56, 56],
            "txt_ids_dims": [],
            "theta": 10000,
            "patch_size": 2,
            "qkv_bias": True,
            "guidance_embed": True,
        }


SMALL = Size(hidden=256, double=1, single=1, side=128, text=40)


def _random(key: str, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> torch.Tensor:
    if key.endswith(("query_norm.scale", "key_norm.scale", "norm.weight")):
        return torch.ones(shape, device=device, dtype=dtype)
    if key.endswith(".bias"):
        return torch.zeros(shape, device=device, dtype=dtype)
    return (torch.randn(shape, device=device) * SPREAD).to(dtype)


def quantized(key: str, shape: tuple[int, ...]) -> bool:
    """Whether a scheme rounds this weight."""
    return key.startswith(BLOCK_LAYERS) and key.endswith(".weight") and len(shape) == 2


def state_dict(
    shapes: dict[str, tuple[int, ...]],
    form: str,
    pack: Callable,
    dtype: torch.dtype,
    device: str,
    keep: str,
    prefix: str = "",
) -> dict[str, torch.Tensor]:
    """Random weights.

    Args:
        shapes: Of the model.
        form: A name of ``FORMS``, or "float".
        pack: ``support.pack``.
        dtype: Of what stays float, and of activations.
        device: Where numbers are made.
        keep: Where they are left.
        prefix: What stands before the keys of ``shapes`` in the whole model.
    """
    composite = pack("loaders.layouts.composite")
    torch.manual_seed(0)
    sd: dict[str, torch.Tensor] = {}
    for number, (key, shape) in enumerate(shapes.items()):
        if form == "float" or not quantized(prefix + key, shape):
            sd[key] = _random(key, shape, dtype, device).to(keep)
            continue
        scheme = FORMS[form]
        weight = weight_of(scheme, pack, *shape, device, seed=number)
        tensors = {name: tensor.to(keep) for name, tensor in weight.tensors.items()}
        weight = pack("quant.weight").QuantizedWeight(weight.spec, tensors)
        packed = composite.build([(key, weight, scheme.wish)], dtype)
        sd[key] = packed
        sd[f"{key.removesuffix('.weight')}.comfy_quant"] = composite.marker(packed._params.spec)
    return sd


def shapes_of(size: Size) -> dict[str, tuple[int, ...]]:
    """Names and shapes of ComfyUI's model."""
    import comfy.ops
    from comfy.ldm.flux.model import Flux

    hollow = Flux(
        **size.params, dtype=torch.bfloat16, device="meta", operations=comfy.ops.disable_weight_init
    )
    return {key: tuple(value.shape) for key, value in hollow.state_dict().items()}


def model(
    size: Size,
    form: str,
    matmul: str,
    pack: Callable,
    dtype: torch.dtype,
    device: str,
    *,
    backend: str = "auto",
    dynamic: bool = False,
    sd: dict[str, torch.Tensor] | None = None,
):
    """The host's MODEL with our operations, as the loader makes it.

    Args:
        size, form, matmul, dtype: What it is.
        pack: ``support.pack``.
        device: Where its numbers are made.
        backend: The loader's input.
        dynamic: With the host's Dynamic VRAM.
        sd: Of :func:`state_dict`; made where not given.
    """
    import comfy.sd

    make_ops = pack("loaders.host.ops").make_ops
    if sd is None:
        sd = state_dict(shapes_of(size), form, pack, dtype, device, "cpu")
    options = {"dtype": dtype}
    if form != "float":
        options["custom_operations"] = make_ops(dtype, matmul, backend)
    patcher = comfy.sd.load_diffusion_model_state_dict(
        dict(sd), options, disable_dynamic=not dynamic
    )
    patcher.model.manual_cast_dtype = dtype
    if form != "float":
        pack("loaders.host.patches").install(patcher)
    return patcher


def block(kind: str, size: Size, form: str, matmul: str, pack: Callable, dtype, device: str):
    """One block of the real ComfyUI as a function without arguments.

    Args:
        kind: "double" or "single".
        size, form, matmul: What it is.
        pack: ``support.pack``.
        dtype: Of activations.
        device: Where it lies.
    """
    import comfy.ops
    from comfy.ldm.flux.layers import DoubleStreamBlock, EmbedND, SingleStreamBlock

    make_ops = pack("loaders.host.ops").make_ops
    plain = comfy.ops.disable_weight_init
    arguments = {"hidden_size": size.hidden, "num_heads": size.hidden // 128, "mlp_ratio": 4.0}
    if kind == "double":
        made, arguments = DoubleStreamBlock, arguments | {"qkv_bias": True}
    else:
        made = SingleStreamBlock
    hollow = made(**arguments, dtype=dtype, device="meta", operations=plain)
    shapes = {key: tuple(value.shape) for key, value in hollow.state_dict().items()}
    sd = state_dict(shapes, form, pack, dtype, device, device, f"{kind}_blocks.0.")
    operations = plain if form == "float" else make_ops(dtype, matmul, "auto")
    layer = made(**arguments, dtype=dtype, device=device, operations=operations)
    layer.load_state_dict(sd, strict=False)
    layer.requires_grad_(False)
    tokens = (size.side // 16) ** 2
    noise = torch.Generator(device).manual_seed(3)

    def activations(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=noise, device=device).to(dtype)

    ids = torch.zeros(1, size.text + tokens, 3, device=device)
    ids[0, size.text :, 1] = torch.arange(tokens, device=device) // (size.side // 16)
    ids[0, size.text :, 2] = torch.arange(tokens, device=device) % (size.side // 16)
    pe = EmbedND(dim=128, theta=10000, axes_dim=[16, 56, 56])(ids)
    vec = activations(1, size.hidden)
    image, text = activations(1, tokens, size.hidden), activations(1, size.text, size.hidden)
    both = torch.cat([text, image], dim=1)

    # The block adds to its inputs in place, so every call begins with a copy, on every side.
    def run() -> torch.Tensor:
        if kind == "double":
            return layer(img=image.clone(), txt=text.clone(), vec=vec, pe=pe)[0]
        return layer(both.clone(), vec=vec, pe=pe)

    return run


def latent(size: Size, seed: int = 0) -> dict[str, torch.Tensor]:
    """What sampling needs: noise, an empty latent, a conditioning."""
    noise = torch.Generator().manual_seed(seed)
    shape = (1, 16, size.side // 8, size.side // 8)
    return {
        "noise": torch.randn(shape, generator=noise),
        "latent": torch.zeros(shape),
        "context": torch.randn((1, size.text, 4096), generator=noise),
        "pooled": torch.randn((1, 768), generator=noise),
    }
