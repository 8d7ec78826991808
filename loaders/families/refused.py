"""Models that are known by their tensor names and that ComfyUI has no class for.

Without their names here they would pass for ComfyUI's own (``native``), and fail later with a
message that tells less.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ...quant.errors import LowBitError
from .base import split_prefix

__all__ = ["REFUSED", "refuse"]

#: Model for people -> classes of its config.json, and keys of which each alone tells it.
REFUSED: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "SANA": (
        ("SanaTransformer2DModel", "SanaVideoTransformer3DModel"),
        (
            "transformer_blocks.0.ff.inverted_conv.weight",  # Nunchaku
            "transformer_blocks.0.ff.conv_inverted.weight",  # diffusers
            "blocks.0.mlp.inverted_conv.conv.weight",  # the authors' own
        ),
    ),
}


def refuse(keys: set[str], config: Mapping[str, Any], families: Iterable[str]) -> None:
    """Raise for a model that cannot be opened.

    Args:
        keys: As in ``detect_family``.
        config: As in ``detect_family``.
        families: Names, for people, of what can be opened.
    """
    prefix, _ = split_prefix(keys)
    for display, (classes, signature) in REFUSED.items():
        found = next((key for key in signature if prefix + key in keys), None)
        if found is None:
            continue
        named = config.get("_class_name")
        also = f"; config.json names {named}" if named in classes else ""
        raise LowBitError(
            f"This is a {display} model, and ComfyUI has no model of that kind.",
            found=f"the key {prefix}{found}{also}",
            expected=f"one of {', '.join(families)}",
            remedy=f"{display} cannot be opened as a ComfyUI MODEL, quantized or not.",
        )
