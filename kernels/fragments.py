"""The order in which SVDQuant's own kernels want a tensor: permutations of row-major order.

Rows and columns are cut into parts (the last part counts fastest), and the parts are put in another
order, so that each thread of a tensor-core tile loads what it needs in one piece:

| name          | row-major               | stored shape           | one tile           |
|---------------|-------------------------|------------------------|--------------------|
| CODES         | 32-bit words [N, K / 8] | [N, K / 8]             | 128 rows, 64 codes |
| VECTOR        | [N]                     | [N]                    | 16 rows            |
| SCALES_INT4   | [N, K / 64]             | [K / 64, N], nominally | 128 rows, 1 scale  |
| SCALES_NVFP4  | [N, K / 16]             | [K / 16, N], nominally | 128 rows, 4 scales |
| SCALES_MXFP4  | [N, K / 32]             | [K / 32, N], nominally | 128 rows, 2 scales |
| DOWN          | [R, K]                  | [K, R]                 | 16 x 16            |
| UP            | [N, R]                  | [N, R]                 | 16 x 16            |

A word of CODES holds 8 neighbouring 4-bit codes of a row, the first in its lowest bits.
"""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "CODES",
    "DOWN",
    "SCALES_INT4",
    "SCALES_MXFP4",
    "SCALES_NVFP4",
    "UP",
    "VECTOR",
    "Order",
    "permute",
    "stored",
    "unstored",
    "words_of",
]


class Order(NamedTuple):
    """rows, columns: the parts after the first, which counts what is left. order: of all parts."""

    rows: tuple[int, ...]
    columns: tuple[int, ...] | None
    order: tuple[int, ...]
    transposed: bool = False

    def parts(self, shape: torch.Size | tuple[int, ...]) -> tuple[int, ...]:
        """The parts of a row-major tensor of this shape."""
        view = [shape[0] // prod(self.rows), *self.rows]
        if self.columns is not None:
            view += [shape[1] // prod(self.columns), *self.columns]
        return tuple(view)


CODES = Order((8, 2, 8), (2, 4), (0, 4, 1, 3, 6, 2, 5))
VECTOR = Order((2, 4, 2), None, (0, 2, 1, 3))
SCALES_INT4 = Order((8, 2, 4, 2), (), (0, 5, 1, 3, 2, 4), transposed=True)
SCALES_NVFP4 = Order((4, 4, 8), (4,), (0, 4, 3, 2, 1, 5), transposed=True)
SCALES_MXFP4 = Order((4, 4, 8), (2,), (0, 4, 3, 2, 1, 5), transposed=True)
DOWN = Order((2, 8), (2, 4, 2), (3, 0, 2, 5, 1, 4, 6), transposed=True)
UP = Order((2, 8), (2, 4, 2), (0, 3, 2, 5, 1, 4, 6))


def words_of(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The same bytes as elements of `dtype`, copied where they begin between two of those."""
    tensor = tensor.contiguous()
    if tensor.storage_offset() * tensor.element_size() % dtype.itemsize:
        tensor = tensor.clone()
    return tensor.view(dtype)


def permute(
    tensor: Tensor, view: tuple[int, ...], order: tuple[int, ...], shape: tuple[int, ...]
) -> Tensor:
    """`tensor` viewed, its axes put in `order`, as a new contiguous tensor of `shape`.

    Elements of one byte travel as uint8, since not every device can copy the small floats.
    """
    small = tensor.element_size() == 1
    plain = tensor.contiguous().view(torch.uint8) if small else tensor
    moved = plain.reshape(view).permute(order)
    return moved.clone(memory_format=torch.contiguous_format).view(shape).view(tensor.dtype)


def stored(tensor: Tensor, order: Order) -> Tensor:
    """A row-major tensor of whole tiles in stored order."""
    shape = tuple(tensor.shape)
    return permute(
        tensor, order.parts(shape), order.order, shape[::-1] if order.transposed else shape
    )


def unstored(tensor: Tensor, order: Order) -> Tensor:
    """The inverse of `stored`."""
    shape = tuple(tensor.shape)
    shape = shape[::-1] if order.transposed else shape
    parts = order.parts(shape)
    back = tuple(order.order.index(axis) for axis in range(len(parts)))
    return permute(tensor, tuple(parts[axis] for axis in order.order), back, shape)
