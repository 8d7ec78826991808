"""Compare Two Models."""

from __future__ import annotations

import comfy.samplers
from comfy_api.latest import io, ui

from ..loaders.host.compare import Sampling, compare
from .inspect import Report

__all__ = ["LowBitCompare"]


class LowBitCompare(io.ComfyNode):
    """Samples two MODELs with the same seed and conditioning, and tells how far apart they are."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LowBitCompare",
            display_name="Compare Two Models",
            category="LowBit/reports",
            description=(
                "Samples two models from the same noise with the same prompt, and tells how far "
                "the second is from the first at every step and in the result, with the size and "
                "the pace of each. For what quantizing a model costs: the original is A, the "
                "low-bit one B."
            ),
            search_aliases=["compare models", "quality", "psnr", "difference", "benchmark"],
            inputs=[
                io.Model.Input("model_a", tooltip="What the other is compared with."),
                io.Model.Input("model_b", tooltip="The other MODEL."),
                io.Conditioning.Input("positive", tooltip="The prompt, for both."),
                io.Conditioning.Input("negative", tooltip="What to avoid, for both."),
                io.Latent.Input("latent_image", tooltip="The latent that both begin from."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="Of the noise, the same for both.",
                ),
                io.Int.Input("steps", default=8, min=1, max=10000, tooltip="Steps of each."),
                io.Float.Input(
                    "cfg",
                    default=1.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip="Guidance scale; 1 samples without the negative prompt.",
                ),
                io.Combo.Input(
                    "sampler_name",
                    options=comfy.samplers.KSampler.SAMPLERS,
                    tooltip=(
                        "The sampler of both. One that draws new noise at every step draws the "
                        "same for both."
                    ),
                ),
                io.Combo.Input(
                    "scheduler",
                    options=comfy.samplers.KSampler.SCHEDULERS,
                    tooltip="How the noise goes down.",
                ),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    optional=True,
                    tooltip="Share of the noise; below 1 keeps some of latent_image.",
                ),
                io.Vae.Input(
                    "vae",
                    optional=True,
                    tooltip=(
                        "Decodes both results, for a picture of them side by side and their PSNR. "
                        "Without one, the difference of the latents is shown."
                    ),
                ),
                io.Float.Input(
                    "gain",
                    default=8.0,
                    min=0.1,
                    max=1000.0,
                    step=0.1,
                    optional=True,
                    advanced=True,
                    tooltip="How many times as large differences are shown in the picture.",
                ),
            ],
            outputs=[
                Report.Output(tooltip="The figures, for Show Report and other LowBit nodes."),
                io.Image.Output(
                    display_name="difference",
                    tooltip=(
                        "With a VAE: A, B and their difference side by side. Without: the "
                        "difference of the latents."
                    ),
                ),
                io.String.Output(display_name="text", tooltip="The figures for people."),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        model_a,
        model_b,
        positive,
        negative,
        latent_image,
        seed: int,
        steps: int,
        cfg: float,
        sampler_name: str,
        scheduler: str,
        denoise: float = 1.0,
        vae=None,
        gain: float = 8.0,
    ) -> io.NodeOutput:
        """Sample both and tell."""
        how = Sampling(
            seed, steps, cfg, sampler_name, scheduler, positive, negative, latent_image, denoise
        )
        report, picture = compare(model_a, model_b, how, vae, gain)
        return io.NodeOutput(report, picture, report.text, ui=ui.PreviewText(report.text))
