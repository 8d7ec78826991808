"""Files of older sdnq releases: the goldens in ``tests/goldens/``, opened by the pack.

The oracle (``tests/oracles/sdnq_layers.py``, which tells what had to be done to each release) made
them with the real packages. No case needs more than 1e-6 here: scales and factors were made float32
before the package dequantized, so that it rounds nothing of its own.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
from sdnq_books import GOLDENS, VERSIONS, Book, differences, errors_of, make_book, open_layers
from support import pack

WEIGHTS = 1e-6

#: What a release cannot make, though it takes the settings.
CANNOT = {
    "0.1.3": set(),
    # the low-rank factors are multiplied untransposed while a dtype is being looked for
    "0.1.9": {"dynamic_svd_mm"},
    # a layer narrower than the block, and no power of two, is an error (sdnq issue 20)
    "0.2.1": {
        "int8_had",
        "int8_had_mm",
        "uint4_had",
        "uint4_had_svd",
        "dynamic_had",
        "conv3_uint4_had",
    },
}


@cache
def book(version: str) -> Book:
    return Book(GOLDENS / f"sdnq-{version}.json")


CASES = [(version, case) for version in VERSIONS for case in book(version).cases]


@pytest.fixture(scope="module", autouse=True)
def host():
    return pack()


def check(version, case, folder, config):
    """Every layer means what the package said, by its tensors and by the architecture's shape."""
    made = book(version)
    golden, stored = made.tensors("golden", case), made.tensors("stored", case)
    plan = open_layers(made.component(case, folder, config), made.shapes(case))
    told = pack("loaders.schemes.sdnq").read(plan.source, made.shapes(case).get)
    for entries in (plan.entries, told.entries):
        for key, error in errors_of(entries, golden).items():
            assert error <= WEIGHTS, f"{key} differs by {error:.2e}"
        plain = set(entries) - set(golden)
        assert plain == {key for key in stored if key.endswith("bias")} | (
            {key for key in entries if key.endswith("weight")} - set(golden)
        )
        for key in plain:
            assert torch.equal(entries[key].read(), stored[key]), key
    plan.source.close()


@pytest.mark.parametrize(("version", "case"), CASES, ids=["-".join(pair) for pair in CASES])
def test_layer_means_what_its_release_says(tmp_path, version, case):
    config = book(version).config(case)
    assert config["sdnq_version"] == version
    check(version, case, tmp_path / "model", config)


@pytest.mark.parametrize("case", book("0.1.3").cases)
def test_files_from_before_the_version_key(tmp_path, case):
    """October 2025: the format of 0.1.3 without ``sdnq_version``."""
    config = book("0.1.3").config(case)
    del config["sdnq_version"]
    check("0.1.3", case, tmp_path / "model", config)


@pytest.mark.parametrize("case", ["conv2_uint4", "conv3_uint4", "conv2_uint4_svd"])
@pytest.mark.parametrize("version", ["0.1.2", None])
def test_narrow_convolutions_before_0_1_3_are_uint4(tmp_path, case, version):
    """Up to 0.1.2 a convolution of less than 4 bits was stored as uint4, whatever its config says.

    The bytes are those of 0.1.3's uint4 (0.1.0 and 0.1.2 were tried by hand).
    """
    config = book("0.1.3").config(case) | {"weights_dtype": "uint3", "sdnq_version": version}
    check("0.1.3", case, tmp_path / "model", config)


def test_goldens_are_whole():
    for version in VERSIONS:
        made = book(version)
        assert made.version == version
        assert set(made.failed) == CANNOT[version]
        assert len(made.cases) >= 130
        kinds = {entry["kind"] for entry in made.cases.values()}
        assert {"one", "linears", "deep", "conv2", "conv3"} <= kinds
        for case in made.cases:
            assert made.tensors("golden", case).keys() == made.shapes(case).keys()
    # 10 MB in all is what the repository has room for
    assert sum(file.stat().st_size for file in GOLDENS.iterdir()) < 8e6


def test_eras_of_float_tables(tmp_path):
    """The same bytes mean other numbers in a file of today."""
    made, case = book("0.1.9"), "dtype_float5_e3m1fn"
    config = made.config(case) | {"sdnq_version": "0.2.8"}
    plan = open_layers(made.component(case, tmp_path / "model", config))
    (error,) = errors_of(plan.entries, made.tensors("golden", case)).values()
    assert error > 1e-3


@pytest.mark.parametrize("version", ["0.1.9", "0.2.1"])
def test_zeros_of_one_bit_exponents_were_met(version):
    """These releases decode the zero they wrote to 1.0; the goldens hold it as zero."""
    entries = book(version).cases
    ones = [case for case in entries if case.startswith("dtype_float") and "_e1m" in case]
    assert len(ones) > 10
    for case in ones:
        assert entries[case]["zeros"] > 0, case
    assert not any(entries[case]["zeros"] for case in entries if "_e2m" in case)


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
def test_release_still_makes_these_bytes(tmp_path, version):
    made = make_book(tmp_path, version)
    assert differences(book(version), made) == []
