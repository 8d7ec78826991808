"""Products in a format's own arithmetic against its formulas, row by row and group by group."""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise

import pytest
import torch
from support import pack
from torch import Tensor
from w4a4 import E2M1, SHIFT, Layer, activations, layer, normal_form, relative

faithful = pack("kernels.faithful")
reference = pack("kernels.reference")
spec_of = pack("kernels.spec")
weights = pack("quant.weight")
get_format = pack("quant.dtypes").get_format
packing = pack("quant.packing")

KINDS = ("int4", "uint4", "nvfp4")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


# -------------------------------------------------------------------------- SVDQuant's formulas

POSITIVE = sorted({abs(v) for v in E2M1.tolist()})


def nearest_e2m1(value: float) -> float:
    """The nearest of the eight values; of two as near the one with the even code."""
    size = abs(value)
    place = min(range(8), key=lambda i: (abs(POSITIVE[i] - size), i % 2))
    return math.copysign(POSITIVE[place], value)


def nearest_e4m3(value: float) -> float:
    """The nearest float of 4 exponent and 3 mantissa bits, ties to even; 448 is the largest."""
    if value == 0:
        return 0.0
    step = 2.0 ** (max(math.floor(math.log2(abs(value))), -6) - 3)
    return max(-448.0, min(448.0, round(value / step) * step))


def by_formula(made: Layer, x: Tensor) -> Tensor:
    """Section "numerics" of the format, for x [M, K]: loops over rows and groups, float64 sums."""
    half = x.dtype
    group = 16 if made.fp4 else 64
    top = 15 if made.unsigned else 7
    values = E2M1.double()[made.codes.long()] if made.fp4 else made.codes.double()
    out = torch.empty(x.shape[0], made.codes.shape[0], dtype=half)
    for m, row in enumerate(x):
        shifted = row + SHIFT if made.unsigned else row
        smoothed = (shifted.float() / made.smooth.float()).to(half)
        total = torch.zeros(made.codes.shape[0], dtype=torch.float64)
        for g in range(made.scale.shape[1]):
            part = smoothed[g * group : (g + 1) * group].float()
            scale = part.abs().max() * (torch.tensor(1.0) / (6 if made.fp4 else top))
            if made.fp4:
                scale = scale.clamp(max=448.0)
                stored = nearest_e4m3(scale.item())
            else:
                stored = scale.to(half).double().item()
            units = part * (1 / scale) if scale > 0 else torch.zeros_like(part)
            if made.fp4:
                codes = [nearest_e2m1(v) for v in units.tolist()]
            else:
                low = 0 if made.unsigned else -8
                codes = [min(max(round(v), low), top) for v in units.tolist()]
            dot = values[:, g * group : (g + 1) * group] @ torch.tensor(codes).double()
            total += dot * made.scale[:, g].double() * made.second.double() * stored
        y = (total + made.stored_bias.double()).to(half)
        inner = (row.double() @ made.down.double().T).to(half)
        out[m] = (y.double() + made.up.double() @ inner.double()).to(half)
    return out


def run(made: Layer, x: Tensor) -> Tensor:
    weight = normal_form(made)
    weight.check()
    return faithful.linear_faithful(x, weight.tensors, weight.spec, made.bias)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_products_follow_the_formulas(kind: str, dtype: torch.dtype) -> None:
    for seed, (rows, columns, rank, count) in enumerate(
        ((24, 192, 16, 5), (7, 64, 3, 1), (33, 128, 0, 2), (16, 320, 32, 3))
    ):
        half = torch.float16 if dtype == torch.float16 else torch.bfloat16
        made = layer(kind, rows, columns, rank=rank, seed=seed, half=half, by_row=seed % 2 == 1)
        x = activations(made, count, seed=seed, dtype=dtype)
        found, expected = run(made, x), by_formula(made, x)
        assert found.dtype == dtype
        # Only the order of the sums differs: it may turn the last bit of a half now and then.
        limit = {torch.float32: 1e-6, torch.bfloat16: 1e-3, torch.float16: 2e-4}[dtype]
        assert relative(found, expected) < limit, (seed, relative(found, expected))


def test_codes_and_scales_are_exactly_those_of_the_formulas() -> None:
    """A weight that picks one column: a single wrong code or scale would show."""
    for kind in KINDS:
        for seed in range(4):
            made = layer(kind, 8, 64, rank=0, seed=seed, half=torch.float16)
            made = dataclasses.replace(
                made,
                scale=torch.ones_like(made.scale),
                second=torch.ones(1),
                stored_bias=torch.zeros(8),
            )
            x = activations(made, 9, seed=seed, dtype=torch.float16)
            x[::2] *= -2  # what stays negative after the shift has no code without a sign
            for column in range(0, 64, 5):
                codes = torch.zeros_like(made.codes)
                codes[:, column] = 2 if made.fp4 else 1  # the value 1 in both
                single = dataclasses.replace(made, codes=codes)
                weight = normal_form(single)
                if made.unsigned:
                    weight.tensors["shift_bias"].zero_()
                found = faithful.linear_faithful(x, weight.tensors, weight.spec)
                assert torch.equal(found, by_formula(single, x)), (kind, seed, column)


def test_the_unsigned_layer_done_wrong_is_far_off() -> None:
    """What the tests above can tell apart: each mistake costs far more than their tolerance."""
    made = layer("uint4", 48, 256, rank=16, seed=3)
    weight = normal_form(made)
    x = activations(made, 16, seed=3, dtype=torch.bfloat16)
    right = by_formula(made, x)

    def error(bias: Tensor = made.bias, x: Tensor = x, **activation: object) -> float:
        rounding = dataclasses.replace(weight.spec.activation, **activation)
        spec = dataclasses.replace(weight.spec, activation=rounding)
        return relative(faithful.linear_faithful(x, weight.tensors, spec, bias), right)

    assert error() < 1e-3
    assert error(bias=made.stored_bias) > 0.02  # corrected twice
    assert error(shift=0.0) > 0.02  # not shifted, and so not corrected
    assert error(format="int4") > 0.02  # with a sign: half the levels
    assert error(group=256) > 0.02  # one scale a row
    assert error(x=x + SHIFT, bias=made.bias) > 0.02  # shifted for the low-rank branch too


@pytest.mark.parametrize("kind", KINDS)
def test_products_are_near_the_float_layer(kind: str) -> None:
    for seed in range(3):
        made = layer(kind, 64, 256, seed=seed)
        x = activations(made, 40, seed=seed, dtype=torch.float32)
        exact = x.double() @ made.dense.T + made.bias.double()
        assert 0.01 < relative(run(made, x), exact) < 0.12
        weight = normal_form(made)
        dense = reference.linear_dequantize(x, weight.tensors, weight.spec, made.bias)
        assert relative(dense, exact) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_any_shape_of_x(kind: str) -> None:
    made = layer(kind, 24, 128, seed=5)
    weight = normal_form(made)
    for shape in ((), (1,), (33,), (2, 3), (2, 0), (0,), (2, 1, 5)):
        x = activations(made, *shape, seed=5, dtype=torch.bfloat16)
        found = faithful.linear_faithful(x, weight.tensors, weight.spec, made.bias)
        assert found.shape == (*shape, 24) and found.dtype == x.dtype
        flat = faithful.linear_faithful(x.reshape(-1, 128), weight.tensors, weight.spec, made.bias)
        assert torch.equal(found.view(-1, 24), flat)
    plain = faithful.linear_faithful(x, weight.tensors, weight.spec)
    with_bias = faithful.linear_faithful(x, weight.tensors, weight.spec, made.bias)
    assert relative(with_bias.float() - plain.float(), made.bias.expand(2, 1, 5, 24)) < 0.02


@pytest.mark.parametrize("kind", KINDS)
def test_bad_rows_stay_in_their_rows(kind: str) -> None:
    made = layer(kind, 16, 128, rank=4, seed=6)
    weight = normal_form(made)
    x = activations(made, 6, seed=6, dtype=torch.float32)
    clean = faithful.linear_faithful(x, weight.tensors, weight.spec, made.bias)
    x[1] = 0.0
    x[3, 100] = math.nan
    x[4, :64] = 1e-42
    found = faithful.linear_faithful(x, weight.tensors, weight.spec, made.bias)
    assert torch.equal(found[[0, 2, 5]], clean[[0, 2, 5]])
    assert found[3].isnan().all() and torch.isfinite(found[4]).all()
    # A shifted zero is no zero: it is rounded as any other activation.
    assert relative(found[1], made.bias) < (0.2 if made.unsigned else 1e-6)


def test_e2m1_rounds_to_even_codes_and_saturates() -> None:
    ties = [(a + b) / 2 for a, b in pairwise(POSITIVE)]
    near = [t * f for t in ties for f in (1 - 1e-6, 1, 1 + 1e-6)]
    values = [*POSITIVE, *near, 5.0, 6.5, 1e9, 1e-30]
    values += [-v for v in values]
    found = faithful.round_e2m1(torch.tensor(values)).tolist()
    exact = torch.tensor(values).tolist()
    assert found == [nearest_e2m1(v) for v in exact]
    assert dict(zip(ties, faithful.round_e2m1(torch.tensor(ties)).tolist(), strict=True)) == {
        0.25: 0, 0.75: 1, 1.25: 1, 1.75: 2, 2.5: 2, 3.5: 4, 5.0: 4,
    }  # fmt: skip


def test_scales_round_as_their_formats() -> None:
    noise = torch.Generator().manual_seed(7)
    values = torch.exp(6 * torch.randn(4000, generator=noise))
    values = torch.cat([values, torch.tensor([0.0, 2.0**-9, 2.0**-10, 448.0, 464.0, 1e9])])
    found = faithful.round_scale(values, "float8_e4m3fn")
    assert found.tolist() == [nearest_e4m3(v) for v in values.tolist()]
    values = torch.cat([values, 2.0 ** torch.arange(-120, 120.0)])
    found = faithful.round_scale(values, "float8_e8m0fnu")
    expected = [2.0 ** math.ceil(math.log2(v)) if v else 0.0 for v in values.tolist()]
    assert found.tolist() == expected
    assert torch.equal(faithful.round_scale(values, "float32"), values)


# ------------------------------------------------------------------ forms of other checkpoints
# name -> (weight format, its group, dtype of its scale, two levels, activation)

Rounding = spec_of.ActivationSpec
FORMS = {
    "int8 static": ("int8", 0, torch.float32, False, Rounding("int8", -1, "float32", True)),
    "int8 by row": ("int8", 0, torch.float32, False, Rounding("int8", 0, "float32")),
    "int8 by tensor": ("int8", 0, torch.float32, False, Rounding("int8", -1, "float32")),
    "int8 shifted": ("int8", 0, torch.float32, False, Rounding("int8", -1, "float32", True, 0.25)),
    "int8 with offset": ("int8", 0, torch.float32, False,
                         Rounding("int8", -1, "float32", True, offset=True)),
    "uint8 with offset": ("uint8", 0, torch.float32, False,
                          Rounding("int8", -1, "float32", True, offset=True)),
    "uint8 by row": ("uint8", 0, torch.float32, False, Rounding("int8", 0, "float32")),
    "int4 by row": ("int4", 0, torch.float32, False, Rounding("int4", 0, "float32")),
    "int8 grouped": ("int4", 32, torch.float32, False, Rounding("int8", 32, "float32")),
    "fp8 static": ("float8_e4m3fn", 0, torch.float32, False,
                   Rounding("float8_e4m3fn", -1, "float32", True)),
    "fp8 by row": ("float8_e4m3fn", 0, torch.float32, False,
                   Rounding("float8_e4m3fn", 0, "float32")),
    "nvfp4": ("float4_e2m1fn", 16, torch.float8_e4m3fn, True,
              Rounding("float4_e2m1fn", 16, "float8_e4m3fn", True)),
    "nvfp4 with fp8": ("float4_e2m1fn", 32, torch.float8_e4m3fn, True,
                       Rounding("float8_e4m3fn", -1, "float32", True)),
    "mxfp8": ("float8_e4m3fn", 32, torch.float8_e8m0fnu, False,
              Rounding("float8_e4m3fn", 32, "float8_e8m0fnu")),
    "mxfp4": ("float4_e2m1fn", 32, torch.float8_e8m0fnu, False,
              Rounding("float4_e2m1fn", 32, "float8_e8m0fnu")),
    "mxfp8 of ocp": ("float8_e4m3fn", 32, torch.float8_e8m0fnu, False,
                     Rounding("float8_e4m3fn", 32, "ocp_e8m0")),
    "mxfp4 of ocp": ("float4_e2m1fn", 32, torch.float8_e8m0fnu, False,
                     Rounding("float4_e2m1fn", 32, "ocp_e8m0")),
    "int4 with fp8": ("int4", 64, torch.float32, False,
                      Rounding("float8_e4m3fn", -1, "float32", True)),
    "uint4 with int8": ("uint4", 64, torch.bfloat16, False, Rounding("int8", 0, "float32")),
}  # fmt: skip


def make_form(name: str, seed: int, *, smoothing: str = "", rank: int = 0):
    """A weight of a form: [48, 192], its float64 values with and without smoothing."""
    format_, group, dtype, two_level, activation = FORMS[name]
    noise = torch.Generator().manual_seed(seed)
    fmt = get_format(format_)
    rows, columns = 48, 192
    groups = columns // group if group else 1
    code_shape = (rows, groups, group) if group else (rows, columns)
    scale_shape = (rows, groups, 1) if group else (rows, 1)
    if fmt.kind == "native":
        codes = torch.randn(rows, columns, generator=noise).mul(80).clamp(-448, 448).to(fmt.word)
        values = codes.double()
    else:
        bits = torch.randint(0, 1 << fmt.bits, (rows, columns), generator=noise)
        codes = bits - (1 << (fmt.bits - 1)) if fmt.kind == "int" else bits
        values = E2M1.double()[bits] if fmt.kind == "float" else codes.double()
    scale = (0.5 + torch.rand(scale_shape, generator=noise)) / fmt.qmax
    scale = scale.to(dtype)
    tensors = {"codes": packing.pack(codes, fmt), "scale": scale}
    whole = values.view(code_shape) * scale.to(torch.float32).double()
    if two_level:
        tensors["scale_2"] = torch.full([1] * len(code_shape), 0.7)
        whole = whole * tensors["scale_2"].double()
    if not fmt.signed:
        zero = torch.randn(scale_shape, generator=noise).to(dtype)
        tensors["zero_point"], whole = zero, whole + zero.double()
    whole = whole.reshape(rows, columns)
    if smoothing:
        tensors["smooth"] = 0.5 + torch.rand(columns, generator=noise)
    if activation.static:
        tensors["input_scale"] = torch.tensor([2.5 / faithful.ACTIVATIONS[activation.format][0]])
        if activation.group > 0:
            tensors["input_scale"] /= 448
    if activation.offset:
        tensors["input_offset"] = torch.tensor([-29.0 + seed])
    if activation.shift:
        tensors["shift_bias"] = (activation.shift * whole.sum(1)).float()
    if rank:
        tensors["svd_up"] = torch.randn(rows, rank, generator=noise)
        tensors["svd_down"] = torch.randn(rank, columns, generator=noise) * 0.1
    spec = spec_of.WeightSpec(
        format=fmt, shape=(rows, columns), code_shape=code_shape, rank=rank, smoothing=smoothing,
        two_level=two_level, activation=activation,
    )  # fmt: skip
    return weights.QuantizedWeight(spec, tensors), whole


def rounded(
    name: str,
    row: list[float],
    input_scale: float | None,
    largest: float | None,
    offset: float = 0,
):
    """One row of activations after rounding, in float64, by the form's rule."""
    *_, rule = FORMS[name]
    top = {"int8": 127, "int4": 7, "float8_e4m3fn": 448, "float4_e2m1fn": 6}[rule.format]
    size = rule.group if rule.group > 0 else len(row)
    result = []
    for start in range(0, len(row), size):
        part = row[start : start + size]
        if rule.static and rule.group <= 0:
            scale = input_scale
        else:
            scale = (largest if rule.group < 0 else max(map(abs, part))) / top
        if rule.static and rule.group > 0:
            scale = nearest_e4m3(scale / input_scale) * input_scale
        if rule.scale == "float8_e8m0fnu":
            scale = 2.0 ** math.ceil(math.log2(scale))
        if rule.scale == "ocp_e8m0":
            exponent = math.floor(math.log2(max(map(abs, part))))
            scale = 2.0 ** (exponent - {"float8_e4m3fn": 8, "float4_e2m1fn": 2}[rule.format])
        for value in part:
            unit = value / scale + offset
            if rule.format == "float8_e4m3fn":
                code = nearest_e4m3(unit)
            elif rule.format == "float4_e2m1fn":
                code = nearest_e2m1(unit)
            else:
                code = min(max(round(unit), -top - 1), top)
            result.append((code - offset) * scale)
    return result


@pytest.mark.parametrize("smoothing", spec_of.SMOOTHINGS)
@pytest.mark.parametrize("name", FORMS)
def test_forms_follow_their_rules(name: str, smoothing: str) -> None:
    for seed in range(2):
        weight, whole = make_form(name, seed, smoothing=smoothing, rank=4 * seed)
        weight.check()
        tensors, rule = weight.tensors, weight.spec.activation
        x = 1.2 * torch.randn(5, 192, generator=torch.Generator().manual_seed(50 + seed))
        bias = torch.randn(48)
        shifted = x + rule.shift
        if smoothing:
            smooth = tensors["smooth"]
            shifted = shifted / smooth if smoothing == "divide" else shifted * smooth
        static = tensors["input_scale"].item() if rule.static else None
        largest = shifted.abs().max().item()
        offset = tensors["input_offset"].item() if rule.offset else 0
        lines = [rounded(name, row, static, largest, offset) for row in shifted.tolist()]
        expected = torch.tensor(lines).double() @ whole.T + bias.double()
        if rule.shift:
            expected = expected - tensors["shift_bias"].double()
        if weight.spec.rank:
            inner = x.double() @ tensors["svd_down"].double().T
            expected = expected + inner @ tensors["svd_up"].double().T
        found = faithful.linear_faithful(x, tensors, weight.spec, bias)
        assert relative(found, expected) < 2e-6, (seed, relative(found, expected))


def test_integer_rows_are_summed_exactly() -> None:
    """Odd sums beyond 2^24, which float32 products would lose."""
    torch.manual_seed(8)
    columns = 20001
    codes = torch.randint(0, 128, (24, columns)).to(torch.int8)
    spec = spec_of.WeightSpec(
        format=get_format("int8"), shape=(24, columns), code_shape=(24, columns),
        activation=Rounding("int8", -1, "float32", True),
    )  # fmt: skip
    tensors = {
        "codes": codes, "scale": torch.full((24, 1), 0.5), "input_scale": torch.tensor([0.25]),
    }  # fmt: skip
    whole = torch.randint(0, 128, (9, columns))
    exact = whole @ codes.to(torch.int64).T
    assert exact.abs().max() > 1 << 24 and (exact % 2).any()
    found = faithful.linear_faithful(whole * 0.25, tensors, spec)
    assert torch.equal(found, exact.to(torch.float32) * 0.125)


def test_what_is_no_number_is_not_hidden_by_integers() -> None:
    weight, _ = make_form("int8 static", 9)
    x = torch.randn(4, 192)
    x[2, 7] = math.nan
    found = faithful.linear_faithful(x, weight.tensors, weight.spec)
    assert found[2].isnan().all() and torch.isfinite(found[[0, 1, 3]]).all()


@pytest.mark.parametrize("kind", ["uint4", "nvfp4"])
def test_products_compile_to_one_graph(kind: str) -> None:
    made = layer(kind, 64, 128, seed=10)
    weight = normal_form(made)
    spec = weight.spec
    compiled = torch.compile(
        lambda x, tensors, bias: faithful.linear_faithful(x, tensors, spec, bias),
        fullgraph=True,
        backend="aot_eager",
    )
    x = activations(made, 2, 5, seed=10, dtype=torch.bfloat16)
    expected = faithful.linear_faithful(x, weight.tensors, spec, made.bias)
    assert relative(compiled(x, weight.tensors, made.bias), expected) < 1e-2
