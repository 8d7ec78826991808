"""torch's int8 product on a CPU: what the reference gives, bit for bit, or not used at all."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch
from support import pack
from units import normal_form, units
from w4a4 import relative

cpu = pack("kernels.cpu")
dispatch = pack("loaders.layouts.dispatch")
reference = pack("kernels.reference")
registry = pack("kernels.registry")
weights = pack("quant.weight")

#: Whether this machine's processor sums int8 products exactly; elsewhere nothing may use them.
EXACT = cpu.why_unavailable("cpu") is None
PAIRS = {
    "int8": (cpu.linear_int8, reference.linear_int8),
    "uint8": (cpu.linear_uint8, reference.linear_uint8),
}
SETTINGS = [
    {"fmt": "int8", "group_size": -1},
    {"fmt": "uint8", "group_size": -1},
    {"fmt": "int5", "group_size": -1},
    {"fmt": "uint4"},
    {"fmt": "int7", "svd_rank": 8},
    {"fmt": "uint6", "group_size": -1, "svd_rank": 8, "hadamard_group_size": 64},
    {"fmt": "float8_e4m3fn", "group_size": -1},
    {"fmt": "uint4", "use_codebook": True, "group_size": 64},
]


@pytest.fixture(autouse=True)
def exact_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the processor's own product is wrong, the steps around it are still compared."""
    if not EXACT:
        monkeypatch.setattr(cpu, "int_matmul", reference.int_matmul)


def rows_of(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Activations with what rounds badly: outliers, a constant, an empty and a tiny row."""
    noise = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=noise) + 0.2
    flat = x.view(-1, shape[-1])
    flat[0, 3] = 300.0
    flat[1] = 0.0
    flat[2] = -1.5
    flat[3] *= 1e-30
    return x.to(dtype)


@pytest.mark.parametrize("matmul", sorted(PAIRS))
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(map(str, s.values())))
def test_equals_the_reference_bit_for_bit(
    matmul: str, settings: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, defined = PAIRS[matmul]
    for seed, (n, k, chunk, dtype) in enumerate(
        (
            (48, 192, 1 << 17, torch.float32),
            (80, 320, 320 * 7, torch.bfloat16),  # chunks of 7 rows
            (304, 128, 1, torch.float16),  # of 1
        )
    ):
        monkeypatch.setattr(cpu, "_CHUNK", chunk)
        monkeypatch.setattr(cpu, "_PRODUCT_ROWS", 40)
        weight = weights.quantize(
            torch.randn((n, k), generator=torch.Generator().manual_seed(seed)), **settings
        )
        bias = torch.randn(n, generator=torch.Generator().manual_seed(seed))
        for shape in ((3, 37), (32,), (5,)):
            x = rows_of(*shape, k, seed=seed, dtype=dtype)
            for given in (bias, None):
                y = found(x, weight.tensors, weight.spec, given)
                expected = defined(x, weight.tensors, weight.spec, given)
                assert y.dtype == dtype and y.shape == expected.shape
                assert torch.equal(y, expected), (shape, (y - expected).abs().max())


@pytest.mark.parametrize("matmul", sorted(PAIRS))
def test_smoothing_and_views(matmul: str) -> None:
    found, defined = PAIRS[matmul]
    weight = weights.quantize(torch.randn(64, 96), "int8", group_size=-1)
    for smoothing in ("divide", "multiply"):
        spec = replace(weight.spec, smoothing=smoothing)
        tensors = weight.tensors | {"smooth": torch.rand(96) + 0.5}
        wide = rows_of(70, 192, seed=1)
        for x in (wide[:, ::2], wide[::2, 48:144], wide.view(2, 35, 192)[..., :96]):
            expected = defined(x, tensors, spec, None)
            assert torch.equal(found(x, tensors, spec, None), expected)
    empty = found(torch.empty(0, 96), weight.tensors, weight.spec, None)
    assert empty.shape == (0, 64)


def test_the_packages_own_numbers() -> None:
    count = 0
    for case in units("matmul"):
        if case.facts["matmul"] not in PAIRS:
            continue
        found, defined = PAIRS[case.facts["matmul"]]
        weight = normal_form(case)
        x, bias = case.tensors["x"], case.tensors.get("bias")
        y = found(x, weight.tensors, weight.spec, bias)
        assert torch.equal(y, defined(x, weight.tensors, weight.spec, bias)), case.name
        if case.facts["exact"]:
            assert torch.equal(y, case.tensors["y"]), case.name
            count += 1
    assert count >= 30


def test_compiles_without_a_break() -> None:
    weight = weights.quantize(torch.randn(64, 96), "uint8", group_size=-1)
    x = rows_of(40, 96, seed=2)

    def run(x: torch.Tensor) -> torch.Tensor:
        return cpu.linear_uint8(x, weight.tensors, weight.spec, None)

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    assert relative(compiled(x), run(x)) < 1e-6  # tracing takes addcmul apart


# ------------------------------------------------------------------------------------- the probe


def saturating(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """vpmaddubsw: a as unsigned bytes, neighbouring products added in 16 bits that saturate."""
    if a.shape[1] % 2:
        a, b = torch.nn.functional.pad(a, (0, 1)), torch.nn.functional.pad(b, (0, 1))
    unsigned = a.to(torch.int32) + 128
    signed = b.to(torch.int32)
    pairs = unsigned[:, None, :] * signed[None, :, :]
    pairs = pairs.view(*pairs.shape[:2], -1, 2).sum(-1).clamp_(-32768, 32767)
    return (pairs.sum(-1) - 128 * signed.sum(-1)).to(torch.int32)


def missing(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("no such kernel\nstack")


def narrow(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Right, but for one entry of the largest shape."""
    product = reference.int_matmul(a, b)
    if a.shape[1] > 4096:
        product[-1, -1] += 1
    return product


@pytest.mark.parametrize(
    ("matmul", "words"),
    [
        (saturating, "wrong for 33x64"),
        (missing, "fails: no such kernel"),
        (narrow, "wrong for 32x12288"),
        (lambda a, b: reference.int_matmul(a, b).float(), "wrong"),
    ],
    ids=["saturates", "fails", "one entry", "float"],
)
def test_the_probe_finds_what_is_wrong(
    matmul, words: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cpu, "int_matmul", matmul)
    with caplog.at_level(logging.WARNING):
        reason = cpu.why_unavailable("cpu")
    assert words in reason
    assert len(caplog.records) == 1 and reason in caplog.text


def test_the_probe_passes_what_is_exact(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cpu, "int_matmul", reference.int_matmul)
    assert cpu.why_unavailable("cpu") is None and not caplog.records
    assert "this device is cuda" in cpu.why_unavailable("cuda")


@pytest.mark.parametrize("matmul", sorted(PAIRS))
def test_a_cpu_that_sums_exactly_runs_it(matmul: str) -> None:
    """The file's wish is done where the processor can, and refused with the reason where not."""
    spec = weights.quantize(torch.randn(64, 64), "int8", group_size=-1).spec
    decision = dispatch.decide(spec, matmul, "auto", "auto", torch.device("cpu"), torch.float32)
    if EXACT:
        assert decision.mode == matmul and decision.reason is None
        assert decision.choice.implementation.function() is PAIRS[matmul][0]
    else:
        assert decision.mode == "dequantize" and "torch._int_mm" in decision.reason
    forced = registry.registry.choose(
        f"linear_{matmul}", dispatch.call_of(spec, torch.device("cpu"), torch.float32), "reference"
    )
    assert forced.implementation.function() is PAIRS[matmul][1]


@pytest.mark.parametrize("asymmetric", [False, True])
def test_a_constant_row_has_the_codes_0(asymmetric: bool) -> None:
    """Before they become integers: what NaN becomes is up to the processor."""
    rows = torch.tensor([[0.0, 0.0], [-1.5, -1.5], [1e-44, 0.0]])
    codes = torch.full((3, 2), float("nan"))
    cpu._round(rows, codes, asymmetric)
    zero = codes if asymmetric else codes[[0, 2]]
    assert torch.equal(zero, torch.zeros_like(zero)) and not codes.isnan().any()
