"""Qwen-Image, -Edit, -Edit-2509, -Edit-2511, -2512 and -Layered: both sides use the same names.

Two variants differ in what ComfyUI has to be told:

========================  =========================================================================
Edit-2511                 reference images are modulated with time 0. diffusers reads that from
                          ``zero_cond_t`` in config.json, ComfyUI from the presence of an empty
                          tensor ``__index_timestep_zero__``
Layered                   ``time_text_embed.addition_t_embedding.weight``, which both sides have
========================  =========================================================================
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .base import Family, Move, Shapes, identity

__all__ = ["QwenImage"]

TIMESTEP_ZERO = "__index_timestep_zero__"


class QwenImage(Family):
    """Qwen-Image transformers."""

    name = "qwen_image"
    display = "Qwen-Image"
    classes = ("QwenImageTransformer2DModel",)
    signature = (
        "txt_norm.weight",
        "img_in.weight",
        "transformer_blocks.0.img_mod.1.weight",
        "transformer_blocks.0.attn.add_q_proj.weight",
    )

    def _moves(self, keys: set[str], config: Mapping[str, Any], shapes: Shapes) -> list[Move]:
        return identity(keys)

    def extras(self, keys: set[str], config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        told = any(key.endswith(TIMESTEP_ZERO) for key in keys)
        if config.get("zero_cond_t") and not told:
            return {TIMESTEP_ZERO: torch.empty(0)}
        return {}
