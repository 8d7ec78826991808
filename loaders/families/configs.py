"""diffusers' config.json of a model, from the names and shapes that diffusers gives its tensors.

A model in ComfyUI's form has no config; a diffusers folder without one cannot be opened. What
shapes do not show (axes of the rotary embedding, epsilons) is the same in every published model of
a family, and stands here as its classes have it by default.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from ...quant.errors import LowBitError
from .qwen_image import TIMESTEP_ZERO

__all__ = ["diffusers_config"]

Shapes = Mapping[str, tuple[int, ...]]

_LINES = {TIMESTEP_ZERO: ("zero_cond_t", True)}


def diffusers_config(class_name: str, shapes: Shapes, left: Collection[str] = ()) -> dict[str, Any]:
    """The config of a model.

    Args:
        class_name: Of diffusers' class.
        shapes: ``{diffusers key: shape}``.
        left: ComfyUI's tensors that stand for a line of the config.

    Raises:
        LowBitError: The family's configs cannot be told from shapes.
    """
    told = _TELLERS.get(class_name)
    if told is None:
        raise LowBitError(
            "The diffusers config of this model cannot be told from its tensors.",
            found=class_name,
            expected="one of " + ", ".join(sorted(_TELLERS)),
            remedy="Quantize the model's diffusers folder, which has a config.json, or choose the "
            'container "comfy".',
        )
    lines = {_LINES[key][0]: _LINES[key][1] for key in left if key in _LINES}
    return {"_class_name": class_name, **told(shapes), **lines}


def _count(shapes: Shapes, stack: str) -> int:
    """Blocks of a stack."""
    found = re.compile(re.escape(stack) + r"\.(\d+)\.")
    return len({match[1] for key in shapes if (match := found.match(key))})


def _flux(shapes: Shapes) -> dict[str, Any]:
    width, channels = shapes["x_embedder.weight"]
    out = shapes["proj_out.weight"][0]
    return {
        "patch_size": 1,
        "in_channels": channels,
        "out_channels": None if out == channels else out,
        "num_layers": _count(shapes, "transformer_blocks"),
        "num_single_layers": _count(shapes, "single_transformer_blocks"),
        "attention_head_dim": 128,
        "num_attention_heads": width // 128,
        "joint_attention_dim": shapes["context_embedder.weight"][1],
        "axes_dims_rope": [16, 56, 56],
    }


def _flux1(shapes: Shapes) -> dict[str, Any]:
    embedder = "time_text_embed.{}_embedder.linear_1.weight"
    return {
        **_flux(shapes),
        "pooled_projection_dim": shapes[embedder.format("text")][1],
        "guidance_embeds": embedder.format("guidance") in shapes,
    }


def _chroma(shapes: Shapes) -> dict[str, Any]:
    guide = "distilled_guidance_layer"
    inner, width = shapes[f"{guide}.in_proj.weight"]
    return {
        **_flux(shapes),
        "approximator_num_channels": width,
        "approximator_hidden_dim": inner,
        "approximator_layers": _count(shapes, f"{guide}.layers"),
    }


def _flux2(shapes: Shapes) -> dict[str, Any]:
    width = shapes["x_embedder.weight"][0]
    embedder = "time_guidance_embed.{}_embedder.linear_1.weight"
    return {
        **_flux(shapes),
        "axes_dims_rope": [32, 32, 32, 32],
        "eps": 1e-6,
        "mlp_ratio": shapes["transformer_blocks.0.ff.linear_out.weight"][1] / width,
        "rope_theta": 2000,
        "timestep_guidance_channels": shapes[embedder.format("timestep")][1],
        "guidance_embeds": embedder.format("guidance") in shapes,
    }


def _qwen_image(shapes: Shapes) -> dict[str, Any]:
    width, channels = shapes["img_in.weight"]
    layered = "time_text_embed.addition_t_embedding.weight" in shapes
    return {
        "patch_size": 2,
        "in_channels": channels,
        "out_channels": shapes["proj_out.weight"][0] // 4,
        "num_layers": _count(shapes, "transformer_blocks"),
        "attention_head_dim": 128,
        "num_attention_heads": width // 128,
        "joint_attention_dim": shapes["txt_in.weight"][1],
        "guidance_embeds": False,
        "axes_dims_rope": [16, 56, 56],
        "use_additional_t_cond": layered,
        "use_layer3d_rope": layered,
    }


def _z_image(shapes: Shapes) -> dict[str, Any]:
    width, patch = shapes["all_x_embedder.2-1.weight"]
    heads = width // shapes["layers.0.attention.norm_q.weight"][0]
    siglip = shapes.get("siglip_embedder.1.weight")
    return {
        "all_patch_size": [2],
        "all_f_patch_size": [1],
        "in_channels": patch // 4,
        "dim": width,
        "n_layers": _count(shapes, "layers"),
        "n_refiner_layers": _count(shapes, "noise_refiner"),
        "n_heads": heads,
        "n_kv_heads": heads,
        "norm_eps": 1e-5,
        "qk_norm": True,
        "cap_feat_dim": shapes["cap_embedder.1.weight"][1],
        "siglip_feat_dim": None if siglip is None else siglip[1],
        "rope_theta": 256.0,
        "t_scale": 1000.0,
        "axes_dims": [32, 48, 48],
        "axes_lens": [1024, 512, 512],
    }


def _lumina2(shapes: Shapes) -> dict[str, Any]:
    width, patch = shapes["x_embedder.weight"]
    head = shapes["layers.0.attn.norm_q.weight"][0]
    return {
        "patch_size": 2,
        "in_channels": patch // 4,
        "out_channels": None,
        "hidden_size": width,
        "num_layers": _count(shapes, "layers"),
        "num_refiner_layers": _count(shapes, "noise_refiner"),
        "num_attention_heads": shapes["layers.0.attn.to_q.weight"][0] // head,
        "num_kv_heads": shapes["layers.0.attn.to_k.weight"][0] // head,
        "multiple_of": 256,
        "ffn_dim_multiplier": None,
        "norm_eps": 1e-5,
        "scaling_factor": 1.0,
        "axes_dim_rope": [32, 32, 32],
        "axes_lens": [300, 512, 512],
        "cap_feat_dim": shapes["time_caption_embed.caption_embedder.1.weight"][1],
    }


def _wan(shapes: Shapes) -> dict[str, Any]:
    width, channels, *patch = shapes["patch_embedding.weight"]
    image = shapes.get("condition_embedder.image_embedder.ff.net.0.proj.weight")
    places = shapes.get("condition_embedder.image_embedder.pos_embed")
    out = shapes["proj_out.weight"][0]
    for size in patch:
        out //= size
    return {
        "patch_size": patch,
        "num_attention_heads": width // 128,
        "attention_head_dim": 128,
        "in_channels": channels,
        "out_channels": out,
        "text_dim": shapes["condition_embedder.text_embedder.linear_1.weight"][1],
        "freq_dim": shapes["condition_embedder.time_embedder.linear_1.weight"][1],
        "ffn_dim": shapes["blocks.0.ffn.net.0.proj.weight"][0],
        "num_layers": _count(shapes, "blocks"),
        "cross_attn_norm": "blocks.0.norm2.weight" in shapes,
        "qk_norm": "rms_norm_across_heads",
        "eps": 1e-6,
        "image_dim": None if image is None else image[1],
        "added_kv_proj_dim": None if image is None else width,
        "rope_max_seq_len": 1024,
        "pos_embed_seq_len": None if places is None else places[1],
    }


def _sd3(shapes: Shapes) -> dict[str, Any]:
    width, channels, patch, _ = shapes["pos_embed.proj.weight"]
    stack = "transformer_blocks"
    layers = _count(shapes, stack)
    return {
        "patch_size": patch,
        "in_channels": channels,
        "out_channels": shapes["proj_out.weight"][0] // patch**2,
        "num_layers": layers,
        "attention_head_dim": 64,
        "num_attention_heads": width // 64,
        "joint_attention_dim": shapes["context_embedder.weight"][1],
        "caption_projection_dim": shapes["context_embedder.weight"][0],
        "pooled_projection_dim": shapes["time_text_embed.text_embedder.linear_1.weight"][1],
        "pos_embed_max_size": round(shapes["pos_embed.pos_embed"][1] ** 0.5),
        "sample_size": 128,
        "dual_attention_layers": [
            n for n in range(layers) if f"{stack}.{n}.attn2.to_q.weight" in shapes
        ],
        "qk_norm": "rms_norm" if f"{stack}.0.attn.norm_q.weight" in shapes else None,
    }


_TELLERS: dict[str, Callable[[Shapes], dict[str, Any]]] = {
    "ChromaTransformer2DModel": _chroma,
    "Flux2Transformer2DModel": _flux2,
    "FluxTransformer2DModel": _flux1,
    "Lumina2Transformer2DModel": _lumina2,
    "QwenImageTransformer2DModel": _qwen_image,
    "SD3Transformer2DModel": _sd3,
    "WanTransformer3DModel": _wan,
    "ZImageTransformer2DModel": _z_image,
}
