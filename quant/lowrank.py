"""The low-rank branch: the largest singular directions of a weight, kept in float.

The method is a randomised subspace iteration (Halko, Martinsson and Tropp, 2011, algorithm 4.4).
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["find_branch", "truncated_svd"]


def _orthonormal(matrix: Tensor) -> Tensor:
    return torch.linalg.qr(matrix).Q


def truncated_svd(weight: Tensor, rank: int, steps: int, seed: int) -> tuple[Tensor, ...]:
    """U [O, r], S [r], V [I, r] of the `rank` largest singular values."""
    if weight.shape[0] < weight.shape[1]:
        left, values, right = truncated_svd(weight.t(), rank, steps, seed)
        return right, values, left
    noise = torch.Generator(device=weight.device).manual_seed(seed)
    start = torch.randn(
        weight.shape[1], rank, dtype=weight.dtype, device=weight.device, generator=noise
    )
    basis = _orthonormal(weight @ start)
    for _ in range(steps):
        basis = _orthonormal(weight.t() @ basis)
        basis = _orthonormal(weight @ basis)
    left, values, right = torch.linalg.svd(basis.t() @ weight, full_matrices=False)
    return basis @ left, values, right.t()


def find_branch(
    weight: Tensor, rank: int, *, steps: int, dtype: torch.dtype, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """svd_up [O, r], svd_down [r, I] in `dtype`, and the float32 residual [O, I] they leave.

    The factors are rounded to `dtype` first, so that the residual makes up for it. `steps` power
    iterations start from random directions, which are the same for the same seed.
    """
    left, values, right = truncated_svd(weight, rank, steps, seed)
    up = (left * values).to(dtype)
    down = right.t().to(dtype).contiguous()
    return up, down, weight - up.to(torch.float32) @ down.to(torch.float32)
