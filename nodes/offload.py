"""Set Offload Mode."""

from __future__ import annotations

from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io, ui

from ..loaders.host.memory import explain, set_mode
from ..loaders.memory_plan import MODES

__all__ = ["LowBitOffload"]


class LowBitOffload(io.ComfyNode):
    """Chooses where the weights of a MODEL are while it runs."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LowBitOffload",
            display_name="Set Offload Mode",
            category="LowBit/memory",
            description=(
                "Chooses how much of a model stays in VRAM while it samples, and tells what each "
                "mode takes on this device. Uses ComfyUI's own memory management; a flag on its "
                "command line wins, and the text says so. The picture stays the same, bit for bit."
            ),
            search_aliases=["block swap", "low vram", "vram limit", "cpu offload", "streaming"],
            inputs=[
                io.Model.Input("model", tooltip="Any MODEL, low-bit or not."),
                io.Combo.Input(
                    "mode",
                    options=list(MODES),
                    default="auto",
                    tooltip=(
                        "auto: ComfyUI decides. resident: the whole model stays in VRAM. model: "
                        "the whole model is in VRAM while it samples and leaves it afterwards. "
                        "layerwise: some layers stay, the others stream from RAM. sequential: "
                        "every layer streams, which needs least VRAM and takes longest."
                    ),
                ),
                io.Float.Input(
                    "vram_budget_gb",
                    default=0.0,
                    min=0.0,
                    max=1024.0,
                    step=0.25,
                    tooltip=(
                        "layerwise only: GiB of VRAM for weights and the buffers that the others "
                        "stream through; activations come on top. 0: as blocks_on_gpu says."
                    ),
                ),
                io.Int.Input(
                    "blocks_on_gpu",
                    default=0,
                    min=0,
                    max=1000,
                    tooltip=(
                        "layerwise only: room for this many of the model's blocks, beside what "
                        "is in no block. ComfyUI chooses the layers that fill it. Where a budget "
                        "is set too, the smaller of both holds."
                    ),
                ),
            ],
            outputs=[io.Model.Output(tooltip="The same MODEL, with the mode.")],
        )

    @classmethod
    def execute(
        cls, model: ModelPatcher, mode: str, vram_budget_gb: float, blocks_on_gpu: int
    ) -> io.NodeOutput:
        """Set it and tell what it means."""
        patcher = set_mode(model, mode, vram_budget_gb, blocks_on_gpu)
        text = explain(patcher, vram_budget_gb, blocks_on_gpu)
        return io.NodeOutput(patcher, ui=ui.PreviewText(text))
