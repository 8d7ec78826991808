"""comfy-kitchen behind our bridge: its eager backend computes what our reference does.

The eager backend rounds dequantized operands to the dtype of x and takes its quotients in it, so
that random activations may fall on the other side of a tie. Activations that are whole steps of a
power of two cannot: for those both agree to the rounding of the operands.
"""

from __future__ import annotations

import dataclasses
import sys

import pytest
import torch
from support import pack
from w4a4 import SHIFT, Layer, activations, layer, normal_form, relative

faithful = pack("kernels.faithful")
kitchen = pack("kernels.kitchen")
reference = pack("kernels.reference")
weights = pack("quant.weight")

KINDS = ("int4", "uint4")
SHAPES = ((128, 128, 16, 5), (256, 192, 3, 257), (128, 384, 0, 1), (384, 64, 32, 40))


def whole_steps(made: Layer, count: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    """Activations whose shifted and smoothed values are codes times powers of two."""
    noise = torch.Generator().manual_seed(seed)
    low, top, steps = (0, 15, (0, 2)) if made.unsigned else (-7, 7, (-3, 2))
    shape = (count, made.scale.shape[1])
    codes = torch.randint(low, top + 1, (*shape, 64), generator=noise)
    codes[:, :, 0] = top
    x = codes * 2.0 ** torch.randint(*steps, (*shape, 1), generator=noise)
    x = x.view(count, -1) * made.smooth.float()
    return (x - SHIFT if made.unsigned else x).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_eager_agrees_to_the_rounding_of_its_operands(kind: str, dtype: torch.dtype) -> None:
    for seed, (rows, columns, rank, count) in enumerate(SHAPES):
        made = layer(kind, rows, columns, rank=rank, seed=seed, half=dtype)
        power = torch.zeros(columns) if made.unsigned else made.smooth.float().round()
        made = dataclasses.replace(made, smooth=(2.0**power).to(dtype))
        weight = normal_form(made)
        x = whole_steps(made, count, seed, dtype)
        ours = faithful.linear_faithful(x, weight.tensors, weight.spec, made.bias)
        theirs = kitchen.linear_faithful(x, weight.tensors, weight.spec, made.bias)
        assert theirs.dtype == dtype
        limit = 5e-3 if dtype == torch.bfloat16 else 6e-4
        assert relative(theirs, ours) < limit, (seed, relative(theirs, ours))


def alike(made: Layer, x: torch.Tensor) -> torch.Tensor:
    """Which rows of x [M, K] kitchen rounds to the same codes; others are off by one in places.

    Its bytes are taken apart here: low nibble first, two's complement or none.
    """
    import comfy_kitchen

    shifted = x + SHIFT if made.unsigned else x
    packed, _, _ = comfy_kitchen.quantize_svdquant_w4a4(
        shifted, made.smooth, made.down.T, act_unsigned=made.unsigned
    )
    bits = torch.stack([packed[: x.shape[0]] & 15, (packed[: x.shape[0]] >> 4) & 15], -1).int()
    theirs = (bits if made.unsigned else (bits ^ 8) - 8).view(x.shape)
    smoothed = (shifted.float() / made.smooth.float()).to(x.dtype)
    activation = normal_form(made).spec.activation
    ours = faithful.round_activations(smoothed, activation)[0].view(x.shape)
    off = (theirs - ours).abs()
    assert off.max() <= 1 and off.mean() < (0.02 if x.dtype == torch.bfloat16 else 0.002)
    return off.amax(dim=1) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_eager_agrees_on_random_activations(kind: str, dtype: torch.dtype) -> None:
    compared = 0
    for seed, (rows, columns, rank, count) in enumerate(SHAPES):
        made = layer(kind, rows, columns, rank=rank, seed=10 + seed, half=dtype)
        weight = normal_form(made)
        x = activations(made, 2, count, seed=seed, dtype=dtype)
        same = alike(made, x.view(-1, columns))
        compared += int(same.sum())
        for bias in (made.bias, None):
            ours = faithful.linear_faithful(x, weight.tensors, weight.spec, bias)
            theirs = kitchen.linear_faithful(x, weight.tensors, weight.spec, bias)
            assert relative(theirs, ours) < (0.04 if dtype == torch.bfloat16 else 0.02)
            ours, theirs = (y.view(-1, rows)[same] for y in (ours, theirs))
            limit = 5e-3 if dtype == torch.bfloat16 else 6e-4
            assert not same.any() or relative(theirs, ours) < limit
        none = kitchen.linear_faithful(x[:, :0], weight.tensors, weight.spec, made.bias)
        assert none.shape == (2, 0, rows) and none.dtype == dtype
    assert compared > (10 if dtype == torch.bfloat16 else 200)


def test_what_a_file_may_leave_out() -> None:
    """No smoothing, and a second scale beside int4 codes."""
    made = layer("int4", 128, 128, seed=20, half=torch.float16)
    weight = normal_form(made)
    spec = dataclasses.replace(weight.spec, smoothing="", two_level=True)
    second = (0.5 + torch.rand(128, 1, 1)).to(torch.float16).float()
    tensors = {**weight.tensors, "scale_2": second}
    del tensors["smooth"]
    made = dataclasses.replace(made, smooth=torch.ones_like(made.smooth))
    x = whole_steps(made, 33, 20, torch.float16)
    ours = faithful.linear_faithful(x, tensors, spec, made.bias)
    theirs = kitchen.linear_faithful(x, tensors, spec, made.bias)
    assert relative(theirs, ours) < 6e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_weight_only_products(dtype: torch.dtype) -> None:
    torch.manual_seed(21)
    for rows, columns, group in ((128, 128, 64), (384, 256, 64)):
        weight = weights.quantize(
            torch.randn(rows, columns) + 0.1, "uint4", group_size=group, scale_dtype=dtype
        )
        bias = torch.randn(rows)
        for shape in ((1,), (3, 7), (kitchen.WEIGHT_ONLY_ROWS,)):
            x = torch.randn(*shape, columns).to(dtype)
            theirs = kitchen.linear_weight_only(x, weight.tensors, weight.spec, bias)
            ours = reference.linear_dequantize(x.float(), weight.tensors, weight.spec, bias)
            assert theirs.dtype == dtype
            assert relative(theirs, ours) < (8e-3 if dtype == torch.bfloat16 else 1e-3)
        assert not torch.equal(
            theirs, reference.linear_dequantize(x, weight.tensors, weight.spec, bias)
        )
        for count in (0, kitchen.WEIGHT_ONLY_ROWS + 1):  # the dequantized product, bit for bit
            x = torch.randn(count, columns).to(dtype)
            theirs = kitchen.linear_weight_only(x, weight.tensors, weight.spec, bias)
            ours = reference.linear_dequantize(x, weight.tensors, weight.spec, bias)
            assert torch.equal(theirs, ours)


def test_the_zero_point_of_official_files_is_exact() -> None:
    """zero = -7 * scale there: code 7 must give 0, whatever the dtypes round."""
    spec = pack("kernels.spec").WeightSpec(
        format=pack("quant.dtypes").get_format("uint4"), shape=(128, 128), code_shape=(128, 2, 64)
    )
    scale = (0.1 + torch.rand(128, 2, 1)).to(torch.bfloat16)
    codes = torch.full((128, 128), 7)
    tensors = {
        "codes": pack("quant.packing").pack(codes, spec.format),
        "scale": scale,
        "zero_point": (-7 * scale.float()),
    }
    x = torch.randn(4, 128).to(torch.bfloat16)
    assert not kitchen.linear_weight_only(x, tensors, spec, None).any()


def test_reasons_name_what_kitchen_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    from comfy_kitchen.backends import eager
    from comfy_kitchen.registry import registry

    call = pack("kernels.registry").Call(
        "cuda", (8, 9), torch.bfloat16, (128, 128), "int4", 4, False, True, False
    )
    for name in set(registry.list_backends()) - {"eager"}:
        monkeypatch.setattr(registry, "_disabled", registry._disabled | {name})
    assert "only its eager backend" in kitchen.why_no_svdquant(call)
    # One more backend, that can do some things.
    monkeypatch.setitem(registry._backends, "extra", eager)
    monkeypatch.setitem(registry._capabilities, "extra", {"int8_linear"})
    assert kitchen.why_unavailable("cuda") is None
    reason = kitchen.why_no_svdquant(call)
    assert "extra: has no quantize_svdquant_w4a4 and no scaled_mm_svdquant_w4a4" in reason
    assert "extra: has no gemv_awq_w4a16" in kitchen.why_no_weight_only(call)
    able = {"quantize_svdquant_w4a4", "scaled_mm_svdquant_w4a4"}
    monkeypatch.setitem(registry._capabilities, "extra", able)
    assert kitchen.why_no_svdquant(call) is None
    monkeypatch.setattr(registry, "_disabled", registry._disabled | {"extra"})
    assert "extra: switched off" in kitchen.why_no_svdquant(call)
    monkeypatch.setitem(sys.modules, "comfy_kitchen", None)
    assert "cannot be imported" in kitchen.why_no_svdquant(call)
