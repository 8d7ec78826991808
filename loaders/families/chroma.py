"""Chroma (Chroma1-HD, -Base, -Flash): FLUX.1's blocks, and their names, without their modulation.

The modulation of all blocks comes from ``distilled_guidance_layer``; there is no ``norm_out``.

Some SVDQuant files hold the norms of q and k twice, as ``norm_q`` and as ``attn.norm_q``, because
the program that reads them had one module under both names. The second one counts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from .base import Family, Move, Rule, Shapes, split_prefix
from .flux import ATTENTION, CONTEXT_ATTENTION, DOUBLE, ENDS_OF_MODEL, SINGLE

__all__ = ["Chroma"]

GUIDANCE = "distilled_guidance_layer"
NORM = re.compile(r"((?:single_)?transformer_blocks\.\d+)\.(norm_(?:added_)?[qk]\.weight)")


class Chroma(Family):
    """Chroma transformers."""

    name = "chroma"
    display = "Chroma"
    classes = ("ChromaTransformer2DModel",)
    signature = (
        "x_embedder.weight",
        "context_embedder.weight",
        f"{GUIDANCE}.layers.0.linear_1.weight",
        CONTEXT_ATTENTION,
    )
    rules = (
        *ATTENTION,
        *DOUBLE,
        *SINGLE,
        *ENDS_OF_MODEL,
        Rule((f"{GUIDANCE}.in_proj",), f"{GUIDANCE}.in_proj"),
        Rule((f"{GUIDANCE}.out_proj",), f"{GUIDANCE}.out_proj"),
        Rule((f"{GUIDANCE}.norms.{{}}",), f"{GUIDANCE}.norms.{{}}"),
        Rule((f"{GUIDANCE}.layers.{{}}.linear_1",), f"{GUIDANCE}.layers.{{}}.in_layer"),
        Rule((f"{GUIDANCE}.layers.{{}}.linear_2",), f"{GUIDANCE}.layers.{{}}.out_layer"),
    )

    def _moves(self, keys: set[str], config: Mapping[str, Any], shapes: Shapes) -> list[Move]:
        return super()._moves(keys - _twice(keys).keys(), config, shapes)

    def ignored(self, keys: set[str], config: Mapping[str, Any]) -> dict[str, str]:
        prefix, outside = split_prefix(keys)
        inside = {key[len(prefix) :] for key in keys if key not in outside}
        return outside | {
            prefix + key: f"is {prefix}{other} once more"
            for key, other in sorted(_twice(inside).items())
        }


def _twice(keys: set[str]) -> dict[str, str]:
    """Norms under their short name that the file holds under their long one too."""
    found = {}
    for key in keys:
        match = NORM.fullmatch(key)
        if match and f"{match[1]}.attn.{match[2]}" in keys:
            found[key] = f"{match[1]}.attn.{match[2]}"
    return found
