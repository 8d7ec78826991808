"""Layers in ComfyUI's own quantized formats as logical tensors, dequantized when they are read.

Loading leaves such layers to ComfyUI, so their scheme gives every stored tensor by itself. Where a
file is a source of floats, each is one tensor:

===========================  ==================================================================
``X.comfy_quant``, or the    which format ``X.weight`` has, see :mod:`.layouts.native_files`;
metadata's list              what lies beside it belongs to it
``scaled_fp8``               older FP8 files: ``X.scale_weight`` stands beside each such weight
===========================  ==================================================================
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch

from ..quant.errors import LowBitError
from .detect import marked_layers
from .layouts.composite import FORMAT
from .layouts.native_files import CORE_FORMATS, core_dequantize
from .schemes.base import Entry
from .source import Source

__all__ = ["core_layers"]

BESIDE = ("weight", "weight_scale", "weight_scale_2", "input_scale", "pre_quant_scale")
OLD = {"scale_weight": "weight_scale", "scale_input": "input_scale"}
OLD_MARK = "scaled_fp8"


def core_layers(
    source: Source, entries: Mapping[str, Entry]
) -> tuple[dict[str, Entry], frozenset[str]]:
    """Entries in which each such layer is one float tensor, and the keys of those.

    Args:
        source: The open checkpoint.
        entries: Logical tensors, those of such layers as they are stored.

    Raises:
        LowBitError: A layer is in a format of ComfyUI that this pack does not know.
    """
    found = dict(entries)
    keys = set()
    for layer, told in _layers(source).items():
        weight = f"{layer}.weight"
        if weight not in found:
            continue
        name = told["format"]
        if name not in CORE_FORMATS:
            raise LowBitError(
                "A layer is in a format of ComfyUI that this pack cannot dequantize.",
                file=source.path,
                layer=layer,
                found=name,
                expected=", ".join(CORE_FORMATS),
                remedy="Quantize from the float model.",
            )
        names = {
            OLD.get(suffix, suffix): f"{layer}.{suffix}"
            for suffix in (*BESIDE, *OLD)
            if f"{layer}.{suffix}" in found
        }
        shape = _shape(layer, name, found)
        old = [found.pop(key) for key in names.values()]
        found.pop(f"{layer}.comfy_quant", None)
        found[weight] = replace(
            old[0],
            key=weight,
            shape=shape,
            dtype="F32",
            stored=tuple(names.values()),
            nbytes=sum(entry.nbytes for entry in old),
            read=partial(_read, source, told, names, shape),
        )
        keys.add(weight)
    if keys:
        found = {key: entry for key, entry in found.items() if key.split(".")[-1] != OLD_MARK}
    return found, frozenset(keys)


def _layers(source: Source) -> dict[str, dict]:
    """``{module: marker}`` of layers in ComfyUI's own formats."""
    marked = marked_layers(source)
    if not marked and any(name.split(".")[-1] == OLD_MARK for name in source.tensors):
        ends = ".scale_weight"
        return {
            name.removesuffix(ends): {"format": "float8_e4m3fn"}
            for name in source.tensors
            if name.endswith(ends)
        }
    return {layer: told for layer, told in marked.items() if told["format"] != FORMAT}


def _shape(layer: str, name: str, entries: Mapping[str, Entry]) -> tuple[int, ...]:
    """Rows are padded in some formats; the bias, where there is one, tells how many there are."""
    rows, *rest = entries[f"{layer}.weight"].shape
    if rest:
        rest[-1] *= CORE_FORMATS[name].per_byte
    bias = entries.get(f"{layer}.bias")
    if bias is not None and bias.shape and 0 <= rows - bias.shape[0] < 32:
        rows = bias.shape[0]
    return (rows, *rest)


def _read(
    source: Source, told: Mapping[str, object], names: Mapping[str, str], shape: tuple[int, ...]
) -> torch.Tensor:
    tensors = {suffix: source.get(name) for suffix, name in names.items()}
    return core_dequantize(told, tensors, shape)
