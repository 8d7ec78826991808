"""Products of float activations with a weight that is decoded on the way: x @ W.T + bias.

| rows of x          | way                                                                   |
|--------------------|-----------------------------------------------------------------------|
| up to GEMV_ROWS    | one kernel, sums of products in float32; the weight is read once      |
| up to `fused_rows` | one kernel, matrix products with decoded tiles; the weight stands left|
| more               | unpacked into a workspace, then the library's product                 |

Where the first two stop paying follows from a machine's limits: unpacking costs as much as about
UNPACK_ROWS more rows, and a fused kernel reaches a SHARE of the library's speed, so that it wins
below UNPACK_ROWS * share / (1 - share) rows.

x is rotated instead of the weight. Few rows are smoothed, and have the low-rank branch beside the
product; for many both are put into the unpacked weight, which costs the same for any number of
rows. Sums are float32 and their order is fixed: equal calls give equal results.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from ..reference import hadamard_matrix, linear_dequantize
from ..spec import WeightSpec
from . import workspace
from .configs import Ahead, Machine, Tile, family_of, machine_of, tile_for
from .flat import named, packed, spec_of, text_of
from .library import narrow, operation, widen
from .targets import EVERY, TARGETS
from .unpack import (
    E2M1,
    FP8,
    I4,
    SCALED,
    STRIDES,
    U4,
    ZERO,
    codes_of,
    dequantize_into,
    example,
    load_scale,
    load_words,
    load_zero,
    tables_of,
    value_of,
    value_tile,
    weight_signature,
)  # fmt: skip

__all__ = ["AHEAD", "GEMV_ROWS", "fused_rows", "linear_weight_only"]

GEMV_ROWS = 8
UNPACK_ROWS = 235  # work of a product's rows that unpacking a weight is worth; perf.md
SHARE = {
    "interpreter": 0.1,
    "ampere": 0.5,
    "ada": 0.7,
    "hopper": 0.4,
    "blackwell": 0.35,
    "workstation": 0.6,
    "cdna": 0.3,
    "rdna": 0.3,
}
"""What a fused kernel reaches of the library's speed; without an entry it is never used."""


def fused_rows(machine: Machine) -> int:
    """Rows up to which the fused kernel is the fastest."""
    share = SHARE.get(family_of(machine.architecture), 0.0)
    return int(UNPACK_ROWS * share / (1 - share))


# ------------------------------------------------------------------------------------- kernels


@triton.jit(do_not_specialize=["rows"])
def gemv_kernel(
    codes,
    scale,
    scale_2,
    zero_point,
    levels,
    smooth,
    x,
    up,
    inner,
    bias,
    out,
    rows,
    outputs,
    columns,
    x_stride,
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
    SMOOTHING: tl.constexpr,
    RANK: tl.constexpr,
    BIASED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """[ROWS, BLOCK_N] of x @ W.T (+ inner @ up.T + bias): the whole inner dimension.

    Each value of a super-block meets its own column of x, so that nothing is put in order; sums
    are scaled once for each run of values that share a scale. Super-blocks are the first axis,
    along which Triton then lays the threads of every load: nothing passes between them.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    at = tl.where(n < outputs, n, 0)[None, :, None]
    m = tl.arange(0, ROWS)
    x_rows = (tl.where(m < rows, m, 0) * x_stride)[None, None, :]
    tables = (scale, scale_2, zero_point, levels)
    strides = (scale_n, scale_g, scale_2_n, scale_2_g, level_n, level_g, level_q)
    RUN: tl.constexpr = (TABLES >> 128) & 255
    total = tl.zeros((BLOCKS, BLOCK_N, ROWS), tl.float32)
    for start in range(0, columns, BLOCKS * VALUES):
        first = (start + tl.arange(0, BLOCKS) * VALUES)[:, None, None]
        mask = (at >= 0) & (first < columns)
        # Triton must not see that words are neighbours: it would give each thread four of them.
        place = at.to(tl.int64) * row_words + first // VALUES * WORDS
        words = load_words(codes, place, mask, WORDS)
        part = tl.zeros((BLOCKS, BLOCK_N, ROWS), tl.float32)
        x_part = tl.zeros((BLOCKS, 1, ROWS), tl.float32)
        for j in tl.static_range(VALUES):
            value = tl.load(x + x_rows + first + j, first < columns, 0).to(tl.float32)
            if SMOOTHING != "":
                factor = tl.load(smooth + first + j, first < columns, 1).to(tl.float32)
                value = value / factor if SMOOTHING == "divide" else value * factor
            column = first + (j - j % RUN)
            part += value * value_of(words, at, column, mask, tables, strides, j, FORMAT, TABLES)
            if ZERO & TABLES:
                x_part += value
            if (j + 1) % RUN == 0 or j + 1 == VALUES:
                if SCALED & TABLES:
                    part *= load_scale(at, column, mask, tables, strides, TABLES)
                total += part
                if ZERO & TABLES:
                    total += x_part * load_zero(at, column, mask, tables, strides, TABLES)
                    x_part = tl.zeros((BLOCKS, 1, ROWS), tl.float32)
                part = tl.zeros((BLOCKS, BLOCK_N, ROWS), tl.float32)
    y = tl.sum(total, 0)
    inside = (m < rows)[:, None] & (n < outputs)[None, :]
    if RANK > 0:
        r = tl.arange(0, triton.next_power_of_2(RANK))[:, None, None]
        left = tl.load(inner + tl.where(m < rows, m, 0)[None, None, :] * RANK + r, r < RANK, 0)
        right = tl.load(up + at * RANK + r, r < RANK, 0)
        y += tl.sum(left.to(tl.float32) * right.to(tl.float32), 0)
    y = y.T
    if BIASED:
        y += tl.load(bias + n, n < outputs, 0).to(tl.float32)[None, :]
    tl.store(out + m[:, None] * outputs + n[None, :], narrow(y, out.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["rows"])
def fused_kernel(
    codes,
    scale,
    scale_2,
    zero_point,
    levels,
    x,
    up,
    inner,
    bias,
    out,
    rows,
    outputs,
    columns,
    x_stride,
    row_words,
    span,
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
    RANK: tl.constexpr,
    PRECISION: tl.constexpr,
    BIASED: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """[BLOCK_M, BLOCK_N] of x @ W.T (+ inner @ up.T + bias).

    Args:
        out: [M, N]; with SPLIT > 1 float32 [SPLIT, M, N], sums of parts of `span` columns each,
            the first of which has the branch and the bias.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(2)
    at_n = tl.where(n < outputs, n, 0)
    at_m = tl.where(m < rows, m, 0)
    tables = (scale, scale_2, zero_point, levels)
    strides = (scale_n, scale_g, scale_2_n, scale_2_g, level_n, level_g, level_q)
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    begin = split * span
    end = tl.minimum(begin + span, columns)
    for start in range(begin, end, BLOCKS * VALUES):
        first = (start + tl.arange(0, BLOCKS) * VALUES)[None, :]
        mask = (at_n[:, None] >= 0) & (first < end)
        place = at_n.to(tl.int64)[:, None] * row_words + first // VALUES * WORDS
        words = load_words(codes, place, mask, WORDS)
        weight = value_tile(
            words, at_n[:, None], first, mask, tables, strides, columns, columns, 0, 1, VALUES,
            FORMAT, TABLES, False, False,
        )  # fmt: skip
        k = start + tl.arange(0, BLOCKS * VALUES)
        # What is past the end is zero in x: there the weight may be anything finite.
        weight = tl.where((k < end)[None, :], weight, 0.0)
        right = tl.load(
            x + at_m.to(tl.int64)[:, None] * x_stride + k[None, :], (k < end)[None, :], 0
        )
        left = narrow(weight, x.dtype.element_ty)
        total = tl.dot(widen(left), widen(right).T, total)
    if split == 0:
        if RANK > 0:
            SIZE: tl.constexpr = triton.next_power_of_2(RANK) if RANK > 16 else 16
            r = tl.arange(0, SIZE)[None, :]
            left = tl.load(up + at_n[:, None] * RANK + r, r < RANK, 0).to(inner.dtype.element_ty)
            right = tl.load(inner + at_m[:, None] * RANK + r, r < RANK, 0)
            total = tl.dot(widen(left), widen(right).T, total, input_precision=PRECISION)
        if BIASED:
            total += tl.load(bias + at_n).to(tl.float32)[:, None]
    inside = (m < rows)[:, None] & (n < outputs)[None, :]
    place = (split * rows + m).to(tl.int64)[:, None] * outputs + n[None, :]
    tl.store(out + place, narrow(total.T, out.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["count"])
def sum_kernel(parts, out, count, SPLIT: tl.constexpr, BLOCK: tl.constexpr):
    """out [count] = the sum of parts [SPLIT, count], in order."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(SPLIT):
        total += tl.load(parts + split * count + at, at < count, 0)
    tl.store(out + at, narrow(total, out.dtype.element_ty), at < count)


# ----------------------------------------------------------------------------------- launchers


def linear_weight_only(
    x: Tensor, tensors: Mapping[str, Tensor], spec: WeightSpec, bias: Tensor | None = None
) -> Tensor:
    """x [..., K] times the weight [N, K], plus bias [N]: [..., N] in the dtype of x."""
    if x.requires_grad and torch.is_grad_enabled():
        return linear_dequantize(x, tensors, spec, bias)
    return _linear_weight_only(x, *packed(tensors), bias, text_of(spec))


def _fake(x, codes, scale, scale_2, zero_point, levels, smooth, svd_up, svd_down, bias, spec):
    return x.new_empty((*x.shape[:-1], spec_of(spec).rows))


@operation("linear_weight_only", fake=_fake)
def _linear_weight_only(
    x: Tensor,
    codes: Tensor,
    scale: Tensor | None,
    scale_2: Tensor | None,
    zero_point: Tensor | None,
    levels: Tensor | None,
    smooth: Tensor | None,
    svd_up: Tensor | None,
    svd_down: Tensor | None,
    bias: Tensor | None,
    spec: str,
) -> Tensor:
    tensors = named(codes, scale, scale_2, zero_point, levels, smooth, svd_up, svd_down)
    weight = spec_of(spec)
    y = x.new_empty((*x.shape[:-1], weight.rows))
    if y.numel() == 0:
        return y
    rows = x.reshape(-1, weight.columns)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    if weight.hadamard:
        rows = _rotated(rows, weight.hadamard, weight.hadamard_basis)
    out = y.view(-1, weight.rows)
    count = rows.shape[0]
    aligned = weight.columns % weight.format.block_values == 0
    if aligned and count <= GEMV_ROWS:
        _gemv(rows, tensors, weight, bias, out)
    elif aligned and count <= fused_rows(machine_of(x.device)) and x.element_size() == 2:
        _fused(rows, tensors, weight, bias, out)
    else:
        _two_passes(rows, tensors, weight, bias, out)
    return y


_signs: dict[tuple, Tensor] = {}


def _rotated(rows: Tensor, block: int, basis: int) -> Tensor:
    """Rows with every `block` neighbours rotated, summed in float32 and rounded once."""
    key = (block, basis, rows.device, rows.dtype)
    signs = _signs.get(key)
    if signs is None:
        with torch.inference_mode(False):
            # From the CPU: that waits, so that any stream may read it from then on.
            signs = hadamard_matrix(block, basis).sign().to(rows.device, rows.dtype)
            _signs[key] = signs
    flat = rows.reshape(-1, block)
    return torch.addmm(flat, flat, signs, beta=0, alpha=block**-0.5).view(rows.shape)


def _inner(rows: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """Activations of the low-rank branch [M, r]: float32 where its dtypes are not that of x."""
    down = tensors["svd_down"]
    if not rows.dtype == down.dtype == tensors["svd_up"].dtype:
        rows, down = rows.to(torch.float32), down.to(torch.float32)
    return functional.linear(rows, down)


def _pointers(tensors: Mapping[str, Tensor], spec: WeightSpec):
    codes = codes_of(tensors, spec, 0, spec.rows)
    tables = tables_of(tensors, spec)
    pointers = [codes.words, *(codes.words if t is None else t for t in tables.tensors)]
    row_words = spec.columns // codes.layout.values * codes.layout.words
    return codes.layout, tables, pointers, row_words


def _gemv(
    rows: Tensor,
    tensors: Mapping[str, Tensor],
    spec: WeightSpec,
    bias: Tensor | None,
    out: Tensor,
) -> None:
    layout, tables, pointers, row_words = _pointers(tensors, spec)
    count, outputs, columns = rows.shape[0], spec.rows, spec.columns
    if count * rows.stride(0) >= 1 << 31:  # offsets of 32 bits save registers
        rows = rows.contiguous()
    tile = tile_for("gemv", rows.device, count, outputs, columns)
    filler = pointers[0]
    gemv_kernel[(triton.cdiv(outputs, tile.block_n),)](
        *pointers,
        tensors["smooth"].contiguous() if spec.smoothing else filler,
        rows,
        tensors["svd_up"].contiguous() if spec.rank else filler,
        _inner(rows, tensors) if spec.rank else filler,
        filler if bias is None else bias.contiguous(),
        out,
        count,
        outputs,
        columns,
        rows.stride(0),
        row_words,
        *tables.strides,
        WORDS=layout.words,
        VALUES=layout.values,
        FORMAT=layout.number,
        TABLES=tables.number,
        SMOOTHING=spec.smoothing,
        RANK=spec.rank,
        BIASED=bias is not None,
        ROWS=triton.next_power_of_2(count),
        BLOCK_N=tile.block_n,
        BLOCKS=max(tile.block_k // layout.values, 1),
        **tile.options,
    )


def _smoothed(rows: Tensor, tensors: Mapping[str, Tensor], spec: WeightSpec) -> Tensor:
    if not spec.smoothing:
        return rows
    function = torch.div if spec.smoothing == "divide" else torch.mul
    return function(rows, tensors["smooth"], out=torch.empty_like(rows))


def _fused(
    rows: Tensor,
    tensors: Mapping[str, Tensor],
    spec: WeightSpec,
    bias: Tensor | None,
    out: Tensor,
) -> None:
    layout, tables, pointers, row_words = _pointers(tensors, spec)
    count, outputs, columns = rows.shape[0], spec.rows, spec.columns
    inner = _inner(rows, tensors) if spec.rank else pointers[0]
    rows = _smoothed(rows, tensors, spec)
    machine = machine_of(rows.device)
    tile = tile_for("fused", machine, count, outputs, columns)
    block_k = max(tile.block_k, layout.values, 16)
    tiles = triton.cdiv(outputs, tile.block_n) * triton.cdiv(count, tile.block_m)
    split, span = split_of(tiles, columns, block_k, machine.processors)
    parts = out
    if split > 1:
        parts = workspace.get(rows.device, 4 * split * out.numel(), torch.float32)
    fused_kernel[(triton.cdiv(outputs, tile.block_n), triton.cdiv(count, tile.block_m), split)](
        *pointers,
        rows,
        tensors["svd_up"].contiguous() if spec.rank else pointers[0],
        inner,
        pointers[0] if bias is None else bias.contiguous(),
        parts,
        count,
        outputs,
        columns,
        rows.stride(0),
        row_words,
        span,
        *tables.strides,
        WORDS=layout.words,
        VALUES=layout.values,
        FORMAT=layout.number,
        TABLES=tables.number,
        RANK=spec.rank,
        PRECISION="tf32" if machine.architecture.startswith("sm") else "ieee",
        BIASED=bias is not None,
        SPLIT=split,
        BLOCK_N=tile.block_n,
        BLOCK_M=tile.block_m,
        BLOCKS=block_k // layout.values,
        **tile.options,
    )
    if split > 1:
        block = 1024
        sum_kernel[(triton.cdiv(out.numel(), block),)](
            parts, out, out.numel(), SPLIT=split, BLOCK=block, num_warps=4
        )


def split_of(tiles: int, columns: int, block_k: int, processors: int) -> tuple[int, int]:
    """Parts of the inner dimension, and columns of a part: enough programs for all processors,
    and at least four blocks for each."""
    steps = triton.cdiv(columns, block_k)
    split = 1
    while split < 8 and tiles * split < processors and steps >= 8 * split:
        split *= 2
    return split, triton.cdiv(steps, split) * block_k


def _two_passes(
    rows: Tensor,
    tensors: Mapping[str, Tensor],
    spec: WeightSpec,
    bias: Tensor | None,
    out: Tensor,
) -> None:
    device, outputs, columns = rows.device, spec.rows, spec.columns
    # A library adds a bias for nothing to a whole output, but not to columns of one.
    limit = workspace.chunk_bytes(device, whole=bias is not None)
    step = max(limit // (columns * rows.element_size()) // 256, 1) * 256
    bias = None if bias is None else bias.to(rows.dtype)
    for start in range(0, outputs, step):
        stop = min(start + step, outputs)
        nbytes = (stop - start) * columns * rows.element_size()
        weight = workspace.get(device, nbytes, rows.dtype).view(stop - start, columns)
        dequantize_into(tensors, spec, weight, start, unrotate=False)
        part = out[:, start:stop]
        if bias is None:
            torch.mm(rows, weight.t(), out=part)
        else:
            torch.addmm(bias[start:stop], rows, weight.t(), out=part)


# ----------------------------------------------------------------------------- ahead of time


def _gemv_ahead(
    label: str, spec: WeightSpec, rows: int, scale: torch.dtype, zero: bool = False
) -> tuple[Ahead, ...]:
    signature, constants = weight_signature(spec, scale, zero=zero)
    word = signature["codes"]
    tiles: dict[Tile, tuple[str, ...]] = {}
    for name in EVERY:
        tile = tile_for("gemv", Machine(name, 132, TARGETS[name].shared), rows, 3072, 3072)
        tiles[tile] = (*tiles.get(tile, ()), name)
    return tuple(
        Ahead(
            "weight_only:gemv_kernel",
            {
                **signature,
                "smooth": "*bf16" if spec.smoothing else word,
                **dict.fromkeys(("x", "bias", "out"), "*bf16"),
                **dict.fromkeys(("up", "inner"), "*bf16" if spec.rank else word),
                **dict.fromkeys(("outputs", "x_stride"), "i32"),
            },
            {
                **constants,
                "SMOOTHING": spec.smoothing,
                "RANK": spec.rank,
                "BIASED": True,
                "ROWS": rows,
                "BLOCK_N": tile.block_n,
                "BLOCKS": max(tile.block_k // constants["VALUES"], 1),
            },
            tile,
            targets,
            unaligned=STRIDES,
            label=label,
        )
        for tile, targets in tiles.items()
    )


def _fused_ahead(
    label: str,
    spec: WeightSpec,
    tile: Tile,
    targets: tuple[str, ...],
    scale: torch.dtype,
    zero: bool = False,
    split: int = 1,
    half: str = "bf16",
    precision: str = "",
) -> Ahead:
    """With a `precision` the branch is not of the dtype of x."""
    signature, constants = weight_signature(spec, scale, zero=zero)
    branch = f"*{half}" if spec.rank else signature["codes"]
    return Ahead(
        "weight_only:fused_kernel",
        {
            **signature,
            **dict.fromkeys(("x", "bias"), f"*{half}"),
            "out": "*fp32" if split > 1 else f"*{half}",
            "up": branch,
            "inner": "*fp32" if precision else branch,
            **dict.fromkeys(("outputs", "x_stride", "span"), "i32"),
        },
        {
            **constants,
            "RANK": spec.rank,
            "PRECISION": precision or "ieee",
            "BIASED": True,
            "SPLIT": split,
            "BLOCK_N": tile.block_n,
            "BLOCK_M": tile.block_m,
            "BLOCKS": tile.block_k // constants["VALUES"],
        },
        tile,
        targets,
        product="half",
        unaligned=STRIDES,
        label=f"{label} {tile.block_m}x{tile.block_n}x{tile.block_k}",
    )


def _tiles() -> dict[Tile, tuple[str, ...]]:
    """Every tile that a target may be given for the fused kernel, and those targets."""
    found: dict[Tile, list[str]] = {}
    for name in EVERY:
        machine = Machine(name, 132, TARGETS[name].shared)
        limit = fused_rows(machine)
        for rows in (16, 64, 256, limit):
            if GEMV_ROWS < rows <= limit:
                targets = found.setdefault(tile_for("fused", machine, rows, 3072, 3072), [])
                targets += [name] if name not in targets else []
    return {tile: tuple(targets) for tile, targets in found.items()}


_U4 = example(U4, 64)
_SVDQ = example(I4, 64, rank=32, smoothing="divide")
_NVFP4 = example(E2M1, 16, two_level=True)

AHEAD: tuple[Ahead, ...] = (
    *_gemv_ahead("uint4 1", _U4, 1, torch.bfloat16, zero=True),
    *_gemv_ahead("uint4 8", _U4, 8, torch.bfloat16, zero=True),
    *_gemv_ahead("svdq 2", _SVDQ, 2, torch.bfloat16),
    *_gemv_ahead("nvfp4 4", _NVFP4, 4, torch.float8_e4m3fn),
    *_gemv_ahead("fp8 1", example(FP8), 1, torch.float32),
    *(
        _fused_ahead(*arguments, tile, targets, **options)
        for tile, targets in _tiles().items()
        for arguments, options in (
            (("uint4", _U4), {"scale": torch.bfloat16, "zero": True, "split": 4}),
            (("svdq", _SVDQ), {"scale": torch.float16, "half": "fp16"}),
        )
    ),
    *(
        _fused_ahead(
            f"wide branch {precision}", _SVDQ, tile, chosen, torch.float32, precision=precision
        )
        for tile, targets in list(_tiles().items())[-1:]
        for precision, prefix in (("tf32", "sm"), ("ieee", "gfx"))
        if (chosen := tuple(t for t in targets if t.startswith(prefix)))
    ),
    Ahead(
        "weight_only:sum_kernel",
        {"parts": "*fp32", "out": "*bf16", "count": "i32"},
        {"SPLIT": 8, "BLOCK": 1024},
        Tile(1, 1024, 1),
        EVERY,
    ),
)
