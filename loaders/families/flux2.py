"""FLUX.2 (dev) and FLUX.2 Klein, diffusers and Nunchaku names.

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

SVDQuant checkpoints fuse q, k and v of double blocks and keep the parts of a single block's two
layers apart, under FLUX.1's first Nunchaku names (with or without ``attn.`` before them in single
blocks), or as ``linears.0`` and ``linears.1`` where a runtime manifest says so.

=========================================  ==========================================  ============
Nunchaku                                   ComfyUI                                     how
=========================================  ==========================================  ============
attn.to_qkv, attn.to_added_qkv             img_attn.qkv, txt_attn.qkv                  rename
single_….N.attn.qkv_proj + attn.mlp_fc1    single_blocks.N.linear1                     2 parts, rows
single_….N.attn.out_proj + attn.mlp_fc2    single_blocks.N.linear2                     2, columns
=========================================  ==========================================  ============

The model has no biases, but exporters of such files may write zeros for them: they are left out,
and other values are an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .base import Family, Move, Rule, Shapes, split_prefix
from .flux import ATTENTION, ENDS_OF_MODEL, double, embedder, single

__all__ = ["Flux2"]

#: A fused module that marks the files whose exporters write biases, without its block.
FUSED = (".attn.to_qkv.weight", ".qkv_proj.weight")


class Flux2(Family):
    """FLUX.2 transformers."""

    name = "flux2"
    display = "FLUX.2"
    classes = ("Flux2Transformer2DModel",)
    signature = (
        "x_embedder.weight",
        "double_stream_modulation_img.linear.weight",
        ("transformer_blocks.0.ff.linear_in.weight", "transformer_blocks.0.mlp_fc1.weight"),
    )
    rules = (
        *ATTENTION,
        *ENDS_OF_MODEL,
        Rule((double("ff.linear_in", "mlp_fc1"),), "double_blocks.{}.img_mlp.0"),
        Rule((double("ff.linear_out", "mlp_fc2"),), "double_blocks.{}.img_mlp.2"),
        Rule((double("ff_context.linear_in", "mlp_context_fc1"),), "double_blocks.{}.txt_mlp.0"),
        Rule((double("ff_context.linear_out", "mlp_context_fc2"),), "double_blocks.{}.txt_mlp.2"),
        Rule(single("attn.to_qkv_mlp_proj"), "single_blocks.{}.linear1"),
        Rule(
            (
                single("attn.qkv_proj", "qkv_proj", "attn.to_qkv_mlp_proj.linears.0"),
                single("attn.mlp_fc1", "mlp_fc1", "attn.to_qkv_mlp_proj.linears.1"),
            ),
            "single_blocks.{}.linear1",
        ),
        Rule(single("attn.to_out"), "single_blocks.{}.linear2"),
        Rule(
            (
                single("attn.out_proj", "out_proj", "attn.to_out.linears.0"),
                single("attn.mlp_fc2", "mlp_fc2", "attn.to_out.linears.1"),
            ),
            "single_blocks.{}.linear2",
            axis="columns",
        ),
        Rule(("double_stream_modulation_img.linear",), "double_stream_modulation_img.lin"),
        Rule(("double_stream_modulation_txt.linear",), "double_stream_modulation_txt.lin"),
        Rule(("single_stream_modulation.linear",), "single_stream_modulation.lin"),
        *embedder("time_guidance_embed.timestep_embedder", "time_in"),
        *embedder("time_guidance_embed.guidance_embedder", "guidance_in"),
        Rule(("norm_out.linear",), "final_layer.adaLN_modulation.1", "swap_halves"),
    )

    def _moves(self, keys: set[str], config: Mapping[str, Any], shapes: Shapes) -> list[Move]:
        return super()._moves(keys - _written_biases(keys), config, shapes)

    def ignored(self, keys: set[str], config: Mapping[str, Any]) -> dict[str, str]:
        reason = "FLUX.2 has no biases: exporters of fused layers write zeros"
        return split_prefix(keys)[1] | dict.fromkeys(sorted(self.zeros(keys, config)), reason)

    def zeros(self, keys: set[str], config: Mapping[str, Any]) -> set[str]:
        prefix, outside = split_prefix(keys)
        inside = {key[len(prefix) :] for key in keys if key not in outside}
        return {prefix + key for key in _written_biases(inside)}


def _written_biases(keys: set[str]) -> set[str]:
    """Biases in a file of fused layers; keys are without prefix."""
    if not any(key.endswith(FUSED) for key in keys):
        return set()
    return {key for key in keys if key.endswith(".bias")}
