"""What the loader runs on devices with Triton, and its products with the kernels at work."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support import pack
from triton_host import DEVICE
from w4a4 import layer, normal_form, relative

composite = pack("loaders.layouts.composite")
dispatch = pack("loaders.layouts.dispatch")
registry = pack("kernels.registry")
trial = pack("kernels.trial")
weights = pack("quant.weight")


SILENT = "switched off by the host"


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch):
    """A device that is not here, with Triton, and comfy-kitchen where it is said to be."""

    def pretend(architecture: str, kitchen: bool) -> torch.device:
        monkeypatch.setattr(dispatch, "architecture_of", lambda _: architecture)
        capability = None
        if architecture.startswith("sm_"):
            capability = divmod(int(architecture[3:]), 10)
        monkeypatch.setattr(dispatch, "capability_of", lambda _: capability)
        here = {"triton": lambda _: None, "comfy_kitchen": lambda _: None if kitchen else SILENT}
        plain = registry._load
        probes = {f".kitchen:why_no_{name}" for name in ("int8", "svdquant", "weight_only")}

        def load(target: str):
            module, _, name = target.partition(":")
            if name == "why_unavailable" and module[1:] in ("triton", "kitchen"):
                return here["triton" if module == ".triton" else "comfy_kitchen"]
            return (lambda _: None) if target in probes else plain(target)

        monkeypatch.setattr(registry, "_load", load)
        registry._probe.cache_clear()
        return torch.device("xpu" if architecture == "xpu" else "cuda")

    yield pretend
    registry._probe.cache_clear()


def weight_of(kind: str):
    """The spec of a weight and what its file asks for."""
    svdq = {"int4": "int4", "unsigned": "uint4", "nvfp4": "nvfp4"}.get(kind)
    if svdq:
        return normal_form(layer(svdq, 128, 128)).spec, "faithful"
    fmt, group, wish = {
        "int8": ("int8", -1, "int8"),
        "uint4": ("uint4", 64, None),
        "uint4 int8": ("uint4", 64, "int8"),
        "fp8": ("float8_e4m3fn", -1, "fp8"),
    }[kind]
    return weights.quantize(torch.randn(128, 128), fmt, group_size=group).spec, wish


MANY, FEW = None, 1
# (kind, rows) -> with comfy-kitchen, without: mode and backend
ON = {
    "sm_90": {
        ("int8", MANY): ("int8 triton", "int8 triton"),
        ("uint4 int8", MANY): ("int8 triton",) * 2,
        ("uint4 int8", FEW): ("weight-only comfy_kitchen", "weight-only triton"),
        ("uint4", MANY): ("weight-only triton",) * 2,
        ("uint4", FEW): ("weight-only comfy_kitchen", "weight-only triton"),
        ("fp8", MANY): ("fp8 triton",) * 2,
        ("fp8", FEW): ("weight-only triton",) * 2,
        ("int4", MANY): ("int8 triton",) * 2,
        ("unsigned", MANY): ("int8 triton",) * 2,
        ("nvfp4", MANY): ("int8 triton",) * 2,
        ("int4", FEW): ("weight-only triton",) * 2,
    },
    "sm_86": {
        ("int8", MANY): ("int8 comfy_kitchen", "int8 triton"),
        ("uint4 int8", MANY): ("int8 triton",) * 2,
        ("fp8", MANY): ("weight-only triton",) * 2,
        ("int4", MANY): ("faithful comfy_kitchen", "int8 triton"),
        ("int4", FEW): ("faithful comfy_kitchen", "weight-only triton"),
        ("nvfp4", MANY): ("int8 triton",) * 2,
    },
    "sm_75": {
        ("int8", MANY): ("int8 comfy_kitchen", "weight-only triton"),
        ("uint4", MANY): ("weight-only triton",) * 2,
        ("int4", MANY): ("weight-only triton",) * 2,
        ("fp8", MANY): ("weight-only triton",) * 2,
    },
    "sm_70": {("uint4", MANY): ("dequantize reference",) * 2},
    "sm_103": {
        ("nvfp4", MANY): ("fp8 triton",) * 2,
        ("int8", MANY): ("int8 comfy_kitchen", "int8 triton"),
    },
    "sm_120": {
        ("int8", MANY): ("int8 comfy_kitchen", "int8 triton"),
        ("int4", MANY): ("int8 triton",) * 2,  # kitchen's 4-bit products are emulated here
    },
    "gfx1100": {
        ("int8", MANY): ("int8 comfy_kitchen", "int8 triton"),
        ("int4", MANY): ("faithful comfy_kitchen", "int8 triton"),
        ("uint4", FEW): ("weight-only triton",) * 2,
        ("fp8", MANY): ("weight-only triton",) * 2,
    },
    "gfx942": {("int8", MANY): ("int8 triton",) * 2, ("int4", MANY): ("int8 triton",) * 2},
    "gfx1030": {("uint4", MANY): ("dequantize reference",) * 2},
    "xpu": {("int8", MANY): ("int8 triton",) * 2, ("uint4", MANY): ("weight-only triton",) * 2},
}


@pytest.mark.parametrize("architecture", ON)
def test_what_auto_runs_on_devices(machine, architecture: str) -> None:
    for kitchen in (True, False):
        device = machine(architecture, kitchen)
        for (kind, rows), expected in ON[architecture].items():
            spec, wish = weight_of(kind)
            decision = dispatch.decide(
                *(spec, wish, "auto", "auto", device, torch.bfloat16), rows=rows
            )
            found = f"{decision.mode} {decision.choice.implementation.backend}"
            assert found == expected[not kitchen], (kind, rows, kitchen, decision)


# ----------------------------------------------------------------- the kernels themselves, at work


@pytest.fixture
def hopper(machine, monkeypatch: pytest.MonkeyPatch):
    """This machine as one of compute capability 9.0, with kernels that the CPU interprets."""
    machine("sm_90", kitchen=False)
    plain = dispatch.call_of
    monkeypatch.setattr(dispatch, "call_of", lambda *a: replace(plain(*a), device="cuda"))
    small = lambda *arguments: trial.Trial(*arguments, rows=(3, 33))  # noqa: E731
    monkeypatch.setattr(dispatch, "Trial", small)
    monkeypatch.setattr(trial, "_OUTPUTS", 32)
    monkeypatch.setattr(trial, "_INPUTS", 64)
    monkeypatch.setattr(registry.registry, "_trials", {})
    monkeypatch.setattr(registry.registry, "_troubles", {})
    dispatch.kernels_of.cache_clear()
    yield DEVICE
    dispatch.kernels_of.cache_clear()


def fused(*formats: tuple[str, int], device: torch.device):
    """A weight of parts, its float32 value and the memory that holds it."""
    noise = torch.Generator().manual_seed(7)
    made = [
        weights.quantize(torch.randn(48, 128, generator=noise), name, group_size=group)
        for name, group in formats
    ]
    weight = composite.build(
        [(f"part{n}", part, "int8") for n, part in enumerate(made)], torch.bfloat16
    )
    memory, spec = composite.held_by(weight), weight._params.spec
    exact = torch.cat([weight.dequantize() for weight in made])
    moved = composite.Held(tuple(c.to(device) for c in memory.codes), memory.side.to(device))
    return exact.to(device), moved, spec


@pytest.mark.parametrize(
    ("matmul", "bound"), [("dequantize", 5e-3), ("auto", 0.02), ("fp8", 0.05), ("uint8", 0.02)]
)
def test_kernels_pass_their_trials_and_multiply(hopper, caplog, matmul, bound) -> None:
    exact, memory, spec = fused(("uint4", 64), ("int8", -1), ("uint4", 32), device=hopper)
    kernels = dispatch.kernels_of(spec, matmul, "auto", hopper, torch.bfloat16)
    assert not registry.registry.failures() and not caplog.records
    assert registry.registry.seconds_spent()
    backends = {part.run.implementation.backend for step in kernels for part in step.parts}
    assert backends == {"triton"}
    mode = {"auto": "int8", "dequantize": "weight-only"}.get(matmul, matmul)
    assert {part.mode for part in kernels[-1].parts} == {mode}
    assert {part.slot for part in kernels[-1].parts} == ({None} if mode == "weight-only" else {"0"})
    assert {part.mode for part in kernels[0].parts} == {"weight-only"}
    noise = torch.Generator().manual_seed(8)
    bias = torch.randn(144, generator=noise).to(hopper, torch.bfloat16)
    for rows in (0, 2, 45):
        x = torch.randn(rows, 128, generator=noise).to(hopper, torch.bfloat16)
        found = dispatch.linear(x, memory, spec, bias, kernels)
        assert found.shape == (rows, 144) and found.dtype == torch.bfloat16
        if rows:
            assert relative(found, x.float() @ exact.T + bias.float()) < bound


def test_kernels_stand_in_one_graph(hopper) -> None:
    """torch.compile sees operators of the pack, not their insides, for any number of rows."""
    _, memory, spec = fused(("uint4", 64), ("int8", -1), device=hopper)
    kernels = dispatch.kernels_of(spec, "auto", "auto", hopper, torch.bfloat16)
    seen: list[str] = []

    def keep(graph, example):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    torch._dynamo.reset()
    run = torch.compile(dispatch.linear, fullgraph=True, backend=keep, dynamic=True)
    for rows in (45, 60, 3):
        x = torch.randn(rows, 128).to(hopper, torch.bfloat16)
        found = run(x, memory, spec, None, kernels)
        assert torch.equal(found, dispatch.linear(x, memory, spec, None, kernels))
    operators = [name for name in seen if name.startswith("lowbit.")]
    assert {"lowbit.linear_int8.default", "lowbit.linear_weight_only.default"} <= set(operators)
    assert operators.count("lowbit.quantize_rows.default") == 1  # both parts share it
    assert not any("index_select" in name or "embedding" in name for name in seen)
