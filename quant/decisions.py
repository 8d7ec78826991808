"""What a recipe decides on a layer, and the facts of a model's family that it decides by."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from ..kernels.spec import ActivationSpec

__all__ = ["NO_FACTS", "Decision", "Facts", "Kept", "LayerRecipe", "Split", "fitting", "matches"]


def matches(name: str, pattern: str) -> bool:
    """Whether a layer is meant by a pattern: itself, or something that it is below."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, pattern + ".*")


def fitting(name: str, table: Iterable[tuple[str, Any]], default: Any) -> Any:
    """What the last pattern that fits says."""
    found = [value for pattern, value in table if matches(name, pattern)]
    return found[-1] if found else default


@dataclass(frozen=True)
class Facts:
    """What a recipe has to know of a family of models, by patterns of its native names.

    Attributes:
        keep: (method or "*", patterns) of layers that its producers leave alone.
        modulation: (pattern, chunks) of layers that make shifts, scales and gates of a condition.
        behind_gelu: Layers whose inputs come out of a GELU.
        two_inputs: (pattern, whether the second input comes out of a GELU) of layers with two
            inputs side by side, the first as wide as the output; SVDQuant keeps them apart.
        one_input: Layers of the same input, which SVDQuant fuses: names that share what `*` is.
    """

    keep: tuple[tuple[str, tuple[str, ...]], ...] = ()
    modulation: tuple[tuple[str, int], ...] = ()
    behind_gelu: tuple[str, ...] = ()
    two_inputs: tuple[tuple[str, bool], ...] = ()
    one_input: tuple[tuple[str, ...], ...] = ()

    def kept_by(self, method: str) -> tuple[str, ...]:
        """Patterns of what a method keeps."""
        return tuple(p for who, found in self.keep if who in ("*", method) for p in found)

    def together(self, names: Iterable[str]) -> list[tuple[str, ...]]:
        """Groups of layers among `names` that are to be quantized by `engine.quantize_together`."""
        names = list(names)
        have, groups = set(names), []
        for first, *others in self.one_input:
            head, _, tail = first.partition("*")
            for name in names:
                if not fnmatchcase(name, first):
                    continue
                number = name[len(head) : len(name) - len(tail)]
                group = (name, *(other.replace("*", number) for other in others))
                if have.issuperset(group):
                    groups.append(group)
        return groups


@dataclass(frozen=True)
class Kept:
    """A layer that stays as it is, and why."""

    reason: str


@dataclass(frozen=True)
class LayerRecipe:
    """What is done to one weight, whatever the method.

    Attributes:
        method: For reports.
        format: Code format of the weight.
        kind: "linear", "conv" or "embedding".
        groups: Equal groups that a row (of channels) is cut into; 1: none.
        span: Rows that share a scale; 0: all of them.
        flat: A convolution's kernel positions count as channels.
        scale: Dtype of scales, "model" for that of the weight; "float8_e4m3fn" are scaled once more
            by one float32 (two levels), "float8_e8m0fnu" are powers of two.
        offset: What unsigned codes count from: a "float", or an "integer" code times the scale.
        coded: Formats of scale and zero point that are rounded with one scale more (SDNQ's); ""
            where they are not.
        coded_levels: Iterations that place learnt levels for them; -1: they have none.
        codebook: Iterations that place learnt levels; -1: there are none.
        hadamard: Size of the rotated blocks, 0 for none.
        rank, svd_steps, refits: The branch, its power iterations, and how often branch and codes
            are fitted to each other.
        narrow: Factors and smoothing are kept in 16 bits whatever the weight's dtype is.
        smoothing: Of the spec.
        strength: Exponent of the smoothing; None searches `search` of them.
        activation: Of the spec.
        matmul: Product that the recipe wishes for, "" for none.
        direct: SDNQ's product takes the codes as they are, and its files hold them transposed.
        stochastic: Round at random.
        candidates: For dynamic formats: recipes that are tried in turn until the loss is at most
            `threshold`. Where none is good enough, the layer is kept.
        scale_search, weighted, feedback, nearest: Of REFINEMENTS.
    """

    method: str
    format: str
    kind: str = "linear"
    groups: int = 1
    span: int = 1
    flat: bool = False
    scale: str = "float32"
    offset: str = ""
    coded: tuple[str, str] = ("", "")
    coded_levels: int = -1
    codebook: int = -1
    hadamard: int = 0
    rank: int = 0
    svd_steps: int = 8
    refits: int = 0
    narrow: bool = False
    smoothing: str = ""
    strength: float | None = None
    search: int = 0
    activation: ActivationSpec | None = None
    matmul: str = ""
    direct: bool = False
    stochastic: bool = False
    candidates: tuple[LayerRecipe, ...] = field(default=(), repr=False)
    threshold: float = 0.0
    scale_search: int = 0
    nearest: bool = False
    weighted: bool = False
    feedback: bool = False


@dataclass(frozen=True)
class Split:
    """A layer that is quantized in parts side by side: (first column, last + 1, recipe)."""

    parts: tuple[tuple[int, int, LayerRecipe], ...]


Decision = LayerRecipe | Split | Kept
NO_FACTS = Facts()
