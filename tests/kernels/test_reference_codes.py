"""Unpacking, float tables and rotations against the sdnq package, to the bit."""

from __future__ import annotations

import pytest
import torch
from support import pack
from units import units

reference = pack("kernels.reference")
dtypes = pack("quant.dtypes")


def test_every_packed_integer_unpacks_to_the_packages_values() -> None:
    seen = set()
    for case in units("words"):
        fmt = dtypes.get_format(case.facts["format"])
        values, words = case.tensors["values"], case.tensors["words"].reshape(-1)
        assert words.dtype == fmt.word
        found = reference.unpack(words, fmt, values.numel())
        assert torch.equal(found.to(torch.int32), values), case.name
        assert torch.equal(reference.decode(words, fmt, 100), values[:100].to(torch.float32))
        seen.add(fmt.name)
    expected = {f.name for f in dtypes.all_formats() if f.is_integer and f.packed}
    assert seen == expected and len(seen) == 14 + 13


def test_every_own_float_decodes_to_the_packages_values() -> None:
    seen = set()
    for case in units("floats"):
        fmt = dtypes.get_format(case.facts["format"])
        assert (fmt.qmin, fmt.qmax) == (case.facts["min"], case.facts["max"])
        words, values = case.tensors["words"].reshape(-1), case.tensors["values"]
        assert words.dtype == fmt.word, case.name
        assert torch.equal(reference.decode(words, fmt, values.numel()), values), case.name
        codes = reference.unpack(words, fmt, values.numel())
        assert torch.equal(reference.code_values(codes, fmt), values), case.name
        seen.add(fmt.name)
    assert seen == {f.name for f in dtypes.all_formats() if f.kind == "float"}
    assert {dtypes.get_format(name).bits for name in seen} == set(range(1, 17))


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("float4_e2m1fn", [0, 0.75, 1, 1.5, 2, 3, 4, 6]),
        ("float5_e3m1fn", [0, 0.1875, 0.25, 0.375, 0.5, 0.75, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24]),
        ("float4_e3m0fn", [0, 0.25, 0.5, 1, 2, 4, 8, 16]),
        ("float3_e1m1fn", [0, 1.5, 2, 3]),
    ],
)
def test_old_files_have_no_subnormals(name: str, values: list[float]) -> None:
    fmt = dtypes.get_format(name, subnormals=False)
    codes = torch.arange(2 * len(values), dtype=torch.uint8)
    expected = torch.tensor([*values, *(-v for v in values)], dtype=torch.float32)
    assert torch.equal(reference.code_values(codes, fmt), expected)
    words = pack("quant.packing").pack(codes, fmt)
    assert torch.equal(reference.decode(words, fmt, codes.numel()), expected)
    # A table of the other era is not handed out for it.
    new = reference.decode(words, dtypes.get_format(name), codes.numel())
    assert torch.equal(new, expected) == name.endswith("m0fn")


def test_eras_differ_in_the_lowest_binade_alone() -> None:
    for old, new in zip(dtypes.all_formats(subnormals=False), dtypes.all_formats(), strict=True):
        if new.kind != "float":
            assert old == new
            continue
        codes = torch.arange(1 << (new.exponent + new.mantissa))
        a, b = reference.code_values(codes, old), reference.code_values(codes, new)
        lowest = 1 << new.mantissa
        assert torch.equal(a[lowest:], b[lowest:])
        assert a[0] == b[0] == 0
        assert (a.diff() > 0).all() and (b.diff() > 0).all()
        step = 2.0 ** (-new.exponent_bias - new.mantissa)
        expected = 2.0**-new.exponent_bias + step * torch.arange(1, lowest)
        assert torch.equal(a[1:lowest], expected.to(torch.float32))


def test_rotation_matrices_are_the_packages() -> None:
    for case in units("hadamard"):
        size, basis = case.facts["size"], case.facts["basis"]
        matrix = reference.hadamard_matrix(size, basis)
        assert torch.equal(matrix, case.tensors["matrix"]), case.name
        assert torch.equal(matrix, matrix.t())


def test_basis_4_falls_back_where_the_block_is_no_power_of_4() -> None:
    for size, same in ((8, True), (16, False), (32, True), (64, False), (128, True)):
        two, four = (reference.hadamard_matrix(size, basis) for basis in (2, 4))
        assert torch.equal(two, four) == same


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rotation_is_its_own_inverse(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 5, 96, dtype=dtype)
    once = reference.hadamard(x, 32, 2)
    assert once.dtype == dtype and once.shape == x.shape
    assert not torch.allclose(once, x, atol=0.1)
    assert torch.allclose(reference.hadamard(once, 32, 2), x, atol=4 * torch.finfo(dtype).eps * 4)
    # Blocks do not mix, and 32-bit sums are behind the narrow result.
    exact = x[..., :32].to(torch.float32) @ reference.hadamard_matrix(32, 2)
    assert torch.allclose(once[..., :32], exact.to(dtype), atol=1e-6)
