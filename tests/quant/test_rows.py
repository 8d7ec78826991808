"""Cutting and joining by rows keeps every value."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from support import pack
from units import normal_form, units

dtypes = pack("quant.dtypes")
weights = pack("quant.weight")
LowBitError = pack("quant.errors").LowBitError


def test_rows_of_every_layer_of_the_package() -> None:
    for case in units("layers"):
        weight = normal_form(case)
        whole, rows = weight.dequantize(), weight.spec.rows
        for start, length in ((0, rows // 2), (3, 5), (rows - 1, 1), (0, rows)):
            part = weights.take_rows(weight, start, length)
            part.check()
            found = part.dequantize()
            if weight.spec.rank or weight.spec.hadamard:
                assert torch.allclose(found, whole[start : start + length], atol=1e-6), case.name
            else:
                assert torch.equal(found, whole[start : start + length]), case.name
        if weight.spec.rank:
            continue
        parts = [weights.take_rows(weight, 0, 3), weights.take_rows(weight, 3, rows - 3)]
        joined = weights.concat_rows(parts)
        assert joined is not None and joined.spec == weight.spec, case.name
        joined.check()
        assert torch.equal(
            joined.tensors["codes"].reshape(-1).view(torch.uint8),
            weight.tensors["codes"].reshape(-1).view(torch.uint8),
        ), case.name


SETTINGS = [
    {"fmt": "uint4", "group_size": 11},
    {"fmt": "int3", "group_size": 11},
    {"fmt": "uint13", "group_size": -1},
    {"fmt": "float6_e3m2fn", "group_size": 11},
    {"fmt": "float8_e4m3fn", "group_size": -1},
    {"fmt": "uint16", "group_size": -2},
    {"fmt": "uint2", "use_codebook": True, "group_size": 11},
    {"fmt": "uint4", "use_codebook": True, "group_size": -2},
    {"fmt": "int5", "svd_rank": 3},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(map(str, s.values())))
def test_halves_are_swapped(settings: dict) -> None:
    torch.manual_seed(0)
    weight = weights.quantize(torch.randn(10, 33), **settings)
    swapped = weights.swap_halves(weight)
    assert swapped is not None and swapped.spec == weight.spec
    expected = weight.dequantize().roll(5, 0)
    assert torch.allclose(swapped.dequantize(), expected, atol=1e-6 if weight.spec.rank else 0)
    odd = weights.take_rows(weight, 0, 9)
    assert weights.swap_halves(odd) is None


@pytest.mark.parametrize("settings", SETTINGS[:-1], ids=lambda s: "-".join(map(str, s.values())))
def test_parts_of_unequal_height_are_joined(settings: dict) -> None:
    torch.manual_seed(1)
    parts = [weights.quantize(torch.randn(rows, 33) * rows, **settings) for rows in (5, 1, 8)]
    joined = weights.concat_rows(parts)
    assert joined is not None
    joined.check()
    assert joined.spec.shape == (14, 33) and joined.spec.code_shape[0] == 14
    expected = torch.cat([part.dequantize() for part in parts])
    assert torch.equal(joined.dequantize(), expected)


def test_equal_scales_of_whole_parts_stay_one() -> None:
    torch.manual_seed(2)
    weight = weights.quantize(torch.randn(16, 32), "int8", group_size=-2)
    swapped = weights.swap_halves(weight)
    assert swapped.tensors["scale"].shape == (1, 1)


def test_conv_rows() -> None:
    torch.manual_seed(3)
    weight = weights.quantize(torch.randn(6, 8, 3, 3), "uint3", group_size=4)
    parts = [weights.take_rows(weight, 0, 1), weights.take_rows(weight, 1, 5)]
    assert torch.equal(weights.concat_rows(parts).dequantize(), weight.dequantize())


def test_what_no_single_spec_says_is_not_joined() -> None:
    torch.manual_seed(4)
    source = torch.randn(8, 64)

    def make(fmt: str = "uint4", **more: object):
        return weights.quantize(source, fmt, **{"group_size": 16, **more})

    first = make()
    other_rank = make(svd_rank=2)
    era = dataclasses.replace(
        make("float4_e2m1fn"),
        spec=dataclasses.replace(
            make("float4_e2m1fn").spec, format=dtypes.get_format("float4_e2m1fn", subnormals=False)
        ),
    )
    for one, two in (
        (first, make("int4")),
        (first, make("uint5")),
        (first, make(group_size=32)),
        (first, make(group_size=-1)),
        (first, make(scale_dtype=torch.bfloat16)),
        (first, make(hadamard_group_size=64)),
        (make(hadamard_group_size=64), make(hadamard_group_size=64, hadamard_basis=2)),
        (first, other_rank),
        (other_rank, make(svd_rank=2, seed=9)),
        (first, make(use_codebook=True)),
        (first, weights.quantize(torch.randn(8, 80), "uint4", group_size=16)),
        (make("float4_e2m1fn"), era),
    ):
        assert weights.concat_rows([one, two]) is None
    assert weights.concat_rows([first, make()]) is not None


@pytest.mark.parametrize(("start", "length"), [(-1, 2), (0, 9), (8, 1), (2, 0)])
def test_rows_outside_are_refused(start: int, length: int) -> None:
    weight = weights.quantize(torch.randn(8, 32), "int4")
    with pytest.raises(LowBitError, match="not in the weight"):
        weights.take_rows(weight, start, length)
