"""What a plan means on a device, as text: scheme, family, formats, sizes, kernels, memory."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, fields

import torch

from ..kernels.registry import registry
from .charts import Bars, Chart
from .kernel_lines import device_lines, kernel_lines
from .layouts.dispatch import capability_of, decide
from .layouts.native import native_format
from .memory_plan import DeviceFacts, MemoryPlan, Weights, make_memory_plan, size
from .plan import Plan

__all__ = ["DeviceFacts", "InspectReport", "inspect"]


@dataclass(frozen=True)
class InspectReport:
    """Facts of a checkpoint on a device, and the same as text.

    Attributes:
        scheme, family: What was detected.
        evidence: Why.
        facts: ``{label: text}``, what the scheme tells of the file: SVDQuant its precision, ranks,
            unsigned and W4A16 layers, and what the file says of itself.
        notes: ``{what was decided or assumed, by which evidence: layers}``.
        formats: ``{format: (tensors, elements, bytes)}``.
        weight_bytes: Bytes as loaded.
        float_bytes: Bytes of the same model in bf16.
        kernels: ``{line: layers}`` of what runs on this device.
        verdict: "fits", "streams" or "too big", as ComfyUI would manage it by itself.
        memory: The same for every offload mode.
        text: All of it for people.
    """

    scheme: str
    family: str
    evidence: tuple[str, ...]
    facts: dict[str, str]
    notes: dict[str, int]
    formats: dict[str, tuple[int, int, int]]
    weight_bytes: int
    float_bytes: int
    kernels: dict[str, int]
    verdict: str
    memory: MemoryPlan
    text: str

    def to_json(self) -> dict:
        """Plain JSON values."""
        plain = {field.name: getattr(self, field.name) for field in fields(self)}
        return plain | {
            "evidence": list(self.evidence),
            "formats": {name: list(counts) for name, counts in self.formats.items()},
            "memory": self.memory.to_json(),
        }

    @property
    def chart(self) -> Chart:
        """Sizes by format, and the memory that each offload mode takes."""
        rows = [(name, (("", nbytes),)) for name, (_, _, nbytes) in self.formats.items()]
        return Chart(
            f"{self.family}, {self.scheme}: {size(self.weight_bytes)}",
            [
                Bars("Size by format", "bytes", rows, limit=("bf16", self.float_bytes)),
                *self.memory.chart.panels,
            ],
        )


def inspect(
    plan: Plan,
    facts: DeviceFacts,
    matmul: str = "auto",
    backend: str = "auto",
    dtype: torch.dtype = torch.bfloat16,
    activations: tuple[int | None, str] = (None, ""),
) -> InspectReport:
    """Read a plan for people.

    Args:
        plan: Of the checkpoint.
        facts: The device.
        matmul, backend: The loader's inputs that the kernels are chosen for.
        dtype: Compute dtype.
        activations: The host's estimate of their bytes, and the picture it is for.
    """
    formats = plan.by_format()
    weight_bytes = sum(nbytes for _, _, nbytes in formats.values())
    float_bytes = plan.float_bytes()
    kernels = _kernels(plan, facts, matmul, backend, dtype)
    memory = make_memory_plan(_weights(plan, dtype), facts, *activations)
    verdict = memory.mode("auto").verdict
    told = {label: text for label, text in plan.contents.facts.items() if text}
    lines = [
        f"{plan.path.name}",
        f"scheme: {plan.detection.scheme} ({'; '.join(plan.detection.evidence)})",
        f"family: {plan.family.display} ({plan.evidence})",
        *(f"{label}: {text}" for label, text in told.items()),
        "",
        f"size: {size(weight_bytes)}, {_ratio(weight_bytes, float_bytes)} of bf16 "
        f"({size(float_bytes)})",
        *_table(formats),
        "",
        f"on {facts.name}: {verdict} ({_why(memory, facts)})",
        *(f"  {count} layers: {line}" for line, count in kernels.items()),
        *_backends(facts.device.type),
        *(f"  {line}" for line in device_lines(facts.device, dtype)),
        "",
        memory.text,
    ]
    notes = Counter(note for entry in plan.entries.values() for note in entry.notes)
    lines += [f"assumed for {count} layers: {note}" for note, count in notes.items()]
    if plan.ignored or plan.contents.ignored:
        reasons = Counter([*plan.ignored.values(), *plan.contents.ignored.values()])
        lines += ["", *(f"left out, {count} tensors: {why}" for why, count in reasons.items())]
    return InspectReport(
        plan.detection.scheme,
        plan.family.display,
        plan.detection.evidence,
        told,
        dict(notes),
        formats,
        weight_bytes,
        float_bytes,
        kernels,
        verdict,
        memory,
        "\n".join(lines),
    )


def _table(formats: dict[str, tuple[int, int, int]]) -> list[str]:
    width = max((len(name) for name in formats), default=0)
    return [
        f"  {name:<{width}}  {count:>5} tensors  {elements / 1e6:>10.1f} M values"
        f"  {size(nbytes):>10}"
        for name, (count, elements, nbytes) in formats.items()
    ]


def _kernels(
    plan: Plan, facts: DeviceFacts, matmul: str, backend: str, dtype: torch.dtype
) -> dict[str, int]:
    """What runs on the device, layers that are handed to the host among them."""
    decided = []
    fused = {p.key for move in plan.moves if len(move.pieces) > 1 for p in move.pieces}
    handed: Counter[str] = Counter()
    capability = capability_of(facts.device)
    for entry, (spec, wish) in [(e, part) for e in plan.quantized() for part in e.parts]:
        native = native_format([(spec, wish)], matmul, backend, capability)
        if native is not None and entry.key not in fused and len(entry.parts) == 1:
            handed[f"{spec.format.name}: faithful matmul, by ComfyUI's own {native}"] += 1
            continue
        decided.append((spec.format.name, decide(spec, wish, matmul, backend, facts.device, dtype)))
    return dict(handed) | kernel_lines(decided)


def _weights(plan: Plan, dtype: torch.dtype) -> Weights:
    return Weights.of(
        (
            (name, math.prod(shape) if shape else 0, nbytes)
            for name, (shape, nbytes) in plan.native().items()
        ),
        dtype.itemsize,
    )


def _why(memory: MemoryPlan, facts: DeviceFacts) -> str:
    weights, usable = size(memory.weights.total), size(memory.usable)
    if facts.device.type == "cpu":
        return f"{weights} of weights, RAM for {usable} available"
    if memory.mode("auto").verdict == "fits":
        return f"{weights} of {usable} usable VRAM, {size(facts.free)} free now"
    rest = f"{size(facts.host_memory)} of RAM available"
    if memory.mode("auto").verdict == "streams":
        return f"{weights} exceed {usable} usable VRAM; the rest comes from RAM, {rest}"
    return f"{weights} exceed {usable} usable VRAM and what can be streamed, {rest}"


def _backends(device: str) -> list[str]:
    return [
        f"  backend {name}: {'usable' if why is None else why}"
        for name, why in registry.backend_status(device).items()
    ]


def _ratio(nbytes: int, whole: int) -> str:
    return f"{nbytes / whole:.0%}" if whole else "no share"
