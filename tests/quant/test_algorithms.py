"""What is better than rounding to the nearest, and what SVDQuant and AWQ put beside the codes.

Weights are heavy-tailed (Student's t with 5 degrees of freedom) with a few columns of outliers, as
those of transformers are; activations are correlated and have columns of outliers of their own.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from support import pack
from torch import Tensor
from torch.nn import functional

recipes = pack("quant.recipe")
engine = pack("quant.engine")
reports = pack("quant.report")
dtypes = pack("quant.dtypes")
rounding = pack("quant.rounding")
values = pack("quant.values")
packing = pack("quant.packing")
svdq = pack("quant.svdq")
reference = pack("kernels.reference")
faithful = pack("kernels.faithful")
LowBitError = pack("quant.errors").LowBitError
Recipe, Activations = recipes.Recipe, engine.Activations
SHAPES = [(320, 768), (256, 1024)]


def heavy(shape: tuple[int, int], seed: int) -> Tensor:
    noise = torch.Generator().manual_seed(seed)
    spread = torch.randn(5, *shape, generator=noise).square().mean(dim=0).sqrt()
    weight = torch.randn(shape, generator=noise) / spread * 0.02
    outliers = torch.randperm(shape[1], generator=noise)[: shape[1] // 50]
    weight[:, outliers] *= torch.rand(len(outliers), generator=noise) * 20 + 8
    return weight.bfloat16()


def inputs(columns: int, seed: int, rows: int = 512) -> Tensor:
    noise = torch.Generator().manual_seed(seed)
    mixed = torch.randn(rows, columns // 4, generator=noise) @ torch.randn(
        columns // 4, columns, generator=noise
    )
    x = mixed * 0.2 + torch.randn(rows, columns, generator=noise)
    x[:, torch.randperm(columns, generator=noise)[: columns // 40]] *= 15
    return x


def quantized(weight: Tensor, method: str, refine=None, activations=None, name="x", **told):
    layer = Recipe.make(method, told, refine=refine).decide(name, tuple(weight.shape))
    return engine.quantize_layer(weight, layer, activations=activations)


def lost(weight: Tensor, method: str, refine=None, activations=None, **told) -> float:
    return quantized(weight, method, refine, activations, **told)[1].relative


# ----------------------------------------------------------------------------- nearest values


def test_arithmetic_rounds_as_the_tables_do() -> None:
    """Every format: random numbers, ties, values themselves, both zeros, what is too large."""
    torch.manual_seed(0)
    for fmt in dtypes.all_formats():
        if fmt.name == "float8_e8m0fnu" or fmt.bits > 16:
            continue
        x = torch.cat([torch.randn(500), torch.randn(500) * 1e-3, torch.randn(200) * 30])
        if fmt.is_integer:
            x = torch.cat([x, x * 1000, torch.arange(-300, 300) / 2])
        else:
            table = rounding.magnitudes(fmt)[: 1 << 14]
            exact = torch.cat([table, (table[1:] + table[:-1]) / 2])
            x = torch.cat([x * float(table[-1]) / 3, exact, -exact, torch.tensor([1e30, -1e30])])
        x = torch.cat([x, torch.tensor([0.0])])
        if not fmt.signed:
            x = x.abs()
        expected = packing.pack(rounding.round_to_codes(x.clone(), fmt), fmt)
        nearest = values.round_values(x.clone(), fmt)
        found = values.words_of(values.codes_of(nearest, fmt), fmt)
        assert found.dtype == expected.dtype
        same = found.view(torch.uint8) == expected.view(torch.uint8)
        assert same.all(), (fmt.name, int((~same).sum()))
        decoded = reference.decode(found, fmt, x.numel())
        assert torch.equal(decoded, nearest), fmt.name


def test_a_coded_tensor_is_on_its_formats_grid() -> None:
    torch.manual_seed(1)
    scale = torch.rand(64, 5, 1) + 0.1
    for name, levels in (("uint6", -1), ("int8", -1), ("float8_e4m3fn", -1), ("uint4", 12)):
        coded = values.as_coded(scale, name, levels)
        assert len(coded.unique()) <= 1 << dtypes.get_format(name).bits
        assert 0 < float((coded - scale).abs().max()) < 0.08


# ------------------------------------------------------------------------------------- outliers

SVDQUANT_FACTOR = 2.5
UINT4_SVD_FACTOR = 3.0


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_branches_beat_plain_uint4_by_these_factors_and_the_report_says_so(shape, seed) -> None:
    weight = heavy(shape, seed)
    report = reports.QuantizeReport.of(Recipe.make("svdquant"))
    plain = quantized(weight, "sdnq", weights_dtype="uint4")[1]
    branch = quantized(weight, "sdnq", weights_dtype="uint4", use_svd=True)[1]
    svdquant = quantized(weight, "svdquant", rank=32)[1]
    assert plain.relative > SVDQUANT_FACTOR * svdquant.relative
    assert plain.relative > UINT4_SVD_FACTOR * branch.relative
    for name, error in (("plain", plain), ("branch", branch), ("svdquant", svdquant)):
        report.add(name, error)
    assert [name for name, _ in report.worst] == ["plain", "svdquant", "branch"]
    for error in (plain, branch, svdquant):
        assert f"error {error.relative:.4f}" in report.text
        assert f"{error.snr:.1f} dB" in report.text


# ----------------------------------------------------------------------------------- refinements

SEARCHED = [
    ("sdnq", {"weights_dtype": "uint4"}, 0.92),
    ("sdnq", {"weights_dtype": "int3"}, 0.95),
    ("sdnq", {"weights_dtype": "uint4", "use_svd": True, "use_hadamard": True}, 0.99),
    ("sdnq", {"weights_dtype": "int4", "group_size": -2}, 0.9),
    ("svdquant", {}, 0.95),
    ("svdquant", {"precision": "nvfp4"}, 0.96),
    ("nvfp4", {}, 0.99),
    ("nvfp4", {"awq": True}, 0.99),
    ("int4", {}, 0.96),
    ("int4", {"symmetric": False, "awq": True}, 0.96),
    ("int8", {}, 1.0),
    ("fp8", {}, 1.0),
    ("fp8", {"granularity": "block"}, 1.0),
    ("mxfp8", {}, 1.0),
]


@pytest.mark.parametrize(("method", "told", "gain"), SEARCHED)
def test_searched_scales_lose_less(method: str, told: dict, gain: float) -> None:
    for seed, shape in enumerate(SHAPES):
        weight = heavy(shape, seed + 3)
        plain = lost(weight, method, **told)
        searched = lost(weight, method, {"scale_search": 20}, **told)
        assert searched <= plain * gain, (searched / plain, shape)


def test_more_factors_lose_no_more() -> None:
    weight = heavy(SHAPES[0], 5)
    found = [lost(weight, "int4", {"scale_search": count}) for count in (0, 5, 10, 20, 40)]
    assert found == sorted(found, reverse=True) and found[-1] < 0.96 * found[0]


@pytest.mark.parametrize(
    ("method", "told", "gain"),
    [
        ("sdnq", {"weights_dtype": "uint4", "use_svd": True}, 0.93),
        ("sdnq", {"weights_dtype": "int4", "use_svd": True, "use_hadamard": True}, 0.95),
        ("svdquant", {}, 0.9),
        ("svdquant", {"precision": "nvfp4"}, 0.93),
        ("nvfp4", {"rank": 32}, 0.93),
    ],
)
def test_refits_of_branch_and_codes_lose_less(method: str, told: dict, gain: float) -> None:
    for seed, shape in enumerate(SHAPES):
        weight = heavy(shape, seed + 6)
        plain = lost(weight, method, **told)
        few, many = (lost(weight, method, {"svd_refits": n}, **told) for n in (1, 6))
        assert few < plain and many <= few * 1.001 and many <= plain * gain, (few, many, plain)


def test_the_best_pair_is_kept_where_refits_lose_more() -> None:
    """Too few directions found too crudely: what is fitted anew is worse."""
    told = {"weights_dtype": "uint4", "use_svd": True, "svd_steps": 0, "svd_rank": 8}
    for seed in range(3):
        weight = heavy((256, 384), seed)
        plain, *refitted = (lost(weight, "sdnq", {"svd_refits": n}, **told) for n in (0, 1, 3))
        assert all(found <= plain for found in refitted), seed


def test_refinements_are_off_by_default() -> None:
    weight = heavy(SHAPES[0], 8)
    measured = Activations()
    measured.add(inputs(768, 8))
    plain, error = quantized(weight, "svdquant")
    given, same = quantized(weight, "svdquant", None, measured)
    assert all(torch.equal(given.tensors[n].float(), t.float()) for n, t in plain.tensors.items())
    assert same == error and error.weighted is None


# ----------------------------------------------------------------------------------- activations


def test_activations_are_summed_as_they_come() -> None:
    x = inputs(64, 9, 300).view(3, 100, 64)
    for parts in ([x], list(x), [x[0, :7], x[0, 7:], x[1:], x[:0]]):
        measured = Activations(want_products=True)
        for part in parts:
            measured.add(part.half() if part is x else part)
        rows = x.reshape(-1, 64).double()
        assert torch.allclose(
            measured.second_moment.double(), rows.square().mean(dim=0), rtol=2e-3, atol=1e-4
        )
        assert torch.allclose(
            measured.products.double(), rows.t() @ rows / len(rows), rtol=1e-2, atol=2e-2
        )
        assert measured.largest == pytest.approx(float(x.abs().max()), rel=1e-3)
    assert Activations(products=torch.eye(3) * 2).second_moment.tolist() == [2, 2, 2]


WEIGHTED = [
    ("sdnq", {"weights_dtype": "uint4", "use_svd": True}, {}, 1.0),
    ("sdnq", {"weights_dtype": "uint4", "use_svd": True, "use_hadamard": True}, {}, 1.0),
    ("sdnq", {"weights_dtype": "uint4", "use_svd": True}, {"svd_refits": 6}, 0.97),
    ("sdnq", {"weights_dtype": "uint4"}, {"scale_search": 20}, 0.95),
    ("svdquant", {}, {}, 0.95),
    ("svdquant", {}, {"svd_refits": 4, "scale_search": 20}, 0.9),
    ("nvfp4", {"rank": 32}, {}, 1.0),
    ("nvfp4", {"awq": True}, {}, 0.95),
    ("int4", {"awq": True}, {}, 0.9),
]


@pytest.mark.parametrize(("method", "told", "refine", "gain"), WEIGHTED)
def test_weighing_by_activations_lowers_the_error_of_products(method, told, refine, gain) -> None:
    for seed, shape in enumerate([(256, 512), (192, 640)]):
        weight, x = heavy(shape, seed + 11), inputs(shape[1], seed + 20)
        measured = Activations()
        measured.add(x)
        square = measured.second_moment
        products = []
        for wish in (False, True):
            made, error = quantized(
                weight, method, {**refine, "activation_weighted": wish}, measured, **told
            )
            difference = made.dequantize() - weight.float()
            found = (difference.square() * square).sum() / (weight.float().square() * square).sum()
            products.append(float(found.sqrt()))
            assert (error.weighted is not None) == wish
        assert error.weighted == pytest.approx(products[1], rel=2e-3)
        assert products[1] <= products[0] * gain, products[1] / products[0]


def product_error(weight: Tensor, made, x: Tensor) -> float:
    exact = x @ weight.float().t()
    return float((x @ made.dequantize().t() - exact).norm() / exact.norm())


def with_products(x: Tensor) -> Activations:
    measured = Activations(want_products=True)
    measured.add(x)
    return measured


def test_refits_weighed_by_activations_lower_the_error_of_products() -> None:
    weight, x = heavy((256, 512), 13), inputs(512, 14, 2000)
    squares = Activations()
    squares.add(x)
    told = {"weights_dtype": "uint4", "use_svd": True, "svd_rank": 32}
    plain, by_squares, by_products = (
        product_error(
            weight,
            quantized(
                weight, "sdnq", {"activation_weighted": wish, "svd_refits": 8}, measured, **told
            )[0],
            x,
        )
        for measured, wish in ((squares, False), (squares, True), (with_products(x), True))
    )
    assert by_squares < 0.7 * plain
    assert by_products <= 1.001 * by_squares


def in_order(weight: Tensor, products: Tensor, group: int) -> Tensor:
    """Codes of int4 with error feedback, column by column, the inverse shrunk after each.

    Scales are those of the plain weight.
    """
    weight, products = weight.double(), products.double()
    products = products + torch.eye(len(products)) * products.diagonal().mean() * 0.01
    inverse = torch.linalg.inv(products)
    scale = weight.view(len(weight), -1, group).abs().amax(dim=-1) / 7
    rest, codes = weight.clone(), []
    for column in range(weight.shape[1]):
        step = scale[:, column // group]
        code = (rest[:, 0] / step).round().clamp(-8, 7)
        codes.append(code)
        error = (rest[:, 0] - code * step) / inverse[0, 0]
        rest = rest[:, 1:] - error[:, None] * inverse[0, 1:]
        inverse = inverse[1:, 1:] - inverse[1:, :1] @ inverse[:1, 1:] / inverse[0, 0]
    return torch.stack(codes, dim=1)


def test_error_feedback_is_what_its_definition_says() -> None:
    for seed in (1, 2):
        weight, x = heavy((64, 256), seed).float(), inputs(256, seed + 30, 1000)
        measured = with_products(x)
        made, _ = quantized(weight, "int4", {"error_feedback": True}, measured, group_size=64)
        found = reference.unpack(made.tensors["codes"], made.spec.format, made.spec.numel)
        expected = in_order(weight, measured.products, 64)
        same = found.view(64, 256) == expected
        assert same.float().mean() > 0.995  # roundings that are nearly ties, and what follows


@pytest.mark.parametrize(
    ("method", "told"),
    [
        ("int4", {"symmetric": False}),
        ("nvfp4", {}),
        ("nvfp4", {"awq": True}),
        ("sdnq", {"weights_dtype": "uint4", "use_hadamard": True}),
        ("svdquant", {}),
    ],
)
def test_error_feedback_lowers_the_error_of_products(method: str, told: dict) -> None:
    weight, x = heavy((256, 512), 15), inputs(512, 16, 2000)
    plain, fed = (
        product_error(
            weight,
            quantized(weight, method, {"error_feedback": on}, with_products(x), **told)[0],
            x,
        )
        for on in (False, True)
    )
    assert fed < 0.85 * plain


# -------------------------------------------------------------------------------------- SVDQuant


def test_svdquant_rounds_what_the_rounded_branch_leaves() -> None:
    """Codes and scales follow from smoothing and factors as they are stored, in 16 bits."""
    for seed, dtype in ((1, torch.bfloat16), (2, torch.float16), (3, torch.float32)):
        weight = (heavy((256, 384), seed).float() * 3).to(dtype)
        made, _ = quantized(weight, "svdquant")
        tensors, narrow = made.tensors, torch.bfloat16 if dtype == torch.float32 else dtype
        for name in ("smooth", "svd_up", "svd_down", "scale"):
            assert tensors[name].dtype == narrow
        smooth = tensors["smooth"].float()
        branch = tensors["svd_up"].float() @ tensors["svd_down"].float()
        rest = ((weight.float() - branch) * smooth).view(256, -1, 64)
        scale = (rest.abs().amax(dim=-1, keepdim=True) / 7).to(narrow)
        assert torch.allclose(scale.float(), tensors["scale"].float(), rtol=1e-2)
        codes = reference.unpack(tensors["codes"], made.spec.format, made.spec.numel)
        assert (codes.view(rest.shape) - rest / tensors["scale"].float()).abs().max() <= 0.51
        largest = weight.float().abs().amax(dim=0)
        even = largest.pow(-0.5)
        even = even / even.log().mean().exp()
        assert torch.allclose(smooth, even, rtol=2e-2)


def test_svdquants_tensors_pack_for_its_engine() -> None:
    weight = heavy((256, 384), 4)
    made, _ = quantized(weight, "svdquant")
    words = made.tensors["codes"]
    assert torch.equal(svdq.unpack_to_int4(svdq.pack_from_int4(words, 256, 384)), words)
    scale = made.tensors["scale"].squeeze(-1)
    assert torch.equal(svdq.unpack_scales_int4(svdq.pack_scales_int4(scale)), scale)
    for name, there, back in (
        ("svd_down", svdq.pack_down, svdq.unpack_down),
        ("svd_up", svdq.pack_up, svdq.unpack_up),
        ("smooth", svdq.pack_vector, svdq.unpack_vector),
    ):
        assert torch.equal(back(there(made.tensors[name])), made.tensors[name])
    four, _ = quantized(weight, "svdquant", precision="nvfp4")
    words = four.tensors["codes"]
    assert torch.equal(svdq.unpack_to_float4(svdq.pack_from_float4(words, 256, 384)), words)
    scale = four.tensors["scale"].squeeze(-1)
    packed = svdq.unpack_scales_nvfp4(svdq.pack_scales_nvfp4(scale))
    assert torch.equal(packed.view(torch.uint8), scale.view(torch.uint8))
    top = (four.tensors["scale"].float() * four.tensors["scale_2"]).max() * 6
    assert torch.isclose(top, four.tensors["scale_2"].max() * 448 * 6)


GELU = recipes.Facts(behind_gelu=("x",), modulation=(("mod", 6),))


def test_shifted_activations_behind_a_gelu_lose_less_than_signed_ones() -> None:
    torch.manual_seed(5)
    weight = heavy((256, 512), 6).float()
    x = functional.gelu(torch.randn(256, 512), approximate="tanh")
    exact, errors = x @ weight.t(), []
    for told in ({}, {"unsigned": "never"}):
        layer = Recipe.make("svdquant", told).decide("x", (256, 512), facts=GELU)
        made, _ = engine.quantize_layer(weight, layer)
        made.check()
        y = faithful.linear_faithful(x, made.tensors, made.spec)
        errors.append(float((y - exact).norm() / exact.norm()))
        if not told:
            rest = reference.dequantize(made.tensors, made.spec, branch=False).double()
            expected = svdq.SHIFT * rest.sum(dim=1)
            assert torch.allclose(made.tensors["shift_bias"].double(), expected, atol=1e-5)
    assert errors[0] < 0.9 * errors[1] and errors[0] < 0.15


def test_smoothing_helps_where_activations_have_outliers_in_the_same_columns() -> None:
    """Columns of large weights need small activations; where they meet them evenly, it helps."""
    torch.manual_seed(7)
    weight = torch.randn(256, 512) * torch.rand(512).mul(3).exp()
    x = torch.randn(300, 512) / weight.abs().amax(dim=0).sqrt()
    exact, errors = x @ weight.t(), []
    for smoothing in ("weights", "none"):
        made, _ = quantized(weight, "svdquant", smoothing=smoothing)
        y = faithful.linear_faithful(x, made.tensors, made.spec)
        errors.append(float((y - exact).norm() / exact.norm()))
    assert errors[0] < 0.97 * errors[1]


def test_modulation_is_awqs_w4a16() -> None:
    weight = heavy((384, 256), 8)
    layer = Recipe.make("svdquant").decide("mod", (384, 256), facts=GELU)
    made, error = engine.quantize_layer(weight, layer)
    assert made.spec.activation is None and made.spec.code_shape == (384, 4, 64)
    assert {n: t.dtype for n, t in made.tensors.items()} == {
        "codes": torch.uint8, "scale": torch.bfloat16, "zero_point": torch.bfloat16,
    }  # fmt: skip
    assert torch.equal(
        svdq.unpack_to_uint4(svdq.pack_from_uint4(made.tensors["codes"], 384, 256, splits=6), 6),
        made.tensors["codes"],
    )
    assert error.relative < lost(weight, "int4", group_size=64)


# ------------------------------------------------------------------------------------------- AWQ


@pytest.mark.parametrize("told", [{}, {"symmetric": False}, {"symmetric": False, "awq_steps": 3}])
def test_awqs_search_never_loses_more_and_often_less(told: dict) -> None:
    for seed, shape in enumerate(SHAPES):
        weight = heavy(shape, seed + 40)
        plain, searched = (lost(weight, "int4", awq=on, **told) for on in (False, True))
        assert searched < 0.7 * plain
        even = torch.randn(shape) * 0.02
        plain, searched = (lost(even, "int4", awq=on, **told) for on in (False, True))
        assert searched <= 1.002 * plain  # what 16 bits of the smoothing lose


def test_integer_offsets_are_integers_and_keep_zero() -> None:
    for scale in ("float32", "float16", "bfloat16"):
        weight = heavy((128, 256), 9).float()
        weight[0] = weight[0].abs() + 0.01
        weight[:, 7] = 0
        made, _ = quantized(weight, "int4", symmetric=False, scale_dtype=scale)
        step, base = made.tensors["scale"], made.tensors["zero_point"]
        assert torch.equal(step.to(getattr(torch, scale)).float(), step)
        code = -base / step
        assert (code - code.round()).abs().max() < 1e-5 and code.min() >= 0
        assert code.max() < 15.001
        zeros = made.dequantize()[:, 7]
        assert zeros.abs().max() < 1e-6 if scale == "float32" else not zeros.any()


# ---------------------------------------------------------------------------------------- report


def test_a_report_says_what_it_was_told() -> None:
    recipe = Recipe.make("int8", keep=("head",))
    report = reports.QuantizeReport.of(recipe)
    weight = heavy((256, 256), 10)
    for name in ("a.q", "a.k"):
        report.add(name, quantized(weight, "int8")[1])
    report.add("b", quantized(torch.zeros(64, 64), "int8")[1])
    report.keep("head", "the recipe keeps it (head)", 1000)
    for number in range(5):
        report.keep(f"norm{number}", "a tensor of 1 dimensions", 10)
    totals = report.totals
    assert (totals.layers, totals.kept_layers, totals.kept) == (3, 6, 1050)
    assert totals.before == 2 * weight.nbytes + 64 * 64 * 4
    assert totals.after == sum(e.after for e in report.layers.values())
    assert totals.ratio == pytest.approx((totals.before + 1050) / (totals.after + 1050))
    data = json.loads(json.dumps(report.to_json(), allow_nan=False))
    back = reports.QuantizeReport.from_json(data)
    assert back == report and back.text == report.text
    assert back.layers["b"].snr == math.inf
    assert Recipe.from_json(data["recipe"]) == recipe
    for said in ("INT8", "3 of int8", "3 layers", "6 kept", "norm0, norm1, norm2 and 2 more"):
        assert said in report.text
    assert "a.k" in report.table() and "max" in report.table()
    for bad in ({}, {"lowbit_quantize_report": 9}, []):
        with pytest.raises(LowBitError):
            reports.QuantizeReport.from_json(bad)


def test_a_dry_report_has_sizes_alone() -> None:
    recipe = Recipe.make("sdnq", {"weights_dtype": "uint4"})
    report = reports.QuantizeReport.of(recipe, dry=True)
    layer = recipe.decide("x", (3072, 3072))
    report.plan("x", layer.method, layer.format, 64, 2 * 3072**2, engine.dry(layer, (3072, 3072)))
    assert "error" not in report.text and "18.87 MB -> 5.90 MB" in report.text
    assert reports.QuantizeReport.from_json(report.to_json()) == report
    assert reports.QuantizeReport.of(recipe).text  # nothing in it yet


# ---------------------------------------------------------------------------------------- memory


def peak_over(work) -> int:
    """Bytes by which the resident memory grows at most while `work` runs."""
    status = Path("/proc/self/status")

    def told(key: str) -> int:
        line = next(row for row in status.read_text().splitlines() if row.startswith(key))
        return int(line.split()[1]) * 1024

    Path("/proc/self/clear_refs").write_text("5")
    before = told("VmRSS")
    work()
    return told("VmHWM") - before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "told", "most"),
    [
        ("sdnq", {"weights_dtype": "uint4"}, 1.5),
        ("nvfp4", {}, 1.5),
        ("svdquant", {"refinements": 1, "svd_steps": 1}, 4.0),
    ],
)
def test_memory_beside_the_weight_is_bounded(method: str, told: dict, most: float) -> None:
    """In float32 copies of the weight."""
    weight = torch.randn(10752, 3072).bfloat16()
    quantized(weight[:64], method, **told)  # what is loaded once
    assert peak_over(lambda: quantized(weight, method, **told)) < most * 4 * weight.numel()
