"""What the readers of bitsandbytes, torchao and quanto share."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial

import torch

from ...kernels.spec import WeightSpec
from ...quant.errors import LowBitError
from ...quant.weight import QuantizedWeight
from ..source import Source
from .base import Entry
from .modelopt_layers import FLOATS, REGET, Place

__all__ = [
    "block_scale",
    "block_shape",
    "entry_of",
    "facts",
    "is_count",
    "is_number",
    "need",
    "plain_entries",
]

FLOAT8 = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")


def need(place: Place, *parts: str) -> None:
    """Raise LowBitError, naming the first of the parts that the layer lacks."""
    for part in parts:
        if part not in place.infos:
            raise place.error(
                f"A layer's {part} is missing.",
                "only " + ", ".join(sorted(place.infos)),
                f"{place.name}.{part} beside it",
                part=part,
            )


def block_shape(place: Place, part: str, shape: tuple[int, int]) -> tuple[int, ...]:
    """code_shape of a weight [N, K] whose scales [n, k] serve blocks of [N/n, K/k].

    Raises:
        LowBitError: The scales are no such table.
    """
    scale = place.shape(part)
    if len(scale) != 2 or 0 in scale or any(n % s for n, s in zip(shape, scale, strict=True)):
        raise place.error(
            f"A layer's {part} does not fit its weight.",
            place.told(part),
            f"one for each row or block of {list(shape)}",
            part=part,
        )
    return shape if scale[1] == 1 else (shape[0], scale[1], shape[1] // scale[1])


def block_scale(scale: torch.Tensor, code_shape: tuple[int, ...]) -> torch.Tensor:
    """Scales [n, k] as they broadcast to ``code_shape``; those of several rows are repeated."""
    if scale.shape[0] not in (1, code_shape[0]):
        scale = scale.repeat_interleave(code_shape[0] // scale.shape[0], dim=0)
    return scale.unsqueeze(-1) if len(code_shape) == 3 else scale


def entry_of(
    place: Place,
    spec: WeightSpec,
    read: Callable[[], QuantizedWeight],
    *,
    wish: str | None = None,
    notes: tuple[str, ...] = (),
) -> Entry:
    """The entry of a quantized weight that all parts of ``place`` make."""
    return Entry(
        key=f"{place.name}.weight",
        shape=spec.shape,
        dtype=spec.format.name,
        stored=tuple(info.name for info in place.infos.values()),
        nbytes=sum(info.nbytes for info in place.infos.values()),
        parts=((spec, wish),),
        notes=notes,
        read=read,
    )


def plain_entries(source: Source, used: set[str]) -> dict[str, Entry]:
    """The tensors that no quantized weight was made of.

    Raises:
        LowBitError: A weight holds codes, and nothing beside it tells how to decode them.
    """
    entries = {}
    for name, info in source.tensors.items():
        if name in used:
            continue
        if name.endswith(".weight") and info.dtype not in FLOATS + FLOAT8:
            raise LowBitError(
                "A layer's scale is missing.",
                file=info.file,
                layer=name,
                found=f"{info.dtype}{list(info.shape)} alone",
                expected="its scales beside it, or a float weight",
                remedy=REGET,
            )
        entries[name] = Entry(
            key=name,
            shape=tuple(info.shape),
            dtype=info.dtype,
            stored=(name,),
            nbytes=info.nbytes,
            read=partial(source.get, name),
        )
    return entries


def facts(entries: Mapping[str, Entry], kinds: Mapping[str, str]) -> dict[str, str]:
    """What a report tells: the kinds of layers, each with their number."""
    counts = Counter(kinds.values())
    wishes = Counter(entry.wish for entry in entries.values() if entry.parts and entry.wish)
    told = {"layers": ", ".join(f"{count} of {kind}" for kind, count in counts.most_common())}
    if wishes:
        told["matmul that the file asks for"] = ", ".join(wishes)
    return told


def is_count(value: object) -> bool:
    """Whether a value out of JSON is a whole number of at least 1."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def is_number(value: object) -> bool:
    """Whether a value out of JSON is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
