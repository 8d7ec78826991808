"""Products in a format's own arithmetic: activations rounded as the format says, then multiplied.

    xs = x (+ shift), smoothed                                   in the dtype of x
    xs ~ xq * xscale                                             by groups of `activation.group`
    y  = xq * xscale @ (q * scale).T - shift_bias + bias         summed in float32
    y  = y + (x @ svd_down.T) @ svd_up.T                         x as it came

Every line is rounded to the dtype of x, as is the inner product of the last. Codes and scales:

| `activation`              | stored scale                              | codes round          |
|---------------------------|-------------------------------------------|----------------------|
| scale ""                  | largest * (1 / qmax) in the dtype of x    | x * (1 / unrounded)  |
| scale "float8_e4m3fn"     | largest * (1 / qmax), at most 448, e4m3   | x * (1 / unrounded)  |
| scale "float32"           | largest / qmax                            | x / scale            |
| scale "float8_e8m0fnu"    | next power of two of largest / qmax       | x / scale            |
| scale "ocp_e8m0"          | powers of two below largest and qmax,     | x / scale            |
|                           | divided                                   |                      |
| static, without groups    | `input_scale`                             | x / scale            |
| the same with an offset   | `input_scale`                             | x / scale + offset,  |
|                           |                                           | then - offset        |
| static, with groups       | (largest / qmax / `input_scale`) rounded, | x / scale            |
|                           | times `input_scale`                       |                      |

The first two are SVDQuant's, whose kernels multiply by reciprocals in float32.

Codes that are integers with one scale a row on both sides, and that no offset takes out of 8 bits,
are summed exactly. All other operands are multiplied as floats that hold code times scale; for
4-bit codes with 16-bit scales that is exact too, up to the order of the sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .reference import divided, hadamard, int8_codes, int_matmul, plain_weight, smoothed
from .spec import ActivationSpec, WeightSpec

__all__ = [
    "ACTIVATIONS",
    "SCALES",
    "linear_faithful",
    "round_activations",
    "round_e2m1",
    "round_scale",
]


def round_e2m1(x: Tensor) -> Tensor:
    """float32 to the nearest of 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives, ties to even codes.

    Larger values become 6.
    """
    size = x.abs()
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    return (x / step).round_().mul_(step).clamp_(-6, 6)


def _round_e4m3(x: Tensor) -> Tensor:
    return x.clamp(-448, 448).to(torch.float8_e4m3fn).to(torch.float32)


class Rounding(NamedTuple):
    """Largest code value, and the function from scaled float32 values to those of codes."""

    largest: float
    function: Callable[[Tensor], Tensor]


ACTIVATIONS: dict[str, Rounding] = {
    "int4": Rounding(7, lambda x: x.round().clamp_(-8, 7)),
    "uint4": Rounding(15, lambda x: x.round().clamp_(0, 15)),
    "int8": Rounding(127, lambda x: x.round().clamp_(-128, 127)),
    "float8_e4m3fn": Rounding(448, _round_e4m3),
    "float4_e2m1fn": Rounding(6, round_e2m1),
}
"""Code formats that activations can be rounded to."""

SCALES = ("", "float32", "float8_e4m3fn", "float8_e8m0fnu", "ocp_e8m0")
"""What scales can be rounded to; "" is the dtype of the activations."""

_INTEGERS = ("int4", "uint4", "int8")


def round_scale(scale: Tensor, name: str) -> Tensor:
    """float32 scales rounded to one of SCALES, float32; e8m0 gives the next power of two."""
    if name == "float8_e4m3fn":
        return _round_e4m3(scale)
    if name == "float8_e8m0fnu":
        power = (scale.contiguous().view(torch.int32) + 0x7FFFFF) & 0x7F800000
        return torch.where(scale.isfinite(), power.view(torch.float32), scale)
    return scale


def _power_below(size: Tensor) -> Tensor:
    """The largest powers of two that are not above finite float32 values of at least 0."""
    return (size.contiguous().view(torch.int32) & 0x7F800000).view(torch.float32)


def round_activations(
    rows: Tensor,
    activation: ActivationSpec,
    input_scale: Tensor | None = None,
    input_offset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Smoothed rows [M, K] as values of codes, float32 [M, G, K / G], and scale [M or 1, G, 1].

    Args:
        rows: any float dtype; with scale "" the scales are rounded to it.
        activation: how to round.
        input_scale: [1], when static.
        input_offset: [1], when the codes have an offset; it is taken off what comes back.
    """
    largest, rounding = ACTIVATIONS[activation.format]
    size = activation.group if activation.group > 0 else rows.shape[-1]
    groups = rows.to(torch.float32).reshape(rows.shape[0], -1, size)
    if activation.static and activation.group <= 0:
        scale = input_scale.to(torch.float32).view(1, 1, 1)
        if activation.offset:
            offset = input_offset.to(torch.float32)
            codes = rounding(divided(groups, scale) + offset) - offset
        else:
            codes = rounding(divided(groups, scale))
        # Integer codes cannot say that something was not a number.
        return codes, torch.where(groups.isnan().any(dim=-1, keepdim=True), torch.nan, scale)
    axes = (0, 1, 2) if activation.group < 0 else -1
    size = groups.abs().amax(dim=axes, keepdim=True)
    if activation.scale in ("", "float8_e4m3fn") and not activation.static:
        exact = size * (1 / largest)
        if activation.scale:
            exact = exact.clamp(max=448)
            scale = round_scale(exact, activation.scale)
        else:
            scale = exact.to(rows.dtype).to(torch.float32)
        # 1 / exact is infinite where all of a group is zero.
        return rounding(torch.where(groups == 0, 0.0, groups * exact.reciprocal())), scale
    scale = size / largest
    if activation.static:
        second = input_scale.to(torch.float32)
        scale = round_scale(divided(scale, second), activation.scale) * second
    elif activation.scale == "ocp_e8m0":
        scale = torch.where(size.isfinite(), _power_below(size), size)
        scale = scale * 2.0 ** -math.floor(math.log2(largest))
    else:
        scale = round_scale(scale, activation.scale)
    return rounding(divided(groups, scale)), scale


def _product(codes: Tensor, scale: Tensor, tensors: dict[str, Tensor], spec: WeightSpec) -> Tensor:
    """Rounded activations [M, G, g] times the weight without its branch, float32 [M, N]."""
    stored = None
    activation = spec.activation
    if activation.format in _INTEGERS and codes.shape[1] == 1 and not activation.offset:
        stored = int8_codes(tensors, spec)
    if stored is not None and stored[2] is None:
        product = int_matmul(codes.squeeze(1).to(torch.int8), stored[0])
        return product.to(torch.float32).mul_(scale.squeeze(1)).mul_(stored[1])
    values = (codes * scale).view(codes.shape[0], spec.columns)
    return values @ plain_weight(tensors, spec).t()


def linear_faithful(
    x: Tensor, tensors: dict[str, Tensor], spec: WeightSpec, bias: Tensor | None = None
) -> Tensor:
    """x [..., I] @ W.T + bias as `spec.activation` says, for any number of rows; dtype of x."""
    rows = x.reshape(-1, x.shape[-1])
    if rows.shape[0] == 0:
        return x.new_zeros((*x.shape[:-1], spec.rows))
    activation = spec.activation
    if spec.hadamard:
        rows = hadamard(rows, spec.hadamard, spec.hadamard_basis)
    shifted = rows + activation.shift if activation.shift else rows
    smooth = smoothed(shifted.to(torch.float32), tensors, spec).to(x.dtype)
    codes, scale = round_activations(
        smooth, activation, tensors.get("input_scale"), tensors.get("input_offset")
    )
    y = _product(codes, scale, tensors, spec)
    if activation.shift:
        y = y - tensors["shift_bias"]
    if bias is not None:
        y = y + bias
    y = y.to(x.dtype)
    if spec.rank:
        down = tensors["svd_down"].to(torch.float32)
        inner = (rows.to(torch.float32) @ down.t()).to(x.dtype)
        up = tensors["svd_up"].to(torch.float32)
        y = torch.addmm(y.to(torch.float32), inner.to(torch.float32), up.t()).to(x.dtype)
    return y.view(*x.shape[:-1], spec.rows)
