"""Checkpoints that already use ComfyUI's names, and all others that no family knows.

The map is the identity after the wrapper prefix is taken off. Whether ComfyUI knows the model is
for its own detection to say, so a new architecture loads on the day ComfyUI learns it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .base import Family, Move, Shapes, identity, split_prefix

__all__ = ["Native"]


class Native(Family):
    """Names as ComfyUI's model has them."""

    name = "native"
    display = "ComfyUI names"

    def matches(self, keys: set[str], config: Mapping[str, Any], shapes: Shapes) -> str | None:
        prefix, _ = split_prefix(keys)
        evidence = "keys of no family that needs a map: taken as ComfyUI's own names"
        if prefix:
            evidence += f" under {prefix[:-1]}"
        if config.get("_class_name"):
            evidence += f"; config.json names {config['_class_name']}"
        return evidence

    def _moves(self, keys: set[str], config: Mapping[str, Any], shapes: Shapes) -> list[Move]:
        return identity(keys)
