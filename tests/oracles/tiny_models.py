"""Small models of every family, made by diffusers' own classes with random weights.

Run in the oracle interpreter: ``python tiny_models.py OUT tiny NAME …`` writes, for each model,
``OUT/NAME/`` as ``save_pretrained`` does it (float32) and ``OUT/NAME/run.safetensors`` with one
forward pass (inputs ``in.*``, result ``out``). ``python tiny_models.py OUT published`` writes
``OUT/NAME.json`` with the config, keys and shapes of the published architectures, which are built
on the meta device and hold no weights.

Other oracle scripts import ``build``, ``example_inputs`` and ``forward``.

Inputs are latents as ComfyUI's models take them; ``forward`` does the packing that the diffusers
pipeline does. Every time is small and within 0..1 of the schedule unless said otherwise, because
the two sides build their tables of sines differently and differ by 3e-5 at large times.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Spec:
    """How to build and run one model.

    Args:
        cls: Name of the diffusers class.
        config: Arguments of the class for a width (and the default width).
        width: Smallest width that makes sense.
        inputs: Makes inputs for a config.
        run: Calls the model as the diffusers pipeline does.
    """

    cls: str
    config: Callable[[int], dict[str, Any]]
    width: int
    inputs: Callable[[Any], Inputs]
    run: Callable[[nn.Module, Inputs], Tensor]


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape)


def pack(x: Tensor, patch: int = 2) -> Tensor:
    """[B, C, H, W] -> [B, H/p * W/p, C*p*p], channels first in a token."""
    b, c, h, w = x.shape
    x = x.view(b, c, h // patch, patch, w // patch, patch).permute(0, 2, 4, 1, 3, 5)
    return x.reshape(b, (h // patch) * (w // patch), c * patch * patch)


def unpack(tokens: Tensor, height: int, width: int, patch: int = 2) -> Tensor:
    """The inverse of ``pack`` for an image of ``height`` x ``width``."""
    b, _, features = tokens.shape
    c = features // patch**2
    x = tokens.view(b, height // patch, width // patch, c, patch, patch).permute(0, 3, 1, 4, 2, 5)
    return x.reshape(b, c, height, width)


def grid_ids(height: int, width: int, axes: int) -> Tensor:
    """Position ids of image tokens, row and column in axes 1 and 2."""
    ids = torch.zeros(height, width, axes)
    ids[..., 1] = torch.arange(height)[:, None]
    ids[..., 2] = torch.arange(width)[None, :]
    return ids.view(-1, axes)


# FLUX.1, Chroma


def flux_inputs(config: Any) -> Inputs:
    made = {
        "x": randn(1, config.in_channels // 4, 4, 6),
        "timestep": torch.tensor([0.25]),
        "context": randn(1, 5, config.joint_attention_dim),
    }
    if hasattr(config, "pooled_projection_dim"):
        made["y"] = randn(1, config.pooled_projection_dim)
    if getattr(config, "guidance_embeds", False):
        made["guidance"] = torch.tensor([3.5])
    return made


def flux_run(module: nn.Module, given: Inputs) -> Tensor:
    x, context = given["x"], given["context"]
    height, width = x.shape[2:]
    extra = {}
    if "y" in given:
        extra["pooled_projections"] = given["y"]
        extra["guidance"] = given.get("guidance")
    out = module(
        hidden_states=pack(x),
        encoder_hidden_states=context,
        timestep=given["timestep"],
        img_ids=grid_ids(height // 2, width // 2, 3),
        txt_ids=torch.zeros(context.shape[1], 3),
        return_dict=False,
        **extra,
    )[0]
    return unpack(out, height, width)


def flux_config(width: int, **more: Any) -> dict[str, Any]:
    return {
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 128,
        "num_attention_heads": width // 128,
        "joint_attention_dim": 192,
        "pooled_projection_dim": 64,
        "guidance_embeds": True,
    } | more


def chroma_config(width: int) -> dict[str, Any]:
    return {
        "num_layers": 1,
        "num_single_layers": 2,
        "attention_head_dim": 128,
        "num_attention_heads": width // 128,
        "joint_attention_dim": 192,
        "approximator_hidden_dim": width // 2,
        "approximator_layers": 2,
    }


# FLUX.2


def flux2_inputs(config: Any) -> Inputs:
    made = {
        "x": randn(1, config.in_channels, 3, 4),
        "timestep": torch.tensor([0.25]),
        "context": randn(1, 5, config.joint_attention_dim),
    }
    if config.guidance_embeds:
        made["guidance"] = torch.tensor([3.5])
    return made


def flux2_run(module: nn.Module, given: Inputs) -> Tensor:
    x, context = given["x"], given["context"]
    height, width = x.shape[2:]
    text_ids = torch.zeros(context.shape[1], 4)
    text_ids[:, 3] = torch.arange(context.shape[1])
    out = module(
        hidden_states=pack(x, 1),
        encoder_hidden_states=context,
        timestep=given["timestep"],
        img_ids=grid_ids(height, width, 4)[None],
        txt_ids=text_ids[None],
        guidance=given.get("guidance"),
        return_dict=False,
    )[0]
    return unpack(out, height, width, 1)


def flux2_config(width: int, guidance: bool = True) -> dict[str, Any]:
    return {
        "num_layers": 1,
        "num_single_layers": 2,
        "attention_head_dim": 128,
        "num_attention_heads": width // 128,
        "joint_attention_dim": 192,
        "guidance_embeds": guidance,
    }


# Qwen-Image


def qwen_inputs(config: Any) -> Inputs:
    # even token grids: ComfyUI centres odd ones half a step away from diffusers
    made = {
        "x": randn(1, 16, 1, 4, 8),
        "timestep": torch.tensor([0.25]),
        "context": randn(1, 5, config.joint_attention_dim),
    }
    if config.zero_cond_t:
        made["reference"] = randn(1, 16, 1, 4, 4)
    if config.use_additional_t_cond:
        made["additional_t_cond"] = torch.tensor([1])
    return made


def qwen_run(module: nn.Module, given: Inputs) -> Tensor:
    x, context = given["x"], given["context"]
    images = [image[:, :, 0] for image in (x, given.get("reference")) if image is not None]
    shapes = [(1, image.shape[2] // 2, image.shape[3] // 2) for image in images]
    out = module(
        hidden_states=torch.cat([pack(image) for image in images], dim=1),
        encoder_hidden_states=context,
        encoder_hidden_states_mask=torch.ones(context.shape[:2], dtype=torch.long),
        timestep=given["timestep"],
        img_shapes=[shapes],
        txt_seq_lens=[context.shape[1]],
        additional_t_cond=given.get("additional_t_cond"),
        return_dict=False,
    )[0]
    tokens = shapes[0][1] * shapes[0][2]
    return unpack(out[:, :tokens], *x.shape[3:])[:, :, None]


def qwen_config(width: int, **more: Any) -> dict[str, Any]:
    return {
        "num_layers": 2,
        "attention_head_dim": 128,
        "num_attention_heads": width // 128,
        "joint_attention_dim": 192,
    } | more


# Z-Image, Lumina 2


def z_image_inputs(config: Any) -> Inputs:
    return {
        "x": randn(1, config.in_channels, 4, 6),
        "timestep": torch.tensor([0.75]),
        "context": randn(1, 5, config.cap_feat_dim),
    }


def z_image_run(module: nn.Module, given: Inputs) -> Tensor:
    out = module(
        [given["x"][0][:, None]], 1 - given["timestep"], [given["context"][0]], return_dict=False
    )
    return -out[0][0][None, :, 0]


def z_image_config(width: int) -> dict[str, Any]:
    return {
        "dim": width,
        "n_layers": 2,
        "n_refiner_layers": 2,
        "n_heads": width // 128,
        "n_kv_heads": width // 128,
        "cap_feat_dim": 192,
    }


def lumina2_run(module: nn.Module, given: Inputs) -> Tensor:
    context = given["context"]
    return -module(
        hidden_states=given["x"],
        timestep=1 - given["timestep"],
        encoder_hidden_states=context,
        encoder_attention_mask=torch.ones(context.shape[:2], dtype=torch.bool),
        return_dict=False,
    )[0]


def lumina2_config(width: int) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "num_layers": 2,
        "num_refiner_layers": 2,
        "num_attention_heads": width // 96,
        "num_kv_heads": width // 288,
        "cap_feat_dim": 192,
    }


# Wan


def wan_inputs(config: Any) -> Inputs:
    # with images, diffusers counts the text from the end and takes it to be 512 long
    made = {
        "x": randn(1, config.in_channels, 2, 4, 6),
        "timestep": torch.tensor([12.0]),
        "context": randn(1, 512 if config.image_dim else 5, config.text_dim),
    }
    if config.image_dim:
        tokens = config.pos_embed_seq_len or 257
        made["clip_fea"] = randn(1, tokens, config.image_dim)
    return made


def wan_run(module: nn.Module, given: Inputs) -> Tensor:
    image = given.get("clip_fea")
    if image is not None and module.config.pos_embed_seq_len:
        # diffusers takes two images apart; ComfyUI takes one row of tokens
        image = image.view(2, -1, image.shape[-1])
    return module(
        hidden_states=given["x"],
        timestep=given["timestep"],
        encoder_hidden_states=given["context"],
        encoder_hidden_states_image=image,
        return_dict=False,
    )[0]


def wan_config(width: int, **more: Any) -> dict[str, Any]:
    return {
        "num_attention_heads": width // 128,
        "attention_head_dim": 128,
        "num_layers": 2,
        "ffn_dim": 2 * width,
        "text_dim": 4096,
    } | more


def wan_image(width: int) -> dict[str, Any]:
    return {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": width}


# Stable Diffusion 3, AuraFlow, PixArt


def sd3_inputs(config: Any) -> Inputs:
    return {
        "x": randn(1, config.in_channels, 4, 6),
        "timestep": torch.tensor([12.0]),
        "context": randn(1, 5, config.joint_attention_dim),
        "y": randn(1, config.pooled_projection_dim),
    }


def sd3_run(module: nn.Module, given: Inputs) -> Tensor:
    return module(
        hidden_states=given["x"],
        encoder_hidden_states=given["context"],
        pooled_projections=given["y"],
        timestep=given["timestep"],
        return_dict=False,
    )[0]


def sd3_config(width: int, **more: Any) -> dict[str, Any]:
    # ComfyUI takes the number of blocks from the width: one for each head of 64
    return {
        "num_layers": width // 64,
        "attention_head_dim": 64,
        "num_attention_heads": width // 64,
        "joint_attention_dim": 192,
        "caption_projection_dim": width,
        "pooled_projection_dim": 2048,
        "pos_embed_max_size": 16,
        "sample_size": 16,
    } | more


def auraflow_inputs(config: Any) -> Inputs:
    return {
        # an even token grid: the two sides centre odd ones one token apart
        "x": randn(1, config.in_channels, 4, 8),
        "timestep": torch.tensor([0.25]),
        "context": randn(1, 5, config.joint_attention_dim),
    }


def auraflow_run(module: nn.Module, given: Inputs) -> Tensor:
    return module(
        hidden_states=given["x"],
        encoder_hidden_states=given["context"],
        timestep=given["timestep"],
        return_dict=False,
    )[0]


def auraflow_config(width: int) -> dict[str, Any]:
    return {
        "sample_size": 16,
        "num_mmdit_layers": 1,
        "num_single_dit_layers": 2,
        "attention_head_dim": width // 2,
        "num_attention_heads": 2,
        "joint_attention_dim": 192,
        "caption_projection_dim": width,
        "pos_embed_max_size": 64,
    }


def pixart_inputs(config: Any) -> Inputs:
    # ComfyUI scales positions by the image's size, in steps of 64: smaller ones give a scale of 0
    made = {
        "x": randn(1, config.in_channels, 34, 36),
        "timestep": torch.tensor([12.0]),
        "context": randn(1, 5, config.caption_channels),
    }
    if config.use_additional_conditions:
        made["c_size"] = torch.tensor([[272.0, 288.0]])
        made["c_ar"] = torch.tensor([[0.9]])
    return made


def pixart_run(module: nn.Module, given: Inputs) -> Tensor:
    out = module(
        given["x"],
        encoder_hidden_states=given["context"],
        timestep=given["timestep"],
        added_cond_kwargs={
            "resolution": given.get("c_size"),
            "aspect_ratio": given.get("c_ar"),
        },
        return_dict=False,
    )[0]
    return out[:, : module.config.in_channels]


def pixart_config(width: int, **more: Any) -> dict[str, Any]:
    return {
        "num_attention_heads": 16,
        "attention_head_dim": width // 16,
        "cross_attention_dim": width,
        "num_layers": 1,
        "caption_channels": 4096,
        "sample_size": 64,
    } | more


# The Stable Diffusion UNet


def unet_inputs(config: Any) -> Inputs:
    made = {
        "x": randn(1, config.in_channels, 8, 8),
        "timestep": torch.tensor([12.0]),
        "context": randn(1, 5, config.cross_attention_dim),
    }
    if config.addition_embed_type:
        made["pooled"] = randn(1, 1280)
        made["time_ids"] = torch.tensor([[64.0, 64.0, 0.0, 0.0, 64.0, 64.0]])
    return made


def unet_run(module: nn.Module, given: Inputs) -> Tensor:
    added = None
    if "pooled" in given:
        added = {"text_embeds": given["pooled"], "time_ids": given["time_ids"]}
    return module(
        given["x"],
        given["timestep"],
        encoder_hidden_states=given["context"],
        added_cond_kwargs=added,
        return_dict=False,
    )[0]


def sdxl_config(width: int, depth: tuple[int, ...] = (1, 2, 3)) -> dict[str, Any]:
    return {
        "block_out_channels": [width, 2 * width, 4 * width],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "transformer_layers_per_block": list(depth),
        "attention_head_dim": [width // 64, 2 * width // 64, 4 * width // 64],
        "cross_attention_dim": 192,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    }


def sd15_config(width: int) -> dict[str, Any]:
    return {
        "block_out_channels": [width, 2 * width, 4 * width, 4 * width],
        "attention_head_dim": 8,
        "cross_attention_dim": 192,
    }


SPECS = {
    "flux": Spec("FluxTransformer2DModel", flux_config, 256, flux_inputs, flux_run),
    "flux_schnell": Spec(
        "FluxTransformer2DModel",
        lambda width: flux_config(width, guidance_embeds=False),
        128,
        flux_inputs,
        flux_run,
    ),
    "flux2": Spec("Flux2Transformer2DModel", flux2_config, 256, flux2_inputs, flux2_run),
    "flux2_klein": Spec(
        "Flux2Transformer2DModel",
        lambda width: flux2_config(width, guidance=False),
        128,
        flux2_inputs,
        flux2_run,
    ),
    "chroma": Spec("ChromaTransformer2DModel", chroma_config, 256, flux_inputs, flux_run),
    "qwen_image": Spec("QwenImageTransformer2DModel", qwen_config, 256, qwen_inputs, qwen_run),
    "qwen_image_edit": Spec(
        "QwenImageTransformer2DModel",
        lambda width: qwen_config(width, zero_cond_t=True),
        256,
        qwen_inputs,
        qwen_run,
    ),
    "qwen_image_layered": Spec(
        "QwenImageTransformer2DModel",
        lambda width: qwen_config(width, use_additional_t_cond=True),
        128,
        qwen_inputs,
        qwen_run,
    ),
    "z_image": Spec("ZImageTransformer2DModel", z_image_config, 256, z_image_inputs, z_image_run),
    "lumina2": Spec("Lumina2Transformer2DModel", lumina2_config, 288, z_image_inputs, lumina2_run),
    "wan": Spec("WanTransformer3DModel", wan_config, 256, wan_inputs, wan_run),
    "wan_i2v": Spec(
        "WanTransformer3DModel",
        lambda width: wan_config(width, **wan_image(width)),
        128,
        wan_inputs,
        wan_run,
    ),
    "wan_flf2v": Spec(
        "WanTransformer3DModel",
        lambda width: wan_config(width, **wan_image(width), pos_embed_seq_len=514),
        128,
        wan_inputs,
        wan_run,
    ),
    "wan_ti2v": Spec(
        "WanTransformer3DModel",
        lambda width: wan_config(width, in_channels=48, out_channels=48),
        128,
        wan_inputs,
        wan_run,
    ),
    "sd3": Spec("SD3Transformer2DModel", sd3_config, 128, sd3_inputs, sd3_run),
    "sd35": Spec(
        "SD3Transformer2DModel",
        lambda width: sd3_config(width, qk_norm="rms_norm", dual_attention_layers=(0, 1)),
        192,
        sd3_inputs,
        sd3_run,
    ),
    "auraflow": Spec(
        "AuraFlowTransformer2DModel", auraflow_config, 256, auraflow_inputs, auraflow_run
    ),
    "pixart_alpha": Spec(
        "PixArtTransformer2DModel",
        lambda width: pixart_config(width, use_additional_conditions=True),
        1152,
        pixart_inputs,
        pixart_run,
    ),
    "pixart_sigma": Spec(
        "PixArtTransformer2DModel",
        lambda width: pixart_config(width, use_additional_conditions=False),
        1152,
        pixart_inputs,
        pixart_run,
    ),
    "sdxl": Spec("UNet2DConditionModel", sdxl_config, 64, unet_inputs, unet_run),
    "sd15": Spec("UNet2DConditionModel", sd15_config, 32, unet_inputs, unet_run),
    # the smallest that ComfyUI's detection takes, where that is big (1.5 to 4 GB each)
    "chroma_whole": Spec(
        "ChromaTransformer2DModel",
        lambda width: (
            chroma_config(width)
            | {"num_single_layers": 1, "approximator_hidden_dim": 5120, "approximator_layers": 5}
        ),
        3072,
        flux_inputs,
        flux_run,
    ),
    "qwen_image_whole": Spec(
        "QwenImageTransformer2DModel",
        lambda width: qwen_config(width, num_layers=1, joint_attention_dim=3584),
        3072,
        qwen_inputs,
        qwen_run,
    ),
    "qwen_image_edit_whole": Spec(
        "QwenImageTransformer2DModel",
        lambda width: qwen_config(width, num_layers=1, joint_attention_dim=3584, zero_cond_t=True),
        3072,
        qwen_inputs,
        qwen_run,
    ),
    "z_image_whole": Spec(
        "ZImageTransformer2DModel",
        lambda width: z_image_config(width) | {"n_layers": 1},
        3840,
        z_image_inputs,
        z_image_run,
    ),
    "lumina2_whole": Spec(
        "Lumina2Transformer2DModel",
        lambda width: lumina2_config(width) | {"num_layers": 1},
        2304,
        z_image_inputs,
        lumina2_run,
    ),
    "auraflow_whole": Spec(
        "AuraFlowTransformer2DModel",
        lambda width: (
            auraflow_config(width)
            | {"num_single_dit_layers": 1, "attention_head_dim": 256, "num_attention_heads": 12}
            | {"joint_attention_dim": 2048}
        ),
        3072,
        auraflow_inputs,
        auraflow_run,
    ),
    "sdxl_vega_whole": Spec(
        "UNet2DConditionModel",
        lambda width: (
            sdxl_config(width, (1, 1, 2))
            | {"cross_attention_dim": 2048, "mid_block_type": "UNetMidBlock2D"}
        ),
        320,
        unet_inputs,
        unet_run,
    ),
    "sd15_whole": Spec(
        "UNet2DConditionModel",
        lambda width: sd15_config(width) | {"cross_attention_dim": 768},
        320,
        unet_inputs,
        unet_run,
    ),
}


def randomize(module: nn.Module, seed: int) -> None:
    """Fill every parameter: matrices by normal(std=fan_in^-0.5), the rest small and distinct.

    diffusers starts some layers at zero, and norms at one, which would hide a wrong map.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1 and name.endswith("weight"):
                parameter.copy_(noise * parameter[0].numel() ** -0.5)
            elif parameter.ndim == 1 and name.endswith("weight"):
                parameter.copy_(1 + 0.2 * noise)
            else:
                parameter.copy_(0.2 * noise)


def build(family: str, *, width: int | None = None, seed: int = 0, **config: Any) -> nn.Module:
    """A model of ``family`` (a key of ``SPECS``) with random float32 weights, in eval mode.

    Args:
        family: Key of ``SPECS``.
        width: Model width; the family's smallest useful one when None.
        seed: Of the weights.
        config: Arguments of the diffusers class that replace the family's.
    """
    spec = SPECS[family]
    torch.manual_seed(seed)
    arguments = spec.config(width or spec.width) | config
    module = getattr(diffusers, spec.cls)(**arguments).to(torch.float32).eval()
    randomize(module, seed)
    if spec.cls == "ChromaTransformer2DModel":
        # ComfyUI always counts the last modulations as places 342 and 343, those of the full depth
        embed = module.time_text_embed
        full = type(embed)(num_channels=embed.mod_proj.shape[1] // 2, out_dim=344)
        embed.mod_proj[-2:] = full.mod_proj[-2:]
    return module


def example_inputs(family: str, module: nn.Module, seed: int = 0) -> Inputs:
    """Inputs for one forward pass, by ComfyUI's names and in its form."""
    torch.manual_seed(1000 + seed)
    return SPECS[family].inputs(module.config)


@torch.no_grad()
def forward(family: str, module: nn.Module, inputs: Inputs) -> Tensor:
    """One forward pass, in the form of ComfyUI's result."""
    given = {name: value.clone() for name, value in inputs.items()}
    return SPECS[family].run(module, given)


def save(family: str, folder: Path) -> None:
    """Write a model and one forward pass to ``folder``."""
    module = build(family)
    module.save_pretrained(folder)
    inputs = example_inputs(family, module)
    tensors = {f"in.{name}": value.contiguous() for name, value in inputs.items()}
    tensors["out"] = forward(family, module, inputs).contiguous()
    save_file(tensors, folder / "run.safetensors")


#: Published architectures: diffusers class and the arguments that differ from its defaults.
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "FLUX.1-dev": ("FluxTransformer2DModel", {"guidance_embeds": True}),
    "FLUX.1-schnell": ("FluxTransformer2DModel", {}),
    "FLUX.1-Fill-dev": (
        "FluxTransformer2DModel",
        {"guidance_embeds": True, "in_channels": 384, "out_channels": 64},
    ),
    "FLUX.1-Canny-dev": (
        "FluxTransformer2DModel",
        {"guidance_embeds": True, "in_channels": 128, "out_channels": 64},
    ),
    "FLUX.2-dev": ("Flux2Transformer2DModel", {}),
    "FLUX.2-klein-4B": (
        "Flux2Transformer2DModel",
        {
            "num_layers": 5,
            "num_single_layers": 20,
            "num_attention_heads": 24,
            "joint_attention_dim": 7680,
            "guidance_embeds": False,
        },
    ),
    "FLUX.2-klein-9B": (
        "Flux2Transformer2DModel",
        {
            "num_layers": 8,
            "num_single_layers": 24,
            "num_attention_heads": 32,
            "joint_attention_dim": 12288,
            "guidance_embeds": False,
        },
    ),
    "Chroma1-HD": ("ChromaTransformer2DModel", {}),
    "Qwen-Image": ("QwenImageTransformer2DModel", {}),
    "Qwen-Image-Edit-2511": ("QwenImageTransformer2DModel", {"zero_cond_t": True}),
    "Qwen-Image-Layered": (
        "QwenImageTransformer2DModel",
        {"use_additional_t_cond": True, "use_layer3d_rope": True},
    ),
    "Z-Image-Turbo": ("ZImageTransformer2DModel", {}),
    "Z-Image-Omni": ("ZImageTransformer2DModel", {"siglip_feat_dim": 1152}),
    "Lumina-Image-2.0": ("Lumina2Transformer2DModel", {"cap_feat_dim": 2304}),
    "Wan2.1-T2V-1.3B": (
        "WanTransformer3DModel",
        {"num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960},
    ),
    "Wan2.1-T2V-14B": ("WanTransformer3DModel", {}),
    "Wan2.1-I2V-14B": (
        "WanTransformer3DModel",
        {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120},
    ),
    "Wan2.1-FLF2V-14B": (
        "WanTransformer3DModel",
        {
            "in_channels": 36,
            "image_dim": 1280,
            "added_kv_proj_dim": 5120,
            "pos_embed_seq_len": 514,
        },
    ),
    "Wan2.2-T2V-A14B": ("WanTransformer3DModel", {}),
    "Wan2.2-I2V-A14B": ("WanTransformer3DModel", {"in_channels": 36}),
    "Wan2.2-TI2V-5B": (
        "WanTransformer3DModel",
        {
            "in_channels": 48,
            "out_channels": 48,
            "num_attention_heads": 24,
            "num_layers": 30,
            "ffn_dim": 14336,
        },
    ),
    "stable-diffusion-3-medium": (
        "SD3Transformer2DModel",
        {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536}
        | {"pos_embed_max_size": 192},
    ),
    "stable-diffusion-3.5-medium": (
        "SD3Transformer2DModel",
        {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536}
        | {"pos_embed_max_size": 384, "qk_norm": "rms_norm"}
        | {"dual_attention_layers": tuple(range(13))},
    ),
    "stable-diffusion-3.5-large": (
        "SD3Transformer2DModel",
        {"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432}
        | {"pos_embed_max_size": 192, "qk_norm": "rms_norm"},
    ),
    "AuraFlow": ("AuraFlowTransformer2DModel", {}),
    "PixArt-XL-2-1024-MS": (
        "PixArtTransformer2DModel",
        {"caption_channels": 4096, "use_additional_conditions": True},
    ),
    "PixArt-Sigma-XL-2-1024-MS": (
        "PixArtTransformer2DModel",
        {"caption_channels": 4096, "use_additional_conditions": False},
    ),
    "stable-diffusion-xl-base-1.0": (
        "UNet2DConditionModel",
        sdxl_config(320, (1, 2, 10)) | {"cross_attention_dim": 2048},
    ),
    "stable-diffusion-xl-inpainting": (
        "UNet2DConditionModel",
        sdxl_config(320, (1, 2, 10)) | {"cross_attention_dim": 2048, "in_channels": 9},
    ),
    "SSD-1B": (
        "UNet2DConditionModel",
        sdxl_config(320, (1, 2, 4))
        | {
            "cross_attention_dim": 2048,
            "mid_block_type": "UNetMidBlock2D",
            "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
        },
    ),
    "stable-diffusion-v1-5": (
        "UNet2DConditionModel",
        {"cross_attention_dim": 768, "attention_head_dim": 8},
    ),
    "stable-diffusion-2-1": (
        "UNet2DConditionModel",
        {
            "cross_attention_dim": 1024,
            "attention_head_dim": [5, 10, 20, 20],
            "use_linear_projection": True,
        },
    ),
}


def publish(folder: Path) -> None:
    """Write ``folder/NAME.json`` for every published architecture."""
    for name, (cls, config) in PUBLISHED.items():
        with torch.device("meta"):
            module = getattr(diffusers, cls)(**config)
        shapes = {key: list(value.shape) for key, value in module.state_dict().items()}
        told = json.loads(module.to_json_string())
        text = json.dumps({"config": told, "shapes": shapes})
        (folder / f"{name}.json").write_text(text, encoding="utf-8")


def main(out: str, what: str, *names: str) -> None:
    torch.set_num_threads(2)
    folder = Path(out)
    if what == "published":
        publish(folder)
        return
    for name in names:
        save(name, folder / name)


if __name__ == "__main__":
    main(*sys.argv[1:])
