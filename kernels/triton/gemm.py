"""Products of codes: [M, K] activations and [N, K] weights, both row-major, to scaled floats.

    scaled product    y = (a . b) * a_scale[m] * b_scale[n]
                        + a_zero[m] * column[n] + a_total[m] * a_scale[m] * b_zero[n]
                        + bias[n] + low[m] . up[n]
    grouped product   y = sum over groups g of (a_g . b_g) * a_scale[g, m] * b_scale[n, g]
                        + bias[n] - correction[n] + low[m] . up[n]

| operand             | shape          | dtype                                            |
|---------------------|----------------|--------------------------------------------------|
| a, b                | [M, K], [N, K] | both int8, float8_e4m3fn, bfloat16 or float16    |
| a_scale, b_scale    | [M], [N] or [1]| float32; b_zero has the shape of b_scale         |
| a_zero, a_total     | [M]            | float32; int32, the sum of a row's codes         |
| column              | [N]            | float32: sum(b) * b_scale + K * b_zero           |
| a_scale, by groups  | [G, M]         | float32                                          |
| b_scale, by groups  | [N, G] or [N]  | any float                                        |
| low, up             | [M, R], [N, R] | float16 or bfloat16, the dtype of y              |

int8 is summed exactly in int32, all else in float32. Tiles of both operands are loaded as rows of K
and the weight's is transposed in registers: a tile that is loaded transposed compiles to byte
shuffles and spills on several architectures. 4-bit integer instructions are never used: from
compute capability 9.0 on they are emulated, far slower than int8.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import targets
from .configs import ROW_CLASSES, Ahead, Machine, Tile, family_of, machine_of, tile_for
from .library import narrow, operation, widen

__all__ = ["AHEAD", "column_sums", "grouped_product", "scaled_product"]

_LARGEST_RANK_BLOCK = 32
# The bits of 2^23 + 2^22: added to a smaller integer they are a float32 that holds it.
_SEED = tl.constexpr(0x4B400000)
_SEED_VALUE = tl.constexpr(12582912.0)
_ODD = Tile(32, 32, 64, 4, 1)
"""For inner dimensions that are no multiple of 16, whose rows cannot be loaded in vectors."""


@triton.jit
def _place(rows, outputs, BM: tl.constexpr, BN: tl.constexpr, BAND: tl.constexpr):
    """The block of this program; neighbours share BAND blocks of rows, and so columns in cache."""
    program = tl.program_id(0)
    tall = tl.cdiv(rows, BM)
    wide = tl.cdiv(outputs, BN)
    first = program // (BAND * wide) * BAND
    height = tl.minimum(tall - first, BAND)
    within = program % (BAND * wide)
    return first + within % height, within // height


@triton.jit
def _tile(start, span, inputs, WHOLE: tl.constexpr):
    """[rows, BK] elements from `start`, zeros beyond the inner dimension."""
    if WHOLE:
        return tl.load(start)
    elif start.dtype.element_ty.is_int():
        return tl.load(start, mask=span[None, :] < inputs, other=0)
    else:
        return tl.load(start, mask=span[None, :] < inputs, other=0.0)


@triton.jit
def _added_branch(total, low, up, row, column, rank, RANK: tl.constexpr):
    """total + low[row] . up[column], both [., rank] row-major."""
    for start in tl.range(0, rank, RANK, num_stages=1):
        span = start + tl.arange(0, RANK)
        inside = span[None, :] < rank
        left = tl.load(low + row[:, None] * rank + span[None, :], mask=inside, other=0.0)
        right = tl.load(up + column[:, None] * rank + span[None, :], mask=inside, other=0.0)
        total = tl.dot(widen(left), widen(right).T, total)
    return total


@triton.jit(do_not_specialize=["rows"])
def scaled_product_kernel(
    a, b, y, a_scale, b_scale, bias, a_zero, column_sum, a_total, b_zero, low, up,
    rows, outputs, inputs, rank, stride_left, stride_right,
    BIAS: tl.constexpr, A_ZERO: tl.constexpr, B_ZERO: tl.constexpr, RANK: tl.constexpr,
    STEPPED: tl.constexpr, WHOLE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """One block of y.

    RANK: block of the rank, 0 for none. STEPPED: the rest is rounded before the branch is added.
    WHOLE: BK divides the inner dimension.
    """
    block_row, block_column = _place(rows, outputs, BM, BN, BAND)
    row = block_row * BM + tl.arange(0, BM)
    column = block_column * BN + tl.arange(0, BN)
    inside = (row[:, None] < rows) & (column[None, :] < outputs)
    row = tl.where(row < rows, row, 0)
    column = tl.where(column < outputs, column, 0)
    span = tl.arange(0, BK)
    # Places in matrices need 64 bits; what is loaded for rows and columns does with registers less.
    left = a + row.to(tl.int64)[:, None] * inputs + span[None, :]
    right = b + column.to(tl.int64)[:, None] * inputs + span[None, :]
    integers: tl.constexpr = a.dtype.element_ty == tl.int8
    kind: tl.constexpr = tl.int32 if integers else tl.float32
    total = tl.zeros((BM, BN), dtype=kind)
    for start in range(0, inputs, BK):
        x = widen(_tile(left, start + span, inputs, WHOLE))
        w = widen(_tile(right, start + span, inputs, WHOLE))
        total = tl.dot(x, w.T, total, out_dtype=kind)
        left += BK
        right += BK
    scale = tl.load(a_scale + row * stride_left)
    result = total.to(tl.float32) * scale[:, None]
    result = result * tl.load(b_scale + column * stride_right)[None, :]
    if A_ZERO:
        result += tl.load(a_zero + row)[:, None] * tl.load(column_sum + column)[None, :]
    if B_ZERO:
        offset = tl.load(a_total + row).to(tl.float32) * scale
        result += offset[:, None] * tl.load(b_zero + column * stride_right)[None, :]
    if BIAS:
        result += tl.load(bias + column).to(tl.float32)[None, :]
    if RANK:
        if STEPPED:
            result = narrow(result, y.dtype.element_ty).to(tl.float32)
        result = _added_branch(result, low, up, row, column, rank, RANK)
    place = y + row.to(tl.int64)[:, None] * outputs + column[None, :]
    tl.store(place, narrow(result, y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def grouped_product_kernel(
    a, b, y, a_scale, b_scale, bias, correction, low, up,
    rows, outputs, inputs, rank, stride_row, stride_group,
    BIAS: tl.constexpr, CORRECTED: tl.constexpr, RANK: tl.constexpr, GROUP: tl.constexpr,
    B_GROUPED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """One block of y. BK divides GROUP. B_GROUPED: the weight has scales by group as well."""
    block_row, block_column = _place(rows, outputs, BM, BN, BAND)
    row = block_row * BM + tl.arange(0, BM)
    column = block_column * BN + tl.arange(0, BN)
    inside = (row[:, None] < rows) & (column[None, :] < outputs)
    row = tl.where(row < rows, row, 0)
    column = tl.where(column < outputs, column, 0)
    span = tl.arange(0, BK)
    # Places in matrices need 64 bits; what is loaded for rows and columns does with registers less.
    left = a + row.to(tl.int64)[:, None] * inputs + span[None, :]
    right = b + column.to(tl.int64)[:, None] * inputs + span[None, :]
    left_scale = a_scale + row
    right_scale = b_scale + column * stride_row
    integers: tl.constexpr = a.dtype.element_ty == tl.int8
    # As many products of int8 stay within 2^22.
    seeded: tl.constexpr = integers and GROUP <= 256
    kind: tl.constexpr = tl.int32 if integers else tl.float32
    result = tl.zeros((BM, BN), dtype=tl.float32)
    for _ in range(0, inputs, GROUP):
        if seeded:
            total = tl.full((BM, BN), _SEED, dtype=tl.int32)
        else:
            total = tl.zeros((BM, BN), dtype=kind)
        for _ in tl.static_range(0, GROUP, BK):
            total = tl.dot(tl.load(left), tl.load(right).T, total, out_dtype=kind)
            left += BK
            right += BK
        # A seeded sum is a float's mantissa already: no conversion.
        value = total.to(tl.float32, bitcast=seeded)
        if seeded:
            value -= _SEED_VALUE
        scale = tl.load(left_scale)[:, None]
        left_scale += rows
        if B_GROUPED:
            scale = scale * tl.load(right_scale).to(tl.float32)[None, :]
            right_scale += stride_group
        result += value * scale
    if not B_GROUPED:
        result *= tl.load(right_scale).to(tl.float32)[None, :]
    if CORRECTED:
        result -= tl.load(correction + column).to(tl.float32)[None, :]
    if BIAS:
        result += tl.load(bias + column).to(tl.float32)[None, :]
    if RANK:
        result = narrow(result, y.dtype.element_ty).to(tl.float32)
        result = _added_branch(result, low, up, row, column, rank, RANK)
    place = y + row.to(tl.int64)[:, None] * outputs + column[None, :]
    tl.store(place, narrow(result, y.dtype.element_ty), mask=inside)


@triton.jit
def column_sums_kernel(codes, sums, inputs, BLOCK: tl.constexpr):
    """Sum of the codes of one row of a weight a program."""
    row = tl.program_id(0).to(tl.int64)
    span = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.int32)
    for start in range(0, inputs, BLOCK):
        column = start + span
        inside = column < inputs
        total += tl.load(codes + row * inputs + column, mask=inside, other=0).to(tl.int32)
    tl.store(sums + row, tl.sum(total, axis=0))


# ----------------------------------------------------------------------------------- launchers


def _fake_column_sums(codes):
    return codes.new_empty((codes.shape[0],), dtype=torch.int32)


@operation("column_sums", fake=_fake_column_sums)
def column_sums(codes: Tensor) -> Tensor:
    """Sums of the rows of int8 codes [N, K]: int32 [N]."""
    outputs, inputs = codes.shape
    sums = torch.empty((outputs,), dtype=torch.int32, device=codes.device)
    block = min(triton.next_power_of_2(inputs), 2048)
    column_sums_kernel[(outputs,)](codes, sums, inputs, BLOCK=block, num_warps=4)
    return sums


def _rank_block(rank: int) -> int:
    """Columns of the branch's factors that are multiplied at once; 0 without a branch."""
    return min(max(triton.next_power_of_2(rank), 16), _LARGEST_RANK_BLOCK) if rank else 0


def _fake_scaled(
    a, b, a_scale, b_scale, dtype, bias, a_zero, column_sum, a_total, b_zero, low, up, stepped
):  # fmt: skip
    return a.new_empty((a.shape[0], b.shape[0]), dtype=dtype)


@operation("scaled_product", fake=_fake_scaled)
def scaled_product(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    dtype: torch.dtype,
    bias: Tensor | None = None,
    a_zero: Tensor | None = None,
    column_sum: Tensor | None = None,
    a_total: Tensor | None = None,
    b_zero: Tensor | None = None,
    low: Tensor | None = None,
    up: Tensor | None = None,
    stepped: bool = False,
) -> Tensor:
    """y [M, N] of `dtype`, see above. All tensors are contiguous.

    Args:
        a, b, a_scale, b_scale, bias, low, up: of the formula.
        dtype: float32, float16 or bfloat16; beside a branch that of `low` and `up`.
        a_zero, column_sum: of asymmetric activations.
        a_total, b_zero: of asymmetric weights; `b_zero` has as many elements as `b_scale`.
        stepped: round the rest to `dtype` before the branch is added.
    """
    y = torch.empty((a.shape[0], b.shape[0]), dtype=dtype, device=a.device)
    launch_scaled(
        y, a, b, a_scale, b_scale, bias, a_zero, column_sum, a_total, b_zero, low, up, stepped
    )
    return y


def launch_scaled(
    y, a, b, a_scale, b_scale, bias=None, a_zero=None, column_sum=None, a_total=None, b_zero=None,
    low=None, up=None, stepped=False, tile: Tile | None = None,
) -> None:  # fmt: skip
    """Write y; `tile` instead of that of the tables."""
    (rows, inputs), outputs = a.shape, b.shape[0]
    if y.numel() == 0:
        return
    if tile is None:
        name = {torch.int8: "int8", torch.float8_e4m3fn: "fp8"}.get(a.dtype, "half")
        tile = tile_for(name, a.device, rows, outputs, inputs, bits=8 * a.element_size())
        terms = (a_zero is not None) + (b_zero is not None)
        tile = _ODD if inputs % 16 else _for_terms(tile, terms, machine_of(a.device))
    rank = 0 if low is None else low.shape[1]
    scaled_product_kernel[_grid(rows, outputs, tile)](
        a,
        b,
        y,
        a_scale,
        b_scale,
        y if bias is None else bias,
        a_scale if a_zero is None else a_zero,
        a_scale if column_sum is None else column_sum,
        a_scale if a_total is None else a_total,
        b_scale if b_zero is None else b_zero,
        y if low is None else low,
        y if up is None else up,
        rows,
        outputs,
        inputs,
        rank,
        0 if a_scale.numel() == 1 else 1,
        0 if b_scale.numel() == 1 else 1,
        BIAS=bias is not None,
        A_ZERO=a_zero is not None,
        B_ZERO=b_zero is not None,
        RANK=_rank_block(rank),
        STEPPED=stepped,
        WHOLE=inputs % tile.block_k == 0,
        BM=tile.block_m,
        BN=tile.block_n,
        BK=tile.block_k,
        BAND=tile.group_m,
        **tile.options,
    )


def _for_terms(tile: Tile, terms: int, machine: Machine) -> Tile:
    """The tile with registers enough for the cross terms of so many zero points."""
    if not terms:
        return tile
    if family_of(machine.architecture) in ("hopper", "blackwell", "rdna"):
        return replace(tile, block_n=min(tile.block_n, 64))
    return replace(tile, warps=8) if tile.block_m * tile.block_n >= 128 * 128 else tile


def _grid(rows: int, outputs: int, tile: Tile) -> tuple[int]:
    return (triton.cdiv(rows, tile.block_m) * triton.cdiv(outputs, tile.block_n),)


def _for_groups(tile: Tile, group: int) -> Tile:
    """The tile with whole groups, or parts of one; long groups are loaded whole, so fewer ahead."""
    stages = min(tile.stages, 2) if group > 128 else tile.stages
    return replace(tile, block_k=min(tile.block_k, group), stages=stages)


def _fake_grouped(a, b, a_scale, b_scale, dtype, group, bias, correction, low, up):
    return a.new_empty((a.shape[0], b.shape[0]), dtype=dtype)


@operation("grouped_product", fake=_fake_grouped)
def grouped_product(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    dtype: torch.dtype,
    group: int,
    bias: Tensor | None = None,
    correction: Tensor | None = None,
    low: Tensor | None = None,
    up: Tensor | None = None,
) -> Tensor:
    """y [M, N] of `dtype`, see above. `b_scale` may have any strides, [1, 1] of it is broadcast.

    Args:
        a, b, bias, correction, low, up: of the formula.
        a_scale: [G, M].
        b_scale: [N or 1, G or 1].
        dtype: as in `scaled_product`. Beside a branch the rest is rounded to it before.
        group: elements of a row that share a scale, at least 32, a power of two; divides K.
    """
    y = torch.empty((a.shape[0], b.shape[0]), dtype=dtype, device=a.device)
    launch_grouped(y, a, b, a_scale, b_scale, group, bias, correction, low, up)
    return y


def launch_grouped(
    y, a, b, a_scale, b_scale, group, bias=None, correction=None, low=None, up=None,
    tile: Tile | None = None,
) -> None:  # fmt: skip
    """Write y; `tile` instead of that of the tables."""
    (rows, inputs), outputs = a.shape, b.shape[0]
    if y.numel() == 0:
        return
    if tile is None:
        tile = tile_for("faithful", a.device, rows, outputs, inputs)
    tile = _for_groups(tile, group)
    rank = 0 if low is None else low.shape[1]
    grouped = b_scale.shape[1] > 1
    grouped_product_kernel[_grid(rows, outputs, tile)](
        a,
        b,
        y,
        a_scale,
        b_scale,
        y if bias is None else bias,
        y if correction is None else correction,
        y if low is None else low,
        y if up is None else up,
        rows,
        outputs,
        inputs,
        rank,
        b_scale.stride(0) if b_scale.shape[0] > 1 else 0,
        b_scale.stride(1) if grouped else 0,
        BIAS=bias is not None,
        CORRECTED=correction is not None,
        RANK=_rank_block(rank),
        GROUP=group,
        B_GROUPED=grouped,
        BM=tile.block_m,
        BN=tile.block_n,
        BK=tile.block_k,
        BAND=tile.group_m,
        **tile.options,
    )


# -------------------------------------------------------------------------------------- claims

_POINTERS = {
    "int8": ("*i8", "*bf16"),
    "fp8": ("*fp8e4nv", "*bf16"),
    "half": ("*bf16", "*bf16"),
}
_SCALED_FLAGS = {
    "bias": {"BIAS": True, "A_ZERO": False, "B_ZERO": False, "RANK": 0},
    "branch": {"BIAS": True, "A_ZERO": False, "B_ZERO": False, "RANK": 32},
    "zeros": {"BIAS": True, "A_ZERO": True, "B_ZERO": True, "RANK": 0},
}


def _instructions(product: str, tile: Tile) -> str:
    """Hopper and newer multiply few rows of fp8 as half."""
    return "" if product == "fp8" and tile.block_m < 64 else product


def _scaled_ahead(
    product: str, tile: Tile, flags: str, names: tuple[str, ...], fit: str = "whole"
) -> Ahead:
    """fit: whether the inner dimension is "whole" tiles, "ragged" (of 16), or "odd"."""
    code, half = _POINTERS[product]
    unaligned = ("rows", "stride_left", "stride_right")
    return Ahead(
        kernel="gemm:scaled_product_kernel",
        signature={
            **dict.fromkeys(("a", "b"), code),
            **dict.fromkeys(("y", "bias", "low", "up"), half),
            **dict.fromkeys(("a_scale", "b_scale", "a_zero", "column_sum", "b_zero"), "*fp32"),
            "a_total": "*i32",
            **dict.fromkeys(
                ("rows", "outputs", "inputs", "rank", "stride_left", "stride_right"), "i32"
            ),
        },
        constants={
            **_SCALED_FLAGS[flags],
            "STEPPED": False,
            "WHOLE": fit == "whole",
            **_blocks(tile),
        },
        tile=tile,
        targets=names,
        product=_instructions(product, tile),
        unaligned=(*unaligned, "inputs", "outputs") if fit == "odd" else unaligned,
        label=f"{product} {flags} {tile.block_m}x{tile.block_n}x{tile.block_k} {fit}",
    )


def _grouped_ahead(code: str, tile: Tile, group: int, names: tuple[str, ...]) -> Ahead:
    tile = _for_groups(tile, group)
    return Ahead(
        kernel="gemm:grouped_product_kernel",
        signature={
            **dict.fromkeys(("a", "b"), _POINTERS[code][0]),
            **dict.fromkeys(("y", "bias", "low", "up", "b_scale"), "*bf16"),
            **dict.fromkeys(("a_scale", "correction"), "*fp32"),
            **dict.fromkeys(
                ("rows", "outputs", "inputs", "rank", "stride_row", "stride_group"), "i32"
            ),
        },
        constants={
            "BIAS": True,
            "CORRECTED": True,
            "RANK": 32,
            "GROUP": group,
            "B_GROUPED": group < 256,
            **_blocks(tile),
        },
        tile=tile,
        targets=names,
        product=_instructions(code, tile),
        unaligned=("rows", "stride_row", "stride_group"),
        label=f"{code} by {group} {tile.block_m}x{tile.block_n}x{tile.block_k}",
    )


def _blocks(tile: Tile) -> dict[str, int]:
    return {"BM": tile.block_m, "BN": tile.block_n, "BK": tile.block_k, "BAND": tile.group_m}


def _tiles(
    operation: str, names: tuple[str, ...], bits: int = 8, terms: int = 0
) -> dict[Tile, tuple[str, ...]]:
    """The tiles that the tables give for products with so many zero points, and their targets."""
    found: dict[Tile, tuple[str, ...]] = {}
    for name in names:
        machine = Machine(name, 96, targets.TARGETS[name].shared)
        tiles = [
            _for_terms(tile_for(operation, machine, m, n, 4096, bits=bits), terms, machine)
            for m in (*ROW_CLASSES, 4608)
            for n in (512, 3072, 12288)
        ]
        for tile in dict.fromkeys(tiles):
            found[tile] = (*found.get(tile, ()), name)
    return found


TARGETS = targets.cuda_from(80) + targets.CDNA + targets.RDNA
"""What multiplies int8 and 16-bit floats in Triton: Turing does not."""
FP8_TARGETS = targets.cuda_from(89)
"""What multiplies float8_e4m3fn."""

AHEAD: tuple[Ahead, ...] = (
    Ahead(
        kernel="gemm:column_sums_kernel",
        signature={"codes": "*i8", "sums": "*i32", "inputs": "i32"},
        constants={"BLOCK": 2048},
        tile=Tile(1, 1, 2048, 4, 3),
        targets=TARGETS,
    ),
    *(
        _scaled_ahead("int8", tile, flags, names, fit)
        for flags, fit, terms in (("branch", "whole", 0), ("zeros", "ragged", 2))
        for tile, names in _tiles("int8", TARGETS, terms=terms).items()
    ),
    _scaled_ahead("int8", _ODD, "zeros", TARGETS, "odd"),
    *(
        _scaled_ahead("fp8", tile, "bias", names, "ragged")
        for tile, names in _tiles("fp8", FP8_TARGETS).items()
    ),
    _scaled_ahead("fp8", _ODD, "branch", FP8_TARGETS, "odd"),
    *(
        _scaled_ahead("half", tile, "branch", names)
        for tile, names in _tiles("half", TARGETS, 16).items()
    ),
    *(
        _grouped_ahead(code, tile, group, names)
        for code, group, claimed in (
            ("int8", 64, TARGETS),
            ("int8", 256, TARGETS),
            ("fp8", 128, FP8_TARGETS),
        )
        for tile, names in _tiles("faithful", claimed).items()
    ),
)
