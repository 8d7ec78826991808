"""W8A8 products: rows of x rounded to int8, a weight of any format as int8, one product.

    x  ~ xq * xs (+ xz)                 rows.py: rotated, smoothed, rounded row by row
    W  ~ Wq * ws (+ wz)                 integers with one scale a row as stored; of all else each
                                        row is rounded to int8 on the way (unpack.to_int8)
    y  = (xq . Wq) * xs * ws + cross terms + bias + (x . down) . up         gemm.py, one kernel

A 4-bit weight loses next to nothing by being rounded to int8 row by row, and int8 is multiplied by
every GPU since Ampere. Where a few channels of x are far larger than the others, a scale for each
256 elements of x keeps the small ones: an argument, or activations that the spec says are so.

Fewer than MATMUL_ROWS rows are multiplied with the weight in the dtype of x, as in the reference.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from .. import reference
from ..reference import MATMUL_ROWS, full_scale
from ..spec import WeightSpec
from . import gemm, unpack
from .flat import named, packed, spec_of, text_of
from .library import operation
from .rows import Rows, quantize_rows

__all__ = [
    "Branch",
    "Codes",
    "Prepared",
    "branch_of",
    "few_rows",
    "linear_few_rows",
    "linear_int8",
    "linear_int8_prepared",
    "linear_uint8",
    "linear_uint8_prepared",
    "prepare_int8",
    "prepare_uint8",
    "stored_codes",
]


class Prepared(NamedTuple):
    """x as it came, and its rows as codes (None where they are too few to be worth it)."""

    x: Tensor
    rows: Rows | None


class Branch(NamedTuple):
    """The low-rank branch of a product: low [M, R] = x . down and up [N, R], dtype of x."""

    low: Tensor
    up: Tensor

    def add_to(self, y: Tensor) -> Tensor:
        """y [M, N] with the branch added in place."""
        return y.addmm_(self.low, self.up.t())


def branch_of(x: Tensor, tensors: dict[str, Tensor], spec: WeightSpec) -> Branch | None:
    """The branch of a weight for x [M, K], which is not rotated: the factor is instead."""
    if not spec.rank:
        return None
    down = tensors["svd_down"]
    if spec.hadamard:
        down = reference.hadamard(down.to(torch.float32), spec.hadamard, spec.hadamard_basis)
    up = tensors["svd_up"].to(x.dtype).contiguous()
    return Branch(functional.linear(x, down.to(x.dtype)), up)


def linear_few_rows(
    x: Tensor, tensors: dict[str, Tensor], spec: WeightSpec, bias: Tensor | None
) -> Tensor:
    """x times the weight in its dtype."""
    weight = unpack.dequantize(tensors, spec, x.dtype).view(spec.rows, spec.columns)
    return functional.linear(x, weight, None if bias is None else bias.to(x.dtype))


def few_rows(x: Tensor) -> bool:
    """Whether x has too few rows to round them."""
    return x.numel() < MATMUL_ROWS * x.shape[-1]


# ------------------------------------------------------------------------------------- weights


class Codes(NamedTuple):
    """A weight as int8 codes [N, K], scale and zero point [N] or [1] (None if symmetric)."""

    values: Tensor
    scale: Tensor
    zero: Tensor | None


def stored_codes(tensors: dict[str, Tensor], spec: WeightSpec) -> Codes:
    """The codes of a weight that `unpack.stored_as_int8`."""
    fmt = spec.format
    scale = full_scale(tensors, spec).to(torch.float32).reshape(-1)
    zero = None
    if not fmt.signed:
        zero = tensors["zero_point"].to(torch.float32).expand(spec.rows, 1).reshape(-1)
        scale = scale.expand(spec.rows).contiguous()
        if fmt.bits == 8:  # the codes are taken as 128 less
            zero = torch.add(zero, scale, alpha=128)
    return Codes(unpack.to_codes(tensors, spec), scale, zero)


def _weight(tensors: dict[str, Tensor], spec: WeightSpec, symmetric: bool) -> Codes:
    if unpack.stored_as_int8(spec) and (spec.format.signed or not symmetric):
        return stored_codes(tensors, spec)
    return Codes(*unpack.to_int8(tensors, spec), None)


# ------------------------------------------------------------------------------------ products


def _group_of(spec: WeightSpec, group: int | None) -> int:
    """Elements of a row of x that share a scale, 0 for all."""
    rounding = spec.activation
    if group is None and rounding is not None and rounding.format == "int8":
        group = 0 if rounding.static else max(rounding.group, 0)
    return group if group and spec.columns % group == 0 else 0


def _prepare(
    x: Tensor, spec: WeightSpec, smooth: Tensor | None, code: str, group: int = 0
) -> Prepared:
    if few_rows(x):
        return Prepared(x, None)
    rows = quantize_rows(
        x,
        format=code,
        group=group,
        total=not group,
        smooth=smooth,
        smoothing=spec.smoothing,
        hadamard=spec.hadamard,
        basis=spec.hadamard_basis,
    )
    return Prepared(x, rows)


def prepare_int8(x: Tensor, spec: WeightSpec) -> Prepared:
    """The half of `linear_int8` that a weight without smoothing leaves to x."""
    return _prepare(x, spec, None, "int8", _group_of(spec, None))


def prepare_uint8(x: Tensor, spec: WeightSpec) -> Prepared:
    """The half of `linear_uint8` that a weight without smoothing leaves to x."""
    return _prepare(x, spec, None, "uint8")


def _fake(
    x, q, q_scale, q_zero, q_total, codes, scale, scale_2, zero_point, levels, smooth, svd_up,
    svd_down, bias, spec,
):  # fmt: skip
    return x.new_empty((x.shape[0], spec_of(spec).rows))


@operation("linear_int8", fake=_fake)
def _finish(
    x: Tensor,
    q: Tensor,
    q_scale: Tensor,
    q_zero: Tensor | None,
    q_total: Tensor | None,
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
    by_group = q_scale.dim() == 2
    weight = _weight(tensors, weight_spec, by_group)
    branch = branch_of(x, tensors, weight_spec)
    fused = branch if x.dtype != torch.float32 else None
    low, up = fused or (None, None)
    if by_group:
        group = weight_spec.columns // q_scale.shape[0]
        y = gemm.grouped_product(
            q, weight.values, q_scale, weight.scale.view(-1, 1), x.dtype, group, bias, None, low, up
        )
    else:
        column = None
        if q_zero is not None:
            column = gemm.column_sums(weight.values).to(torch.float32) * weight.scale
            if weight.zero is not None:
                column = torch.add(column, weight.zero, alpha=weight_spec.columns)
        total = None if weight.zero is None else q_total
        y = gemm.scaled_product(
            q, weight.values, q_scale, weight.scale, x.dtype, bias, q_zero, column, total,
            weight.zero, low, up,
        )  # fmt: skip
    return branch.add_to(y) if branch is not None and fused is None else y


def linear_int8_prepared(
    prepared: Prepared, tensors: dict[str, Tensor], spec: WeightSpec, bias: Tensor | None = None
) -> Tensor:
    """`linear_int8` of what `prepare_int8` or `prepare_uint8` gave."""
    x, rows = prepared
    if rows is None:
        return linear_few_rows(x, tensors, spec, bias)
    flat = x.reshape(-1, x.shape[-1])
    y = _finish(flat, *rows, *packed(tensors), bias, text_of(spec))
    return y.view(*x.shape[:-1], spec.rows)


linear_uint8_prepared = linear_int8_prepared


def linear_int8(
    x: Tensor,
    tensors: dict[str, Tensor],
    spec: WeightSpec,
    bias: Tensor | None = None,
    *,
    group: int | None = None,
) -> Tensor:
    """x [..., K] @ W.T + bias with both sides in int8; dtype of x.

    Args:
        x: float16, bfloat16 or float32.
        tensors, spec: any weight of two dimensions.
        bias: [N] or None.
        group: elements of a row of x that share a scale, 0 for all, where K is a multiple of it;
            256 where a few channels are far larger than the others. By default as the spec says.
    """
    prepared = _prepare(x, spec, tensors.get("smooth"), "int8", _group_of(spec, group))
    return linear_int8_prepared(prepared, tensors, spec, bias)


def linear_uint8(
    x: Tensor, tensors: dict[str, Tensor], spec: WeightSpec, bias: Tensor | None = None
) -> Tensor:
    """As `linear_int8`, with rows of x between their own smallest and largest values."""
    prepared = _prepare(x, spec, tensors.get("smooth"), "uint8")
    return linear_uint8_prepared(prepared, tensors, spec, bias)
