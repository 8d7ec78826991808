"""What the measurements have to show on a large GPU, read off the results of one run.

Each goal is data: rows that count, what is looked at, and the bar. A goal without rows is open,
never met.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

__all__ = ["GOALS", "Goal", "judge"]

MANY = 4608


@dataclass(frozen=True)
class Goal:
    """A bar over rows of the layer table.

    Attributes:
        name: What a reader calls it.
        form, mode: Of the rows.
        rows: Of the activations: exactly ``MANY``, or at most 16 where 16.
        value: The field that counts.
        least: The bar; the worst row has to reach it.
    """

    name: str
    form: str
    mode: str
    rows: int
    value: str
    least: float


GOALS = (
    Goal("FP8 W8A8, activations quantized", "fp8", "fp8", MANY, "ratio", 1.5),
    Goal("INT8 W8A8", "int8", "int8", MANY, "ratio", 1.3),
    Goal("uint4 weight-only, many rows", "uint4", "dequantize", MANY, "ratio", 0.9),
    Goal("uint4 weight-only, up to 16 rows", "uint4", "dequantize", 16, "ratio", 3.0),
    Goal("uint4 in int8", "uint4", "int8", MANY, "ratio", 1.3),
    Goal("SVDQuant int4 rank 32 in int8", "svdq-int4", "int8", MANY, "ratio", 1.25),
    Goal("SVDQuant nvfp4 rank 32 in int8", "svdq-nvfp4", "int8", MANY, "ratio", 1.25),
    Goal("SVDQuant int4, faithful", "svdq-int4", "faithful", MANY, "ratio", 0.75),
    Goal("SVDQuant nvfp4, faithful", "svdq-nvfp4", "faithful", MANY, "ratio", 0.75),
    Goal("unpacking uint4, of copy bandwidth", "uint4", "unpack", MANY, "copy", 0.8),
    Goal("unpacking nvfp4, of copy bandwidth", "svdq-nvfp4", "unpack", MANY, "copy", 0.8),
)
BEST_CALLER = 0.98
"""FP8 beside the fastest other caller of the same library product."""


def judge(rows: Iterable[dict]) -> list[dict]:
    """``[{"goal", "wanted", "found", "best", "met"}]``; ``met`` is None where nothing was measured.

    Args:
        rows: Of the layer table.
    """
    timed = [row for row in rows if "us" in row]
    ours = [row for row in timed if row["side"] == "ours"]
    told = []
    for goal in GOALS:
        few = goal.rows <= 16
        values = [
            row[goal.value]
            for row in ours
            if (row["form"], row["mode"]) == (goal.form, goal.mode)
            and (row["m"] <= goal.rows if few else row["m"] == goal.rows)
            and goal.value in row
        ]
        told.append(_verdict(goal.name, goal.least, values, min))
    told.append(_verdict("FP8 beside the best other caller", BEST_CALLER, _fp8(ours, timed), min))
    told.append(_verdict("beside the sdnq package", 1.0, _beside(ours, timed, "sdnq"), min))
    told.append(_verdict("beside no Triton", 1.0, _beside(ours, timed, "no triton"), min))
    return told


def _verdict(name: str, least: float, values: list[float], worst: Callable) -> dict:
    found = worst(values) if values else None
    return {
        "goal": name,
        "wanted": least,
        "found": found,
        "best": max(values) if values else None,
        "met": None if found is None else found >= least,
    }


def _key(row: dict) -> tuple:
    return row["m"], row["n"], row["k"], row["dtype"]


def _fp8(ours: list[dict], timed: list[dict]) -> list[float]:
    """Times of torchao's row-wise FP8 layers over ours of the same shape."""
    others = {
        _key(row): row["us"]
        for row in timed
        if row["side"] == "torchao" and row.get("settings", {}).get("kind") == "fp8row"
    }
    return [
        others[_key(row)] / row["us"]
        for row in ours
        if (row["form"], row["mode"]) == ("fp8", "fp8") and _key(row) in others
    ]


def _beside(ours: list[dict], timed: list[dict], side: str) -> list[float]:
    others = {
        (*_key(row), row["form"], row["mode"]): row["us"] for row in timed if row["side"] == side
    }
    keys = {(*_key(row), row["form"], row["mode"]): row["us"] for row in ours}
    return [others[key] / us for key, us in keys.items() if key in others]
