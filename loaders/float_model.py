"""A checkpoint as float tensors under ComfyUI's names, read one at a time.

What quantizing a file starts from: whatever the file's names and formats are, a layer is a float
tensor of the shape that ComfyUI's model has. Low-bit layers are dequantized when they are read, in
float32 and by their exact meaning; plain tensors keep the file's dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch

from ..quant.errors import LowBitError
from ..quant.weight import QuantizedWeight
from .core_floats import core_layers
from .families.base import Move, Piece
from .header import DTYPES
from .layouts import composite
from .plan import Plan
from .schemes.lowbit import CompositeWeight

__all__ = ["FileFloats", "FloatModel", "assemble", "shape_of"]


class FloatModel(Protocol):
    """Float tensors of a model.

    Attributes:
        path: Where they come from; None for a model in memory.
        shapes: ``{native key: shape}``, of all tensors.
        dtypes: ``{native key: dtype}`` of what :meth:`read` gives.
        lowbit: Native keys whose tensors were low-bit there.
    """

    path: Path | None
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, torch.dtype]
    lowbit: frozenset[str]

    def read(self, key: str) -> torch.Tensor:
        """The tensor of a native key; the caller must not write into it."""


class FileFloats:
    """The :class:`FloatModel` of a plan. Close the plan's source after use, not before."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.path = plan.path
        self._entries, self._core = core_layers(plan.source, plan.entries)
        moves = plan.moves
        if self._core:
            keys = set(self._entries)
            moves = plan.family.moves(keys, plan.config, lambda key: self._entries[key].shape or ())
        self._moves = {move.native: move for move in moves}
        self._extras = plan.family.extras(set(self._entries), plan.config)
        self._last: tuple[str, torch.Tensor] | None = None

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        entries = self._entries
        told = {
            native: shape_of(move, {p.key: entries[p.key].shape for p in move.pieces})
            for native, move in self._moves.items()
        }
        return told | {key: tuple(tensor.shape) for key, tensor in self._extras.items()}

    @cached_property
    def dtypes(self) -> Mapping[str, torch.dtype]:
        told = {}
        for native, move in self._moves.items():
            found = {self._dtype(piece.key) for piece in move.pieces}
            told[native] = found.pop() if len(found) == 1 else torch.float32
        return told | {key: tensor.dtype for key, tensor in self._extras.items()}

    def _dtype(self, key: str) -> torch.dtype:
        entry = self._entries[key]
        return torch.float32 if entry.parts else getattr(torch, DTYPES[entry.dtype][1])

    @cached_property
    def lowbit(self) -> frozenset[str]:
        return frozenset(
            native
            for native, move in self._moves.items()
            if any(self._entries[p.key].parts or p.key in self._core for p in move.pieces)
        )

    def read(self, key: str) -> torch.Tensor:
        """The tensor of a native key.

        Raises:
            LowBitError: It cannot be read.
        """
        if key in self._extras:
            return self._extras[key]
        move = self._moves[key]
        try:
            return assemble(move, self._floats)
        except LowBitError as error:
            raise error.located(file=self.path, layer=move.pieces[0].key) from None

    def _floats(self, key: str) -> torch.Tensor:
        # A tensor that is taken apart into several native ones is decoded once.
        if self._last is not None and self._last[0] == key:
            return self._last[1]
        self._last = None
        value = self._entries[key].read()
        # Files are mapped anew for the next tensor, so that pages that were read do not add up.
        self.plan.source.close()
        if isinstance(value, CompositeWeight):
            value = composite.dequantize(value.held, value.spec, torch.float32)
        elif isinstance(value, QuantizedWeight):
            value.check()
            value = value.dequantize()
        self._last = key, value
        return value


def shape_of(move: Move, shapes: Mapping[str, tuple[int, ...] | None]) -> tuple[int, ...]:
    """Shape that a move makes of tensors of these shapes.

    Raises:
        LowBitError: One of them is not known.
    """
    cut = []
    for piece in move.pieces:
        shape = shapes[piece.key]
        if shape is None:
            raise LowBitError("The shape of a layer is not known.", layer=piece.key)
        shape = list(shape)
        for dim, part in ((0, piece.rows), (1, piece.columns)):
            if part is not None:
                shape[dim] = part[1]
        cut.append(shape)
    axis = {"rows": 0, "columns": 1}.get(move.axis)
    if axis is not None:
        cut[0][axis] = sum(shape[axis] for shape in cut)
    return tuple(cut[0])


def assemble(move: Move, read: Callable[[str], torch.Tensor]) -> torch.Tensor:
    """The tensor that a move makes.

    Args:
        move: Its pieces are names that ``read`` knows.
        read: ``name -> float tensor``.

    Returns:
        A view where it is one whole tensor as it is; else a copy, of the
            pieces' dtype, or float32 where they differ.
    """
    pieces = [_cut(piece, read(piece.key)) for piece in move.pieces]
    if move.axis == "single":
        return pieces[0]
    if move.axis == "sum":
        return torch.stack([piece.float() for piece in pieces]).sum(0).to(pieces[0].dtype)
    dtype = pieces[0].dtype
    if any(piece.dtype != dtype for piece in pieces):
        dtype = torch.float32
    return torch.cat([piece.to(dtype) for piece in pieces], dim=0 if move.axis == "rows" else 1)


def _cut(piece: Piece, tensor: torch.Tensor) -> torch.Tensor:
    for dim, part in ((0, piece.rows), (1, piece.columns)):
        if part is not None:
            tensor = tensor.narrow(dim, *part)
    if piece.op == "swap_halves":
        upper, lower = tensor.chunk(2, dim=0)
        tensor = torch.cat((lower, upper))
    return tensor
