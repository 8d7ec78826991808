"""Codebooks: each group has 2^bits levels of its own, placed by Lloyd and Max's iteration."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["find_levels"]


def find_levels(weight: Tensor, count: int, steps: int) -> tuple[Tensor, Tensor]:
    """Levels [N, count], ascending, and indices [N, n] of the groups `weight` [N, n], float32.

    Starts from evenly spaced levels; each step assigns every value to the nearest level and moves
    each level that has values to their mean.
    """
    weight = weight.contiguous()
    low, high = torch.aminmax(weight, dim=-1, keepdim=True)
    spread = (high - low).div_(count - 1)
    ramp = torch.arange(count, dtype=weight.dtype, device=weight.device)
    levels = torch.addcmul(low, ramp, spread)
    for _ in range(steps):
        levels = levels.sort(dim=-1).values
        index = _assign(levels, weight)
        members = torch.zeros_like(levels, dtype=torch.int32)
        members.scatter_add_(-1, index, torch.ones_like(index, dtype=torch.int32))
        sums = torch.zeros_like(levels).scatter_add_(-1, index, weight)
        levels = torch.where(members > 0, sums / members.clamp(min=1), levels)
    levels = levels.sort(dim=-1).values
    return levels, _assign(levels, weight)


def _assign(levels: Tensor, weight: Tensor) -> Tensor:
    return torch.searchsorted((levels[:, 1:] + levels[:, :-1]) * 0.5, weight)
