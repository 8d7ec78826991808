"""From a weight to its kernel: arithmetics that formats bring along, and weight-only products."""

from __future__ import annotations

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
        assert [dense for dense, _ in kernels] == [matmul == "auto"] * 3
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
