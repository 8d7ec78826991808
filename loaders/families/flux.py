"""FLUX.1 (dev, schnell, Fill, Kontext, Krea, Canny, Depth …), diffusers and Nunchaku names.

=====================================  =====================================  ===================
diffusers                              ComfyUI                                how
=====================================  =====================================  ===================
transformer_blocks.N.attn.to_q,k,v     double_blocks.N.img_attn.qkv           3 parts, rows
transformer_blocks.N.attn.add_*_proj   double_blocks.N.txt_attn.qkv           3 parts, rows
single_….N.attn.to_q,k,v + proj_mlp    single_blocks.N.linear1                4 parts, rows
norm_out.linear                        final_layer.adaLN_modulation.1         halves swapped
=====================================  =====================================  ===================

SVDQuant checkpoints fuse q, k and v, and take a single block's last layer apart by its inputs
(attention | feed-forward). Nunchaku has two spellings; everything outside the blocks, and the
modulation, is named as by diffusers.

==================  ==================  ======================================================
Nunchaku, first     Nunchaku, second    ComfyUI
==================  ==================  ======================================================
qkv_proj            attn.to_qkv         img_attn.qkv; in single blocks upper rows of linear1
qkv_proj_context    attn.add_qkv_proj   txt_attn.qkv
out_proj            attn.to_out.0       img_attn.proj
out_proj_context    attn.to_add_out     txt_attn.proj
mlp_fc1, mlp_fc2    ff.net.0.proj, .2   img_mlp.0, img_mlp.2
mlp_context_fc1,2   ff_context.net.…    txt_mlp.0, txt_mlp.2
norm_q, norm_k …    attn.norm_q …       img_attn.norm.query_norm …
single: mlp_fc1     mlp_fc1             lower rows of linear1
single: out_proj    attn.to_out         left columns of linear2, biases added
single: mlp_fc2     mlp_fc2             right columns of linear2
==================  ==================  ======================================================

Files with a runtime manifest call the halves of the last layer ``proj_out.linears.0`` and ``.1``.

Guidance (schnell has none) and the number of input channels are whatever the file has.
"""

from __future__ import annotations

from .base import Family, Rule

__all__ = ["ATTENTION", "CONTEXT_QKV", "DOUBLE", "ENDS_OF_MODEL", "SINGLE", "Flux", "in_block"]

#: Fused q, k and v of the text, inside a block of FLUX.1, FLUX.2, Chroma or Qwen-Image.
CONTEXT_QKV = ("attn.add_qkv_proj", "attn.to_added_qkv")


def in_block(stack: str, *names: str) -> tuple[str, ...]:
    """Spellings of one module of a numbered block."""
    return tuple(f"{stack}.{{}}.{name}" for name in names)


def double(*names: str) -> tuple[str, ...]:
    """Spellings of one module of a double block."""
    return in_block("transformer_blocks", *names)


def single(*names: str) -> tuple[str, ...]:
    """Spellings of one module of a single block."""
    return in_block("single_transformer_blocks", *names)


#: Joint attention of a double block, the same in FLUX.1, FLUX.2 and Chroma.
ATTENTION = (
    Rule(double("attn.to_q", "attn.to_k", "attn.to_v"), "double_blocks.{}.img_attn.qkv"),
    Rule((double("attn.to_qkv", "qkv_proj"),), "double_blocks.{}.img_attn.qkv"),
    Rule(
        double("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
        "double_blocks.{}.txt_attn.qkv",
    ),
    Rule((double(*CONTEXT_QKV, "qkv_proj_context"),), "double_blocks.{}.txt_attn.qkv"),
    Rule((double("attn.norm_q", "norm_q"),), "double_blocks.{}.img_attn.norm.query_norm"),
    Rule((double("attn.norm_k", "norm_k"),), "double_blocks.{}.img_attn.norm.key_norm"),
    Rule(
        (double("attn.norm_added_q", "norm_added_q"),), "double_blocks.{}.txt_attn.norm.query_norm"
    ),
    Rule((double("attn.norm_added_k", "norm_added_k"),), "double_blocks.{}.txt_attn.norm.key_norm"),
    Rule((double("attn.to_out.0", "out_proj"),), "double_blocks.{}.img_attn.proj"),
    Rule((double("attn.to_add_out", "out_proj_context"),), "double_blocks.{}.txt_attn.proj"),
    Rule((single("attn.norm_q", "norm_q"),), "single_blocks.{}.norm.query_norm"),
    Rule((single("attn.norm_k", "norm_k"),), "single_blocks.{}.norm.key_norm"),
)

#: Feed-forward layers of double blocks in FLUX.1 and Chroma.
DOUBLE = (
    Rule((double("ff.net.0.proj", "mlp_fc1"),), "double_blocks.{}.img_mlp.0"),
    Rule((double("ff.net.2", "mlp_fc2"),), "double_blocks.{}.img_mlp.2"),
    Rule((double("ff_context.net.0.proj", "mlp_context_fc1"),), "double_blocks.{}.txt_mlp.0"),
    Rule((double("ff_context.net.2", "mlp_context_fc2"),), "double_blocks.{}.txt_mlp.2"),
)

#: Single blocks in FLUX.1 and Chroma.
SINGLE = (
    Rule(single("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"), "single_blocks.{}.linear1"),
    Rule((single("attn.to_qkv", "qkv_proj"), single("mlp_fc1")), "single_blocks.{}.linear1"),
    Rule(single("proj_out"), "single_blocks.{}.linear2"),
    Rule(
        (
            single("attn.to_out", "out_proj", "proj_out.linears.0"),
            single("mlp_fc2", "proj_out.linears.1"),
        ),
        "single_blocks.{}.linear2",
        axis="columns",
    ),
)

#: First and last layers, the same in FLUX.1, FLUX.2 and Chroma.
ENDS_OF_MODEL = (
    Rule(("x_embedder",), "img_in"),
    Rule(("context_embedder",), "txt_in"),
    Rule(("proj_out",), "final_layer.linear"),
)

#: A module that all spellings of a FLUX.1 or Chroma file have in the first block.
CONTEXT_ATTENTION = tuple(
    f"transformer_blocks.0.{name}.weight"
    for name in ("attn.add_q_proj", "qkv_proj_context", *CONTEXT_QKV)
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
        CONTEXT_ATTENTION,
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
