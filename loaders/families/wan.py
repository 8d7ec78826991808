"""Wan 2.1 and 2.2 (text, image and text-image to video; ChronoEdit), diffusers names.

Nothing is fused; the traps are names that swap places:

=====================================  ===========================================
diffusers                              ComfyUI
=====================================  ===========================================
blocks.N.norm2 (before attn2)          blocks.N.norm3
blocks.N.attn1 / attn2                 blocks.N.self_attn / cross_attn
attn2.add_k_proj, add_v_proj           cross_attn.k_img, v_img
blocks.N.scale_shift_table             blocks.N.modulation
scale_shift_table                      head.modulation
condition_embedder.image_embedder.ff   img_emb.proj.1 and .3, between its two norms
=====================================  ===========================================
"""

from __future__ import annotations

from .base import Family, Rule

__all__ = ["Wan"]

ATTENTION = {
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "o",
    "norm_q": "norm_q",
    "norm_k": "norm_k",
    "add_k_proj": "k_img",
    "add_v_proj": "v_img",
    "norm_added_k": "norm_k_img",
}

MODEL = {
    "patch_embedding": "patch_embedding",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.image_embedder.norm1": "img_emb.proj.0",
    "condition_embedder.image_embedder.ff.net.0.proj": "img_emb.proj.1",
    "condition_embedder.image_embedder.ff.net.2": "img_emb.proj.3",
    "condition_embedder.image_embedder.norm2": "img_emb.proj.4",
    "condition_embedder.image_embedder.pos_embed": "img_emb.emb_pos",
    "proj_out": "head.head",
    "scale_shift_table": "head.modulation",
    "blocks.{}.scale_shift_table": "blocks.{}.modulation",
    "blocks.{}.norm2": "blocks.{}.norm3",
    "blocks.{}.ffn.net.0.proj": "blocks.{}.ffn.0",
    "blocks.{}.ffn.net.2": "blocks.{}.ffn.2",
}


class Wan(Family):
    """Wan video transformers."""

    name = "wan"
    display = "Wan 2.x"
    classes = ("WanTransformer3DModel", "ChronoEditTransformer3DModel")
    signature = (
        "patch_embedding.weight",
        "condition_embedder.time_proj.weight",
        "blocks.0.attn1.to_q.weight",
        "blocks.0.scale_shift_table",
    )
    rules = (
        *(Rule((source,), native) for source, native in MODEL.items()),
        *(
            Rule((f"blocks.{{}}.{ours}.{source}",), f"blocks.{{}}.{theirs}.{native}")
            for ours, theirs in (("attn1", "self_attn"), ("attn2", "cross_attn"))
            for source, native in ATTENTION.items()
        ),
    )
