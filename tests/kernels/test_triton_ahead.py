"""Every kernel compiles for every GPU that it claims, and comes out as it should.

A process of its own compiles: this one may have Triton's interpreter. Every kernel is compiled here
for every family of its targets; all entries for all targets, and with the Triton of other torch
releases, when slow.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support import CACHE, ROOT
from triton_host import kernels

SCRIPT = ROOT / "scripts" / "compile_kernels.py"
PINS = re.findall(
    r"^triton==(\S+)", (ROOT / "tests" / "env" / "triton.txt").read_text("utf-8"), re.MULTILINE
)
targets = kernels("targets")
configs = kernels("configs")


def compile_kernels(tmp_path: Path, *arguments: str, triton: str = "") -> dict:
    """What scripts/compile_kernels.py found; its table goes to this test's output."""
    found = tmp_path / "found.json"
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTHONPATH")}
    if triton:
        folder = CACHE / f"triton-{triton}"
        assert folder.exists(), f"no {folder}: run the tests by scripts/host.py test --all"
        env["PYTHONPATH"] = str(folder)
    env["TRITON_CACHE_DIR"] = str(CACHE / "triton-compiled")
    run = subprocess.run(
        [sys.executable, "-P", str(SCRIPT), "--json", str(found), *arguments],
        env=env,
        capture_output=True,
        text=True,
    )
    print(run.stdout, run.stderr)
    assert found.exists(), run.stderr
    told = json.loads(found.read_text("utf-8"))
    told["status"] = run.returncode
    return told


def faults(told: dict) -> list[str]:
    return [
        f"{one['kernel']} on {one['target']}: {'; '.join(one['faults'])}"
        for one in told["found"]
        if one["faults"]
    ]


def test_every_kernel_compiles(tmp_path: Path) -> None:
    told = compile_kernels(tmp_path, "--covering")
    assert not faults(told) and told["status"] == 0
    assert {one["target"] for one in told["found"]} == set(targets.EVERY)
    met = {(one["kernel"].split()[0], configs.family_of(one["target"])) for one in told["found"]}
    for file in (ROOT / "kernels" / "triton").glob("*.py"):
        for entry in getattr(kernels(file.stem), "AHEAD", ()) if file.stem != "__init__" else ():
            assert {(entry.kernel, configs.family_of(name)) for name in entry.targets} <= met
    products = [one for one in told["found"] if one["opcodes"]]
    assert any("GMMA" in name for one in products for name in one["opcodes"])
    assert all(isinstance(one["registers"], int) for one in told["found"])


@pytest.mark.slow
@pytest.mark.parametrize("version", ["", *PINS])
def test_every_kernel_compiles_for_all_that_it_claims(tmp_path: Path, version: str) -> None:
    told = compile_kernels(tmp_path, triton=version)
    assert told["triton"] == (version or importlib.metadata.version("triton"))
    assert not faults(told)


def launched(tmp_path: Path, target: str, *arguments: str) -> list[dict]:
    """What the launchers compile for a target; there is nothing wrong with it."""
    found = tmp_path / "launched.json"
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTHONPATH")}
    env["TRITON_CACHE_DIR"] = str(CACHE / "triton-compiled")
    script = Path(__file__).with_name("launched.py")
    run = subprocess.run(
        [sys.executable, "-P", str(script), target, "--json", str(found), *arguments],
        env=env,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    told = json.loads(found.read_text("utf-8"))
    assert not told["failures"]
    assert not [one for one in told["found"] if one["faults"]]
    return told["found"]


def test_launchers_launch_what_compiles(tmp_path: Path) -> None:
    found = launched(tmp_path, "sm_90", "--forms", "svdq", "--rows", "1", "40")
    names = {"unpack", "gemv", "fused", "rows", "scaled_product", "grouped_product", "bound"}
    assert {f"{name}_kernel" for name in names} <= {one["kernel"] for one in found}


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_75", "sm_90", "sm_100", "sm_120", "gfx942", "gfx1100"])
def test_launchers_launch_what_compiles_on_each_family(tmp_path: Path, target: str) -> None:
    assert len(launched(tmp_path, target)) > 50


def test_no_kernel_is_left_out() -> None:
    """All kernels of the folder stand in AHEAD, for targets that are known."""
    for file in sorted((ROOT / "kernels" / "triton").glob("*.py")):
        text = file.read_text("utf-8")
        defined = set(
            re.findall(r"^@triton\.jit.*\n(?:#.*\n)*def (\w+_kernel)\(", text, re.MULTILINE)
        )
        if not defined:
            continue
        entries = kernels(file.stem).AHEAD
        assert defined == {entry.kernel.split(":")[1] for entry in entries}, file.stem
        assert all(set(entry.targets) <= set(targets.TARGETS) for entry in entries)


# ---------------------------------------------------------------------- the gate can say no


KERNELS = """
import triton, triton.language as tl
from .configs import Ahead, Tile

@triton.jit
def good_kernel(x, y, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at, mask=at < n) * 2, mask=at < n)

@triton.jit
def broken_kernel(x, y, n, BLOCK: tl.constexpr):
    tl.store(y, no_such_thing(x))

@triton.jit
def product_kernel(a, b, c, k, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, span = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    total = tl.zeros((M, N), tl.float32)
    for start in range(0, k, K):
        x = tl.load(a + m[:, None] * k + start + span[None, :])
        y = tl.load(b + n[:, None] * k + start + span[None, :])
        total += tl.dot(x, y.T)
    tl.store(c + m[:, None] * N + n[None, :], total)

def product(m, n, k, warps, stages, what):
    return Ahead("samples:product_kernel", {"a": "*bf16", "b": "*bf16", "c": "*fp32", "k": "i32"},
        {"M": m, "N": n, "K": k}, Tile(m, n, k, warps, stages), ("sm_80", "sm_90"), what)

FLAT = {"x": "*fp32", "y": "*fp32", "n": "i32"}
AHEAD = (
    Ahead("samples:good_kernel", FLAT, {"BLOCK": 256}, Tile(1, 1, 256), ("sm_75", "gfx1100")),
    Ahead("samples:broken_kernel", FLAT, {"BLOCK": 256}, Tile(1, 1, 256), ("sm_80",)),
    Ahead("samples:good_kernel", FLAT, {}, Tile(1, 1, 256), ("sm_80",), label="lacks"),
    Ahead("samples:good_kernel", FLAT, {"BLOCK": 256}, Tile(1, 1, 256), ("sm_80",), "int8", label="no product"),
    product(64, 64, 32, 4, 2, "half"),
    product(256, 256, 32, 4, 2, "half"),
    product(128, 128, 128, 8, 6, "half"),
)
"""  # noqa: E501


def test_the_gate_finds_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that are wrong in one way each, in a copy of the folder."""
    import shutil

    shutil.copytree(ROOT / "kernels", tmp_path / "kernels")
    (tmp_path / "scripts").mkdir()
    shutil.copy(SCRIPT, tmp_path / "scripts")
    (tmp_path / "kernels" / "triton" / "samples.py").write_text(KERNELS, "utf-8")
    monkeypatch.setattr(
        sys.modules[__name__], "SCRIPT", tmp_path / "scripts" / "compile_kernels.py"
    )
    told = compile_kernels(tmp_path, "--only", "samples")
    assert told["status"] == 1
    found = [(o["kernel"], o["target"], "; ".join(o["faults"])) for o in told["found"]]
    expected = [
        ("good_kernel", "sm_75", ""),
        ("good_kernel", "gfx1100", ""),
        ("broken_kernel", "sm_80", "no_such_thing"),
        ("good_kernel lacks", "sm_80", "not given: {'BLOCK'}"),
        ("good_kernel no product", "sm_80", "no instruction like IMMA"),
        ("product_kernel", "sm_80", ""),
        ("product_kernel", "sm_90", ""),
        ("product_kernel", "sm_80", "bytes of stack"),
        ("product_kernel", "sm_90", "bytes of stack"),
        ("product_kernel", "sm_80", "shared"),
        ("product_kernel", "sm_90", "shared"),
    ]
    assert len(found) == len(expected)
    for (kernel, target, fault), (name, on, words) in zip(found, expected, strict=True):
        assert (kernel, target) == (f"samples:{name}", on)
        assert (words in fault) if words else not fault, (kernel, target, fault)
    opcodes = {o["target"]: list(o["opcodes"]) for o in told["found"] if o["opcodes"]}
    assert opcodes["sm_80"][0].startswith("HMMA") and opcodes["sm_90"][0].startswith("HGMMA")
