"""A quantized weight as ComfyUI's own formats have it in files, bit for bit, where one of them can.

=====================  =======================================  ================================
format                 ``X.weight``                             beside it
=====================  =======================================  ================================
``float8_e4m3fn``,     F8 ``[N, K]``                            ``weight_scale`` F32, 0-dim;
``float8_e5m2``                                                 ``input_scale`` where static
``nvfp4``              U8 ``[N, K/2]``, even column in the      ``weight_scale`` F8_E4M3 in
                       high half of a byte, rows padded to 16   cuBLAS's tiles,
                                                                ``weight_scale_2`` F32, 0-dim;
                                                                ``input_scale``,
                                                                ``pre_quant_scale``
``mxfp8``              F8_E4M3 ``[N, K]``, padded to 32         ``weight_scale`` U8 in tiles
``int8_tensorwise``    I8 ``[N, K]``                            ``weight_scale`` F32, 0-dim or
                                                                ``[N, 1]``
=====================  =======================================  ================================

``X.comfy_quant`` is JSON as U8: the format, and ``full_precision_matrix_mult`` where activations
are not to be rounded. ComfyUI reads them in Linear layers alone.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import NamedTuple

import comfy_kitchen.tensor as kitchen
import torch
from comfy_kitchen.float_utils import to_blocked
from torch.nn.functional import pad

from ...kernels.spec import WeightSpec
from ...quant.errors import LowBitError
from ...quant.weight import QuantizedWeight

__all__ = ["CORE_FORMATS", "core_dequantize", "core_format", "core_tensors"]

_FLOAT8 = ("float8_e4m3fn", "float8_e5m2")


def core_format(spec: WeightSpec, scale_count: int) -> str | None:
    """ComfyUI's format for a weight; None where it has none of the same meaning.

    Args:
        spec: Of the weight.
        scale_count: Elements of its ``scale``.
    """
    grouped = spec.code_shape[2:] if len(spec.code_shape) > len(spec.shape) else ()
    if len(spec.shape) != 2 or spec.rank or spec.hadamard or spec.codebook:
        return None
    name, rounding = spec.format.name, spec.activation
    if name == "float4_e2m1fn" and grouped == (16,) and spec.two_level:
        fits = spec.smoothing in ("", "multiply")
        return "nvfp4" if fits and (rounding is None or rounding.format == name) else None
    if spec.smoothing or spec.two_level:
        return None
    if name == "float8_e4m3fn" and grouped == (32,) and scale_count * 32 == spec.numel:
        return "mxfp8"
    if grouped:
        return None
    if name in _FLOAT8 and scale_count == 1:
        return name
    if name == "int8" and scale_count in (1, spec.rows):
        return "int8_tensorwise" if rounding is None or not rounding.static else None
    return None


def core_tensors(
    weight: QuantizedWeight,
    *,
    rounded: bool = True,
    formats: Mapping[str, Collection[str]] | None = None,
) -> dict[str, torch.Tensor] | None:
    """``{suffix: tensor}`` of a layer for the host's own loader; None where it has no such format.

    The keys are ``weight``, ``weight_scale`` ... and ``comfy_quant``.

    Args:
        weight: In normal form.
        rounded: Whether activations may be rounded to int8, which the spec does not tell and
            ComfyUI always does for ``int8_tensorwise``.
        formats: Those that may be used, each with the tensors that it may have beside the weight;
            None for all.
    """
    spec, tensors = weight.spec, weight.tensors
    if "scale" not in tensors:
        return None
    name = core_format(spec, tensors["scale"].numel())
    if name is None or (name == "mxfp8" and tensors["scale"].dtype != torch.float8_e8m0fnu):
        return None
    if name == "int8_tensorwise" and not rounded:
        return None
    if formats is not None and (
        name not in formats or (spec.smoothing and "pre_quant_scale" not in formats[name])
    ):
        return None
    made = _MAKERS[name](tensors, spec)
    if spec.activation is not None and spec.activation.static:
        made["input_scale"] = tensors["input_scale"].float().reshape(())
    mark: dict[str, object] = {"format": name}
    if spec.activation is None and name != "int8_tensorwise":
        mark["full_precision_matrix_mult"] = True
    text = json.dumps(mark).encode()
    made["comfy_quant"] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    return made


def _float8(tensors: dict[str, torch.Tensor], spec: WeightSpec) -> dict[str, torch.Tensor]:
    return {
        "weight": tensors["codes"].view(spec.shape),
        "weight_scale": tensors["scale"].float().reshape(()),
    }


def _int8(tensors: dict[str, torch.Tensor], spec: WeightSpec) -> dict[str, torch.Tensor]:
    scale = tensors["scale"].float()
    return {
        "weight": tensors["codes"].view(spec.shape),
        "weight_scale": scale.reshape(()) if scale.numel() == 1 else scale.reshape(-1, 1),
    }


def _nvfp4(tensors: dict[str, torch.Tensor], spec: WeightSpec) -> dict[str, torch.Tensor]:
    rows, columns = spec.shape
    codes = tensors["codes"].view(rows, columns // 2)
    scale = tensors["scale"].view(torch.uint8).view(rows, columns // 16)
    below = (0, 0, 0, -rows % 16)
    made = {
        "weight": pad((codes << 4) | (codes >> 4), below),
        "weight_scale": to_blocked(scale, flatten=False).view(torch.float8_e4m3fn),
        "weight_scale_2": tensors["scale_2"].float().reshape(()),
    }
    if spec.smoothing:
        made["pre_quant_scale"] = tensors["smooth"]
    return made


def _mxfp8(tensors: dict[str, torch.Tensor], spec: WeightSpec) -> dict[str, torch.Tensor]:
    rows, columns = spec.shape
    codes = tensors["codes"].view(torch.uint8).view(rows, columns)
    scale = tensors["scale"].view(torch.uint8).view(rows, columns // 32)
    padded = pad(codes, (0, 0, 0, -rows % 32))
    return {
        "weight": padded.view(torch.float8_e4m3fn),
        "weight_scale": to_blocked(pad(scale, (0, 0, 0, -rows % 32)), flatten=False),
    }


_MAKERS = {
    **dict.fromkeys(_FLOAT8, _float8),
    "nvfp4": _nvfp4,
    "mxfp8": _mxfp8,
    "int8_tensorwise": _int8,
}


# ----------------------------------------------------------------------------------- reading them


class CoreFormat(NamedTuple):
    """One of ComfyUI's formats as a file has it.

    layout: comfy-kitchen's class. stored: Dtype of the codes. per_byte: Codes in one element of
    ``weight``. scales: ``{field of Params: (suffix, dtype that its bytes are read as)}``.
    """

    layout: str
    stored: torch.dtype
    per_byte: int
    scales: Mapping[str, tuple[str, torch.dtype | None]]


_ONE_SCALE = {"scale": ("weight_scale", None)}
CORE_FORMATS: dict[str, CoreFormat] = {
    "float8_e4m3fn": CoreFormat("TensorCoreFP8Layout", torch.float8_e4m3fn, 1, _ONE_SCALE),
    "float8_e5m2": CoreFormat("TensorCoreFP8Layout", torch.float8_e5m2, 1, _ONE_SCALE),
    "nvfp4": CoreFormat(
        "TensorCoreNVFP4Layout",
        torch.uint8,
        2,
        {
            "scale": ("weight_scale_2", None),
            "block_scale": ("weight_scale", torch.float8_e4m3fn),
        },
    ),
    "mxfp8": CoreFormat(
        "TensorCoreMXFP8Layout",
        torch.float8_e4m3fn,
        1,
        {"scale": ("weight_scale", torch.float8_e8m0fnu)},
    ),
    "int8_tensorwise": CoreFormat("TensorWiseINT8Layout", torch.int8, 1, _ONE_SCALE),
    "convrot_w4a4": CoreFormat("TensorCoreConvRotW4A4Layout", torch.int8, 2, _ONE_SCALE),
}
"""By the names that markers have."""


def core_dequantize(
    told: Mapping[str, object], tensors: Mapping[str, torch.Tensor], shape: tuple[int, ...]
) -> torch.Tensor:
    """The float32 weight of a layer in one of ComfyUI's formats, as ComfyUI dequantizes it.

    Args:
        told: The layer's marker.
        tensors: ``{suffix: tensor}``.
        shape: Of the weight; rows and columns behind it are padding.

    Raises:
        LowBitError: A scale is missing.
    """
    found = CORE_FORMATS[told["format"]]
    fields: dict[str, object] = {}
    for field, (suffix, dtype) in found.scales.items():
        if suffix not in tensors:
            raise LowBitError(
                "A layer in one of ComfyUI's formats lacks a scale.",
                found=", ".join(tensors),
                expected=suffix,
                remedy="Get the model from its origin again: this copy lost a tensor.",
            )
        scale = tensors[suffix]
        fields[field] = scale if dtype is None else scale.view(dtype)
    more = told.get("params")
    more = {**(more if isinstance(more, dict) else {}), **told}
    if told["format"] == "convrot_w4a4" or more.get("convrot"):
        fields["convrot_groupsize"] = int(more.get("convrot_groupsize", 256))
    if more.get("convrot") and told["format"] == "int8_tensorwise":
        fields["convrot"] = True
    layout = getattr(kitchen, found.layout)
    params = layout.Params(**fields, orig_dtype=torch.float32, orig_shape=shape)
    codes = tensors["weight"].to(found.stored)
    weight = kitchen.QuantizedTensor(codes, found.layout, params).dequantize()
    smooth = tensors.get("pre_quant_scale")
    return weight if smooth is None else weight * smooth.float()
