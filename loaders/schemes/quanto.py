"""optimum-quanto checkpoints (int8, float8, int4, int2) to logical layers.

A layer ``X`` of N outputs and K inputs; packed codes in G groups of g, row after row of the weight:

=======================  =======================  ==============================================
``X.weight._data``       I8 or F8 ``[N, K]``      W = code * scale
``X.weight._scale``      float ``[N, 1]``
``X.weight._data._data`` U8 ``[ceil(G/v), g]``    v codes a byte (2 of int4, 4 of int2): those of
                                                  groups r, r + ceil(G/v) ..., low bits first
``X.weight._scale``      float ``[G, 1]``         W = code * scale - shift
``X.weight._shift``      float ``[G, 1]``
``X.input_scale`` ...    float ``[]``             of quantized activations, 1 without them; left out
=======================  =======================  ==============================================

Packed codes are put into the order of the weight. Neither N nor K is stored with them: N is told by
the layer's bias, or by the architecture.
"""

from __future__ import annotations

import math
import re
from functools import partial

import torch

from ...kernels.spec import CodeFormat, WeightSpec
from ...quant.dtypes import get_format
from ...quant.packing import pack
from ...quant.weight import QuantizedWeight
from ..source import Source, TensorInfo
from .base import Contents, Entry, ShapeOf
from .modelopt_layers import FLOATS, Place
from .packages import entry_of, facts, need, plain_entries

__all__ = ["read"]

DATA, PACKED, SCALE, SHIFT = "weight._data", "weight._data._data", "weight._scale", "weight._shift"
PART = re.compile(r"(.+)\.(weight\._data|weight\._data\._data|weight\._scale|weight\._shift)")
RAW = {
    "I8": "int8",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
}
BITS = {"int4": 4, "int2": 2}
ACTIVATIONS = ("input_scale", "output_scale")
LEFT_OUT = "scales of quantized activations: these stay floats here"


def read(source: Source, shape_of: ShapeOf | None = None) -> Contents:
    """Logical tensors of a checkpoint that quanto quantized.

    Args:
        source: The open checkpoint.
        shape_of: Shapes that the architecture gives, for packed layers without a bias; such entries
            have shape None without it.

    Raises:
        LowBitError: A layer lacks a tensor or contradicts itself.
    """
    modules: dict[str, dict[str, TensorInfo]] = {}
    for name, info in source.tensors.items():
        match = PART.fullmatch(name)
        if match:
            modules.setdefault(match[1], {})[match[2]] = info
    entries: dict[str, Entry] = {}
    kinds: dict[str, str] = {}
    ignored: dict[str, str] = {}
    for module, infos in modules.items():
        place = Place(source, module, infos)
        need(place, SCALE)
        packed = PACKED in infos or SHIFT in infos
        entry = _packed(place, shape_of) if packed else _raw(place)
        entries[entry.key], kinds[module] = entry, entry.dtype
        for suffix in ACTIVATIONS:
            if f"{module}.{suffix}" in source.tensors:
                ignored[f"{module}.{suffix}"] = LEFT_OUT
    used = {name for entry in entries.values() for name in entry.stored} | set(ignored)
    entries |= plain_entries(source, used)
    return Contents(entries, ignored, facts(entries, kinds))


# ----------------------------------------------------------------------------------------- 8 bits


def _raw(place: Place) -> Entry:
    need(place, DATA)
    shape = place.shape(DATA)
    if place.dtype(DATA) not in RAW or len(shape) < 2 or 0 in shape:
        raise place.error(
            "A layer's codes are of a type that quanto does not write.",
            place.told(DATA),
            f"{', '.join(RAW)} [N, K]",
            part=DATA,
        )
    ones = (1,) * (len(shape) - 1)
    place.check(SCALE, FLOATS, (shape[0], *ones), (1, *ones), (1,), ())
    spec = WeightSpec(format=get_format(RAW[place.dtype(DATA)]), shape=shape, code_shape=shape)
    return entry_of(place, spec, partial(_read_raw, place, spec))


def _read_raw(place: Place, spec: WeightSpec) -> QuantizedWeight:
    scale = place.finite(SCALE).reshape(-1, *(1,) * (len(spec.shape) - 1))
    return QuantizedWeight(spec, {"codes": place.get(DATA), "scale": scale})


# ----------------------------------------------------------------------------------------- packed


def _packed(place: Place, shape_of: ShapeOf | None) -> Entry:
    need(place, PACKED, SHIFT)
    scale, data = place.shape(SCALE), place.shape(PACKED)
    if len(scale) != 2 or scale[1] != 1 or 0 in scale:
        raise place.error(
            "A layer's scales are not one for each group.",
            place.told(SCALE),
            "[G, 1]",
            part=SCALE,
        )
    place.check(SCALE, FLOATS, scale)
    place.check(SHIFT, FLOATS, scale)
    groups = scale[0]
    fmt = get_format(f"uint{_bits(place, groups)}")
    group = data[1]
    shape = _shape(place, groups, group, shape_of)
    if shape is None:
        return Entry(
            key=f"{place.name}.weight",
            shape=None,
            dtype=fmt.name,
            stored=tuple(info.name for info in place.infos.values()),
            nbytes=sum(info.nbytes for info in place.infos.values()),
        )
    rows, columns = shape
    code_shape = shape if group == columns else (rows, columns // group, group)
    spec = WeightSpec(format=fmt, shape=shape, code_shape=code_shape)
    return entry_of(place, spec, partial(_read_packed, place, spec))


def _bits(place: Place, groups: int) -> int:
    """Bits of a code: as many bytes as the config's, or else the only width, needs."""
    data = place.shape(PACKED)
    if place.dtype(PACKED) == "U8" and len(data) == 2 and data[1]:
        fitting = [bits for bits in BITS.values() if data[0] == -(-groups * bits // 8)]
        told = BITS.get(str(place.source.quantization_config.get("weights_dtype")))
        if told in fitting or len(fitting) == 1:
            return told if told in fitting else fitting[0]
        if fitting:
            raise place.error(
                "A layer of few groups does not tell the width of its codes.",
                f"{place.told(PACKED)} for {groups} groups",
                "weights_dtype int4 or int2 in the quantization config",
                "Open the whole component folder with its config.json.",
                part=PACKED,
            )
    raise place.error(
        "A layer's number of codes does not fit its scales.",
        f"{place.told(PACKED)} for {groups} groups",
        f"U8 [{-(-groups // 2)}, g] of int4 or [{-(-groups // 4)}, g] of int2",
        part=PACKED,
    )


def _shape(
    place: Place, groups: int, group: int, shape_of: ShapeOf | None
) -> tuple[int, int] | None:
    """[N, K]; None where only the architecture tells it, which has not been asked yet."""
    bias = place.source.tensors.get(f"{place.name}.bias")
    numel = groups * group
    told = shape_of(f"{place.name}.weight") if shape_of is not None else None
    if told is None and bias is not None and len(bias.shape) == 1 and bias.shape[0]:
        told = (bias.shape[0], numel // bias.shape[0])
    if told is None and shape_of is None:
        return None
    if told is None:
        raise place.error(
            "A layer's shape cannot be told from its tensors, and its architecture is unknown.",
            f"{groups} groups of {group}",
            "a bias, or a known model family",
            "Open the whole component folder with its config.json.",
            part=PACKED,
        )
    if len(told) != 2 or math.prod(told) != numel or told[1] % group:
        raise place.error(
            "A layer's groups do not fit its shape.",
            f"{groups} groups of {group}",
            f"whole groups in each row of {list(told)}",
            part=PACKED,
        )
    return tuple(told)


def _read_packed(place: Place, spec: WeightSpec) -> QuantizedWeight:
    """One weight in normal form, its codes in the order of the weight."""
    scale_shape = (*spec.code_shape[:-1], 1)
    codes = _in_rows(place.get(PACKED), spec.format, math.prod(scale_shape))
    return QuantizedWeight(
        spec,
        {
            "codes": pack(codes, spec.format),
            "scale": place.finite(SCALE).reshape(scale_shape),
            "zero_point": -place.finite(SHIFT).reshape(scale_shape),
        },
    )


def _in_rows(packed: torch.Tensor, fmt: CodeFormat, groups: int) -> torch.Tensor:
    """Codes [G, g] of bytes that hold every so many-th group."""
    mask = (1 << fmt.bits) - 1
    planes = [(packed >> bit) & mask for bit in range(0, 8, fmt.bits)]
    return torch.cat(planes)[:groups]
