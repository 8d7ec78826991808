"""Fitting what stands beside the codes: smoothing of columns, and the low-rank branch.

| what          | without activations                | with their mean squares m          |
|---------------|------------------------------------|------------------------------------|
| smoothing     | s = 1 / largest ** p               | s = sqrt(m) ** p / largest ** p    |
| AWQ's search  | the p in 0 … 1 with the least      | the same, sqrt(m) ** p and both    |
|               | error                              | besides, errors of columns times m |
| branch        | largest singular directions of the | the same, and those of the weight  |
|               | smoothed weight                    | times sqrt(m), or times the root   |
|               |                                    | of their products                  |

`largest` are the columns' largest weights; x is divided by s ("divide") or multiplied by 1 / s
("multiply"). Of several branches the one is kept that leaves the least error after rounding: one
that minds the activations alone may leave outliers to the codes. Refits alternate: the branch of
what rounding lost, then the codes of what the branch leaves; again the best pair is kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from . import lowrank
from .grids import Grid
from .weight_rows import Rows

__all__ = ["Metric", "fit_branch", "search_smoothing", "smooth_columns"]

_ENOUGH = 1e-3  # a refit that gains less ends them


@dataclass(frozen=True)
class Metric:
    """What an error E of the rotated weight counts: the squares of E * columns, or of E @ root.

    Attributes:
        columns: [K], or None.
        root: [K, K], lower triangular, or None.
        starts: Metrics by which a branch may be found at first, beside the plain one.
    """

    columns: Tensor | None = None
    root: Tensor | None = None
    starts: tuple[Metric, ...] = ()

    @classmethod
    def of(cls, rows: Rows, moments: Tensor | None, products: Tensor | None) -> Metric:
        """By the activations, as far as they are known.

        Args:
            moments: [K], mean squares of the layer's inputs.
            products: [K, K], mean products of them.
        """
        found = cls(rows.smooth if rows.smoothing == "divide" else None)
        starts: tuple[Metric, ...] = ()
        if moments is not None:
            root = _positive(rows.rotated_moments(moments)).sqrt()
            starts = (cls(root.sqrt()), cls(root))
            found = cls(root, starts=starts)
        if products is not None:
            root = torch.linalg.cholesky(rows.rotated_products(products))
            found = cls(root=root, starts=(*starts, cls(root=root)))
        return found

    def weighed(self, error: Tensor) -> Tensor:
        if self.root is not None:
            return error @ self.root
        return error if self.columns is None else error * self.columns

    def unweighed(self, down: Tensor) -> Tensor:
        """The right factor of a weighed matrix as that of the matrix."""
        if self.root is not None:
            return torch.linalg.solve_triangular(self.root, down, upper=False, left=False)
        return down if self.columns is None else down / self.columns


# --------------------------------------------------------------------------------------- smoothing


def _largest(rows: Rows) -> Tensor:
    """The columns' largest weights, none of them 0."""
    found = torch.zeros(rows.shape[1], device=rows.device)
    for start, stop in rows.chunks():
        found = torch.maximum(found, rows.rotated(start, stop).abs_().amax(dim=0))
    return _positive(found)


def _positive(values: Tensor) -> Tensor:
    top = float(values.max())
    return values.clamp(min=1e-5 * top) if top > 0 else torch.ones_like(values)


def _even(exponents: Tensor) -> Tensor:
    """exp with a geometric mean of 1."""
    return (exponents - exponents.mean()).exp()


def smooth_columns(
    rows: Rows, smoothing: str, strength: float, dtype: torch.dtype, moments: Tensor | None
) -> Tensor:
    """`smooth` [K] in `dtype` by the exponent `strength`."""
    found = -strength * _largest(rows).log()
    if moments is not None:
        found = found + 0.5 * strength * _positive(rows.rotated_moments(moments)).log()
    even = _even(found)
    return (even if smoothing == "divide" else 1 / even).to(dtype)


def search_smoothing(
    rows: Rows, grid: Grid, steps: int, dtype: torch.dtype, moments: Tensor | None
) -> Tensor:
    """`smooth` [K] in `dtype` with the exponent that leaves the least error; 0 is among them."""
    sizes = [-_largest(rows).log()]
    if moments is not None:
        squares = 0.5 * _positive(rows.rotated_moments(moments)).log()
        sizes += [squares, sizes[0] + squares]
    tried = [sizes[0] * 0.0] + [size * (n / steps) for size in sizes for n in range(1, steps + 1)]
    best, least = None, None
    for exponents in tried:
        even = _even(exponents)
        smooth = (even if rows.smoothing == "divide" else 1 / even).to(dtype)
        rows.smooth = smooth.to(torch.float32)
        importance = rows.importance(moments)
        loss = 0.0
        for start, rounded in grid.rounded(rows, importance):
            error = rows.get(start, start + rounded.shape[0]).sub_(rounded)
            error.square_()
            loss += float((error if importance is None else error.mul_(importance)).sum())
        if least is None or loss < least:
            best, least = smooth, loss
    return best


# ------------------------------------------------------------------------------------------ branch


def fit_branch(
    rows: Rows,
    grid: Grid,
    *,
    metric: Metric,
    moments: Tensor | None,
    dtype: torch.dtype,
    seed: int,
) -> None:
    """Give `rows` a branch of the recipe's rank, its factors rounded to `dtype`."""
    layer = grid.layer
    target = torch.empty(rows.shape, device=rows.device)
    for start, stop in rows.chunks():
        target[start:stop] = rows.rotated(start, stop)
    best: tuple[Tensor, Tensor] | None = None
    least = previous = math.inf
    plain = Metric(rows.smooth if rows.smoothing == "divide" else None)
    starts = [plain, *metric.starts]
    one = len(starts) == 1 and not layer.refits
    for start in starts:
        rows.up, rows.down = _factors(target, start, grid, dtype, seed)
        if one:
            return
        loss = _remainder(rows, grid, metric, moments)
        if loss < least:
            best, least = (rows.up, rows.down), loss
    rows.up, rows.down = best
    if not layer.refits:
        return
    _remainder(rows, grid, metric, moments, target)
    turns = metric.starts[1:] or (metric,)
    for _ in range(layer.refits):
        found = []
        for turn in turns:
            rows.up, rows.down = _factors(target, turn, grid, dtype, seed)
            found.append((_remainder(rows, grid, metric, moments), rows.up, rows.down))
        loss, rows.up, rows.down = min(found, key=lambda each: each[0])
        if loss < least:
            best, least = (rows.up, rows.down), loss
        if loss > previous * (1 - _ENOUGH):
            break
        previous = loss
        _remainder(rows, grid, metric, moments, target)
    rows.up, rows.down = best


def _factors(
    target: Tensor, metric: Metric, grid: Grid, dtype: torch.dtype, seed: int
) -> tuple[Tensor, Tensor]:
    """`up` and `down` of the largest directions of a matrix, as a metric weighs it."""
    left, values, right = lowrank.truncated_svd(
        metric.weighed(target), grid.spec.rank, grid.layer.svd_steps, seed
    )
    return (left * values).to(dtype), metric.unweighed(right.t()).to(dtype).contiguous()


def _remainder(
    rows: Rows, grid: Grid, metric: Metric, moments: Tensor | None, into: Tensor | None = None
) -> float:
    """The error that codes and branch leave; `into` gets the weight without the codes' part."""
    loss = 0.0
    for start, rounded in grid.rounded(rows, rows.importance(moments)):
        stop = start + rounded.shape[0]
        error = rows.meant(rows.get(start, stop).sub_(rounded))
        loss += float(metric.weighed(error).square().sum())
        if into is not None:
            up, down = rows.up[start:stop].to(torch.float32), rows.down.to(torch.float32)
            into[start:stop] = error.addmm_(up, down)
    return loss
