"""Producers that quantize: rows of activations to 8-bit codes, scales and sums in one pass.

A row goes through what is asked for, in this order:

    v = x                                    | norm(x), (1 + multiplier) * norm(x) + addend
    v = gelu(v) or silu(v); v = v * gate
    v = v rotated by Hadamard blocks; v + shift; v / smooth or v * smooth
    codes, scale of v

As in unfused code, norm, modulation, activation and gate are each rounded to the dtype of x. From
the rotation on all is float32 ("precise"), or rounded to the dtype of x after each step, as the
arithmetic of formats wants it (`kernels.faithful`).

| result  | shape              | dtype                                                           |
|---------|--------------------|-----------------------------------------------------------------|
| codes   | [M, K]             | int8, float8_e4m3fn; bfloat16 of codes times scales ("folded")  |
| scale   | [M] or [G, M]      | float32; of groups the rows stand together, as products read it |
| zero    | [M] or empty       | float32; v = codes * scale + zero                               |
| total   | [M] or empty       | int32; sum of a row's codes                                     |

Codes are those of the reference, bit by bit: scales are divided, not multiplied by reciprocals,
where the reference divides, and halves round to even.

A row of up to two blocks is held by one program at once; a longer one is read again for each
sweep (statistics of a norm, largest value, codes), the second time from the cache.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import hadamard_matrix
from .configs import Ahead, Tile, tile_for
from .gemm import FP8_TARGETS, TARGETS
from .library import INTERPRETED, narrow, operation, round_even

__all__ = ["AHEAD", "FORMATS", "SCALES", "Rows", "quantize_rows"]

FORMATS = {"int8": 127.0, "uint8": 255.0, "int4": 7.0, "uint4": 15.0, "fp8": 448.0, "e2m1": 6.0}
"""Code formats and their largest code. "uint8" is asymmetric, in int8 codes with a zero."""

SCALES = ("float32", "", "float8_e4m3fn", "float8_e8m0fnu", "ocp_e8m0", "static", "static groups")
"""How scales come about: those of `kernels.faithful.SCALES`, or given ones."""

_TERMS = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}
"""bfloat16 numbers that add up to any number of a dtype."""
_DIGIT = 16  # neighbours that one step of a rotation mixes: the smallest matrix product


# ------------------------------------------------------------------------------------- kernels


@triton.jit
def _as_half(v, dtype: tl.constexpr):
    """float32 rounded to `dtype`, as float32."""
    if dtype == tl.float32:
        return v
    else:
        return narrow(v, dtype).to(tl.float32)


@triton.jit
def _times(matrix, v, TERMS: tl.constexpr):
    """A [16, 16] matrix of bfloat16 times v [16, n] float32; exact for TERMS terms of bfloat16."""
    if INTERPRETED:
        return tl.dot(matrix.to(tl.float32), v, input_precision="ieee")
    else:
        high = v.to(tl.bfloat16)
        total = tl.dot(matrix, high)
        if TERMS > 1:
            rest = v - high.to(tl.float32)
            middle = rest.to(tl.bfloat16)
            total = tl.dot(matrix, middle, total)
            if TERMS > 2:
                total = tl.dot(matrix, (rest - middle.to(tl.float32)).to(tl.bfloat16), total)
        return total


@triton.jit
def _rotate_digit(v, matrix, BLOCK: tl.constexpr, INNER: tl.constexpr, TERMS: tl.constexpr):
    """v [BLOCK] with the digit of its index that counts INNER multiplied by a symmetric matrix."""
    v = tl.trans(tl.reshape(v, (BLOCK // 16 // INNER, 16, INNER)), (1, 0, 2))
    v = _times(matrix, tl.reshape(v, (16, BLOCK // 16)), TERMS)
    v = tl.trans(tl.reshape(v, (16, BLOCK // 16 // INNER, INNER)), (1, 0, 2))
    return tl.reshape(v, (BLOCK,))


@triton.jit
def _rotate(v, matrices, BLOCK: tl.constexpr, STEPS: tl.constexpr, TERMS: tl.constexpr):
    """v [BLOCK] with one base-16 digit of its index after another multiplied by its matrix."""
    row = tl.arange(0, 16)
    place = matrices + row[:, None] * 16 + row[None, :]
    v = _rotate_digit(v, tl.load(place), BLOCK, 1, TERMS)
    if STEPS > 1:
        v = _rotate_digit(v, tl.load(place + 256), BLOCK, 16, 3)
    if STEPS > 2:
        v = _rotate_digit(v, tl.load(place + 512), BLOCK, 256, 3)
    return v


@triton.jit
def _sigmoid(v):
    return 1.0 / (1.0 + tl.exp(-v))


@triton.jit
def _value(
    x, gate, multiplier, addend, weight, offset, smooth, matrices,
    column, inputs, mean, spread, turn, shift,
    NORM: tl.constexpr, WEIGHT: tl.constexpr, OFFSET: tl.constexpr, MODULATED: tl.constexpr,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, STEPS: tl.constexpr, TERMS: tl.constexpr,
    SHIFTED: tl.constexpr, SMOOTHING: tl.constexpr, PRECISE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Columns of one row as they are before they are rounded, float32 [BLOCK]; 0 beyond the end."""
    half: tl.constexpr = x.dtype.element_ty
    inside = column < inputs
    v = tl.load(x + column, mask=inside, other=0.0).to(tl.float32)
    if NORM != "":
        v = (v - mean) * spread
        if WEIGHT:
            v *= tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
        if OFFSET:
            v += tl.load(offset + column, mask=inside, other=0.0).to(tl.float32)
        v = _as_half(v, half)
    if MODULATED:
        factor = tl.load(multiplier + column, mask=inside, other=0.0).to(tl.float32)
        term = tl.load(addend + column, mask=inside, other=0.0).to(tl.float32)
        v = _as_half(v * _as_half(1.0 + factor, half) + term, half)
    if ACTIVATION == "gelu_tanh":
        v = v * _sigmoid(1.5957691216057308 * (v + 0.044715 * v * v * v))
        v = _as_half(v, half)
    if ACTIVATION == "silu":
        v = _as_half(v * _sigmoid(v), half)
    if GATED:
        v = _as_half(v * tl.load(gate + column, mask=inside, other=0.0).to(tl.float32), half)
    if STEPS:
        v = tl.where(inside, v, 0.0)
        v = _rotate(v, matrices, BLOCK, STEPS, TERMS) * turn
        if not PRECISE:
            v = _as_half(v, half)
    if SHIFTED:
        v = _as_half(v + shift, half)
    if SMOOTHING != "":
        factor = tl.load(smooth + column, mask=inside, other=1.0).to(tl.float32)
        v = tl.div_rn(v, factor) if SMOOTHING == "divide" else v * factor
        if not PRECISE:
            v = _as_half(v, half)
    return tl.where(inside, v, 0.0)


@triton.jit
def _size(v):
    """Magnitudes as integers of the same order, in which not-a-number is the largest."""
    return v.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _divided(v, scale):
    return tl.where(scale == 0.0, 0.0, tl.div_rn(v, scale))


@triton.jit
def _e4m3_value(v):
    """float32 rounded to a float8_e4m3fn, as float32."""
    power = (v.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    step = tl.minimum(tl.maximum(power, 0.015625) * 0.125, 32.0)
    inverse = (0x7F000000 - step.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
    rounded = round_even(v * inverse) * step
    return tl.where(v != v, v, tl.minimum(tl.maximum(rounded, -448.0), 448.0))


@triton.jit
def _code_value(v, FORMAT: tl.constexpr):
    """Scaled float32 values rounded to those of codes."""
    if FORMAT == "fp8":
        return _e4m3_value(v)
    elif FORMAT == "e2m1":
        size = tl.abs(v)
        finer = tl.where(size < 2.0, 2.0, tl.where(size < 4.0, 1.0, 0.5))
        step = tl.where(size < 2.0, 0.5, tl.where(size < 4.0, 1.0, 2.0))
        rounded = round_even(tl.minimum(size * finer, 65536.0)) * step
        return tl.where(v != v, v, tl.where(v < 0.0, -1.0, 1.0) * tl.minimum(rounded, 6.0))
    else:
        low: tl.constexpr = -8.0 if FORMAT == "int4" else 0.0 if FORMAT == "uint4" else -128.0
        high: tl.constexpr = 7.0 if FORMAT == "int4" else 15.0 if FORMAT == "uint4" else 127.0
        v = tl.where(v != v, 0.0, tl.minimum(tl.maximum(v, low - 1.0), high + 1.0))
        return tl.minimum(tl.maximum(round_even(v), low), high)


@triton.jit
def _scale_of(size, given, half: tl.constexpr, LARGEST: tl.constexpr, SCALE: tl.constexpr):
    """What values are multiplied or divided by, and what is stored, of largest magnitudes."""
    if SCALE == "" or SCALE == "float8_e4m3fn":
        exact = size * (1.0 / LARGEST)
        if SCALE == "":
            return exact, _as_half(exact, half)
        else:
            exact = tl.where(exact != exact, exact, tl.minimum(exact, 448.0))
            return exact, _e4m3_value(exact)
    elif SCALE == "float8_e8m0fnu":
        exact = tl.div_rn(size, LARGEST)
        bits = exact.to(tl.int32, bitcast=True)
        power = ((bits + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
        scale = tl.where(bits < 0x7F800000, power, exact)
        return scale, scale
    elif SCALE == "ocp_e8m0":
        bits = size.to(tl.int32, bitcast=True)
        power = (bits & 0x7F800000).to(tl.float32, bitcast=True)
        largest_power: tl.constexpr = 4.0 if LARGEST == 6.0 else 256.0
        scale = tl.where(bits < 0x7F800000, power, size) * (1.0 / largest_power)
        return scale, scale
    elif SCALE == "static groups":
        # The second level, `given`, is left to the product.
        scale = _e4m3_value(_divided(tl.div_rn(size, LARGEST), given))
        return scale * given, scale
    else:
        scale = tl.div_rn(size, LARGEST)
        return scale, scale


@triton.jit(do_not_specialize=["rows", "rows_each"])
def rows_kernel(
    x, gate, multiplier, addend, weight, offset, smooth, matrices, given, given_offset,
    codes, scale, zero, total,
    rows, inputs, stride_x, stride_gate, stride_modulation, rows_each, eps, turn, shift,
    NORM: tl.constexpr, WEIGHT: tl.constexpr, OFFSET: tl.constexpr, MODULATED: tl.constexpr,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, STEPS: tl.constexpr, TERMS: tl.constexpr,
    SHIFTED: tl.constexpr, SMOOTHING: tl.constexpr, PRECISE: tl.constexpr,
    FORMAT: tl.constexpr, LARGEST: tl.constexpr, SCALE: tl.constexpr, GROUP: tl.constexpr,
    FOLDED: tl.constexpr, COUNTED: tl.constexpr, TOTAL: tl.constexpr,
    BLOCK: tl.constexpr, SINGLE: tl.constexpr,
):  # fmt: skip
    """One row a program.

    FOLDED: codes are written times their scales. COUNTED: codes are counted from `given_offset`.
    SINGLE: the row fits one block.
    """
    row = tl.program_id(0).to(tl.int64)
    span = tl.arange(0, BLOCK)
    half: tl.constexpr = x.dtype.element_ty
    x += row * stride_x
    gate += row * stride_gate
    multiplier += row // rows_each * stride_modulation
    addend += row // rows_each * stride_modulation
    codes += row * inputs

    mean = 0.0
    spread = 1.0
    if NORM != "":
        if NORM == "layer":
            added = tl.zeros((BLOCK,), dtype=tl.float32)
            for start in range(0, inputs, BLOCK):
                column = start + span
                added += tl.load(x + column, mask=column < inputs, other=0.0).to(tl.float32)
            mean = tl.sum(added, axis=0) / inputs
        added = tl.zeros((BLOCK,), dtype=tl.float32)
        for start in range(0, inputs, BLOCK):
            column = start + span
            inside = column < inputs
            v = tl.load(x + column, mask=inside, other=0.0).to(tl.float32)
            v = tl.where(inside, v - mean, 0.0)
            added += v * v
        spread = 1.0 / tl.sqrt_rn(tl.sum(added, axis=0) / inputs + eps)

    if GROUP:
        second = 1.0
        if SCALE == "static groups":
            second = tl.load(given).to(tl.float32)
        groups: tl.constexpr = BLOCK // GROUP
        for start in range(0, inputs, BLOCK):
            v = _value(
                x, gate, multiplier, addend, weight, offset, smooth, matrices,
                start + span, inputs, mean, spread, turn, shift,
                NORM, WEIGHT, OFFSET, MODULATED, ACTIVATION, GATED, STEPS, TERMS,
                SHIFTED, SMOOTHING, PRECISE, BLOCK,
            )  # fmt: skip
            v = tl.reshape(v, (groups, GROUP))
            size = tl.max(_size(v), axis=1).to(tl.float32, bitcast=True)
            exact, stored = _scale_of(size, second, half, LARGEST, SCALE)
            if SCALE == "" or SCALE == "float8_e4m3fn":
                v = tl.where(v == 0.0, 0.0, v * tl.div_rn(1.0, exact)[:, None])
            else:
                v = _divided(v, exact[:, None])
            v = _code_value(v, FORMAT)
            column = tl.reshape(start + span, (groups, GROUP))
            inside = column < inputs
            if FOLDED:
                v = v * stored[:, None]
            else:
                group = start // GROUP + tl.arange(0, groups)
                tl.store(scale + group * rows + row, stored, mask=group * GROUP < inputs)
            tl.store(codes + column, narrow(v, codes.dtype.element_ty), mask=inside)
    else:
        if SINGLE:
            whole = _value(
                x, gate, multiplier, addend, weight, offset, smooth, matrices,
                span, inputs, mean, spread, turn, shift,
                NORM, WEIGHT, OFFSET, MODULATED, ACTIVATION, GATED, STEPS, TERMS,
                SHIFTED, SMOOTHING, PRECISE, BLOCK,
            )  # fmt: skip
            size = _size(whole)
            low = tl.where(span < inputs, whole, float("inf"))
            high = tl.where(span < inputs, whole, float("-inf"))
        else:
            size = tl.zeros((BLOCK,), dtype=tl.int32)
            low = tl.full((BLOCK,), float("inf"), dtype=tl.float32)
            high = tl.full((BLOCK,), float("-inf"), dtype=tl.float32)
            for start in range(0, inputs, BLOCK):
                v = _value(
                    x, gate, multiplier, addend, weight, offset, smooth, matrices,
                    start + span, inputs, mean, spread, turn, shift,
                    NORM, WEIGHT, OFFSET, MODULATED, ACTIVATION, GATED, STEPS, TERMS,
                    SHIFTED, SMOOTHING, PRECISE, BLOCK,
                )  # fmt: skip
                size = tl.maximum(size, _size(v))
                if FORMAT == "uint8":
                    inside = start + span < inputs
                    low = tl.where(inside, tl.minimum(low, v), low)
                    high = tl.where(inside, tl.maximum(high, v), high)
        largest = tl.max(size, axis=0).to(tl.float32, bitcast=True)
        base = 0.0
        counted = 0.0
        if FORMAT == "uint8":
            lowest = tl.min(low, axis=0)
            exact = tl.div_rn(tl.max(high, axis=0) - lowest, LARGEST)
            exact = tl.where(largest != largest, largest, exact)
            base = lowest + 128.0 * exact
            stored = exact
        elif SCALE == "static":
            exact = tl.load(given).to(tl.float32)
            # Integer codes cannot say that something was not a number.
            stored = tl.where(largest != largest, largest, exact)
        else:
            exact, stored = _scale_of(largest, 1.0, half, LARGEST, SCALE)
        if COUNTED:
            counted = tl.load(given_offset).to(tl.float32)
        summed = tl.zeros((BLOCK,), dtype=tl.int32)
        for start in range(0, inputs, BLOCK):
            column = start + span
            if SINGLE:
                v = whole
            else:
                v = _value(
                    x, gate, multiplier, addend, weight, offset, smooth, matrices,
                    column, inputs, mean, spread, turn, shift,
                    NORM, WEIGHT, OFFSET, MODULATED, ACTIVATION, GATED, STEPS, TERMS,
                    SHIFTED, SMOOTHING, PRECISE, BLOCK,
                )  # fmt: skip
            if SCALE == "":
                v = tl.where(v == 0.0, 0.0, v * tl.div_rn(1.0, exact))
            else:
                v = _divided(v - base, exact)
            if COUNTED:
                v += counted
            v = _code_value(v, FORMAT)
            inside = column < inputs
            tl.store(codes + column, narrow(v, codes.dtype.element_ty), mask=inside)
            if TOTAL:
                summed += tl.where(inside, v, 0.0).to(tl.int32)
        tl.store(scale + row, stored)
        if FORMAT == "uint8":
            tl.store(zero + row, base)
        elif COUNTED:
            tl.store(zero + row, -counted * stored)
        if TOTAL:
            tl.store(total + row, tl.sum(summed, axis=0))


# ------------------------------------------------------------------------------------ launcher


class Rows(NamedTuple):
    """Quantized rows: see the table above. `zero` and `total` are None where not asked for."""

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    total: Tensor | None


_matrices: dict[tuple[int, int, torch.device], Tensor] = {}


def _digit_matrices(block: int, basis: int, device: torch.device) -> Tensor:
    """A rotation of `block` neighbours as matrices of its base-16 digits: signs, [digits, 16, 16].

    The last digit of a block that is no power of 16 is mixed within parts of 16.
    """
    key = (block, basis, device)
    found = _matrices.get(key)
    if found is None:
        if basis == 4 and not block & 0x55555555:
            basis = 2
        matrices = []
        while block > 1:
            size = min(block, _DIGIT)
            part = hadamard_matrix(size, basis).sign()
            matrices.append(torch.block_diag(*[part] * (_DIGIT // size)))
            block //= size
        with torch.inference_mode(False), torch.no_grad():
            found = torch.stack(matrices).to(device, torch.bfloat16)
        _matrices[key] = found
    return found


def _sizes(
    x: Tensor, folded: bool, code_dtype: torch.dtype, group: int, zero: bool, total: bool
) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
    rows, inputs = x.shape
    scales = (0,) if folded else (inputs // group, rows) if group else (rows,)
    return (
        ((rows, inputs), torch.bfloat16 if folded else code_dtype),
        (scales, torch.float32),
        ((rows if zero else 0,), torch.float32),
        ((rows if total else 0,), torch.int32),
    )


def _results(x: Tensor, code: str, group: int, offset: bool, total: bool, folded: bool) -> list:
    dtype = torch.float8_e4m3fn if code == "fp8" else torch.int8
    return [
        torch.empty(shape, dtype=dtype, device=x.device)
        for shape, dtype in _sizes(x, folded, dtype, group, code == "uint8" or offset, total)
    ]


def _fake(
    x, code, scaling, group, folded, precise, total, given, given_offset, smooth, smoothing,
    hadamard, basis, shift, norm, eps, weight, offset, multiplier, addend, activation, gate,
):  # fmt: skip
    return tuple(_results(x, code, group, given_offset is not None, total, folded))


@operation("quantize_rows", fake=_fake)
def _quantize(
    x: Tensor,
    code: str,
    scaling: str,
    group: int,
    folded: bool,
    precise: bool,
    total: bool,
    given: Tensor | None,
    given_offset: Tensor | None,
    smooth: Tensor | None,
    smoothing: str,
    hadamard: int,
    basis: int,
    shift: float,
    norm: str,
    eps: float,
    weight: Tensor | None,
    offset: Tensor | None,
    multiplier: Tensor | None,
    addend: Tensor | None,
    activation: str,
    gate: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    results = _results(x, code, group, given_offset is not None, total, folded)
    launch(
        results, x, code, scaling, group, folded, precise, total, given, given_offset, smooth,
        smoothing, hadamard, basis, shift, norm, eps, weight, offset, multiplier, addend,
        activation, gate,
    )  # fmt: skip
    return tuple(results)


def launch(
    results, x, code, scaling, group, folded, precise, total, given, given_offset, smooth,
    smoothing, hadamard, basis, shift, norm, eps, weight, offset, multiplier, addend, activation,
    gate,
) -> None:  # fmt: skip
    """Write `results` (codes, scale, zero, total) of x [M, K], whose columns are neighbours."""
    rows, inputs = x.shape
    if rows == 0:
        return
    tile = tile_for("rows", x.device, rows, inputs, inputs)
    steps = -(-(hadamard.bit_length() - 1) // 4) if hadamard else 0
    block = max(tile.block_k, group, 256 if steps else 0, _DIGIT**steps)
    whole = triton.next_power_of_2(inputs)
    single = whole <= 2 * block
    if single:
        block = max(whole, group, 256 if steps else 0, _DIGIT**steps)
    codes, scale, zero, totals = results
    rows_kernel[(rows,)](
        x,
        x if gate is None else gate,
        x if multiplier is None else multiplier,
        x if addend is None else addend,
        x if weight is None else weight,
        x if offset is None else offset,
        x if smooth is None else smooth,
        x if not steps else _digit_matrices(hadamard, basis, x.device),
        x if given is None else given,
        x if given_offset is None else given_offset,
        codes,
        scale,
        zero,
        totals,
        rows,
        inputs,
        x.stride(0),
        0 if gate is None else gate.stride(0),
        0 if multiplier is None else multiplier.stride(0),
        1 if multiplier is None else rows // multiplier.shape[0],
        eps,
        hadamard**-0.5 if steps else 1.0,
        shift,
        NORM=norm,
        WEIGHT=weight is not None,
        OFFSET=offset is not None,
        MODULATED=multiplier is not None,
        ACTIVATION=activation,
        GATED=gate is not None,
        STEPS=steps,
        TERMS=_TERMS[x.dtype],
        SHIFTED=shift != 0,
        SMOOTHING=smoothing,
        PRECISE=precise,
        FORMAT=code,
        LARGEST=FORMATS[code],
        SCALE=scaling,
        GROUP=group,
        FOLDED=folded,
        COUNTED=given_offset is not None,
        TOTAL=total,
        BLOCK=block,
        SINGLE=single,
        num_warps=min(max(block // 512, 1), 16),
        enable_fp_fusion=True,
    )


def quantize_rows(
    x: Tensor,
    *,
    format: str = "int8",
    scaling: str = "float32",
    group: int = 0,
    folded: bool = False,
    precise: bool = True,
    total: bool = False,
    given: Tensor | None = None,
    given_offset: Tensor | None = None,
    smooth: Tensor | None = None,
    smoothing: str = "",
    hadamard: int = 0,
    basis: int = 2,
    shift: float = 0.0,
    norm: str = "",
    eps: float = 1e-6,
    weight: Tensor | None = None,
    offset: Tensor | None = None,
    multiplier: Tensor | None = None,
    addend: Tensor | None = None,
    activation: str = "",
    gate: Tensor | None = None,
) -> Rows:
    """The rows of x [..., K], quantized, as [M, K].

    Args:
        x: float32, float16 or bfloat16.
        format: one of FORMATS.
        scaling: one of SCALES; "uint8" has its own.
        group: elements that share a scale, a power of two that divides K; 0 for a row.
        folded: give codes times scales in bfloat16 in place of both, of groups only: exact for
            4-bit floats with scales of one byte and for 8-bit floats with powers of two. What is
            given as second level is left out.
        precise: float32 between the rotation and the codes, see above.
        total: count the sums of rows.
        given: [1], the scale where it is static, or the second level of static groups.
        given_offset: [1], from which codes are counted.
        smooth, smoothing: [K] and what it does, as in the spec.
        hadamard, basis: as in the spec.
        shift: added before smoothing.
        norm: "rms" or "layer", with `eps` and optionally `weight` and `offset` [K].
        multiplier, addend: [B, K] of an adaptive norm, each for M / B neighbouring rows.
        activation: "gelu_tanh" or "silu".
        gate: [..., K], multiplies what the activation gave.
    """
    inputs = x.shape[-1]

    def flat(tensor: Tensor) -> Tensor:
        tensor = tensor.reshape(-1, inputs)
        return tensor if tensor.stride(1) == 1 else tensor.contiguous()

    codes, scale, zero, totals = _quantize(
        flat(x), format, scaling, group, folded, precise, total, given, given_offset,
        None if smooth is None or not smoothing else smooth.contiguous(),
        smoothing, hadamard, basis, shift, norm, eps, weight, offset,
        None if multiplier is None else flat(multiplier),
        None if addend is None else flat(addend),
        activation,
        None if gate is None else flat(gate),
    )  # fmt: skip
    return Rows(
        codes,
        scale,
        zero if format == "uint8" or given_offset is not None else None,
        totals if total else None,
    )


# -------------------------------------------------------------------------------------- claims

_PLAIN: dict[str, object] = {
    "NORM": "", "WEIGHT": False, "OFFSET": False, "MODULATED": False, "ACTIVATION": "",
    "GATED": False, "STEPS": 0, "TERMS": 1, "SHIFTED": False, "SMOOTHING": "", "PRECISE": True,
    "FORMAT": "int8", "SCALE": "float32", "GROUP": 0, "FOLDED": False, "COUNTED": False,
    "TOTAL": False, "BLOCK": 4096, "SINGLE": True,
}  # fmt: skip
_FAITHFUL = {"SMOOTHING": "divide", "PRECISE": False, "FOLDED": False}
_CASES: tuple[tuple[str, dict[str, object]], ...] = (
    ("int8", {}),
    ("int8, long", {"SINGLE": False, "TOTAL": True}),
    ("uint8", {"FORMAT": "uint8", "TOTAL": True}),
    ("int8, counted", {"SCALE": "static", "COUNTED": True}),
    ("int8 by 256", {"GROUP": 256}),
    ("int8, rotated by 256", {"STEPS": 2}),
    ("int8, long, rotated by 4096", {"STEPS": 3, "SINGLE": False}),
    ("int8, adaptive norm", {"NORM": "layer", "MODULATED": True}),
    ("int8, norm", {"NORM": "rms", "WEIGHT": True, "OFFSET": True}),
    ("int8, gelu", {"ACTIVATION": "gelu_tanh", "SINGLE": False}),
    ("int8, gated silu", {"ACTIVATION": "silu", "GATED": True, "SINGLE": False}),
    ("int4 by 64", _FAITHFUL | {"FORMAT": "int4", "SCALE": "", "GROUP": 64}),
    ("uint4 by 64", _FAITHFUL | {"FORMAT": "uint4", "SCALE": "", "GROUP": 64, "SHIFTED": True}),
    (
        "nvfp4",
        _FAITHFUL | {"FORMAT": "e2m1", "SCALE": "float8_e4m3fn", "GROUP": 16, "FOLDED": True},
    ),
    ("nvfp4, static", {"FORMAT": "e2m1", "SCALE": "static groups", "GROUP": 16, "FOLDED": True}),
    ("mxfp8", {"FORMAT": "fp8", "SCALE": "float8_e8m0fnu", "GROUP": 32, "FOLDED": True}),
    ("fp8", {"FORMAT": "fp8"}),
    ("fp8, static, long", {"FORMAT": "fp8", "SCALE": "static", "SINGLE": False}),
)


def _ahead(label: str, changed: dict[str, object]) -> Ahead:
    constants = _PLAIN | changed
    code = constants["FORMAT"]
    folded = constants["FOLDED"]
    fp8 = code == "fp8" and not folded
    constants["LARGEST"] = FORMATS[code]
    floats = ("gate", "multiplier", "addend", "weight", "offset", "smooth", "matrices")
    sizes = ("rows", "inputs", "stride_x", "stride_gate", "stride_modulation", "rows_each")
    return Ahead(
        kernel="rows:rows_kernel",
        signature={
            **dict.fromkeys(("x", *floats), "*bf16"),
            **dict.fromkeys(("given", "given_offset", "scale", "zero"), "*fp32"),
            "codes": "*bf16" if folded else "*fp8e4nv" if fp8 else "*i8",
            "total": "*i32",
            **dict.fromkeys(sizes, "i32"),
            **dict.fromkeys(("eps", "turn", "shift"), "fp32"),
        },
        constants=constants,
        tile=Tile(1, 1, constants["BLOCK"], warps=8, stages=3),
        targets=FP8_TARGETS if fp8 else TARGETS,
        product="half" if constants["STEPS"] else "",
        unaligned=("rows", "rows_each"),
        label=label,
    )


AHEAD: tuple[Ahead, ...] = tuple(_ahead(label, changed) for label, changed in _CASES)
