"""bitsandbytes checkpoints (NF4, FP4, LLM.int8) to logical layers.

A layer ``X`` of N outputs and K inputs; the codes of the whole weight stand in one row, and every B
of them (64) share a scale, whatever row they are of:

=================================  ====================  =========================================
``X.weight``                       U8 ``[N*K/2, 1]``     4 bits, the first of two in the high half;
                                                         or the same bytes called BF16, F16, F32
``X.weight.quant_state.            U8, JSON              quant_type, blocksize, shape, and of
bitsandbytes__nf4`` (``fp4``)                            scales that are coded: nested_blocksize,
                                                         nested_offset
``X.weight.quant_map``             F32 ``[16]``          the values of the codes
``X.weight.absmax``                F32 ``[N*K/B]``       W = value * absmax
..                                 U8, the same          absmax = nested_quant_map[code] *
                                                         nested_absmax + nested_offset
``X.weight.nested_absmax``         F32 ``[N*K/B/256]``   of every 256 scales
``X.weight.nested_quant_map``      F32 ``[256]``
=================================  ====================  =========================================

=================================  ====================  =========================================
``X.weight``                       I8 ``[N, K]``         LLM.int8: W = code * SCB / 127
``X.SCB``                          F32 ``[N]``
``X.weight_format``                U8 ``[]``             0: in rows; tiles of old versions are not
                                                         opened
=================================  ====================  =========================================

Codes are used as the file has them. Where B does not divide K, blocks run from one row into the
next: the greatest common divisor of both is then the group, and a block's scale is repeated.

LLM.int8 multiplies outlying inputs in float beside an int8 product. No kernel here does that, so
these weights ask for no quantized matmul.
"""

from __future__ import annotations

import json
import math
import re
from functools import partial
from typing import NamedTuple

import torch

from ...kernels.spec import CodeFormat, WeightSpec
from ...quant.dtypes import get_format
from ...quant.weight import QuantizedWeight
from ..source import Source, TensorInfo
from .base import Contents, Entry, ShapeOf
from .modelopt_layers import FLOATS, REGET, Place
from .packages import entry_of, facts, is_count, is_number, need, plain_entries

__all__ = ["read"]

FORMATS = {"nf4": "nf4_bnb", "fp4": "fp4_bnb"}
STATES = {f"weight.quant_state.bitsandbytes__{kind}": kind for kind in FORMATS}
NESTED = ("weight.nested_absmax", "weight.nested_quant_map")
FOUR_BITS = re.compile(
    r"(.+)\.(weight\.(?:absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.[^.]+))"
)
EIGHT_BITS = re.compile(r"(.+)\.(SCB|weight_format)")
TILES = {1: "col32", 2: "col_turing", 3: "col_ampere"}
MAX_STATE = 65536  # bytes; real ones have less than 200
CLOSE = 1e-6


class State(NamedTuple):
    """What the JSON beside a weight of 4 bits tells."""

    format: CodeFormat
    shape: tuple[int, int]
    block: int
    nested_block: int  # 0 where scales are not coded
    offset: float


def read(source: Source, shape_of: ShapeOf | None = None) -> Contents:
    """Logical tensors of a checkpoint that bitsandbytes quantized.

    Args:
        source: The open checkpoint.
        shape_of: Not needed: these files tell their shapes.

    Raises:
        LowBitError: A layer lacks a tensor, contradicts itself, or is of a kind that is not read.
    """
    modules: dict[str, dict[str, TensorInfo]] = {}
    four_bits: set[str] = set()
    for name, info in source.tensors.items():
        match = FOUR_BITS.fullmatch(name) or EIGHT_BITS.fullmatch(name)
        if match:
            modules.setdefault(match[1], {})[match[2]] = info
            if match.re is FOUR_BITS:
                four_bits.add(match[1])
    entries: dict[str, Entry] = {}
    kinds: dict[str, str] = {}
    for module, infos in modules.items():
        weight = source.tensors.get(f"{module}.weight")
        if weight is not None:
            infos["weight"] = weight
        place = Place(source, module, infos)
        if module in four_bits:
            entry, kinds[module] = _four_bits(place)
        else:
            entry, kinds[module] = _eight_bits(place)
        entries[entry.key] = entry
    used = {name for entry in entries.values() for name in entry.stored}
    entries |= plain_entries(source, used)
    return Contents(entries, {}, facts(entries, kinds))


# ---------------------------------------------------------------------------------------- 4 bits


def _four_bits(place: Place) -> tuple[Entry, str]:
    need(place, "weight", "weight.absmax", "weight.quant_map")
    state = _state(place)
    numel = math.prod(state.shape)
    weight = place.infos["weight"]
    if weight.nbytes != -(-numel // 2):
        raise place.error(
            "A layer's number of codes does not fit its shape.",
            f"{weight.nbytes} bytes ({place.told('weight')})",
            f"{-(-numel // 2)} for {list(state.shape)}",
            part="weight",
        )
    blocks = -(-numel // state.block)
    dtypes = ("U8",) if state.nested_block else ("F32",)
    place.check("weight.absmax", dtypes, (blocks,))
    place.check("weight.quant_map", ("F32",), (16,))
    if state.nested_block:
        place.check("weight.nested_absmax", ("F32",), (-(-blocks // state.nested_block),))
        place.check("weight.nested_quant_map", ("F32",), (256,))
    rows, columns = state.shape
    group = math.gcd(columns, state.block)
    code_shape = state.shape if group == columns else (rows, columns // group, group)
    spec = WeightSpec(format=state.format, shape=state.shape, code_shape=code_shape)
    kind = f"{state.format.name} in blocks of {state.block}"
    if state.nested_block:
        kind += " with coded scales"
    return entry_of(place, spec, partial(_read_four_bits, place, state, spec)), kind


def _state(place: Place) -> State:
    """The JSON that tells a weight's shape, checked."""
    parts = [part for part in place.infos if part.startswith("weight.quant_state.")]
    if len(parts) != 1 or parts[0] not in STATES:
        raise place.error(
            "A layer of 4-bit codes does not tell its shape.",
            ", ".join(sorted(parts)) or "no quant_state",
            "one of " + ", ".join(STATES),
        )
    part = parts[0]
    info = place.infos[part]
    if info.dtype != "U8" or info.nbytes > MAX_STATE:
        raise _broken(place, part, place.told(part))
    try:
        data = json.loads(bytes(place.get(part).flatten().tolist()).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise _broken(place, part, str(error)) from error
    if not isinstance(data, dict):
        raise _broken(place, part, f"{data!r:.80}")
    shape, block = data.get("shape"), data.get("blocksize")
    if data.get("quant_type") != STATES[part]:
        raise _broken(place, part, f"quant_type {data.get('quant_type')!r:.80}")
    if not isinstance(shape, list) or len(shape) != 2 or not all(map(is_count, shape)):
        raise _broken(place, part, f"shape {shape!r:.80}")
    if not is_count(block):
        raise _broken(place, part, f"blocksize {block!r:.80}")
    nested_block, offset = data.get("nested_blocksize", 0), data.get("nested_offset", 0.0)
    nested = "nested_blocksize" in data or any(name in place.infos for name in NESTED)
    if nested:
        need(place, *NESTED)
        if not is_count(nested_block) or not is_number(offset) or "nested_offset" not in data:
            found = f"nested_blocksize {nested_block!r:.40}, nested_offset {offset!r:.40}"
            raise _broken(place, part, found if "nested_offset" in data else "no nested_offset")
    format_ = get_format(FORMATS[STATES[part]])
    return State(format_, tuple(shape), block, nested_block, float(offset))


def _broken(place: Place, part: str, found: str):
    return place.error(
        "A layer's quant_state is broken.",
        found,
        '{"quant_type": "nf4", "blocksize": 64, "shape": [N, K]} in UTF-8, with nested_blocksize '
        "and nested_offset where the scales are coded",
        part=part,
    )


def _read_four_bits(place: Place, state: State, spec: WeightSpec) -> QuantizedWeight:
    """One weight in normal form; the codes stay memory-mapped."""
    table = place.finite("weight.quant_map")
    expected = torch.tensor(state.format.values)
    if (table - expected).abs().max() > CLOSE:
        raise place.error(
            f"A layer has values of its own for the codes of {state.format.name}.",
            ", ".join(f"{value:.4g}" for value in table.tolist()),
            ", ".join(f"{value:.4g}" for value in expected.tolist()),
            part="weight.quant_map",
        )
    absmax = _absmax(place, state)
    group = spec.code_shape[-1]
    if group != state.block:
        first = torch.arange(0, spec.numel, group)
        absmax = absmax[first // state.block]
    codes = place.get("weight").reshape(-1).view(torch.uint8)
    return QuantizedWeight(spec, {"codes": codes, "scale": absmax.view(*spec.code_shape[:-1], 1)})


def _absmax(place: Place, state: State) -> torch.Tensor:
    """The scale of every block, float32."""
    if not state.nested_block:
        return place.finite("weight.absmax")
    table = place.finite("weight.nested_quant_map")
    second = place.finite("weight.nested_absmax")
    values = table[place.get("weight.absmax").to(torch.int64)]
    second = second.repeat_interleave(state.nested_block)[: values.numel()]
    return values * second + state.offset


# ---------------------------------------------------------------------------------------- 8 bits


def _eight_bits(place: Place) -> tuple[Entry, str]:
    need(place, "weight", "SCB")
    shape = place.shape("weight")
    if place.dtype("weight") != "I8" or len(shape) != 2:
        raise place.error(
            "A layer of 8-bit codes is not stored as such.",
            place.told("weight"),
            "I8 [N, K]",
            part="weight",
        )
    place.check("SCB", FLOATS, (shape[0],), (shape[0], 1), (1, shape[0]))
    if "weight_format" in place.infos:
        place.check("weight_format", ("U8",), (), (1,))
        order = int(place.get("weight_format").reshape(-1)[0])
        if order:
            raise place.error(
                "A layer's codes stand in an order that only old kernels had a use for.",
                f"weight_format {order} ({TILES.get(order, 'unknown')})",
                "0, in rows",
                "Quantize the model again with bitsandbytes 0.45 or later. " + REGET,
                part="weight_format",
            )
    spec = WeightSpec(format=get_format("int8"), shape=shape, code_shape=shape)
    return entry_of(place, spec, partial(_read_eight_bits, place, spec)), "LLM.int8"


def _read_eight_bits(place: Place, spec: WeightSpec) -> QuantizedWeight:
    scale = place.finite("SCB").to(torch.float32) / 127
    return QuantizedWeight(spec, {"codes": place.get("weight"), "scale": scale.view(-1, 1)})
