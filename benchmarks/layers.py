"""Time of one Linear of FLUX.1 in each format: this pack, the sdnq package, and a float weight.

``python scripts/host.py run -- python benchmarks/layers.py [--device cuda]`` prints a table and
writes ``benchmarks/results/<device>-layers.json``. Both sides run eagerly, in one run and in turn:
the package in a worker process of the oracle interpreter (this file with ``--worker``), which
sleeps while the other side is measured.

| column     | what is timed, on x [rows, 3072] and a weight [3072, 3072]                          |
|------------|-------------------------------------------------------------------------------------|
| float      | ``F.linear`` with a weight of x's dtype                                             |
| dequantize | our weight to x's dtype, no product                                                 |
| ours       | what our Linear runs: dequantize and multiply, or the quantized product (``mm``)    |
| sdnq       | ``forward`` of the package's own layer                                              |
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from machine import ORACLE, ROOT, cores, facts, spread, write_results
from torch.nn import functional

WIDTH = 3072
ROWS = {"cpu": (1, 512), "cuda": (1, 4096)}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
CALLS = 3  # in a row; the first one is not counted


@dataclass(frozen=True)
class Case:
    """A format in both sides' words.

    Attributes:
        format: Number format of the codes.
        ours: Further arguments of our ``quantize``.
        sdnq: The same for the package's config.
        matmul: Our loader's ``matmul``.
    """

    format: str
    ours: dict
    sdnq: dict
    matmul: str = "dequantize"


CASES = {
    "uint4": Case("uint4", {}, {}),
    "uint4 svd": Case("uint4", {"svd_rank": 32}, {"use_svd": True}),
    "uint4 codebook": Case("uint4", {"use_codebook": True}, {"use_codebook": True}),
    "int5": Case("int5", {}, {}),
    "int8": Case("int8", {}, {}),
    "int8 mm": Case("int8", {"group_size": -1}, {"use_quantized_matmul": True}, "int8"),
    "fp8": Case("float8_e4m3fn", {}, {}),
}


def float_weight(device: str) -> torch.Tensor:
    torch.manual_seed(0)
    return (torch.randn(WIDTH, WIDTH) * 0.02).to(device)


def activations(rows: int, dtype: str, device: str) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(rows, WIDTH).to(device, DTYPES[dtype])


@torch.inference_mode()
def timed(call: Callable[[], torch.Tensor], device: str) -> list[float]:
    """Seconds of each of ``CALLS`` calls after one that is not counted."""
    seconds = []
    for _ in range(CALLS + 1):
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


# --------------------------------------------------------------------- the package's own layers


def worker(device: str) -> None:
    """Answer ``[case, rows, dtype]`` on stdin with seconds on stdout; runs in the oracle."""
    from sdnq import SDNQConfig
    from sdnq.quantizer import sdnq_quantize_layer

    layers = {}
    for line in sys.stdin:
        name, rows, dtype = json.loads(line)
        if (name, dtype) not in layers:
            linear = torch.nn.Linear(WIDTH, WIDTH, device=device)
            linear.weight.data = float_weight(device)
            linear.to(DTYPES[dtype])
            case = CASES[name]
            config = SDNQConfig(weights_dtype=case.format, add_skip_keys=False, **case.sdnq)
            layers[name, dtype], _ = sdnq_quantize_layer(linear, config, torch_dtype=DTYPES[dtype])
        layer, x = layers[name, dtype], activations(rows, dtype, device)
        print(json.dumps({"seconds": timed(partial(layer, x), device)}), flush=True)


class Worker:
    """The oracle's side as a function."""

    def __init__(self, device: str, threads: int) -> None:
        env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        self.process = subprocess.Popen(
            [ORACLE, __file__, "--worker", "--device", device, "--threads", str(threads)],
            env=env | {"SDNQ_USE_TORCH_COMPILE": "0", "HF_HUB_OFFLINE": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(self, name: str, rows: int, dtype: str) -> list[float]:
        self.process.stdin.write(json.dumps([name, rows, dtype]) + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith('{"seconds"'):
                return json.loads(line)["seconds"]
        raise SystemExit(f"the oracle's process ended with status {self.process.wait()}")

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


# --------------------------------------------------------------------------------- our own side


def measure(device: str, rounds: int) -> list[dict]:
    sys.path.insert(0, str(ROOT / "tests"))
    from support import pack

    composite = pack("loaders.layouts.composite")
    dispatch = pack("loaders.layouts.dispatch")
    quantize = pack("quant.weight").quantize

    theirs = Worker(device, torch.get_num_threads())
    weight = float_weight("cpu")
    results = []
    for name, case in CASES.items():
        quantized = quantize(weight.clone(), case.format, **case.ours)
        for dtype in DTYPES:
            held = composite.build([(name, quantized, case.matmul)], DTYPES[dtype])
            buffer, spec = held._qdata.to(device), held._params.spec
            place = torch.device(device)
            kernels = dispatch.kernels_of(spec, case.matmul, "auto", place, DTYPES[dtype])
            dense = weight.to(device, DTYPES[dtype])
            bias = torch.zeros(WIDTH, device=device, dtype=DTYPES[dtype])
            for rows in ROWS[device]:
                x = activations(rows, dtype, device)
                calls = {
                    "float": partial(functional.linear, x, dense, bias),
                    "dequantize": partial(composite.dequantize, buffer, spec, DTYPES[dtype]),
                    "ours": partial(dispatch.linear, x, buffer, spec, bias, kernels),
                }
                seconds = {column: [] for column in (*calls, "sdnq")}
                for _ in range(rounds):
                    for column, call in calls.items():
                        seconds[column] += timed(call, device)
                    seconds["sdnq"] += theirs(name, rows, dtype)
                row = {"format": name, "dtype": dtype, "rows": rows}
                row |= {column: spread(values) for column, values in seconds.items()}
                row["ours_over_float"] = row["ours"]["median"] / row["float"]["median"]
                row["sdnq_over_ours"] = row["sdnq"]["median"] / row["ours"]["median"]
                results.append(row)
                show(row)
    theirs.close()
    return results


def show(row: dict) -> None:
    times = "".join(
        f"{row[column]['median'] * 1e3:11.2f}" for column in ("float", "dequantize", "ours", "sdnq")
    )
    print(
        f"{row['format']:15}{row['dtype']:6}{row['rows']:5}{times}"
        f"{row['ours_over_float']:12.2f}{row['sdnq_over_ours']:11.2f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Time of one Linear in each format.")
    parser.add_argument("--device", choices=tuple(ROWS), default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=cores(), help="of torch; default: all cores")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.worker:
        return worker(options.device)
    print(f"milliseconds, medians; a weight of {WIDTH} x {WIDTH}")
    heads = ("float", "dequantize", "ours", "sdnq")
    print(
        f"{'format':15}{'dtype':6}{'rows':>5}"
        + "".join(f"{head:>11}" for head in heads)
        + f"{'ours/float':>12}{'sdnq/ours':>11}"
    )
    results = measure(options.device, options.rounds)
    settings = {"threads": options.threads, "rounds": options.rounds, "calls": CALLS}
    write_results("layers", facts(options.device) | settings | {"layers": results})
    return None


if __name__ == "__main__":
    main()
