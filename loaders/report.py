"""What a plan means on a device, as text: scheme, family, formats, sizes, kernels, memory."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass

import torch

from ..kernels.registry import registry
from .layouts.dispatch import capability_of, decide
from .layouts.native import native_format
from .plan import Plan

__all__ = ["DeviceFacts", "InspectReport", "inspect"]

GIB = 2**30


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
    """

    device: torch.device
    name: str
    memory: int
    free: int
    host_memory: int
    reserve: int


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
        verdict: "fits", "streams" or "too big".
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
    text: str


def inspect(
    plan: Plan,
    facts: DeviceFacts,
    matmul: str = "auto",
    backend: str = "auto",
    dtype: torch.dtype = torch.bfloat16,
) -> InspectReport:
    """Read a plan for people.

    Args:
        plan: Of the checkpoint.
        facts: The device.
        matmul, backend: The loader's inputs that the kernels are chosen for.
        dtype: Compute dtype.
    """
    formats = plan.by_format()
    weight_bytes = sum(nbytes for _, _, nbytes in formats.values())
    float_bytes = plan.float_bytes()
    kernels = _kernels(plan, facts, matmul, backend, dtype)
    verdict, why = _verdict(weight_bytes, facts)
    told = {label: text for label, text in plan.contents.facts.items() if text}
    lines = [
        f"{plan.path.name}",
        f"scheme: {plan.detection.scheme} ({'; '.join(plan.detection.evidence)})",
        f"family: {plan.family.display} ({plan.evidence})",
        *(f"{label}: {text}" for label, text in told.items()),
        "",
        f"size: {_size(weight_bytes)}, {_ratio(weight_bytes, float_bytes)} of bf16 "
        f"({_size(float_bytes)})",
        *_table(formats),
        "",
        f"on {facts.name}: {verdict} ({why})",
        *(f"  {count} layers: {line}" for line, count in kernels.items()),
        *_backends(facts.device.type),
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
        "\n".join(lines),
    )


def _table(formats: dict[str, tuple[int, int, int]]) -> list[str]:
    width = max((len(name) for name in formats), default=0)
    return [
        f"  {name:<{width}}  {count:>5} tensors  {elements / 1e6:>10.1f} M values"
        f"  {_size(nbytes):>10}"
        for name, (count, elements, nbytes) in formats.items()
    ]


def _kernels(
    plan: Plan, facts: DeviceFacts, matmul: str, backend: str, dtype: torch.dtype
) -> dict[str, int]:
    """What runs, told once for all layers of a format that run alike."""
    lines: Counter[tuple] = Counter()
    reasons: dict[tuple, str] = defaultdict(str)
    fused = {p.key for move in plan.moves if len(move.pieces) > 1 for p in move.pieces}
    handed: Counter[str] = Counter()
    capability = capability_of(facts.device)
    for entry, (spec, wish) in [(e, part) for e in plan.quantized() for part in e.parts]:
        native = native_format([(spec, wish)], matmul, backend, capability)
        if native is not None and entry.key not in fused and len(entry.parts) == 1:
            handed[f"{spec.format.name}: faithful matmul, by ComfyUI's own {native}"] += 1
            continue
        decision = decide(spec, wish, matmul, backend, facts.device, dtype)
        by = decision.choice.implementation.backend
        key = (spec.format.name, decision.mode, by, decision.reason or "")
        lines[key] += 1
        reasons[key] = decision.reason or "; ".join(
            f"not {name}: {why}" for name, why in decision.choice.refused
        )
    told = dict(handed)
    for (format_, mode, by, _), count in lines.most_common():
        text = "dequantized, then a float matmul" if mode == "dequantize" else f"{mode} matmul"
        native = "emulated in eager torch" if by == "reference" else f"by {by}"
        why = reasons[(format_, mode, by, _)]
        told[f"{format_}: {text}, {native}" + (f" ({why})" if why else "")] = count
    return told


def _verdict(weights: int, facts: DeviceFacts) -> tuple[str, str]:
    if facts.device.type == "cpu":
        room = facts.host_memory
        if weights <= room:
            return "fits", f"{_size(weights)} of {_size(room)} RAM available"
        return "too big", f"needs {_size(weights)}, {_size(room)} RAM available"
    room = facts.memory - facts.reserve
    if weights <= room:
        free = _size(facts.free)
        return "fits", f"{_size(weights)} of {_size(room)} usable VRAM, {free} free now"
    if weights <= facts.host_memory:
        return (
            "streams",
            f"{_size(weights)} exceed {_size(room)} usable VRAM; the rest comes from RAM, "
            f"{_size(facts.host_memory)} available",
        )
    return (
        "too big",
        f"{_size(weights)} exceed {_size(room)} usable VRAM and "
        f"{_size(facts.host_memory)} RAM available",
    )


def _backends(device: str) -> list[str]:
    return [
        f"  backend {name}: {'usable' if why is None else why}"
        for name, why in registry.backend_status(device).items()
    ]


def _size(nbytes: int) -> str:
    return f"{nbytes / GIB:.2f} GiB" if nbytes >= GIB // 10 else f"{nbytes / 2**20:.1f} MiB"


def _ratio(nbytes: int, whole: int) -> str:
    return f"{nbytes / whole:.0%}" if whole else "no share"
