"""Running ComfyUI's model classes on the oracle's inputs."""

from __future__ import annotations

import torch

__all__ = ["comfy_forward", "run_inputs"]


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
