"""The four byte conventions of NVFP4, and which one a file is in.

Two independent bits that no file names: which half of a byte holds the even column, and whether
the block scales lie in cuBLAS's tiles. The wrong reading gives noise without an error.

| files                                      | even column in | block scales                   |
|--------------------------------------------|----------------|--------------------------------|
| ModelOpt's exports, diffusers' names       | low half       | row by row, ``[N, K/16]``      |
| the same, ``enable_swizzle_layout``        | low half       | tiles, ``[128 n, 4 g]``        |
| SGLang's with ``swap_weight_nibbles``      | high half      | row by row                     |
| Black Forest Labs' (packed q, k and v),    | high half      | tiles                          |
| ComfyUI's own                              |                |                                |

The evidence, in this order; what it leaves open is an error that offers the override:

1. the loader's ``nvfp4_layout``;
2. shapes: tiles are padded to 128 rows and 4 groups, so that one layer of another size tells;
3. names of packed layers, for both bits;
4. ``swap_weight_nibbles``, for the halves;
5. ModelOpt's config: low halves, and rows unless the file was rewritten after the export, which
   is when ModelOpt brings scales into tiles.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...quant.errors import LowBitError
from ..header import DOWNLOAD_AGAIN
from ..source import Source
from .modelopt_hints import Hints

__all__ = ["LAYOUTS", "TILED", "Layout", "Stored", "decide_layout", "from_tiles", "swap_halves"]

#: Values of ``nvfp4_layout`` -> (even column in the high half, scales in tiles).
LAYOUTS = {
    "low_rows": (False, False),
    "low_tiles": (False, True),
    "high_rows": (True, False),
    "high_tiles": (True, True),
}
TILED = (128, 4)
ROWS_OF_TILE = 32
PACKED = re.compile(
    r"(?:.+\.)?(?:double_blocks\.\d+\.(?:img|txt)_attn\.qkv|single_blocks\.\d+\.linear1)"
)


@dataclass(frozen=True)
class Stored:
    """Shapes of one layer: codes ``[rows, columns / 2]`` and its scales.

    ``group`` is the size that the config declares; it decides where padded scales fit two.
    """

    name: str
    rows: int
    columns: int
    scales: tuple[int, ...]
    group: int = 16

    def in_rows(self) -> int | None:
        """Group size if the scales stand row by row, else None.

        ModelOpt may pad them to 16 groups, or the codes to 16 bytes.
        """
        if len(self.scales) != 2 or self.scales[0] != self.rows:
            return None
        return self._group(1)

    def in_tiles(self) -> int | None:
        """Group size if the scales stand in tiles, else None."""
        if len(self.scales) != 2 or self.scales[0] != padded(self.rows, TILED[0]):
            return None
        return self._group(TILED[1])

    def _group(self, multiple: int) -> int | None:
        for group in sorted((16, 32), key=lambda size: size != self.group):
            count, rest = divmod(self.columns, group)
            if not rest and self.scales[1] == padded(count, multiple):
                return group
        widest = padded(self.columns // 16, 16)
        return 16 if self.scales[1] == widest else None


@dataclass(frozen=True)
class Layout:
    """What was decided, and by which evidence."""

    high: bool
    tiles: bool
    why: str

    def told(self) -> str:
        half = "high" if self.high else "low"
        scales = "in tiles" if self.tiles else "row by row"
        return f"even columns in the {half} half of a byte, scales {scales} ({self.why})"


def padded(size: int, multiple: int) -> int:
    """The next multiple."""
    return -(-size // multiple) * multiple


def decide_layout(source: Source, hints: Hints, layers: Sequence[Stored], wanted: str) -> Layout:
    """The convention of a file's NVFP4 layers.

    Raises:
        LowBitError: Shapes fit none or two, or nothing tells.
    """
    rows = [layer for layer in layers if layer.in_rows() is not None]
    tiles = [layer for layer in layers if layer.in_tiles() is not None]
    only_rows = [layer for layer in rows if layer not in tiles]
    only_tiles = [layer for layer in tiles if layer not in rows]
    for layer in layers:
        if layer not in rows and layer not in tiles:
            raise _misfit(source, layer)
    if only_rows and only_tiles:
        raise LowBitError(
            "Layers of one file have their block scales in different orders.",
            file=source.path,
            layer=only_tiles[0].name,
            found=f"scales {list(only_tiles[0].scales)} in tiles, but {only_rows[0].name} has "
            f"{list(only_rows[0].scales)} row by row",
            expected="one order",
            remedy="The file was put together from two: get it from its origin again.",
        )
    shown = True if only_tiles else False if only_rows else None
    by = (only_tiles or only_rows or [None])[0]
    if wanted != "auto":
        high, tiled = LAYOUTS[wanted]
        if shown is not None and shown != tiled:
            raise _against(source, by, wanted)
        return Layout(high, tiled, f"set by nvfp4_layout {wanted}")
    packed = next((layer.name for layer in layers if PACKED.fullmatch(layer.name)), None)
    swapped = hints.swapped
    own = [place for place in hints.places if place.own]
    if packed and shown is not False and (swapped is None or swapped[0]):
        return Layout(True, True, f"told by packed layers such as {packed}")
    if swapped is not None:
        high, why = swapped[0], f"{swapped[1]} has swap_weight_nibbles {swapped[0]}".lower()
    elif hints.foreign:
        raise _open(source, layers, "marked as ComfyUI's files are, beside a config of ModelOpt")
    elif own and not packed:
        high, why = False, f"ModelOpt wrote it, as {own[0].where} says"
    elif packed:
        raise _open(source, layers, f"packed as {packed} is, but with scales row by row")
    else:
        order = "" if by is None else f"; {by.name} shows how scales are ordered, but not bytes"
        raise _open(source, layers, f"no config of ModelOpt{order}")
    if by is not None:
        why += f"; scales told by the shape {list(by.scales)} of those of {by.name}"
    elif hints.processed or packed:
        raise _open(source, layers, "the file was rewritten after the export, maybe into tiles")
    return Layout(high, bool(shown), why)


def _misfit(source: Source, layer: Stored) -> LowBitError:
    return LowBitError(
        "A layer's block scales do not fit its codes.",
        file=source.path,
        layer=f"{layer.name}.weight_scale",
        found=f"{list(layer.scales)} scales for {layer.rows} rows of {layer.columns} columns",
        expected=f"[{layer.rows}, {layer.columns // 16}] row by row, or "
        f"[{padded(layer.rows, 128)}, {padded(layer.columns // 16, 4)}] in tiles",
        remedy=DOWNLOAD_AGAIN,
    )


def _against(source: Source, layer: Stored, wanted: str) -> LowBitError:
    return LowBitError(
        f"The file cannot be in the layout {wanted} that was asked for.",
        file=source.path,
        layer=f"{layer.name}.weight_scale",
        found=f"{list(layer.scales)} scales for {layer.rows} rows of {layer.columns} columns",
        expected="shapes that fit it",
        remedy="Set nvfp4_layout to auto, or to one with the other order of scales.",
    )


def _open(source: Source, layers: Sequence[Stored], why: str) -> LowBitError:
    return LowBitError(
        "Nothing tells how the bytes of the NVFP4 layers are ordered, and a wrong guess is noise.",
        file=source.path,
        layer=layers[0].name,
        found=f"{len(layers)} NVFP4 layers; {why}",
        expected="ModelOpt's config beside the weights, or comfy_quant markers",
        remedy="Set nvfp4_layout of the loader (advanced): low_rows for ModelOpt's exports, "
        "high_tiles for files made for ComfyUI or by Black Forest Labs, low_tiles for ModelOpt's "
        "exports with enable_swizzle_layout, high_rows for none of these. The right one gives a "
        "picture, the others noise.",
    )


def from_tiles(scales: torch.Tensor) -> torch.Tensor:
    """Scales of one byte from cuBLAS's tiles to rows; both ``[128 n, 4 g]``.

    A tile holds 128 rows of 4 groups in 512 bytes: rows ``r``, ``r + 32``, ``r + 64`` and
    ``r + 96`` stand behind each other.
    """
    rows, groups = scales.shape
    tiles = scales.view(torch.uint8).reshape(
        rows // TILED[0], groups // TILED[1], ROWS_OF_TILE, TILED[0] // ROWS_OF_TILE, TILED[1]
    )
    return tiles.permute(0, 3, 2, 1, 4).reshape(rows, groups).view(scales.dtype)


def swap_halves(codes: torch.Tensor) -> torch.Tensor:
    """Bytes with their halves exchanged."""
    return (codes << 4) | (codes >> 4)
