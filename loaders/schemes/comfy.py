"""Plain tensors: unquantized checkpoints, and those in ComfyUI's own quantized formats.

Every stored tensor is a logical tensor of its own. ComfyUI's own formats (``comfy_quant`` markers,
``_quantization_metadata``, ``scaled_fp8``) are not looked into: they go to ComfyUI untouched.
"""

from __future__ import annotations

from functools import partial

from ..source import Source
from .base import Contents, Entry, ShapeOf

__all__ = ["read"]


def read(source: Source, shape_of: ShapeOf | None = None) -> Contents:
    """Every stored tensor as it is."""
    entries = {
        name: Entry(
            key=name,
            shape=tuple(info.shape),
            dtype=info.dtype,
            stored=(name,),
            nbytes=info.nbytes,
            read=partial(source.get, name),
        )
        for name, info in source.tensors.items()
    }
    return Contents(entries)
