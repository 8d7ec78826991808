"""What runs, as lines for people: one for all layers of a format that run alike."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable

import torch

from ..kernels.registry import registry
from .layouts.dispatch import Decision, device_table

__all__ = ["device_lines", "kernel_lines"]


def kernel_lines(decided: Iterable[tuple[str, Decision]]) -> dict[str, int]:
    """``{line: layers}`` of ``(format, decision)`` of each part, the commonest first.

    A line tells the matmul, whose kernel computes it, and why not a faster one.
    """
    lines: Counter[tuple[str, str, str, str]] = Counter()
    reasons: dict[tuple[str, str, str, str], str] = defaultdict(str)
    for format_, decision in decided:
        by = decision.choice.implementation.backend
        key = (format_, decision.mode, by, decision.reason or "")
        lines[key] += 1
        reasons[key] = decision.reason or "; ".join(
            f"not {name}: {why}" for name, why in decision.choice.refused
        )
    told = {}
    for (format_, mode, by, _), count in lines.most_common():
        text = "dequantized, then a float matmul" if mode == "dequantize" else f"{mode} matmul"
        native = "emulated in eager torch" if by == "reference" else f"by {by}"
        why = reasons[(format_, mode, by, _)]
        told[f"{format_}: {text}, {native}" + (f" ({why})" if why else "")] = count
    return told


def device_lines(device: torch.device, dtype: torch.dtype) -> list[str]:
    """The fastest kernel of each operation on a device, why no faster one, and what failed."""
    lines = []
    for operation, rows in device_table(device, dtype).items():
        names = [name for name, why in rows if why is None]
        faster = []
        for name, why in rows:
            if name in names:
                break
            faster.append(f"not {name}: {why}")
        by = names[0] if names else "nothing"
        lines.append(f"{operation}: {by}" + (f" ({'; '.join(faster)})" if faster else ""))
    lines += registry.failures()
    spent = registry.seconds_spent()
    if spent:
        each = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in spent.items())
        lines.append(f"kernels compiled and tried in {sum(spent.values()):.1f} s: {each}")
    return lines
