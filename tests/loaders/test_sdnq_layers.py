"""Layers of every kind by today's sdnq: linear, convolution, transposed convolution, embedding.

The oracle makes each storage case on layers of odd and even shapes, with and without bias; the pack
opens them as a component folder would be opened. No case needs more than 1e-6.
"""

from __future__ import annotations

import re

import pytest
import torch
from sdnq_books import Book, errors_of, open_layers
from support import oracle, pack

WEIGHTS = 1e-6
KINDS = {
    "one": 165,
    "linears": 45,
    "deep": 8,
    "wide": 1,
    "conv1": 25,
    "conv2": 25,
    "conv3": 25,
    "transposed1": 22,
    "transposed2": 22,
    "transposed3": 22,
    "embedding": 9,
}
"""Kinds of layers in the book, each with the least number of its cases."""

#: grouped transposed convolutions, which the package splits along the wrong axis and refuses
CANNOT = re.compile(r"transposed\d_(uint3|int8_g16|uint2_cb_g16)")

#: codebooks of transposed convolutions, which nothing here can run
REFUSED = re.compile(r"transposed\d_(uint4_cb|uint4_cb_mm|uint2_cb_dq)")

#: layers whose shape only the architecture knows
SHAPELESS = {
    "uint4_tensorwise",
    "uint4_cb_tensorwise",
    "uint4_dq_packed",
    "uint4_dq_cb",
    "conv1_uint4_tensorwise",
    "conv2_uint4_tensorwise",
    "conv3_uint4_tensorwise",
    "conv2_uint2_cb_tensorwise",
    "conv2_uint4_dq_packed",
    "conv2_uint2_cb_dq",
    "embedding_uint4_tensorwise",
    "embedding_uint4_dq_packed",
}

#: without a config: what tensors cannot tell from plain integers (unsigned floats, rotations)
INDISTINCT = re.compile(r"dtype_float8_e\dm\dfnu|dtype_float2_e2m0fnu|.*int8_had.*|uint4_had_wide")


@pytest.fixture(scope="module")
def book():
    pack()
    return Book(oracle("sdnq_layers.py", "-", "all") / "book.json")


def cases_of(book, kind):
    return [case for case, entry in book.cases.items() if entry["kind"] == kind]


def worst(entries, golden):
    return max(errors_of(entries, golden).values())


@pytest.mark.parametrize("kind", KINDS)
def test_layers_mean_what_the_package_says(book, tmp_path, kind):
    cases = cases_of(book, kind)
    assert len(cases) >= KINDS[kind]
    wrong = {}
    for case in cases:
        if REFUSED.fullmatch(case):
            continue
        folder = book.component(case, tmp_path / case, book.config(case))
        golden, stored = book.tensors("golden", case), book.tensors("stored", case)
        plan = open_layers(folder, book.shapes(case))
        told = pack("loaders.schemes.sdnq").read(plan.source, book.shapes(case).get)
        error = max(worst(plan.entries, golden), worst(told.entries, golden))
        if not error <= WEIGHTS:
            wrong[case] = error
        for key in set(plan.entries) - set(golden):
            assert torch.equal(plan.entries[key].read(), stored[key]), (case, key)
        plan.source.close()
    assert wrong == {}


def test_every_kind_of_layer_is_there(book):
    assert {entry["kind"] for entry in book.cases.values()} == set(KINDS)
    assert {case for case in book.failed if not CANNOT.fullmatch(case)} == set()


@pytest.mark.parametrize("kind", [k for k in KINDS if not k.startswith("transposed")])
def test_tensors_alone_tell_most_shapes(book, tmp_path, kind):
    """Without an architecture a layer is right, or says that its shape is not known or in doubt."""
    wrong = {}
    for case in cases_of(book, kind):
        folder = book.component(case, tmp_path / case, book.config(case))
        plan = read_alone(folder)
        unsure = {key for key, entry in plan.items() if entry.shape is None or entry.doubtful}
        assert not unsure or case in SHAPELESS or re.search(r"_mm|_cb|_dq|_tensorwise", case), case
        if case in SHAPELESS:
            assert any(entry.shape is None for entry in plan.values()), case
        golden = {k: v for k, v in book.tensors("golden", case).items() if k not in unsure}
        error = max([0.0, *errors_of({k: plan[k] for k in golden}, golden).values()])
        if not error <= WEIGHTS:
            wrong[case] = error
    assert wrong == {}


def read_alone(folder):
    """Entries of a component folder as the scheme tells them without an architecture."""
    source = pack("loaders.source").open_source(folder)
    return pack("loaders.schemes.sdnq").read(source).entries


@pytest.mark.parametrize("kind", ["conv1", "conv2", "conv3"])
def test_kernel_of_a_flattened_convolution_comes_from_the_architecture(book, tmp_path, kind):
    case = f"{kind}_int8_had16_mm"
    stored, golden = book.tensors("stored", case), book.tensors("golden", case)
    assert stored["a.weight"].ndim == 2 < golden["a.weight"].ndim
    folder = book.component(case, tmp_path / "model", book.config(case))
    alone = read_alone(folder)
    assert alone["a.weight"].doubtful
    assert alone["a.weight"].shape == tuple(stored["a.weight"].shape[::-1])
    plan = open_layers(folder, book.shapes(case))
    assert not any(entry.doubtful for entry in plan.entries.values())
    assert worst(plan.entries, golden) <= WEIGHTS


def test_matrix_that_hides_the_architecture_is_offered_as_a_convolution(book, tmp_path):
    """ComfyUI knows SD 1.x by its one-pixel convolutions, which may stand there as matrices."""
    case = "conv2_int8_mm"
    folder = book.component(case, tmp_path / "model", book.config(case))
    asked = []

    def native_shapes(wanted):
        asked.append(dict(wanted))
        return book.shapes(case) if len(wanted["b.weight"]) == 4 else {}

    plan = pack("loaders.plan").make_plan(folder, native_shapes=native_shapes)
    assert [len(wanted["b.weight"]) for wanted in asked] == [2, 4]
    assert worst(plan.entries, book.tensors("golden", case)) <= WEIGHTS


def test_shape_of_another_architecture_is_an_error(book, tmp_path):
    case = "conv2_int8_mm"
    folder = book.component(case, tmp_path / "model", book.config(case))
    shapes = book.shapes(case) | {"a.weight": (32, 64, 3, 3)}
    with pytest.raises(pack("quant.errors").LowBitError, match="its architecture") as caught:
        open_layers(folder, shapes)
    assert caught.value.layer == "a.weight"
    assert caught.value.expected == "[32, 64, 3, 3]"


def test_codebooks_of_transposed_convolutions_are_refused(book, tmp_path):
    refused = [case for case in book.cases if REFUSED.fullmatch(case)]
    assert len(refused) == 9
    for case in refused:
        folder = book.component(case, tmp_path / case, book.config(case))
        with pytest.raises(pack("quant.errors").LowBitError, match="transposed convolution"):
            open_layers(folder, book.shapes(case))


def test_files_without_config_are_right_or_refused(book, tmp_path):
    """Codes of 8 bits and automatic groups are told by their tensors; the rest wants the config."""
    error = pack("quant.errors").LowBitError
    right, refused = [], []
    for case in book.cases:
        if INDISTINCT.fullmatch(case):
            continue
        folder = book.component(case, tmp_path / case, None)
        try:
            plan = open_layers(folder, book.shapes(case))
        except error as told:
            assert "config" in f"{told}", case
            refused.append(case)
            continue
        assert worst(plan.entries, book.tensors("golden", case)) <= WEIGHTS, case
        right.append(case)
    assert {"dtype_int8", "dtype_float8_e4m3fn", "int8_mm", "int8_mm_svd", "uint8_mm"} <= set(right)
    assert {"conv2_int8_mm", "conv2_int8", "embedding_int8_mm", "fp16_mm"} <= set(right)
    assert {"dtype_int4", "uint4_rowwise", "dynamic", "uint4_cb", "uint4_dq"} <= set(refused)
    assert {"int8_tensorwise_mm", "uint8_cb", "int16_tensorwise_mm"} <= set(refused)
