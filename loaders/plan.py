"""From a path to a plan: what a checkpoint is and how it becomes ComfyUI's, told from headers.

``path -> Source -> detection -> scheme's contents -> family's moves``; no tensor data is read. The
plan is what the Inspect node shows and what errors cite.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..quant.errors import LowBitError
from .detect import Detection, detect_scheme, metadata_object
from .families import Family, Move, Piece, detect_family, unused
from .folder import PIPELINE_INDEX
from .header import read_json
from .schemes import bitsandbytes, comfy, lowbit, modelopt, modelslim, quanto, sdnq, svdq, torchao
from .schemes.base import Contents, Entry, SchemeOptions, ShapeOf
from .source import Source, open_source

__all__ = ["SCHEMES", "Plan", "make_plan"]

Reader = Callable[[Source, ShapeOf | None, SchemeOptions], Contents]


def _without_options(read: Callable[[Source, ShapeOf | None], Contents]) -> Reader:
    return lambda source, shape_of, _: read(source, shape_of)


READERS: dict[str, Reader] = {
    "sdnq": _without_options(sdnq.read),
    "svdq": svdq.read,
    "modelopt": modelopt.read,
    "fp8": modelopt.read,
    "modelslim": _without_options(modelslim.read),
    "bitsandbytes": _without_options(bitsandbytes.read),
    "torchao": _without_options(torchao.read),
    "quanto": _without_options(quanto.read),
    "lowbit": _without_options(lowbit.read),
    "comfy": _without_options(comfy.read),
}
SCHEMES = ("auto", *READERS)
"""Values of the loader's ``scheme`` input."""

NativeShapes = Callable[[Mapping[str, tuple[int, ...] | None]], Mapping[str, tuple[int, ...]]]
"""``{native key: shape or None} -> {native key: shape}`` by building the model without memory."""


@dataclass(frozen=True)
class Plan:
    """How one checkpoint will be loaded.

    Attributes:
        source: The open checkpoint.
        detection: Scheme and evidence.
        family: The family of names; ``evidence`` says why.
        contents: Logical tensors.
        moves: How native tensors are made of them.
        config: The component's config.json, and its pipeline's scheduler under "scheduler".
        ignored: Logical keys left out, with the reason.
    """

    source: Source
    detection: Detection
    family: Family
    evidence: str
    contents: Contents
    moves: Sequence[Move]
    config: Mapping[str, Any]
    ignored: Mapping[str, str] = field(default_factory=dict)

    @property
    def entries(self) -> Mapping[str, Entry]:
        return self.contents.entries

    @property
    def path(self) -> Path:
        return self.source.path

    def quantized(self) -> list[Entry]:
        """Entries of low-bit weights."""
        return [entry for entry in self.entries.values() if entry.parts]

    def float_bytes(self, itemsize: int = 2) -> int:
        """Bytes of the same model in bf16."""
        return sum(math.prod(e.shape) * itemsize for e in self.entries.values() if e.shape)

    def native(self) -> dict[str, tuple[tuple[int, ...] | None, int]]:
        """``{native name: (shape, stored bytes)}`` of what will be loaded."""
        return {
            move.native: (
                _native_shape(move, self.entries),
                sum(self._bytes_of(piece) for piece in move.pieces),
            )
            for move in self.moves
        }

    def _bytes_of(self, piece: Piece) -> int:
        entry = self.entries[piece.key]
        if piece.rows is None or not entry.shape:
            return entry.nbytes
        return entry.nbytes * piece.rows[1] // entry.shape[0]

    def by_format(self) -> dict[str, tuple[int, int, int]]:
        """``{format: (tensors, elements, stored bytes)}``."""
        counts: Counter[str] = Counter()
        numel: dict[str, int] = defaultdict(int)
        nbytes: dict[str, int] = defaultdict(int)
        for entry in self.entries.values():
            counts[entry.dtype] += 1
            numel[entry.dtype] += math.prod(entry.shape) if entry.shape else 0
            nbytes[entry.dtype] += entry.nbytes
        return {name: (counts[name], numel[name], nbytes[name]) for name, _ in counts.most_common()}


def make_plan(
    path: str | Path,
    scheme: str = "auto",
    *,
    options: SchemeOptions | None = None,
    native_shapes: NativeShapes | None = None,
) -> Plan:
    """Read headers and configs and decide everything.

    Args:
        path: A file or folder.
        scheme: "auto" or the scheme that the user insists on.
        options: What else the user insists on.
        native_shapes: Gives the shapes of the host's model, for the few layers whose own tensors
            do not tell theirs.

    Raises:
        LowBitError: The checkpoint is broken, unknown, or contradicts itself.
    """
    source = open_source(path)
    try:
        detection = detect_scheme(source, scheme)
        config = _config(source)
        options = options or SchemeOptions()
        reader = READERS[detection.scheme]
        contents = reader(source, None, options)
        if any(entry.shape is None or entry.doubtful for entry in contents.entries.values()):
            told = _told_shapes(contents, source, config, native_shapes)
            contents = reader(source, told.get, options)
        family, evidence, moves, ignored = _map(contents, source, config)
    except BaseException:
        source.close()
        raise
    return Plan(source, detection, family, evidence, contents, moves, config, ignored)


def _config(source: Source) -> dict[str, Any]:
    """The component's config with its pipeline's scheduler, which tells what a UNet predicts.

    Nunchaku's single files have the config in their header.
    """
    config = source.config
    if not config and "model_class" in source.metadata:
        config = metadata_object(source, "config")
    pipeline = source.path.parent
    scheduler = pipeline / "scheduler" / "scheduler_config.json"
    if source.path.is_dir() and (pipeline / PIPELINE_INDEX).is_file() and scheduler.is_file():
        return {**config, "scheduler": read_json(scheduler)}
    return dict(config)


def _map(contents: Contents, source: Source, config: Mapping[str, Any]):
    """Family, evidence, moves and left-out keys of the logical tensors."""
    keys = set(contents.entries)

    def shape_of(key: str) -> tuple[int, ...]:
        return contents.entries[key].shape or ()

    try:
        family, evidence = detect_family(keys, config, shape_of)
        if family is None:
            raise LowBitError(
                "The checkpoint holds no tensors of a model.",
                found=evidence,
                expected="the weights of a diffusion model",
                remedy="Choose the file or folder of the transformer or UNet.",
            )
        moves = family.moves(keys, config, shape_of)
        ignored = family.ignored(keys, config)
    except LowBitError as error:
        raise error.located(file=source.path) from None
    left = unused(keys, moves, ignored)
    if left:
        more = f" and {len(left) - 5} more" if len(left) > 5 else ""
        raise LowBitError(
            "The checkpoint holds tensors that nothing accounts for.",
            file=source.path,
            layer=left[0],
            found=", ".join(left[:5]) + more,
            expected=f"names of {family.display} ({evidence})",
            remedy="The file may be of a newer variant of the model than this pack knows, or hold "
            "an adapter (LoRA, ControlNet) beside it: please report its name.",
        )
    return family, evidence, moves, ignored


def _native_shape(move: Move, entries: Mapping[str, Entry]) -> tuple[int, ...] | None:
    """Shape of a native tensor, None where that of a piece is unknown."""
    shapes = [
        (piece.rows[1], *shape[1:]) if piece.rows and shape else shape
        for piece in move.pieces
        for shape in [entries[piece.key].shape]
    ]
    if None in shapes:
        return None
    if move.axis in ("single", "sum"):
        return shapes[0]
    axis = 0 if move.axis == "rows" else 1
    joined = list(shapes[0])
    joined[axis] = sum(shape[axis] for shape in shapes)
    return tuple(joined)


def _told_shapes(
    contents: Contents,
    source: Source,
    config: Mapping[str, Any],
    native_shapes: NativeShapes | None,
) -> dict[str, tuple[int, ...]]:
    """Shapes that the architecture gives to logical keys.

    A native tensor made of one piece tells it at once; of a fused one, the rows that known pieces
    leave are shared evenly by the unknown ones. Doubtful shapes are kept where nothing tells.
    """
    if native_shapes is None:
        return {}
    _, _, moves, _ = _map(contents, source, config)
    entries = contents.entries
    wanted = {move.native: _native_shape(move, entries) for move in moves}
    native = native_shapes(wanted)
    if not native:  # convolutions of one pixel that stand there as matrices (SD 1.x)
        flat = {
            move.native
            for move in moves
            if move.axis == "single" and entries[move.pieces[0].key].doubtful
        }
        native = native_shapes(
            {
                key: (*shape, 1, 1) if key in flat and shape and len(shape) == 2 else shape
                for key, shape in wanted.items()
            }
        )
    told: dict[str, tuple[int, ...]] = {}
    for move in moves:
        unknown = [p.key for p in move.pieces if entries[p.key].shape is None]
        shape = native.get(move.native)
        if shape is None:
            continue
        if move.axis == "single":
            piece = move.pieces[0]
            if unknown or (entries[piece.key].doubtful and piece.rows is None):
                told[piece.key] = shape
        elif unknown and move.axis == "rows" and all(piece.rows is None for piece in move.pieces):
            known = sum(entries[p.key].shape[0] for p in move.pieces if entries[p.key].shape)
            share, rest = divmod(shape[0] - known, len(unknown))
            if share > 0 and rest == 0:
                told.update(dict.fromkeys(unknown, (share, *shape[1:])))
    return told
