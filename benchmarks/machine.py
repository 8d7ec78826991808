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
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CACHE = Path(os.environ.get("LOWBIT_CACHE") or Path.home() / ".cache" / "comfyui-lowbit")
ORACLE = os.environ.get("LOWBIT_ORACLE_PYTHON", "")
RESULTS = Path(__file__).resolve().parent / "results"


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def device_name(device: str) -> str:
    """The processor or accelerator, as it calls itself."""
    if device == "cuda":
        import torch

        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return found[1].strip() if found else platform.processor()


def facts(device: str) -> dict:
    """Machine and versions; nothing that names a host or a path."""
    import comfyui_version

    oracle = "import importlib.metadata as m; print(m.version('sdnq'), m.version('diffusers'))"
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    told = subprocess.run(
        [ORACLE, "-c", oracle], env=env, capture_output=True, text=True, check=True
    )
    sdnq, diffusers = told.stdout.split()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "device": device,
        "device_name": device_name(device),
        "cpu": device_name("cpu"),
        "cores": cores(),
        "memory_gib": round(memory),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": importlib.metadata.version("torch"),
        "safetensors": importlib.metadata.version("safetensors"),
        "comfyui": comfyui_version.__version__,
        "sdnq": sdnq,
        "diffusers": diffusers,
    }


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


def write_results(name: str, results: dict) -> None:
    """``results/<device>-<cores>core-<name>.json``, or ``results/<accelerator>-<name>.json``."""
    kind = f"cpu-{results['cores']}core"
    if results["device"] != "cpu":
        kind = re.sub(r"[^a-z0-9]+", "-", results["device_name"].lower()).strip("-")
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"{kind}-{name}.json"
    text = json.dumps(rounded(results), indent=2)
    file.write_text(text + "\n", encoding="utf-8")
    print(f"written: {file.relative_to(ROOT)}", file=sys.stderr)
