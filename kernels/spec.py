"""The vocabulary of quantized weights: plain frozen data that kernels, formats and layouts share.

A weight is a `WeightSpec` (no tensors, hashable) and a dict of tensors in this normal form:

| name          | shape                                         | dtype              | when      |
|---------------|-----------------------------------------------|--------------------|-----------|
| `codes`       | 1-D words, or as `shape` (of any view) if raw | `spec.format.word` | always    |
| `scale`       | broadcasts to `code_shape`                    | float              | scaled    |
| `scale_2`     | as `scale`; multiplies it                     | float32            | two_level |
| `zero_point`  | as `scale`; an offset added after scaling     | as `scale`         | unsigned  |
| `levels`      | code_shape, its reduced axis 2^bits long      | float              | codebook  |
| `smooth`      | [I], I = product of shape[1:]                 | float              | smoothing |
| `svd_up`      | [O, r]                                        | float              | rank > 0  |
| `svd_down`    | [r, I]; multiplies x before any smoothing     | float              | rank > 0  |
| `input_scale` | [1]; scale of the activations                 | float32            | static    |
| `input_offset`| [1]; the code that activations of 0 have      | float32            | offset    |
| `shift_bias`  | [O]; shift * sum over I of the residual W     | float32            | shift     |

Codes stand in row-major order of `code_shape`, which has as many elements as `shape`.
The bit layouts themselves are tables in `quant.dtypes`; nothing here knows a format by name.
A layer's bias is always that of the float layer: `shift_bias` is for the arithmetic that shifts x.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

__all__ = ["SHARED", "SMOOTHINGS", "ActivationSpec", "CodeFormat", "Piece", "Run", "WeightSpec"]

SHARED = ("svd_down", "smooth", "input_scale", "input_offset")
"""Tensors that all rows of a weight share."""

SMOOTHINGS = ("", "divide", "multiply")
"""What is done to x before the product: nothing, x / smooth, or x * smooth."""


class Piece(NamedTuple):
    """`width` bits of one value: they stand in the value at `value_bit`, in its word at `word_bit`.

    `value` and `word` count from the start of a pack block.
    """

    value: int
    value_bit: int
    width: int
    word: int
    word_bit: int


class Run(NamedTuple):
    """`count` neighbouring values of a block: the same shifts unpack them, from neighbouring words.

    `parts` holds (word of the run's first value, word_bit, width, value_bit) for each piece.
    """

    value: int
    count: int
    parts: tuple[tuple[int, int, int, int], ...]


def _runs(pieces: tuple[Piece, ...], block_values: int) -> tuple[Run, ...]:
    runs: list[Run] = []
    for value in range(block_values):
        parts = tuple(
            (p.word, p.word_bit, p.width, p.value_bit) for p in pieces if p.value == value
        )
        last = runs[-1] if runs else None
        if last is not None and parts == tuple((w + last.count, *rest) for w, *rest in last.parts):
            runs[-1] = last._replace(count=last.count + 1)
        else:
            runs.append(Run(value, 1, parts))
    return tuple(runs)


@dataclass(frozen=True)
class CodeFormat:
    """How one value is coded and how codes lie in words.

    kind: "int" (stored offset-binary when packed, two's complement when raw), "uint",
        "float" (sign, exponent, mantissa with every code finite), "native" (a torch float dtype) or
        "table" (a code is an index into `values`).
    exponent, mantissa: bit counts, 0 for the exponent of integers and for both of tables.
    subnormals: whether exponent 0 means a subnormal number ("float" only). Without them exponent 0
        continues the normal numbers one binade down, and the all-zero code is zero.
    packed: several values share words; otherwise one word (element) per value.
    word: dtype of the stored tensor.
    largest: the biggest code value the producer scales to; the smallest follows from it.
    values: what each code of a "table" stands for; 2^bits of them.
    """

    name: str
    bits: int
    kind: str
    exponent: int
    mantissa: int
    signed: bool
    subnormals: bool
    packed: bool
    word: torch.dtype
    block_values: int
    block_words: int
    largest: float
    pieces: tuple[Piece, ...] = field(default=(), repr=False)
    values: tuple[float, ...] = field(default=(), repr=False)
    runs: tuple[Run, ...] = field(init=False, repr=False, compare=False)
    floats: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "runs", _runs(self.pieces, self.block_values))
        # `largest` and `values` as text: torch.compile makes symbols of floats, not of strings.
        floats = " ".join(str(float(value)) for value in (self.largest, *self.values))
        object.__setattr__(self, "floats", floats)

    @property
    def qmax(self) -> float:
        """Largest value a code stands for before scaling."""
        return self.largest

    @property
    def qmin(self) -> float:
        """Smallest value a code stands for before scaling."""
        if not self.signed:
            return 0
        return -self.largest - 1 if self.kind == "int" else -self.largest

    @property
    def is_integer(self) -> bool:
        return self.kind in ("int", "uint")

    @property
    def exponent_bias(self) -> int:
        """Exponent bias of a "float" format."""
        return (1 << (self.exponent - 1)) - 1

    def storage_numel(self, numel: int) -> int:
        """Words needed for `numel` values; the last block is padded."""
        return -(-numel // self.block_values) * self.block_words


@dataclass(frozen=True)
class ActivationSpec:
    """How a format's own arithmetic rounds activations before they meet the codes.

    format: code format of the rounded activations, a name of `quant.dtypes`.
    group: elements of a row that share a scale; 0 for one scale a row, -1 for one in all.
    scale: what a scale is rounded to: "" for the dtype of the activations, "float32",
        "float8_e4m3fn", "float8_e8m0fnu" (the next power of two, so that nothing saturates) or
        "ocp_e8m0" (as OCP's MX formats say: the largest value's power of two over that of the
        largest code, so that the largest values may saturate).
    static: `input_scale` is the scale; beside groups it is a second level, which their scales are
        divided by.
    shift: added to activations before smoothing and rounding.
    offset: codes are counted from `input_offset`, which is added before they are rounded; beside a
        static scale without groups alone.
    """

    format: str
    group: int
    scale: str = ""
    static: bool = False
    shift: float = 0.0
    offset: bool = False

    def __post_init__(self) -> None:
        # No field, which would be stored: `shift` as text, see `CodeFormat.floats`.
        object.__setattr__(self, "shift_text", str(float(self.shift)))


@dataclass(frozen=True)
class WeightSpec:
    """What the tensors of one weight mean.

    format: the code format of `codes`.
    shape: logical shape, [O, I], [O, C, kh, kw] or [V, E].
    code_shape: the shape that codes are viewed as and that `scale` broadcasts against,
        e.g. [O, I], [O, G, g] or [O, G, g, kh, kw].
    hadamard: block size of the rotation of the flattened input dimension, 0 for none.
    hadamard_basis: 2 or 4, the seed matrix of the rotation (see `kernels.reference.hadamard`).
    rank: rank of the low-rank branch that is added to the residual, 0 for none.
    codebook: `levels` replaces `scale`.
    smoothing: how `smooth` changes activations, one of SMOOTHINGS. Stored codes are of the weight
        that smoothed activations meet: W = codes / smooth for "divide", codes * smooth for
        "multiply". The low-rank branch stands outside of it.
    two_level: `scale_2` multiplies `scale`.
    activation: how the format's own arithmetic rounds activations; None where it does not.
    """

    format: CodeFormat
    shape: tuple[int, ...]
    code_shape: tuple[int, ...]
    hadamard: int = 0
    hadamard_basis: int = 2
    rank: int = 0
    codebook: bool = False
    smoothing: str = ""
    two_level: bool = False
    activation: ActivationSpec | None = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def rows(self) -> int:
        """Output channels O, or V of an embedding."""
        return self.shape[0]

    @property
    def columns(self) -> int:
        """Elements of a row: I, C·kh·kw, or E of an embedding."""
        return math.prod(self.shape[1:])
