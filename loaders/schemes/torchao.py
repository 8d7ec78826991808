"""torchao checkpoints in safetensors to logical layers; torchao's pickles are not opened.

A weight is an object of a class of torchao, taken apart: the metadata has, under the key
``X.weight``, the class, its settings and the names of its tensors, which stand beside as
``X._weight_<name>``. For N outputs, K inputs and blocks of a rows and b columns:

============================  =============================  ===================================
class                         tensors                        W =
============================  =============================  ===================================
``Int8Tensor``                ``qdata`` I8 ``[N, K]``,       (code - zero_point) * scale
                              ``scale`` F32 ``[N/a, K/b]``,
                              ``zero_point`` I8 or none
``IntxUnpackedToInt8Tensor``  the same; ``target_dtype``     the same; codes of fewer bits
                              int1 to int8
``Float8Tensor``              ``qdata`` F8 ``[N, K]``,       code * scale
                              ``scale`` F32 ``[N/a, K/b]``
``NVFP4Tensor``               ``qdata`` U8 ``[N, K/2]``,     e2m1 * scale * per_tensor_scale
                              low half first; ``scale``
                              F8_E4M3 ``[N, K/16]``;
                              ``per_tensor_scale`` or none
``MXTensor``                  ``qdata`` F8 ``[N, K]`` or U8  code * scale
                              ``[N, K/2]``, ``scale``
                              F8_E8M0 ``[N, K/32]``
============================  =============================  ===================================

``is_swizzled_scales`` of the last two (NVFP4's default): the scales stand in cuBLAS's tiles, padded
to ``[128 n, 4 g]`` and viewed as ``[32 n, 16 g]``. ``act_pre_scale`` [K] of int8 multiplies x.
Zero points are nearly always 0 and then left out; others make the codes unsigned ones. The
classes for int4 hold what only their kernels read, and are refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch

from ...kernels.spec import CodeFormat, WeightSpec
from ...quant.dtypes import get_format
from ...quant.packing import pack
from ...quant.weight import QuantizedWeight
from ..source import Source, TensorInfo
from .base import Contents, Entry, ShapeOf
from .modelopt_layers import EXPONENTS, FLOATS, FP8, Place
from .modelopt_nvfp4 import from_tiles
from .packages import block_scale, block_shape, entry_of, facts, need, plain_entries

__all__ = ["read"]

QDATA, SCALE, ZERO = "_weight_qdata", "_weight_scale", "_weight_zero_point"
PER_TENSOR, PRE_SCALE = "_weight_per_tensor_scale", "_weight_act_pre_scale"
PART = re.compile(r"(.+)\.(_weight_[a-z0-9_]+)")
LARGEST = {"F8_E4M3": 0x7E, "F8_E8M0": 0xFE, "U8": 0xFE}  # bytes above are negative or NaN
E2M1 = "float4_e2m1fn"
ELEMENTS = {  # elem_dtype of MXTensor -> (code format, stored dtypes)
    "float8_e4m3fn": ("float8_e4m3fn", ("F8_E4M3",)),
    "float8_e5m2": ("float8_e5m2", ("F8_E5M2",)),
    "float4_e2m1fn_x2": (E2M1, ("U8",)),
}
REWRITE = "Quantize the model again with torchao's int8, float8, MX or NVFP4 weights."


class Object(NamedTuple):
    """A weight as the metadata describes it."""

    place: Place
    cls: str
    settings: Mapping[str, Any]

    def setting(self, name: str) -> Any:
        """A setting; of one that is an object itself (a dtype, an enum), its value."""
        value = self.settings.get(name)
        return value["_data"] if isinstance(value, dict) and "_data" in value else value

    def wrong(self, name: str, expected: object):
        return self.place.error(
            "The metadata of a layer does not fit its tensors.",
            f"{name} {self.setting(name)!r:.80}",
            expected,
        )


class Made(NamedTuple):
    spec: WeightSpec
    read: Callable[[], QuantizedWeight]
    wish: str | None = None


def read(source: Source, shape_of: ShapeOf | None = None) -> Contents:
    """Logical tensors of a checkpoint that torchao quantized.

    Args:
        source: The open checkpoint.
        shape_of: Not needed: these files tell their shapes.

    Raises:
        LowBitError: A layer lacks a tensor or its description, contradicts itself, or is of a class
            that is not read.
    """
    modules: dict[str, dict[str, TensorInfo]] = {}
    for name, info in source.tensors.items():
        match = PART.fullmatch(name)
        if match:
            modules.setdefault(match[1], {})[match[2]] = info
    entries: dict[str, Entry] = {}
    kinds: dict[str, str] = {}
    for module, infos in modules.items():
        described = _described(Place(source, module, infos))
        made = CLASSES[described.cls](described)
        entry = entry_of(described.place, made.spec, made.read, wish=made.wish)
        entries[entry.key] = entry
        kinds[module] = f"{described.cls} ({made.spec.format.name})"
    used = {name for entry in entries.values() for name in entry.stored}
    entries |= plain_entries(source, used)
    return Contents(entries, {}, facts(entries, kinds))


def _described(place: Place) -> Object:
    """What the metadata tells of a weight, checked."""
    key = f"{place.name}.weight"
    text = place.source.metadata.get(key)
    if text is None:
        raise place.error(
            "The header's metadata does not describe a layer.",
            f"no entry {key}",
            "the class and settings of the weight, as torchao writes them",
            "The file was copied without its metadata: get it from its origin again.",
        )
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        data = error
    names = data.get("_tensor_data_names") if isinstance(data, dict) else None
    if (
        not isinstance(names, list)
        or not all(isinstance(name, str) for name in names)
        or not isinstance(data.get("_data"), dict)
    ):
        raise place.error(
            "The header's metadata of a layer is broken.",
            f"{data!s:.200}",
            '{"_type": ..., "_data": {...}, "_tensor_data_names": [...]}',
        )
    if data.get("_type") not in tuple(CLASSES):
        raise place.error(
            "A layer is of a class of torchao that is not read.",
            f"{data.get('_type')!r:.80}",
            "one of " + ", ".join(CLASSES),
            REWRITE,
        )
    need(place, *(f"_weight_{name}" for name in names))
    need(place, QDATA, SCALE)
    return Object(place, data["_type"], data["_data"])


def _shape(place: Place, dtypes: tuple[str, ...]) -> tuple[int, int]:
    """[rows, columns] of the codes as stored."""
    shape = place.shape(QDATA)
    if place.dtype(QDATA) not in dtypes or len(shape) != 2 or 0 in shape:
        raise place.error(
            "A layer's codes are not stored as their class stores them.",
            place.told(QDATA),
            f"{' or '.join(dtypes)} [N, K]",
            part=QDATA,
        )
    return shape


def _check_blocks(described: Object, shape: tuple[int, int], part: str) -> tuple[int, ...]:
    """code_shape of a weight under a table of scales, which must be the one of block_size."""
    place = described.place
    code_shape = block_shape(place, part, shape)
    if place.dtype(part) not in FLOATS:
        raise place.error(
            "A layer's scales are no floats.", place.told(part), " or ".join(FLOATS), part=part
        )
    block = described.setting("block_size")
    found = [n // s for n, s in zip(shape, place.shape(part), strict=True)]
    if block and block != found:  # empty for one scale in all
        raise described.wrong("block_size", f"{found} for {place.told(part)} of {list(shape)}")
    return code_shape


# -------------------------------------------------------------------------------------- integers


def _int8(described: Object) -> Made:
    return _integers(described, get_format("int8"))


def _intx(described: Object) -> Made:
    name = described.setting("target_dtype")
    if name not in {f"int{bits}" for bits in range(1, 9)}:
        raise described.wrong("target_dtype", "int1 to int8")
    return _integers(described, get_format(name))  # of one bit there is none but uint1


def _integers(described: Object, fmt: CodeFormat) -> Made:
    place = described.place
    shape = _shape(place, ("I8",))
    code_shape = _check_blocks(described, shape, SCALE)
    if ZERO in place.infos:
        place.check(ZERO, ("I8", *FLOATS), place.shape(SCALE))
        if place.finite(ZERO).any():
            fmt = get_format(f"uint{fmt.bits}")
    spec = WeightSpec(format=fmt, shape=shape, code_shape=code_shape)
    if PRE_SCALE in place.infos:
        place.check(PRE_SCALE, FLOATS, (shape[1],), (1, shape[1]))
        spec = replace(spec, smoothing="multiply")
    return Made(spec, partial(_read_integers, place, spec), _integer_wish(described))


def _integer_wish(described: Object) -> str | None:
    """The matmul of a layer whose activations are rounded row by row."""
    static = "_weight_act_quant_scale" in described.place.infos
    activations = described.setting("act_quant_kwargs")
    if static or not isinstance(activations, dict):
        return None
    mapping = activations.get("mapping_type")
    asymmetric = isinstance(mapping, dict) and mapping.get("_data") == "ASYMMETRIC"
    return "uint8" if asymmetric else "int8"


def _read_integers(place: Place, spec: WeightSpec) -> QuantizedWeight:
    fmt = spec.format
    offset = 0 if fmt.signed else 1 << (fmt.bits - 1)
    codes = place.get(QDATA)
    low, high = (int(value) for value in codes.aminmax())
    if low < fmt.qmin - offset or high > fmt.qmax - offset:
        raise place.bad(
            QDATA,
            f"codes from {low} to {high}",
            f"{fmt.qmin - offset:g} to {fmt.qmax - offset:g}",
        )
    scale = place.finite(SCALE)
    tensors = {"scale": block_scale(scale, spec.code_shape)}
    if offset:
        scale = scale.to(torch.float32)
        zero = place.get(ZERO).to(torch.float32) if ZERO in place.infos else 0
        zero_point = -(offset + zero) * scale
        tensors["scale"] = block_scale(scale, spec.code_shape)
        tensors["zero_point"] = block_scale(zero_point, spec.code_shape)
        codes = (codes.view(torch.uint8) ^ 128) - (128 - offset)
    tensors["codes"] = pack(codes, fmt) if fmt.packed else codes
    if spec.smoothing:
        tensors["smooth"] = place.finite(PRE_SCALE).reshape(-1)
    return QuantizedWeight(spec, tensors)


# ---------------------------------------------------------------------------------------- floats


def _float8(described: Object) -> Made:
    place = described.place
    shape = _shape(place, FP8)
    code_shape = shape
    if place.shape(SCALE) != ():
        code_shape = _check_blocks(described, shape, SCALE)
    fmt = get_format({"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}[place.dtype(QDATA)])
    spec = WeightSpec(format=fmt, shape=shape, code_shape=code_shape)
    rounds = isinstance(described.setting("act_quant_kwargs"), dict)
    return Made(spec, partial(_read_float8, place, spec), "fp8" if rounds else None)


def _read_float8(place: Place, spec: WeightSpec) -> QuantizedWeight:
    scale = place.finite(SCALE)
    scale = scale.view(1, 1) if scale.dim() == 0 else scale
    codes = place.get(QDATA)
    return QuantizedWeight(spec, {"codes": codes, "scale": block_scale(scale, spec.code_shape)})


def _nvfp4(described: Object) -> Made:
    place = described.place
    rows, packed = _shape(place, ("U8",))
    if described.setting("block_size") != 16:
        raise described.wrong("block_size", 16)
    made = _small_blocks(described, get_format(E2M1), (rows, 2 * packed), 16, ("F8_E4M3",))
    if PER_TENSOR in place.infos:
        place.check(PER_TENSOR, ("F32",), (), (1,))
    return made


def _mx(described: Object) -> Made:
    place = described.place
    found = ELEMENTS.get(str(described.setting("elem_dtype")))
    if found is None:
        raise described.wrong("elem_dtype", " or ".join(ELEMENTS))
    name, dtypes = found
    rows, columns = _shape(place, dtypes)
    columns *= 2 if name == E2M1 else 1
    block = described.setting("block_size")
    if block not in (16, 32, 64, 128):
        raise described.wrong("block_size", 32)
    return _small_blocks(described, get_format(name), (rows, columns), block, EXPONENTS)


def _small_blocks(
    described: Object,
    fmt: CodeFormat,
    shape: tuple[int, int],
    block: int,
    dtypes: tuple[str, ...],
) -> Made:
    """A weight whose blocks of a row have a scale of one byte, maybe in tiles."""
    place = described.place
    rows, columns = shape
    groups, rest = divmod(columns, block)
    if rest:
        raise described.wrong("block_size", f"a divisor of {columns} inputs")
    tiled = described.setting("is_swizzled_scales")
    if not isinstance(tiled, bool):
        raise described.wrong("is_swizzled_scales", "true or false")
    stored = (-(-rows // 128) * 32, -(-groups // 4) * 16) if tiled else (rows, groups)
    place.check(SCALE, dtypes, stored)
    spec = WeightSpec(
        format=fmt,
        shape=shape,
        code_shape=(rows, groups, block),
        two_level=PER_TENSOR in place.infos,
    )
    return Made(spec, partial(_read_small_blocks, place, spec, tiled))


def _read_small_blocks(place: Place, spec: WeightSpec, tiled: bool) -> QuantizedWeight:
    scale = place.bytes_up_to(SCALE, LARGEST[place.dtype(SCALE)], "negative or NaN")
    rows, groups, _ = spec.code_shape
    if tiled:
        scale = from_tiles(scale.reshape(scale.shape[0] * 4, scale.shape[1] // 4))
        scale = scale[:rows, :groups].contiguous()
    if place.dtype(SCALE) in EXPONENTS:
        scale = scale.view(torch.float8_e8m0fnu)
    codes = place.get(QDATA)
    tensors = {
        "codes": codes.reshape(-1) if spec.format.packed else codes,
        "scale": scale.unsqueeze(-1),
    }
    if spec.two_level:
        tensors["scale_2"] = place.positive(PER_TENSOR, zero=True).view(1, 1, 1)
    return QuantizedWeight(spec, tensors)


CLASSES: dict[str, Callable[[Object], Made]] = {
    "Int8Tensor": _int8,
    "IntxUnpackedToInt8Tensor": _intx,
    "Float8Tensor": _float8,
    "NVFP4Tensor": _nvfp4,
    "MXTensor": _mx,
}
"""Classes of torchao that are read."""
