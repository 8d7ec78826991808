"""FLUX.1 (dev, schnell, Fill, Kontext, Krea, Canny, Depth …), diffusers names.

=====================================  =====================================  ===================
diffusers                              ComfyUI                                how
=====================================  =====================================  ===================
transformer_blocks.N.attn.to_q,k,v     double_blocks.N.img_attn.qkv           3 parts, rows
transformer_blocks.N.attn.add_*_proj   double_blocks.N.txt_attn.qkv           3 parts, rows
single_….N.attn.to_q,k,v + proj_mlp    single_blocks.N.linear1                4 parts, rows
norm_out.linear                        final_layer.adaLN_modulation.1         halves swapped
=====================================  =====================================  ===================

Guidance (schnell has none) and the number of input channels are whatever the file has.
"""

from __future__ import annotations

from .base import Family, Rule

__all__ = ["ATTENTION", "DOUBLE", "ENDS_OF_MODEL", "SINGLE", "Flux"]

#: Joint attention of a double block, the same in FLUX.1, FLUX.2 and Chroma.
ATTENTION = (
    Rule(
        tuple(f"transformer_blocks.{{}}.attn.to_{part}" for part in "qkv"),
        "double_blocks.{}.img_attn.qkv",
    ),
    Rule(
        tuple(f"transformer_blocks.{{}}.attn.add_{part}_proj" for part in "qkv"),
        "double_blocks.{}.txt_attn.qkv",
    ),
    Rule(("transformer_blocks.{}.attn.norm_q",), "double_blocks.{}.img_attn.norm.query_norm"),
    Rule(("transformer_blocks.{}.attn.norm_k",), "double_blocks.{}.img_attn.norm.key_norm"),
    Rule(("transformer_blocks.{}.attn.norm_added_q",), "double_blocks.{}.txt_attn.norm.query_norm"),
    Rule(("transformer_blocks.{}.attn.norm_added_k",), "double_blocks.{}.txt_attn.norm.key_norm"),
    Rule(("transformer_blocks.{}.attn.to_out.0",), "double_blocks.{}.img_attn.proj"),
    Rule(("transformer_blocks.{}.attn.to_add_out",), "double_blocks.{}.txt_attn.proj"),
    Rule(("single_transformer_blocks.{}.attn.norm_q",), "single_blocks.{}.norm.query_norm"),
    Rule(("single_transformer_blocks.{}.attn.norm_k",), "single_blocks.{}.norm.key_norm"),
)

#: Feed-forward layers of double blocks in FLUX.1 and Chroma.
DOUBLE = (
    Rule(("transformer_blocks.{}.ff.net.0.proj",), "double_blocks.{}.img_mlp.0"),
    Rule(("transformer_blocks.{}.ff.net.2",), "double_blocks.{}.img_mlp.2"),
    Rule(("transformer_blocks.{}.ff_context.net.0.proj",), "double_blocks.{}.txt_mlp.0"),
    Rule(("transformer_blocks.{}.ff_context.net.2",), "double_blocks.{}.txt_mlp.2"),
)

#: Single blocks in FLUX.1 and Chroma.
SINGLE = (
    Rule(
        (
            "single_transformer_blocks.{}.attn.to_q",
            "single_transformer_blocks.{}.attn.to_k",
            "single_transformer_blocks.{}.attn.to_v",
            "single_transformer_blocks.{}.proj_mlp",
        ),
        "single_blocks.{}.linear1",
    ),
    Rule(("single_transformer_blocks.{}.proj_out",), "single_blocks.{}.linear2"),
)

#: First and last layers, the same in FLUX.1, FLUX.2 and Chroma.
ENDS_OF_MODEL = (
    Rule(("x_embedder",), "img_in"),
    Rule(("context_embedder",), "txt_in"),
    Rule(("proj_out",), "final_layer.linear"),
)


def embedder(source: str, native: str) -> tuple[Rule, Rule]:
    """Rules for a two-layer embedding."""
    return (
        Rule((f"{source}.linear_1",), f"{native}.in_layer"),
        Rule((f"{source}.linear_2",), f"{native}.out_layer"),
    )


class Flux(Family):
    """FLUX.1 transformers."""

    name = "flux"
    display = "FLUX.1"
    classes = ("FluxTransformer2DModel",)
    signature = (
        "x_embedder.weight",
        "context_embedder.weight",
        "time_text_embed.timestep_embedder.linear_1.weight",
        "transformer_blocks.0.attn.add_q_proj.weight",
        "transformer_blocks.0.norm1.linear.weight",
    )
    rules = (
        *ATTENTION,
        *DOUBLE,
        *SINGLE,
        *ENDS_OF_MODEL,
        Rule(("transformer_blocks.{}.norm1.linear",), "double_blocks.{}.img_mod.lin"),
        Rule(("transformer_blocks.{}.norm1_context.linear",), "double_blocks.{}.txt_mod.lin"),
        Rule(("single_transformer_blocks.{}.norm.linear",), "single_blocks.{}.modulation.lin"),
        *embedder("time_text_embed.timestep_embedder", "time_in"),
        *embedder("time_text_embed.text_embedder", "vector_in"),
        *embedder("time_text_embed.guidance_embedder", "guidance_in"),
        # diffusers keeps (scale, shift), ComfyUI (shift, scale)
        Rule(("norm_out.linear",), "final_layer.adaLN_modulation.1", "swap_halves"),
    )
