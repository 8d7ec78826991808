"""FLUX.2 (dev) and FLUX.2 Klein, diffusers names.

Both sides keep the gate before the up projection in the gated feed-forward layers, and
q | k | v | gate | up in a single block's first layer, so those are plain renames. The modulation
is shared by all blocks. Klein has no guidance embedding.

=========================================  ==========================================  ============
diffusers                                  ComfyUI                                     how
=========================================  ==========================================  ============
single_….N.attn.to_qkv_mlp_proj            single_blocks.N.linear1                     rename
single_….N.attn.to_out                     single_blocks.N.linear2                     rename
double_stream_modulation_img,txt.linear    double_stream_modulation_img,txt.lin        rename
time_guidance_embed.timestep_embedder      time_in                                     rename
norm_out.linear                            final_layer.adaLN_modulation.1              halves swap
=========================================  ==========================================  ============
"""

from __future__ import annotations

from .base import Family, Rule
from .flux import ATTENTION, ENDS_OF_MODEL, embedder

__all__ = ["Flux2"]


class Flux2(Family):
    """FLUX.2 transformers."""

    name = "flux2"
    display = "FLUX.2"
    classes = ("Flux2Transformer2DModel",)
    signature = (
        "x_embedder.weight",
        "double_stream_modulation_img.linear.weight",
        "transformer_blocks.0.ff.linear_in.weight",
    )
    rules = (
        *ATTENTION,
        *ENDS_OF_MODEL,
        Rule(("transformer_blocks.{}.ff.linear_in",), "double_blocks.{}.img_mlp.0"),
        Rule(("transformer_blocks.{}.ff.linear_out",), "double_blocks.{}.img_mlp.2"),
        Rule(("transformer_blocks.{}.ff_context.linear_in",), "double_blocks.{}.txt_mlp.0"),
        Rule(("transformer_blocks.{}.ff_context.linear_out",), "double_blocks.{}.txt_mlp.2"),
        Rule(("single_transformer_blocks.{}.attn.to_qkv_mlp_proj",), "single_blocks.{}.linear1"),
        Rule(("single_transformer_blocks.{}.attn.to_out",), "single_blocks.{}.linear2"),
        Rule(("double_stream_modulation_img.linear",), "double_stream_modulation_img.lin"),
        Rule(("double_stream_modulation_txt.linear",), "double_stream_modulation_txt.lin"),
        Rule(("single_stream_modulation.linear",), "single_stream_modulation.lin"),
        *embedder("time_guidance_embed.timestep_embedder", "time_in"),
        *embedder("time_guidance_embed.guidance_embedder", "guidance_in"),
        Rule(("norm_out.linear",), "final_layer.adaLN_modulation.1", "swap_halves"),
    )
