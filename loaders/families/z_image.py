"""Z-Image and Lumina Image 2.0, diffusers and Nunchaku names: one model class in ComfyUI.

Three or four stacks of like blocks (``layers``, ``noise_refiner``, ``context_refiner`` and, in
Z-Image Omni, ``siglip_refiner``). q, k and v are fused along the rows; in Lumina 2 k and v have
fewer heads than q.

==============================  =============================  ===================================
Z-Image                         Lumina 2                       ComfyUI
==============================  =============================  ===================================
attention.to_q,k,v              attn.to_q,k,v                  attention.qkv (3 parts, rows)
adaLN_modulation.0              norm1.linear                   adaLN_modulation.0 / .1
attention_norm1                 norm1.norm, or norm1           attention_norm1
feed_forward.w1,w2,w3           feed_forward.linear_1,2,3      feed_forward.w1,w2,w3
all_x_embedder.2-1              x_embedder                     x_embedder
all_final_layer.2-1.linear      norm_out.linear_2              final_layer.linear
==============================  =============================  ===================================

SVDQuant checkpoints of Z-Image fuse what ComfyUI fuses, and what it does not. Their refiners may
be unquantized, and then have q, k and v apart, but their feed-forward layers fused:

==============================  ==================================================================
Nunchaku                        ComfyUI
==============================  ==================================================================
attention.to_qkv                attention.qkv
feed_forward.net.0.proj         feed_forward.w3 (upper rows), feed_forward.w1 (lower rows)
feed_forward.net.2              feed_forward.w2
==============================  ==================================================================
"""

from __future__ import annotations

from collections.abc import Mapping

from .base import Family, Rule, Split
from .flux import in_block

__all__ = ["Lumina2", "ZImage"]

STACKS = ("layers", "noise_refiner", "context_refiner", "siglip_refiner")


def attention(stack: str, source: str) -> tuple[Rule, ...]:
    """Rules for the attention of a stack of blocks, called ``source`` in the file."""
    return (
        Rule(
            tuple(f"{stack}.{{}}.{source}.to_{part}" for part in "qkv"),
            f"{stack}.{{}}.attention.qkv",
        ),
        Rule((f"{stack}.{{}}.{source}.to_out.0",), f"{stack}.{{}}.attention.out"),
        Rule((f"{stack}.{{}}.{source}.norm_q",), f"{stack}.{{}}.attention.q_norm"),
        Rule((f"{stack}.{{}}.{source}.norm_k",), f"{stack}.{{}}.attention.k_norm"),
    )


def fused(stack: str) -> tuple[Rule | Split, ...]:
    """Rules for the layers of a stack that SVDQuant checkpoints fuse."""
    return (
        Rule(in_block(stack, "attention.to_qkv"), f"{stack}.{{}}.attention.qkv"),
        Split(
            in_block(stack, "feed_forward.net.0.proj"),
            in_block(stack, "feed_forward.w3", "feed_forward.w1"),
        ),
        Rule(in_block(stack, "feed_forward.net.2"), f"{stack}.{{}}.feed_forward.w2"),
    )


def same(*names: str) -> tuple[Rule, ...]:
    """Rules for names that both sides share."""
    return tuple(Rule((name,), name) for name in names)


def renamed(stack: str, names: dict[str, str]) -> tuple[Rule, ...]:
    """Rules for plain renames inside the blocks of a stack."""
    return tuple(
        Rule((f"{stack}.{{}}.{source}",), f"{stack}.{{}}.{native}")
        for source, native in names.items()
    )


class ZImage(Family):
    """Z-Image transformers (Turbo, Base, Edit, Omni)."""

    name = "z_image"
    display = "Z-Image"
    classes = ("ZImageTransformer2DModel",)
    signature = (
        "all_x_embedder.2-1.weight",
        "cap_embedder.1.weight",
        ("noise_refiner.0.attention.to_q.weight", "noise_refiner.0.attention.to_qkv.weight"),
    )
    rules = (
        *(rule for stack in STACKS for rule in attention(stack, "attention")),
        *(rule for stack in STACKS for rule in fused(stack)),
        *same(
            *(
                f"{stack}.{{}}.{name}"
                for stack in STACKS
                for name in (
                    "attention_norm1",
                    "attention_norm2",
                    "ffn_norm1",
                    "ffn_norm2",
                    "feed_forward.w1",
                    "feed_forward.w2",
                    "feed_forward.w3",
                    "adaLN_modulation.0",
                )
            ),
            "cap_embedder.0",
            "cap_embedder.1",
            "siglip_embedder.0",
            "siglip_embedder.1",
            "t_embedder.mlp.0",
            "t_embedder.mlp.2",
            "cap_pad_token",
            "siglip_pad_token",
            "x_pad_token",
        ),
        Rule(("all_x_embedder.2-1",), "x_embedder"),
        Rule(("all_final_layer.2-1.linear",), "final_layer.linear"),
        Rule(("all_final_layer.2-1.adaLN_modulation.1",), "final_layer.adaLN_modulation.1"),
    )


class Lumina2(Family):
    """Lumina Image 2.0 transformers."""

    name = "lumina2"
    display = "Lumina 2"
    classes = ("Lumina2Transformer2DModel",)
    signature = (
        "x_embedder.weight",
        "time_caption_embed.caption_embedder.1.weight",
        "noise_refiner.0.attn.to_q.weight",
        "norm_out.linear_2.weight",
    )
    rules = (
        *(rule for stack in STACKS for rule in attention(stack, "attn")),
        *(
            rule
            for stack in STACKS
            for rule in renamed(
                stack,
                {
                    "norm1.linear": "adaLN_modulation.1",
                    "norm1.norm": "attention_norm1",
                    "norm1": "attention_norm1",
                    "norm2": "attention_norm2",
                    "ffn_norm1": "ffn_norm1",
                    "ffn_norm2": "ffn_norm2",
                    "feed_forward.linear_1": "feed_forward.w1",
                    "feed_forward.linear_2": "feed_forward.w2",
                    "feed_forward.linear_3": "feed_forward.w3",
                },
            )
        ),
        *same("x_embedder"),
        Rule(("time_caption_embed.timestep_embedder.linear_1",), "t_embedder.mlp.0"),
        Rule(("time_caption_embed.timestep_embedder.linear_2",), "t_embedder.mlp.2"),
        Rule(("time_caption_embed.caption_embedder.0",), "cap_embedder.0"),
        Rule(("time_caption_embed.caption_embedder.1",), "cap_embedder.1"),
        Rule(("norm_out.linear_1",), "final_layer.adaLN_modulation.1"),
        Rule(("norm_out.linear_2",), "final_layer.linear"),
    )

    def spelled(self, name: str, natives: Mapping[str, tuple[int, ...]]) -> str:
        """The first norm stands in a module of its own just where the block is modulated."""
        block = name.removesuffix(".norm1.norm")
        if block != name and f"{block}.adaLN_modulation.1.weight" not in natives:
            return f"{block}.norm1"
        return name
