"""Real numbers to the nearest values of a format and their codes, fast: by arithmetic alone.

What `quant.rounding` looks up in tables, many formats and stochastic rounding among them, is
computed here, with the same results: on a CPU a pass without comparisons takes a tenth of the time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.spec import CodeFormat
from . import codebook, rounding
from .dtypes import get_format
from .packing import pack

__all__ = ["as_coded", "codes_of", "round_as_sdnq", "round_values", "words_of"]


def _steps(x: Tensor, fmt: CodeFormat) -> Tensor:
    """Distance of neighbouring values of a float format around each x."""
    if fmt.kind == "native":
        smallest = torch.finfo(fmt.word).smallest_normal
    else:
        smallest = 2.0 ** (1 - fmt.exponent_bias)
    powers = x.view(torch.int32).bitwise_and(0x7F800000).view(torch.float32)
    return powers.clamp_(min=smallest).mul_(2.0**-fmt.mantissa)


def round_values(x: Tensor, fmt: CodeFormat) -> Tensor:
    """x in units of the format's values to the nearest of them, float32; x is overwritten.

    Ties go to the even code; what is too large becomes the largest value.
    """
    if fmt.is_integer:
        return x.round_().clamp_(fmt.qmin, fmt.qmax)
    x.clamp_(fmt.qmin, fmt.qmax)
    if fmt.kind == "native" and fmt.word.itemsize > 1:
        return x.to(fmt.word).to(torch.float32)
    if fmt.kind == "float":  # a zero keeps no sign that it had, but that of what rounds to it
        x.add_(0.0)
    if not fmt.mantissa:  # whether a code is even does not show in its value
        table = rounding.magnitudes(fmt, x.device)
        return table[rounding.nearest_level(table, x.abs())].copysign_(x)
    steps = _steps(x, fmt)
    return x.div_(steps).round_().mul_(steps)


def round_as_sdnq(x: Tensor, fmt: CodeFormat) -> Tensor:
    """As `round_values` of SDNQ's own floats, by its rule; x is overwritten.

    A value rises to the next one where the four bits behind the mantissa are more than half, so
    from 9/16 on. Below the normal numbers that is done to the mantissa of the value itself, and
    what comes out is then rounded to a multiple of the smallest step, half to even.
    """
    below = 23 - fmt.mantissa
    bits = x.clamp_(fmt.qmin, fmt.qmax).add_(0.0).view(torch.int32)
    rises = bits.bitwise_and(0b1111 << (below - 4)) > 1 << (below - 1)
    risen = torch.where(rises, bits + (1 << below), bits)
    values = risen.view(torch.float32)
    smallest = 2.0 ** (1 - fmt.exponent_bias)
    step = smallest * 2.0**-fmt.mantissa
    subnormal = (values / step).round_().mul_(step).copysign_(values)
    normal = risen.bitwise_and(-(1 << below)).view(torch.float32)
    return torch.where(values.abs() < smallest, subnormal, normal)


def codes_of(values: Tensor, fmt: CodeFormat) -> Tensor:
    """Values of a format, float32, as what `packing.pack` takes, in a narrow dtype."""
    if fmt.is_integer and fmt.bits < 8:
        codes = values.to(torch.int8)
        return codes if fmt.signed else codes.view(torch.uint8)
    if fmt.name == "uint8":  # a CPU converts to int8 much faster
        return (values - 128).to(torch.int8).view(torch.uint8).bitwise_xor_(128)
    if fmt.is_integer:
        return values.to(torch.int8 if fmt.bits == 8 else torch.int32)
    if fmt.kind == "native":
        return values.to(fmt.word)
    # How many steps, and how many binades above the subnormal numbers.
    steps = _steps(values, fmt)
    codes = (values / steps).abs_().to(torch.int32)
    binades = steps.view(torch.int32).bitwise_right_shift_(23)
    lowest = 127 + 1 - fmt.exponent_bias - fmt.mantissa
    codes.add_(binades.sub_(lowest).bitwise_left_shift_(fmt.mantissa))
    if fmt.signed:
        codes.bitwise_or_((values.view(torch.int32) >> 31).bitwise_and_(1 << (fmt.bits - 1)))
    return codes if fmt.bits > 8 else codes.to(torch.int8).view(torch.uint8)


def words_of(codes: Tensor, fmt: CodeFormat) -> Tensor:
    """As `packing.pack`; neighbouring 4-bit codes join in words that hold both."""
    codes = codes.reshape(-1)
    if fmt.bits != 4 or codes.numel() % 2 or codes.element_size() != 1:
        return pack(codes, fmt)
    if fmt.kind == "int":
        codes = codes.add(8)
    pairs = codes.view(torch.int16)
    return pairs.bitwise_or(pairs >> 4).to(torch.uint8)


def as_coded(tensor: Tensor, name: str, levels: int = -1) -> Tensor:
    """A scale tensor as it reads back after it was coded in a format, with one scale for all of it.

    Args:
        levels: At least 0: learnt levels, placed in so many steps, in place of the scale.
    """
    fmt = get_format(name)
    if levels >= 0:
        table, index = codebook.find_levels(tensor.reshape(1, -1), 1 << fmt.bits, levels)
        return table.view(-1)[index.view(tensor.shape)]
    low, high = torch.aminmax(tensor)
    if fmt.signed:
        scale, base = torch.maximum(low.abs(), high.abs()) / fmt.qmax, None
    else:
        scale, base = (high - low) / fmt.qmax, low
    units = (tensor if base is None else tensor - base) / torch.where(scale == 0, torch.inf, scale)
    values = round_values(units, fmt)
    return values * scale if base is None else torch.addcmul(base, values, scale)
