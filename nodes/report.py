"""Report on Model, and Show Report."""

from __future__ import annotations

import json
import os

import folder_paths
from comfy_api.latest import io, ui

from ..loaders.charts import Chart
from ..loaders.host.loaded import report_on
from .images import image_of
from .inspect import Report

__all__ = ["LowBitModelReport", "LowBitShowReport"]

NO_LORA = "none"


class LowBitModelReport(io.ComfyNode):
    """What a MODEL is made of, what it runs on here, and what became of its LoRAs."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LowBitModelReport",
            display_name="Report on Model",
            category="LowBit/reports",
            description=(
                "Tells of a MODEL: formats and sizes, which kernel each kind of layer runs and "
                "why no faster one, what is resident and what streams, what was fused or handed "
                "over to ComfyUI, and how each LoRA on it is carried. Place it after a sampler's "
                "model to see what the run took. Works on any MODEL."
            ),
            search_aliases=["model info", "lora info", "memory info", "kernels", "vram"],
            inputs=[
                io.Model.Input("model", tooltip="Any MODEL, with whatever was patched onto it."),
                io.Combo.Input(
                    "lora",
                    options=[NO_LORA, *folder_paths.get_filename_list("loras")],
                    default=NO_LORA,
                    optional=True,
                    tooltip=(
                        "A LoRA file to compare with this MODEL: which of its tensors are used, "
                        "which name no layer of it, and the nearest names that it has. Only the "
                        "file's header is read, and nothing is applied."
                    ),
                ),
                io.AnyType.Input(
                    "after",
                    optional=True,
                    tooltip=(
                        "Connect the output of a sampler to report after it ran: its memory and "
                        "time are then told as measured."
                    ),
                ),
            ],
            outputs=[
                Report.Output(tooltip="The facts, for other LowBit nodes."),
                io.String.Output(display_name="text", tooltip="The same for people."),
                io.Image.Output(display_name="chart", tooltip="The same as a picture."),
            ],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, lora: str = NO_LORA, **_: object) -> str:
        """Reads the LoRA file again when it was replaced."""
        path = None if lora == NO_LORA else folder_paths.get_full_path("loras", lora)
        if path is None:
            return lora
        status = os.stat(path)
        return f"{path} {status.st_mtime_ns} {status.st_size}"

    @classmethod
    def execute(cls, model, lora: str = NO_LORA, after=None) -> io.NodeOutput:
        """Read the MODEL and tell."""
        path = None if lora == NO_LORA else folder_paths.get_full_path_or_raise("loras", lora)
        report = report_on(model, path)
        picture = image_of(report.chart)
        return io.NodeOutput(report, report.text, picture, ui=ui.PreviewText(report.text))


class LowBitShowReport(io.ComfyNode):
    """A report of another node as text and picture."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LowBitShowReport",
            display_name="Show Report",
            category="LowBit/reports",
            description=(
                "Shows a report of another LowBit node: its text on this node, and its chart as "
                "an image."
            ),
            search_aliases=["show report", "preview report", "quantization report"],
            inputs=[
                Report.Input("report", tooltip="The report output of another LowBit node."),
                io.Combo.Input(
                    "show",
                    options=["text", "json"],
                    default="text",
                    optional=True,
                    tooltip=(
                        "text: for people. json: every value of the report, for other programs."
                    ),
                ),
                io.Int.Input(
                    "width",
                    default=1024,
                    min=512,
                    max=4096,
                    step=64,
                    optional=True,
                    advanced=True,
                    tooltip="Width of the chart in pixels; its height follows from what is in it.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="text", tooltip="The report as text."),
                io.Image.Output(display_name="chart", tooltip="The report as a picture."),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, report, show: str = "text", width: int = 1024) -> io.NodeOutput:
        """Show it."""
        text = report.text if show == "text" else json.dumps(report.to_json(), indent=2)
        chart = report.chart or Chart("This report has no chart", ())
        return io.NodeOutput(text, image_of(chart, width), ui=ui.PreviewText(text))
