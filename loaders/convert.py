"""A checkpoint of any scheme as ComfyUI's one file, every weight as it is.

Nothing is rounded: codes and scales keep their bits. A layer that one of ComfyUI's own formats
holds exactly opens in any ComfyUI, every other one with this pack, as with the container "comfy".
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from .layouts.composite import QuantizedTensor, marker, parts_of
from .layouts.native_files import core_tensors
from .plan import Plan
from .provenance import KEY
from .quantize_file import Progress, layer_kind
from .store import TensorFile, check_room
from .translate import Settings, translate

__all__ = ["convert"]

WEIGHT = ".weight"


def convert(
    plan: Plan,
    target: Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    progress: Progress | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a checkpoint under ComfyUI's names.

    Args:
        plan: Of the checkpoint.
        target: The file.
        dtype: What ComfyUI takes the low-bit weights for.
        progress: Told before each tensor; what it raises ends the work, and nothing is left.
        overwrite: Replace an existing file.

    Raises:
        LowBitError: A tensor cannot be read, or the disk refuses.
    """
    moves = len(plan.moves)
    check_room(target, sum(entry.nbytes for entry in plan.entries.values()))
    kept = {KEY: plan.source.metadata[KEY]} if KEY in plan.source.metadata else {}
    with TensorFile(target, entries=4 * moves, overwrite=overwrite) as file:
        for number, (key, tensor, _) in enumerate(translate(plan, Settings(dtype))):
            if progress is not None:
                progress(min(number, moves), moves, key)
            stored = _stored(key, tensor) if isinstance(tensor, QuantizedTensor) else {key: tensor}
            for name, value in stored.items():
                file.add(name, value)
        if progress is not None:
            progress(moves, moves, "")
        return file.finish({"format": "pt", **kept})


def _stored(key: str, weight: QuantizedTensor) -> Mapping[str, torch.Tensor]:
    layer = key.removesuffix(WEIGHT)
    parts = parts_of(weight)
    made = None
    if len(parts) == 1 and layer_kind(layer, tuple(weight.shape)) == "linear":
        ((_, part, wish),) = parts
        made = core_tensors(part, rounded=wish == "int8")
    if made is None:
        made = {**weight.state_dict("weight"), "comfy_quant": marker(weight._params.spec)}
    return {f"{layer}.{suffix}": tensor for suffix, tensor in made.items()}
