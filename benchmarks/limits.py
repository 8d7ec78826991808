"""What the device can do at best: copies and matrix products by the libraries that torch calls.

Every other figure is read beside these, measured in the same run on random data.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from timing import Local, compete, release

SIZES = {"cuda": (8192, 1 << 30), "cpu": (2048, 1 << 28)}
SMOKE = (128, 1 << 20)
"""Side of a square product, bytes of a copy."""


def _product(left: torch.Tensor, right: torch.Tensor) -> Callable[[], object]:
    return partial(torch.mm, left, right)


def _int8(side: int, device: str) -> Callable[[], object]:
    left, right = (
        torch.randint(-128, 128, (side, side), dtype=torch.int8, device=device) for _ in range(2)
    )
    return partial(torch._int_mm, left, right.t())


def _fp8(side: int, device: str) -> Callable[[], object]:
    left, right = (torch.randn(side, side, device=device).to(torch.float8_e4m3fn) for _ in range(2))
    rows, columns = torch.ones(side, 1, device=device), torch.ones(1, side, device=device)
    return partial(
        torch._scaled_mm, left, right.t(), scale_a=rows, scale_b=columns, out_dtype=torch.bfloat16
    )


def measure(device: str, rounds: int, smoke: bool = False) -> list[dict]:
    """``[{"limit": name, "value", "unit", ...} or {"limit": name, "absent": reason}]``."""
    side, nbytes = SMOKE if smoke else SIZES[device]
    source = torch.randint(0, 256, (nbytes,), dtype=torch.uint8, device=device)
    flops = 2 * side**3 / 1e12
    makers: dict[str, tuple[float, str, Callable[[], Callable[[], object]]]] = {
        "copy": (
            2 * nbytes / 1e9,
            "GB/s",
            lambda: partial(torch.empty_like(source).copy_, source),
        ),
    }
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        makers[name] = (
            flops,
            "TFLOP/s",
            lambda dtype=dtype: _product(
                torch.randn(side, side, device=device).to(dtype),
                torch.randn(side, side, device=device).to(dtype),
            ),
        )
    makers["int8"] = (flops, "TFLOP/s", lambda: _int8(side, device))
    makers["fp8"] = (flops, "TFLOP/s", lambda: _fp8(side, device))
    if device == "cuda":
        host = torch.empty(1 << (20 if smoke else 28), dtype=torch.uint8).pin_memory()
        makers["host to device"] = (
            host.nbytes / 1e9,
            "GB/s",
            lambda: partial(torch.empty_like(host, device="cuda").copy_, host, non_blocking=True),
        )
    rows = []
    for name, (work, unit, make) in makers.items():
        try:
            contender = Local(make(), device, graph=False)
            found = compete({name: contender}, rounds, name)[name]
        except (RuntimeError, NotImplementedError, ValueError) as error:
            rows.append({"limit": name, "absent": str(error).splitlines()[0][:300]})
            continue
        rows.append(
            {
                "limit": name,
                "value": work / (found["us"] / 1e6),
                "best": work / (found["best_us"] / 1e6),
                "unit": unit,
                "of": f"{side}^3" if unit == "TFLOP/s" else f"{nbytes >> 20} MiB",
            }
        )
        del contender
        release()
    return rows


def table(rows: list[dict]) -> dict[str, float]:
    """``{limit: TFLOP/s or GB/s}`` of what was measured."""
    return {row["limit"]: row["value"] for row in rows if "value" in row}
