"""Formats by name."""

from __future__ import annotations

import pytest
import torch
from support import pack

dtypes = pack("quant.dtypes")
spec = pack("kernels.spec")
LowBitError = pack("quant.errors").LowBitError


def test_bit_layouts_use_every_bit_once() -> None:
    for bits, (values, words, pieces) in dtypes.LAYOUTS.items():
        word_bits = 8 if bits < 8 else 16
        of_values = {(p.value, p.value_bit + i) for p in pieces for i in range(p.width)}
        of_words = {(p.word, p.word_bit + i) for p in pieces for i in range(p.width)}
        assert of_values == {(v, b) for v in range(values) for b in range(bits)}, bits
        assert of_words == {(w, b) for w in range(words) for b in range(word_bits)}, bits
        assert sum(p.width for p in pieces) == values * bits == words * word_bits


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("fp4", "float4_e2m1fn"),
        ("fp5", "float5_e2m2fn"),
        ("fp6", "float6_e3m2fn"),
        ("fp7", "float7_e3m3fn"),
        ("fp8", "float8_e4m3fn"),
        ("fp9", "float9_e4m4fn"),
        ("fp10", "float10_e5m4fn"),
        ("fp15", "float15_e5m9fn"),
        ("fp16", "float16"),
        ("fp3", "float3_e1m1fn"),
        ("fp2", "float2_e1m0fn"),
        ("fp1", "float1_e1m0fnu"),
        ("ufp1", "float1_e1m0fnu"),
        ("ufp2", "float2_e1m1fnu"),
        ("ufp4", "float4_e2m2fnu"),
        ("ufp8", "float8_e4m4fnu"),
        ("ufp9", "float9_e4m5fnu"),
        ("ufp16", "float16_e5m11fnu"),
        ("int1", "uint1"),
        ("bool", "uint1"),
        ("bf16", "bfloat16"),
        ("torch.float8_e5m2", "float8_e5m2"),
    ],
)
def test_aliases(alias: str, name: str) -> None:
    fmt = dtypes.get_format(alias)
    assert fmt.name == name and fmt is dtypes.get_format(name)


def test_every_alias_leads_to_a_format_of_its_width() -> None:
    for alias, name in dtypes.ALIASES.items():
        digits = "".join(c for c in alias if c.isdigit())
        assert dtypes.get_format(alias).name == name
        assert not digits or dtypes.get_format(alias).bits == int(digits)


def test_formats_are_hashable_and_apart() -> None:
    every = [*dtypes.all_formats(), *dtypes.all_formats(subnormals=False)]
    floats = [f for f in every if f.kind == "float"]
    assert len({*every}) == len(every) - (len(every) - len(floats)) // 2
    weight = spec.WeightSpec(every[0], (4, 8), (4, 8))
    same = spec.WeightSpec(dtypes.get_format(every[0].name), (4, 8), (4, 8))
    assert hash(weight) == hash(same) and weight == same


def test_ranges() -> None:
    ranges = {
        "int8": (-128, 127),
        "uint8": (0, 255),
        "int2": (-2, 1),
        "uint1": (0, 1),
        "uint12": (0, 4095),
        "float4_e2m1fn": (-6.0, 6.0),
        "float8_e4m3fn_sdnq": (-480.0, 480.0),
        "float8_e4m3fn": (-448.0, 448.0),
        "float8_e4m4fnu": (0, 496.0),
        "bfloat16": (-3.38953e38, 3.38953e38),
    }
    for name, (low, high) in ranges.items():
        fmt = dtypes.get_format(name)
        assert (fmt.qmin, fmt.qmax) == (low, high), name


def test_storage_counts_whole_blocks() -> None:
    count = dtypes.get_format("uint3").storage_numel
    assert [count(n) for n in (0, 1, 8, 9, 16)] == [0, 3, 3, 6, 6]
    assert dtypes.get_format("uint13").storage_numel(17) == 26
    assert dtypes.get_format("float8_e5m2").storage_numel(17) == 17
    assert dtypes.get_format("uint9").word == torch.int16


@pytest.mark.parametrize("name", ["uint44", "float4_e2m1", "int0", "", "nf4", "FLOAT5"])
def test_unknown_names_are_refused_with_close_ones(name: str) -> None:
    with pytest.raises(LowBitError) as caught:
        dtypes.get_format(name)
    text = str(caught.value)
    assert repr(name) in text and "expected" in text and "what to do" in text
    if name == "float4_e2m1":
        assert "float4_e2m1fn" in text
