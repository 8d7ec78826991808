"""Searches tiles for the Triton kernels on this GPU: ``python benchmarks/tune.py [flux1 ...]``.

The pack never searches by itself. What is found here goes to ``lowbit/`` in ComfyUI's user folder
(``--folder`` elsewhere), in one file per device, Triton and version of the kernels, and is used by
every model that is loaded from then on. A search takes a few seconds for each shape.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))  # where `python -P` does not look
from machine import ROOT
from shapes import MODELS

ROUNDS = 7
# (operation of configs.TILES, format, elements of a group, rows where it is used)
KINDS = (
    ("int8", "int8", -1, range(32, 1 << 30)),
    ("gemv", "uint4", 64, range(9)),
    ("fused", "uint4", 64, range(9, 512)),
)


def timer(run: Callable[[], object]) -> Callable[[], float]:
    """Seconds of one run on the device, the median of some; the first compiles and is not among."""

    def seconds() -> float:
        run()
        times = []
        for _ in range(ROUNDS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1000)
        return statistics.median(times)

    return seconds


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", help=f"of {', '.join(MODELS)}; all without")
    parser.add_argument("--folder", type=Path, help="where the file goes")
    parser.add_argument("--rows", type=int, nargs="*", help="beside those that the models have")
    options = parser.parse_args(argv)
    unknown = set(options.models) - set(MODELS)
    if unknown:
        parser.error(f"unknown models: {', '.join(sorted(unknown))}")
    if not torch.cuda.is_available():
        parser.error("torch sees no GPU")
    sys.path.insert(0, str(ROOT / "tests"))
    from support import pack

    device = torch.device("cuda", torch.cuda.current_device())
    configs, weights = pack("kernels.triton.configs"), pack("quant.weight")
    kernels = {
        "int8": pack("kernels.triton.int8").linear_int8,
        "gemv": pack("kernels.triton.weight_only").linear_weight_only,
        "fused": pack("kernels.triton.weight_only").linear_weight_only,
    }
    folder = options.folder or pack("loaders.host.devices").tiles_folder()
    known = configs.use_folder(folder, device)
    print(f"{torch.cuda.get_device_name(device)}: {known} tiles known in {folder}", flush=True)
    layers = [layer for name in options.models or MODELS for layer in MODELS[name].layers]
    done = set()
    for layer in layers:
        for operation, fmt, group, where in KINDS:
            for rows in (layer.rows, *(options.rows or ())):
                key = (operation, configs.row_class(rows), layer.out, layer.inputs)
                if rows not in where or key in done:
                    continue
                done.add(key)
                weight = torch.randn(layer.out, layer.inputs, device=device)
                weight = weights.quantize(weight, fmt, group_size=group)
                x = torch.randn(rows, layer.inputs, device=device, dtype=torch.bfloat16)
                kernel = kernels[operation]
                shape = (operation, device, rows, layer.out, layer.inputs)
                measure = timer(lambda: kernel(x, weight.tensors, weight.spec, None))  # noqa: B023
                before = measure()
                best = configs.search(*shape, measure, configs.neighbours(*shape))
                print(
                    f"{operation} {rows}x{layer.out}x{layer.inputs}: {before * 1e6:.0f} us before, "
                    f"{measure() * 1e6:.0f} us with {best}",
                    flush=True,
                )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
