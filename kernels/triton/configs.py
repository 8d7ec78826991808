"""Which tile a kernel runs with, by architecture, operation and shape: tables, never a search.

A user never waits for tuning: `tile_for` looks a tile up. What a measured search found on a device
(`search`, asked for by a person) is kept in one JSON file per device and versions, and goes before
the tables where `use_folder` has read it. Nothing here imports Triton.

A file lists `{"tiles": {"operation/class of rows/outputs/inputs": {"block_m": ...}}}` beside what
it was measured on; one for another device or other versions is not read.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

__all__ = [
    "ROW_CLASSES",
    "TILES",
    "Ahead",
    "Machine",
    "Tile",
    "family_of",
    "machine_of",
    "neighbours",
    "row_class",
    "search",
    "tile_for",
    "use_folder",
]


@dataclass(frozen=True)
class Tile:
    """How a kernel cuts its work: `block_m` rows by `block_n` columns, `block_k` at a time.

    group_m: blocks of rows that neighbours share, so that they find their columns in the cache.
    split_k: programs that share one output block, each with a part of the inner dimension.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int = 4
    stages: int = 3
    group_m: int = 8
    split_k: int = 1

    @property
    def options(self) -> dict[str, Any]:
        """Keywords of a kernel's launch. Fused multiply-adds are asked for by name: Triton's own
        choice changes between versions."""
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}


@dataclass(frozen=True)
class Ahead:
    """A kernel to compile without a device, as the launcher would launch it.

    Attributes:
        kernel: ``module:name`` in this folder, as "unpack:unpack_kernel".
        signature: Type of each argument that is not a constant: "*bf16", "*i8", "i32", "fp32" ...
        constants: Value of each constant of the kernel.
        tile: Its warps and stages are compiled with.
        targets: What it is claimed for: "sm_80", "gfx942" ... of :mod:`.targets`.
        product: What its matrix instructions multiply: "int8", "half", "fp8", or "" for none.
        unaligned: Arguments (pointers, ints) that are not promised to be multiples of 16.
        label: Beside the kernel's name in tables.

    ``scripts/compile_kernels.py`` compiles them.
    """

    kernel: str
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    tile: Tile
    targets: tuple[str, ...]
    product: str = ""
    unaligned: tuple[str, ...] = ()
    label: str = ""


# ------------------------------------------------------------------------------------ machines


@dataclass(frozen=True)
class Machine:
    """What tiles depend on.

    Attributes:
        architecture: "sm_90", "gfx942", "xpu"; "interpreter" on a CPU.
        processors: Multiprocessors, compute units or cores.
        shared: Bytes of shared memory that a block may have.
        cache: Bytes of the last-level cache.
    """

    architecture: str
    processors: int
    shared: int
    cache: int = 0


@lru_cache(maxsize=16)
def machine_of(device: torch.device) -> Machine:
    """The machine behind a torch device."""
    if device.type not in ("cuda", "xpu"):
        return Machine("interpreter", 4, 64 << 10, 1 << 20)
    if device.type == "xpu":
        facts = torch.xpu.get_device_properties(device)
        return Machine("xpu", getattr(facts, "gpu_subslice_count", 32), 64 << 10, 16 << 20)
    facts = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        architecture = facts.gcnArchName.split(":")[0]
        shared = 64 << 10
    else:
        architecture = f"sm_{facts.major}{facts.minor}"
        shared = facts.shared_memory_per_block_optin
    cache = getattr(facts, "L2_cache_size", 0)
    return Machine(architecture, facts.multi_processor_count, shared, cache)


def family_of(architecture: str) -> str:
    """The family whose table an architecture uses."""
    for family, prefixes in _FAMILIES.items():
        if architecture.startswith(prefixes):
            return family
    return "other"


_FAMILIES = {
    "interpreter": ("interpreter",),
    "turing": ("sm_7",),
    "ampere": ("sm_80", "sm_87"),
    "ada": ("sm_86", "sm_88", "sm_89"),
    "hopper": ("sm_90",),
    "blackwell": ("sm_10", "sm_11"),
    "workstation": ("sm_12",),
    "cdna": ("gfx90", "gfx94", "gfx95"),
    "rdna": ("gfx10", "gfx11", "gfx12"),
    "xe": ("xpu",),
}

# ---------------------------------------------------------------------------------- the tables

ROW_CLASSES = (1, 8, 16, 64, 512, 2048)
"""Upper ends of the classes of rows; more rows are one class more."""


def row_class(m: int) -> int:
    """The class of a number of rows: its index in ROW_CLASSES, or one past the end."""
    return next((n for n, end in enumerate(ROW_CLASSES) if m <= end), len(ROW_CLASSES))


def _classes(*tiles: Tile) -> tuple[Tile, ...]:
    """One tile for each class of rows; the last given stands for the classes that follow it."""
    return tiles + tiles[-1:] * (len(ROW_CLASSES) + 1 - len(tiles))


_T = Tile
_FEW = (_T(16, 64, 128, 4, 3), _T(16, 64, 128, 4, 3), _T(16, 64, 128, 4, 3))
_SAFE = _classes(*_FEW, _T(64, 64, 128, 4, 3), _T(64, 128, 128, 4, 3), _T(128, 128, 128, 8, 3))
_NARROW = _classes(*_FEW, _T(64, 64, 64, 4, 2), _T(64, 128, 64, 4, 2), _T(128, 128, 64, 8, 2))
_TINY = _classes(_T(16, 32, 64, 4, 1), _T(16, 32, 64, 4, 1), _T(16, 32, 64, 4, 1), _T(32, 32, 64))

TILES: dict[str, dict[str, tuple[Tile, ...]]] = {
    # Products of 8-bit codes; perf.md 3c.
    "int8": {
        "interpreter": _TINY,
        "turing": _NARROW,
        "ampere": _classes(*_SAFE[:5], _T(128, 128, 64, 4, 4)),
        "ada": _classes(*_SAFE[:5], _T(128, 128, 64, 4, 4), _T(256, 128, 64, 8, 3)),
        "hopper": _classes(*_SAFE[:5], _T(128, 128, 128, 8, 3), _T(128, 256, 128, 8, 3)),
        "blackwell": _SAFE,  # a thread has a whole row of the block there: 256 columns spill
        "workstation": _classes(*_SAFE[:5], _T(128, 128, 64, 4, 4)),
        "cdna": _classes(
            *_FEW, _T(64, 64, 128, 4, 2), _T(64, 128, 128, 4, 2), _T(128, 128, 128, 8, 2)
        ),
        "rdna": _NARROW,
        "other": _NARROW,
    },
    # Products of 16-bit floats.
    "half": {
        "interpreter": _TINY,
        "turing": _NARROW,
        "ampere": _classes(
            *_FEW, _T(64, 64, 64, 4, 3), _T(64, 128, 64, 4, 3), _T(128, 128, 64, 8, 3)
        ),
        "ada": _classes(*_FEW, _T(64, 64, 64, 4, 3), _T(64, 128, 64, 4, 3), _T(128, 128, 64, 8, 3)),
        "hopper": _classes(
            *_FEW, _T(64, 64, 128, 4, 3), _T(64, 128, 64, 4, 4), _T(128, 128, 64, 8, 4)
        ),
        "blackwell": _classes(
            *_FEW, _T(64, 64, 128, 4, 3), _T(64, 128, 64, 4, 4), _T(128, 128, 64, 8, 4)
        ),
        "workstation": _classes(
            *_FEW, _T(64, 64, 64, 4, 3), _T(64, 128, 64, 4, 3), _T(128, 128, 64, 8, 3)
        ),
        "rdna": _classes(*(_T(16, 64, 128, 4, 2),) * 3, _T(64, 64, 64, 4, 2)),
        "other": _NARROW,
    },
    # The same with codes decoded inside of the product; a weight's rows stand left, so that large
    # values of `block_n` suit it.
    "fused": {
        "interpreter": _classes(_T(16, 32, 64, 4, 1)),
        "other": _classes(
            _T(16, 64, 128, 8, 3),
            _T(16, 64, 128, 8, 3),
            _T(16, 64, 128, 8, 3),
            _T(32, 64, 128, 8, 3),
            _T(64, 64, 64, 8, 3),
        ),
    },
    # One row of outputs a program; block_m is not used.
    "gemv": {
        "interpreter": _classes(_T(1, 16, 64, 4, 1)),
        "rdna": _classes(_T(1, 4, 1024, 4, 2), _T(1, 4, 512, 4, 2)),
        "other": _classes(_T(1, 4, 1024, 4, 2)),
    },
    # block_m times [block_n, block_k] of a weight: one row at a time needs no shared memory.
    "unpack": {
        "interpreter": _classes(_T(1, 16, 128, 4, 1)),
        "other": _classes(_T(4, 1, 1024, 4, 1)),
    },
    # Elementwise over [block_m, block_k] of activations.
    "rows": {
        "interpreter": _classes(_T(4, 1, 128, 4, 1)),
        "other": _classes(_T(1, 1, 4096, 8, 1)),
    },
}
# All of these compile without spilling: see scripts/compile_kernels.py.
TILES["fp8"] = TILES["int8"]
TILES["faithful"] = {
    "interpreter": _TINY,
    "rdna": _classes(*(_T(16, 64, 64, 4, 2),) * 3, _T(64, 64, 64, 8, 2)),
    "other": _classes(
        *(_T(16, 64, 64, 4, 2),) * 3, *(_T(64, 64, 64, 4, 3),) * 2, _T(128, 64, 64, 8, 3)
    ),
}


_PRODUCTS = ("int8", "fp8", "half", "faithful")
_DEEP = ("hopper", "blackwell")  # where every stage has a buffer of its own


def tile_for(
    operation: str, device: torch.device | Machine, m: int, n: int, k: int, *, bits: int = 8
) -> Tile:
    """The tile of an operation for a shape on a device.

    Args:
        operation: A key of TILES.
        device: A device or what is known of one.
        m, n, k: Rows, outputs, inputs.
        bits: Of the operands in shared memory.
    """
    machine = device if isinstance(device, Machine) else machine_of(device)
    tuned = _tuned.get((machine, _key(operation, m, n, k)))
    return tuned or _from_table(operation, machine, m, n, bits)


@lru_cache(maxsize=8192)
def _from_table(operation: str, machine: Machine, m: int, n: int, bits: int) -> Tile:
    family = family_of(machine.architecture)
    table = TILES[operation]
    tiles = table.get(family, table["other"])
    number = row_class(m)
    if operation not in _PRODUCTS:
        return tiles[number]
    deep = family in _DEEP
    fitting = [tile for tile in tiles if _shared(tile, bits, deep) <= machine.shared]
    if tiles[number] in fitting and number <= ROW_CLASSES.index(64):
        return tiles[number]
    # Where there are rows enough for several sizes, the one that leaves the fewest processors idle.
    large = list(dict.fromkeys(tiles[ROW_CLASSES.index(512) : number + 1]))
    return min(
        [tile for tile in large if tile in fitting] or fitting or [tiles[0]],
        key=lambda tile: _cost(tile, machine, m, n),
    )


def _shared(tile: Tile, bits: int, deep: bool) -> int:
    """About the bytes of shared memory that a product's operands take."""
    stages = tile.stages if deep else max(tile.stages - 1, 1)
    return stages * (tile.block_m + tile.block_n) * tile.block_k * bits // 8


def _cost(tile: Tile, machine: Machine, m: int, n: int) -> float:
    """What a product costs in elements of its output, idle processors and edges among them.

    Small blocks read more for each element: see the waves of perf.md, section 1.
    """
    blocks = math.ceil(m / tile.block_m) * math.ceil(n / tile.block_n)
    beside = 1 if tile.warps > 4 else 2  # blocks that a processor runs at once
    waves = math.ceil(blocks / (machine.processors * beside))
    size = tile.block_m * tile.block_n
    return waves * beside * size * (1 + _READING * (tile.block_m + tile.block_n) / size)


_READING = 24  # elements of the output that reading a column of operands costs as much as

# ------------------------------------------------------------------------------- searched tiles

_tuned: dict[tuple[Machine, str], Tile] = {}
_files: dict[Machine, Path] = {}


def _key(operation: str, m: int, n: int, k: int) -> str:
    return f"{operation}/{row_class(m)}/{n}/{k}"


def use_folder(folder: Path, device: torch.device) -> int:
    """Take the tiles that were searched on this device from now on; returns how many there are.

    Args:
        folder: Where `search` keeps what it finds; need not exist.
        device: Whose file to read.
    """
    machine = machine_of(device)
    facts = _facts(device)
    name = re.sub(r"[^a-z0-9]+", "-", facts["device"].lower()).strip("-")
    file = _files[machine] = folder / f"tiles-{name}-{machine.architecture}.json"
    for key in [key for key in _tuned if key[0] == machine]:
        del _tuned[key]
    if not file.is_file():
        return 0
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
        tiles = {key: Tile(**values) for key, values in told["tiles"].items()}
        same = {name: told[name] for name in facts} == facts
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        logging.warning("LowBit: %s cannot be read and is not used (%s)", file, error)
        return 0
    if not same:
        logging.info("LowBit: %s was searched with other versions and is not used", file)
        return 0
    _tuned.update({(machine, key): tile for key, tile in tiles.items()})
    return len(tiles)


def _facts(device: torch.device) -> dict[str, str]:
    """What a search is good for: the device, the compiler, and the kernels as they are."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = torch.xpu.get_device_name(device) if device.type == "xpu" else device.type
    try:
        compiler = version("triton")
    except PackageNotFoundError:
        compiler = "none"
    sources = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        sources.update(file.read_bytes())
    return {"device": name, "triton": compiler, "kernels": sources.hexdigest()[:16]}


def neighbours(
    operation: str, device: torch.device, m: int, n: int, k: int, *, bits: int = 8
) -> tuple[Tile, ...]:
    """Tiles that are worth trying: of the tables, with more or fewer warps and stages."""
    machine = machine_of(device)
    deep = family_of(machine.architecture) in _DEEP
    table = TILES[operation]
    first = tile_for(operation, machine, m, n, k, bits=bits)
    tiles = table.get(family_of(machine.architecture), table["other"])
    found = [first, *dict.fromkeys(tiles)]
    for tile in (first, tiles[row_class(m)]):
        found += [replace(tile, stages=stages) for stages in (2, 3, 4)]
        found += [replace(tile, warps=warps) for warps in (4, 8)]
    limit = machine.shared if operation in _PRODUCTS else math.inf
    return tuple(t for t in dict.fromkeys(found) if _shared(t, bits, deep) <= limit)


def search(
    operation: str,
    device: torch.device,
    m: int,
    n: int,
    k: int,
    seconds: Callable[[], float],
    candidates: Iterable[Tile],
) -> Tile:
    """The fastest tile of some for a shape, used from then on and kept where `use_folder` said.

    Args:
        operation, device, m, n, k: As for `tile_for`.
        seconds: Runs the operation with whatever `tile_for` gives, and says how long it took. A
            tile that it raises an error for is passed over.
        candidates: Tiles to try.

    Raises:
        RuntimeError: None of them works.
    """
    machine = machine_of(device)
    key = (machine, _key(operation, m, n, k))
    before = _tuned.get(key)
    times: dict[Tile, float] = {}
    failures: list[str] = []
    try:
        for tile in candidates:
            _tuned[key] = tile
            try:
                times[tile] = seconds()
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # compilers and launches fail in many ways
                failures.append(f"{tile}: {type(error).__name__}: {error}")
    finally:
        if before is None:
            _tuned.pop(key, None)
        else:
            _tuned[key] = before
    if not times:
        raise RuntimeError(f"no tile of {operation} works: " + "; ".join(failures))
    best = _tuned[key] = min(times, key=times.__getitem__)
    if machine in _files:
        _write(_files[machine], machine, device)
    return best


def _write(file: Path, machine: Machine, device: torch.device) -> None:
    tiles = {
        key: dataclasses.asdict(t)
        for (on, key), t in sorted(_tuned.items(), key=_of_key)
        if on == machine
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, scratch = tempfile.mkstemp(dir=file.parent, prefix=".tiles-")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as out:
            json.dump(_facts(device) | {"tiles": tiles}, out, indent=1)
        os.replace(scratch, file)
    except BaseException:
        os.unlink(scratch)
        raise


def _of_key(item: tuple[tuple[Machine, str], Tile]) -> str:
    return item[0][1]
