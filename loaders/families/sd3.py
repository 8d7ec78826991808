"""Stable Diffusion 3 and 3.5, diffusers names, by ComfyUI's own map (``mmdit_to_diffusers``)."""

from __future__ import annotations

from collections.abc import Mapping

from ..host import maps
from .base import Shapes
from .mapped import MappedFamily, count

__all__ = ["SD3"]

HEAD = 64


class SD3(MappedFamily):
    """Stable Diffusion 3.x transformers."""

    name = "sd3"
    display = "Stable Diffusion 3"
    classes = ("SD3Transformer2DModel",)
    signature = (
        "pos_embed.proj.weight",
        "context_embedder.weight",
        "time_text_embed.text_embedder.linear_1.weight",
        "transformer_blocks.0.attn.add_q_proj.weight",
    )

    def _table(self, keys: set[str], shapes: Shapes) -> Mapping[str, maps.Target]:
        return self._told(shapes("pos_embed.proj.weight"), count(keys, "transformer_blocks."))

    def native_table(self, natives: Mapping[str, tuple[int, ...]]) -> Mapping[str, maps.Target]:
        if "x_embedder.proj.weight" not in natives:
            return {}
        return self._told(natives["x_embedder.proj.weight"], count(set(natives), "joint_blocks."))

    def _told(self, embedder: tuple[int, ...], blocks: int) -> Mapping[str, maps.Target]:
        # ComfyUI counts the width in heads of 64 and calls that the depth
        depth = embedder[0] // HEAD
        return maps.native_names("mmdit", {"depth": depth, "num_blocks": blocks})
