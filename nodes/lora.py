"""LoRA Options: how a low-bit MODEL carries adapters that are no plain LoRA."""

from __future__ import annotations

from comfy_api.latest import io

from ..loaders.host.carried import METHODS, Handling
from ..loaders.host.patches import with_handling

__all__ = ["LowBitLoRAOptions"]


class LowBitLoRAOptions(io.ComfyNode):
    """A MODEL whose LoHa, LoKr, DoRA … are carried as chosen."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LowBitLoRAOptions",
            display_name="LoRA Options (Low Bit)",
            category="LowBit/lora",
            description=(
                "LoRAs on a low-bit MODEL are exact without this node, and cost next to nothing. "
                "Other adapters (LoHa, LoKr, DoRA, OFT, full differences, merges) are exact too, "
                "but their change of each weight is calculated anew in every step. This node "
                "trades that for speed."
            ),
            search_aliases=["lora", "lokr", "loha", "dora", "oft", "svd", "low bit", "quantized"],
            inputs=[
                io.Model.Input("model", tooltip="A low-bit MODEL, before or after its LoRAs."),
                io.Combo.Input(
                    "other_adapters",
                    options=list(METHODS),
                    default="exact",
                    tooltip=(
                        "Adapters that are no plain LoRA. exact: calculated in every step, nothing "
                        "is lost. svd: the change of each weight is calculated once, and what has "
                        "the chosen rank of it runs as a LoRA; the report tells how much was kept."
                    ),
                ),
                io.Int.Input(
                    "rank",
                    default=Handling.rank,
                    min=1,
                    max=1024,
                    tooltip=(
                        "Rank that svd keeps of each change. More keeps more of it, and takes more "
                        "memory and time. Not used with exact."
                    ),
                ),
            ],
            outputs=[io.Model.Output(tooltip="The MODEL with this choice.")],
        )

    @classmethod
    def execute(cls, model, other_adapters: str, rank: int) -> io.NodeOutput:
        """A clone with the choice."""
        return io.NodeOutput(with_handling(model, Handling(other_adapters, rank)))
