"""Rows of activations quantized by Triton: the same codes, bit by bit, as the reference gives."""

from __future__ import annotations

import pytest
import torch
from support import pack
from torch import Tensor
from torch.nn import functional
from triton_host import DEVICE, kernels, poisoned

rows = kernels("rows")
reference = pack("kernels.reference")
faithful = pack("kernels.faithful")
spec_of = pack("kernels.spec")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    noise = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=noise) * 3).to(dtype)


def same(found: Tensor, expected: Tensor) -> None:
    """Equal bit by bit."""
    assert found.shape == expected.shape and found.dtype == expected.dtype
    found, expected = found.cpu().contiguous(), expected.contiguous()
    assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


def quantized(x: Tensor, **options):
    """On the device, with the options' tensors."""
    options = {k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in options.items()}
    return rows.quantize_rows(x.to(DEVICE), **options)


@pytest.mark.parametrize("width,dtype", zip((64, 250, 700), DTYPES, strict=True))
def test_rows_are_rounded_as_by_the_reference(width: int, dtype: torch.dtype) -> None:
    # Of one block, of one padded block, of several with a rest.
    x = random(5, width, seed=width, dtype=dtype)
    x[2] = 0
    x[3] = x[3].abs() + 1
    x[4] *= 1e-3
    wide = x.to(torch.float32)

    codes, scale = reference._int8_rows(wide)
    found = quantized(x, total=True)
    same(found.codes, codes)
    same(found.scale, scale[:, 0])
    same(found.total, codes.sum(1, dtype=torch.int32))
    assert found.zero is None

    codes, scale, zero = reference._uint8_rows(wide)
    found = quantized(x, format="uint8", total=True)
    same(found.codes, codes)
    same(found.scale, scale[:, 0])
    same(found.zero, zero[:, 0])
    same(found.total, codes.sum(1, dtype=torch.int32))

    codes, scale = reference._float_rows(wide, torch.float8_e4m3fn)
    found = quantized(x, format="fp8")
    same(found.codes, codes)
    same(found.scale, scale[:, 0])
    assert found.total is None


def test_halves_go_to_even() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5]])
    assert quantized(x).codes.tolist() == [[127, 0, 2, 2, 0, -2, -2, 126]]
    x = torch.tensor([[448.0, 17.0, 19.0, -17.0, 2**-10, 3 * 2**-10, 436.0, 0.0]])
    found = quantized(x, format="fp8").codes.to(torch.float32)
    assert found.tolist() == [[448.0, 16.0, 20.0, -16.0, 0.0, 2**-8, 448.0, 0.0]]


@pytest.mark.parametrize("format", ["int8", "uint8", "fp8"])
def test_what_is_not_a_number_stays_told(format: str) -> None:
    x = random(3, 300)
    x[1, 280] = float("nan")
    found = quantized(x, format=format)
    assert found.scale.isnan().tolist() == [False, True, False]
    found = quantized(x, format="int8", scaling="static", given=torch.tensor([0.1]))
    assert found.scale.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize(
    "block,basis,dtype,smoothing",
    [
        (4, 4, torch.bfloat16, ""),
        (8, 2, torch.float16, "divide"),
        (64, 4, torch.float32, "multiply"),
        (128, 2, torch.bfloat16, "divide"),
        (256, 4, torch.float16, ""),
        (512, 2, torch.float32, ""),
    ],
)
def test_rotation(block: int, basis: int, dtype: torch.dtype, smoothing: str) -> None:
    # Of one block and a rest of a program, of several blocks.
    for width in (3 * block, 1024):
        x = random(2, width, seed=block, dtype=dtype)
        smooth = random(width, seed=1).abs() + 0.5
        expected = reference.hadamard(x.to(torch.float32), block, basis)
        if smoothing:
            expected = expected / smooth if smoothing == "divide" else expected * smooth
        codes, scale = reference._int8_rows(expected)
        found = quantized(x, hadamard=block, basis=basis, smooth=smooth, smoothing=smoothing)
        torch.testing.assert_close(found.scale.cpu(), scale[:, 0], rtol=2e-6, atol=0)
        # Sums of another order may fall on the other side of a half.
        differ = found.codes.cpu().to(torch.int32) - codes
        assert differ.abs().max() <= 1 and (differ != 0).sum() <= 4


SPECS = (
    ("int4", 64, ""),
    ("uint4", 64, ""),
    ("int8", 32, "float32"),
    ("int8", 256, "float32"),
    ("float8_e4m3fn", 128, "float32"),
    ("float4_e2m1fn", 16, "float8_e4m3fn"),
    ("float4_e2m1fn", 32, "float8_e8m0fnu"),
    ("float8_e4m3fn", 32, "ocp_e8m0"),
)


@pytest.mark.parametrize("number", range(len(SPECS)))
def test_groups_are_rounded_as_the_format_says(number: int) -> None:
    format, group, scale = SPECS[number]
    dtype = DTYPES[number % 3]
    x = random(3, 768, seed=group, dtype=dtype)
    x[1, :group] = 0
    x[2] *= 1e-3
    activation = spec_of.ActivationSpec(format, group, scale)
    if format == "uint4":
        x = x.abs()
    values, scales = faithful.round_activations(x, activation)
    short = {"float8_e4m3fn": "fp8", "float4_e2m1fn": "e2m1"}.get(format, format)
    folded = scale not in ("", "float32")
    found = quantized(x, format=short, scaling=scale, group=group, precise=False, folded=folded)
    if folded:
        expected = (values * scales).view(3, -1)
        assert torch.equal(expected.to(torch.bfloat16).float(), expected)  # nothing is lost
        assert torch.equal(found.codes.cpu().float(), expected)
        return
    assert torch.equal(found.codes.cpu().float(), values.view(3, -1))
    same(found.scale, scales[:, :, 0].t().contiguous())


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_given_scales(dtype: torch.dtype) -> None:
    x = random(3, 520, dtype=dtype)
    given, offset = torch.tensor([0.05]), torch.tensor([-7.0])
    static = spec_of.ActivationSpec("int8", -1, "float32", static=True, offset=True)
    values, _ = faithful.round_activations(x, static, given, offset)
    found = quantized(x, scaling="static", given=given, given_offset=offset)
    assert torch.equal(found.codes.cpu().float() + 7, values.view(3, -1))
    assert torch.equal(found.scale.cpu(), given.expand(3))
    torch.testing.assert_close(found.zero.cpu(), (7 * given).expand(3))

    grouped = spec_of.ActivationSpec("float4_e2m1fn", 16, "float8_e4m3fn", static=True)
    x, given = x[:, :512], torch.tensor([0.004])
    values, scales = faithful.round_activations(x, grouped, given)
    options = {"scaling": "static groups", "group": 16, "folded": True, "given": given}
    found = quantized(x, format="e2m1", **options).codes.cpu().float() * given
    torch.testing.assert_close(found, (values * scales).view(3, -1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("width,dtype", [(200, torch.bfloat16), (640, torch.float16)])
def test_producers_before_the_codes(width: int, dtype: torch.dtype) -> None:
    """Norms, modulation, activations and gates, each rounded as it would be alone."""
    x, gate = random(6, width, seed=1, dtype=dtype), random(6, width, seed=2, dtype=dtype)
    weight, offset = random(width, seed=3, dtype=dtype), random(width, seed=4, dtype=dtype)
    multiplier, addend = (
        random(2, width, seed=5, dtype=dtype),
        random(2, width, seed=6, dtype=dtype),
    )
    by_row = (multiplier.repeat_interleave(3, 0), addend.repeat_interleave(3, 0))
    plain = functional.layer_norm(x.float(), (width,), eps=1e-6).to(dtype)
    cases = {
        "layer": ({"norm": "layer"}, plain),
        "affine": (
            {"norm": "layer", "weight": weight, "offset": offset, "eps": 1e-5},
            functional.layer_norm(x.float(), (width,), weight.float(), offset.float()).to(dtype),
        ),
        "rms": (
            {"norm": "rms", "weight": weight},
            functional.rms_norm(x.float(), (width,), weight.float(), eps=1e-6).to(dtype),
        ),
        "adaptive": (
            {"norm": "layer", "multiplier": multiplier, "addend": addend},
            torch.addcmul(by_row[1], plain, 1 + by_row[0]),
        ),
        "gelu": (
            {"activation": "gelu_tanh"},
            functional.gelu(x.float(), approximate="tanh").to(dtype),
        ),
        "gated": (
            {"activation": "silu", "gate": gate},
            functional.silu(x.float()).to(dtype) * gate,
        ),
    }
    for name, (options, expected) in cases.items():
        found = quantized(x, **options)
        value = found.codes.cpu().float() * found.scale.cpu()[:, None]
        exact = expected.float()
        # A code, and where the producer's result fell on the other side of a half, one unit of it.
        unit = exact.abs().amax(1, keepdim=True) * torch.finfo(dtype).eps
        error = (value - exact).abs() - 0.5001 * found.scale.cpu()[:, None]
        assert (error <= 2 * unit).all(), name
        codes, _ = reference._int8_rows(exact)
        assert (found.codes.cpu() == codes).float().mean() > 0.98, name


def test_rows_that_are_not_neighbours() -> None:
    x = random(4, 3, 400, seed=8)
    flat = x.reshape(-1, 400)
    for other in (x.transpose(0, 1).contiguous().transpose(0, 1), x[:, ::2, 100:300], x[..., ::2]):
        same(quantized(other).codes, reference._int8_rows(other.reshape(-1, other.shape[-1]))[0])
    halves = flat[:, :200], flat[:, 200:]
    found = quantized(halves[0], activation="silu", gate=halves[1])
    copies = quantized(halves[0].clone(), activation="silu", gate=halves[1].clone())
    same(found.codes, copies.codes.cpu())
    empty = quantized(x[:0])
    assert empty.codes.shape == (0, 400) and empty.scale.shape == (0,)


def test_every_element_is_written_and_no_other() -> None:
    x = random(7, 333, seed=9).to(DEVICE)
    shapes = (
        ((9, 333), torch.int8),
        ((9,), torch.float32),
        ((9,), torch.float32),
        ((9,), torch.int32),
    )
    results = [poisoned(*shape, dtype=dtype) for shape, dtype in shapes]
    options = (False, True, True, None, None, None, "", 0, 2, 0.0, "", 0.0, *[None] * 4, "", None)
    rows.launch([result[:7] for result in results], x, "uint8", "float32", 0, *options)
    found = quantized(x.cpu(), format="uint8", total=True)
    for result, expected in zip(results, found, strict=True):
        same(result[:7], expected.cpu())
        poison = poisoned(1, dtype=result.dtype).cpu()
        same(result[7:], poison.expand_as(result[7:]).contiguous())


@pytest.mark.gpu
@pytest.mark.parametrize("width", [3072, 12288, 15360])
def test_real_widths(width: int) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        x = random(4608, width, seed=width, dtype=dtype)
        codes, scale = reference._int8_rows(x.float())
        found = quantized(x)
        same(found.codes, codes)
        same(found.scale, scale[:, 0])
        codes, _ = reference._float_rows(x.float(), torch.float8_e4m3fn)
        if torch.cuda.get_device_capability() >= (8, 9):
            same(quantized(x, format="fp8").codes, codes)
        codes, _ = reference._int8_rows(reference.hadamard(x.float(), 256, 4))
        found = quantized(x, hadamard=256, basis=4).codes.cpu()
        assert (found != codes).float().mean() < 1e-4
