"""What quantizing a model cost: per layer, in total, and what was kept and why."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from .engine import LayerError
from .errors import LowBitError
from .recipe import Recipe

__all__ = ["KeptLayer", "QuantizeReport", "Totals"]

VERSION = 1
MARK = "lowbit_quantize_report"
WORST = 8  # layers with the largest error that the text names


@dataclass(frozen=True)
class KeptLayer:
    """A layer that stayed as it was: why, and its bytes."""

    reason: str
    nbytes: int


@dataclass(frozen=True)
class Totals:
    """Sums over a model.

    Attributes:
        before, after: Bytes of the layers that were quantized.
        kept: Bytes of those that were not.
        relative: Root of the mean squares of the layers' relative errors, by their bytes before.
    """

    layers: int
    before: int
    after: int
    kept_layers: int
    kept: int
    relative: float
    snr: float

    @property
    def ratio(self) -> float:
        """How much smaller the whole model is."""
        after = self.after + self.kept
        return (self.before + self.kept) / after if after else 1.0


@dataclass
class QuantizeReport:
    """Filled layer by layer.

    Attributes:
        recipe: JSON form of the recipe.
        layers: `{name: LayerError}`; a layer that was quantized in parts has one for each, named
            `name[first:last]`.
        kept: `{name: KeptLayer}`.
        dry: Whether sizes are all that is known; errors are then 0 and are not shown.
    """

    recipe: dict[str, Any]
    layers: dict[str, LayerError] = field(default_factory=dict)
    kept: dict[str, KeptLayer] = field(default_factory=dict)
    dry: bool = False
    chart: Any = None

    @classmethod
    def of(cls, recipe: Recipe, *, dry: bool = False) -> QuantizeReport:
        """An empty report on what a recipe does."""
        return cls(recipe.to_json(), dry=dry)

    def add(self, name: str, error: LayerError) -> None:
        """A layer that was quantized."""
        self.layers[name] = error

    def plan(self, name: str, method: str, dtype: str, group: int, before: int, after: int) -> None:
        """A layer that would be quantized, in a dry run."""
        self.layers[name] = LayerError(method, dtype, group, before, after, 0.0, math.inf, 0.0)

    def keep(self, name: str, reason: str, nbytes: int) -> None:
        """A layer that stays as it is."""
        self.kept[name] = KeptLayer(reason, nbytes)

    # what it says

    @property
    def totals(self) -> Totals:
        layers = self.layers.values()
        before = sum(layer.before for layer in layers)
        squares = sum(layer.before * layer.relative**2 for layer in layers)
        relative = math.sqrt(squares / before) if before else 0.0
        return Totals(
            layers=len(self.layers),
            before=before,
            after=sum(layer.after for layer in layers),
            kept_layers=len(self.kept),
            kept=sum(layer.nbytes for layer in self.kept.values()),
            relative=relative,
            snr=-20 * math.log10(relative) if relative else math.inf,
        )

    @property
    def worst(self) -> list[tuple[str, LayerError]]:
        """Layers by their relative error, the largest first."""
        return sorted(self.layers.items(), key=lambda item: -item[1].relative)

    @property
    def text(self) -> str:
        """For people."""
        totals = self.totals
        lines = [Recipe.from_json(self.recipe).describe()]
        lines.append(
            f"{totals.layers} layers: {_size(totals.before)} -> {_size(totals.after)}; "
            f"{totals.kept_layers} kept: {_size(totals.kept)}; "
            f"the whole is {totals.ratio:.2f} times smaller"
        )
        if self.layers and not self.dry:
            lines.append(
                f"relative error {totals.relative:.4f}, {totals.snr:.1f} dB above the noise"
            )
        lines += ["", "formats:"]
        lines += [f"  {count} of {name}" for name, count in self._formats().most_common()]
        if self.layers and not self.dry:
            shown = self.worst[:WORST]
            lines += ["", "largest errors:" if len(self.layers) > WORST else "errors:"]
            lines += _table([_row(name, error) for name, error in shown])
        if self.kept:
            lines += ["", "kept:"]
            for reason, count in Counter(k.reason for k in self.kept.values()).most_common():
                names = [name for name, kept in self.kept.items() if kept.reason == reason]
                more = f" and {count - 3} more" if count > 3 else ""
                lines.append(f"  {reason}: {', '.join(names[:3])}{more}")
        return "\n".join(lines)

    def _formats(self) -> Counter:
        return Counter(
            f"{e.dtype}, {_group(e.group)}" + (f", rank {e.rank}" if e.rank else "")
            for e in self.layers.values()
        )

    def table(self) -> str:
        """Every layer, as text."""
        return "\n".join(_table([_row(name, error) for name, error in self.layers.items()]))

    # JSON

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values; an infinite ratio of signal to noise is null."""
        totals = self.totals
        return {
            MARK: VERSION,
            "recipe": self.recipe,
            "dry": self.dry,
            "totals": _plain(asdict(totals)) | {"ratio": totals.ratio},
            "layers": {name: _plain(asdict(error)) for name, error in self.layers.items()},
            "kept": {name: asdict(kept) for name, kept in self.kept.items()},
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> QuantizeReport:
        """The report of its JSON form.

        Raises:
            LowBitError: It is none.
        """
        if not isinstance(data, Mapping) or data.get(MARK) != VERSION:
            raise LowBitError(
                "This is no report on quantizing that this pack knows.",
                found=data.get(MARK) if isinstance(data, Mapping) else type(data).__name__,
                expected=f"a JSON object with {MARK} {VERSION}",
            )
        layers = {}
        for name, told in data["layers"].items():
            snr = math.inf if told["snr"] is None else told["snr"]
            layers[name] = LayerError(**{**told, "snr": snr})
        kept = {name: KeptLayer(**told) for name, told in data["kept"].items()}
        return cls(dict(data["recipe"]), layers, kept, data["dry"])


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {
        name: None if isinstance(value, float) and math.isinf(value) else value
        for name, value in values.items()
    }


def _size(nbytes: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if nbytes < 1000 or unit == "GB":
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.2f} {unit}"
        nbytes /= 1000
    raise AssertionError


def _group(group: int) -> str:
    return {0: "one scale a row", -1: "one scale"}.get(group, f"groups of {group}")


def _row(name: str, error: LayerError) -> tuple[str, ...]:
    told = (
        name,
        error.dtype,
        f"{_size(error.before)} -> {_size(error.after)}",
        f"error {error.relative:.4f}",
        f"{error.snr:.1f} dB",
        f"max {error.largest:.3g}",
    )
    return told if error.weighted is None else (*told, f"weighted {error.weighted:.4f}")


def _table(rows: Iterable[tuple[str, ...]]) -> list[str]:
    rows = list(rows)
    widths = [
        max(len(row[column]) for row in rows if len(row) > column)
        for column in range(max((len(row) for row in rows), default=0))
    ]
    padded = ([cell.ljust(width) for cell, width in zip(row, widths, strict=False)] for row in rows)
    return ["  " + "  ".join(cells).rstrip() for cells in padded]
