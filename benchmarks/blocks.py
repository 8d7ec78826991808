"""A double and a single block of FLUX.1, of the real ComfyUI, in every scheme and matmul."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from flux import SMALL, Size, block
from forms import FORMS
from layers import DTYPES, Wanted
from timing import Local, compete, peak_bytes, release


def measure(
    wanted: Wanted, pack: Callable, keep: Callable[[list[dict]], None], smoke: bool
) -> list[dict]:
    """Rows ``{"block", "form", "mode", "us", "ratio", "error", ...}``; ratio to the bf16 block."""
    size, dtype, device = SMALL if smoke else Size(), DTYPES[wanted.dtype], wanted.device
    found: list[dict] = []
    for kind in ("single", "double"):
        plain = block(kind, size, "float", "dequantize", pack, dtype, device)
        for form in wanted.forms:
            if time.monotonic() > wanted.deadline:
                return [*found, {"stopped": f"no time left before {kind} block, {form}"}]
            modes = [m for m in FORMS[form].modes if not wanted.modes or m in wanted.modes]
            calls, exact = {}, None
            with torch.inference_mode():
                for mode in modes:
                    run = block(kind, size, form, mode, pack, dtype, device)
                    y = run()
                    # From the dequantized form: what rounding activations changes.
                    exact = y if exact is None else exact
                    error = float((y.double() - exact.double()).norm() / exact.double().norm())
                    calls[mode] = (run, error, peak_bytes(run))
                base = peak_bytes(plain)
            contenders = {"float": Local(plain, device)}
            contenders |= {mode: Local(run, device) for mode, (run, _, _) in calls.items()}
            timed = compete(contenders, wanted.rounds, "float")
            for mode, numbers in timed.items():
                row = {"block": kind, "form": form, "mode": mode, "dtype": wanted.dtype}
                if "failed" in numbers:
                    found.append(row | {"absent": numbers["failed"]})
                    continue
                more = {"peak_bytes": base}
                if mode in calls:
                    more = {"from_first_mode": calls[mode][1], "peak_bytes": calls[mode][2]}
                found.append(row | numbers | more)
            keep(found)
            del contenders, calls
            release()
    return found
