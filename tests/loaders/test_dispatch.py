"""From a weight to its kernel: arithmetics that formats bring along, and weight-only products."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support import pack
from w4a4 import activations, layer, normal_form, relative

composite = pack("loaders.layouts.composite")
dispatch = pack("loaders.layouts.dispatch")
faithful = pack("kernels.faithful")
reference = pack("kernels.reference")
registry = pack("kernels.registry")
weights = pack("quant.weight")

CPU = torch.device("cpu")
KINDS = ("int4", "uint4", "nvfp4")


def test_a_call_tells_what_constraints_ask() -> None:
    made = layer("uint4", 32, 128, rank=7)
    spec = normal_form(made).spec
    call = dispatch.call_of(spec, CPU, torch.bfloat16)
    assert (call.group, call.rank, call.rotated, call.plain) == (64, 7, False, False)
    assert (call.smoothing, call.two_level, call.activation) == ("divide", False, spec.activation)
    call = dispatch.call_of(normal_form(layer("nvfp4", 32, 128)).spec, CPU, torch.bfloat16)
    assert (call.group, call.two_level, call.rowwise) == (16, True, False)
    rows = weights.quantize(torch.randn(32, 64), "int8", group_size=-1, hadamard_group_size=64)
    call = dispatch.call_of(rows.spec, CPU, torch.bfloat16)
    assert (call.group, call.rotated, call.plain, call.rowwise) == (64, True, False, True)


@pytest.mark.parametrize("kind", KINDS)
def test_auto_dequantizes_where_only_the_reference_is_there(kind: str) -> None:
    spec = normal_form(layer(kind, 128, 128)).spec
    decision = dispatch.decide(spec, "faithful", "auto", "auto", CPU, torch.bfloat16)
    assert decision.mode == "dequantize"
    assert decision.choice.implementation.function() is reference.dequantize
    assert "arithmetic that the file asks for would be slower" in decision.reason
    assert "comfy_kitchen needs a cuda device" in decision.reason
    assert "nunchaku needs a cuda device" in decision.reason
    forced = dispatch.decide(spec, "faithful", "faithful", "auto", CPU, torch.bfloat16)
    assert forced.mode == "faithful" and forced.reason is None
    assert forced.choice.implementation.function() is faithful.linear_faithful


def test_asking_for_an_arithmetic_that_a_format_does_not_have() -> None:
    spec = weights.quantize(torch.randn(64, 64), "int4", group_size=-1).spec
    decision = dispatch.decide(spec, "faithful", "faithful", "auto", CPU, torch.bfloat16)
    assert decision.mode == "dequantize" and "how activations are rounded" in decision.reason


def held(parts, axis: int):
    weight = composite.build(
        [(f"part{n}", part, wish) for n, (part, wish) in enumerate(parts)], torch.bfloat16, axis
    )
    return composite.held_by(weight), weight._params.spec


@pytest.mark.parametrize("axis", [0, 1])
def test_fused_layers_of_several_arithmetics(axis: int) -> None:
    """Each part in its own; the true bias of the whole goes with parts that shift and do not."""
    made = [layer(kind, 64, 128, rank=8, seed=n) for n, kind in enumerate(KINDS)]
    if axis == 0:
        bias = torch.cat([part.bias for part in made])
        x = activations(made[1], 2, 5, seed=0, dtype=torch.float32)
        inputs = [x] * 3
    else:
        bias = made[0].bias
        inputs = [activations(part, 2, 5, seed=0, dtype=torch.float32) for part in made]
        x = torch.cat(inputs, dim=-1)
    memory, spec = held([(normal_form(part), "faithful") for part in made], axis)
    for matmul in ("faithful", "auto"):
        kernels = dispatch.kernels_of(spec, matmul, "auto", CPU, torch.float32)
        (step,) = kernels  # the same for any number of rows
        assert [part.dense for part in step.parts] == [matmul == "auto"] * 3
        exact = [(part.double() @ one.dense.T) for part, one in zip(inputs, made, strict=True)]
        expected = torch.cat(exact, -1) if axis == 0 else torch.stack(exact).sum(0)
        found = dispatch.linear(x, memory, spec, bias, kernels)
        error = relative(found, expected + bias.double())
        assert error < 1e-5 if matmul == "auto" else 0.01 < error < 0.12
        if matmul == "faithful":
            each = [
                faithful.linear_faithful(part, w.tensors, w.spec)
                for part, w in zip(inputs, map(normal_form, made), strict=True)
            ]
            whole = torch.cat(each, -1) if axis == 0 else torch.stack(each).sum(0)
            assert relative(found, whole + bias) < 1e-6


def test_weight_only_kernels_stand_in_for_dequantizing(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a kitchen that can (here: its eager backend under another name) and no device rule."""
    from comfy_kitchen.backends import eager
    from comfy_kitchen.registry import registry as kitchen

    weight = weights.quantize(
        torch.randn(128, 128), "uint4", group_size=64, scale_dtype=torch.bfloat16
    )
    ask = (weight.spec, None, "auto", "auto", CPU, torch.bfloat16)
    assert dispatch.decide(*ask).mode == "dequantize"
    monkeypatch.setitem(kitchen._backends, "extra", eager)
    monkeypatch.setitem(kitchen._capabilities, "extra", {"gemv_awq_w4a16"})
    registry._probe.cache_clear()
    target = ".kitchen:linear_weight_only"
    row = registry.Implementation("linear_weight_only", "comfy_kitchen", target, 99)
    rows = [row, *registry.registry.implementations("linear_weight_only")]
    monkeypatch.setitem(registry.registry._table, "linear_weight_only", rows)
    decision = dispatch.decide(*ask)
    assert decision.mode == "weight-only"
    assert decision.choice.describe() == "linear_weight_only by comfy_kitchen"
    assert dispatch.decide(*ask, scaled=False).mode == "dequantize"
    assert dispatch.decide(weight.spec, None, "auto", "reference", *ask[4:]).mode == "dequantize"
    memory, spec = held([(weight, None)], 0)
    dispatch.kernels_of.cache_clear()
    kernels = dispatch.kernels_of(spec, "auto", "auto", CPU, torch.bfloat16)
    x, bias = torch.randn(3, 128).to(torch.bfloat16), torch.randn(128).to(torch.bfloat16)
    found = dispatch.linear(x, memory, spec, bias, kernels)
    assert relative(found, x.float() @ weight.dequantize().T + bias) < 8e-3
    dispatch.kernels_of.cache_clear()
    registry._probe.cache_clear()


# ------------------------------------------------------------------- rows and shared activations

COUNTED: list[str] = []


def counted_prepare(x, spec):
    COUNTED.append("prepare")
    return x * 2


def counted_finish(prepared, tensors, spec, bias):
    COUNTED.append("finish")
    return reference.linear_dequantize(prepared / 2, tensors, spec, bias)


def counted_linear(x, tensors, spec, bias):
    COUNTED.append("linear")
    return reference.linear_dequantize(x, tensors, spec, bias)


@pytest.fixture
def halves(monkeypatch: pytest.MonkeyPatch):
    """An int8 product in two halves, and a weight-only product for few rows."""
    own = registry.Registry()
    for operation in ("dequantize", "linear_weight_only"):
        for row in registry.registry.implementations(operation):
            own.register(row)
    row = registry.Implementation("linear_int8", "torch", "test:linear", 9)
    own.register(replace(row, prepare="test:prepare", finish="test:finish"))
    few = (registry.Rows(most=8),)
    own.register(registry.Implementation("linear_weight_only", "torch", "test:few", 9, few))
    functions = {
        "test:linear": counted_linear,
        "test:prepare": counted_prepare,
        "test:finish": counted_finish,
        "test:few": lambda *args: COUNTED.append("few") or reference.linear_dequantize(*args),
    }
    plain = registry._load
    monkeypatch.setattr(registry, "_load", lambda target: functions.get(target) or plain(target))
    monkeypatch.setattr(dispatch, "registry", own)
    COUNTED.clear()
    dispatch.kernels_of.cache_clear()
    yield own
    dispatch.kernels_of.cache_clear()


def parts_of(*kinds: dict, axis: int = 0, columns: int = 128):
    noise = torch.Generator().manual_seed(3)
    made = [
        weights.quantize(
            torch.randn(64, columns, generator=noise), "uint4", **{"group_size": 64} | k
        )
        for k in kinds
    ]
    return made, *held([(weight, "int8") for weight in made], axis)


ROTATED = {"hadamard_group_size": 64}


@pytest.mark.parametrize(
    ("kinds", "axis", "rows", "happens"),
    [
        (({}, {}, {}), 0, 40, ["prepare", "finish", "finish", "finish"]),
        (({}, {}), 0, 9, ["linear", "linear"]),
        (({}, {}), 0, 8, ["few", "few"]),
        (({}, {}), 0, 0, ["few", "few"]),
        (({},), 0, 40, ["linear"]),
        (({}, {}), 1, 40, ["linear", "linear"]),
        (({}, ROTATED, {}), 0, 40, ["prepare", "finish", "linear", "finish"]),
        (
            ({}, ROTATED, {}, ROTATED),
            0,
            40,
            ["prepare", "finish", "prepare", "finish"] + 2 * ["finish"],
        ),
    ],
)
@pytest.mark.parametrize("compiled", [False, True])
def test_parts_share_their_rounded_activations(
    halves, kinds, axis, rows, happens, compiled
) -> None:
    made, memory, spec = parts_of(*kinds, axis=axis)
    kernels = dispatch.kernels_of(spec, "auto", "auto", CPU, torch.float32)
    x, bias = torch.randn(rows, 128 * (len(kinds) if axis else 1)), torch.randn(spec.shape[0])
    run = dispatch.linear
    if compiled:
        torch._dynamo.reset()
        run = torch.compile(run, backend="eager", fullgraph=True)
    else:
        assert [step.rows for step in kernels] == ([8, 31, None] if len(kinds) > 1 else [8, None])
    found = run(x, memory, spec, bias, kernels)
    if not compiled:
        assert happens == COUNTED
    if axis:
        pieces = zip(x.split(128, -1), made, strict=True)
        wanted = sum(piece @ weight.dequantize().T for piece, weight in pieces) + bias
    else:
        wanted = torch.cat([x @ weight.dequantize().T for weight in made], -1) + bias
    assert found.shape == wanted.shape and (found - wanted).norm() <= 1e-5 * wanted.norm()


def test_smoothed_parts_round_their_own_activations(halves) -> None:
    made = [normal_form(layer("int4", 64, 128, seed=n)) for n in range(2)]
    decision = dispatch.Decision(("int8", halves.choose("linear_int8", call(made[0])), None))
    key = dispatch._shared_key
    assert key(made[0].spec, decision, None) is None
    bare = replace(made[0].spec, smoothing="")
    assert key(bare, decision, None) == key(replace(bare, rank=0), decision, 32)
    assert key(bare, decision, 31) is None and key(bare, decision, None) is not None
    static = replace(bare, activation=registry.ActivationSpec("int8", 0, static=True))
    faithful_one = dispatch.Decision(("faithful", decision.choice, None))
    assert key(static, decision, None) and not key(static, faithful_one, None)
    assert key(bare, faithful_one, 8) == key(bare, faithful_one, None)


def call(weight):
    return dispatch.call_of(weight.spec, CPU, torch.float32)
