"""What a loaded MODEL is and does here, for people, as JSON and as a picture."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field

import torch

from .charts import Bars, Chart
from .kernel_lines import kernel_lines
from .layouts.composite import CompositeSpec
from .layouts.dispatch import decide
from .memory_plan import MemoryPlan, size

__all__ = ["Carried", "LoadedWeight", "LoraMatch", "ModelFacts", "ModelReport"]

GROUPS = 8
LISTED = 12


@dataclass(frozen=True)
class LoadedWeight:
    """One parameter of a loaded model.

    Attributes:
        name: Native key in the diffusion model.
        kind: "linear", "convolution", "embedding" or "other".
        shape: Logical shape.
        nbytes: Bytes that it is held in.
        format: Code formats of its parts, the host's own name of its format, or its dtype.
        spec: Of a composite weight of this pack, else None.
        native: In one of the host's own quantized formats.
        asked: The matmul and backend that a Linear of this pack was made for.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    nbytes: int
    format: str
    spec: CompositeSpec | None = None
    native: bool = False
    asked: tuple[str, str] = ("auto", "auto")


@dataclass(frozen=True)
class Carried:
    """Patches of one kind that are carried alike.

    Attributes:
        kind: "lora", "lokr", "diff" …
        carried: How: "side matmul", "dequantized weight", "svd branch" …
        strength: As the node that put them there has it.
        weights: How many weights have one.
        added_bytes: Beside the weights.
        retained: Least share of a change's energy that is kept, where it is cut to a low rank;
            None before that was calculated, and where all is kept.
    """

    kind: str
    carried: str
    strength: float
    weights: int
    added_bytes: int
    retained: float | None


@dataclass(frozen=True)
class LoraMatch:
    """What a LoRA file would do to a MODEL.

    Attributes:
        name: Of the file.
        tensors: In the file.
        kinds: ``{kind of adapter: weights of the model that get one}``.
        targets: Weights of the model that would change.
        missed: ``{pattern of layers that nothing asks for: tensors}``, numbers as ``*``.
        nearest: ``{such a pattern: patterns that the host does know, nearest first}``.
        misfits: ``{target: why}`` of what the host would leave out.
        text_encoder: Tensors for a text encoder, which a MODEL does not have.
        strengths: At which the MODEL carries this very file; empty where it does not.
    """

    name: str
    tensors: int
    kinds: Mapping[str, int]
    targets: tuple[str, ...]
    missed: Mapping[str, int]
    nearest: Mapping[str, tuple[str, ...]]
    misfits: Mapping[str, str]
    text_encoder: int
    strengths: tuple[float, ...]

    @property
    def hit(self) -> int:
        """Tensors that the host reads."""
        return self.tensors - self.text_encoder - sum(self.missed.values())

    def lines(self) -> list[str]:
        """The same for people."""
        at = " and ".join(f"{strength:g}" for strength in self.strengths)
        there = f"on this MODEL at strength {at}" if at else "not on this MODEL"
        told = [
            f"LoRA file {self.name}: {self.hit} of {self.tensors} tensors name layers of it "
            f"({there})",
            *(f"  {_weights(count)}: {kind}" for kind, count in self.kinds.items()),
        ]
        if self.text_encoder:
            told.append(f"  {self.text_encoder} tensors are for a text encoder, not for a MODEL")
        if self.missed:
            told.append(f"  {sum(self.missed.values())} tensors name no layer of this model:")
        for pattern, count in _first(self.missed.items()):
            near = " or ".join(self.nearest.get(pattern, ()))
            told.append(f"    {pattern} ({count})" + (f"; nearest: {near}" if near else ""))
        if len(self.missed) > LISTED:
            told.append(f"    and {len(self.missed) - LISTED} more patterns of names")
        if self.misfits:
            told.append(f"  left out by ComfyUI, {_weights(len(self.misfits))}:")
            told += [f"    {key} {why}" for key, why in _first(self.misfits.items())]
        return told


@dataclass(frozen=True)
class ModelFacts:
    """What was read off a MODEL.

    Attributes:
        name: Of the checkpoint, or of the model's class where nothing else is known.
        ours: Whether this pack loaded it.
        loaded: ``{setting: value}`` of the loader.
        notes: ``{what was decided or changed while loading: layers}``.
        device: It runs on.
        dtype: Of activations.
        weights: Every parameter.
        plan: Memory in every offload mode.
        measured: ``Measured.to_json()`` of loaders/host/memory.py, and its text.
        carried: Patches on its weights.
        hooks: Weights that model hooks change while sampling.
        injections: Names of what is injected while sampling (bypass LoRAs).
        lora: A LoRA file that was asked about.
    """

    name: str
    ours: bool
    loaded: Mapping[str, str]
    notes: Mapping[str, int]
    device: torch.device
    dtype: torch.dtype
    weights: Sequence[LoadedWeight]
    plan: MemoryPlan
    measured: tuple[dict, str]
    carried: Sequence[Carried] = ()
    hooks: int = 0
    injections: tuple[str, ...] = ()
    lora: LoraMatch | None = None


@dataclass(frozen=True)
class ModelReport:
    """A report on a MODEL: a LOWBIT_REPORT.

    Attributes:
        facts: All of it.
        kernels: ``{line: layers}`` of what runs on the device.
        formats: ``{format: (weights, elements, bytes)}``.
        joined: ``{how parts were joined: layers}``.
        handed: ``{the host's format: layers}`` of those that the host itself computes.
    """

    facts: ModelFacts
    kernels: Mapping[str, int] = field(init=False)
    formats: Mapping[str, tuple[int, int, int]] = field(init=False)
    joined: Mapping[str, int] = field(init=False)
    handed: Mapping[str, int] = field(init=False)

    def __post_init__(self) -> None:
        weights = self.facts.weights
        object.__setattr__(self, "kernels", _kernels(self.facts))
        object.__setattr__(self, "formats", _formats(weights))
        object.__setattr__(self, "joined", _joined(weights))
        object.__setattr__(self, "handed", Counter(w.format for w in weights if w.native))

    @property
    def nbytes(self) -> int:
        """Bytes of all weights as they are held."""
        return sum(weight.nbytes for weight in self.facts.weights)

    @property
    def float_bytes(self) -> int:
        """Bytes of the same model in bf16."""
        return 2 * sum(math.prod(weight.shape) for weight in self.facts.weights)

    @property
    def text(self) -> str:
        """All of it for people."""
        facts = self.facts
        share = f"{self.nbytes / self.float_bytes:.0%}" if self.float_bytes else "no share"
        lines = [facts.name]
        if not facts.ours:
            lines.append(
                "This MODEL was not loaded by LowBit: what follows is how ComfyUI holds it."
            )
        lines += [f"{setting}: {value}" for setting, value in facts.loaded.items()]
        lines += [
            f"compute dtype: {str(facts.dtype).removeprefix('torch.')}",
            "",
            f"size: {size(self.nbytes)}, {share} of bf16 ({size(self.float_bytes)})",
            *self._format_lines(),
            "",
            f"kernels on {facts.plan.device}:",
            *(_counted(self.kernels) or ["  floats only, by ComfyUI's own operations"]),
        ]
        if self.joined:
            lines += ["", "fused, each part in its own format:"]
            lines += _counted(dict(_first(self.joined.items())))
            if len(self.joined) > LISTED:
                lines.append(f"  and {len(self.joined) - LISTED} more kinds")
        if self.handed and facts.ours:
            lines += ["", "handed over to ComfyUI, which computes the same numbers faster here:"]
            lines += _counted(self.handed)
        if facts.notes:
            lines += ["", "changed or decided while loading:"]
            lines += _counted(facts.notes)
        lines += ["", facts.measured[1], "", *self._lora_lines()]
        return "\n".join(lines)

    def _format_lines(self) -> list[str]:
        width = max(map(len, self.formats), default=0)
        return [
            f"  {name:<{width}}  {count:>5} weights  {elements / 1e6:>10.1f} M values"
            f"  {size(nbytes):>10}"
            for name, (count, elements, nbytes) in self.formats.items()
        ]

    def _lora_lines(self) -> list[str]:
        facts = self.facts
        added = sum(item.added_bytes for item in facts.carried)
        lines = [f"patches (LoRA and the like): {size(added)} beside the weights"]
        for item in facts.carried:
            kept = "" if item.retained is None else f", at least {item.retained:.2%} of its energy"
            lines.append(
                f"  {_weights(item.weights)}: {item.kind} at strength {item.strength:g}, by "
                f"{item.carried}, {size(item.added_bytes)}{kept}"
            )
        if not facts.carried:
            lines = ["patches (LoRA and the like): none"]
        if facts.hooks:
            lines.append(f"  {_weights(facts.hooks)}: changed by model hooks while sampling")
        if facts.injections:
            lines.append(f"  injected while sampling: {', '.join(facts.injections)}")
        if facts.lora is not None:
            lines += ["", *facts.lora.lines()]
        return lines

    def to_json(self) -> dict:
        """Plain JSON values."""
        facts = self.facts
        lora = None
        if facts.lora is not None:
            lora = asdict(facts.lora) | {"hit": facts.lora.hit}
            lora["missed"], lora["kinds"] = dict(facts.lora.missed), dict(facts.lora.kinds)
            lora["targets"], lora["strengths"] = map(
                list, (facts.lora.targets, facts.lora.strengths)
            )
            lora["nearest"] = {key: list(names) for key, names in facts.lora.nearest.items()}
        return {
            "kind": "model",
            "name": facts.name,
            "loaded_by_lowbit": facts.ours,
            "loaded": dict(facts.loaded),
            "notes": dict(facts.notes),
            "device": str(facts.device),
            "compute_dtype": str(facts.dtype).removeprefix("torch."),
            "bytes": self.nbytes,
            "bf16_bytes": self.float_bytes,
            "formats": {name: list(counts) for name, counts in self.formats.items()},
            "kernels": dict(self.kernels),
            "fused": dict(self.joined),
            "handed_over": dict(self.handed),
            "memory_plan": facts.plan.to_json(),
            "memory": facts.measured[0],
            "patches": [asdict(item) for item in facts.carried],
            "hooked_weights": facts.hooks,
            "injections": list(facts.injections),
            "lora_file": lora,
        }

    @property
    def chart(self) -> Chart:
        """Where the bytes are, what the device has for them, and what LoRAs add."""
        facts = self.facts
        found = facts.measured[0]
        where = (("resident", found["resident"]), ("not resident", found["streamed"]))
        rows = [*_groups(facts.weights), ("all in bf16", (("in bf16", self.float_bytes),))]
        panels = [
            Bars("Weights by part of the model and format", "bytes", rows),
            Bars(f"Weights on {found['device']}", "bytes", [("weights", where)]),
            facts.plan.bars,
        ]
        if facts.carried:
            rows = [
                (f"{item.kind} x {item.strength:g}", ((item.carried, item.added_bytes),))
                for item in facts.carried
            ]
            panels.append(Bars("Bytes that LoRAs and other patches add", "bytes", rows))
        return Chart(f"Report on {facts.name}", panels)


def _counted(layers: Mapping[str, int]) -> list[str]:
    return [f"  {count} layer{'s' * (count != 1)}: {line}" for line, count in layers.items()]


def _weights(count: int) -> str:
    return f"{count} weight{'s' * (count != 1)}"


def _first(items: Iterable) -> list:
    return list(items)[:LISTED]


def _kernels(facts: ModelFacts) -> dict[str, int]:
    """What runs for each kind of layer. Floats are the host's and are not told."""
    linear, other = [], Counter()
    for weight in facts.weights:
        if weight.native:
            other[f"{weight.format}: {weight.kind} by ComfyUI's own kernels"] += 1
        elif weight.spec is not None and weight.kind == "linear":
            for part in weight.spec.parts:
                made = (part.weight, part.wish, *weight.asked, facts.device, facts.dtype)
                linear.append((part.weight.format.name, decide(*made, part.scaled)))
        elif weight.spec is not None:
            how = (
                "the rows looked up are dequantized"
                if weight.kind == "embedding"
                else ("dequantized, then a float " + weight.kind)
            )
            other[f"{weight.format}: {how}"] += 1
    return kernel_lines(linear) | dict(other)


def _formats(weights: Iterable[LoadedWeight]) -> dict[str, tuple[int, int, int]]:
    found: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    for weight in weights:
        counts = (1, math.prod(weight.shape), weight.nbytes)
        found[weight.format] = [a + b for a, b in zip(found[weight.format], counts, strict=True)]
    ranked = sorted(found.items(), key=lambda item: -item[1][2])
    return {name: tuple(counts) for name, counts in ranked}


def _joined(weights: Iterable[LoadedWeight]) -> dict[str, int]:
    """Layers made of several parts of the file, told once for all blocks."""
    found: Counter[str] = Counter()
    for weight in weights:
        if weight.spec is None or len(weight.spec.parts) == 1:
            continue
        layer = re.sub(r"\b\d+\b", "*", weight.name.removesuffix(".weight"))
        along = "rows" if weight.spec.axis == 0 else "columns"
        parts = ", ".join(
            f"{part.name.rpartition('.')[2] if '.' in part.name else part.name}"
            f" {part.weight.format.name if part.scaled else 'float'}"
            for part in weight.spec.parts
        )
        found[f"{layer} of {len(weight.spec.parts)} parts along {along}: {parts}"] += 1
    return dict(found.most_common())


def _groups(weights: Iterable[LoadedWeight]) -> list[tuple[str, list[tuple[str, int]]]]:
    """Bytes of each format in the largest parts of the model, the others together."""
    sums: dict[str, Counter[str]] = defaultdict(Counter)
    for weight in weights:
        sums[weight.name.partition(".")[0]][weight.format] += weight.nbytes
    ranked = sorted(sums, key=lambda group: -sums[group].total())
    rows = [(group, sums[group].most_common()) for group in ranked[:GROUPS]]
    rest = sum((sums[group] for group in ranked[GROUPS:]), Counter())
    return [*rows, (f"{len(ranked) - GROUPS} more", rest.most_common())] if rest else rows
