"""Two models on the same noise and prompt: how far apart, step by step, and what each costs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .charts import Bars, Chart, Points
from .memory_plan import size

__all__ = ["CompareReport", "Sampled", "difference", "psnr"]


@dataclass(frozen=True)
class Sampled:
    """One model's sampling.

    Attributes:
        name: Of the model.
        nbytes: Of its weights.
        steps: The denoised latent after each step, float32 ``[elements]``, on the CPU.
        seconds: Time from each step to the next; the first one, which loads, is not among them.
        result: The latent in the end, float32 ``[elements]``, on the CPU.
    """

    name: str
    nbytes: int
    steps: Sequence[torch.Tensor]
    seconds: Sequence[float]
    result: torch.Tensor

    @property
    def pace(self) -> float | None:
        """Seconds of a step; None of a single one."""
        return statistics.median(self.seconds) if self.seconds else None


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """Length of the difference relative to that of the first; 0 where they are equal."""
    apart = torch.linalg.vector_norm((one - other).double())
    length = torch.linalg.vector_norm(one.double())
    return float(apart / length) if apart else 0.0


def psnr(one: torch.Tensor, other: torch.Tensor) -> float | None:
    """Peak signal to noise of pictures from 0 to 1, in dB; None where they are equal."""
    error = float(((one - other).double() ** 2).mean())
    return -10 * math.log10(error) if error else None


@dataclass(frozen=True)
class CompareReport:
    """How two models differ: a LOWBIT_REPORT.

    Attributes:
        one, other: Their sampling; the first is what the other is compared with.
        settings: ``{input: value}`` that both were sampled with.
        picture: PSNR of the decoded pictures in dB, None where they are equal.
        decoded: Whether they were decoded.
    """

    one: Sampled
    other: Sampled
    settings: dict[str, str | int | float]
    picture: float | None = None
    decoded: bool = False

    @property
    def by_step(self) -> list[float]:
        """Relative difference of the denoised latents after each step.

        Samplers that choose their steps may take more of them for one model: those are left out.
        """
        return [difference(*pair) for pair in zip(self.one.steps, self.other.steps, strict=False)]

    @property
    def of_result(self) -> float:
        """Relative difference of the results."""
        return difference(self.one.result, self.other.result)

    @property
    def text(self) -> str:
        """All of it for people."""
        found = self.by_step
        lines = [
            f"A: {self.one.name}, {size(self.one.nbytes)}{_pace(self.one)}",
            f"B: {self.other.name}, {size(self.other.nbytes)}{_pace(self.other)}",
            "both with " + ", ".join(f"{name} {value}" for name, value in self.settings.items()),
            "",
        ]
        if not any(found) and not self.of_result:
            return "\n".join([*lines, "The results are equal, bit for bit."])
        if found:
            lines.append(f"step 1, from the same noise: B is {found[0]:.3%} from A")
        lines += [
            f"result, after {len(self.one.steps)} steps: B is {self.of_result:.3%} from A",
            "  (length of the difference of the latents over that of A's; on the way to the result "
            "the differences of all steps add up)",
        ]
        if self.decoded:
            told = "equal" if self.picture is None else f"{self.picture:.1f} dB PSNR"
            lines.append(f"pictures: {told}")
        return "\n".join(lines)

    def to_json(self) -> dict:
        """Plain JSON values."""
        sides = {
            name: {"name": side.name, "bytes": side.nbytes, "seconds_per_step": side.pace}
            for name, side in (("a", self.one), ("b", self.other))
        }
        return {
            "kind": "compare",
            **sides,
            "settings": dict(self.settings),
            "difference_by_step": self.by_step,
            "difference": self.of_result,
            "decoded": self.decoded,
            "psnr_db": self.picture,
        }

    @property
    def chart(self) -> Chart:
        """Difference by step, and what each model costs."""
        found = self.by_step
        points = [(number, 100 * value) for number, value in enumerate(found, 1)]
        sides = (("A", self.one), ("B", self.other))
        label = "difference of the denoised latents, %"
        panels = [
            Points("Difference by step", "step", label, {"": points}),
            Bars("Weights", "bytes", [(name, (("", side.nbytes),)) for name, side in sides]),
        ]
        paces = [(name, (("", side.pace),)) for name, side in sides if side.pace is not None]
        if paces:
            panels.append(Bars("Time of a step", "s", paces))
        return Chart("Compare", panels, [f"{name}: {side.name}" for name, side in sides])


def _pace(side: Sampled) -> str:
    return "" if side.pace is None else f", {side.pace:.3f} s for a step"
