"""Compiles what the launchers launch, as they launch it, for a GPU that is not there.

    python launched.py sm_90 [--forms uint4 svdq ...] [--rows 1 40 ...] [--json FILE]

A process of its own: Triton is told of another device, and kernels are compiled but not started.
Beside what scripts/compile_kernels.py sees of the kernels this sees what launchers give them: which
arguments are 1, which are multiples of 16, and which tile.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import compile_kernels
import torch
from compile_kernels import PACKAGE, load
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

OUTPUTS, INPUTS = 384, 512
ROWS = (1, 3, 8, 40, 300, 2100)


class Absent:
    """A driver of a device that is not there."""

    def __init__(self, target) -> None:
        self.target = GPUTarget(target.backend, target.architecture, target.warp)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def forms() -> dict:
    """Specs of weights, and their tensors as ``((name, dtype, shape), ...)``."""
    spec_module = importlib.import_module(f"{PACKAGE}.spec")
    unpack = load("unpack")

    def made(fmt, group=0, scale=torch.float32, zero=False, **options):
        code_shape = (OUTPUTS, INPUTS // group, group) if group else (OUTPUTS, INPUTS)
        spec = spec_module.WeightSpec(fmt, (OUTPUTS, INPUTS), code_shape, **options)
        half, table = torch.bfloat16, (*code_shape[:-1], 1)
        layout = [("codes", fmt.word, (-1,) if fmt.packed else code_shape)]
        if spec.codebook:
            layout.append(("levels", torch.float32, (*code_shape[:-1], 1 << fmt.bits)))
        else:
            layout.append(("scale", scale, table))
        if spec.two_level:
            layout.append(("scale_2", torch.float32, (1,) * len(code_shape)))
        if zero:
            layout.append(("zero_point", scale, table))
        if spec.smoothing:
            layout.append(("smooth", half, (INPUTS,)))
        if spec.rank:
            layout.append(("svd_up", half, (OUTPUTS, spec.rank)))
            layout.append(("svd_down", half, (spec.rank, INPUTS)))
        return spec, tuple(layout)

    uint4, int4 = unpack.U4, unpack.I4
    bf16, fp8 = torch.bfloat16, torch.float8_e4m3fn
    faithful = spec_module.ActivationSpec("int4", 64, "")
    svdq = {"scale": bf16, "smoothing": "divide"}
    return {
        "uint4": made(uint4, 64, bf16, True),
        "one group": made(uint4, INPUTS, bf16, True),
        "svdq": made(int4, 64, rank=32, activation=faithful, **svdq),
        "rank 1": made(int4, 64, rank=1, **svdq),
        "nvfp4": made(unpack.E2M1, 16, fp8, two_level=True),
        "int8": made(unpack.raw_format("int", torch.int8)),
        "uint8": made(unpack.raw_format("uint", torch.uint8), zero=True),
        "fp8": made(unpack.FP8),
        "rotated": made(unpack.stream_format("int5", "int", 5), 128, hadamard=128),
        "codebook": made(unpack.stream_format("uint3", "uint", 3), 64, codebook=True),
    }


def calls(spec, tensors: dict, rows: tuple[int, ...], target, dtype: torch.dtype):
    """``(label, call)`` of every operation that the target has."""
    unpack, weight_only = load("unpack"), load("weight_only")
    int8, fp8, faithful = load("int8"), load("fp8"), load("faithful")
    products = [weight_only.linear_weight_only]
    if target.name in load("gemm").TARGETS:
        products += [int8.linear_int8, int8.linear_uint8]
        products += [faithful.linear_faithful] if spec.activation else []
    if target.name in load("gemm").FP8_TARGETS:
        products.append(fp8.linear_fp8)
    yield "dequantize", lambda: unpack.dequantize(tensors, spec, dtype)
    bias = torch.randn(spec.rows).to(dtype)
    for count in rows:
        x = torch.randn(count, spec.columns).to(dtype)
        for product in products:
            yield (
                f"{product.__name__} of {count} rows in {dtype}",
                lambda product=product, x=x: product(x, tensors, spec, bias),
            )


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target")
    parser.add_argument("--forms", nargs="*")
    parser.add_argument("--rows", nargs="*", type=int, default=ROWS)
    parser.add_argument("--json", required=True)
    options = parser.parse_args(argv)
    target = load("targets").TARGETS[options.target]
    driver.set_active(Absent(target))
    machine = load("configs").Machine(target.name, 16, target.shared, 8 << 20)
    for name in ("configs", "workspace", "unpack", "weight_only", "gemm"):
        load(name).machine_of = lambda _: machine
    found: dict[str, dict] = {}
    run = JITFunction.run

    def compiled(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        if kernel.hash not in found:
            told = {"kernel": self.fn.__name__, "opcodes": {}, "faults": []}
            entry = load("configs").Ahead("", {}, {}, load("configs").Tile(1, 1, 1), ())
            compile_kernels._inspect(entry, target, kernel, told)
            if max(grid[1:], default=1) > 65535:
                told["faults"].append(f"has a grid of {grid}")
            found[kernel.hash] = told
        return kernel

    JITFunction.run = compiled
    random_tensors = importlib.import_module(f"{PACKAGE}.trial").random_tensors
    failures = []
    for name, (spec, layout) in forms().items():
        if options.forms and name not in options.forms:
            continue
        tensors = random_tensors(spec, layout, torch.Generator().manual_seed(0))
        for dtype in (torch.bfloat16, torch.float16):
            for label, call in calls(spec, tensors, options.rows, target, dtype):
                try:
                    call()
                except Exception as error:  # compilers fail in many ways
                    failures.append(f"{name}: {label}: {type(error).__name__}: {error}"[:2000])
    told = {"failures": failures, "found": list(found.values())}
    Path(options.json).write_text(json.dumps(told, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
