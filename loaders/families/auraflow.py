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
        return self._told(
            count(keys, "joint_transformer_blocks."), count(keys, "single_transformer_blocks.")
        )

    def native_table(self, natives: Mapping[str, tuple[int, ...]]) -> Mapping[str, maps.Target]:
        keys = set(natives)
        if "register_tokens" not in keys:
            return {}
        return self._told(count(keys, "double_layers."), count(keys, "single_layers."))

    def _told(self, double: int, single: int) -> Mapping[str, maps.Target]:
        config = {"n_double_layers": double, "n_layers": double + single}
        return maps.native_names("auraflow", config)
