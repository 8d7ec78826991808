"""Save Quantized Model."""

from __future__ import annotations

from comfy_api.latest import io, ui

from ..loaders.charts import Chart
from ..loaders.host.loaded import report_on
from ..loaders.host.saving import save_model
from .images import image_of
from .inspect import Report
from .progress import NodeProgress
from .quantize import (
    container_input,
    measuring_inputs,
    prefix_input,
    sampling_of,
    seed_input,
    target_of,
    written,
)
from .recipes import RecipeType

__all__ = ["LowBitSave"]


class LowBitSave(io.ComfyNode):
    """Writes a MODEL with its patches baked in."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LowBitSave",
            display_name="Save Quantized Model",
            category="LowBit/quantize",
            description=(
                "Writes a MODEL, LoRAs baked in, with a report beside it. A low-bit MODEL is "
                "written as it is, without rounding anything once more; a float MODEL with a "
                "recipe is quantized while it is written, to any container."
            ),
            search_aliases=["save quantized", "export", "save model", "modelopt", "nunchaku"],
            inputs=[
                io.Model.Input("model", tooltip="A low-bit MODEL, or a float one with a recipe."),
                prefix_input(),
                container_input(),
                RecipeType.Input(
                    "recipe",
                    optional=True,
                    tooltip="Quantizes a float MODEL while it is written. Leave it away for a "
                    "MODEL that is low-bit already.",
                ),
                io.Boolean.Input(
                    "requantize",
                    default=False,
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "Round weights that are low-bit already once more, by the recipe, or by "
                        "the one that Quantize Model had. Off: an error says what would do it "
                        "exactly."
                    ),
                ),
                seed_input(),
                *measuring_inputs(),
            ],
            outputs=[
                io.String.Output(display_name="path", tooltip="The file or folder."),
                Report.Output(tooltip="What it cost, layer by layer; for Show Report."),
                io.Image.Output(display_name="chart", tooltip="The report as a picture."),
            ],
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model,
        filename_prefix: str,
        container: str,
        recipe=None,
        requantize: bool = False,
        seed: int = 0,
        positive=None,
        latent=None,
        steps: int = 4,
    ) -> io.NodeOutput:
        """Write it."""
        target = target_of(filename_prefix, container)
        report = save_model(
            model,
            target,
            container,
            recipe=recipe,
            requantize=requantize,
            seed=seed,
            sampling=sampling_of(positive, latent, steps, seed),
            progress=NodeProgress(cls.hidden.unique_id),
        )
        if report is not None:
            return written(target, report)
        # A MODEL that was low-bit when it was loaded: what quantizing it cost is not known.
        told = report_on(model)
        picture = image_of(told.chart or Chart("This report has no chart", ()))
        text = f"{target}\n\n{told.text}"
        return io.NodeOutput(str(target), told, picture, ui=ui.PreviewText(text))
