"""NVIDIA ModelOpt's folder: diffusers names, one ``config.json``, as its exporter writes it.

| ``quant_algo``             | ``weight``     | ``weight_scale``         | beside                 |
|----------------------------|----------------|--------------------------|------------------------|
| FP8                        | F8_E4M3 [N, K] | F32 []                   | input_scale            |
| FP8_PER_CHANNEL_PER_TOKEN  | F8_E4M3 [N, K] | F32 [N]                  |                        |
| fp8_pb_wo                  | F8_E4M3 [N, K] | F32 [N/128, 1, K/128, 1] |                        |
| NVFP4, W4A16_NVFP4         | U8 [N, K/2]    | F8_E4M3 [N, K/16]        | weight_scale_2 F32 []  |
| NVFP4_AWQ                  |                |                          | + pre_quant_scale [K]  |
| NVFP4_SVD                  |                |                          | + svdquant_lora_a, _b  |
| W4A8_NVFP4_FP8             | U8 [N, K/2]    | F8_E4M3 [N, K/32]        | weight_scale_2         |
| MXFP8                      | F8_E4M3 [N, K] | U8 (E8M0) [N, K/32]      |                        |
| W8A16, W8A8_SQ_PER_CHANNEL | I8 [N, K]      | F32 [N]                  | input_scale if static  |
| W4A16_AWQ, W4A8_AWQ        | U8 [N/2, K]    | F32 [N, K/128]           | pre_quant_scale        |

Rows of 4-bit integers share bytes along N: the even one has the low half. ``input_scale`` stands
where activations have a measured scale; files without it are for readers that measure it anew.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from ...kernels.reference import unpack
from ...quant.recipe import LayerRecipe
from ...quant.weight import QuantizedWeight
from ..provenance import version
from .base import Container, Layer, Model, refused

__all__ = ["ModelOpt"]

BLOCK = 128
FP8_MAX = 448
MIXED = "MIXED_PRECISION"
#: Layers of one input; q of a cross attention has another one than k and v.
SELF = (("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj"))
CROSS = (("to_k", "to_v"), ("add_k_proj", "add_v_proj"))

#: NVFP4 algorithms, whose q, k and v share the second scale.
_SHARED = ("NVFP4", "NVFP4_AWQ", "NVFP4_SVD", "W4A16_NVFP4", "W4A8_NVFP4_FP8")
#: algorithm: (bits of weights, group, bits of activations), as far as the config tells them.
_TOLD = {
    "FP8": (8, None, 8),
    "NVFP4": (4, 16, 4),
    "NVFP4_SVD": (4, 16, 4),
    "W4A16_NVFP4": (4, 16, None),
}


class ModelOpt(Container):
    """A folder as ModelOpt exports a diffusers component."""

    name = "modelopt"
    display = "NVIDIA ModelOpt, diffusers folder"
    style = "diffusers"
    stem = "diffusion_pytorch_model"

    def why_not(self, recipe: LayerRecipe) -> tuple[str, str] | None:
        if _algorithm(recipe) is None:
            return (
                f"a layer of {recipe.method} in {recipe.format}",
                "FP8 (e4m3), NVFP4, MXFP8, INT8 (weight_only or static activations) or symmetric "
                "INT4 with float32 scales",
            )
        return None

    def check(self, model: Model) -> None:
        super().check(model)
        for name, (recipe,) in model.quantized.items():
            rows, columns = model.stored[f"{name}.weight"]
            if recipe.method == "int4" and (rows % 2 or columns != recipe.groups * BLOCK):
                raise refused(
                    self,
                    name,
                    f"[{rows}, {columns}] in groups of {columns // recipe.groups}",
                    f"groups of {BLOCK} and an even number of rows",
                )

    def together(self, names: Iterable[str], model: Model) -> list[tuple[str, ...]]:
        """Layers of one input share their second scale in NVFP4, and that of a single block."""
        have = {
            name
            for name in names
            if _algorithm(model.quantized[name][0]) in _SHARED
            or (
                model.quantized[name][0].span == BLOCK
                and max(model.stored[f"{name}.weight"]) <= BLOCK
            )
        }
        groups = []
        for name in sorted(have):
            head, _, tail = name.rpartition(".")
            for members in CROSS if head.endswith("attn2") else SELF:
                group = tuple(f"{head}.{member}" for member in members)
                if tail == members[0] and have.issuperset(group):
                    groups.append(group)
        return groups

    def tensors(self, layer: Layer, model: Model) -> dict[str, torch.Tensor]:
        (part,) = layer.parts
        made = _tensors(part.weight, part.recipe, model.dtype)
        stored = {f"{layer.name}.{suffix}": tensor for suffix, tensor in made.items()}
        if layer.bias is not None:
            stored[f"{layer.name}.bias"] = layer.bias
        return stored

    def metadata(self, model: Model) -> dict[str, str]:
        return {"format": "pt"}

    def files(self, model: Model) -> dict[str, Any]:
        found = {name: _algorithm(recipe) for name, (recipe,) in model.quantized.items()}
        algorithms = sorted(set(found.values()))
        told: dict[str, Any] = {"ignore": sorted(model.kept)}
        if len(algorithms) == 1:
            algorithm = algorithms[0]
            group = _config_group(algorithm, model)
            if group is not None:
                told["config_groups"] = {"group_0": {**group, "targets": ["Linear"]}}
        else:
            algorithm = MIXED
            told["config_groups"] = {
                f"group_{number}": {
                    **(_config_group(each, model) or {}),
                    "targets": sorted(name for name, other in found.items() if other == each),
                }
                for number, each in enumerate(algorithms)
            }
            told["quantized_layers"] = {
                name: {"quant_algo": each, "group_size": _group_size(name, model)}
                for name, each in found.items()
            }
        told |= {
            "quant_algo": algorithm,
            "producer": {"name": "lowbit", "version": version()},
            "quant_method": "modelopt",
        }
        return {"config.json": {**model.config, "quantization_config": told}}


def _algorithm(recipe: LayerRecipe) -> str | None:
    """ModelOpt's name for what is done to a layer; None where it has none."""
    rounding = recipe.activation
    if recipe.method == "fp8" and recipe.format == "float8_e4m3fn":
        if recipe.span == BLOCK:
            return "fp8_pb_wo" if rounding is None else "fp8_pb_real"
        return "FP8" if recipe.span == 0 else "FP8_PER_CHANNEL_PER_TOKEN"
    if recipe.method == "nvfp4":
        if rounding is not None and rounding.format == "float8_e4m3fn":
            return None if recipe.rank or recipe.smoothing else "W4A8_NVFP4_FP8"
        if recipe.rank:
            return "NVFP4_SVD"
        if recipe.smoothing:
            return "NVFP4_AWQ"
        return "NVFP4" if rounding is not None else "W4A16_NVFP4"
    if recipe.method == "mxfp8":
        return "MXFP8"
    if recipe.method == "int8" and (rounding is not None or not recipe.matmul):
        return "W8A8_SQ_PER_CHANNEL" if rounding is not None else "W8A16"
    if recipe.method == "int4" and recipe.format == "int4" and recipe.scale == "float32":
        return "W4A8_AWQ" if rounding is not None else "W4A16_AWQ"
    return None


def _config_group(algorithm: str, model: Model) -> dict[str, Any] | None:
    """What ModelOpt's config says of the layers of an algorithm; None where it says nothing."""
    if algorithm not in _TOLD:
        return None
    bits, group, rounded = _TOLD[algorithm]
    size = {} if group is None else {"group_size": group}
    told: dict[str, Any] = {
        "weights": {"dynamic": False, "num_bits": bits, "type": "float", **size}
    }
    if rounded is not None:
        told["input_activations"] = {
            "dynamic": False,
            "num_bits": rounded,
            "type": "float",
            **size,
        }
    if algorithm == "NVFP4_SVD":
        ranks = {r.rank for (r,) in model.quantized.values() if _algorithm(r) == algorithm}
        told |= {"has_zero_point": False, "pre_quant_scale": True, "lora_rank": max(ranks)}
    return told


def _group_size(name: str, model: Model) -> int | None:
    (recipe,) = model.quantized[name]
    columns = model.stored[f"{name}.weight"][1]
    return columns // recipe.groups if recipe.groups > 1 else None


def _tensors(
    weight: QuantizedWeight, recipe: LayerRecipe, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    spec, tensors = weight.spec, weight.tensors
    rows, columns = spec.shape
    scale = tensors["scale"]
    if spec.format.name == "float8_e4m3fn":
        made = {"weight": tensors["codes"].view(spec.shape)}
        if scale.dtype == torch.float8_e8m0fnu:
            made["weight_scale"] = scale.view(torch.uint8).view(rows, -1)
        elif recipe.span == BLOCK:
            made["weight_scale"] = _blocks(scale.view(rows, -1), columns)
        else:
            made["weight_scale"] = scale.reshape(() if scale.numel() == 1 else (-1,))
    elif spec.format.name == "float4_e2m1fn":
        made = {
            "weight": tensors["codes"].view(rows, columns // 2),
            "weight_scale": scale.view(rows, -1),
            "weight_scale_2": tensors["scale_2"].reshape(()),
        }
    elif spec.format.name == "int8":
        made = {
            "weight": tensors["codes"].view(spec.shape),
            "weight_scale": scale.reshape(-1).expand(rows).contiguous(),
        }
    else:
        made = {"weight": _pairs(weight), "weight_scale": scale.view(rows, -1)}
        if spec.activation is not None:
            made["weight_scale_2"] = scale.max() / FP8_MAX
    if spec.activation is not None and spec.activation.static:
        made["input_scale"] = tensors["input_scale"].reshape(())
    if spec.smoothing:
        made["pre_quant_scale"] = tensors["smooth"].to(dtype)
    if spec.rank:
        # ModelOpt's branch sees smoothed activations.
        down = tensors["svd_down"].float()
        smooth = tensors["smooth"].float() if spec.smoothing else 1
        made["svdquant_lora_a"] = (down / smooth).to(dtype)
        made["svdquant_lora_b"] = tensors["svd_up"].to(dtype)
    return made


def _blocks(scale: torch.Tensor, columns: int) -> torch.Tensor:
    """Scales [N, G], alike in every row of a block, as [N/128, 1, K/128, 1]; one alone as []."""
    groups = columns // scale.shape[1]
    found = scale[::BLOCK, :: BLOCK // groups].contiguous()
    return found.reshape(()) if found.numel() == 1 else found[:, None, :, None]


def _pairs(weight: QuantizedWeight) -> torch.Tensor:
    """4-bit integers as U8 [N/2, K]: two rows share a byte, the even one has the low half."""
    spec = weight.spec
    codes = unpack(weight.tensors["codes"], spec.format, spec.numel).view(spec.shape)
    nibbles = (codes & 15).to(torch.uint8)
    return nibbles[0::2] | nibbles[1::2] << 4
