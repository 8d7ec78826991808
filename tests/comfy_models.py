"""Building ComfyUI's model classes, and running them on the oracle's inputs."""

from __future__ import annotations

import torch

__all__ = ["build_small", "comfy_forward", "run_inputs"]


def run_inputs(run):
    """The inputs of a stored forward pass (``in.*``) without their prefix."""
    return {key.removeprefix("in."): value for key, value in run.items() if key.startswith("in.")}


def comfy_forward(family, model, given):
    """One pass of ComfyUI's model on the oracle's inputs."""
    given = {name: value.clone() for name, value in given.items()}
    x, timestep, context = given.pop("x"), given.pop("timestep"), given.pop("context")
    if family == "chroma":
        given["guidance"] = torch.zeros(1)
    if "reference" in given:
        given["ref_latents"] = [given.pop("reference")]
    if family in ("z_image", "lumina2"):
        given["num_tokens"] = context.shape[1]
    if "pooled" in given:
        # ComfyUI's SDXL puts the pooled text and the embedded sizes together outside the model
        from comfy.ldm.modules.diffusionmodules.util import timestep_embedding

        sizes = timestep_embedding(given.pop("time_ids").flatten(), 256).flatten()[None]
        given["y"] = torch.cat([given.pop("pooled"), sizes], dim=1)
    with torch.no_grad():
        return model(x, timestep, context=context, transformer_options={}, **given)


def build_small(family, config, native, operations):
    """ComfyUI's class at a width that its detection would not take, filled.

    Args:
        family: The family's name.
        config: config.json of the float model.
        native: Tensors under ComfyUI's names.
        operations: What its layers are made of.
    """
    from comfy import model_detection
    from comfy.ldm.aura.mmdit import MMDiT
    from comfy.ldm.chroma.model import Chroma
    from comfy.ldm.lumina.model import NextDiT
    from comfy.ldm.modules.diffusionmodules.mmdit import TimestepEmbedder
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
    from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel

    found = model_detection.detect_unet_config(dict(native), "")
    heads = config.get("num_attention_heads")
    if family == "chroma":
        cls = Chroma
        found |= {
            "hidden_dim": config["approximator_hidden_dim"],
            "out_dim": found["hidden_size"],
            "n_layers": config["approximator_layers"],
        }
    elif family == "qwen_image":
        cls = QwenImageTransformer2DModel
        found |= {
            "num_attention_heads": heads,
            "joint_attention_dim": config["joint_attention_dim"],
        }
    elif family == "z_image":
        cls = NextDiT
        found |= {
            "n_heads": config["n_heads"],
            "n_kv_heads": config["n_kv_heads"],
            "axes_dims": config["axes_dims"],
            "rope_theta": config["rope_theta"],
            "ffn_dim_multiplier": 8 / 3,
            "z_image_modulation": True,
            "time_scale": 1000.0,
            "pad_tokens_multiple": 32,
            "multiple_of": 1,
        }
    elif family == "lumina2":
        cls = NextDiT
        found |= {
            "n_heads": heads,
            "n_kv_heads": config["num_kv_heads"],
            "axes_dims": config["axes_dim_rope"],
            "ffn_dim_multiplier": 4.0,
        }
    elif family == "auraflow":
        cls = MMDiT
        width = native["init_x_linear.weight"].shape[0]
        found |= {"dim": width, "global_conddim": width, "n_heads": heads}
    else:
        cls = UNetModel
        xl = config.get("addition_embed_type") == "text_time"
        found |= {"num_head_channels": 64} if xl else {"num_heads": 8}
    model = cls(**found, dtype=torch.float32, device="cpu", operations=operations)
    if family == "z_image":
        # ComfyUI makes this layer no wider than the model, diffusers always 1024
        model.t_embedder = TimestepEmbedder(
            1024, output_size=256, dtype=torch.float32, operations=operations
        )
    model.load_state_dict(native, strict=True)
    return model.eval()
