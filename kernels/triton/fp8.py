"""Products in float8_e4m3fn: rows of x rounded to it, a weight of any format, one library call.

    x  ~ xq * xs          rows.py: rotated, smoothed, rounded row by row
    W  ~ Wq * ws          as stored where it is float8_e4m3fn with one scale a row (or in all); of
                          all else each row is rounded on the way (unpack.to_fp8)
    y  = (xq . Wq) * xs * ws + bias + (x . down) . up

The library's kernel (`torch._scaled_mm`) is the fastest there is; where it refuses (scales by row
before compute capability 9.0 or with results that it does not write, channels that are no multiple
of 16) the product is that of gemm.py. What it accepts is seen by asking it for a small product.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..reference import full_scale
from ..spec import WeightSpec
from . import gemm, unpack
from .flat import named, packed, spec_of, text_of
from .int8 import Prepared, branch_of, few_rows, linear_few_rows
from .library import operation
from .rows import quantize_rows

__all__ = ["is_stored_fp8", "linear_fp8", "linear_fp8_prepared", "prepare", "product", "stored_fp8"]

_STEP = 16  # channels of the library's product are a multiple of it


@lru_cache(maxsize=64)
def _library_has(
    device: torch.device, dtype: torch.dtype, by_row: bool, by_column: bool, bias: bool
) -> bool:
    """Whether `torch._scaled_mm` gives the right small product for results of `dtype`."""
    with torch.inference_mode(False), torch.no_grad():
        values = torch.arange(32 * 32, device=device).remainder(13).sub(6).view(32, 32)
        a = values.to(torch.float8_e4m3fn)
        b = values.flip(0).contiguous().to(torch.float8_e4m3fn)
        scale = torch.linspace(0.5, 2, 32, device=device)
        left = scale if by_row else scale[3:4]
        right = scale.flip(0).contiguous() if by_column else scale[5:6]
        added = scale.to(dtype) if bias else None
        exact = (a.float() @ b.float().t()) * left.view(-1, 1) * right.view(1, -1)
        if bias:
            exact = exact + added.float()
        try:
            found = _library(a, b, left, right, dtype, added).float()
        except (RuntimeError, ValueError, NotImplementedError):
            return False
        return bool((found - exact).norm() <= 0.01 * exact.norm())


def _library(
    a: Tensor, b: Tensor, left: Tensor, right: Tensor, dtype: torch.dtype, bias: Tensor | None
) -> Tensor:
    if left.numel() > 1 or right.numel() > 1:
        left = left.expand(a.shape[0]).contiguous().view(-1, 1)
        right = right.expand(b.shape[0]).contiguous().view(1, -1)
    else:
        left, right = left.view(()), right.view(())
    return torch._scaled_mm(
        a, b.t(), scale_a=left, scale_b=right, bias=bias, out_dtype=dtype, use_fast_accum=True
    )


def product(
    a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, dtype: torch.dtype, bias: Tensor | None
) -> Tensor:
    """(a . b) * a_scale * b_scale + bias as [M, N] of `dtype`, by the library or by Triton.

    Args:
        a, b: [M, K] and [N, K] float8_e4m3fn, contiguous.
        a_scale, b_scale: float32, [M] or [1], [N] or [1].
        dtype: of the result.
        bias: [N] or None.
    """
    if a.shape[0] and a.shape[1] % _STEP == 0 and b.shape[0] % _STEP == 0:
        by_row, by_column = a_scale.numel() > 1, b_scale.numel() > 1
        if by_row or by_column:
            by_row = by_column = True
        if _library_has(a.device, dtype, by_row, by_column, bias is not None):
            bias = None if bias is None else bias.to(dtype)
            return _library(a, b, a_scale, b_scale, dtype, bias)
    return gemm.scaled_product(a, b, a_scale, b_scale, dtype, bias)


class Values(NamedTuple):
    """A weight as float8_e4m3fn values [N, K] and their scale [N] or [1], float32."""

    values: Tensor
    scale: Tensor


def is_stored_fp8(spec: WeightSpec) -> bool:
    """Whether a weight's own codes are the operand."""
    row_wise = len(spec.code_shape) == 2 and not spec.codebook
    return row_wise and spec.format.word == torch.float8_e4m3fn


def stored_fp8(tensors: dict[str, Tensor], spec: WeightSpec) -> Values:
    """The codes of a weight of which `is_stored_fp8`."""
    codes = tensors["codes"].view(spec.rows, spec.columns)
    return Values(codes, full_scale(tensors, spec).to(torch.float32).reshape(-1))


def prepare(x: Tensor, spec: WeightSpec) -> Prepared:
    """The half of `linear_fp8` that a weight without smoothing leaves to x."""
    return _prepare(x, spec, None)


def _prepare(x: Tensor, spec: WeightSpec, smooth: Tensor | None) -> Prepared:
    if few_rows(x):
        return Prepared(x, None)
    rows = quantize_rows(
        x,
        format="fp8",
        smooth=smooth,
        smoothing=spec.smoothing,
        hadamard=spec.hadamard,
        basis=spec.hadamard_basis,
    )
    return Prepared(x, rows)


def _fake(
    x, q, q_scale, codes, scale, scale_2, zero_point, levels, smooth, svd_up, svd_down, bias, spec
):
    return x.new_empty((x.shape[0], spec_of(spec).rows))


@operation("linear_fp8", fake=_fake)
def _finish(
    x: Tensor,
    q: Tensor,
    q_scale: Tensor,
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
    """x [M, K] and its codes times a weight, [M, N]."""
    weight_spec = spec_of(spec)
    tensors = named(codes, scale, scale_2, zero_point, levels, smooth, svd_up, svd_down)
    if is_stored_fp8(weight_spec) and scale is not None:
        weight = stored_fp8(tensors, weight_spec)
    else:
        weight = Values(*unpack.to_fp8(tensors, weight_spec))
    y = product(q, weight.values, q_scale, weight.scale, x.dtype, bias)
    branch = branch_of(x, tensors, weight_spec)
    return y if branch is None else branch.add_to(y)


def linear_fp8_prepared(
    prepared: Prepared, tensors: dict[str, Tensor], spec: WeightSpec, bias: Tensor | None = None
) -> Tensor:
    """`linear_fp8` of what `prepare` gave."""
    x, rows = prepared
    if rows is None:
        return linear_few_rows(x, tensors, spec, bias)
    flat = x.reshape(-1, x.shape[-1])
    y = _finish(flat, rows.codes, rows.scale, *packed(tensors), bias, text_of(spec))
    return y.view(*x.shape[:-1], spec.rows)


def linear_fp8(
    x: Tensor, tensors: dict[str, Tensor], spec: WeightSpec, bias: Tensor | None = None
) -> Tensor:
    """x [..., K] @ W.T + bias with both sides in float8_e4m3fn; dtype of x.

    Args:
        x: float16, bfloat16 or float32.
        tensors, spec: any weight of two dimensions.
        bias: [N] or None.
    """
    return linear_fp8_prepared(_prepare(x, spec, tensors.get("smooth")), tensors, spec, bias)
