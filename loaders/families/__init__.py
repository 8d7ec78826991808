"""Model families: which one a checkpoint is of, and how its names become ComfyUI's.

A new family is one module with a table, and one line in ``FAMILIES``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .auraflow import AuraFlow
from .base import Family, Move, Piece, Rule, Shapes, Split, split_prefix
from .chroma import Chroma
from .flux import Flux
from .flux2 import Flux2
from .native import Native
from .pixart import PixArt
from .qwen_image import QwenImage
from .refused import refuse
from .sd3 import SD3
from .sdxl import SDUNet
from .wan import Wan
from .z_image import Lumina2, ZImage

__all__ = [
    "FAMILIES",
    "Family",
    "Move",
    "Piece",
    "Rule",
    "Shapes",
    "Split",
    "detect_family",
    "split_prefix",
    "unused",
]

#: Every family; ``native`` is the last, because it takes whatever no other one knows.
FAMILIES: tuple[Family, ...] = (
    Flux(),
    Flux2(),
    Chroma(),
    QwenImage(),
    ZImage(),
    Lumina2(),
    Wan(),
    SD3(),
    AuraFlow(),
    PixArt(),
    SDUNet(),
    Native(),
)


def detect_family(
    keys: set[str], config: Mapping[str, Any], shapes: Shapes
) -> tuple[Family | None, str]:
    """The family of a checkpoint, with the evidence.

    Args:
        keys: Logical keys, as the file spells them.
        config: The component's config.json; may be empty.
        shapes: Logical shape of a key.

    Returns:
        The family and a sentence on why; ``(None, reason)`` for a checkpoint without tensors.

    Raises:
        LowBitError: The checkpoint is of a model that is known not to be ComfyUI's.
    """
    if not keys:
        return None, "no tensors"
    refuse(keys, config, (family.display for family in FAMILIES if family.classes))
    for family in FAMILIES:
        evidence = family.matches(keys, config, shapes)
        if evidence is not None:
            return family, evidence
    return None, "no family knows these names"


def unused(keys: set[str], moves: list[Move], ignored: Mapping[str, str]) -> list[str]:
    """Keys that no move uses and no reason excuses, sorted."""
    used = {piece.key for move in moves for piece in move.pieces}
    return sorted(keys - used - ignored.keys())
