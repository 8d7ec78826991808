"""Quantized matrix products against the package's own operands and formulas."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from support import pack
from units import assert_near, units
from units import normal_form as of_the_package
from w4a4 import layer, normal_form, relative

reference = pack("kernels.reference")
weights = pack("quant.weight")

LINEAR = {
    "int8": reference.linear_int8,
    "uint8": reference.linear_uint8,
    "fp8": reference.linear_fp8,
    "fp16": reference.linear_fp16,
}


@pytest.mark.parametrize("matmul", sorted(LINEAR))
def test_products_equal_the_packages_formula(matmul: str) -> None:
    count = exact = 0
    for case in units("matmul"):
        if case.facts["matmul"] != matmul:
            continue
        weight = of_the_package(case)
        x, bias, expected = (case.tensors.get(name) for name in ("x", "bias", "y"))
        found = LINEAR[matmul](x, weight.tensors, weight.spec, bias)
        assert found.dtype == x.dtype and torch.isfinite(found).all()
        if case.facts["exact"] and matmul in ("int8", "uint8"):
            assert torch.equal(found, expected), (
                case.name,
                (found - expected).abs().max() / expected.abs().max(),
            )
            exact += 1
        else:
            assert_near(found, expected, case.name, 2e-6 if case.facts["exact"] else 4e-3)
        count += 1
    assert count >= 20
    assert exact >= 30 or matmul in ("fp8", "fp16")


def test_integer_products_are_exact_for_any_length() -> None:
    torch.manual_seed(0)
    for length in (1, 31, 1024, 1025, 5000):
        a = torch.randint(-128, 128, (7, length)).to(torch.int8)
        b = torch.randint(-128, 128, (5, length)).to(torch.int8)
        a[0], b[0] = -128, -128  # the largest sum there is
        a[1], b[1] = 127, b[1].abs() | 96  # odd sums, which float32 loses beyond 2^24
        expected = (a.to(torch.int64) @ b.t().to(torch.int64)).to(torch.int32)
        found = reference.int_matmul(a, b)
        assert found.dtype == torch.int32 and torch.equal(found, expected)


SETTINGS = [
    {"fmt": "int8", "group_size": -1},
    {"fmt": "uint8", "group_size": -1},
    {"fmt": "uint4"},
    {"fmt": "int5", "svd_rank": 8},
    {"fmt": "uint6", "svd_rank": 8, "hadamard_group_size": 64},
    {"fmt": "float8_e4m3fn", "group_size": -1},
    {"fmt": "float6_e3m2fn", "group_size": -1, "hadamard_group_size": 64},
    {"fmt": "uint4", "use_codebook": True, "group_size": 64},
]


@pytest.mark.parametrize("matmul", sorted(LINEAR))
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(map(str, s.values())))
def test_products_are_near_the_dequantized_product(matmul: str, settings: dict) -> None:
    torch.manual_seed(1)
    weight = weights.quantize(torch.randn(48, 192), **settings)
    x = torch.randn(4, 11, 192) + 0.2
    bias = torch.randn(48)
    expected = reference.linear_dequantize(x, weight.tensors, weight.spec, bias)
    found = LINEAR[matmul](x, weight.tensors, weight.spec, bias)
    error = (found - expected).norm() / expected.norm()
    limit = {"int8": 0.02, "uint8": 0.02, "fp8": 0.06, "fp16": 0.001}[matmul]
    assert 0 < error < limit, error
    narrow = LINEAR[matmul](x.to(torch.bfloat16), weight.tensors, weight.spec, bias)
    assert narrow.dtype == torch.bfloat16 and narrow.shape == (4, 11, 48)
    assert (narrow.float() - expected).norm() / expected.norm() < limit + 0.01


@pytest.mark.parametrize("matmul", sorted(LINEAR))
def test_few_rows_are_dequantized(matmul: str) -> None:
    torch.manual_seed(2)
    weight = weights.quantize(torch.randn(48, 96), "uint4")
    for shape, few in (((31, 96), True), ((96,), True), ((2, 16, 96), False), ((0, 96), True)):
        x = torch.randn(shape)
        expected = reference.linear_dequantize(x, weight.tensors, weight.spec)
        found = LINEAR[matmul](x, weight.tensors, weight.spec)
        assert torch.equal(found, expected) == few, shape


@pytest.mark.parametrize("matmul", sorted(LINEAR))
def test_bad_rows_stay_in_their_rows(matmul: str) -> None:
    """A row of zeros gives the bias, and NaN shows in its own row alone."""
    torch.manual_seed(3)
    weight = weights.quantize(torch.randn(32, 64), "uint4")
    x = torch.randn(40, 64)
    x[3], x[5], x[7, 2] = 0.0, 2.5, float("nan")
    bias = torch.randn(32)
    found = LINEAR[matmul](x, weight.tensors, weight.spec, bias)
    assert torch.allclose(found[3], bias, atol=1e-5)
    constant = 2.5 * weight.dequantize().sum(dim=1) + bias
    assert torch.allclose(found[5], constant, atol=1.5, rtol=0.05)
    assert found[7].isnan().all()
    assert torch.isfinite(found[torch.arange(40) != 7]).all()


def test_a_better_integer_product_can_be_handed_in() -> None:
    torch.manual_seed(4)
    weight = weights.quantize(torch.randn(32, 64), "int8", group_size=-1)
    x = torch.randn(33, 64)
    calls = []

    def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        calls.append((a.dtype, tuple(a.shape), b.dtype, tuple(b.shape)))
        return (a.to(torch.int64) @ b.t().to(torch.int64)).to(torch.int32)

    for linear in (reference.linear_int8, reference.linear_uint8):
        expected = linear(x, weight.tensors, weight.spec)
        found = linear(x, weight.tensors, weight.spec, matmul=product)
        assert torch.equal(found, expected)
    assert calls == [(torch.int8, (33, 64), torch.int8, (32, 64))] * 2


def test_conv_weights_multiply_flattened_patches() -> None:
    torch.manual_seed(5)
    weight = weights.quantize(torch.randn(16, 8, 3, 3), "uint4", group_size=4)
    x = torch.randn(2, 8, 9, 9)
    patches = torch.nn.functional.unfold(x, 3).transpose(1, 2)
    found = reference.linear_int8(patches, weight.tensors, weight.spec)
    expected = torch.nn.functional.conv2d(x, weight.dequantize()).flatten(2).transpose(1, 2)
    assert (found - expected).norm() / expected.norm() < 0.02


@pytest.mark.parametrize("name", sorted(LINEAR))
def test_products_compile_to_one_graph(name: str) -> None:
    torch.manual_seed(6)
    weight = weights.quantize(torch.randn(64, 128), "uint4", svd_rank=4, hadamard_group_size=64)
    spec = dataclasses.replace(weight.spec)
    compiled = torch.compile(
        lambda x, tensors, bias: LINEAR[name](x, tensors, spec, bias),
        fullgraph=True,
        backend="aot_eager",
    )
    x, bias = torch.randn(2, 40, 128), torch.randn(64)
    expected = LINEAR[name](x, weight.tensors, spec, bias)
    assert_near(compiled(x, weight.tensors, bias), expected, name, 1e-2)


@pytest.mark.parametrize("matmul", sorted(LINEAR))
@pytest.mark.parametrize("kind", ["int4", "uint4", "nvfp4"])
def test_smoothed_and_two_level_weights(matmul: str, kind: str) -> None:
    """Outliers of x are smoothed before they are rounded: folded into W they would cost most."""
    for seed in range(2):
        made = layer(kind, 48, 256, seed=seed, by_row=seed == 1)
        made = dataclasses.replace(made, smooth=made.smooth * torch.logspace(-3, 3, 256, 2))
        weight = normal_form(made)
        x = torch.randn(5, 8, 256) * made.smooth.float()
        expected = x.double() @ made.dense.T + made.bias.double()
        found = LINEAR[matmul](x, weight.tensors, weight.spec, made.bias)
        limit = {"int8": 0.02, "uint8": 0.02, "fp8": 0.06, "fp16": 0.001}[matmul]
        assert 0 < relative(found, expected) < limit
        few = LINEAR[matmul](x[:, 0], weight.tensors, weight.spec, made.bias)
        assert relative(few, expected[:, 0]) < 1e-6


@pytest.mark.parametrize("matmul", sorted(LINEAR))
@pytest.mark.parametrize("smoothing", ["divide", "multiply"])
def test_stored_rows_stay_operands_under_smoothing(matmul: str, smoothing: str) -> None:
    """Codes of whole rows are used as stored: a weight of few distinct values stays exact."""
    torch.manual_seed(7)
    fmt = "float8_e4m3fn" if matmul == "fp8" else "int8"
    weight = weights.quantize(torch.randn(32, 64), fmt, group_size=-1)
    spec = dataclasses.replace(weight.spec, smoothing=smoothing, two_level=True)
    tensors = weight.tensors | {
        "smooth": 0.5 + torch.rand(64),
        "scale_2": 0.5 + torch.rand(32, 1),
    }
    plain = weight.dequantize() * tensors["scale_2"]
    x = torch.randn(40, 64)
    smooth = x / tensors["smooth"] if smoothing == "divide" else x * tensors["smooth"]
    scaled = tensors | {"scale": tensors["scale"] * tensors["scale_2"]}
    expected = LINEAR[matmul](smooth, scaled, weight.spec)
    found = LINEAR[matmul](x, tensors, spec)
    assert_near(found, expected, matmul, 1e-6)
    assert relative(found, smooth.double() @ plain.double().T) < 0.06
