"""Inspect Checkpoint."""

from __future__ import annotations

from comfy_api.latest import io, ui

from ..loaders.host.api import hollow_model, native_shapes
from ..loaders.host.devices import device_facts
from ..loaders.host.memory import activations_of
from ..loaders.layouts.dispatch import MATMUL_MODES
from ..loaders.plan import make_plan
from ..loaders.report import inspect
from ..loaders.schemes.base import SchemeOptions
from ..quant.errors import LowBitError
from .checkpoints import diffusion_models, fingerprint, path_of
from .images import image_of
from .inputs import scheme_inputs

__all__ = ["LowBitInspect", "Report"]

Report = io.Custom("LOWBIT_REPORT")


class LowBitInspect(io.ComfyNode):
    """What a checkpoint is and how it would run here, from its headers alone."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LowBitInspect",
            display_name="Inspect Checkpoint",
            category="LowBit/reports",
            description=(
                "Reads the headers of a checkpoint and tells its scheme, family, formats and "
                "sizes, which kernel each kind of layer would run on this device and why, and "
                "for each offload mode whether it fits, streams or is too big. Loads no weights."
            ),
            search_aliases=[
                "quantization info",
                "checkpoint info",
                "sdnq info",
                "svdquant info",
                "metadata",
            ],
            inputs=[
                io.Combo.Input(
                    "model",
                    options=diffusion_models(),
                    tooltip=(
                        "A file or a checkpoint folder under models/diffusion_models or "
                        "models/diffusers."
                    ),
                ),
                io.Combo.Input(
                    "matmul",
                    options=list(MATMUL_MODES),
                    default="auto",
                    optional=True,
                    advanced=True,
                    tooltip="The loader's matmul input that the kernels are told for.",
                ),
                *scheme_inputs(),
            ],
            outputs=[
                Report.Output(tooltip="The facts, for other LowBit nodes."),
                io.String.Output(display_name="text", tooltip="The same for people."),
                io.Image.Output(
                    display_name="chart", tooltip="Sizes by format and memory by offload mode."
                ),
            ],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, model: str, **_: str | int) -> str:
        """Reads again when the file was replaced."""
        try:
            return fingerprint(model)
        except LowBitError as error:
            return str(error)

    @classmethod
    def execute(
        cls,
        model: str,
        matmul: str = "auto",
        svdq_precision: str = "auto",
        svdq_rank: int = 0,
        act_unsigned: str = "auto",
        nvfp4_layout: str = "auto",
    ) -> io.NodeOutput:
        """Plan and tell."""
        options = SchemeOptions(svdq_precision, svdq_rank, act_unsigned, nvfp4_layout)
        plan = make_plan(path_of(model), options=options, native_shapes=native_shapes)
        try:
            shapes = {name: shape for name, (shape, _) in plan.native().items()}
            estimate = activations_of(hollow_model(shapes))
            report = inspect(plan, device_facts(), matmul, activations=estimate)
        finally:
            plan.source.close()
        return io.NodeOutput(
            report, report.text, image_of(report.chart), ui=ui.PreviewText(report.text)
        )
