"""Every implementation that the registry has for this device, against the reference.

Odd numbers of rows, both 16-bit dtypes, every scheme. What a kernel did not write, or wrote as NaN,
is far from the reference.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from forms import FORMS, weight_of
from layers import Wanted, compared
from timing import release

SHAPES = ((384, 512, (1, 7, 33, 300)), (1024, 3072, (1, 16, 129, 2048)))
SMOKE_SHAPES = ((128, 256, (1, 33)),)
OPERATIONS = {
    "dequantize": "dequantize",
    "linear_weight_only": "dequantize",
    "linear_int8": "int8",
    "linear_uint8": "uint8",
    "linear_fp8": "fp8",
    "linear_faithful": "faithful",
}


def measure(
    wanted: Wanted, pack: Callable, keep: Callable[[list[dict]], None], smoke: bool
) -> list[dict]:
    """Rows ``{"operation", "backend", "target", "form", "n", "k", "m", "differs", ...}``."""
    registry = pack("kernels.registry").registry
    dispatch = pack("loaders.layouts.dispatch")
    device = torch.device(wanted.device if wanted.device == "cpu" else "cuda:0")
    found: list[dict] = []
    for name in wanted.forms:
        form = FORMS[name]
        for n, k, rows in SMOKE_SHAPES if smoke else SHAPES:
            weight = weight_of(form, pack, n, k, wanted.device)
            bias = torch.randn(n, device=device)
            for dtype in (torch.bfloat16, torch.float16):
                for operation, mode in OPERATIONS.items():
                    if operation == "linear_faithful" and weight.spec.activation is None:
                        continue
                    for m in rows if operation != "dequantize" else rows[:1]:
                        if time.monotonic() > wanted.deadline:
                            return [*found, {"stopped": f"no time left before {name}"}]
                        call = dispatch.call_of(weight.spec, device, dtype, m)
                        x = torch.randn(m, k, device=device).to(dtype)
                        found += _rows(
                            registry, operation, mode, call, x, weight, bias.to(dtype), name
                        )
        keep(found)
        release()
    return found


def _rows(registry, operation: str, mode: str, call, x, weight, bias, form: str) -> list[dict]:
    rows = registry.implementations(operation)
    reference = next(row for row in rows if row.backend == "reference")

    def run(row) -> torch.Tensor:
        if operation == "dequantize":
            return row.function()(weight.tensors, weight.spec, x.dtype)
        return row.function()(x, weight.tensors, weight.spec, bias)

    told = []
    with torch.inference_mode():
        expected = run(reference)
        dense = weight.dequantize()
        exact = dense
        if operation != "dequantize":
            exact = x.double() @ dense.double().t() + bias.double()
        for row in rows:
            if row is reference:
                continue
            base = {
                "operation": operation,
                "backend": row.backend,
                "target": row.target,
                "form": form,
                "dtype": str(x.dtype).removeprefix("torch."),
                "m": x.shape[0],
                "n": weight.spec.shape[0],
                "k": weight.spec.shape[1],
            }
            reason = row.why_not(call)
            if reason is not None:
                told.append(base | {"absent": reason})
                continue
            try:
                start = time.perf_counter()
                y = run(row)
                if x.is_cuda:
                    torch.cuda.synchronize()
                seconds = time.perf_counter() - start
            except Exception as error:  # a compiler's own errors are of many kinds
                told.append(
                    base | {"wrong": True, "failed": f"{type(error).__name__}: {error}"[:600]}
                )
                continue
            told.append(base | compared(y, expected, exact, mode) | {"first_s": seconds})
    return told
