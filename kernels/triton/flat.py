"""A weight as the flat values that a torch operator may take: tensors, and its spec as text.

    packed(tensors)        -> (codes, scale, scale_2, zero_point, levels, smooth, svd_up, svd_down)
    named(*flat)           -> the dict again
    text_of(spec), spec_of(text)

The text holds what the arithmetic needs: the code format with its bit tables, the shapes and the
options. How activations are rounded stands for itself in `activation_text`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from operator import index as fixed  # see kernels.reference

import torch
from torch import Tensor

from ..spec import ActivationSpec, CodeFormat, Piece, WeightSpec

__all__ = [
    "FLAT", "activation_of", "activation_text", "named", "packed", "spec_of", "text_of",
]  # fmt: skip

FLAT = ("codes", "scale", "scale_2", "zero_point", "levels", "smooth", "svd_up", "svd_down")
"""Order of a weight's tensors."""

_texts: dict[int, tuple[WeightSpec, str]] = {}  # {id(spec): (spec, its text)}
_TEXTS = 1 << 14


def packed(tensors: Mapping[str, Tensor]) -> tuple[Tensor | None, ...]:
    """The tensors in the order of FLAT; None for those that the weight does not have."""
    return tuple(tensors.get(name) for name in FLAT)


def named(*tensors: Tensor | None) -> dict[str, Tensor]:
    """The inverse of `packed`."""
    return {name: t for name, t in zip(FLAT, tensors, strict=True) if t is not None}


def text_of(spec: WeightSpec) -> str:
    """A text that `spec_of` reads; the same for equal specs."""
    if torch.compiler.is_compiling():
        return _text(spec)
    found = _texts.get(id(spec))
    if found is None or found[0] is not spec:
        if len(_texts) >= _TEXTS:
            _texts.clear()
        found = _texts[id(spec)] = (spec, _text(spec))
    return found[1]


def _text(spec: WeightSpec) -> str:
    fmt = spec.format
    numbers = (
        fmt.bits, fmt.exponent, fmt.mantissa, fmt.signed, fmt.subnormals, fmt.packed,
        fmt.block_values, fmt.block_words,
    )  # fmt: skip
    options = (spec.hadamard, spec.hadamard_basis, spec.rank, spec.codebook, spec.two_level)
    fields = (
        fmt.name,
        fmt.kind,
        str(fmt.word)[6:],  # without "torch."
        _ints(numbers),
        fmt.floats,
        _ints([number for piece in fmt.pieces for number in piece]),
        _ints(spec.shape),
        _ints(spec.code_shape),
        _ints(options),
        spec.smoothing,
    )
    return "|".join(fields)


def _ints(values) -> str:
    return " ".join([str(fixed(value)) for value in values])


@lru_cache(maxsize=_TEXTS)
def spec_of(text: str) -> WeightSpec:
    """The spec that `text_of` wrote; one object for one text, without `activation`."""
    fields = text.split("|")
    name, kind, word = fields[:3]
    numbers, pieces, shape, code_shape, options = (
        tuple(map(int, fields[at].split())) for at in (3, 5, 6, 7, 8)
    )
    bits, exponent, mantissa, signed, subnormals, is_packed, block_values, block_words = numbers
    hadamard, basis, rank, codebook, two_level = options
    largest, *values = map(float, fields[4].split())
    fmt = CodeFormat(
        name=name,
        bits=bits,
        kind=kind,
        exponent=exponent,
        mantissa=mantissa,
        signed=bool(signed),
        subnormals=bool(subnormals),
        packed=bool(is_packed),
        word=getattr(torch, word),
        block_values=block_values,
        block_words=block_words,
        largest=largest,
        pieces=tuple(Piece(*pieces[at : at + 5]) for at in range(0, len(pieces), 5)),
        values=tuple(values),
    )
    return WeightSpec(
        format=fmt,
        shape=shape,
        code_shape=code_shape,
        hadamard=hadamard,
        hadamard_basis=basis,
        rank=rank,
        codebook=bool(codebook),
        smoothing=fields[9],
        two_level=bool(two_level),
    )


def activation_text(activation: ActivationSpec) -> str:
    """How activations are rounded, as text."""
    a = activation
    flags = _ints((a.group, a.static, a.offset))
    return "|".join((a.format, a.scale, flags, a.shift_text))


@lru_cache(maxsize=256)
def activation_of(text: str) -> ActivationSpec:
    """The inverse of `activation_text`."""
    name, scale, flags, shift = text.split("|")
    group, static, offset = map(int, flags.split())
    return ActivationSpec(name, group, scale, bool(static), float(shift), bool(offset))
