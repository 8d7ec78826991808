"""What a scheme gives: the logical tensors of a checkpoint, told from headers alone.

A *scheme* is one way of writing quantized weights to disk. It turns a :class:`~..source.Source`
into :class:`Contents`: an :class:`Entry` for every logical tensor (``X.weight``, ``X.bias``, free
parameters), whatever number of stored tensors each is made of. Nothing is read before
:meth:`Entry.read`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from ...kernels.spec import WeightSpec
from ...quant.weight import QuantizedWeight

__all__ = ["Contents", "Entry", "SchemeOptions", "ShapeOf"]

ShapeOf = Callable[[str], tuple[int, ...] | None]
"""Shape that the model's architecture gives a logical key; None where it is not known."""


@dataclass(frozen=True)
class SchemeOptions:
    """The loader's inputs that one scheme or another reads; the others leave them alone.

    Attributes:
        svdq_precision: "auto", "int4" or "nvfp4": what W4A4 layers must be.
        svdq_rank: The rank that low-rank branches must have; 0 for any.
        act_unsigned: "auto", "on" or "off": whether second MLP layers of int4 files have
            activations that are shifted and rounded to 0..15, which files seldom say.
        nvfp4_layout: "auto", or how the bytes of NVFP4 layers are ordered where a file of plain
            scales does not say: a name in LAYOUTS of :mod:`.modelopt_nvfp4`.
    """

    svdq_precision: str = "auto"
    svdq_rank: int = 0
    act_unsigned: str = "auto"
    nvfp4_layout: str = "auto"


@dataclass(frozen=True)
class Entry:
    """One logical tensor of the checkpoint.

    Attributes:
        key: Logical name, as the file spells the module plus ``.weight`` or ``.bias``.
        shape: Logical shape, None where only the architecture tells it.
        dtype: Stored dtype of the (main) tensor, safetensors' spelling.
        stored: Names of the stored tensors that it is made of.
        nbytes: Their bytes together.
        parts: ``(spec, wish)`` of each part of a quantized weight, one but for saved fused layers;
            empty for a plain tensor. The wish is the matmul that the file asks for ("int8",
            "fp8" ...), None for weight-only.
        notes: What had to be decided and by which evidence.
        doubtful: The tensors fit another shape too (of as many elements, or of fewer where they may
            be padded); the architecture decides.
        read: Gives the tensor, memory-mapped, or the weight in normal form.
    """

    key: str
    shape: tuple[int, ...] | None
    dtype: str
    stored: tuple[str, ...]
    nbytes: int
    parts: tuple[tuple[WeightSpec, str | None], ...] = ()
    notes: tuple[str, ...] = ()
    doubtful: bool = False
    read: Callable[[], torch.Tensor | QuantizedWeight] = field(repr=False, default=None)

    @property
    def spec(self) -> WeightSpec | None:
        """Spec of a weight of one part."""
        return self.parts[0][0] if len(self.parts) == 1 else None

    @property
    def wish(self) -> str | None:
        """Wish of a weight of one part."""
        return self.parts[0][1] if len(self.parts) == 1 else None


@dataclass(frozen=True)
class Contents:
    """All logical tensors, and the stored ones left out with the reason why.

    Attributes:
        entries: ``{logical key: Entry}``.
        ignored: ``{stored name: reason}``.
        facts: What a report tells of the file as a whole, ``{label: text}``.
    """

    entries: Mapping[str, Entry]
    ignored: Mapping[str, str] = field(default_factory=dict)
    facts: Mapping[str, str] = field(default_factory=dict)
