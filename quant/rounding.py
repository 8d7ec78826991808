"""Real numbers to the codes of a format: to the nearest value, or stochastically.

Integers round half to even. Floats, native ones included, are looked up among the magnitudes that
the format can express, so that both eras of float tables and every width take the same path. Ties
go to the even code. Tables of values are searched whole, signs included. Stochastic rounding picks
the upper of two neighbours with a probability equal to the distance from the lower one, so that the
expectation is the number itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.reference import code_values
from ..kernels.spec import CodeFormat

__all__ = ["generator", "magnitudes", "nearest_level", "round_to_codes"]

_CHUNK = 1 << 20


def generator(seed: int, device: torch.device) -> torch.Generator | None:
    """A generator on `device` for stochastic rounding; None, which means nearest, for seed 0."""
    return torch.Generator(device=device).manual_seed(seed) if seed > 0 else None


def magnitudes(fmt: CodeFormat, device: torch.device | str = "cpu") -> Tensor:
    """The finite non-negative float32 values of a "float" or "native" format, ascending."""
    if fmt.kind == "float":
        codes = torch.arange(1 << (fmt.exponent + fmt.mantissa), device=device)
        return code_values(codes, fmt)
    integer = {1: torch.uint8, 2: torch.int16}[fmt.word.itemsize]
    codes = torch.arange(1 << (8 * fmt.word.itemsize - 1), device=device, dtype=integer)
    values = codes.view(fmt.word).to(torch.float32)
    return values[values.isfinite()]


def nearest_level(levels: Tensor, x: Tensor, noise: torch.Generator | None = None) -> Tensor:
    """Indices (int64, shape of x) into ascending `levels` of the value for each x.

    Args:
        levels: [L] for all of x, or [..., L] with the leading dimensions of x.
        x: float32 [..., n]; beyond the ends the end level is taken.
        noise: for stochastic rounding.
    """
    last = levels.shape[-1] - 1
    upper = torch.searchsorted(levels, x, right=True).clamp_(1, last)
    if levels.dim() == 1:
        low, high = levels[upper - 1], levels[upper]
    else:
        low, high = levels.gather(-1, upper - 1), levels.gather(-1, upper)
    # Equal neighbours have no distance; the lower one serves.
    share = torch.where(high > low, (x - low) / (high - low), 0.0)
    if noise is None:
        rise = (share > 0.5) | ((share == 0.5) & (upper % 2 == 0))
    else:
        rise = share > _uniform(x, noise)
    return torch.where(rise, upper, upper - 1)


def round_to_codes(x: Tensor, fmt: CodeFormat, noise: torch.Generator | None = None) -> Tensor:
    """x [any shape] in units of the format's values as codes for `quant.packing.pack`.

    Values beyond the format's range saturate. NaN becomes some code.
    """
    if fmt.is_integer:
        whole = x.round() if noise is None else (x + _uniform(x, noise)).floor_()
        return whole.clamp_(fmt.qmin, fmt.qmax).to(torch.int32)
    x = x.clamp(fmt.qmin, fmt.qmax)
    if fmt.kind == "table":
        values, codes = torch.tensor(fmt.values, device=x.device).sort()
        parts = [codes[nearest_level(values, part, noise)] for part in x.reshape(-1).split(_CHUNK)]
        return torch.cat([part.to(torch.int32) for part in parts]).view(x.shape)
    if fmt.kind == "native" and (noise is None or fmt.word == torch.float32):
        return x.to(fmt.word)
    table = magnitudes(fmt, x.device)
    # Indices are int64; some at a time keeps them small.
    parts = [_round_by_table(part, table, fmt, noise) for part in x.reshape(-1).split(_CHUNK)]
    return torch.cat(parts).view(x.shape)


def _round_by_table(
    x: Tensor, table: Tensor, fmt: CodeFormat, noise: torch.Generator | None
) -> Tensor:
    index = nearest_level(table, x.abs(), noise)
    if fmt.kind == "native":
        return table[index].copysign(x).to(fmt.word)
    if fmt.signed:
        index = torch.where(x < 0, index + (1 << (fmt.bits - 1)), index)
    return index.to(torch.int32)


def _uniform(x: Tensor, noise: torch.Generator) -> Tensor:
    return torch.rand(x.shape, generator=noise, device=x.device)
