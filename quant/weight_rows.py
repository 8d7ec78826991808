"""The rows of a weight as a format stores them, some at a time, and sums of what rounding lost.

    R = (rotate(W) - up @ down) * smooth        smoothing "divide": W ~ R / smooth
    R = (rotate(W) - up @ down) / smooth        smoothing "multiply"

One chunk stays in a CPU's cache through all of its steps, and no float copy of a weight is made.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..kernels import reference

__all__ = ["Errors", "Rows"]

_CHUNK_CPU = 1 << 19
_CHUNK = 1 << 24
_ROW_STEP = 16  # rows after which every format's words are whole
_DAMPING = 1e-2


class Rows:
    """The rows of a weight as they are rounded, float32, some at a time.

    Attributes:
        weight: [N, K], any float dtype.
        wide: The rotation is exact; otherwise it is done in the weight's 16 bits, entries of the
            matrix included.
        smooth: [K] or None; `smoothing` says what it does.
        up, down: The branch, or None.
    """

    def __init__(
        self, weight: Tensor, block: int = 0, basis: int = 4, *, wide: bool = True
    ) -> None:
        self.weight, self.block, self.basis = weight, block, basis
        self.wide = wide or weight.element_size() != 2
        self.smooth: Tensor | None = None
        self.smoothing = ""
        self.up: Tensor | None = None
        self.down: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape[0], self.weight.shape[1]

    @property
    def device(self) -> torch.device:
        return self.weight.device

    def chunks(self, multiple: int = 1, chunk: int = 0) -> Iterator[tuple[int, int]]:
        """Ranges of rows, of whole words and whole multiples; of about `chunk` values."""
        rows, columns = self.shape
        chunk = chunk or (_CHUNK_CPU if self.device.type == "cpu" else _CHUNK)
        unit = max(_ROW_STEP, multiple)
        step = max(chunk // max(columns, 1) // unit, 1) * unit
        for start in range(0, rows, step):
            yield start, min(start + step, rows)

    def rotated(self, start: int, stop: int, *, wide: bool = False) -> Tensor:
        """Rows with nothing but the rotation, in memory of their own; `wide`: not rounded by it."""
        rows = self.weight[start:stop].to(torch.float32, copy=True)
        if not self.block:
            return rows
        rows = reference.hadamard(rows, self.block, self.basis)
        if wide or self.wide:
            return rows
        entry = torch.tensor(self.block**-0.5)
        rows.mul_(entry.to(self.weight.dtype).to(torch.float32) / entry)
        return rows.to(self.weight.dtype).to(torch.float32)

    def get(self, start: int, stop: int, *, wide: bool = False) -> Tensor:
        """Rows as they are rounded, in memory of their own; `wide`: what they should mean."""
        rows = self.rotated(start, stop, wide=wide)
        if self.up is not None:
            up, down = self.up[start:stop].to(torch.float32), self.down.to(torch.float32)
            rows.addmm_(up, down, alpha=-1)
        if self.smoothing == "divide":
            rows.mul_(self.smooth)
        elif self.smoothing:
            rows.div_(self.smooth)
        return rows

    def meant(self, rows: Tensor, *, unrotate: bool = False) -> Tensor:
        """A difference of such rows as one of the weight's; `rows` is overwritten."""
        if self.smoothing == "divide":
            rows.div_(self.smooth)
        elif self.smoothing:
            rows.mul_(self.smooth)
        if unrotate and self.block:
            return reference.hadamard(rows, self.block, self.basis)
        return rows

    def rotated_moments(self, moments: Tensor) -> Tensor:
        """Mean squares [K] of rotated inputs: a rotation spreads each input over its block."""
        found = moments.to(self.device, torch.float32)
        if not self.block:
            return found
        blocks = found.view(-1, self.block)
        return blocks.mean(dim=1, keepdim=True).expand_as(blocks).reshape(-1)

    def rotated_products(self, products: Tensor) -> Tensor:
        """Products [K, K] of rotated inputs, made a little larger on the diagonal."""
        found = products.to(self.device, torch.float32)
        if self.block:
            found = reference.hadamard(found, self.block, self.basis)
            found = reference.hadamard(found.t().contiguous(), self.block, self.basis)
        found = (found + found.t()) * 0.5
        found.diagonal().add_(found.diagonal().mean() * _DAMPING + 1e-12)
        return found

    def importance(self, moments: Tensor | None) -> Tensor | None:
        """What the squared error of a column of such rows counts, [K]; None where all count alike.

        Smoothed inputs are taken for even, so that without `moments` what divides them does not
        count; what multiplies them is chosen for the weight's own error.

        Args:
            moments: [K], mean squares of the layer's inputs; None where they are unknown.
        """
        if moments is not None:
            found = self.rotated_moments(moments)
            if not self.smoothing:
                return found
            square = self.smooth.square()
            return found / square if self.smoothing == "divide" else found * square
        return self.smooth.square() if self.smoothing == "multiply" else None


class Errors:
    """Sums over a weight: squares of it and of its error, and the largest error."""

    def __init__(self) -> None:
        self.weight = self.error = self.weighted_weight = self.weighted_error = 0.0
        self.largest = 0.0

    def add(self, weight: Tensor, error: Tensor, importance: Tensor | None) -> None:
        """Rows of the weight and of its error, both in the weight's own space."""
        self.weight += _square_sum(weight)
        self.error += _square_sum(error)
        low, high = torch.aminmax(error)
        self.largest = max(self.largest, -float(low), float(high))
        if importance is not None:
            root = importance.sqrt()
            self.weighted_weight += _square_sum(weight * root)
            self.weighted_error += _square_sum(error * root)


def _square_sum(x: Tensor) -> float:
    if x.device.type == "cpu":
        return float(torch.dot(x.reshape(-1), x.reshape(-1)))
    return float(x.to(torch.float64).square_().sum())
