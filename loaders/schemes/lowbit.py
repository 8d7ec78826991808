"""Checkpoints that this pack's MODELs were saved to by ComfyUI's own ModelSave.

=======================  =======  ========================================================
``X.weight``             F8_E4M3  ``[n]``, bytes of the codes of ``X``'s first part
``X.weight_codes_1`` …   F8_E4M3  ``[n]``, bytes of the codes of the further parts
``X.weight_side``        F8_E4M3  ``[side_nbytes]``, what lies beside the codes
``X.comfy_quant``        U8       JSON ``{"format": "lowbit_composite", "spec": {...}}``
anything else                     as it is, ComfyUI's own formats included
=======================  =======  ========================================================
"""

from __future__ import annotations

import json
from functools import partial
from typing import NamedTuple

import torch

from ...quant.errors import LowBitError
from ...quant.weight import QuantizedWeight
from ..layouts.composite import CODES, FORMAT, CompositeSpec, Held, from_json, part_tensors
from ..source import Source
from .base import Contents, Entry, ShapeOf

__all__ = ["CompositeWeight", "read"]

MARKER = ".comfy_quant"
BYTES = "F8_E4M3"


class CompositeWeight(NamedTuple):
    """A weight that is stored as a composite already: its memory and its spec."""

    held: Held
    spec: CompositeSpec

    def parts(self) -> list[tuple[str, QuantizedWeight, str | None]]:
        """``(name, weight, wish)`` of each part."""
        return [
            (
                part.name,
                QuantizedWeight(part.weight, part_tensors(self.held, self.spec, number)),
                part.wish,
            )
            for number, part in enumerate(self.spec.parts)
        ]


def read(source: Source, shape_of: ShapeOf | None = None) -> Contents:
    """Logical tensors of a saved MODEL.

    Raises:
        LowBitError: A marker is broken or does not fit its buffer.
    """
    entries: dict[str, Entry] = {}
    consumed: set[str] = set()
    for name in source.tensors:
        if not name.endswith(MARKER):
            continue
        layer = name.removesuffix(MARKER)
        text = bytes(source.get(name).flatten().tolist())
        try:
            conf = json.loads(text.rstrip(b"\0"))
            spec = from_json(conf["spec"]) if conf["format"] == FORMAT else None
        except (ValueError, KeyError, TypeError) as error:
            raise LowBitError(
                "The quantization marker of a layer cannot be read.",
                file=source.path,
                layer=name,
                found=f"{text[:80]!r} ({type(error).__name__}: {error})",
                expected=f"JSON with format {FORMAT} and its spec",
                remedy="Save the model again; the file is damaged or of a newer version.",
            ) from error
        if spec is None:
            continue
        names = (f"{layer}.weight", *(f"{layer}.weight_{name}" for name in CODES))
        sizes = [part.code_bytes for part in spec.parts]
        held = dict(zip(names, sizes, strict=False)) | {f"{layer}.weight_side": spec.side_nbytes}
        for key, nbytes in held.items():
            info = source.tensors.get(key)
            if info is None or tuple(info.shape) != (nbytes,) or info.dtype != BYTES:
                raise LowBitError(
                    "A layer's buffer is not the one its marker describes.",
                    file=source.path,
                    layer=key,
                    found="nothing" if info is None else f"{info.dtype}{list(info.shape)}",
                    expected=f"{BYTES}[{nbytes}]",
                    remedy="Save the model again; the file is damaged.",
                )
        consumed |= {name, *held}
        entries[f"{layer}.weight"] = Entry(
            key=f"{layer}.weight",
            shape=spec.shape,
            dtype="+".join(sorted({part.weight.format.name for part in spec.parts})),
            stored=(*held, name),
            nbytes=sum(held.values()),
            parts=tuple((part.weight, part.wish) for part in spec.parts),
            read=partial(_composite, source, tuple(held), spec),
        )
    for name, info in source.tensors.items():
        if name not in consumed:
            entries[name] = Entry(
                key=name,
                shape=tuple(info.shape),
                dtype=info.dtype,
                stored=(name,),
                nbytes=info.nbytes,
                read=partial(source.get, name),
            )
    return Contents(entries)


def _composite(source: Source, names: tuple[str, ...], spec: CompositeSpec) -> CompositeWeight:
    *codes, side = (source.get(name).view(torch.uint8) for name in names)
    return CompositeWeight(Held(tuple(codes), side), spec)
