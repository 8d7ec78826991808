"""Quantize Model, and Quantize File."""

from __future__ import annotations

from pathlib import Path

import comfy.model_management
import comfy.samplers
import folder_paths
from comfy_api.latest import io, ui

from ..loaders.float_model import FileFloats
from ..loaders.host.api import hollow_model, native_shapes
from ..loaders.host.compare import Sampling
from ..loaders.host.rebuild import kinds_of, quantize_model
from ..loaders.layouts.dispatch import MATMUL_MODES
from ..loaders.plan import make_plan
from ..loaders.quantize_chart import quantize_chart
from ..loaders.quantize_file import prepare
from ..loaders.writers import CONTAINERS
from ..quant.errors import LowBitError
from ..quant.report import QuantizeReport
from .checkpoints import diffusion_models, fingerprint, path_of
from .images import image_of
from .inspect import Report
from .progress import NodeProgress
from .recipes import RecipeType

__all__ = [
    "LowBitQuantize",
    "LowBitQuantizeFile",
    "container_input",
    "measuring_inputs",
    "prefix_input",
    "sampling_of",
    "seed_input",
    "target_of",
    "written",
]

SEEDS = 2**63 - 1


def seed_input() -> io.Input:
    """Low-rank methods and stochastic rounding draw numbers."""
    return io.Int.Input(
        "seed",
        default=0,
        min=0,
        max=SEEDS,
        optional=True,
        advanced=True,
        tooltip="Of low-rank branches and stochastic rounding: the same seed, the same weights.",
    )


def measuring_inputs() -> list[io.Input]:
    """What a model is run with to measure activations."""
    return [
        io.Conditioning.Input(
            "positive",
            optional=True,
            tooltip=(
                "A prompt, for recipes that need measured activations (static activations, "
                "activation_weighted, error_feedback). With a latent, the model samples a few "
                "steps before it is quantized. Combine several prompts for a better measure."
            ),
        ),
        io.Latent.Input("latent", optional=True, tooltip="What those steps begin from."),
        io.Int.Input(
            "steps",
            default=4,
            min=1,
            max=100,
            optional=True,
            advanced=True,
            tooltip="How many steps to measure activations in.",
        ),
    ]


def sampling_of(positive, latent, steps: int, seed: int) -> Sampling | None:
    """The steps to measure in; None where none are wanted.

    Raises:
        LowBitError: One of prompt and latent is missing.
    """
    if positive is None and latent is None:
        return None
    if positive is None or latent is None:
        raise LowBitError(
            "Measuring activations takes a prompt and a latent.",
            found="a latent alone" if positive is None else "a prompt alone",
            expected="both, or none",
            remedy="Connect the other one, too.",
        )
    scheduler = comfy.samplers.KSampler.SCHEDULERS[0]
    return Sampling(seed, steps, 1.0, "euler", scheduler, positive, positive, latent)


def container_input() -> io.Input:
    """How a quantized model is stored."""
    return io.Combo.Input(
        "container",
        options=list(CONTAINERS),
        default="comfy",
        tooltip=(
            "comfy: one file with ComfyUI's names; layers in one of its own formats open without "
            "this pack, all others with it. sdnq: a diffusers folder for the sdnq package. "
            "nunchaku: one file for Nunchaku. modelopt: a diffusers folder as NVIDIA ModelOpt "
            "exports it. A recipe that a container cannot hold is an error before any work."
        ),
    )


def prefix_input() -> io.Input:
    """Where it is stored."""
    return io.String.Input(
        "filename_prefix",
        default="diffusion_models/quantized",
        tooltip=(
            "Name under ComfyUI's output folder; a number follows, and nothing is ever written "
            "over. Loaders list what lies under output/diffusion_models."
        ),
    )


def target_of(prefix: str, container: str) -> Path:
    """An unused name in the output folder."""
    folder, name, counter, _, _ = folder_paths.get_save_image_path(
        prefix, folder_paths.get_output_directory()
    )
    suffix = "" if CONTAINERS[container].stem else ".safetensors"
    return Path(folder) / f"{name}_{counter:05}_{suffix}"


class LowBitQuantize(io.ComfyNode):
    """A MODEL with low-bit weights, from any other."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LowBitQuantize",
            display_name="Quantize Model",
            category="LowBit/quantize",
            description=(
                "Quantizes a MODEL in the graph, layer by layer, without calibration. The source "
                "stays as it is; LoRAs, options and hooks on it come along. Save Quantized Model "
                "writes the result."
            ),
            search_aliases=["quantize", "compress model", "int4", "int8", "fp8", "nvfp4", "sdnq"],
            inputs=[
                io.Model.Input("model", tooltip="Any MODEL; a quantized one is dequantized first."),
                RecipeType.Input("recipe", tooltip="How: a Quantization Recipe."),
                io.Boolean.Input(
                    "bake_patches",
                    default=False,
                    tooltip=(
                        "LoRAs and other patches on the MODEL. off: they stay patches on the "
                        "quantized one, applied exactly, and can still be changed. on: they are "
                        "part of the weights before these are quantized."
                    ),
                ),
                io.Combo.Input(
                    "matmul",
                    options=list(MATMUL_MODES),
                    default="auto",
                    optional=True,
                    advanced=True,
                    tooltip="How Linear layers multiply, as in Load Quantized Diffusion Model.",
                ),
                seed_input(),
                *measuring_inputs(),
            ],
            outputs=[
                io.Model.Output(tooltip="The quantized MODEL."),
                Report.Output(tooltip="What it cost, layer by layer; for Show Report."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model,
        recipe,
        bake_patches: bool,
        matmul: str = "auto",
        seed: int = 0,
        positive=None,
        latent=None,
        steps: int = 4,
    ) -> io.NodeOutput:
        """Quantize it."""
        made, report = quantize_model(
            model,
            recipe,
            bake=bake_patches,
            matmul=matmul,
            seed=seed,
            sampling=sampling_of(positive, latent, steps, seed),
            progress=NodeProgress(cls.hidden.unique_id),
        )
        return io.NodeOutput(made, report, ui=ui.PreviewText(report.text))


class LowBitQuantizeFile(io.ComfyNode):
    """A quantized file, from another one, without loading a model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LowBitQuantizeFile",
            display_name="Quantize File",
            category="LowBit/quantize",
            description=(
                "Quantizes a checkpoint on disk to another one, layer by layer: memory stays of "
                "the order of the largest layer, whatever the model's size. A file that is "
                "quantized already is dequantized first. A report lies beside the result."
            ),
            search_aliases=["quantize", "convert checkpoint", "compress file", "export model"],
            inputs=[
                io.Combo.Input(
                    "model",
                    options=diffusion_models(),
                    tooltip=(
                        "A file or a checkpoint folder under models/diffusion_models or "
                        "models/diffusers."
                    ),
                ),
                RecipeType.Input("recipe", tooltip="How: a Quantization Recipe."),
                prefix_input(),
                container_input(),
                io.Boolean.Input(
                    "dry_run",
                    default=False,
                    tooltip="Tell the sizes, and write nothing.",
                ),
                seed_input(),
            ],
            outputs=[
                io.String.Output(
                    display_name="path", tooltip="The file or folder; empty after a dry run."
                ),
                Report.Output(tooltip="What it cost, layer by layer; for Show Report."),
                io.Image.Output(display_name="chart", tooltip="The report as a picture."),
            ],
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, model: str, **_: object) -> str:
        """Works again when the file was replaced."""
        try:
            return fingerprint(model)
        except LowBitError as error:
            return str(error)

    @classmethod
    def execute(
        cls,
        model: str,
        recipe,
        filename_prefix: str,
        container: str,
        dry_run: bool,
        seed: int = 0,
    ) -> io.NodeOutput:
        """Plan, and write."""
        plan = make_plan(path_of(model), native_shapes=native_shapes)
        try:
            source = FileFloats(plan)
            hollow = hollow_model(source.shapes)
            kinds, stuck = ({}, {}) if hollow is None else kinds_of(hollow.diffusion_model)
            job = prepare(
                source, recipe, CONTAINERS[container], config=plan.config, kinds=kinds, stuck=stuck
            )
            if dry_run:
                target, report = None, job.estimate()
            else:
                target = target_of(filename_prefix, container)
                device = comfy.model_management.get_torch_device()
                progress = NodeProgress(cls.hidden.unique_id)
                report = job.run(target, device=device, seed=seed, progress=progress)
        finally:
            plan.source.close()
        return written(target, report)


def written(target: Path | None, report: QuantizeReport) -> io.NodeOutput:
    """Outputs of a node that writes."""
    report.chart = quantize_chart(report)
    text = report.text if target is None else f"{target}\n\n{report.text}"
    path = "" if target is None else str(target)
    return io.NodeOutput(path, report, image_of(report.chart), ui=ui.PreviewText(text))
