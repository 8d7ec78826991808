"""Semi-private names of the host that this pack leans on, in one place, checked at import."""

from __future__ import annotations

import json
from collections.abc import Collection

import comfy.controlnet
import comfy.lora
import comfy.lora_convert
import comfy.model_patcher
import comfy.ops
import comfy.utils
import comfy.weight_adapter
import torch
from comfy import quant_ops
from comfy.patcher_extension import CallbacksMP, WrappersMP
from comfy.quant_ops import QuantizedTensor
from comfy_aimdo.model_vbar import ModelVBAR
from comfy_kitchen.float_utils import to_blocked

from ...quant.errors import LowBitError
from ..layouts.composite import STORED, held_by, part_tensors

__all__ = ["NATIVE", "check", "float8_e4m3fn", "int8_tensorwise", "nvfp4", "past_forward"]

MINIMUM_HOST = "0.27.0"
NEEDED = {
    comfy.ops: ("mixed_precision_ops", "cast_bias_weight", "uncast_bias_weight", "run_every_op",
                "_quantized_apply"),
    quant_ops: ("QUANT_ALGOS", "QuantizedTensor", "get_layout_class"),
    QuantizedTensor: ("requantize_from_float", "dequantize", "state_dict"),
    comfy.lora: ("calculate_shape", "calculate_weight", "load_lora", "model_lora_keys_unet"),
    comfy.lora_convert: ("convert_lora",),
    comfy.controlnet: ("ControlLora",),
    comfy.utils: ("set_attr_param",),
    comfy.weight_adapter: ("LoRAAdapter", "WeightAdapterBase"),
    comfy.model_patcher: ("CustomTorchDevice", "LowVramPatch"),
    comfy.model_patcher.ModelPatcher: ("add_callback_with_key", "get_combined_hook_patches",
                                       "patch_weight_to_device"),
    WrappersMP: ("SAMPLER_SAMPLE",),
    CallbacksMP: ("ON_LOAD", "ON_DETACH", "ON_APPLY_HOOKS", "ON_PREPARE_STATE", "ON_CLEANUP"),
    ModelVBAR: ("set_watermark", "set_watermark_limit"),
}  # fmt: skip


def check() -> None:
    """Raise where the host lacks something, naming the version that has it."""
    absent = [
        f"{owner.__name__}.{name}"
        for owner, names in NEEDED.items()
        for name in names
        if not hasattr(owner, name)
    ]
    if absent:
        raise LowBitError(
            "This ComfyUI lacks what LowBit is built on.",
            found="no " + ", ".join(absent),
            expected=f"ComfyUI {MINIMUM_HOST} or newer",
            remedy="Update ComfyUI.",
        )


def past_forward(names: Collection[str]) -> tuple[str, ...]:
    """Ends of layer names that the host, where they are its own int8, multiplies by itself.

    MiniMax H3 folds the activation before its second MLP product into that product, and does not
    call the layer's forward, which carries the patches.

    Args:
        names: Keys of the model's state dict.
    """
    telling = ("video_patch_proj.weight", "audio_patch_proj.weight")
    is_h3 = all(any(name.endswith(end) for name in names) for end in telling)
    return (".mlp.fc2",) if is_h3 else ()


def int8_tensorwise(layer: str, weight: QuantizedTensor) -> dict[str, torch.Tensor]:
    """A row-wise int8 composite as the host's on-disk tensors and marker.

    Args:
        layer: Native module name.
        weight: Composite whose parts stand below each other, each of format int8 with scale
            ``[N, 1]`` or one element. Several parts are copied together.

    Returns:
        ``{key: tensor}`` for the host's own loader.
    """
    spec = weight._params.spec
    parts = _parts(weight)
    codes = [t["codes"].view(p.weight.shape) for p, t in zip(spec.parts, parts, strict=True)]
    scale = parts[0]["scale"].float()
    if len(parts) > 1:
        scale = torch.cat(
            [t["scale"].float().expand(len(c), 1) for c, t in zip(codes, parts, strict=True)]
        )
    return {
        f"{layer}.weight": codes[0] if len(codes) == 1 else torch.cat(codes),
        f"{layer}.weight_scale": scale.reshape(()) if scale.numel() == 1 else scale,
        f"{layer}.comfy_quant": _mark("int8_tensorwise"),
    }


def float8_e4m3fn(layer: str, weight: QuantizedTensor) -> dict[str, torch.Tensor] | None:
    """An FP8 composite with a static scale of activations in the host's form, bit for bit.

    Args:
        layer: Native module name.
        weight: Composite that :func:`~..layouts.native.native_format` names so.

    Returns:
        ``{key: tensor}`` for the host's own loader; None where there is not one scale in all.
    """
    spec = weight._params.spec
    parts = _parts(weight)
    if len(parts) > 1 or parts[0]["scale"].numel() > 1:
        return None
    (tensors,) = parts
    return {
        f"{layer}.weight": tensors["codes"].view(spec.shape),
        f"{layer}.weight_scale": tensors["scale"].float().reshape(()),
        f"{layer}.input_scale": tensors["input_scale"].reshape(()),
        f"{layer}.comfy_quant": _mark("float8_e4m3fn"),
    }


def nvfp4(layer: str, weight: QuantizedTensor) -> dict[str, torch.Tensor] | None:
    """An NVFP4 composite with a static scale of activations in the host's form, bit for bit.

    The host holds the even column in the high half of a byte, block scales in cuBLAS's tiles, and
    rows padded to 16.

    Args:
        layer: Native module name.
        weight: Composite that :func:`~..layouts.native.native_format` names so.

    Returns:
        ``{key: tensor}`` for the host's own loader; None where parts differ in what the host has
        once, or where this host cannot smooth activations.
    """
    spec = weight._params.spec
    parts = _parts(weight)
    for name in ("scale_2", "input_scale", "smooth"):
        first = parts[0].get(name)
        if any((name in tensors) != (first is not None) for tensors in parts):
            return None
        if first is not None and not all(torch.equal(tensors[name], first) for tensors in parts):
            return None
    smoothed = "smooth" in parts[0]
    if parts[0]["scale_2"].numel() > 1 or (
        smoothed and "pre_quant_scale" not in quant_ops.QUANT_ALGOS["nvfp4"]["parameters"]
    ):
        return None
    rows, columns = spec.shape
    codes = torch.cat([tensors["codes"].view(-1, columns // 2) for tensors in parts])
    scale = torch.cat([tensors["scale"].squeeze(-1).to(STORED) for tensors in parts])
    more = (0, 0, 0, -rows % 16)
    native = {
        f"{layer}.weight": torch.nn.functional.pad((codes << 4) | (codes >> 4), more),
        f"{layer}.weight_scale": to_blocked(scale.view(torch.uint8), flatten=False).view(STORED),
        f"{layer}.weight_scale_2": parts[0]["scale_2"].reshape(()),
        f"{layer}.input_scale": parts[0]["input_scale"].reshape(()),
        f"{layer}.comfy_quant": _mark("nvfp4"),
    }
    if smoothed:
        native[f"{layer}.pre_quant_scale"] = parts[0]["smooth"]
    return native


NATIVE = {"float8_e4m3fn": float8_e4m3fn, "nvfp4": nvfp4}
"""Makers of the host's own formats, by its names."""


def _parts(weight: QuantizedTensor) -> list[dict[str, torch.Tensor]]:
    spec = weight._params.spec
    held = held_by(weight)
    return [part_tensors(held, spec, number) for number in range(len(spec.parts))]


def _mark(name: str) -> torch.Tensor:
    text = json.dumps({"format": name}).encode()
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)
