"""Checkpoints that this pack's MODELs were saved to by ComfyUI's own ModelSave.

=====================  =======  ==========================================================
``X.weight``           F8_E4M3  ``[nbytes]``, the bytes of ``LowBitCompositeLayout``'s buffer
``X.comfy_quant``      U8       JSON ``{"format": "lowbit_composite", "spec": {...}}``
anything else                   as it is, ComfyUI's own formats included
=====================  =======  ==========================================================
"""

from __future__ import annotations

import json
from functools import partial

import torch

from ...quant.errors import LowBitError
from ...quant.weight import QuantizedWeight
from ..layouts.composite import FORMAT, CompositeSpec, from_json, part_tensors
from ..source import Source
from .base import Contents, Entry, ShapeOf

__all__ = ["CompositeWeight", "read"]

MARKER = ".comfy_quant"
BYTES = "F8_E4M3"


class CompositeWeight(tuple):
    """``(buffer, spec)`` of a weight that is stored as a composite already."""

    __slots__ = ()

    @property
    def buffer(self):
        return self[0]

    @property
    def spec(self) -> CompositeSpec:
        return self[1]

    def single(self) -> QuantizedWeight | None:
        """The weight as one part; None when it has several."""
        if len(self.spec.parts) != 1:
            return None
        part = self.spec.parts[0]
        return QuantizedWeight(part.weight, part_tensors(self.buffer, part))


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
        weight = source.tensors.get(f"{layer}.weight")
        if weight is None or tuple(weight.shape) != (spec.nbytes,) or weight.dtype != BYTES:
            raise LowBitError(
                "A layer's buffer is not the one its marker describes.",
                file=source.path,
                layer=f"{layer}.weight",
                found="nothing" if weight is None else f"{weight.dtype}{list(weight.shape)}",
                expected=f"{BYTES}[{spec.nbytes}]",
                remedy="Save the model again; the file is damaged.",
            )
        consumed |= {name, f"{layer}.weight"}
        entries[f"{layer}.weight"] = Entry(
            key=f"{layer}.weight",
            shape=spec.shape,
            dtype="+".join(sorted({part.weight.format.name for part in spec.parts})),
            stored=(f"{layer}.weight", name),
            nbytes=weight.nbytes,
            parts=tuple((part.weight, part.wish) for part in spec.parts),
            read=partial(_composite, source, f"{layer}.weight", spec),
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


def _composite(source: Source, name: str, spec: CompositeSpec) -> CompositeWeight:
    return CompositeWeight((source.get(name).view(torch.uint8), spec))
