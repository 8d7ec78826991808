"""Numbers to codes: nearest, saturating, and without bias when stochastic."""

from __future__ import annotations

import pytest
import torch
from support import pack
from units import units

dtypes = pack("quant.dtypes")
packing = pack("quant.packing")
reference = pack("kernels.reference")
rounding = pack("quant.rounding")

EVERY = [
    fmt
    for fmt in (*dtypes.all_formats(), *dtypes.all_formats(subnormals=False))
    if fmt.name not in ("float8_e8m0fnu", "float32")
]


def through(x: torch.Tensor, fmt, noise=None) -> torch.Tensor:
    codes = rounding.round_to_codes(x, fmt, noise)
    assert codes.shape == x.shape
    return reference.decode(packing.pack(codes, fmt), fmt, x.numel()).view(x.shape)


def test_what_a_format_holds_stays_as_it_is() -> None:
    for fmt in EVERY:
        if fmt.is_integer:
            values = torch.arange(int(fmt.qmin), int(fmt.qmax) + 1, dtype=torch.float32)
        else:
            values = rounding.magnitudes(fmt)
            assert values[0] == 0 and (values.diff() > 0).all(), fmt.name
            # The producer's maximum of bfloat16 is a little below the dtype's own.
            values = values[values <= fmt.qmax]
            values = torch.cat((-values, values)) if fmt.signed else values
        assert torch.equal(through(values, fmt), values), (fmt.name, fmt.subnormals)


def test_numbers_go_to_the_nearest_value() -> None:
    for fmt in EVERY:
        if fmt.bits > 8:
            continue
        torch.manual_seed(1)
        codes = torch.arange(1 << fmt.bits, dtype=torch.int32)
        if fmt.is_integer:
            codes = codes + int(fmt.qmin)
        if fmt.kind == "native":
            codes = codes.to(torch.uint8).view(fmt.word)
        values = reference.decode(packing.pack(codes, fmt), fmt, codes.numel())
        values = values[values.isfinite()]
        x = (torch.rand(500) * 2.2 - 1.1) * fmt.qmax
        x[:200] = torch.randn(200) * fmt.qmax / 50
        error = (through(x, fmt) - x).abs()
        best = (values - x[:, None]).abs().amin(dim=1)
        assert torch.equal(error, best), fmt.name


def test_never_further_away_than_the_package() -> None:
    """Its own encoder looks at four dropped bits, and rounds small numbers twice."""
    worse = 0
    for case in units("floats"):
        fmt = dtypes.get_format(case.facts["format"])
        x, theirs = case.tensors["x"], case.tensors["rounded"]
        ours = through(x, fmt)
        assert ((ours - x).abs() <= (theirs - x).abs()).all(), fmt.name
        worse += int(((ours - x).abs() < (theirs - x).abs()).any())
    assert worse  # else the package is as good, and its own rule could be said plainly


def test_ties_go_to_the_even_code() -> None:
    fmt = dtypes.get_format("float4_e2m1fn")
    x = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -0.75, -5.0, 7.0, -9.0])
    expected = torch.tensor([0.0, 1, 1, 2, 2, 4, 4, -1, -4, 6, -6])
    assert torch.equal(through(x, fmt), expected)
    halves = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5])
    assert torch.equal(through(halves, dtypes.get_format("int4")), halves.round())


@pytest.mark.parametrize(
    "name",
    [
        *("int8", "uint4", "uint1", "int12", "float4_e2m1fn", "float5_e3m1fn", "float6_e3m3fnu"),
        *("float8_e4m3fn", "float8_e5m2", "bfloat16", "float16"),
    ],
)
def test_stochastic_rounding_has_no_bias(name: str) -> None:
    fmt = dtypes.get_format(name)
    torch.manual_seed(2)
    unit = 2.0**-9 if name == "float16" else 1.0
    points = torch.rand(40) * min(fmt.qmax, 6.0) * unit
    points[:4] = torch.tensor([0.0, 0.03, 0.4, 1.0]) * unit
    points = torch.where(torch.arange(40) % 2 == 1, points * (-1 if fmt.signed else 1), points)
    draws = 20000
    noise = rounding.generator(7, points.device)
    rounded = through(points.repeat(draws, 1), fmt, noise)
    assert ((rounded - points).abs().amax(dim=0) <= _gap(points, fmt)).all()
    # Five standard errors of the mean of a number rounded up or down over its gap.
    limit = 5 * _gap(points, fmt) * 0.5 / draws**0.5
    assert ((rounded.mean(dim=0) - points).abs() <= limit + 1e-6 * unit).all()


def _gap(points: torch.Tensor, fmt) -> torch.Tensor:
    if fmt.is_integer:
        return torch.ones_like(points)
    table = rounding.magnitudes(fmt)
    above = torch.searchsorted(table, points.abs(), right=True).clamp(1, table.numel() - 1)
    return table[above] - table[above - 1]


def test_stochastic_rounding_repeats_for_a_seed() -> None:
    x = torch.rand(1000) * 6
    for name in ("int4", "float4_e2m1fn", "float8_e4m3fn"):
        fmt = dtypes.get_format(name)
        before = torch.get_rng_state()
        one, two, other = (through(x, fmt, rounding.generator(s, x.device)) for s in (1, 1, 2))
        assert torch.equal(one, two) and not torch.equal(one, other)
        assert torch.equal(before, torch.get_rng_state())
    assert rounding.generator(0, x.device) is None


def test_many_numbers_are_rounded_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(3)
    x = torch.randn(7, 100)
    fmt = dtypes.get_format("float6_e3m2fn")
    whole = through(x, fmt)
    monkeypatch.setattr(rounding, "_CHUNK", 64)
    assert torch.equal(through(x, fmt), whole)
