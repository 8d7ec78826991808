"""A changed weight rounded anew to the format that it had."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from support import pack
from units import normal_form, units

dtypes = pack("quant.dtypes")
weights = pack("quant.weight")
reference = pack("kernels.reference")
LowBitError = pack("quant.errors").LowBitError


def dequantized(spec, tensors) -> torch.Tensor:
    return reference.dequantize(tensors, spec)


def test_every_layer_of_the_package_can_be_rounded_anew() -> None:
    """The result has the same layout, and is as near as the package came to the original."""
    for case in units("layers"):
        weight = normal_form(case)
        original = case.tensors["original"]
        for seed in (0, 3):
            again = weights.requantize_like(
                original, weight.spec, weight.tensors, stochastic_seed=seed
            )
            weights.QuantizedWeight(weight.spec, again).check()
            for name, tensor in weight.tensors.items():
                assert again[name].dtype == tensor.dtype, (case.name, name)
                assert again[name].shape == tensor.shape, (case.name, name)
                if name in ("svd_up", "svd_down", "levels"):
                    assert torch.equal(again[name], tensor)
            ours = (dequantized(weight.spec, again) - original).norm()
            theirs = (weight.dequantize() - original).norm()
            assert ours <= theirs * (1.01 if seed == 0 else 2.5) + 1e-6, (case.name, seed)


@pytest.mark.parametrize(
    "settings",
    [
        {"fmt": "int8"},
        {"fmt": "uint5", "group_size": 16},
        {"fmt": "int6", "svd_rank": 4},
        {"fmt": "float8_e4m3fn", "hadamard_group_size": 64},
        {"fmt": "uint4", "scale_dtype": torch.bfloat16, "svd_rank": 4, "svd_dtype": torch.bfloat16},
        {"fmt": "uint4", "use_codebook": True, "group_size": 32},
        {"fmt": "uint3", "use_codebook": True, "group_size": -2},
    ],
    ids=lambda s: "-".join(map(str, s.values())),
)
def test_an_unchanged_weight_stays_as_it_is(settings: dict) -> None:
    torch.manual_seed(0)
    weight = weights.quantize(torch.randn(32, 64), **settings)
    before = weight.dequantize()
    again = weights.requantize_like(before, weight.spec, weight.tensors)
    step = (before.amax() - before.amin()) / 200
    exact = "scale_dtype" not in settings and not weight.spec.rank
    after = dequantized(weight.spec, again)
    assert (after - before).abs().max() <= (1e-5 if exact else step)


def test_scales_follow_the_weight() -> None:
    torch.manual_seed(1)
    weight = weights.quantize(torch.randn(16, 64), "uint4", group_size=16)
    changed = weight.dequantize() * 5 + 1
    again = weights.requantize_like(changed, weight.spec, weight.tensors)
    assert torch.allclose(again["scale"], weight.tensors["scale"] * 5, rtol=1e-4)
    assert torch.allclose(dequantized(weight.spec, again), changed, atol=1e-4)


@pytest.mark.parametrize(
    "settings",
    [
        {"fmt": "int4"},
        {"fmt": "uint3", "group_size": 16},
        {"fmt": "float5_e3m1fn", "group_size": 16},
        {"fmt": "float8_e5m2"},
        {"fmt": "uint4", "use_codebook": True, "group_size": 64},
        {"fmt": "int4", "svd_rank": 4, "hadamard_group_size": 64},
    ],
    ids=lambda s: "-".join(map(str, s.values())),
)
def test_stochastic_rounding_is_unbiased_and_repeatable(settings: dict) -> None:
    torch.manual_seed(2)
    source = torch.randn(16, 64)
    weight = weights.quantize(source, **settings)
    changed = source + 0.02 * torch.randn(16, 64)
    if weight.spec.codebook:
        changed = changed.clamp(-1, 1)  # beyond the levels there is nothing to choose between
    results = [
        dequantized(
            weight.spec,
            weights.requantize_like(changed, weight.spec, weight.tensors, stochastic_seed=seed),
        )
        for seed in (*range(1, 401), 1)
    ]
    assert torch.equal(results[0], results[-1]) and not torch.equal(results[0], results[1])
    stochastic = torch.stack(results[:-1])
    nearest = weights.requantize_like(changed, weight.spec, weight.tensors)
    error_of_one = (dequantized(weight.spec, nearest) - changed).norm()
    error_of_mean = (stochastic.mean(dim=0) - changed).norm()
    assert error_of_mean < 0.2 * error_of_one


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_any_float_dtype_and_plain_floats(dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    weight = weights.quantize(torch.randn(16, 64), "int8", group_size=-1)
    changed = torch.randn(16, 64).to(dtype)
    again = weights.requantize_like(changed, weight.spec, weight.tensors)
    wide = weights.requantize_like(changed.float(), weight.spec, weight.tensors)
    assert torch.equal(again["codes"], wide["codes"])
    spec = dataclasses.replace(weight.spec, format=dtypes.get_format("bfloat16"))
    plain = weights.requantize_like(changed, spec, {"codes": torch.zeros(16, 64).bfloat16()})
    assert torch.equal(plain["codes"], changed.float().bfloat16()) and plain.keys() == {"codes"}


def test_levels_may_stand_in_any_order() -> None:
    torch.manual_seed(4)
    weight = weights.quantize(torch.randn(8, 32), "uint2", use_codebook=True, group_size=16)
    shuffled = {**weight.tensors, "levels": weight.tensors["levels"][..., [2, 0, 3, 1]]}
    changed = torch.randn(8, 32)
    one = weights.requantize_like(changed, weight.spec, weight.tensors)
    two = weights.requantize_like(changed, weight.spec, shuffled)
    assert torch.equal(dequantized(weight.spec, one), dequantized(weight.spec, two))


def test_another_shape_is_refused() -> None:
    weight = weights.quantize(torch.randn(8, 32), "int4")
    with pytest.raises(LowBitError, match="does not fit"):
        weights.requantize_like(torch.randn(32, 8), weight.spec, weight.tensors)


def test_values_beyond_a_rounded_scale_saturate() -> None:
    """A bfloat16 scale may come out too small for the largest weight."""
    torch.manual_seed(5)
    source = torch.randn(64, 64)
    for name in ("int4", "uint4", "float4_e2m1fn", "float8_e4m3fn", "int12"):
        weight = weights.quantize(source, name, scale_dtype=torch.bfloat16)
        assert torch.isfinite(weight.dequantize()).all()
        limit = 0.51 * weight.tensors["scale"].float().max() + 0.005 * source.abs().max()
        gap = {"float4_e2m1fn": 2, "float8_e4m3fn": 32}.get(name, 1)
        assert (weight.dequantize() - source).abs().max() <= limit * gap
