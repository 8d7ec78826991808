"""PixArt Alpha and Sigma, diffusers names, by ComfyUI's own map (``pixart_to_diffusers``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from ..host import maps
from .base import Shapes
from .mapped import MappedFamily, count

__all__ = ["PixArt"]


class PixArt(MappedFamily):
    """PixArt transformers."""

    name = "pixart"
    display = "PixArt"
    classes = ("PixArtTransformer2DModel", "Transformer2DModel")
    signature = (
        "adaln_single.linear.weight",
        "caption_projection.linear_1.weight",
        "pos_embed.proj.weight",
        "transformer_blocks.0.attn1.to_q.weight",
    )
    optional: ClassVar = {
        "y_embedder.y_embedding": "used in training alone, for captions that are left out",
    }

    def _table(self, keys: set[str], shapes: Shapes) -> Mapping[str, maps.Target]:
        return self._told(shapes("pos_embed.proj.weight"), count(keys, "transformer_blocks."))

    def native_table(self, natives: Mapping[str, tuple[int, ...]]) -> Mapping[str, maps.Target]:
        if not {"x_embedder.proj.weight", "y_embedder.y_proj.fc1.weight"} <= natives.keys():
            return {}
        return self._told(natives["x_embedder.proj.weight"], count(set(natives), "blocks."))

    def _told(self, embedder: tuple[int, ...], blocks: int) -> Mapping[str, maps.Target]:
        return maps.native_names("pixart", {"depth": blocks, "hidden_size": embedder[0]})
