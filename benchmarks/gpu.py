"""Everything that only a GPU can tell, in one call of under ten minutes.

    python3 benchmarks/gpu.py --out FOLDER [--seconds 570] [--smoke] [--only STAGE,...]
    python3 benchmarks/gpu.py --split FOLDER/gpu.json

On a machine without ComfyUI it first unpacks ``build/gpu/host.tar.xz``, which ``carry.py`` makes.
Stages run one after another, each a process with a time limit of its own; what a stage did not use
goes to those after it. ``FOLDER/gpu.json`` holds all results so far and is rewritten after every
stage; ``--split`` puts them where committed results lie. ``--smoke`` runs the same on a CPU with
tiny sizes.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
ARCHIVE = ROOT / "build" / "gpu" / "host.tar.xz"
UNPACKED = Path(os.environ.get("LOWBIT_UNPACKED") or "/tmp/lowbit-host")
LARGE = "single linear1,img mlp down,img qkv,single linear2"
SPARE = 8.0  # seconds that a stage gets to end by itself before it is killed
TAIL = 6000


@dataclass(frozen=True)
class Stage:
    """A part of the run.

    Attributes:
        name: Of its results.
        seconds: Its limit.
        arguments: Of ``run.py``; empty for the tests.
    """

    name: str
    seconds: float
    arguments: tuple[str, ...] = ()


FIRST = "--models flux1 --rounds 4"
STAGES = (
    Stage("limits", 30, ("limits",)),
    Stage("verify", 75, ("verify",)),
    Stage(
        "layers",
        120,
        (
            "layers",
            *FIRST.split(),
            "--layers",
            LARGE,
            "--rows",
            "4608",
            "--sides",
            "ours,no triton",
        ),
    ),
    Stage(
        "layers-few-rows",
        40,
        (
            *("layers", *FIRST.split(), "--layers", "single linear1,single modulation"),
            *("--rows", "1,8,16,64,512", "--sides", "ours,no triton"),
            *("--forms", "uint4,int8,svdq-int4,svdq-nvfp4,awq"),
        ),
    ),
    Stage("tests", 60),
    Stage(
        "peers",
        75,
        (
            *("layers", *FIRST.split(), "--layers", LARGE, "--rows", "4608"),
            *("--sides", "ours,peers", "--forms", "fp8,int8,uint4,uint8,uint4-svd"),
        ),
    ),
    Stage("blocks", 50, ("blocks", "--forms", "uint4,int8,fp8,svdq-int4,svdq-nvfp4")),
    Stage("memory", 60, ("memory", "--forms", "uint4,svdq-int4,int8")),
    Stage("sampling", 110, ("sampling", "--steps", "4")),
)
TESTS = (
    "tests/kernels",
    "tests/host",
    "tests/loaders",
)
SMOKE = {
    "layers": ("--layers", "single linear1", "--rows", "40", "--forms", "uint4,int8"),
    "layers-few-rows": ("--layers", "single linear1", "--rows", "1", "--forms", "uint4"),
    "peers": ("--layers", "single linear1", "--rows", "40", "--forms", "fp8"),
    "verify": ("--forms", "uint4,svdq-int4"),
    "blocks": ("--forms", "uint4"),
    "memory": ("--forms", "uint4"),
    "sampling": ("--steps", "2"),
}


def environment(folder: Path) -> dict[str, str]:
    """Of every stage: ComfyUI importable, an oracle where its packages were carried."""
    env = dict(os.environ, PYTHONUNBUFFERED="1", HF_HUB_OFFLINE="1")
    if importlib.util.find_spec("comfy") is not None:
        return env
    if not (folder / "site").exists():
        if not ARCHIVE.exists():
            raise SystemExit(f"{ARCHIVE.name} is not there: make it with benchmarks/carry.py")
        with tarfile.open(ARCHIVE) as tar:
            tar.extractall(folder, filter="data")
    env["PYTHONPATH"] = os.pathsep.join([str(folder / "comfyui"), str(folder / "site")])
    env["LOWBIT_CACHE"] = str(folder / "cache")
    env["LOWBIT_ORACLE_PYTHON"] = str(oracle(folder))
    return env


def oracle(folder: Path) -> Path:
    """An interpreter that sees the carried packages and torch, and not ComfyUI."""
    home = folder / "oracle"
    python = home / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home)], check=True)
        (site,) = home.glob("lib/python*/site-packages")
        paths = (
            sysconfig.get_paths()["purelib"],
            sysconfig.get_paths()["platlib"],
            folder / "site",
        )
        (site / "host.pth").write_text("".join(f"{path}\n" for path in paths), encoding="utf-8")
    return python


def command(stage: Stage, limit: float, out: Path, smoke: bool) -> list[str]:
    """What runs a stage."""
    if not stage.arguments:
        marked = "not gpu" if smoke else "gpu"
        tests = ["tests/kernels/test_cpu_int8.py"] if smoke else TESTS
        return [sys.executable, "-c", PYTEST, *tests, "-c", "tests/pytest.ini", "-q", "-m", marked]
    made = [sys.executable, str(HERE / "run.py"), *stage.arguments, "--name", stage.name]
    made += ["--out", str(out), "--limit", str(round(limit - SPARE, 1))]
    if smoke:
        made += ["--smoke", "--rounds", "1", "--device", "cpu", *SMOKE.get(stage.name, ())]
    return made


# `python -P` of 3.11 and later: the pack's `nodes` must not hide ComfyUI's.
PYTEST = (
    "import sys; sys.path[:] = [p for p in sys.path if p]; import pytest; sys.exit(pytest.main())"
)


def run(stage: Stage, limit: float, out: Path, smoke: bool, env: dict[str, str]) -> dict:
    """A stage to its end or its limit: how it ended, how long it took, the end of what it said."""
    started = time.monotonic()
    log = out / f"{stage.name}.log"
    with open(log, "w", encoding="utf-8") as handle:
        process = subprocess.Popen(
            command(stage, limit, out, smoke), cwd=ROOT, env=env, stdout=handle, stderr=handle
        )
        try:
            status = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            status = "killed at its limit"
    told = {"status": status, "seconds": round(time.monotonic() - started, 1), "limit": limit}
    text = log.read_text(encoding="utf-8", errors="replace")
    file = out / f"{stage.name}.json"
    told["results"] = json.loads(file.read_text("utf-8")) if file.exists() else None
    told["log"] = text[-TAIL:] if status != 0 or told["results"] is None else ""
    return told


def summary(found: dict[str, dict]) -> str:
    """A short table: how each stage went, the limits, and the goals."""
    from goals import judge

    lines = [f"{'stage':18}{'status':>22}{'seconds':>9}{'rows':>6}  wrong"]
    rows: list[dict] = []
    for name, told in found.items():
        mine = (told["results"] or {}).get("rows", [])
        wrong = sum(bool(row.get("wrong")) or row.get("equal") is False for row in mine)
        lines.append(f"{name:18}{told['status']!s:>22}{told['seconds']:9.1f}{len(mine):6}  {wrong}")
        rows += mine if name in ("layers", "layers-few-rows", "peers") else []
        if name == "limits":
            lines += [
                f"  {row['limit']}: {row['value']:.4g} {row['unit']}"
                for row in mine
                if "value" in row
            ]
    for row in judge(rows):
        verdict = {True: "met", False: "MISSED", None: "not measured"}[row["met"]]
        told = "" if row["found"] is None else f"worst {row['found']:.3g}, best {row['best']:.3g}"
        lines.append(f"{row['goal']:40}{row['wanted']:6.2f}  {verdict:13}{told}")
    return "\n".join(lines)


def split(file: Path) -> None:
    """Put the results of a run where committed ones lie."""
    from machine import write_results

    for name, told in json.loads(file.read_text("utf-8"))["stages"].items():
        if told["results"] is not None:
            results = told["results"]
            folder = HERE / "results" / slug_of(results)
            write_results(name, results, folder)


def slug_of(results: dict) -> str:
    """The folder's name for a device that this machine does not have."""
    import re

    name = results["device_name"]
    name += f" {results['cores']}core" if results["device"] == "cpu" else ""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or "build/gpu/out"))
    parser.add_argument("--seconds", type=float, default=570.0, help="for everything")
    parser.add_argument("--only", default="", help="names of stages, by commas")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, on a CPU")
    parser.add_argument("--split", type=Path, help="put the results of a run into results/")
    options = parser.parse_args()
    if options.split:
        split(options.split)
        return 0
    started = time.monotonic()
    scratch = options.out / "stages"
    scratch.mkdir(parents=True, exist_ok=True)
    env = environment(UNPACKED)
    wanted = [
        stage for stage in STAGES if not options.only or stage.name in options.only.split(",")
    ]
    found: dict[str, dict] = {}
    for stage in wanted:
        left = options.seconds - (time.monotonic() - started)
        planned = sum(later.seconds for later in wanted[wanted.index(stage) :])
        limit = min(stage.seconds * max(left / planned, 0.5), left - 1)
        if limit < 2 * SPARE:
            found[stage.name] = {
                "status": "no time left",
                "seconds": 0.0,
                "limit": limit,
                "results": None,
                "log": "",
            }
            continue
        found[stage.name] = run(stage, limit, scratch, options.smoke, env)
        told = {"seconds": round(time.monotonic() - started, 1), "stages": found}
        file = options.out / "gpu.json"
        file.with_suffix(".tmp").write_text(json.dumps(told, indent=1), encoding="utf-8")
        file.with_suffix(".tmp").replace(file)
        print(f"{stage.name}: {found[stage.name]['status']}", flush=True)
        if found[stage.name]["log"]:
            print(found[stage.name]["log"][-1500:], flush=True)
    print(summary(found))
    return 0 if all(told["status"] == 0 for told in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
