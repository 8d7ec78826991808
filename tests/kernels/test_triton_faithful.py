"""Triton's products in formats' own arithmetic equal their definition."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from support import pack
from torch import Tensor
from triton_host import DEVICE, kernels
from w4a4 import activations, layer, normal_form, relative

own = kernels("faithful")
faithful = pack("kernels.faithful")
registry = pack("kernels.registry")
weights = pack("quant.weight")
Activation = pack("kernels.spec").ActivationSpec
dispatch = pack("loaders.layouts.dispatch")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# One rounding of the result may fall on the other side; in float32 the order of sums differs.
EPS = {torch.float32: 1e-6, torch.bfloat16: 1e-3, torch.float16: 2e-4}


def held(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to(DEVICE) for name, tensor in tensors.items()}


def compared(x: Tensor, tensors: dict[str, Tensor], spec, bias: Tensor | None) -> float:
    device_bias = None if bias is None else bias.to(DEVICE)
    found = own.linear_faithful(x.to(DEVICE), held(tensors), spec, device_bias)
    assert found.dtype == x.dtype
    return relative(found.cpu(), faithful.linear_faithful(x, tensors, spec, bias))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind,by_row", [("int4", False), ("uint4", False), ("nvfp4", True)])
def test_svdquant(kind: str, by_row: bool, dtype: torch.dtype) -> None:
    for seed, (rows, columns, rank) in enumerate(((45, 128, 20), (33, 64, 0))):
        made = layer(kind, rows, columns, rank=rank, seed=seed, half=dtype, by_row=by_row)
        weight = normal_form(made)
        x = activations(made, 3, 7, seed=seed, dtype=dtype)
        bias = made.bias if rank else None
        assert compared(x, weight.tensors, weight.spec, bias) < EPS[dtype]


ROW, ALL = -1, -2  # group sizes of quantize
E4M3, E8M0 = torch.float8_e4m3fn, torch.float8_e8m0fnu
SCALE, OFFSET = {"input_scale": torch.tensor([0.03])}, {"input_offset": torch.tensor([5.0])}
CASES = (
    ("int8", ROW, None, Activation("int8", 0, "float32"), {}),
    ("int8", ROW, None, Activation("int8", -1, "float32"), {}),
    ("int8", ROW, None, Activation("int8", -1, "float32", static=True), SCALE),
    ("int8", ROW, None, Activation("int8", -1, "float32", True, offset=True), SCALE | OFFSET),
    ("int4", ROW, None, Activation("int4", 0, "float32"), {}),
    ("int8", ROW, None, Activation("int8", 256, "float32"), {}),
    ("int4", 64, None, Activation("int8", 64, "float32"), {}),
    ("float8_e4m3fn", ROW, None, Activation("float8_e4m3fn", 0, "float32"), {}),
    ("float8_e4m3fn", ALL, None, Activation("float8_e4m3fn", -1, "float32"), {}),
    ("float8_e4m3fn", ALL, None, Activation("float8_e4m3fn", -1, "float32", static=True), SCALE),
    ("float8_e4m3fn", 128, None, Activation("float8_e4m3fn", 128, "float32"), {}),
    ("float4_e2m1fn", 16, E4M3, Activation("float4_e2m1fn", 16, "float8_e4m3fn", True), SCALE),
    ("float8_e4m3fn", 32, E8M0, Activation("float8_e4m3fn", 32, "float8_e8m0fnu"), {}),
    ("float4_e2m1fn", 32, E8M0, Activation("float4_e2m1fn", 32, "ocp_e8m0"), {}),
    ("float4_e2m1fn", 32, E8M0, Activation("float8_e4m3fn", 32, "ocp_e8m0"), {}),
)


@pytest.mark.parametrize("number", range(len(CASES)))
def test_formats_of_other_files(number: int) -> None:
    format, group, scale_dtype, activation, further = CASES[number]
    noise = torch.Generator().manual_seed(number)
    columns = max(activation.group, 128)
    weight = weights.quantize(
        torch.randn((33, columns), generator=noise) / 16, format, group_size=group
    )
    tensors = weight.tensors | further
    if scale_dtype is not None:
        tensors["scale"] = (tensors["scale"] / tensors["scale"].max() * 0.5).to(scale_dtype)
    spec = dataclasses.replace(weight.spec, activation=activation)
    bias = torch.randn(33, generator=noise)
    dtype = DTYPES[number % 3]
    x = torch.randn((2, 5, columns), generator=noise).to(dtype)
    x[0, 3] = 0
    assert compared(x, tensors, spec, bias) < EPS[dtype]
    call = dispatch.call_of(spec, torch.device("cuda") if DEVICE.type == "cuda" else DEVICE, dtype)
    assert own.why_not(dataclasses.replace(call, capability=(9, 0))) is None
    if not activation.static:
        found = own.linear_faithful_prepared(
            own.prepare(x.to(DEVICE), spec), held(tensors), spec, bias.to(DEVICE)
        )
        assert torch.equal(
            found, own.linear_faithful(x.to(DEVICE), held(tensors), spec, bias.to(DEVICE))
        )


def test_rotated_and_multiplied() -> None:
    noise = torch.Generator().manual_seed(0)
    weight = weights.quantize(
        torch.randn((48, 256), generator=noise) / 16,
        "int8",
        hadamard_group_size=64,
        svd_rank=6,
    )
    smooth = torch.rand(256, generator=noise) + 0.5
    spec = dataclasses.replace(
        weight.spec, activation=Activation("int8", 0, "float32"), smoothing="multiply"
    )
    x = torch.randn((20, 256), generator=noise).to(torch.float16)
    # Rotated sums of another order are rounded otherwise here and there.
    assert compared(x, weight.tensors | {"smooth": smooth}, spec, None) < 2e-3


def test_what_is_refused_and_why() -> None:
    call = registry.Call(
        "cuda", (8, 0), torch.bfloat16, (64, 128), "int4", 4, False, True, True, group=64
    )

    def why(**changes) -> str:
        return own.why_not(dataclasses.replace(call, **changes)) or ""

    fp8 = Activation("float8_e4m3fn", 0, "float32")
    row = {"format": "float8_e4m3fn", "bits": 8, "rowwise": True, "activation": fp8}
    assert "how activations are rounded" in why()
    assert why(activation=Activation("int4", 64)) == ""
    assert "groups of 32 with int4 codes in groups of 64" in why(activation=Activation("int8", 32))
    assert why(symmetric=False, activation=Activation("int4", 64)) != ""
    assert why(activation=Activation("float4_e2m1fn", 16, "float8_e4m3fn")) != ""
    assert "8.9" in why(**row) and why(**row, capability=(8, 9)) == ""
    assert why(**row | {"rowwise": False}, capability=(9, 0)) != ""
    assert "8.9" in why(**row, capability=None)


def test_compiled_graphs_are_whole() -> None:
    """A product is one operator beside that of the rows; nothing breaks the graph."""
    made = layer("uint4", 16, 64, rank=4)
    weight = normal_form(made)
    x = activations(made, 2, 16, seed=1, dtype=torch.bfloat16).to(DEVICE)
    tensors, bias = held(weight.tensors), made.bias.to(DEVICE)
    products = (
        own.linear_faithful,
        kernels("int8").linear_uint8,
        kernels("fp8").linear_fp8,
    )
    for product in products:
        torch.compiler.reset()

        @torch.compile(fullgraph=True, backend="aot_eager")
        def compiled(x: Tensor, tensors: dict, bias: Tensor, product=product) -> Tensor:
            return product(x, tensors, weight.spec, bias)

        with torch.no_grad():
            assert torch.equal(compiled(x, tensors, bias), product(x, tensors, weight.spec, bias))


def test_none_and_rows_apart() -> None:
    made = layer("int4", 32, 128, rank=4)
    weight = normal_form(made)
    x = activations(made, 4, 10, seed=1, dtype=torch.bfloat16).to(DEVICE)
    assert own.linear_faithful(x[:0], held(weight.tensors), weight.spec).shape == (0, 10, 32)
    apart = x.transpose(0, 1)
    found = own.linear_faithful(apart, held(weight.tensors), weight.spec)
    again = own.linear_faithful(apart.contiguous(), held(weight.tensors), weight.spec)
    assert found.shape == (10, 4, 32) and torch.equal(found, again)
    x[1, 2, 5] = float("nan")
    assert own.linear_faithful(x, held(weight.tensors), weight.spec)[1, 2].isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["int4", "uint4", "nvfp4"])
def test_real_sizes(kind: str, dtype: torch.dtype) -> None:
    made = layer(kind, 9216, 3072, rank=32, half=dtype)
    weight = normal_form(made)
    x = activations(made, 4608, seed=1, dtype=dtype)
    found = own.linear_faithful(x.cuda(), held(weight.tensors), weight.spec, made.bias.cuda())
    expected = faithful.linear_faithful(
        x.cuda(), held(weight.tensors), weight.spec, made.bias.cuda()
    )
    assert relative(found.cpu(), expected.cpu()) < 3 * EPS[dtype]
