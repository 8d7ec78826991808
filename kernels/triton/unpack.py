"""Codes to values: any code format as bf16, fp16 or fp32, or as int8 or fp8 with a scale for a row.

One kernel serves every format. What differs is constants that are made from the format's own table
of bits: `Layout` regroups the pack blocks into super-blocks of whole 32-bit words (or of stored
words, where rows do not begin on those), and writes the pieces of each value into one number that
kernels read at compile time. A second number tells of the scales.

    words [rows, blocks, WORDS]  ->  one tensor [rows, blocks] for each of VALUES values
    -> decoded (magic numbers, shifts; no conversion a target may lack) -> scaled -> interleaved

A scale of row n, column k stands at n * stride_n + k // GROUP * stride_g (+ k % SPATIAL). Where the
rows of a weight do not begin on whole blocks (FLAT) it is unpacked as one long row.

float32 results equal the reference's, but for fused multiply-adds where there is a zero point and
for the order of sums in a low-rank branch. What to_int8 and to_fp8 divide by is the largest value
that a row's scales allow, which needs no look at the codes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import full_scale, hadamard
from ..spec import CodeFormat, Piece, WeightSpec
from . import workspace
from .configs import Ahead, Machine, Tile, family_of, machine_of, tile_for
from .flat import named, packed, spec_of, text_of
from .library import narrow, operation, round_even, widen
from .targets import CDNA, EVERY, RDNA, cuda_from

__all__ = [
    "AHEAD", "Layout", "Tables", "codes_of", "decode", "dequantize", "dequantize_into", "layout_of",
    "load_words", "stored_as_int8", "tables_of", "to_codes", "to_fp8", "to_int8", "unpack_rows",
    "value_of", "value_tile",
]  # fmt: skip

# ------------------------------------------------------------------------- constants of kernels
#
# What kernels know of a format is one number, FORMAT: five bytes of a head, a byte of 0, PARTS,
# a byte of 0, then four bytes for each part of each value: word, bit, width, bit in the value.
#
# | head       | integer           | float     | half      | bits      | power |
# |------------|-------------------|-----------|-----------|-----------|-------|
# | 0 kind     | 0                 | 1         | 2         | 3         | 4     |
# | 1 exponent | two's complement  | bits      | -         | -         | -     |
# | 2 mantissa | bits              | bits      | -         | -         | -     |
# | 3 bias     | half is 0         | bias      | -         | -         | -     |
# | 4 flavour  | -                 | see below | shift     | shift     | -     |
#
# "half" and "bits" are the upper bits of a float16 or float32, "power" is e8m0.

INTEGER = tl.constexpr(0)
FLOAT = tl.constexpr(1)
HALF = tl.constexpr(2)
BITS = tl.constexpr(3)
POWER = tl.constexpr(4)
# Flavours of "float":
NO_SUBNORMALS = tl.constexpr(1)
UNSIGNED = tl.constexpr(2)
NAN_AT_END = tl.constexpr(4)
NAN_AT_MINUS_ZERO = tl.constexpr(8)
# Flags of TABLES, which are its lowest byte. Its next ones are the head of the scale's dtype (kind
# 5 for what can be loaded as it is), two bytes for each of SPATIAL of scale, scale_2 and levels,
# four for GROUP, and one for RUN: values that share a scale stand in runs of at least so many.
SCALED = tl.constexpr(1)
TWO_LEVEL = tl.constexpr(2)
ZERO = tl.constexpr(4)
LOOKUP = tl.constexpr(8)
PLAIN = tl.constexpr(5)

_NATIVE = {  # dtype of one element -> head
    name: bytes(head)
    for name, head in {
        "float32": (3, 8, 23, 127, 0),
        "bfloat16": (3, 8, 7, 127, 16),
        "float16": (2, 5, 10, 15, 0),
        "float8_e5m2": (2, 5, 2, 15, 8),
        "float8_e4m3fn": (1, 4, 3, 7, 4),
        "float8_e4m3fnuz": (1, 4, 3, 8, 8),
        "float8_e5m2fnuz": (1, 5, 2, 16, 8),
        "float8_e8m0fnu": (4, 8, 0, 127, 0),
    }.items()
}


def _native(dtype: torch.dtype) -> bytes:
    return _NATIVE[str(dtype).removeprefix("torch.")]


@dataclass(frozen=True)
class Layout:
    """How kernels read the codes of a format.

    Attributes:
        word: dtype that words are loaded as.
        values, words: Of a super-block.
        number: FORMAT.
    """

    word: torch.dtype
    values: int
    words: int
    number: int


@lru_cache(maxsize=1024)
def layout_of(fmt: CodeFormat, wide: bool) -> Layout:
    """The layout of a format in 32-bit words, or in stored words if not `wide`."""
    size = fmt.word.itemsize * 8
    blocks = 4 // math.gcd(4, fmt.block_words * fmt.word.itemsize) if wide else 1
    width = 32 if wide else size
    pieces = [tuple(piece) for piece in fmt.pieces] or [(0, 0, size, 0, 0)]
    parts: list[list[tuple[int, int, int, int]]] = [[] for _ in range(blocks * fmt.block_values)]
    for block in range(blocks):
        for value, value_bit, bits, word, word_bit in pieces:
            place = (block * fmt.block_words + word) * size + word_bit
            entry = (place // width, place % width, bits, value_bit)
            parts[block * fmt.block_values + value].append(entry)
    most = max(map(len, parts))
    table = b"".join(
        bytes(entry) for value in parts for entry in value + [(0, 0, 0, 0)] * (most - len(value))
    )
    number = int.from_bytes(_head(fmt) + bytes((0, most, 0)) + table, "little")
    word = {8: torch.uint8, 16: torch.int16, 32: torch.int32}[width]
    return Layout(word, len(parts), blocks * fmt.block_words * size // width, number)


def _head(fmt: CodeFormat) -> bytes:
    if fmt.kind == "native":
        return _native(fmt.word)
    if fmt.kind == "float":
        flavour = (not fmt.subnormals) * NO_SUBNORMALS.value + (not fmt.signed) * UNSIGNED.value
        return bytes((1, fmt.exponent, fmt.mantissa, fmt.exponent_bias, flavour))
    signed = fmt.kind == "int"
    return bytes((0, signed and not fmt.packed, fmt.bits, signed, 0))


@dataclass(frozen=True)
class Tables:
    """A weight's scales as kernels read them.

    Attributes:
        tensors: scale, scale_2, zero_point, levels; None for what there is not.
        strides: Of rows and groups of the scale (and zero point), of scale_2 and of the levels.
        number: TABLES.
    """

    tensors: tuple[Tensor | None, ...]
    strides: tuple[int, ...]
    number: int


_lookups: dict[tuple, Tensor] = {}


def tables_of(tensors: Mapping[str, Tensor], spec: WeightSpec) -> Tables:
    """The scales of a weight."""
    levels = tensors["levels"] if spec.codebook else None
    scale, zero_point = (None if spec.codebook else tensors.get(n) for n in ("scale", "zero_point"))
    scale_2 = tensors.get("scale_2") if spec.two_level and scale is not None else None
    found = (scale, scale_2, zero_point, levels)
    shapes = tuple(None if t is None else tuple(t.shape) for t in found)
    byte = scale.dtype if scale is not None and scale.element_size() == 1 else None
    wanted, strides, number = _table_plan(text_of(spec), shapes, byte)
    made = [
        None if t is None else _as_table(t, shape) for t, shape in zip(found, wanted, strict=True)
    ]
    if byte is not None:
        made[0] = made[0].view(torch.uint8)
    if spec.format.kind == "table":
        made[3] = _lookup(spec.format.values, tensors["codes"].device)
    return Tables(tuple(made), strides, number)


def _lookup(values: tuple[float, ...], device: torch.device) -> Tensor:
    """The values of a "table" format on a device."""
    key = (values, device)
    found = _lookups.get(key)
    if found is None:
        with torch.inference_mode(False):
            found = _lookups[key] = torch.tensor(values, dtype=torch.float32, device=device)
    return found


def _as_table(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Contiguous, and repeated where a table of `shape` has more elements."""
    if tensor.numel() != math.prod(shape):
        tensor = tensor.expand(shape)
    return tensor.contiguous()


@lru_cache(maxsize=1 << 14)
def _table_plan(
    text: str, shapes: tuple[tuple[int, ...] | None, ...], byte: torch.dtype | None
) -> tuple[tuple[tuple[int, ...] | None, ...], tuple[int, ...], int]:
    """Shapes that tables are expanded to, their strides, and TABLES.

    code_shape is seen as (rows, groups, group, kernel), and so is a table: it has one element or
    all along rows, groups and the kernel, one along a group, and levels along it.
    """
    spec = spec_of(text)
    code_shape = spec.code_shape
    kernel = spec.shape[2:] if len(code_shape) > 2 else ()
    grouped = len(code_shape) - len(kernel) == 3
    axes = len(code_shape) - len(kernel)  # before those of the kernel
    groups, group = code_shape[1:3] if grouped else (1, code_shape[1])

    def seen(shape: tuple[int, ...], level: bool = False) -> list[int]:
        if level and math.prod(shape) == shape[-1]:  # one set for the whole weight
            return [1, 1, shape[-1], 1]
        if level and len(shape) > len(code_shape):  # [O, 1, L] beside codes [O, I]
            shape = (shape[0], *shape[2:])
        shape = (1,) * (len(code_shape) - len(shape)) + shape
        if math.prod(shape) == 1:
            shape = (1,) * len(code_shape)
        inside = math.prod(kernel) if math.prod(shape[axes:]) > 1 else 1
        return [shape[0], shape[1] if grouped else 1, shape[axes - 1], inside]

    tables = [None if s is None else seen(s, n == 3) for n, s in enumerate(shapes)]
    scales = [table for table in tables[:3] if table is not None]
    width = group
    if any(table[2] > 1 for table in scales):  # then every column is a group of its own
        for table in scales:
            if max(table[1:3]) > 1:
                table[1:3] = groups, group
        width = 1
    if tables[0] is not None and tables[2] is not None:  # these two share strides
        tables[0] = tables[2] = [max(pair) for pair in zip(tables[0], tables[2], strict=True)]

    def shape_of(table: list[int]) -> tuple[int, ...]:
        rows, count, each, inside = table
        middle = (count, each) if grouped else (each,)
        return (rows, *middle, *(kernel if inside > 1 else (1,) * len(kernel)))

    strides: list[int] = []
    for table in (tables[0], tables[1]):
        rows, count, each, inside = table or (1, 1, 1, 1)
        count *= each
        strides += [count * inside if rows > 1 else 0, inside if count > 1 else 0]
    rows, count, each, inside = tables[3] or (1, 1, 1, 1)
    step = each * inside
    strides += [count * step if rows > 1 else 0, step if count > 1 else 0, inside]
    scale, scale_2, zero_point, levels = tables
    flags = (
        (scale is not None) * SCALED.value
        + (scale_2 is not None) * TWO_LEVEL.value
        + (zero_point is not None) * ZERO.value
        + (levels is not None or spec.format.kind == "table") * LOOKUP.value
    )
    number = bytes((flags,)) + (_native(byte) if byte else bytes((PLAIN.value, 0, 0, 0, 0)))
    for table in (scale, scale_2, levels):
        number += (1 if table is None else table[3]).to_bytes(2, "little")
    one = not any(strides[1:6:2])
    span = 0 if one else width * math.prod(kernel)
    apart = any(table is not None and table[3] > 1 for table in tables)
    number += span.to_bytes(4, "little") + bytes((1 if apart else min(span & -span or 128, 128),))
    wanted = tuple(None if table is None else shape_of(table) for table in tables)
    return wanted, tuple(strides), int.from_bytes(number, "little")


# -------------------------------------------------------------------------------- inside kernels


@triton.jit
def decode(code, HEAD: tl.constexpr):
    """The float32 values of codes (int32) before any scale.

    HEAD is FORMAT, or another number with its head. Bit patterns only: no conversion that a target
    may lack.
    """
    KIND: tl.constexpr = HEAD & 255
    EXPONENT: tl.constexpr = (HEAD >> 8) & 255
    MANTISSA: tl.constexpr = (HEAD >> 16) & 255
    BIAS: tl.constexpr = (HEAD >> 24) & 255
    FLAVOUR: tl.constexpr = (HEAD >> 32) & 255
    if KIND == INTEGER:
        # Bits of 2^23 + code, which are exact for up to 16 bits.
        if EXPONENT == 1:
            code = code ^ (1 << (MANTISSA - 1))
        return (code | 0x4B000000).to(tl.float32, bitcast=True) - (
            8388608.0 + BIAS * (1 << (MANTISSA - 1))
        )
    elif KIND == BITS:
        return (code << FLAVOUR).to(tl.float32, bitcast=True)
    elif KIND == HALF:
        return (code << FLAVOUR).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    elif KIND == POWER:
        bits = tl.where(code == 0, 0x00400000, code << 23)
        bits = tl.where(code == 255, 0x7FC00000, bits)
        return bits.to(tl.float32, bitcast=True)
    else:
        LAST: tl.constexpr = (1 << (EXPONENT + MANTISSA)) - 1
        magnitude = code & LAST
        bits = magnitude << (23 - MANTISSA)
        if NO_SUBNORMALS & FLAVOUR:
            bits = tl.where(magnitude == 0, 0, bits + ((127 - BIAS) << 23))
        else:
            # Right for subnormals as well: a power of two times a subnormal float32 is exact.
            value = bits.to(tl.float32, bitcast=True) * (2.0 ** (127 - BIAS))
            bits = value.to(tl.int32, bitcast=True)
        if (UNSIGNED & FLAVOUR) == 0:
            bits = bits | ((code >> (EXPONENT + MANTISSA)) << 31)
        if NAN_AT_END & FLAVOUR:
            bits = tl.where(magnitude == LAST, 0x7FC00000, bits)
        if NAN_AT_MINUS_ZERO & FLAVOUR:
            bits = tl.where(code == LAST + 1, 0x7FC00000, bits)
        return bits.to(tl.float32, bitcast=True)


@triton.jit
def load_words(pointer, offsets, mask, WORDS: tl.constexpr):
    """The WORDS words of each super-block, as a tuple of int32 tensors."""
    words = ()
    for word in tl.static_range(WORDS):
        words = words + (tl.load(pointer + offsets + word, mask, 0).to(tl.int32),)  # noqa: RUF005
    return words


@triton.jit
def _piece(words, ENTRY: tl.constexpr):
    """The bits of one entry of FORMAT, where they stand in their value."""
    BIT: tl.constexpr = (ENTRY >> 8) & 255
    WIDTH: tl.constexpr = (ENTRY >> 16) & 255
    VALUE_BIT: tl.constexpr = (ENTRY >> 24) & 255
    piece = words[ENTRY & 255]
    if BIT > 0:
        piece = piece >> BIT
    if WIDTH < 32:
        piece = piece & ((1 << WIDTH) - 1)
    if VALUE_BIT > 0:
        piece = piece << VALUE_BIT
    return piece


@triton.jit
def code_of(words, J: tl.constexpr, FORMAT: tl.constexpr):
    """Code number J of each super-block, int32."""
    PARTS: tl.constexpr = (FORMAT >> 48) & 255
    code = _piece(words, (FORMAT >> (64 + 32 * J * PARTS)) & 0xFFFFFFFF)
    for part in tl.static_range(1, PARTS):
        if (FORMAT >> (80 + 32 * (J * PARTS + part))) & 255 > 0:
            code = code | _piece(words, (FORMAT >> (64 + 32 * (J * PARTS + part))) & 0xFFFFFFFF)
    return code


@triton.jit
def place_of(rows, columns, stride_n, stride_g, TABLES: tl.constexpr, SPATIAL: tl.constexpr):
    """Where in a table the scale of these rows and columns stands."""
    GROUP: tl.constexpr = (TABLES >> 96) & 0xFFFFFFFF
    place = rows * stride_n
    if GROUP > 0:
        place = place + (columns // GROUP) * stride_g
    if SPATIAL > 1:
        place = place + columns % SPATIAL
    return place


@triton.jit
def load_scale(rows, columns, mask, tables, strides, TABLES: tl.constexpr):
    """The scale, of both levels: float32."""
    SPATIAL: tl.constexpr = (TABLES >> 48) & 0xFFFF
    place = place_of(rows, columns, strides[0], strides[1], TABLES, SPATIAL)
    scale = tl.load(tables[0] + place, mask, 0)
    if (TABLES >> 8) & 255 == PLAIN:
        scale = scale.to(tl.float32)
    else:
        scale = decode(scale.to(tl.int32), TABLES >> 8)
    if TWO_LEVEL & TABLES:
        place = place_of(rows, columns, strides[2], strides[3], TABLES, (TABLES >> 64) & 0xFFFF)
        scale = scale * tl.load(tables[1] + place, mask, 0).to(tl.float32)
    return scale


@triton.jit
def load_zero(rows, columns, mask, tables, strides, TABLES: tl.constexpr):
    """The zero point, float32; it stands where the scale stands."""
    SPATIAL: tl.constexpr = (TABLES >> 48) & 0xFFFF
    place = place_of(rows, columns, strides[0], strides[1], TABLES, SPATIAL)
    return tl.load(tables[2] + place, mask, 0).to(tl.float32)


@triton.jit
def value_of(
    words,
    rows,
    columns,
    mask,
    tables,
    strides,
    J: tl.constexpr,
    FORMAT: tl.constexpr,
    TABLES: tl.constexpr,
):
    """Value number J of each super-block before scaling: float32.

    Args:
        words: Of `load_words`.
        rows, columns: Place of that value in the weight; they broadcast to the words' shape.
        mask: What to read tables of.
        tables: Pointers to scale, scale_2, zero_point and levels.
        strides: Of `Tables`.
    """
    code = code_of(words, J, FORMAT)
    if LOOKUP & TABLES:
        SPATIAL: tl.constexpr = (TABLES >> 80) & 0xFFFF
        place = place_of(rows, columns, strides[4], strides[5], TABLES, SPATIAL)
        return tl.load(tables[3] + place + code * strides[6], mask, 0).to(tl.float32)
    else:
        return decode(code, FORMAT)


@triton.jit
def value_tile(
    words,
    rows,
    first,
    mask,
    tables,
    strides,
    width,
    columns,
    START: tl.constexpr,
    STEP: tl.constexpr,
    VALUES: tl.constexpr,
    FORMAT: tl.constexpr,
    TABLES: tl.constexpr,
    FLAT: tl.constexpr,
    CODES: tl.constexpr,
):
    """Values START, START + STEP, ... of each super-block, side by side: [rows, blocks * count].

    START 0 and STEP 1 give all in order. The tree of halves leaves neighbours in one thread.

    Args:
        first: Column of each super-block's first value.
        width: Values in a row of the codes: of the whole weight where it is FLAT.
        columns: Values in a row of the weight.
        CODES: Give the codes themselves, int32.
    """
    if STEP == VALUES:
        if CODES:
            return code_of(words, START, FORMAT)
        else:
            if FLAT:
                place = first + START
                inside = mask & (place < width)
                at_rows = place // columns
                at_columns = place % columns
            else:
                inside = mask
                at_rows = rows
                # The first value of those that surely share a scale: it is loaded once for all.
                at_columns = first + (START - START % ((TABLES >> 128) & 255))
            value = value_of(
                words, at_rows, at_columns, inside, tables, strides, START, FORMAT, TABLES
            )
            if SCALED & TABLES:
                value *= load_scale(at_rows, at_columns, inside, tables, strides, TABLES)
            if ZERO & TABLES:
                value += load_zero(at_rows, at_columns, inside, tables, strides, TABLES)
            return value
    else:
        even = value_tile(
            words, rows, first, mask, tables, strides, width, columns, START, 2 * STEP, VALUES,
            FORMAT, TABLES, FLAT, CODES,
        )  # fmt: skip
        odd = value_tile(
            words, rows, first, mask, tables, strides, width, columns, START + STEP, 2 * STEP,
            VALUES, FORMAT, TABLES, FLAT, CODES,
        )  # fmt: skip
        return tl.interleave(even, odd)


# ------------------------------------------------------------------------------------- kernels


@triton.jit
def _unpack_tile(
    n,
    rows,
    codes,
    tables,
    strides,
    smooth,
    up,
    down,
    channel,
    out,
    width,
    columns,
    row_words,
    WORDS: tl.constexpr,
    VALUES: tl.constexpr,
    FORMAT: tl.constexpr,
    TABLES: tl.constexpr,
    FLAT: tl.constexpr,
    SMOOTHING: tl.constexpr,
    RANK: tl.constexpr,
    PRECISION: tl.constexpr,
    OUTPUT: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """What `unpack_kernel` writes of rows n."""
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    first = (block * VALUES)[None, :]
    inside = (n < rows)[:, None]
    mask = inside & (first < width)
    place = n.to(tl.int64)[:, None] * row_words + (block * WORDS)[None, :]
    words = load_words(codes, place, mask, WORDS)
    tile = value_tile(
        words, n[:, None], first, mask, tables, strides, width, columns, 0, 1, VALUES, FORMAT,
        TABLES, FLAT, OUTPUT == "codes",
    )  # fmt: skip
    k = (tl.program_id(0) * (BLOCKS * VALUES) + tl.arange(0, BLOCKS * VALUES))[None, :]
    inside = inside & (k < width)
    if SMOOTHING != "":
        factor = tl.load(smooth + (k % columns if FLAT else k), k < width, 1).to(tl.float32)
        if SMOOTHING == "divide":
            tile = tl.div_rn(tile, tl.broadcast_to(factor, tile.shape))
        else:
            tile = tile * factor
    if RANK > 0:
        SIZE: tl.constexpr = triton.next_power_of_2(RANK) if RANK > 16 else 16
        r = tl.arange(0, SIZE)
        left = (n < rows)[:, None] & (r < RANK)[None, :]
        left = tl.load(up + n[:, None] * RANK + r[None, :], left, 0)
        right = (r < RANK)[:, None] & (k < width)
        right = tl.load(down + r[:, None] * columns + k, right, 0)
        tile = tl.dot(widen(left), widen(right), tile, input_precision=PRECISION)
    if OUTPUT == "int8" or OUTPUT == "fp8":
        if FLAT:
            tile = tile * tl.load(channel + k // columns, k < width, 0)
        else:
            tile = tile * tl.load(channel + n, n < rows, 0)[:, None]
    if OUTPUT == "int8":
        result = round_even(tile).to(tl.int8)
    elif OUTPUT != "codes":
        result = narrow(tile, out.dtype.element_ty)
    else:
        # Packed signed codes count from the smallest; those of 8 bits differ by their top bit.
        RAW: tl.constexpr = (FORMAT >> 8) & 255
        BITS: tl.constexpr = (FORMAT >> 16) & 255
        SIGNED: tl.constexpr = (FORMAT >> 24) & 255
        if RAW == 0 and (SIGNED or BITS == 8):
            tile = tile - (1 << (BITS - 1))
        result = tile.to(tl.int8)
    tl.store(out + n.to(tl.int64)[:, None] * width + k, result, inside)


@triton.jit(do_not_specialize=["rows"])
def unpack_kernel(
    codes,
    scale,
    scale_2,
    zero_point,
    levels,
    smooth,
    up,
    down,
    channel,
    out,
    rows,
    width,
    columns,
    row_words,
    scale_n,
    scale_g,
    scale_2_n,
    scale_2_g,
    level_n,
    level_g,
    level_q,
    WORDS: tl.constexpr,
    VALUES: tl.constexpr,
    FORMAT: tl.constexpr,
    TABLES: tl.constexpr,
    FLAT: tl.constexpr,
    SMOOTHING: tl.constexpr,
    RANK: tl.constexpr,
    PRECISION: tl.constexpr,
    OUTPUT: tl.constexpr,
    ROWS: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """[STEPS * ROWS, BLOCKS * VALUES] values of a weight, ROWS at a time.

    With one row and one super-block for each thread nothing passes between threads.

    Args:
        channel: [N] factors of rows for "int8" and "fp8".
        width: Values in a row of the codes; of the whole weight, whose one row it is, where FLAT.
        columns: Values in a row of the weight.
        row_words: Words in a row of the codes.
        SMOOTHING: How to undo it: "divide", "multiply" or "".
        RANK: Of the branch to add; 0 for none.
        OUTPUT: "float", "int8", "fp8", or "codes": integers as they are, int8.
    """
    tables = (scale, scale_2, zero_point, levels)
    strides = (scale_n, scale_g, scale_2_n, scale_2_g, level_n, level_g, level_q)
    for step in range(STEPS):
        n = (tl.program_id(1) * STEPS + step) * ROWS + tl.arange(0, ROWS)
        _unpack_tile(
            n, rows, codes, tables, strides, smooth, up, down, channel, out, width, columns,
            row_words, WORDS, VALUES, FORMAT, TABLES, FLAT, SMOOTHING, RANK, PRECISION, OUTPUT,
            BLOCKS,
        )  # fmt: skip


@triton.jit(do_not_specialize=["rows"])
def bound_kernel(
    scale,
    scale_2,
    zero_point,
    levels,
    result,
    factor,
    rows,
    groups,
    scale_n,
    scale_g,
    scale_2_n,
    scale_2_g,
    level_n,
    TABLES: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    LARGEST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """Scale of a row for codes up to LARGEST, and its inverse: from the largest value that the
    scales of the row allow for codes from LOW to HIGH."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    at = tl.where(n < rows, n, 0)[:, None]
    most = tl.zeros((BLOCK_N, BLOCK_G), tl.float32)
    GROUP: tl.constexpr = (TABLES >> 96) & 0xFFFFFFFF
    strides = (scale_n, scale_g, scale_2_n, scale_2_g)
    for start in range(0, groups, BLOCK_G):
        g = start + tl.arange(0, BLOCK_G)[None, :]
        mask = (at >= 0) & (g < groups)
        if SCALED & TABLES:
            column = g * GROUP
            size = load_scale(at, column, mask, (scale, scale_2), strides, TABLES)
            if ZERO & TABLES:
                zero = load_zero(at, column, mask, (scale, scale_2, zero_point), strides, TABLES)
                value = tl.maximum(tl.abs(size * LOW + zero), tl.abs(size * HIGH + zero))
            else:
                value = tl.abs(size) * (HIGH if HIGH > -LOW else -LOW)
        else:
            value = tl.abs(tl.load(levels + at * level_n + g, mask, 0).to(tl.float32))
        most = tl.maximum(most, tl.where(mask, value, 0.0))
    bound = tl.max(most, 1)
    inside = n < rows
    tl.store(result + n, tl.div_rn(bound, tl.full((BLOCK_N,), LARGEST, tl.float32)), inside)
    # Of a row of nothing, or next to nothing, the inverse may be infinite: its codes are 0.
    inverse = tl.div_rn(tl.full((BLOCK_N,), LARGEST, tl.float32), bound)
    tl.store(factor + n, tl.where(bound < 1e-30, 0.0, inverse), inside)


# --------------------------------------------------------------------------------- launchers


@dataclass(frozen=True)
class Codes:
    """Codes of some rows as a kernel reads them.

    Attributes:
        words: 1-D, of the layout's dtype.
        layout: How.
        flat: Whether rows begin inside of blocks: they are one long row.
    """

    words: Tensor
    layout: Layout
    flat: bool


def codes_of(tensors: Mapping[str, Tensor], spec: WeightSpec, start: int, stop: int) -> Codes:
    """The codes of rows [start, stop); `start` must lie on a whole block, as multiples of 16 do."""
    fmt, columns = spec.format, spec.columns
    words = tensors["codes"].reshape(-1).contiguous()
    if start or stop < spec.rows:
        words = words[fmt.storage_numel(start * columns) : fmt.storage_numel(stop * columns)]
    flat = columns % fmt.block_values != 0
    wide = layout_of(fmt, True)
    aligned = words.data_ptr() % 4 == 0 and columns % wide.values == 0
    layout = wide if aligned else layout_of(fmt, False)
    return Codes(words.view(layout.word), layout, flat)


def rows_of(tensors: Mapping[str, Tensor], spec: WeightSpec, start: int, stop: int) -> Tables:
    """The scales of rows [start, stop)."""
    tables = tables_of(tensors, spec)
    if not start:
        return tables
    steps = (tables.strides[0], tables.strides[2], tables.strides[0], tables.strides[4])
    moved = [
        None if t is None else t.view(-1)[start * step :]
        for t, step in zip(tables.tensors, steps, strict=True)
    ]
    return Tables(tuple(moved), tables.strides, tables.number)


def unpack_rows(
    tensors: Mapping[str, Tensor],
    spec: WeightSpec,
    out: Tensor,
    start: int = 0,
    stop: int | None = None,
    *,
    output: str = "float",
    factor: Tensor | None = None,
    unsmooth: bool = True,
    branch: bool = True,
) -> None:
    """Write rows [start, stop) of a weight to `out`, without undoing a rotation.

    Args:
        tensors, spec: The weight.
        out: Contiguous, of so many elements.
        output: What to write, see `unpack_kernel`.
        factor: [N] of all rows, see there.
        unsmooth: Undo the smoothing.
        branch: Add the low-rank branch, which `fuses_branch` must allow.
    """
    stop = spec.rows if stop is None else stop
    if start == stop:
        return
    codes = codes_of(tensors, spec, start, stop)
    tables = rows_of(tensors, spec, start, stop)
    words, layout = codes.words, codes.layout
    columns = spec.columns
    rows, width = (1, (stop - start) * columns) if codes.flat else (stop - start, columns)
    rank = spec.rank if branch else 0
    up = down = words
    precision = "ieee"
    if rank:
        up, down = tensors["svd_up"][start:stop].contiguous(), tensors["svd_down"].contiguous()
        if up.dtype == torch.float32:
            precision = "tf32x3"
    smoothing = spec.smoothing if unsmooth else ""
    shape = _shape(machine_of(out.device), rows, width, layout.values, rank)
    grid = (
        triton.cdiv(width, shape["BLOCKS"] * layout.values),
        triton.cdiv(rows, shape["ROWS"] * shape["STEPS"]),
    )
    unpack_kernel[grid](
        words,
        *(words if table is None else table for table in tables.tensors),
        tensors["smooth"].contiguous() if smoothing else words,
        up,
        down,
        words if factor is None else factor[start:],
        out,
        rows,
        width,
        columns,
        0 if codes.flat else columns // layout.values * layout.words,
        *tables.strides,
        WORDS=layout.words,
        VALUES=layout.values,
        FORMAT=layout.number,
        TABLES=tables.number,
        FLAT=codes.flat,
        SMOOTHING=smoothing,
        RANK=rank,
        PRECISION=precision,
        OUTPUT=output,
        **shape,
        enable_fp_fusion=True,
    )


_GRID = 65535  # programs along the second axis, at most


def _shape(machine: Machine, rows: int, width: int, values: int, rank: int) -> dict[str, int]:
    """ROWS, STEPS and BLOCKS of a launch, and its warps."""
    tile = tile_for("unpack", machine, rows, width, width)
    block_k = min(tile.block_k, max(triton.next_power_of_2(width), 32 * values))
    if rank:  # matrix instructions want 16 rows
        return {"ROWS": 16, "STEPS": 1, "BLOCKS": max(128 // values, 1), "num_warps": 4}
    blocks = max(block_k // values, 1)
    least = triton.next_power_of_2(triton.cdiv(rows, _GRID * tile.block_n))
    return {
        "ROWS": tile.block_n,
        "STEPS": max(tile.block_m, least),
        "BLOCKS": blocks,
        "num_warps": min(max(blocks // 32, 1), tile.warps),
    }


def fuses_branch(tensors: Mapping[str, Tensor], spec: WeightSpec) -> bool:
    """Whether the unpacking kernel can add the low-rank branch: by a matrix product of its own."""
    up, down = tensors["svd_up"], tensors["svd_down"]
    family = family_of(machine_of(up.device).architecture)
    if spec.columns % spec.format.block_values or up.dtype != down.dtype or spec.rank > 256:
        return False
    if up.dtype == torch.float32:
        return family in ("interpreter", "ampere", "ada", "hopper", "blackwell", "workstation")
    return family not in ("turing", "other")


def dequantize(
    tensors: Mapping[str, Tensor], spec: WeightSpec, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The whole weight in `spec.shape` and `dtype`."""
    return _dequantize(*packed(tensors), text_of(spec), dtype)


def _dequantize_fake(
    codes, scale, scale_2, zero_point, levels, smooth, svd_up, svd_down, spec, dtype
):
    return codes.new_empty(spec_of(spec).shape, dtype=dtype)


@operation("dequantize", fake=_dequantize_fake)
def _dequantize(
    codes: Tensor,
    scale: Tensor | None,
    scale_2: Tensor | None,
    zero_point: Tensor | None,
    levels: Tensor | None,
    smooth: Tensor | None,
    svd_up: Tensor | None,
    svd_down: Tensor | None,
    spec: str,
    dtype: torch.dtype,
) -> Tensor:
    tensors = named(codes, scale, scale_2, zero_point, levels, smooth, svd_up, svd_down)
    weight = spec_of(spec)
    result = torch.empty(weight.shape, dtype=dtype, device=codes.device)
    dequantize_into(tensors, weight, result.view(weight.rows, weight.columns))
    return result


def dequantize_into(
    tensors: Mapping[str, Tensor],
    spec: WeightSpec,
    out: Tensor,
    start: int = 0,
    *,
    unrotate: bool = True,
    unsmooth: bool = True,
) -> None:
    """Write the rows from `start` on to `out` [rows, columns], contiguous; see `unpack_rows`.

    What no tile can do, a rotation of long blocks or a branch without a fitting matrix product, is
    done in float32 some rows at a time.
    """
    rotated = spec.hadamard if unrotate else 0
    apart = spec.rank and not fuses_branch(tensors, spec)
    if not (rotated or apart):
        unpack_rows(tensors, spec, out, start, start + out.shape[0], unsmooth=unsmooth)
        return
    device, columns = out.device, spec.columns
    step = max(workspace.chunk_bytes(device) // (4 * columns) // 16, 1) * 16
    for begin in range(0, out.shape[0], step):
        end = min(begin + step, out.shape[0])
        chunk = workspace.get(device, 4 * (end - begin) * columns, torch.float32, "float32")
        chunk = chunk.view(end - begin, columns)
        at = slice(start + begin, start + end)
        unpack_rows(tensors, spec, chunk, at.start, at.stop, unsmooth=unsmooth, branch=not apart)
        if apart:
            chunk.addmm_(tensors["svd_up"][at].float(), tensors["svd_down"].float())
        if rotated:
            chunk = hadamard(chunk, rotated, spec.hadamard_basis)
        out[begin:end] = chunk


def _bound(
    tensors: Mapping[str, Tensor], spec: WeightSpec, largest: float
) -> tuple[Tensor, Tensor]:
    """Scale of every row for codes up to `largest`, and its inverse: float32 [N]."""
    fmt, rows = spec.format, spec.rows
    tables = tables_of(tensors, spec)
    scale, _, _, levels = tables.tensors
    filler = tensors["codes"]
    result, factor = torch.empty((2, rows), dtype=torch.float32, device=filler.device)
    if scale is None and levels is None:
        bound = tensors["codes"].view(rows, -1).to(torch.float32).abs().amax(1)
        result.copy_(bound / largest)
        factor.copy_(torch.where(bound < 1e-30, 0.0, largest / bound))
        return result, factor
    group = (tables.number >> 96) & 0xFFFFFFFF
    count = spec.columns // group if group else 1
    if scale is None:
        count = levels.numel() // (rows if tables.strides[4] else 1)
    block_n, block_g = 4, min(triton.next_power_of_2(count), 256)
    bound_kernel[(triton.cdiv(rows, block_n),)](
        *(filler if table is None else table for table in tables.tensors),
        result,
        factor,
        rows,
        count,
        *tables.strides[:5],
        TABLES=tables.number,
        LOW=float(fmt.qmin),
        HIGH=float(fmt.qmax),
        LARGEST=largest,
        BLOCK_N=block_n,
        BLOCK_G=block_g,
        num_warps=4,
    )
    return result, factor


def _rounded(
    tensors: Mapping[str, Tensor],
    spec: WeightSpec,
    out: Tensor | None,
    dtype: torch.dtype,
    largest: float,
) -> tuple[Tensor, Tensor]:
    if out is None:
        out = workspace.get(tensors["codes"].device, spec.numel, dtype)
    scale, factor = _bound(tensors, spec, largest)
    output = "int8" if dtype == torch.int8 else "fp8"
    unpack_rows(tensors, spec, out, output=output, factor=factor, unsmooth=False, branch=False)
    return out.view(spec.rows, spec.columns), scale


def to_int8(
    tensors: Mapping[str, Tensor], spec: WeightSpec, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The weight that rotated, smoothed activations meet as int8 [N, K] and scale [N], float32.

    Row-wise signed integers of at most 8 bits are taken as stored. All else is rounded, ties to
    even, by a scale that no value of its row can exceed. The low-rank branch is left out.

    Args:
        tensors, spec: The weight; two-dimensional.
        out: N * K int8 elements to write to; by default the workspace of this stream.
    """
    if stored_as_int8(spec) and spec.format.signed and "zero_point" not in tensors:
        scale = full_scale(tensors, spec).to(torch.float32)
        return to_codes(tensors, spec, out), scale.reshape(-1).expand(spec.rows).contiguous()
    return _rounded(tensors, spec, out, torch.int8, 127.0)


def to_fp8(
    tensors: Mapping[str, Tensor], spec: WeightSpec, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As `to_int8` for float8_e4m3fn, of which nothing is taken as stored."""
    return _rounded(tensors, spec, out, torch.float8_e4m3fn, 448.0)


def stored_as_int8(spec: WeightSpec) -> bool:
    """Whether the codes are operands of an int8 product as they are."""
    fmt = spec.format
    return fmt.is_integer and fmt.bits <= 8 and len(spec.code_shape) == 2 and not spec.codebook


def to_codes(tensors: Mapping[str, Tensor], spec: WeightSpec, out: Tensor | None = None) -> Tensor:
    """Codes of at most 8-bit integers as int8 [N, K]; 128 less than stored for uint8."""
    fmt = spec.format
    if fmt.name == "int8":
        return tensors["codes"].view(spec.rows, spec.columns)
    if out is None:
        out = workspace.get(tensors["codes"].device, spec.numel, torch.int8)
    unpack_rows(tensors, spec, out, output="codes", unsmooth=False, branch=False)
    return out.view(spec.rows, spec.columns)


# ---------------------------------------------------------------------------- ahead of time


def stream_format(name: str, kind: str, bits: int, exponent: int = 0, **options) -> CodeFormat:
    """A packed format whose codes follow each other bit by bit: as costly as any of so many bits.

    The real tables are in `quant.dtypes`, which kernels do not import.
    """
    word = 8 if bits < 8 else 16
    values = 8 if bits < 8 else 16
    if bits in (1, 2, 4):
        values = 8 // bits
    pieces = []
    for value in range(values):
        done = 0
        while done < bits:
            at = value * bits + done
            width = min(bits - done, word - at % word)
            pieces.append(Piece(value, done, width, at // word, at % word))
            done += width
    facts = {
        "signed": kind != "uint",
        "subnormals": True,
        "packed": True,
        "word": torch.uint8 if bits < 8 else torch.int16,
        "block_values": values,
        "block_words": values * bits // word,
        "largest": 1.0,
        **options,
    }
    mantissa = bits - exponent - facts["signed"]
    return CodeFormat(name, bits, kind, exponent, mantissa, pieces=tuple(pieces), **facts)


def raw_format(kind: str, dtype: torch.dtype) -> CodeFormat:
    """A format of one element for each value."""
    bits = dtype.itemsize * 8
    return CodeFormat(
        str(dtype)[6:], bits, kind, 0, 0, True, True, False, dtype, 1, 1, torch.finfo(dtype).max
        if dtype.is_floating_point else float(torch.iinfo(dtype).max),
    )  # fmt: skip


def example(fmt: CodeFormat, group: int = 0, **options) -> WeightSpec:
    """The spec of a weight [3072, 3072] in groups."""
    shape = (3072, 3072)
    code_shape = (3072, 3072 // group, group) if group else shape
    return WeightSpec(fmt, shape, code_shape, **options)


TYPES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int8: "i8",
    torch.uint8: "u8", torch.int16: "i16", torch.int32: "i32", torch.float8_e4m3fn: "fp8e4nv",
}  # fmt: skip


def weight_signature(
    spec: WeightSpec,
    scale: torch.dtype | None = torch.float32,
    *,
    zero: bool = False,
    wide: bool = True,
) -> tuple[dict[str, str], dict[str, Any]]:
    """Types and constants that the arguments of a weight have in every kernel.

    Args:
        spec: Of the weight.
        scale: dtype of its scales.
        zero: Whether it has zero points.
        wide: Whether its rows begin on 32-bit words.
    """
    layout = layout_of(spec.format, wide)
    table = (*spec.code_shape[:-1], 1)
    levels = (*spec.code_shape[:-1], 1 << spec.format.bits) if spec.codebook else None
    found = (
        None if spec.codebook else table,
        (1,) if spec.two_level else None,
        table if zero else None,
        levels,
    )
    byte = scale if scale.itemsize == 1 else None
    _, _, number = _table_plan(text_of(spec), found, byte)
    word, kind = f"*{TYPES[layout.word]}", f"*{TYPES[torch.uint8 if byte else scale]}"
    lookup = spec.codebook or spec.format.kind == "table"
    signature = {
        "codes": word,
        "scale": word if spec.codebook else kind,
        "scale_2": "*fp32" if spec.two_level else word,
        "zero_point": kind if zero else word,
        "levels": "*fp32" if lookup else word,
        **dict.fromkeys(("rows", "columns", "row_words"), "i32"),
        **dict.fromkeys(("scale_n", "scale_g", "scale_2_n", "scale_2_g"), "i32"),
        **dict.fromkeys(("level_n", "level_g", "level_q"), "i32"),
    }
    constants = {
        "WORDS": layout.words,
        "VALUES": layout.values,
        "FORMAT": layout.number,
        "TABLES": number,
    }
    return signature, constants


MACHINE = Machine("sm_90", 132, 227 << 10, 50 << 20)
"""An example, for what does not depend on it."""
STRIDES = ("scale_n", "scale_g", "scale_2_n", "scale_2_g", "level_n", "level_g", "level_q")
"""Numbers that are multiples of 16 by chance only."""


def _unpack_ahead(
    label: str,
    spec: WeightSpec,
    targets: tuple[str, ...],
    scale: torch.dtype = torch.float32,
    out: torch.dtype = torch.bfloat16,
    output: str = "float",
    branch: torch.dtype | None = None,
    zero: bool = False,
    flat: bool = False,
) -> Ahead:
    signature, constants = weight_signature(spec, scale, zero=zero, wide=not flat)
    word = signature["codes"]
    rank = spec.rank if branch else 0
    up = f"*{TYPES[branch]}" if branch else word
    shape = _shape(MACHINE, 1 if flat else 3072, 1 << 23, constants["VALUES"], rank)
    tile = Tile(0, 0, 0, shape.pop("num_warps"), 3)
    smoothing = spec.smoothing if output == "float" else ""
    return Ahead(
        "unpack:unpack_kernel",
        {
            **signature,
            "smooth": up if smoothing else word,
            "up": up,
            "down": up,
            "channel": word if output in ("float", "codes") else "*fp32",
            "out": f"*{TYPES[out]}",
            "width": "i32",
        },
        {
            **constants,
            "FLAT": flat,
            "SMOOTHING": smoothing,
            "RANK": rank,
            "PRECISION": "tf32x3" if branch == torch.float32 else "ieee",
            "OUTPUT": output,
            **shape,
        },
        tile,
        targets,
        product="half" if branch and branch != torch.float32 else "",
        unaligned=(*STRIDES, *(("columns", "width") if flat else ())),
        label=label,
    )


def _bound_ahead(label: str, spec: WeightSpec, scale: torch.dtype, zero: bool = False) -> Ahead:
    signature, constants = weight_signature(spec, scale, zero=zero)
    kept = ("scale", "scale_2", "zero_point", "levels", "rows", *STRIDES[:5])
    return Ahead(
        "unpack:bound_kernel",
        {
            **{name: signature[name] for name in kept},
            **dict.fromkeys(("result", "factor"), "*fp32"),
            "groups": "i32",
        },
        {
            "TABLES": constants["TABLES"], "LOW": -8.0, "HIGH": 7.0, "LARGEST": 127.0,
            "BLOCK_N": 4, "BLOCK_G": 64,
        },
        Tile(4, 1, 64, 4, 3),
        EVERY,
        unaligned=(*STRIDES, "groups"),
        label=label,
    )  # fmt: skip


U4 = stream_format("uint4", "uint", 4)
I4 = stream_format("int4", "int", 4)
E2M1 = stream_format("float4_e2m1fn", "float", 4, 2)
FP8 = raw_format("native", torch.float8_e4m3fn)
_FP8_OUT = (*cuda_from(89), "gfx1201")
_PRODUCTS = (*cuda_from(80), *CDNA, *RDNA)
_SVDQ = example(I4, 64, rank=32, smoothing="divide")
_NVFP4 = example(E2M1, 16, two_level=True)

AHEAD: tuple[Ahead, ...] = (
    _unpack_ahead("uint4", example(U4, 64), EVERY, torch.bfloat16, zero=True),
    _unpack_ahead("uint4 fp32", example(U4, 64), EVERY, out=torch.float32, zero=True),
    _unpack_ahead("uint4 to int8", example(U4, 64), EVERY, torch.bfloat16, torch.int8, "int8",
                  zero=True),
    _unpack_ahead("int4 to fp8", _SVDQ, _FP8_OUT, torch.bfloat16, torch.float8_e4m3fn, "fp8"),
    _unpack_ahead("int4 codes", example(I4), EVERY, out=torch.int8, output="codes"),
    _unpack_ahead("svdq", _SVDQ, _PRODUCTS, torch.bfloat16, branch=torch.bfloat16),
    _unpack_ahead("svdq fp16", _SVDQ, _PRODUCTS, torch.float16, torch.float16,
                  branch=torch.float16),
    _unpack_ahead("svdq fp32 branch", _SVDQ, cuda_from(80), branch=torch.float32),
    _unpack_ahead("nvfp4", _NVFP4, EVERY, torch.float8_e4m3fn, torch.float16),
    _unpack_ahead("nvfp4 to int8", _NVFP4, EVERY, torch.float8_e4m3fn, torch.int8, "int8"),
    _unpack_ahead("mxfp8", example(FP8, 32), EVERY, torch.float8_e8m0fnu),
    _unpack_ahead("int3", example(stream_format("int3", "int", 3), 32), EVERY),
    _unpack_ahead("float7", example(stream_format("float7", "float", 7, 3), 48), EVERY),
    _unpack_ahead("int11", example(stream_format("int11", "int", 11), 96), EVERY),
    _unpack_ahead("uint5 flat", example(stream_format("uint5", "uint", 5), 33), EVERY, flat=True),
    _unpack_ahead("codebook", example(stream_format("uint3", "uint", 3), 64, codebook=True),
                  EVERY),
    _unpack_ahead("int8", example(raw_format("int", torch.int8)), EVERY),
    _bound_ahead("uint4", example(U4, 64), torch.bfloat16, zero=True),
    _bound_ahead("nvfp4", _NVFP4, torch.float8_e4m3fn),
    _bound_ahead("codebook", example(U4, 64, codebook=True), torch.float32),
)  # fmt: skip
