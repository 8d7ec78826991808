"""AuraFlow (and Pony v7), diffusers names, by ComfyUI's own map (``auraflow_to_diffusers``)."""

from __future__ import annotations

from collections.abc import Mapping

from ..host import maps
from .base import Shapes
from .mapped import MappedFamily, count

__all__ = ["AuraFlow"]


class AuraFlow(MappedFamily):
    """AuraFlow transformers."""

    name = "auraflow"
    display = "AuraFlow"
    classes = ("AuraFlowTransformer2DModel",)
    signature = (
        "register_tokens",
        "time_step_proj.linear_1.weight",
        "joint_transformer_blocks.0.attn.add_k_proj.weight",
    )

    def _table(self, keys: set[str], shapes: Shapes) -> Mapping[str, maps.Target]:
        double = count(keys, "joint_transformer_blocks.")
        single = count(keys, "single_transformer_blocks.")
        config = {"n_double_layers": double, "n_layers": double + single}
        return maps.native_names("auraflow", config)
