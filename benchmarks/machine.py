"""What the benchmarks share: where things lie, facts about the machine, medians, result files."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CACHE = Path(os.environ.get("LOWBIT_CACHE") or Path.home() / ".cache" / "comfyui-lowbit")
ORACLE = os.environ.get("LOWBIT_ORACLE_PYTHON", "")
RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = (
    "torch",
    "triton",
    "comfy-kitchen",
    "comfy-aimdo",
    "safetensors",
    "sdnq",
    "diffusers",
    "torchao",
    "gemlite",
    "nunchaku",
)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


@cache
def device_name(device: str) -> str:
    """The processor or accelerator, as it calls itself."""
    if device == "cuda":
        import torch

        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return found[1].strip() if found else platform.processor()


def slug(device: str) -> str:
    """The folder of a device's results: ``nvidia-h200``, ``amd-epyc-2core``."""
    name = device_name(device) + (f" {cores()}core" if device == "cpu" else "")
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def versions(python: str = "") -> dict[str, str]:
    """Installed versions of ``PACKAGES``, here or as another interpreter sees them."""
    if not python:
        found = {}
        for name in PACKAGES:
            try:
                found[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                continue
        return found
    code = (
        "import importlib.metadata as m, json, sys\nfound = {}\nfor name in sys.argv[1:]:\n"
        "    try: found[name] = m.version(name)\n"
        "    except m.PackageNotFoundError: pass\nprint(json.dumps(found))"
    )
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    told = subprocess.run([python, "-c", code, *PACKAGES], env=env, capture_output=True, text=True)
    return json.loads(told.stdout) if told.returncode == 0 else {}


@cache
def facts(device: str) -> dict:
    """Machine and versions; nothing that names a host or a path."""
    import comfyui_version

    told = {
        "device": device,
        "device_name": device_name(device),
        "cpu": device_name("cpu"),
        "cores": cores(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "system": platform.system(),
        "python": platform.python_version(),
        "comfyui": comfyui_version.__version__,
        **(versions(ORACLE) if ORACLE else {}),
        **versions(),
    }
    if device == "cuda":
        import torch

        properties = torch.cuda.get_device_properties(0)
        told |= {
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "device_memory_gib": round(properties.total_memory / 2**30),
            "cuda": torch.version.cuda,
            "clocks_mhz": clocks(),
        }
    return told


def clocks() -> str:
    """Clock of the processors and of the memory now, in MHz, as the driver's tool tells it."""
    query = [
        "nvidia-smi",
        "--query-gpu=clocks.sm,clocks.mem,driver_version",
        "--format=csv,noheader",
    ]
    try:
        told = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return "not told"
    return told.stdout.strip() or "not told"


def load_average() -> float:
    """Processes that wanted a core in the last minute: a busy machine shows in the results."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else -1.0


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, best, worst and number of measurements."""
    return {
        "median": statistics.median(values),
        "best": min(values),
        "worst": max(values),
        "n": len(values),
    }


def rounded(value):
    """Floats of nested results to four significant digits."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def write_results(name: str, results: dict, folder: Path | None = None) -> Path:
    """``results/<device>/<name>.json``; whole or not at all."""
    folder = folder or RESULTS / slug(results["device"])
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.json"
    scratch = file.with_suffix(".tmp")
    scratch.write_text(json.dumps(rounded(results), indent=1) + "\n", encoding="utf-8")
    scratch.replace(file)
    print(f"written: {file.relative_to(ROOT) if ROOT in file.parents else file}", file=sys.stderr)
    return file
