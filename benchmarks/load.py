"""Memory and time of loading a 2 GB checkpoint: this pack in ComfyUI against the sdnq package.

``python scripts/host.py run -- python benchmarks/load.py [--rounds N] [NAME ...]`` prints a table
and writes ``benchmarks/results/<device>/load.json``. Checkpoints are made once, by
``make_checkpoint.py``, in the cache folder.

Every load runs in a fresh process with the files in the page cache, contenders in turn. Anonymous
memory (RssAnon: what is neither file nor shared) is polled from outside every 2 ms and counted from
the idle host, everything imported; pages of a memory-mapped file do not count.

| contender        | what is timed                                                                |
|------------------|------------------------------------------------------------------------------|
| ours bf16, auto  | ``load_diffusion_model`` in the real ComfyUI, matmul dequantize, by compute  |
|                  | dtype: scales read and checked, codes left as views of the mapped file       |
| sdnq pretrained  | the package's documented call, ``AutoModel.from_pretrained`` of diffusers:   |
|                  | scales converted and copied, codes left as views of the mapped file          |
| sdnq load        | ``sdnq.loader.load_sdnq_model``: everything left as views, nothing read      |
| ... owned        | the same and then every weight in memory of its own (``tensor.clone()``)     |
| memcpy           | one ``copy_`` of every file from its map to new memory: the floor of "owned" |

Imports are done before the clock starts, for every contender. On a machine that does other work
besides, CPU seconds with ``--threads 1`` are the steadier measure (waiting threads of torch burn
time of their own).
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import subprocess
import sys
import threading
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from machine import CACHE, ORACLE, ROOT, cores, facts, spread, write_results

CHECKPOINTS = (
    "uint4-single", "uint4-sharded", "int8-single", "int8-sharded", "int8deep-single",
    "int8deep-sharded",
)  # fmt: skip
DEFAULT = ("uint4-single", "int8-sharded", "int8deep-single")
THEIRS = ("sdnq pretrained", "sdnq load", "sdnq pretrained owned", "sdnq load owned")
CONTENDERS = ("ours bf16", "ours auto", "ours bf16 owned", *THEIRS, "memcpy")
PEAK_LIMIT = 1.15
SPEED_GOAL = 2.0
POLL_SECONDS = 0.002


# ---------------------------------------------------------------------- inside a fresh process


def nbytes(tensor) -> int:
    """Bytes of a weight; of a quantized tensor those of its storage."""
    if not hasattr(tensor, "_qdata"):
        return tensor.nbytes
    params = tensor._params
    return tensor._qdata.nbytes + sum(getattr(params, f).nbytes for f in params._tensor_fields())


def prepare_ours(path: Path, mode: str) -> Callable[[], dict]:
    sys.path.insert(0, str(ROOT / "tests"))
    from support import pack

    api = pack("loaders.host.api")
    dtype, _, owned = mode.partition(" ")
    options = {"matmul": "dequantize", "compute_dtype": dtype}

    def load() -> dict:
        patcher = api.load_diffusion_model(str(path), options)
        model = patcher.model.diffusion_model
        kept = [parameter.data.clone() for parameter in model.parameters()] if owned else []
        return {"model": (patcher, kept), "weights": sum(nbytes(p) for p in model.parameters())}

    return load


def prepare_sdnq(path: Path, mode: str) -> Callable[[], dict]:
    import torch
    from diffusers import AutoModel, FluxTransformer2DModel
    from sdnq.loader import load_sdnq_model

    call, _, owned = mode.partition(" ")

    @torch.no_grad()
    def load() -> dict:
        if call == "pretrained":
            model = AutoModel.from_pretrained(str(path), torch_dtype=torch.bfloat16)
        else:
            model = load_sdnq_model(
                str(path), model_cls=FluxTransformer2DModel, dtype=torch.bfloat16
            )
        if owned:
            for parameter in model.parameters():
                parameter.data = parameter.data.clone()
        return {"model": model, "weights": sum(p.nbytes for p in model.parameters())}

    return load


def prepare_memcpy(path: Path, mode: str) -> Callable[[], dict]:
    import torch

    def load() -> dict:
        copies = []
        warnings.simplefilter("ignore")  # the map is read-only, and nothing writes to it
        for file in sorted(path.glob("*.safetensors")):
            with file.open("rb") as handle:
                view = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
            source = torch.frombuffer(view, dtype=torch.uint8)
            copies.append(torch.empty_like(source).copy_(source))
        return {"model": copies, "weights": sum(copy.nbytes for copy in copies)}

    return load


PREPARE = {"ours": prepare_ours, "sdnq": prepare_sdnq, "memcpy": prepare_memcpy}


def child(path: str, contender: str) -> None:
    """Import everything, say ``idle``, wait for the word, load, say what was loaded."""
    name, _, mode = contender.partition(" ")
    load = PREPARE[name](Path(path), mode)
    print(json.dumps({"idle": rss_anon(os.getpid())}), flush=True)
    sys.stdin.readline()
    start, cpu_start = time.perf_counter(), time.process_time()
    loaded = load()
    told = {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - cpu_start,
        "weights": loaded["weights"],
        "after": rss_anon(os.getpid()),
    }
    print(json.dumps(told), flush=True)
    sys.stdin.readline()
    os._exit(0)  # the model need not be taken apart


# --------------------------------------------------------------------------------- from outside


def rss_anon(pid: int) -> int:
    """Anonymous resident bytes of a process."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("this system does not tell RssAnon: the benchmark needs Linux")


def warm(path: Path) -> int:
    """Read every file once, so that it lies in the page cache; its bytes."""
    total = 0
    for file in path.glob("*.safetensors"):
        with file.open("rb", buffering=0) as handle:
            while block := handle.read(1 << 24):
                total += len(block)
    return total


def say_lines(process: subprocess.Popen, wanted: str) -> dict:
    """The child's next line that is an object with this key; libraries print others."""
    for line in process.stdout:
        if line.startswith("{") and wanted in (told := json.loads(line)):
            return told
    raise SystemExit(f"the loading process ended with status {process.wait()}")


def measure(path: Path, contender: str) -> dict:
    """Load once in a fresh process."""
    size = warm(path)
    python = ORACLE if contender.startswith("sdnq") else sys.executable
    env = dict(os.environ, SDNQ_USE_TORCH_COMPILE="0", HF_HUB_OFFLINE="1")
    if contender.startswith("sdnq"):
        env.pop("PYTHONPATH", None)
    command = [python, __file__, "--child", str(path), contender]
    with subprocess.Popen(
        command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        idle = say_lines(process, "idle")["idle"]
        peak, done = idle, threading.Event()

        def watch() -> None:
            nonlocal peak
            while not done.is_set():
                peak = max(peak, rss_anon(process.pid))
                time.sleep(POLL_SECONDS)

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        process.stdin.write("load\n")
        process.stdin.flush()
        told = say_lines(process, "seconds")
        done.set()
        watcher.join()
        process.stdin.write("end\n")
    return {
        "seconds": told["seconds"],
        "cpu_seconds": told["cpu_seconds"],
        "file_bytes": size,
        "weight_bytes": told["weights"],
        "peak_bytes": peak - idle,
        "kept_bytes": told["after"] - idle,
        "idle_bytes": idle,
    }


def checkpoint(name: str) -> Path:
    """The checkpoint's folder; made when it is not there."""
    folder = CACHE / "bench" / name
    if not (folder / "quantization_config.json").exists():
        format_name = name.partition("-")[0]
        print(f"making the {format_name} checkpoints (a few minutes)", flush=True)
        env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        script = Path(__file__).with_name("make_checkpoint.py")
        subprocess.run(
            [ORACLE, str(script), str(folder.parent), format_name],
            env=env | {"SDNQ_USE_TORCH_COMPILE": "0", "HF_HUB_OFFLINE": "1"},
            check=True,
        )
    return folder


def summary(runs: dict[str, list[dict]]) -> dict[str, dict]:
    """Medians and ratios of one checkpoint. Of memory the worst run counts, of time the median."""
    found = {}
    for contender, measured in runs.items():
        seconds = spread([run["seconds"] for run in measured])
        worst = max(measured, key=lambda run: run["peak_bytes"])
        found[contender] = {
            "seconds": seconds,
            "cpu_seconds": spread([run["cpu_seconds"] for run in measured]),
            "gigabytes_per_second": worst["file_bytes"] / seconds["median"] / 1e9,
            "peak_over_weights": worst["peak_bytes"] / worst["weight_bytes"],
            **{key: value for key, value in worst.items() if "seconds" not in key},
        }
    for contender, row in found.items():
        if contender.startswith("ours"):
            for ratios, clock in (
                ("times_as_fast_as", "seconds"),
                ("times_less_cpu_than", "cpu_seconds"),
            ):
                row[ratios] = {
                    other: found[other][clock]["median"] / row[clock]["median"]
                    for other in found
                    if not other.startswith("ours")
                }
    return found


def show(name: str, rows: dict[str, dict]) -> None:
    print(f"\n{name}: {next(iter(rows.values()))['file_bytes'] / 1e9:.2f} GB of files")
    heads = ("seconds", "best", "cpu s", "GB/s", "peak GB", "weights GB", "peak/weights")
    print(f"{'':22}" + "".join(f"{head:>13}" for head in heads))
    for contender, row in rows.items():
        values = (
            row["seconds"]["median"],
            row["seconds"]["best"],
            row["cpu_seconds"]["median"],
            row["gigabytes_per_second"],
            row["peak_bytes"] / 1e9,
            row["weight_bytes"] / 1e9,
            row["peak_over_weights"],
        )
        print(f"{contender:22}" + "".join(f"{value:13.3f}" for value in values))
    for contender, row in rows.items():
        for other, times in row.get("times_as_fast_as", {}).items():
            cpu = row["times_less_cpu_than"][other]
            print(f"  {contender}: {times:.2f} x as fast as {other}, {cpu:.2f} x less CPU time")


def main() -> int:
    parser = argparse.ArgumentParser(description="Memory and time of loading.")
    parser.add_argument("names", nargs="*", default=DEFAULT, help=", ".join(CHECKPOINTS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="*", default=CONTENDERS, help=", ".join(CONTENDERS))
    parser.add_argument("--threads", type=int, default=cores(), help="of torch; default: all cores")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    results = {}
    for name in options.names:
        path = checkpoint(name)
        runs = defaultdict(list)
        for _ in range(options.rounds):
            for contender in options.only:
                runs[contender].append(measure(path, contender))
        results[name] = summary(runs)
        show(name, results[name])
    ours = [
        row
        for rows in results.values()
        for contender, row in rows.items()
        if contender.startswith("ours") and not contender.endswith("owned")
    ]
    small = all(row["peak_over_weights"] < PEAK_LIMIT for row in ours)
    print(f"\npeak memory below {PEAK_LIMIT} x weights: {'yes' if small else 'NO'}")
    for other in THEIRS:  # each against the state of ours that is the same as its own
        mine = "ours bf16 owned" if other.endswith("owned") else "ours bf16"
        if other in options.only and mine in options.only:
            least = min(rows[mine]["times_as_fast_as"][other] for rows in results.values())
            verdict = "yes" if least >= SPEED_GOAL else "NO"
            print(f"at least {SPEED_GOAL} x as fast as {other}: {verdict} ({least:.2f})")
    if tuple(options.names) == DEFAULT and tuple(options.only) == CONTENDERS:
        settings = {"rounds": options.rounds, "threads": options.threads}
        write_results("load", facts("cpu") | settings | {"checkpoints": results})
    return 0 if small else 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
    else:
        sys.exit(main())
