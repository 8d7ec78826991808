"""What a container is to the writing of a model: names, what it can hold, and its tensors.

A *container* is one way of putting a quantized model on disk. It gets logical layers under its own
names, one at a time, and gives the tensors that are stored; when all are there it says what stands
beside them. The job (:mod:`..quantize_file`) reads, quantizes and writes; a container does neither.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ...quant.errors import LowBitError
from ...quant.recipe import LayerRecipe, Recipe
from ...quant.weight import QuantizedWeight

__all__ = ["Container", "Layer", "Model", "Part", "refused"]


@dataclass(frozen=True)
class Part:
    """Columns of a layer that were quantized by themselves; a whole layer is one part."""

    weight: QuantizedWeight
    recipe: LayerRecipe


@dataclass(frozen=True)
class Layer:
    """One quantized layer, ready to be stored.

    Attributes:
        name: Module, as the container names it.
        native: Modules of ComfyUI's model that it is of, the first of several counting.
        parts: Side by side along the columns.
        bias: Of the float layer, None where it has none.
    """

    name: str
    native: tuple[str, ...]
    parts: tuple[Part, ...]
    bias: torch.Tensor | None


@dataclass(frozen=True)
class Model:
    """What a container is told of the whole model.

    Attributes:
        recipe: That it was quantized with.
        family: Short name of the family of names, "" where it is not known.
        class_name: Of diffusers' class, "" where it is not known.
        config: diffusers' config.json; empty where there was none.
        shapes: ``{native key: shape}``.
        stored: ``{key: shape}`` as floats, in the container's names.
        quantized: ``{module: recipe of each part}``, in the container's names.
        natives: ``{module: native modules}`` of those.
        kept: ``{module: reason}`` of modules that could have been quantized, likewise.
        dtype: Of most float tensors.
    """

    recipe: Recipe
    family: str
    class_name: str
    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    stored: Mapping[str, tuple[int, ...]]
    quantized: Mapping[str, Sequence[LayerRecipe]] = field(default_factory=dict)
    natives: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    kept: Mapping[str, str] = field(default_factory=dict)
    dtype: torch.dtype = torch.bfloat16


class Container(ABC):
    """One way of storing a quantized model.

    Attributes:
        name: As nodes and the terminal spell it.
        display: For people.
        style: Whose names the tensors have: "native", or a style of :mod:`..families.reverse`.
        stem: Of the weight files where the target is a folder; "" where it is one file.
        half: Float tensors of 32 bits are rounded to 16 before all else: its readers want that.
    """

    name: str
    display: str
    style: str
    stem: str = ""
    half: bool = False

    def check(self, model: Model) -> None:
        """Raise before any work where a model cannot be stored so.

        Raises:
            LowBitError: Names the layer and what the container can hold.
        """
        for name, recipes in model.quantized.items():
            for recipe in recipes:
                why = self.why_not(recipe)
                if why is not None:
                    raise refused(self, name, *why)

    def why_not(self, recipe: LayerRecipe) -> tuple[str, str] | None:
        """What a layer has that the container cannot hold, and what it can; None where it can."""
        return None

    def together(self, names: Iterable[str], model: Model) -> list[tuple[str, ...]]:
        """Groups of quantized modules whose scales are to span the same largest value."""
        return []

    @abstractmethod
    def tensors(self, layer: Layer, model: Model) -> dict[str, torch.Tensor]:
        """The stored tensors of a layer, its bias among them, under their full names."""

    def plain(self, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """The stored tensors of one that was not quantized."""
        return {name: tensor}

    def metadata(self, model: Model) -> dict[str, str]:
        """What the header of the weights says."""
        return {}

    def files(self, model: Model) -> dict[str, Any]:
        """JSON files that stand beside the weights of a folder."""
        return {}


def refused(container: Container, layer: str, found: str, expected: str) -> LowBitError:
    """The error of a layer that a container cannot hold."""
    return LowBitError(
        f"The container {container.name} cannot hold this layer.",
        layer=layer,
        found=found,
        expected=expected,
        remedy='Change the recipe, keep the layer, or choose the container "comfy", which holds '
        "every layer.",
    )
