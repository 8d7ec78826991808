"""Triton's int8 products: exact sums, the reference's results, and 4-bit weights as int8."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from support import pack
from torch import Tensor
from triton_host import DEVICE, INTERPRETED, kernels, poisoned
from w4a4 import relative

gemm = kernels("gemm")
int8 = kernels("int8")
reference = pack("kernels.reference")
weights = pack("quant.weight")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((1, 3, 17), (37, 45, 208), (70, 33, 131), (33, 64, 128))  # odd ones among them
EPS = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


def noise(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def codes(*shape: int, seed: int) -> Tensor:
    return torch.randint(-128, 128, shape, generator=noise(seed), dtype=torch.int8)


def exact(a: Tensor, b: Tensor) -> Tensor:
    return a.to(torch.float64) @ b.to(torch.float64).t()  # below 2^53


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums_are_exact(shape: tuple[int, int, int]) -> None:
    rows, outputs, inputs = shape
    a, b = codes(rows, inputs, seed=1), codes(outputs, inputs, seed=2)
    a[0], b[0] = -128, -128  # the largest sum
    y = poisoned(rows + 1, outputs, dtype=torch.float32)
    one = torch.ones(1, device=DEVICE)
    gemm.launch_scaled(y[:rows], a.to(DEVICE), b.to(DEVICE), one, one)
    assert torch.equal(y[:rows].cpu().double(), exact(a, b))
    assert y[rows].isnan().all()
    sums = gemm.column_sums(b.to(DEVICE)).cpu()
    assert torch.equal(sums, b.sum(1, dtype=torch.int32))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_term(dtype: torch.dtype) -> None:
    rows, outputs, inputs, rank = 37, 45, 208, 37
    a, b = codes(rows, inputs, seed=3), codes(outputs, inputs, seed=4)
    random = noise(5)

    def some(*shape: int) -> Tensor:
        return torch.rand(shape, generator=random) + 0.5

    a_scale, b_scale = some(rows) / 100, some(outputs) / 100
    a_zero, b_zero, bias = some(rows), some(outputs) / 10, some(outputs).to(dtype)
    low, up = some(rows, rank).to(dtype), some(outputs, rank).to(dtype)
    if dtype == torch.float32:  # whose branch the layers add themselves
        low = up = None
    column = b.sum(1) * b_scale + inputs * b_zero
    total = a.sum(1, dtype=torch.int32)
    y = gemm.scaled_product(
        *(t.to(DEVICE) for t in (a, b, a_scale, b_scale)),
        dtype,
        *(
            None if t is None else t.to(DEVICE)
            for t in (bias, a_zero, column, total, b_zero, low, up)
        ),
    )
    x = a.double() * a_scale.double()[:, None] + a_zero.double()[:, None]
    w = b.double() * b_scale.double()[:, None] + b_zero.double()[:, None]
    expected = x @ w.t() + bias.double()
    if low is not None:
        expected += low.double() @ up.double().t()
    assert relative(y.cpu(), expected) < EPS[dtype]


@pytest.mark.parametrize("group", [32, 64, 256])
@pytest.mark.parametrize("by_group", [True, False])
def test_products_by_groups(group: int, by_group: bool) -> None:
    rows, outputs, inputs = 33, 47, 512
    a, b = codes(rows, inputs, seed=6), codes(outputs, inputs, seed=7)
    a[0, :group], b[0, :group] = -128, -128
    count = inputs // group
    a_scale = torch.rand(count, rows, generator=noise(8)) + 0.5
    b_scale = torch.rand(outputs, count if by_group else 1, generator=noise(9)) + 0.5
    bias = torch.randn(outputs, generator=noise(10))
    y = poisoned(rows, outputs, dtype=torch.float32)
    operands = (t.to(DEVICE) for t in (a, b, a_scale, b_scale))
    gemm.launch_grouped(y, *operands, group, bias.to(DEVICE), bias.to(DEVICE) / 2)
    x = a.double().view(rows, count, group) * a_scale.double().t()[:, :, None]
    w = b.double().view(outputs, count, group) * b_scale.double()[:, :, None]
    expected = exact(x.flatten(1), w.flatten(1)) + bias.double() / 2
    assert relative(y.cpu(), expected) < 2e-7


def on_device(weight) -> dict[str, Tensor]:
    return {name: tensor.to(DEVICE) for name, tensor in weight.tensors.items()}


def layer(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=noise(seed)) * shape[1] ** -0.5


STORED = {
    "int8": {},
    "uint8": {},
    "int5": {"group_size": -1},
    "uint4": {"group_size": -1},
    "int8 in all": {"group_size": -2},
    "int8 rotated": {"hadamard_group_size": 64, "svd_rank": 5},
}


@pytest.mark.parametrize("operation", ["int8", "uint8"])
@pytest.mark.parametrize("number", range(len(STORED)))
def test_stored_integers_give_what_the_reference_gives(number: int, operation: str) -> None:
    name = list(STORED)[number]
    dtype = DTYPES[(number + (operation == "int8")) % 3]
    weight = weights.quantize(layer(45, 192), name.split()[0], **STORED[name])
    x = torch.randn((3, 11, 192), generator=noise(1)).to(dtype)
    bias = torch.randn(45, generator=noise(2)).to(dtype)
    found = getattr(int8, f"linear_{operation}")(
        x.to(DEVICE), on_device(weight), weight.spec, bias.to(DEVICE)
    )
    expected = getattr(reference, f"linear_{operation}")(x, weight.tensors, weight.spec, bias)
    assert found.dtype == dtype
    assert relative(found.cpu(), expected) < EPS[dtype]


GROUPED = (
    ("uint4", {"group_size": 64}),
    ("int3", {"group_size": 32, "svd_rank": 7, "hadamard_group_size": 64}),
    ("uint4", {"group_size": 64, "use_codebook": True}),
    ("float4_e2m1fn", {"group_size": 32}),
    ("float8_e4m3fn", {"group_size": -1}),
)


@pytest.mark.parametrize("format,options", GROUPED, ids=str)
def test_other_weights_lose_next_to_nothing(format: str, options: dict) -> None:
    """As int8 by row the weight's own error stays what it was."""
    original = layer(32, 256)
    weight = weights.quantize(original, format, **options)
    smooth = torch.rand(256, generator=noise(3)) + 0.5
    spec = dataclasses.replace(weight.spec, smoothing="multiply")
    if spec.hadamard:
        spec, smooth = weight.spec, None
    tensors = weight.tensors | ({} if smooth is None else {"smooth": smooth})
    x = torch.randn((33, 256), generator=noise(4)).to(torch.bfloat16)
    dense = reference.dequantize(tensors, spec).double()
    product = x.double() @ dense.t()
    held = {name: tensor.to(DEVICE) for name, tensor in tensors.items()}
    wanted = relative(reference.linear_int8(x, tensors, spec).double(), product)
    for found in (
        int8.linear_int8(x.to(DEVICE), held, spec),
        int8.linear_uint8(x.to(DEVICE), held, spec),
        int8.linear_int8(x.to(DEVICE), held, spec, group=64),
    ):
        assert relative(found.cpu(), product) < max(1.3 * wanted, 0.015)


def test_groups_of_activations_keep_what_outliers_would_drown() -> None:
    weight = weights.quantize(layer(32, 512), "int4", group_size=64)
    x = torch.randn((33, 512), generator=noise(5))
    x[:, 300] *= 200
    product = x.double() @ weight.dequantize().double().t()
    x, held = x.to(DEVICE), on_device(weight)
    # What the outlier's own channel adds is alike in both; the rest is where they differ.
    dull = relative(int8.linear_int8(x, held, weight.spec).cpu(), product)
    sharp = relative(int8.linear_int8(x, held, weight.spec, group=256).cpu(), product)
    assert sharp < 0.8 * dull
    activation = pack("kernels.spec").ActivationSpec("int8", 256, "float32")
    spec = dataclasses.replace(weight.spec, activation=activation)
    by_spec = int8.linear_int8(x, held, spec)
    assert torch.equal(by_spec, int8.linear_int8_prepared(int8.prepare_int8(x, spec), held, spec))
    assert relative(by_spec.cpu(), product) == sharp
    odd = weights.quantize(layer(32, 96), "int8")
    same = int8.linear_int8(x[:, :96], on_device(odd), odd.spec, group=256)
    assert torch.equal(same, int8.linear_int8(x[:, :96], on_device(odd), odd.spec))


def test_few_rows_none_and_rows_apart() -> None:
    weight = weights.quantize(layer(45, 192), "int8")
    held = on_device(weight)
    x = torch.randn((3, 22, 384), generator=noise(6)).to(DEVICE)
    for operation in (int8.linear_int8, int8.linear_uint8):
        few = x[0, :3, :192]
        expected = reference.linear_dequantize(few.cpu(), weight.tensors, weight.spec)
        torch.testing.assert_close(operation(few, held, weight.spec).cpu(), expected)
        assert operation(few[:0], held, weight.spec).shape == (0, 45)
        assert operation(x[:, :0, :192], held, weight.spec).shape == (3, 0, 45)
        apart = x[:, ::2, 100:292]
        found = operation(apart, held, weight.spec)
        assert torch.equal(found, operation(apart.contiguous(), held, weight.spec))


def test_layers_that_share_rounded_activations() -> None:
    x = torch.randn((2, 17, 128), generator=noise(7)).to(DEVICE)
    parts = [weights.quantize(layer(32, 128, seed=n), f) for n, f in enumerate(("int8", "uint8"))]
    for kind in ("int8", "uint8"):
        operation = getattr(int8, f"linear_{kind}")
        finish = getattr(int8, f"linear_{kind}_prepared")
        prepared = getattr(int8, f"prepare_{kind}")(x, parts[0].spec)
        for part in parts:
            held = on_device(part)
            found = finish(prepared, held, part.spec)
            assert torch.equal(found, operation(x, held, part.spec))


def test_not_a_number_is_passed_on() -> None:
    weight = weights.quantize(layer(32, 128), "int8")
    x = torch.randn((32, 128), generator=noise(8)).to(DEVICE)
    x[7, 3] = float("nan")
    for group in (0, 64):
        y = int8.linear_int8(x, on_device(weight), weight.spec, group=group)
        assert y[7].isnan().all() and not y[[6, 8]].isnan().any()


@pytest.mark.gpu
@pytest.mark.parametrize("rank", [0, 32, 128])
@pytest.mark.parametrize(
    "shape", [(4608, 3072, 12288), (4160, 3840, 10240), (77, 9216, 3072)], ids=str
)
def test_real_sizes(shape: tuple[int, int, int], rank: int) -> None:
    assert not INTERPRETED
    rows, outputs, inputs = shape
    options = {"group_size": 64, "svd_rank": rank, "svd_steps": 2}
    for format in ("int8", "uint4"):
        weight = weights.quantize(
            (layer(outputs, inputs)).cuda(),
            format,
            **options | {"group_size": -1 if format == "int8" else 64},
        )
        held = on_device(weight)
        x = torch.randn((rows, inputs), device=DEVICE, dtype=torch.bfloat16)
        product = torch.nn.functional.linear(x.float(), reference.dequantize(held, weight.spec))
        for operation in (int8.linear_int8, int8.linear_uint8):
            found = operation(x, held, weight.spec).float()
            assert (found - product).norm() < 0.016 * product.norm()
