"""The pack's nodes (ComfyUI V3 schema). No tensor maths and no file parsing here."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .compare import LowBitCompare
from .inspect import LowBitInspect
from .load import LowBitLoadDiffusionModel
from .lora import LowBitLoRAOptions
from .offload import LowBitOffload
from .quantize import LowBitQuantize, LowBitQuantizeFile
from .recipes import RECIPES
from .report import LowBitModelReport, LowBitShowReport
from .save import LowBitSave

__all__ = ["LowBitExtension"]


class LowBitExtension(ComfyExtension):
    """Lists the nodes of this pack for ComfyUI."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """Every node class."""
        return [
            LowBitLoadDiffusionModel,
            LowBitInspect,
            LowBitLoRAOptions,
            LowBitOffload,
            LowBitModelReport,
            LowBitShowReport,
            LowBitCompare,
            *RECIPES,
            LowBitQuantize,
            LowBitQuantizeFile,
            LowBitSave,
        ]
