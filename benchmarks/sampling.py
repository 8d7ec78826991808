"""FLUX.1 at its real size with random weights, loaded and sampled by the real ComfyUI.

Weights are random, so no picture comes out; what is measured is a step, the memory and the load.
Each model runs after the others have gone; the seconds of a step are the median of all but the
first, which compiles and loads. The bf16 model runs first and last: how far both are apart is what
the machine drifted by in between.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from itertools import pairwise

import torch
from flux import SMALL, Size, latent, model
from layers import DTYPES, Wanted
from timing import release

RUNS = (
    ("float", "dequantize", "auto"),
    ("uint4", "dequantize", "auto"),
    ("uint4", "int8", "auto"),
    ("int8", "int8", "auto"),
    ("svdq-int4", "auto", "auto"),
    ("svdq-nvfp4", "auto", "auto"),
    ("fp8", "fp8", "auto"),
    ("uint4", "dequantize", "comfy_kitchen"),
    ("float", "dequantize", "auto"),
)
"""Scheme, matmul, backend; "comfy_kitchen" forced is what runs without Triton."""
SMOKE_RUNS = (("float", "dequantize", "auto"), ("uint4", "int8", "auto"))


def sample(patcher, size: Size, steps: int, seed: int = 0) -> tuple[torch.Tensor, list[float]]:
    """A latent by the host's own sampler, and the seconds of each step."""
    import comfy.sample

    given = latent(size, seed)
    conditioning = [[given["context"], {"pooled_output": given["pooled"], "guidance": 3.5}]]
    marks = [time.perf_counter()]

    def after(*_) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        marks.append(time.perf_counter())

    out = comfy.sample.sample(
        patcher,
        given["noise"],
        steps,
        1.0,
        "euler",
        "simple",
        conditioning,
        conditioning,
        given["latent"],
        callback=after,
        disable_pbar=True,
        seed=seed,
    )
    return out, [end - start for start, end in pairwise(marks)]


def unload() -> None:
    """Everything off the device, by the host."""
    import comfy.model_management as mm

    mm.unload_all_models()
    mm.soft_empty_cache()
    release()


def measure(
    wanted: Wanted, pack: Callable, keep: Callable[[list[dict]], None], steps: int, smoke: bool
) -> list[dict]:
    """Rows ``{"form", "mode", "backend", "step_s", "ratio", "weights_gb", "peak_gb", ...}``."""
    import comfy.sample  # here, to be no part of the first model's time
    import comfy.sd  # noqa: F401

    size, dtype = SMALL if smoke else Size(), DTYPES[wanted.dtype]
    found: list[dict] = []
    base = 0.0
    cuda = wanted.device == "cuda"
    for form, mode, backend in SMOKE_RUNS if smoke else RUNS:
        row = {"form": form, "mode": mode, "backend": backend, "dtype": wanted.dtype}
        if time.monotonic() > wanted.deadline:
            found.append(row | {"absent": "no time was left"})
            continue
        try:
            start = time.perf_counter()
            patcher = model(size, form, mode, pack, dtype, wanted.device, backend=backend)
            made = time.perf_counter() - start
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            out, seconds = sample(patcher, size, steps)
        except (RuntimeError, ValueError) as error:
            found.append(row | {"absent": f"{type(error).__name__}: {str(error)[:300]}"})
            unload()
            continue
        step = statistics.median(seconds[1:]) if len(seconds) > 1 else seconds[0]
        base = base or step
        found.append(
            row
            | {
                "step_s": step,
                "best_s": min(seconds),
                "worst_s": max(seconds[1:] or seconds),
                "first_s": seconds[0],
                "ratio": base / step,
                "made_s": made,
                "weights_gb": patcher.model_size() / 1e9,
                "finite": bool(torch.isfinite(out).all()),
            }
        )
        if cuda:
            found[-1]["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        keep(found)
        del patcher
        unload()
    return found
