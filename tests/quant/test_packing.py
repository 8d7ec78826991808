"""Packing is the inverse of unpacking, and writes the package's own words."""

from __future__ import annotations

import pytest
import torch
from support import pack
from units import units

dtypes = pack("quant.dtypes")
packing = pack("quant.packing")
reference = pack("kernels.reference")

STORED = [f for f in dtypes.all_formats() if f.kind != "native"]


def random_codes(fmt, count: int) -> torch.Tensor:
    low = int(fmt.qmin) if fmt.is_integer else 0
    return torch.randint(low, low + (1 << fmt.bits), (count,), dtype=torch.int32)


def test_words_are_the_packages() -> None:
    for case in units("words"):
        fmt = dtypes.get_format(case.facts["format"])
        words = packing.pack(case.tensors["values"], fmt)
        assert torch.equal(words, case.tensors["words"].reshape(-1)), case.name
        assert words.dtype == fmt.word


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_unpacking_undoes_packing(seed: int) -> None:
    torch.manual_seed(seed)
    for fmt in STORED:
        for count in (1, 7, 16, 33, 160):
            codes = random_codes(fmt, count)
            words = packing.pack(codes.view(1, -1), fmt)
            assert words.dtype == fmt.word and words.shape == (fmt.storage_numel(count),)
            back = reference.unpack(words, fmt, count)
            assert torch.equal(back.to(torch.int32), codes), (fmt.name, count)


def test_packing_undoes_unpacking() -> None:
    torch.manual_seed(4)
    for fmt in STORED:
        size = torch.iinfo(fmt.word)
        words = torch.randint(size.min, size.max + 1, (5 * fmt.block_words,)).to(torch.int32)
        words = packing.pack(words, dtypes.get_format("uint16" if size.bits == 16 else "uint8"))
        words = words.view(fmt.word)
        values = reference.unpack(words, fmt, 5 * fmt.block_values)
        assert torch.equal(packing.pack(values, fmt), words), fmt.name


def test_padding_is_zero_bits() -> None:
    for name in ("uint3", "uint6", "uint11", "float5_e3m1fn"):
        fmt = dtypes.get_format(name)
        ones = torch.full((1,), (1 << fmt.bits) - 1)
        words = packing.pack(ones, fmt)
        values = reference.unpack(words, fmt, fmt.block_values)
        assert values[0] == (1 << fmt.bits) - 1 and not values[1:].any()


def test_native_floats_are_stored_as_they_are() -> None:
    for fmt in dtypes.all_formats():
        if fmt.kind == "native":
            values = torch.tensor([[1.0, 2.0], [4.0, 8.0]]).to(fmt.word)
            words = packing.pack(values, fmt)
            assert words.dtype == fmt.word
            assert torch.equal(words.to(torch.float32), torch.tensor([1.0, 2.0, 4.0, 8.0]))
