"""ComfyUI's own single file: its names, its markers, and this pack's marker where it has none.

A layer that one of ComfyUI's formats can hold exactly is stored in that format and opens in any
ComfyUI. Every other one is stored as this pack's MODELs are saved (:mod:`..schemes.lowbit`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch

from ..layouts import composite
from ..layouts.native_files import core_tensors
from .base import Container, Layer, Model

__all__ = ["Comfy"]


class Comfy(Container):
    """ComfyUI's names in one file.

    Args:
        formats: Which of ComfyUI's formats to use, and what they may have beside the weight; None
            for all.
    """

    name = "comfy"
    display = "ComfyUI, one file"
    style = "native"

    def __init__(self, formats: Mapping[str, Collection[str]] | None = None) -> None:
        self._formats = formats

    def tensors(self, layer: Layer, model: Model) -> dict[str, torch.Tensor]:
        made = None
        # Convolutions and embeddings of these formats are dropped or misread by ComfyUI.
        if len(layer.parts) == 1 and layer.parts[0].recipe.kind == "linear":
            (part,) = layer.parts
            rounded = bool(part.recipe.matmul)
            made = core_tensors(part.weight, rounded=rounded, formats=self._formats)
        if made is None:
            made = _own(layer, model.dtype)
        stored = {f"{layer.name}.{suffix}": tensor for suffix, tensor in made.items()}
        if layer.bias is not None:
            stored[f"{layer.name}.bias"] = layer.bias
        return stored


def _own(layer: Layer, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The layer as this pack saves it."""
    parts = [(layer.name, part.weight, _wish(part.recipe.matmul)) for part in layer.parts]
    weight = composite.build(parts, dtype, axis=1 if len(parts) > 1 else 0)
    made = weight.state_dict("weight")
    return {**made, "comfy_quant": composite.marker(weight._params.spec)}


def _wish(matmul: str) -> str | None:
    """A recipe's product as layers wish for it."""
    return {"": None, "float8_e4m3fn": "fp8", "float16": "fp16"}.get(matmul, matmul)
