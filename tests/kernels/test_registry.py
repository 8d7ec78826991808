"""The registry: what is chosen, and the reason against everything else."""

from __future__ import annotations

import threading

import pytest
import torch
from support import pack

registry = pack("kernels.registry")
CPU = registry.Call(
    device="cpu",
    capability=None,
    dtype=torch.bfloat16,
    shape=(256, 512),
    format="int8",
    bits=8,
    rowwise=True,
    symmetric=True,
    plain=True,
)


def changed(**values):
    from dataclasses import replace

    return replace(CPU, **values)


def test_every_operation_has_a_reference_that_applies():
    operations = {*registry.MATMUL_OPERATIONS.values(), "linear_weight_only"}
    assert operations == set(registry.registry.operations())
    call = changed(activation=pack("kernels.spec").ActivationSpec("int8", 0, "float32"))
    for operation in operations:
        choice = registry.registry.choose(operation, call, "reference")
        assert choice.implementation.backend == "reference"
        assert callable(choice.implementation.function())


def test_a_refused_kernel_gives_its_reason():
    choice = registry.registry.choose("linear_int8", CPU)
    assert dict(choice.refused)["comfy_kitchen"] == "needs a cuda device, this is cpu"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"capability": (7, 0)}, "compute capability 7.5"),
        ({"capability": None}, "needs compute capability 7.5, AMD gfx11 or gfx12"),
        ({"format": "uint8"}, "int8 codes"),
        ({"rowwise": False}, "grouped"),
        ({"symmetric": False}, "zero point"),
        ({"plain": False}, "low-rank"),
        ({"smoothing": "divide"}, "smoothing"),
        ({"two_level": True}, "two levels"),
    ],
)
def test_constraints_say_what_is_wrong(values, words):
    call = changed(device="cuda", **({"capability": (9, 0)} | values))
    kitchen = next(
        row
        for row in registry.registry.implementations("linear_int8")
        if row.backend == "comfy_kitchen"
    )
    assert words in kitchen.why_not(call)


@pytest.mark.parametrize("shape", [(256, 500), (16, 512), (256, 512, 3)])
def test_shapes_that_no_quantized_product_takes(shape):
    with pytest.raises(registry.NoImplementationError, match="needs"):
        registry.registry.choose("linear_int8", changed(shape=shape))
    assert registry.registry.choose("dequantize", changed(shape=shape))


def test_a_forced_backend_is_never_left_silently():
    choice = registry.registry.choose("dequantize", CPU, "comfy_kitchen")
    assert choice.implementation.backend == "reference"
    assert ("comfy_kitchen", "has no dequantize") in choice.refused
    assert "not comfy_kitchen: has no dequantize" in choice.describe()


def test_reference_can_be_forced():
    own = registry.Registry()
    for backend, priority in (("reference", 0), ("comfy_kitchen", 9)):
        own.register(registry.Implementation("x", backend, ".reference:dequantize", priority))
    assert own.choose("x", CPU, "reference").implementation.backend == "reference"


def test_unknown_operation_lists_nothing():
    with pytest.raises(registry.NoImplementationError, match="none registered"):
        registry.registry.choose("fold", CPU)


def test_backends_without_kernels_say_so():
    status = registry.registry.backend_status("cuda")
    assert status["reference"] is None
    assert not any("no kernels" in (why or "") for why in status.values())
    own = registry.Registry()
    own.register(registry.Implementation("x", "reference", "x:y"))
    status = own.backend_status("cuda")
    assert status.pop("reference") is None and len(status) == len(registry.BACKENDS) - 1
    assert all("no kernels" in why for why in status.values())


INT4 = {
    "device": "cuda",
    "capability": (8, 6),
    "format": "int4",
    "bits": 4,
    "rowwise": False,
    "plain": False,
    "group": 64,
    "rank": 32,
    "smoothing": "divide",
    "activation": pack("kernels.spec").ActivationSpec("int4", 64),
}
AWQ = {
    "device": "cuda",
    "capability": (8, 6),
    "format": "uint4",
    "bits": 4,
    "rowwise": False,
    "symmetric": False,
    "group": 64,
    "rows": 8,
}


@pytest.mark.parametrize(
    ("operation", "base", "values", "words"),
    [
        ("linear_faithful", INT4, {"device": "cpu"}, "needs a cuda device"),
        ("linear_faithful", INT4, {"capability": (7, 5)}, "compute capability 8.0"),
        ("linear_faithful", INT4, {"shape": (256, 576)}, "divisible by 128"),
        ("linear_faithful", INT4, {"shape": (192, 512)}, "divisible by 128"),
        ("linear_faithful", INT4, {"dtype": torch.float32}, "float16 or bfloat16 activations"),
        ("linear_faithful", INT4, {"group": 32}, "groups of 64"),
        ("linear_faithful", INT4, {"format": "float4_e2m1fn"}, "int4 codes"),
        ("linear_faithful", INT4, {"rotated": True}, "Hadamard"),
        ("linear_faithful", INT4, {"smoothing": "multiply"}, "divided by the smoothing"),
        ("linear_faithful", INT4, {"activation": None}, "how activations are rounded"),
        ("linear_weight_only", AWQ, {"device": "cpu"}, "needs a cuda device"),
        ("linear_weight_only", AWQ, {"capability": (7, 5)}, "compute capability 8.0"),
        ("linear_weight_only", AWQ, {"group": 128}, "groups of 64"),
        ("linear_weight_only", AWQ, {"format": "int4"}, "uint4 codes"),
        ("linear_weight_only", AWQ, {"plain": False}, "low-rank"),
        ("linear_weight_only", AWQ, {"smoothing": "multiply"}, "smoothing"),
        ("linear_weight_only", AWQ, {"dtype": torch.float32}, "float16 or bfloat16"),
        ("linear_weight_only", AWQ, {"shape": (256, 512, 1)}, "2-D"),
        ("linear_weight_only", AWQ, {"rows": 65}, "at most 64 rows"),
        ("linear_weight_only", AWQ, {"rows": None}, "at most 64 rows"),
    ],
)
def test_constraints_of_4_bit_kernels(operation, base, values, words):
    (kitchen,) = (
        row
        for row in registry.registry.implementations(operation)
        if row.backend == "comfy_kitchen"
    )
    reason = kitchen.why_not(changed(**base | values))
    assert words in reason
    # Without the flaw only the machine itself can be in the way.
    reason = kitchen.why_not(changed(**base))
    assert reason is None or reason.startswith("comfy-kitchen has only its eager backend")


def test_what_rounds_no_activations_has_no_arithmetic_of_its_own():
    with pytest.raises(registry.NoImplementationError, match="how activations are rounded"):
        registry.registry.choose("linear_faithful", CPU)


def test_opt_in_backends_are_for_those_who_choose_them():
    own = registry.Registry()
    for backend, priority in (("reference", 0), ("nunchaku", 9)):
        target = ".reference:dequantize"
        own.register(registry.Implementation("x", backend, target, priority))
    choice = own.choose("x", CPU)
    assert choice.implementation.backend == "reference"
    assert choice.refused == (("nunchaku", registry.OPT_IN),)
    # A reason of the call comes first: choosing the backend would not help.
    rows = (registry.OnDevice(("cuda",)),)
    own.register(registry.Implementation("y", "nunchaku", "x:y", 9, rows))
    own.register(registry.Implementation("y", "reference", "x:y"))
    assert own.choose("y", CPU).refused == (("nunchaku", "needs a cuda device, this is cpu"),)


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)])
def test_what_a_device_emulates_is_for_those_who_choose_it(capability):
    row = registry.Implementation("x", "comfy_kitchen", "x:y", 9, emulated_from=(9, 0))
    call = changed(device="cuda", capability=capability)
    reason = row.why_not(call, forced=False)
    if capability >= (9, 0):
        assert "{}.{}".format(*capability) in reason and "emulates" in reason
    else:  # nothing but the machine itself in the way
        assert reason is None or reason.startswith("comfy-kitchen has only its eager backend")
    assert "emulates" not in (row.why_not(call) or "")
    kitchen = next(
        row
        for row in registry.registry.implementations("linear_faithful")
        if row.backend == "comfy_kitchen"
    )
    assert kitchen.emulated_from == (9, 0)


def test_registering_from_many_threads_loses_nothing():
    own = registry.Registry()

    def work(start: int) -> None:
        for number in range(200):
            own.register(registry.Implementation(f"op{number}", f"b{start}", "x:y", start))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(200):
        rows = own.implementations(f"op{number}")
        assert [row.priority for row in rows] == list(range(7, -1, -1))


# ------------------------------------------------------------------------ devices and rows


@pytest.mark.parametrize(
    ("values", "fits"),
    [
        ({"device": "cuda", "capability": (8, 0), "architecture": "sm_80"}, True),
        ({"device": "cuda", "capability": (7, 5), "architecture": "sm_75"}, False),
        ({"device": "cuda", "architecture": "gfx1100"}, True),
        ({"device": "cuda", "architecture": "gfx942"}, False),
        ({"device": "xpu", "architecture": "xpu"}, False),
        ({"device": "mps"}, False),
        ({}, False),
    ],
)
def test_makes_of_gpus(values, fits):
    wanted = registry.Architectures(cuda=(8, 0), hip=("gfx11", "gfx12"))
    reason = wanted.why_not(changed(**values))
    assert (reason is None) == fits
    if not fits:
        assert "compute capability 8.0, AMD gfx11 or gfx12" in reason
        have = values.get("architecture", values.get("device", "cpu"))
        assert reason.endswith(have) or "this device is compute capability 7.5" in reason
    with_intel = registry.Architectures(cuda=(8, 0), hip=("gfx11",), xpu=True)
    assert with_intel.why_not(changed(device="xpu", architecture="xpu")) is None
    intel = registry.Architectures(xpu=True).why_not(changed(**values))
    assert (intel is None) == (values.get("device") == "xpu")


def test_priorities_of_an_architecture():
    own = registry.Registry()
    target = ".reference:dequantize"
    own.register(registry.Implementation("x", "reference", target))
    own.register(registry.Implementation("x", "torch", target, 20, priority_on=(("gfx9", -1),)))
    for architecture, chosen in (("", "torch"), ("gfx1100", "torch"), ("gfx942", "reference")):
        assert own.choose("x", changed(architecture=architecture)).implementation.backend == chosen
    (kitchen,) = (
        row
        for row in registry.registry.implementations("linear_int8")
        if row.backend == "comfy_kitchen"
    )
    assert kitchen.rank("sm_90") < kitchen.rank("sm_89") == kitchen.rank("sm_120")


def test_numbers_of_rows():
    own = registry.Registry()
    target = ".reference:dequantize"
    few = registry.Implementation("x", "torch", target, 9, (registry.Rows(most=8),))
    many = registry.Implementation("x", "comfy_kitchen", target, 8, (registry.Rows(least=100),))
    for row in (few, many, registry.Implementation("x", "reference", target)):
        own.register(row)
    assert own.row_limits(("x", "y")) == (8, 99)
    assert few.why_not(changed(rows=8)) is None and "at most 8" in few.why_not(changed(rows=9))
    assert "at most 8" in few.why_not(changed(rows=None))
    assert "100 rows and more" in many.why_not(changed(rows=99))
    assert "100 rows" not in (many.why_not(changed(rows=None)) or "")


# ------------------------------------------------------------------------------- trials

reference = pack("kernels.reference")
trial = pack("kernels.trial")
weights = pack("quant.weight")
dispatch = pack("loaders.layouts.dispatch")
calls: list[str] = []


def kernel_of(change):
    """A kernel that the reference's results are changed by."""

    def linear(x, tensors, spec, bias=None):
        calls.append("linear")
        return change(reference.linear_int8(x, tensors, spec, bias))

    return linear


def broken(y):
    raise RuntimeError("PassManager::run failed\nand much more")


KERNELS = {
    "right": lambda y: y,
    "near": lambda y: y * (1 + 1e-3),
    "wrong": lambda y: torch.where(torch.arange(y.shape[-1]) == 5, 0, y),
    "not finite": lambda y: torch.where(torch.arange(y.shape[-1]) == 5, torch.nan, y),
    "another dtype": lambda y: y.float(),
    "broken": broken,
}


@pytest.fixture
def own(monkeypatch):
    """A registry with a tried kernel over the reference, and what to put in as that kernel."""
    table = registry.Registry()
    target = ".reference:linear_int8"
    table.register(registry.Implementation("linear_int8", "reference", target))
    table.register(registry.Implementation("linear_int8", "tried", "tests:kernel", 9))
    tried = registry.Backend("tried", tried=True)
    monkeypatch.setattr(registry, "BACKENDS", (*registry.BACKENDS, tried))
    loaded = {"tests:kernel": kernel_of(KERNELS["right"])}
    plain = registry._load
    monkeypatch.setattr(registry, "_load", lambda t: loaded.get(t) or plain(t))
    calls.clear()
    return table, loaded


def problem(fmt="uint4", *, seed=0, dtype=torch.bfloat16, **how):
    """A trial and call of a random weight."""
    noise = torch.Generator().manual_seed(seed)
    weight = weights.quantize(torch.randn(200, 384, generator=noise), fmt, **how)
    cpu = torch.device("cpu")
    layout = tuple((n, t.dtype, tuple(t.shape)) for n, t in weight.tensors.items())
    made = trial.Trial(weight.spec, layout, cpu, dtype, rows=(3, 40))
    return made, dispatch.call_of(weight.spec, cpu, dtype)


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_are_tried_before_they_are_relied_on(own, caplog, name):
    table, loaded = own
    loaded["tests:kernel"] = kernel_of(KERNELS[name])
    made, call = problem(group_size=64)
    assert table.choose("linear_int8", call).implementation.backend == "tried" and not calls
    right = name in ("right", "near")
    for _ in range(2):
        choice = table.choose("linear_int8", call, "auto", made)
        assert choice.implementation.backend == ("tried" if right else "reference")
    # Tried once (for two numbers of rows), warned once, and known without a trial from then on.
    assert len(calls) == (2 if right else 1)
    warnings = [r.getMessage() for r in caplog.records if "linear_int8 by tried" in r.getMessage()]
    assert len(warnings) == (0 if right else 1)
    assert list(table.seconds_spent()) == ["linear_int8 by tried"]
    if not right:
        assert table.choose("linear_int8", call).implementation.backend == "reference"
        reason = dict(choice.refused)["tried"]
        assert reason in warnings[0] and "uint4" in warnings[0]
        assert ("is wrong" in reason) == (name in ("wrong", "not finite"))
        assert "PassManager" in reason or name != "broken"
        _, other_call = problem("int8", group_size=-1)
        assert table.choose("linear_int8", other_call).implementation.backend == "tried"
        (told,) = table.failures()
        assert told == f"linear_int8 by tried is not used for uint4 weights: {reason}"
        assert dict(table.on_device(call)["linear_int8"]) == {"tried": None, "reference": None}


def test_weights_that_differ_in_size_alone_need_one_trial(own):
    table, _ = own
    for seed, how in ((0, {"group_size": 64}), (1, {"group_size": 64})):
        made, call = problem(seed=seed, **how)
        table.choose("linear_int8", call, "auto", made)
    assert len(calls) == 2
    table.choose("linear_int8", call, "auto", problem(group_size=32)[0])
    assert len(calls) == 4
    small, _ = problem("uint4", group_size=64)
    assert (
        small.problem
        == trial.Trial(small.spec, small.layout, torch.device("cuda", 1), small.dtype).problem
    )


@pytest.mark.parametrize(
    ("fmt", "how"),
    [
        ("uint4", {"group_size": 64}),
        ("int3", {"group_size": 32, "svd_rank": 8}),
        ("uint7", {"group_size": -1}),
        ("int8", {"group_size": -1, "hadamard_group_size": 128}),
        ("float8_e4m3fn", {"group_size": -1}),
        ("float6_e3m2fn", {"group_size": 16}),
    ],
)
def test_trials_are_problems_that_the_reference_solves(fmt, how):
    """Of every kind of weight: as big as said, finite, not zero, and the reference passes."""
    made, _ = problem(fmt, **how)
    spec, layout = made._small()
    tensors = trial.random_tensors(spec, layout, torch.Generator().manual_seed(1))
    weight = reference.dequantize(tensors, spec)
    assert weight.shape == (spec.rows, spec.columns) and weight.isfinite().all() and weight.std()
    assert spec.rows <= 200 and spec.columns <= 384 and spec.format == made.spec.format
    assert {n: t.dtype for n, t in tensors.items()} == {n: d for n, d, _ in layout}
    assert made.why_wrong(reference.linear_int8, reference.linear_int8, "linear_int8") is None
    assert made.why_wrong(reference.dequantize, reference.dequantize, "dequantize") is None

    def transposed(tensors, spec, dtype):
        return reference.dequantize(tensors, spec, dtype).flip(0)

    assert "is wrong" in made.why_wrong(transposed, reference.dequantize, "dequantize")


def test_many_threads_try_a_kernel_once(own):
    table, _ = own
    made, call = problem(group_size=64)
    threads = [
        threading.Thread(target=table.choose, args=("linear_int8", call, "auto", made))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 2


class TritonError(RuntimeError):
    """As Triton's own errors, by its module."""


TritonError.__module__ = "triton.runtime.errors"


def test_a_kernel_that_fails_at_work_gives_way(own, caplog):
    table, loaded = own
    _, call = problem(group_size=64)
    x, weight = torch.randn(40, 64), weights.quantize(torch.randn(64, 64), "uint4", group_size=64)
    running = registry.Running(table.choose("linear_int8", call), call, "auto", table)
    wanted = reference.linear_int8(x, weight.tensors, weight.spec, None)
    loaded["tests:kernel"] = None
    for error in (torch.OutOfMemoryError("full"), ValueError("a bug of ours")):
        running.function = lambda *_, error=error: (_ for _ in ()).throw(error)
        with pytest.raises(type(error)):
            running(x, weight.tensors, weight.spec, None)
    assert not caplog.records
    running.function = lambda *_: (_ for _ in ()).throw(TritonError("out of resource: shared"))
    for _ in range(2):
        assert torch.equal(running(x, weight.tensors, weight.spec, None), wanted)
    assert [r.getMessage().count("out of resource") for r in caplog.records] == [1]
    assert running.implementation.backend == "reference"
    assert table.choose("linear_int8", call).implementation.backend == "reference"


def test_nothing_is_imported_to_register_or_refuse():
    """A process that only looks at the registry has neither Triton, comfy-kitchen nor nunchaku."""
    import subprocess
    import sys
    from pathlib import Path

    folder = Path(registry.__file__).parent
    script = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('k', {str(folder / '__init__.py')!r},"
        f" submodule_search_locations=[{str(folder)!r}])\n"
        "sys.modules['k'] = module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "import torch, k.registry as r\n"
        "before = set(sys.modules)\n"
        "call = r.Call('mps', None, torch.bfloat16, (256, 256), 'int8', 8, True, True, True)\n"
        "for operation in r.registry.operations():\n"
        "    try: r.registry.choose(operation, call)\n"
        "    except r.NoImplementationError: pass\n"
        "r.registry.on_device(call)\n"
        "print([m for m in ('triton', 'comfy_kitchen', 'nunchaku') if m in sys.modules])\n"
    )
    run = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True)
    assert run.stdout.strip() == "[]", run.stderr
