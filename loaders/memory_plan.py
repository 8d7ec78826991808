"""What a model needs of a device's memory, for each offload mode, told before it is loaded.

========== ==================================================================================
mode       weights
========== ==================================================================================
auto       as many as fit stay on the device, the others stream: ComfyUI's own management
resident   all stay on the device
model      all are on the device while it samples, none afterwards
layerwise  as many as a budget allows stay, the others stream
sequential none stays, every layer streams
========== ==================================================================================

Beside the weights lie the buffers that layers stream through, and what a pass works in: its
activations and the largest layer as floats.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass

import torch

from ..quant.errors import LowBitError
from .charts import Bars, Chart

__all__ = [
    "MODES",
    "DeviceFacts",
    "MemoryPlan",
    "ModePlan",
    "Weights",
    "budget_of",
    "make_memory_plan",
    "size",
]

MODES = ("auto", "resident", "model", "layerwise", "sequential")
GIB = 2**30
BLOCK = re.compile(r"(?P<block>(?:[^.]+\.)+?\d+)\.(?P<layer>.+)\.[^.]+")


@dataclass(frozen=True)
class DeviceFacts:
    """The device a model would run on.

    Attributes:
        device: The device.
        name: As people call it.
        memory: Bytes of its memory in all.
        free: Bytes free now.
        host_memory: Bytes of RAM available for weights that do not stay on the device.
        reserve: Bytes that the host keeps for activations and other programs.
        streams: Layers that the host has on their way to the device at a time.
    """

    device: torch.device
    name: str
    memory: int
    free: int
    host_memory: int
    reserve: int
    streams: int = 2


@dataclass(frozen=True)
class Weights:
    """Sizes of a model's weights.

    Attributes:
        total: Bytes of all.
        blocks: Bytes of each repeated block, in order.
        largest: Bytes of the largest layer.
        widest: Bytes of the largest layer as floats of the compute dtype.
    """

    total: int
    blocks: tuple[int, ...]
    largest: int
    widest: int

    @classmethod
    def of(cls, tensors: Iterable[tuple[str, int, int]], itemsize: int) -> Weights:
        """Count them.

        Args:
            tensors: ``(native name, elements, bytes)`` of each.
            itemsize: Bytes of a float of the compute dtype.
        """
        total, widest = 0, 0
        layers: dict[str, int] = defaultdict(int)
        blocks: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
        for name, elements, nbytes in tensors:
            total += nbytes
            widest = max(widest, elements * itemsize)
            layers[name.rpartition(".")[0]] += nbytes
            if found := BLOCK.fullmatch(name):
                blocks[found["block"]][found["layer"]] += nbytes
        # A numbered name with a single layer under it is a step of a Sequential, not a block.
        sizes = tuple(sum(inner.values()) for inner in blocks.values() if len(inner) > 1)
        return cls(total, sizes, max(layers.values(), default=0), widest)

    def with_blocks(self, count: int) -> int:
        """Bytes of ``count`` blocks, the largest first, and of all that is in no block."""
        return self.total - sum(sorted(self.blocks, reverse=True)[count:])


@dataclass(frozen=True)
class ModePlan:
    """One mode on one device.

    Attributes:
        mode: One of ``MODES``.
        resident: Bytes of weights that stay on the device.
        streamed: Bytes of weights that come from RAM in every pass.
        buffers: Bytes that they stream through.
        peak: Bytes of all of it, and of what a pass works in.
        verdict: "fits", "streams" or "too big".
    """

    mode: str
    resident: int
    streamed: int
    buffers: int
    peak: int
    verdict: str


@dataclass(frozen=True)
class MemoryPlan:
    """Every mode on one device, before anything is loaded.

    Attributes:
        device: As people call it.
        memory: Bytes that it has; of a CPU, the RAM available.
        usable: Bytes of it that weights and buffers may have.
        weights: Their sizes.
        activations: Bytes, by ComfyUI's own estimate; None where there is none.
        assumed: The picture or clip that the estimate is for.
        modes: Every mode, in the order of ``MODES``.
    """

    device: str
    memory: int
    usable: int
    weights: Weights
    activations: int | None
    assumed: str
    modes: tuple[ModePlan, ...]

    def mode(self, name: str) -> ModePlan:
        """One of the modes."""
        return self.modes[MODES.index(name)]

    def to_json(self) -> dict:
        """Plain JSON values."""
        return asdict(self)

    @property
    def text(self) -> str:
        """A table for people."""
        told = f"{size(self.activations)} at {self.assumed}" if self.activations else "unknown"
        head = ("mode", "resident", "streamed", "buffers", "peak", "verdict")
        rows = [
            (m.mode, *map(size, (m.resident, m.streamed, m.buffers, m.peak)), m.verdict)
            for m in self.modes
        ]
        columns = list(zip(head, *rows, strict=True))
        widths = [max(map(len, column)) for column in columns]
        lines = [
            "  ".join(
                cell.ljust(width) if place in (0, len(row) - 1) else cell.rjust(width)
                for place, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in (head, *rows)
        ]
        return "\n".join(
            [
                f"memory of {self.device}: {size(self.memory)}, "
                f"{size(self.usable)} for weights and buffers",
                f"  activations: {told}; largest layer as floats: {size(self.weights.widest)}",
                *(f"  {line}" for line in lines),
            ]
        )

    @property
    def bars(self) -> Bars:
        """The same as a panel of a chart."""
        working = "activations and a float layer"
        rows = [
            (
                f"{m.mode}: {m.verdict}",
                (
                    ("weights that stay", m.resident),
                    ("buffers", m.buffers),
                    (working, m.peak - m.resident - m.buffers),
                ),
            )
            for m in self.modes
        ]
        title = f"Memory of {self.device}"
        return Bars(title, "bytes", rows, limit=("has", self.memory))

    @property
    def chart(self) -> Chart:
        """A picture of the plan alone."""
        rows = [(m.mode, (("", m.streamed),)) for m in self.modes]
        streamed = Bars("Weights from RAM in every pass", "bytes", rows)
        return Chart(f"Memory plan: {size(self.weights.total)} of weights", [self.bars, streamed])


def make_memory_plan(
    weights: Weights,
    facts: DeviceFacts,
    activations: int | None = None,
    assumed: str = "",
    budget: int | None = None,
    forced: str | None = None,
) -> MemoryPlan:
    """Plan every mode.

    Args:
        weights: Of the model.
        facts: Of the device.
        activations: Estimate of what a pass works in, the float layer left out.
        assumed: What the estimate is for.
        budget: Bytes that weights and buffers may have in the mode "layerwise"; all that is in no
            block where None.
        forced: The mode that a global setting of the host makes of every other.
    """
    working = (activations or 0) + weights.widest
    if facts.device.type == "cpu":
        return _on_cpu(weights, facts, working, activations, assumed)
    room = max(0, facts.memory - max(facts.reserve, working))
    if budget is None:
        budget = weights.with_blocks(0) + _buffers(weights, facts)
    limits = {
        "auto": room,
        "resident": weights.total,
        "model": weights.total,
        "layerwise": min(budget, room),
        "sequential": 0,
    }
    plans = tuple(
        _one(mode, limits[forced or mode], weights, facts, room, working) for mode in MODES
    )
    return MemoryPlan(facts.name, facts.memory, room, weights, activations, assumed, plans)


def _on_cpu(weights, facts, working, activations, assumed) -> MemoryPlan:
    """RAM holds the weights in every mode; nothing goes anywhere."""
    room = max(0, facts.host_memory - working)
    verdict = "fits" if weights.total <= room else "too big"
    plans = tuple(
        ModePlan(mode, weights.total, 0, 0, weights.total + working, verdict) for mode in MODES
    )
    return MemoryPlan(facts.name, facts.host_memory, room, weights, activations, assumed, plans)


def _buffers(weights: Weights, facts: DeviceFacts) -> int:
    return min(max(1, facts.streams) * weights.largest, weights.total)


def _one(
    mode: str, limit: int, weights: Weights, facts: DeviceFacts, room: int, working: int
) -> ModePlan:
    """A mode whose weights and buffers may take ``limit`` bytes."""
    if weights.total <= limit:
        verdict = "fits" if weights.total <= room else "too big"
        return ModePlan(mode, weights.total, 0, 0, weights.total + working, verdict)
    buffers = _buffers(weights, facts)
    resident = max(0, limit - buffers)
    streamed = weights.total - resident
    possible = weights.largest <= room and weights.total <= facts.host_memory
    verdict = "streams" if possible else "too big"
    return ModePlan(mode, resident, streamed, buffers, resident + buffers + working, verdict)


def budget_of(weights: Weights, facts: DeviceFacts, gigabytes: float, blocks: int) -> int:
    """Bytes for weights and buffers in the mode "layerwise".

    Args:
        weights: Of the model.
        facts: Of the device.
        gigabytes: What the user allows in GiB; 0 for what the blocks need.
        blocks: Blocks that the user wants on the device; with a budget too, the smaller one holds.

    Raises:
        LowBitError: More blocks than the model has.
    """
    if blocks > len(weights.blocks):
        raise LowBitError(
            "The model has fewer blocks than are to stay on the device.",
            found=f"blocks_on_gpu {blocks}",
            expected=f"0 to {len(weights.blocks)}",
            remedy='Lower blocks_on_gpu, or set mode to "resident" to keep the whole model.',
        )
    if gigabytes and not blocks:
        return int(gigabytes * GIB)
    kept = weights.with_blocks(blocks)
    if kept < weights.total:
        kept += _buffers(weights, facts)
    return min(int(gigabytes * GIB), kept) if gigabytes else kept


def size(nbytes: float) -> str:
    """Bytes for people."""
    return f"{nbytes / GIB:.2f} GiB" if nbytes >= GIB // 10 else f"{nbytes / 2**20:.1f} MiB"
