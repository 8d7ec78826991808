"""Quantizing weights and a whole file, in turn with the sdnq package's own functions.

``python benchmarks/quantize.py [--rounds 5] [--threads N] [--device cpu|cuda]`` in the host's
environment. The package runs in a process of its own (this script with ``worker``). A layer's time
is that of its codes and scales from a bf16 weight in memory; ours counts measuring the error too. A
file's time is from a bf16 checkpoint on disk to a quantized one on disk, files warm in the page
cache; the package loads it with diffusers, quantizes and saves it.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from machine import ORACLE, ROOT, cores, facts, spread, write_results

SHAPES = ((3072, 3072), (12288, 3072), (3072, 12288))
CASES = {
    "int8": {"weights_dtype": "int8"},
    "uint4": {"weights_dtype": "uint4"},
    "uint4 rank 32": {"weights_dtype": "uint4", "use_svd": True, "svd_rank": 32},
    "uint4 rotated": {"weights_dtype": "uint4", "use_hadamard": True},
    "float4_e2m1fn": {"weights_dtype": "float4_e2m1fn"},
}
FILE_CASES = ("int8", "uint4")
FLUX = {
    "num_layers": 3,
    "num_single_layers": 6,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
}  # 1.8 billion values


def weight_of(shape: tuple[int, int], device: str) -> torch.Tensor:
    torch.manual_seed(0)
    return (torch.randn(shape) * 0.02).to(device, torch.bfloat16)


# ---------------------------------------------------------------------------- the package's process


def worker(device: str, threads: int) -> None:
    """Answers lines of JSON with seconds; the first answer says that it is ready."""
    os.environ.setdefault("SDNQ_USE_TORCH_COMPILE", "0")
    import sdnq
    from sdnq.quantizer import sdnq_quantize_layer

    torch.set_num_threads(threads)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        start = time.perf_counter()
        if "folder" in asked:
            from diffusers import FluxTransformer2DModel

            if asked.get("make"):
                torch.manual_seed(0)
                model = FluxTransformer2DModel(**FLUX).to(torch.bfloat16)
                model.save_pretrained(asked["folder"], max_shard_size="100GB")
            else:
                model = FluxTransformer2DModel.from_pretrained(
                    asked["folder"], torch_dtype=torch.bfloat16
                )
                config = sdnq.SDNQConfig(**asked["settings"])
                model = sdnq.sdnq_post_load_quant(
                    model, torch_dtype=torch.bfloat16, quantization_config=config
                )
                model.save_pretrained(asked["target"])
        else:
            n, k = asked["shape"]
            layer = torch.nn.Linear(k, n, device=device, dtype=torch.bfloat16)
            layer.weight.data.copy_(weight_of((n, k), device))
            config = sdnq.SDNQConfig(add_skip_keys=False, **asked["settings"])
            start = time.perf_counter()
            sdnq_quantize_layer(layer, config, torch_dtype=torch.bfloat16)
            if device == "cuda":
                torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"seconds": seconds, "peak": peak}), flush=True)


class Package:
    """The worker's process."""

    def __init__(self, device: str, threads: int) -> None:
        env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        env |= {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        command = [ORACLE, __file__, "worker", device, str(threads)]
        self._process = subprocess.Popen(
            command, env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self._answer()

    def ask(self, **asked) -> dict:
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict:
        while line := self._process.stdout.readline():
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError("the sdnq package's process ended")

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


# ------------------------------------------------------------------------------------------- ours


def pack(module: str):
    sys.path.insert(0, str(ROOT / "tests"))
    from support import pack as load

    return load(module)


def layer_seconds(weight: torch.Tensor, settings: dict) -> float:
    recipe = pack("quant.recipe").Recipe.make("sdnq", settings)
    engine = pack("quant.engine")
    decided = recipe.decide("layer", tuple(weight.shape))
    start = time.perf_counter()
    engine.quantize_layer(weight, decided)
    if weight.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def file_seconds(source: Path, target: Path, settings: dict, device: str) -> float:
    job, floats = pack("loaders.quantize_file"), pack("loaders.float_model")
    containers, recipe = pack("loaders.writers").CONTAINERS, pack("quant.recipe").Recipe
    start = time.perf_counter()
    plan = pack("loaders.plan").make_plan(source)
    prepared = job.prepare(
        floats.FileFloats(plan),
        recipe.make("sdnq", settings),
        containers["sdnq"],
        config=plan.config,
    )
    prepared.run(target, device=device, hash_source=False)
    plan.source.close()
    return time.perf_counter() - start


def against(ours: list[float], theirs: list[float]) -> dict:
    """Medians, and the ratio of times of the same round."""
    ratios = [t / o for o, t in zip(ours, theirs, strict=True)]
    return {"ours_s": spread(ours), "sdnq_s": spread(theirs), "times_as_fast": spread(ratios)}


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    made.add_argument("--rounds", type=int, default=5)
    made.add_argument("--threads", type=int, default=cores())
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    made.add_argument("--no-file", action="store_true", help="weights alone")
    made.add_argument("--smoke", action="store_true", help="tiny sizes: does it run at all")
    made.add_argument("--out", type=Path, help="folder of the result")
    told = made.parse_args()
    torch.set_num_threads(told.threads)
    shapes = ((256, 128),) if told.smoke else SHAPES
    package = Package(told.device, told.threads)
    result = {**facts(told.device), "threads": told.threads, "layers": [], "files": []}
    for name, settings in CASES.items():
        for shape in shapes:
            weight = weight_of(shape, told.device)
            ours, theirs = [], []
            for number in range(told.rounds + 1):
                mine = layer_seconds(weight, settings)
                other = package.ask(shape=shape, settings=settings)["seconds"]
                if number:  # the first round compiles and fills caches
                    ours.append(mine)
                    theirs.append(other)
            row = {"case": name, "shape": shape, **against(ours, theirs)}
            result["layers"].append(row)
            print(name, shape, row["times_as_fast"], flush=True)
    if not (told.no_file or told.smoke):
        with tempfile.TemporaryDirectory(prefix="lowbit-bench-") as folder:
            source = Path(folder) / "float"
            package.ask(folder=str(source), make=True)
            nbytes = sum(file.stat().st_size for file in source.iterdir())
            for name in FILE_CASES:
                ours, theirs = [], []
                for number in range(told.rounds):
                    mine, other = (Path(folder) / f"{side}-{name}-{number}" for side in "ab")
                    ours.append(file_seconds(source, mine, CASES[name], told.device))
                    theirs.append(
                        package.ask(folder=str(source), target=str(other), settings=CASES[name])[
                            "seconds"
                        ]
                    )
                row = {"case": name, "bytes": nbytes, **against(ours, theirs)}
                result["files"].append(row)
                print("file", name, row["times_as_fast"], flush=True)
    package.close()
    write_results("quantize", result, told.out)


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        worker(sys.argv[2], int(sys.argv[3]))
    else:
        main()
