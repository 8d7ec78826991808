"""A small SD-like UNet as a MODEL: quantized by this pack, and in float over the same weights.

The host's own classes throughout; only its detection, which knows the published widths alone, is
passed by. Everything that patches Stable Diffusion (ControlNet, IP-Adapter, FreeU, PAG) fits it.
"""

from __future__ import annotations

from functools import cache

import citizens
import comfy.latent_formats
import comfy.model_management as mm
import comfy.model_patcher
import comfy.ops
import comfy.supported_models
import nodes
import torch
from support import pack

CPU = torch.device("cpu")
CHANNELS, CONTEXT = 32, 96
UNET = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": CHANNELS,
    "num_res_blocks": [1, 1, 1],
    "channel_mult": (1, 2, 4),
    "transformer_depth": [1, 1, 1],
    "transformer_depth_output": [1, 1, 1, 1, 1, 1],
    "transformer_depth_middle": 1,
    "context_dim": CONTEXT,
    "num_head_channels": 16,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": True,
    "legacy": False,
    "use_temporal_attention": False,
    "adm_in_channels": None,
}
FORMATS = ("uint4", "int8", "uint4_svd")
SETTINGS = {"uint4_svd": ("uint4", {"svd_rank": 4})}


class Config(comfy.supported_models.SD15):
    """SD 1.5 at another width."""

    unet_extra_config = {}  # noqa: RUF012 - the host's own way to write it
    latent_format = comfy.latent_formats.SD15


def _model(operations):
    config = Config(dict(UNET))
    config.custom_operations = operations
    config.set_inference_dtype(torch.float32, None)
    return config.get_model({}, "", device=CPU)


@cache
def float_weights(seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights that keep a picture's size; what the host starts at zero, too."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, value in _model(comfy.ops.manual_cast).diffusion_model.state_dict().items():
        if value.dim() > 1:
            fan = value[0].numel()
            found[name] = torch.randn(value.shape, generator=generator) * fan**-0.5
        elif name.endswith("weight"):
            found[name] = 1 + 0.1 * torch.randn(value.shape, generator=generator)
        else:
            found[name] = 0.1 * torch.randn(value.shape, generator=generator)
    return found


@cache
def _made(fmt: str, seed: int) -> dict:
    """Every weight of two dimensions or more, quantized."""
    name, how = SETTINGS.get(fmt, (fmt, {}))
    return {
        key: citizens.made(value, name, **how)
        for key, value in float_weights(seed).items()
        if value.dim() > 1
    }


def _quantized(fmt: str, seed: int) -> dict[str, torch.Tensor]:
    made = {key: citizens.composite(weight) for key, weight in _made(fmt, seed).items()}
    return float_weights(seed) | made


def _patcher(model, weights):
    # torch keeps tensors that were made in inference mode from being loaded
    with torch.inference_mode():
        model.load_model_weights(dict(weights), "")
    model.requires_grad_(False)
    return comfy.model_patcher.ModelPatcher(model, mm.get_torch_device(), CPU)


def ours(fmt: str = "uint4", seed: int = 0):
    """A MODEL of low-bit weights."""
    patcher = _patcher(
        _model(pack("loaders.host.ops").make_ops(torch.float32)), _quantized(fmt, seed)
    )
    pack("loaders.host.patches").install(patcher)
    found = {
        type(p.data).__name__ for p in patcher.model.diffusion_model.parameters() if p.dim() > 1
    }
    assert found == {"QuantizedTensor"}, found
    return patcher


def floats(fmt: str = "uint4", seed: int = 0):
    """The host's own MODEL over the same weights, dequantized."""
    weights = {
        key: value.dequantize() if type(value) is not torch.Tensor else value
        for key, value in _quantized(fmt, seed).items()
    }
    return of_floats(weights)


def of_floats(weights: dict[str, torch.Tensor]):
    """The host's own MODEL over float weights."""
    return _patcher(_model(comfy.ops.manual_cast), weights)


def conditioning(seed: int, batch: int = 1, tokens: int = 11):
    """A prompt's encoding."""
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(batch, tokens, CONTEXT, generator=generator), {}]]


def sample(patcher, *, steps: int = 2, cfg: float = 4.0, batch: int = 1, **changed) -> torch.Tensor:
    """What KSampler gives, and nothing left on the device."""
    given = {
        "positive": conditioning(1),
        "negative": conditioning(2),
        "latent": {"samples": torch.zeros(batch, 4, 16, 12)},
        "seed": 5,
        "sampler_name": "euler",
        "scheduler": "normal",
    } | changed
    with torch.inference_mode():
        (result,) = nodes.common_ksampler(patcher, steps=steps, cfg=cfg, **given)
    mm.unload_model_and_clones(patcher)
    return result["samples"]
