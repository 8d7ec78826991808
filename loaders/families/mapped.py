"""Families whose map ComfyUI itself has: its table is read as data and turned into moves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...quant.errors import LowBitError
from ..host import maps
from .base import Family, Move, Piece, Shapes

__all__ = ["MappedFamily", "count", "moves_from"]


class MappedFamily(Family):
    """A family whose ``_table`` asks ComfyUI for its map.

    Subclasses implement ``_table`` and ``native_table``; keys that the map names and the file lacks
    are passed over (the maps name biases and variants that not every file has).
    """

    def _table(self, keys: set[str], shapes: Shapes) -> Mapping[str, maps.Target]:
        raise NotImplementedError

    def native_table(self, natives: Mapping[str, tuple[int, ...]]) -> Mapping[str, maps.Target]:
        """ComfyUI's map, told from ComfyUI's names and shapes; empty where they are not of it."""
        raise NotImplementedError

    def _moves(self, keys: set[str], config: Mapping[str, Any], shapes: Shapes) -> list[Move]:
        return moves_from(self._table(keys, shapes), keys, shapes)


def count(keys: set[str], head: str) -> int:
    """How many numbers in a row, from 0, occur after ``head`` in some key."""
    found = {key[len(head) :].partition(".")[0] for key in keys if key.startswith(head)}
    number = 0
    while str(number) in found:
        number += 1
    return number


def moves_from(table: Mapping[str, maps.Target], keys: set[str], shapes: Shapes) -> list[Move]:
    """Moves for the keys that are there, fused parts in the order of their offsets.

    Raises:
        LowBitError: The parts of a fused layer leave a gap, or are not as long as ComfyUI says.
    """
    made = []
    parts: dict[str, list[tuple[int, str]]] = {}
    starts: dict[str, set[int]] = {}
    for source, target in table.items():
        if target.rows is not None:
            starts.setdefault(target.native, set()).add(target.rows[0])
        if source not in keys:
            continue
        if target.rows is None:
            op = "swap_halves" if target.swap_halves else None
            made.append(Move(target.native, (Piece(source, op=op),)))
            continue
        first, number = target.rows
        if shapes(source)[0] != number:
            raise LowBitError(
                "A part of a fused layer has the wrong number of rows.",
                layer=source,
                found=shapes(source)[0],
                expected=f"{number} rows for {target.native}",
                remedy="The checkpoint does not have the architecture that its names say.",
            )
        parts.setdefault(target.native, []).append((first, source))
    for native, found in parts.items():
        found.sort()
        if {first for first, _ in found} != starts[native]:
            raise LowBitError(
                "A layer that ComfyUI keeps fused lacks a part in the checkpoint.",
                layer=native,
                found=", ".join(source for _, source in found),
                expected=f"parts that begin at rows {sorted(starts[native])}",
                remedy="The file is incomplete: get it from its source again.",
            )
        made.append(Move(native, tuple(Piece(source) for _, source in found), "rows"))
    return made
