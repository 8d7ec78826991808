"""What tests share: the pack as ComfyUI loads it, and the oracle interpreter's files.

``pack("quant.dtypes")`` gives a module of the pack. The pack is loaded once per process, through
ComfyUI's own custom-node loader where ComfyUI is importable, so that tests see the modules that a
server would see (and layouts are registered once).
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from types import ModuleType

from filelock import FileLock

ROOT = Path(__file__).resolve().parent.parent
ORACLES = Path(__file__).resolve().parent / "oracles"
ORACLE_PYTHON = os.environ.get("LOWBIT_ORACLE_PYTHON", "")
#: Scripts for a further oracle environment: a name in FURTHER_ORACLES of scripts/host.py.
FURTHER = {
    "modelopt_files.py": "modelopt",
    "modelopt_weights.py": "modelopt",
    "modelopt_written.py": "modelopt",
    "others_files.py": "others",
    "others_layers.py": "others",
}
CACHE = Path(os.environ.get("LOWBIT_CACHE") or Path.home() / ".cache" / "comfyui-lowbit")


def comfy_root() -> Path:
    """The folder of the ComfyUI under test."""
    spec = importlib.util.find_spec("comfy")
    assert spec is not None, "ComfyUI is not importable: run the tests by scripts/host.py test"
    return Path(next(iter(spec.submodule_search_locations))).parent


@cache
def _package() -> str:
    import torch
    from comfy.cli_args import args

    if not torch.cuda.is_available():
        args.cpu = True
    import nodes

    before = set(sys.modules)
    ok = asyncio.run(nodes.load_custom_node(str(ROOT)))
    assert ok, "ComfyUI's custom-node loader refused the pack"
    name = str(ROOT).replace(".", "_x_")
    assert name in sys.modules and name not in before
    return name


def pack(module: str = "") -> ModuleType:
    """A module of the pack by its path inside the pack; the package itself without one."""
    name = _package()
    return importlib.import_module(f"{name}.{module}" if module else name)


def interpreter(script: str) -> str:
    """The Python of the oracle environment that ``tests/oracles/<script>`` is written for."""
    python = Path(ORACLE_PYTHON)
    if ORACLE_PYTHON and script in FURTHER:
        folder = python.parent.parent
        further = folder.with_name(f"{folder.name}-{FURTHER[script]}")
        python = further / python.relative_to(folder)
    assert ORACLE_PYTHON and python.exists(), (
        f"no oracle environment for {script}: run the tests by scripts/host.py test, or make it "
        f"by scripts/host.py setup"
    )
    return str(python)


def oracle(script: str, *args: str, python: str = "") -> Path:
    """Run ``tests/oracles/<script>`` in its oracle environment; its output folder.

    The script gets the folder to fill as its first argument. Results are kept in the cache under a
    hash of every oracle script, the arguments and the interpreter, and made once.
    """
    python = python or interpreter(script)
    digest = hashlib.sha256()
    for file in sorted(ORACLES.glob("*.py")):
        if file.name == script or file.name in _imports_of(script):
            digest.update(file.read_bytes())
    digest.update(json.dumps([script, args, python]).encode())
    for stamp in sorted(Path(python).parent.parent.glob("*.stamp")):
        digest.update(stamp.read_bytes())
    target = CACHE / "oracle-data" / f"{Path(script).stem}-{digest.hexdigest()[:16]}"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_name(f".{target.name}.lock")):  # other tests may want it, too
            if not target.exists():
                scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=".making-"))
                run_oracle(script, scratch, *args, python=python)
                scratch.rename(target)
    return target


def run_oracle(script: str, target: Path, *args: str, python: str = "") -> Path:
    """Run ``tests/oracles/<script>`` in its oracle environment with ``target`` as its folder."""
    python = python or interpreter(script)
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    env |= {
        "SDNQ_USE_TORCH_COMPILE": "0",
        "SDNQ_USE_OPENVINO_MM": "0",
        "HF_HUB_OFFLINE": "1",
        "DIFFUSERS_VERBOSITY": "error",
    }
    run = subprocess.run(
        [python, str(ORACLES / script), str(target), *args], env=env, capture_output=True, text=True
    )
    assert run.returncode == 0, f"oracle {script} {args} failed:\n{run.stdout}\n{run.stderr}"
    return target


@cache
def _imports_of(script: str) -> frozenset[str]:
    """Oracle scripts that ``script`` imports, directly or through another."""
    found: set[str] = set()
    names = {file.stem: file for file in ORACLES.glob("*.py")}
    queue = [script]
    while queue:
        text = (ORACLES / queue.pop()).read_text(encoding="utf-8")
        for stem, file in names.items():
            imported = f"import {stem}" in text or f"from {stem} " in text
            if file.name not in found and imported:
                found.add(file.name)
                queue.append(file.name)
    return frozenset(found)
