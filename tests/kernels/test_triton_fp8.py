"""Triton's side of float8 products: by the library where it accepts them, else by a kernel."""

from __future__ import annotations

import pytest
import torch
from support import pack
from torch import Tensor
from triton_host import DEVICE, kernels, poisoned
from w4a4 import relative

gemm = kernels("gemm")
fp8 = kernels("fp8")
reference = pack("kernels.reference")
weights = pack("quant.weight")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EPS = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


def noise(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def values(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=noise(seed)).to(torch.float8_e4m3fn)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 3, 17), (37, 45, 208), (40, 33, 131)], ids=str)
def test_the_kernel(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    rows, outputs, inputs = shape
    a, b = values(rows, inputs, seed=1), values(outputs, inputs, seed=2)
    left = torch.rand(rows, generator=noise(3)) + 0.5
    right = torch.rand(outputs, generator=noise(4)) + 0.5
    bias = torch.randn(outputs, generator=noise(5)).to(dtype)
    y = poisoned(rows, outputs, dtype=dtype)
    gemm.launch_scaled(y, *(t.to(DEVICE) for t in (a, b, left, right, bias)))
    expected = (a.double() @ b.double().t()) * left.double()[:, None] * right.double()
    assert relative(y.cpu(), expected + bias.double()) < EPS[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("one", [True, False])
def test_whatever_computes_it(one: bool, dtype: torch.dtype) -> None:
    """The library takes whole channels of 16, and perhaps not this dtype; the kernel all else."""
    for outputs in (48, 45):
        a, b = values(40, 64, seed=6), values(outputs, 64, seed=7)
        left = torch.rand(1 if one else 40, generator=noise(8)) + 0.5
        right = torch.rand(1 if one else outputs, generator=noise(9)) + 0.5
        bias = torch.randn(outputs, generator=noise(10)).to(dtype)
        expected = (a.double() @ b.double().t()) * left.double()[:, None] * right.double()
        for added in (None, bias):
            y = fp8.product(
                *(t.to(DEVICE) for t in (a, b, left, right)),
                dtype,
                None if added is None else added.to(DEVICE),
            )
            exact = expected if added is None else expected + added.double()
            assert relative(y.cpu(), exact) < EPS[dtype]


WEIGHTS = (
    ("float8_e4m3fn", {"group_size": -1}),
    ("float8_e4m3fn", {"group_size": -2}),
    ("float8_e4m3fn", {"group_size": -1, "svd_rank": 5, "hadamard_group_size": 64}),
    ("uint4", {"group_size": 64}),
    ("float4_e2m1fn", {"group_size": 32, "svd_rank": 5}),
    ("int8", {}),
)


@pytest.mark.parametrize("format,options", WEIGHTS, ids=str)
def test_linear(format: str, options: dict) -> None:
    original = torch.randn((32, 256), generator=noise(11)) / 16
    weight = weights.quantize(original, format, **options)
    held = {name: tensor.to(DEVICE) for name, tensor in weight.tensors.items()}
    for dtype in (torch.bfloat16,) if format == "int8" else (torch.bfloat16, torch.float32):
        x = torch.randn((2, 17, 256), generator=noise(12)).to(dtype)
        bias = torch.randn(32, generator=noise(13)).to(dtype)
        product = x.double() @ weight.dequantize().double().t() + bias.double()
        found = fp8.linear_fp8(x.to(DEVICE), held, weight.spec, bias.to(DEVICE))
        expected = reference.linear_fp8(x, weight.tensors, weight.spec, bias)
        assert found.dtype == dtype
        if fp8.is_stored_fp8(weight.spec):
            # Rotated rows may fall on the other side of a half, which is a 16th of a value.
            limit = 4e-3 if weight.spec.hadamard else EPS[dtype]
            assert relative(found.cpu(), expected) < limit
        assert relative(found.cpu(), product) < 1.25 * relative(expected, product) + EPS[dtype]
        prepared = fp8.prepare(x.to(DEVICE), weight.spec)
        again = fp8.linear_fp8_prepared(prepared, held, weight.spec, bias.to(DEVICE))
        assert torch.equal(again, found)


def test_few_rows_none_and_rows_apart() -> None:
    weight = weights.quantize(
        torch.randn((32, 64), generator=noise(14)), "float8_e4m3fn", group_size=-1
    )
    held = {name: tensor.to(DEVICE) for name, tensor in weight.tensors.items()}
    x = torch.randn((3, 24, 128), generator=noise(15)).to(DEVICE)
    few = x[0, :5, :64]
    expected = reference.linear_dequantize(few.cpu(), weight.tensors, weight.spec)
    torch.testing.assert_close(fp8.linear_fp8(few, held, weight.spec).cpu(), expected)
    assert fp8.linear_fp8(x[:0, :, :64], held, weight.spec).shape == (0, 24, 32)
    apart = x[:, ::2, 20:84]
    found = fp8.linear_fp8(apart, held, weight.spec)
    assert torch.equal(found, fp8.linear_fp8(apart.contiguous(), held, weight.spec))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(4608, 3072, 12288), (4608, 21504, 3072)], ids=str)
def test_real_sizes(shape: tuple[int, int, int]) -> None:
    rows, outputs, inputs = shape
    x = torch.randn((rows, inputs), device=DEVICE, dtype=torch.bfloat16)
    original = torch.randn((outputs, inputs), device=DEVICE) * inputs**-0.5
    for format, size in (("float8_e4m3fn", -1), ("uint4", 64)):
        weight = weights.quantize(original, format, group_size=size)
        product = torch.nn.functional.linear(x.float(), weight.dequantize())
        found = fp8.linear_fp8(x, weight.tensors, weight.spec).float()
        assert (found - product).norm() < 0.045 * product.norm()
        codes = x.to(torch.float8_e4m3fn)
        one = torch.ones(1, device=DEVICE)
        if weight.spec.format.word == torch.float8_e4m3fn:
            plain = weight.tensors["codes"].view(outputs, inputs)
            library = fp8.product(codes, plain, one, one, torch.bfloat16, None).float()
            own = gemm.scaled_product(codes, plain, one, one, torch.bfloat16).float()
            assert (own - library).norm() < 4e-3 * library.norm()
