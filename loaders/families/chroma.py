"""Chroma (Chroma1-HD, -Base, -Flash), diffusers names: FLUX.1's blocks without their modulation.

The modulation of all blocks comes from ``distilled_guidance_layer``; there is no ``norm_out``.
"""

from __future__ import annotations

from .base import Family, Rule
from .flux import ATTENTION, DOUBLE, ENDS_OF_MODEL, SINGLE

__all__ = ["Chroma"]

GUIDANCE = "distilled_guidance_layer"


class Chroma(Family):
    """Chroma transformers."""

    name = "chroma"
    display = "Chroma"
    classes = ("ChromaTransformer2DModel",)
    signature = (
        "x_embedder.weight",
        "context_embedder.weight",
        f"{GUIDANCE}.layers.0.linear_1.weight",
        "transformer_blocks.0.attn.add_q_proj.weight",
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
