"""Products of two factors as further rank of the low-rank branches that a weight has."""

from __future__ import annotations

from dataclasses import replace

import torch
from comfy_kitchen.tensor.base import QuantizedTensor
from torch import Tensor

from ...kernels import reference
from ...kernels.spec import WeightSpec
from ...quant.weight import QuantizedWeight
from .composite import build, held_by, part_tensors

__all__ = ["grown"]

RANK_STEP = 16
"""Kernels for branches of a multiple of this rank want it to stay one."""


def grown(
    weight: QuantizedTensor, products: list[tuple[tuple[int, int, int] | None, Tensor, Tensor]]
) -> QuantizedTensor | None:
    """A composite with the products added to its branches, its codes and scales as they are.

    Args:
        weight: The composite.
        products: ``(offset, up [rows, r], down [r, columns])`` for the whole weight, or for a piece
            of it: ``offset`` is ``(dim, start, length)``.

    Returns:
        The new weight; None where a part that a product reaches has no branch.
    """
    spec = weight._params.spec
    if len(spec.shape) > 2 and spec.axis:
        return None
    parts, start = [], 0
    for number, part in enumerate(spec.parts):
        tensors = part_tensors(held_by(weight), spec, number)
        length = part.weight.shape[spec.axis]
        pieces = [
            piece
            for product in products
            if (piece := _piece(product, spec.shape, spec.axis, start, length)) is not None
        ]
        start += length
        if pieces and not part.weight.rank:
            return None
        own = QuantizedWeight(part.weight, tensors)
        parts.append((part.name, _with_branch(own, pieces), part.wish))
    return build(parts, weight.dtype, spec.axis)


def _piece(product, shape, axis: int, start: int, length: int) -> tuple[Tensor, Tensor] | None:
    """A product within the part that has ``length`` rows or columns from ``start``."""
    offset, up, down = product
    rows, columns = shape[0], torch.Size(shape[1:]).numel()
    if offset is not None:
        dim, first, size = offset
        if dim == 0:
            whole = up.new_zeros(rows, up.shape[1])
            whole[first : first + size] = up
            up = whole
        else:
            whole = down.new_zeros(down.shape[0], columns)
            whole[:, first : first + size] = down
            down = whole
        if dim == axis and (first >= start + length or first + size <= start):
            return None
    if axis == 0:
        return up[start : start + length], down
    return up, down[:, start : start + length]


def _with_branch(weight: QuantizedWeight, pieces: list[tuple[Tensor, Tensor]]) -> QuantizedWeight:
    if not pieces:
        return weight
    spec: WeightSpec = weight.spec
    up, down = weight.tensors["svd_up"], weight.tensors["svd_down"]
    more_up = torch.cat([piece for piece, _ in pieces], dim=1)
    more_down = torch.cat([piece for _, piece in pieces])
    if spec.hadamard:
        more_down = reference.hadamard(more_down, spec.hadamard, spec.hadamard_basis)
    if spec.rank % RANK_STEP == 0:
        idle = -more_up.shape[1] % RANK_STEP
        more_up = torch.nn.functional.pad(more_up, (0, idle))
        more_down = torch.nn.functional.pad(more_down, (0, 0, 0, idle))
    tensors = weight.tensors | {
        "svd_up": torch.cat([up, more_up.to(up.dtype)], dim=1),
        "svd_down": torch.cat([down, more_down.to(down.dtype)]),
    }
    return QuantizedWeight(replace(spec, rank=spec.rank + more_up.shape[1]), tensors)
