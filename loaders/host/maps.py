"""ComfyUI's own tables of diffusers names, as plain data.

``comfy.utils`` has one function a model family, from a small structure description to
``{diffusers name: native name, or (native name, (dim, start, length) or None, function)}``.
They are used for families that this pack has no table of its own for, and in tests as a second
opinion for the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import comfy.model_detection
import comfy.utils
import torch

from ...quant.errors import LowBitError

__all__ = ["KINDS", "Target", "native_names", "unet_structure"]

#: our name for a map -> ComfyUI's function
KINDS = {
    "auraflow": "auraflow_to_diffusers",
    "flux": "flux_to_diffusers",
    "mmdit": "mmdit_to_diffusers",
    "pixart": "pixart_to_diffusers",
    "unet": "unet_to_diffusers",
    "z_image": "z_image_to_diffusers",
}


@dataclass(frozen=True)
class Target:
    """Where a diffusers tensor goes.

    Args:
        native: ComfyUI's name.
        rows: ``(first, count)`` of the rows of the native tensor that it fills; None for all.
        swap_halves: The upper and lower half of the rows change places (whole tensors alone).
    """

    native: str
    rows: tuple[int, int] | None = None
    swap_halves: bool = False


def native_names(kind: str, structure: Mapping[str, Any]) -> dict[str, Target]:
    """ComfyUI's map of ``kind`` (one of ``KINDS``) for a model of this structure.

    Raises:
        LowBitError: This ComfyUI has no such map, or has it in another form.
    """
    function = getattr(comfy.utils, KINDS[kind], None)
    if function is None:
        raise _changed(kind, "no such function", "the function")
    table = {}
    for source, entry in function(dict(structure)).items():
        if isinstance(entry, str):
            table[source] = Target(entry)
            continue
        native, rows, *functions = entry
        plain = not functions and (rows is None or rows[0] == 0)
        swapped = functions == [comfy.utils.swap_scale_shift] and rows is None
        if not plain and not swapped:
            raise _changed(kind, repr(entry), "row offsets, or swap_scale_shift of a whole tensor")
        table[source] = Target(native, rows and (rows[1], rows[2]), bool(functions))
    return table


def unet_structure(natives: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """What ComfyUI calls the structure of a UNet, from its own names and shapes.

    Raises:
        LowBitError: ComfyUI does not recognise it.
    """
    hollow = {key: torch.empty(shape, device="meta") for key, shape in natives.items()}
    try:
        structure = comfy.model_detection.detect_unet_config(hollow, "")
    except (KeyError, IndexError, RuntimeError) as error:
        raise _changed("unet", f"no structure: {error!r}", "blocks, layers and depths") from error
    if not structure or "num_res_blocks" not in structure:
        raise _changed("unet", f"the structure {structure}", "blocks, layers and depths")
    return structure


def _changed(kind: str, found: str, expected: str) -> LowBitError:
    return LowBitError(
        "ComfyUI's table of diffusers names has changed.",
        layer=f"comfy.utils.{KINDS[kind]}",
        found=found,
        expected=expected,
        remedy="Use a ComfyUI version that this pack was tested with, or update the pack.",
    )
