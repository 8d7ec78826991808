"""Scales, zero points and groups: W ~ q * scale, or q * scale + zero_point without a sign."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels.spec import CodeFormat

__all__ = ["auto_group_size", "divide", "find_scale", "group_count"]


def auto_group_size(fmt: CodeFormat, *, linear: bool, svd: bool, codebook: bool) -> int:
    """The group size that SDNQ chooses for group_size 0 without a quantized matmul."""
    return 2 ** (1 + fmt.bits + linear + svd + 3 * codebook)


def group_count(channels: int, group_size: int) -> int:
    """Equal groups that `channels` inputs are cut into when about `group_size` each are wanted.

    Where `group_size` does not divide the channels, fewer and larger groups are tried; 1 means that
    a row is one group, and so does a group size of 0 or less.
    """
    if group_size <= 0 or group_size >= channels:
        return 1
    groups = channels // group_size
    if groups * group_size != channels:
        # The producer never keeps the first count here, even where that one would divide.
        groups -= 1
        while groups > 1 and channels % groups:
            groups -= 1
    return max(groups, 1)


def find_scale(
    weight: Tensor, fmt: CodeFormat, axes: Sequence[int], dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point (None for signed formats) that fit `weight` over `axes`, kept as 1.

    Both are rounded to `dtype` before any value is divided by them, so that the codes absorb it.
    """
    if fmt.signed:
        return (weight.abs().amax(dim=axes, keepdim=True) / fmt.qmax).to(dtype), None
    low = weight.amin(dim=axes, keepdim=True)
    high = weight.amax(dim=axes, keepdim=True)
    return ((high - low) / fmt.qmax).to(dtype), low.to(dtype)


def divide(weight: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    """`weight` in units of codes, float32; 0 where the scale is 0 (all values of a group equal)."""
    if zero_point is not None:
        weight = weight - zero_point.to(torch.float32)
    scale = scale.to(torch.float32)
    return torch.where(scale == 0, 0.0, weight / scale)
