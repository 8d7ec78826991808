"""Qwen-Image, -Edit, -Edit-2509, -Edit-2511, -2512 and -Layered: both sides use the same names.

SVDQuant checkpoints fuse what ComfyUI keeps apart; each part has a third of the rows:

==============================  ==========================================
Nunchaku                        ComfyUI
==============================  ==========================================
attn.to_qkv                     attn.to_q, attn.to_k, attn.to_v
attn.add_qkv_proj               attn.add_q_proj, add_k_proj, add_v_proj
==============================  ==========================================

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
from typing import Any, ClassVar

import torch

from .base import Family, Move, Shapes, Split, identity
from .flux import CONTEXT_QKV, in_block

__all__ = ["TIMESTEP_ZERO", "QwenImage"]

TIMESTEP_ZERO = "__index_timestep_zero__"

BLOCKS = "transformer_blocks"


class QwenImage(Family):
    """Qwen-Image transformers."""

    name = "qwen_image"
    display = "Qwen-Image"
    classes = ("QwenImageTransformer2DModel",)
    signature = (
        "txt_norm.weight",
        "img_in.weight",
        "transformer_blocks.0.img_mod.1.weight",
        tuple(f"{BLOCKS}.0.{name}.weight" for name in ("attn.add_q_proj", *CONTEXT_QKV)),
    )
    rules = (
        Split(
            in_block(BLOCKS, "attn.to_qkv"),
            in_block(BLOCKS, "attn.to_q", "attn.to_k", "attn.to_v"),
        ),
        Split(
            in_block(BLOCKS, *CONTEXT_QKV),
            in_block(BLOCKS, "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
        ),
    )

    unwritten: ClassVar = {TIMESTEP_ZERO: "config.json says it: zero_cond_t"}
    shares_names = True

    def _moves(self, keys: set[str], config: Mapping[str, Any], shapes: Shapes) -> list[Move]:
        made = super()._moves(keys, config, shapes)
        fused = {piece.key for move in made for piece in move.pieces}
        return made + identity(keys - fused)

    def extras(self, keys: set[str], config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        told = any(key.endswith(TIMESTEP_ZERO) for key in keys)
        if config.get("zero_cond_t") and not told:
            return {TIMESTEP_ZERO: torch.empty(0)}
        return {}
