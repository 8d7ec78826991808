"""What quantizing has to know of each family, as data: see ``quant.recipe.Facts``.

``keep`` holds what the producers of quantized checkpoints leave alone, under ComfyUI's names:
embedders, first and last layers for everybody (``*``), and what one producer leaves alone besides:
SDNQ the modulation of the first block, ModelOpt's examples the outer blocks of some models, and
Nunchaku what its engine has no kernel for.
"""

from __future__ import annotations

from collections.abc import Iterable

from ...quant.recipe import Facts

__all__ = ["FACTS", "UNKNOWN", "facts_of"]

MODELOPT = ("fp8", "nvfp4", "mxfp8", "int8", "int4")


def blocks(stack: str, *numbers: int) -> tuple[str, ...]:
    """Patterns of whole blocks."""
    return tuple(f"{stack}.{number}" for number in numbers)


def by_modelopt(*patterns: str) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """What ModelOpt's examples leave alone."""
    return tuple((method, patterns) for method in MODELOPT)


FLUX_LAST = ("single_blocks.*.linear2", True)
QKV = ("to_q", "to_k", "to_v")

FACTS: dict[str, Facts] = {
    "flux": Facts(
        keep=(
            ("*", ("img_in", "txt_in", "time_in", "vector_in", "guidance_in", "final_layer")),
            ("sdnq", ("single_blocks.0.modulation.lin",)),
        ),
        modulation=(
            ("double_blocks.*.img_mod.lin", 6),
            ("double_blocks.*.txt_mod.lin", 6),
            ("single_blocks.*.modulation.lin", 3),
        ),
        behind_gelu=("double_blocks.*.img_mlp.2", "double_blocks.*.txt_mlp.2"),
        two_inputs=(FLUX_LAST,),
    ),
    "flux2": Facts(
        keep=(
            (
                "*",
                (
                    "img_in",
                    "txt_in",
                    "time_in",
                    "guidance_in",
                    "double_stream_modulation_img",
                    "double_stream_modulation_txt",
                    "single_stream_modulation",
                    "final_layer",
                ),
            ),
        ),
        two_inputs=(("single_blocks.*.linear2", False),),
    ),
    "chroma": Facts(
        keep=(("*", ("img_in", "txt_in", "distilled_guidance_layer", "final_layer")),),
        behind_gelu=("double_blocks.*.img_mlp.2", "double_blocks.*.txt_mlp.2"),
        two_inputs=(FLUX_LAST,),
    ),
    "qwen_image": Facts(
        keep=(
            ("*", ("img_in", "txt_in", "time_text_embed", "norm_out", "proj_out")),
            ("sdnq", ("transformer_blocks.0.img_mod.1",)),
            *by_modelopt(*blocks("transformer_blocks", 0, 1, 58, 59)),
        ),
        modulation=(
            ("transformer_blocks.*.img_mod.1", 6),
            ("transformer_blocks.*.txt_mod.1", 6),
        ),
        behind_gelu=("transformer_blocks.*.img_mlp.net.2", "transformer_blocks.*.txt_mlp.net.2"),
        one_input=(
            tuple(f"transformer_blocks.*.attn.{part}" for part in QKV),
            tuple(f"transformer_blocks.*.attn.add_{part}_proj" for part in "qkv"),
        ),
    ),
    "z_image": Facts(
        keep=(
            ("*", ("x_embedder", "cap_embedder", "t_embedder", "siglip_embedder", "final_layer")),
            ("sdnq", ("layers.0.adaLN_modulation.0",)),
            ("svdquant", ("*.adaLN_modulation.0",)),
        ),
        one_input=(("*.feed_forward.w3", "*.feed_forward.w1"),),
    ),
    "lumina2": Facts(
        keep=(
            ("*", ("x_embedder", "cap_embedder", "t_embedder", "final_layer")),
            ("sdnq", ("layers.0.adaLN_modulation.1",)),
            ("svdquant", ("*.adaLN_modulation.1",)),
        ),
        one_input=(("*.feed_forward.w3", "*.feed_forward.w1"),),
    ),
    "wan": Facts(
        keep=(
            (
                "*",
                (
                    "patch_embedding",
                    "text_embedding",
                    "time_embedding",
                    "time_projection",
                    "img_emb",
                    "head",
                ),
            ),
            *by_modelopt(*blocks("blocks", 0, 1, 2, 37, 38, 39)),
        ),
    ),
    "sd3": Facts(
        keep=(
            ("*", ("x_embedder", "context_embedder", "t_embedder", "y_embedder", "final_layer")),
            ("svdquant", ("*.adaLN_modulation.1",)),
        ),
    ),
    "auraflow": Facts(
        keep=(
            ("*", ("init_x_linear", "cond_seq_linear", "t_embedder", "modF", "final_linear")),
            ("svdquant", ("*.modC.1", "*.modX.1", "*.modCX.1")),
        ),
    ),
    "pixart": Facts(
        keep=(
            (
                "*",
                (
                    "x_embedder",
                    "t_embedder",
                    "t_block",
                    "y_embedder",
                    "csize_embedder",
                    "ar_embedder",
                    "final_layer",
                ),
            ),
        ),
    ),
    "sdxl": Facts(
        keep=(
            ("*", ("time_embed", "label_emb", "input_blocks.0.0", "out")),
            (
                "svdquant",
                ("*.emb_layers.1", "*.proj_in", "*.proj_out", "*.attn2.to_k", "*.attn2.to_v"),
            ),
        ),
        one_input=(tuple(f"*.attn1.{part}" for part in QKV),),
    ),
}

#: Names that such layers have in most models.
UNKNOWN = Facts(
    keep=(
        (
            "*",
            (
                "*_embed",
                "*_embedder",
                "*_embedding",
                "*embedder*",
                "pos_embed*",
                "img_in",
                "txt_in",
                "vid_in",
                "time_in",
                "vector_in",
                "guidance_in",
                "proj_in",
                "emb_in",
                "img_emb",
                "head",
                "norm_out",
                "proj_out",
                "emb_out",
                "final_layer*",
                "final_linear",
                "lm_head",
                "shared",
                "embed_tokens",
                "*.embed_tokens",
            ),
        ),
        ("svdquant", ("*modulation*", "*adaLN*", "*.emb_layers.1")),
    ),
)

#: Native modules that tell a family; all of them, the first family that fits.
SIGNATURES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("chroma", ("double_blocks.0.img_attn.qkv", "distilled_guidance_layer.in_proj")),
    ("flux2", ("double_blocks.0.img_attn.qkv", "double_stream_modulation_img.lin")),
    ("flux", ("double_blocks.0.img_attn.qkv", "double_blocks.0.img_mod.lin", "vector_in.in_layer")),
    ("qwen_image", ("transformer_blocks.0.img_mod.1", "transformer_blocks.0.attn.add_q_proj")),
    ("z_image", ("cap_embedder.1", "noise_refiner.0.attention.qkv", "layers.0.adaLN_modulation.0")),
    ("lumina2", ("cap_embedder.1", "noise_refiner.0.attention.qkv", "layers.0.adaLN_modulation.1")),
    ("wan", ("patch_embedding", "time_projection.1", "blocks.0.self_attn.q", "head.head")),
    ("sd3", ("joint_blocks.0.x_block.attn.qkv", "context_embedder")),
    ("auraflow", ("init_x_linear", "cond_seq_linear")),
    ("pixart", ("t_block.1", "y_embedder.y_proj.fc1")),
    ("sdxl", ("input_blocks.0.0", "out.2", "time_embed.0")),
)


def facts_of(names: Iterable[str]) -> tuple[str, Facts]:
    """The family that a model's native layer names tell, and its facts; "" for none that is known.

    Args:
        names: Of layers, with or without ".weight".
    """
    have = {name.removesuffix(".weight") for name in names}
    for family, signature in SIGNATURES:
        if have.issuperset(signature):
            return family, FACTS[family]
    return "", UNKNOWN
