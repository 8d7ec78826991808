"""Nunchaku's single file: the tensors of :mod:`..schemes.svdq` as its engine takes them.

==================  ==============================================================================
``qweight`` …       of a W4A4 layer, packed; names end as the engine's version of the family has it
``bias``            packed; of an unsigned layer less ``shift_bias``. Zeros where the engine has a
                    bias and the model has none
AWQ ``qweight`` …   of modulation, whose rows stand interleaved by chunks, with 1 added to the bias
                    of every scale, because the engine does not
header              ``model_class``, ``config``, ``quantization_config``, ``comfy_config``
==================  ==============================================================================
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import torch

from ...quant import svdq
from ...quant.errors import LowBitError
from ...quant.recipe import LayerRecipe, matches
from ..families.facts import FACTS
from .base import Container, Layer, Model, refused

__all__ = ["Nunchaku"]


class _Engine(NamedTuple):
    """What the engine calls a family's model, and how.

    names: Of (smooth, low-rank down, low-rank up).
    biased: Every W4A4 layer has a bias.
    """

    model_class: str
    names: tuple[str, str, str]
    biased: bool


FIRST = ("smooth", "lora_down", "lora_up")
SECOND = ("smooth_factor", "proj_down", "proj_up")

ENGINES = {
    "FluxTransformer2DModel": _Engine("NunchakuFluxTransformer2dModel", FIRST, True),
    "QwenImageTransformer2DModel": _Engine("NunchakuQwenImageTransformer2DModel", SECOND, True),
    "ZImageTransformer2DModel": _Engine("NunchakuZImageTransformer2DModel", SECOND, False),
    "UNet2DConditionModel": _Engine("NunchakuSDXLUNet2DConditionModel", FIRST, False),
}
SCALE_CHUNKS = {6: (1, 4), 3: (1,)}
REFINERS = ("noise_refiner.", "context_refiner.")


class Nunchaku(Container):
    """One file for Nunchaku's engine."""

    name = "nunchaku"
    display = "Nunchaku, one file"
    style = "nunchaku"
    half = True

    def check(self, model: Model) -> None:
        if model.class_name not in ENGINES:
            raise LowBitError(
                "Nunchaku's engine has no such model.",
                found=model.class_name,
                expected=", ".join(sorted(ENGINES)),
                remedy='Choose the container "comfy".',
            )
        super().check(model)
        for name, recipes in model.quantized.items():
            rows, columns = _shape(name, model)
            multiple = 4 if recipes[0].format == "uint4" else svdq.TILE
            if rows % multiple or columns % svdq.TILE:
                raise refused(
                    self,
                    name,
                    f"a weight of [{rows}, {columns}]",
                    f"rows of a multiple of {multiple} and columns of one of {svdq.TILE}",
                )
        for name in model.kept:
            if _chunks(model, model.natives[name]):
                raise refused(
                    self, name, "modulation that stays as it is", "modulation in AWQ's 4 bits"
                )

    def why_not(self, recipe: LayerRecipe) -> tuple[str, str] | None:
        if recipe.method != "svdquant":
            return f"a layer of {recipe.method}", "layers of an SVDQuant recipe"
        return None

    def tensors(self, layer: Layer, model: Model) -> dict[str, torch.Tensor]:
        weight = layer.parts[0].weight
        if weight.spec.format.name == "uint4":
            made = _awq(layer, _chunks(model, layer.native), model.dtype)
        else:
            made = _w4a4(layer, ENGINES[model.class_name], model.dtype)
        return {f"{layer.name}.{suffix}": tensor for suffix, tensor in made.items()}

    def plain(self, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        head, fused, tail = name.partition(".attention.to_qkv.")
        if fused and name.startswith(REFINERS):
            # Refiners that are not quantized have their projections apart.
            parts = tensor.chunk(3)
            return {f"{head}.attention.to_{p}.{tail}": t for p, t in zip("qkv", parts, strict=True)}
        return {name: tensor}

    def metadata(self, model: Model) -> dict[str, str]:
        engine = ENGINES[model.class_name]
        nvfp4 = any(r.format != "int4" for rs in model.quantized.values() for r in rs
                    if r.format != "uint4")  # fmt: skip
        ranks = {r.rank for rs in model.quantized.values() for r in rs if r.format != "uint4"}
        form: dict[str, Any] = {
            "dtype": "fp4_e2m1_all" if nvfp4 else "int4",
            "scale_dtype": [None, "fp8_e4m3_nan"] if nvfp4 else None,
            "group_size": 16 if nvfp4 else 64,
        }
        activation = {**form, "scale_dtype": "fp8_e4m3_nan" if nvfp4 else None}
        told: dict[str, Any] = {
            "method": "svdquant",
            "weight": form,
            "activation": activation,
            "rank": max(ranks, default=0),
        }
        if model.class_name == "ZImageTransformer2DModel":
            told["skip_refiners"] = not any(n.startswith(REFINERS) for n in model.quantized)
        found = {
            "model_class": engine.model_class,
            "config": json.dumps(dict(model.config)),
            "quantization_config": json.dumps(told),
        }
        if model.class_name == "FluxTransformer2DModel":
            found["comfy_config"] = json.dumps(_comfy_config(model.config))
        return found


def _shape(name: str, model: Model) -> tuple[int, ...]:
    """Shape of a module as the file has it."""
    return model.stored[f"{name}.weight"]


def _chunks(model: Model, natives: tuple[str, ...]) -> int:
    """Chunks of a layer that makes shifts, scales and gates; 0 of any other."""
    facts = FACTS.get(model.family)
    table = facts.modulation if facts else ()
    return next((count for pattern, count in table if matches(natives[0], pattern)), 0)


def _w4a4(layer: Layer, engine: _Engine, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    weight = layer.parts[0].weight
    spec, tensors = weight.spec, weight.tensors
    rows, columns = spec.shape
    smooth, down, up = engine.names
    codes = tensors["codes"].reshape(-1)
    scale = tensors["scale"].reshape(rows, -1)
    if spec.two_level:
        made = {
            "qweight": svdq.pack_from_float4(codes, rows, columns).view(torch.int8),
            "wscales": svdq.pack_scales_nvfp4(scale),
            "wtscale": tensors["scale_2"].reshape(1),
        }
    else:
        made = {
            "qweight": svdq.pack_from_int4(codes, rows, columns).view(torch.int8),
            "wscales": svdq.pack_scales_int4(scale.to(dtype)),
        }
    made[smooth] = svdq.pack_vector(tensors["smooth"].to(dtype))
    made[f"{smooth}_orig"] = made[smooth]
    if spec.rank:
        made[down] = svdq.pack_down(tensors["svd_down"].to(dtype))
        made[up] = svdq.pack_up(tensors["svd_up"].to(dtype))
    bias = layer.bias
    if bias is None and (engine.biased or spec.activation.shift):
        bias = torch.zeros(rows, dtype=dtype)
    if bias is not None:
        if spec.activation.shift:
            bias = bias.float() - tensors["shift_bias"].to(bias.device)
        made["bias"] = svdq.pack_vector(bias.to(dtype))
    return made


def _awq(layer: Layer, chunks: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    weight = layer.parts[0].weight
    rows, columns = weight.spec.shape
    splits = chunks or 1
    grouped = {
        name: svdq.interleave_rows(weight.tensors[name].reshape(rows, -1), splits).to(dtype)
        for name in ("scale", "zero_point")
    }
    bias = torch.zeros(rows, dtype=dtype) if layer.bias is None else layer.bias
    raised = bias.float().view(splits, -1).clone()
    for chunk in SCALE_CHUNKS.get(chunks, ()):
        raised[chunk] += 1
    codes = weight.tensors["codes"].reshape(-1)
    return {
        "qweight": svdq.pack_from_uint4(codes, rows, columns, splits=splits),
        "wscales": grouped["scale"].t().contiguous(),
        "wzeros": grouped["zero_point"].t().contiguous(),
        "bias": svdq.interleave_rows(raised.view(-1), splits).to(dtype),
    }


def _comfy_config(config) -> dict[str, Any]:
    """What ComfyUI's class of FLUX.1 is built from."""
    guided = bool(config.get("guidance_embeds"))
    return {
        "model_class": "Flux" if guided else "FluxSchnell",
        "model_config": {
            "axes_dim": list(config["axes_dims_rope"]),
            "context_in_dim": config["joint_attention_dim"],
            "depth": config["num_layers"],
            "depth_single_blocks": config["num_single_layers"],
            "disable_unet_model_creation": True,
            "guidance_embed": guided,
            "hidden_size": config["num_attention_heads"] * config["attention_head_dim"],
            "image_model": "flux",
            "in_channels": config["in_channels"] // 4,
            "mlp_ratio": 4.0,
            "num_heads": config["num_attention_heads"],
            "out_channels": (config.get("out_channels") or config["in_channels"]) // 4,
            "patch_size": 2,
            "qkv_bias": True,
            "theta": 10000,
            "vec_in_dim": config["pooled_projection_dim"],
        },
    }
