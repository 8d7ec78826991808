"""Whole layers: dequantization and table rows against the sdnq package's float32 results."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from support import pack
from units import assert_near, normal_form, units

reference = pack("kernels.reference")
dtypes = pack("quant.dtypes")
weights = pack("quant.weight")


def test_every_layer_equals_the_packages_dequantization() -> None:
    seen = set()
    for case in units("layers"):
        weight = normal_form(case)
        weight.check()
        found = reference.dequantize(weight.tensors, weight.spec)
        assert found.dtype == torch.float32
        assert_near(found, case.tensors["dequantized"], case.name)
        seen.add(weight.spec.format.name)
    missing = {f.name for f in dtypes.all_formats()} - seen
    assert missing == {"float32", "float8_e8m0fnu"}


def test_rows_of_a_table_equal_the_whole() -> None:
    count = 0
    for case in units("layers"):
        if case.facts["kind"] != "embedding":
            continue
        weight = normal_form(case)
        index = case.tensors["index"]
        found = reference.dequantize_rows(weight.tensors, weight.spec, index)
        assert_near(found, case.tensors["embedded"], case.name)
        whole = reference.dequantize(weight.tensors, weight.spec)
        assert_near(found, whole[index], case.name, 1e-7)
        count += 1
    assert count > 40


@pytest.mark.parametrize("name", ["uint3", "int7", "float5_e3m1fn", "uint11", "float10_e4m5fn"])
def test_rows_that_begin_inside_a_word(name: str) -> None:
    torch.manual_seed(1)
    weight = weights.quantize(torch.randn(32, 33), name, group_size=11)
    index = torch.tensor([[31, 0], [7, 7]], dtype=torch.int32)
    found = reference.dequantize_rows(weight.tensors, weight.spec, index, torch.bfloat16)
    assert found.dtype == torch.bfloat16 and found.shape == (2, 2, 33)
    assert torch.equal(found, weight.dequantize()[index.long()].to(torch.bfloat16))


@pytest.mark.parametrize("name", ["uint4", "int6", "int13", "float6_e3m2fn", "float8_e4m3fn"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_weights_are_done_in_parts(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(2)
    weight = weights.quantize(
        torch.randn(83, 96), name, group_size=24, svd_rank=3, hadamard_group_size=32
    )
    whole = reference.dequantize(weight.tensors, weight.spec, dtype)
    monkeypatch.setattr(reference, "_CHUNK_CPU", 96 * 20)
    parts = reference.dequantize(weight.tensors, weight.spec, dtype)
    assert_near(parts, whole, name, 2e-7 if dtype == torch.float32 else 0.004)
    codebook = weights.quantize(torch.randn(83, 96), "uint3", group_size=24, use_codebook=True)
    assert torch.equal(codebook.dequantize(), _in_one(codebook))


def _in_one(weight) -> torch.Tensor:
    spec = weight.spec
    return reference._dequantize_block(weight.tensors, spec, spec.rows, True, True)


def test_branch_and_rotation_can_be_left_out() -> None:
    torch.manual_seed(3)
    weight = weights.quantize(torch.randn(32, 64), "int4", svd_rank=4, hadamard_group_size=64)
    tensors, spec = weight.tensors, weight.spec
    residual = reference.dequantize(tensors, spec, branch=False, unrotate=False)
    branch = tensors["svd_up"] @ tensors["svd_down"]
    rotated = reference.dequantize(tensors, spec, unrotate=False)
    assert_near(rotated, residual + branch, "branch")
    assert_near(reference.dequantize(tensors, spec), reference.hadamard(rotated, 64, 4), "whole")
    unrotated = reference.dequantize(tensors, spec, branch=False)
    assert_near(unrotated, reference.hadamard(residual, 64, 4), "no branch")


def test_scales_of_any_float_dtype() -> None:
    torch.manual_seed(4)
    source = torch.randn(16, 64)
    for dtype in (torch.bfloat16, torch.float16):
        weight = weights.quantize(source, "uint4", group_size=16, scale_dtype=dtype)
        assert weight.tensors["scale"].dtype == weight.tensors["zero_point"].dtype == dtype
        wide = {k: v.float() if v.is_floating_point() else v for k, v in weight.tensors.items()}
        assert torch.equal(weight.dequantize(), reference.dequantize(wide, weight.spec))


def test_plain_floats_have_no_scale() -> None:
    source = torch.randn(8, 12).to(torch.bfloat16)
    spec = pack("kernels.spec").WeightSpec(dtypes.get_format("bfloat16"), (8, 12), (8, 12))
    assert torch.equal(reference.dequantize({"codes": source}, spec, torch.bfloat16), source)
    before = source.clone()
    wide = dataclasses.replace(spec, format=dtypes.get_format("float32"))
    stored = source.to(torch.float32)
    result = reference.dequantize({"codes": stored}, wide)
    result.zero_()  # the result never shares memory with what is stored
    assert torch.equal(stored, before.to(torch.float32))


def test_one_compiled_function_serves_every_format() -> None:
    """One graph each, although the specs of layers that share code differ in every number."""
    torch.manual_seed(5)
    graphs = []

    def count(module: torch.fx.GraphModule, example: list) -> object:
        graphs.append(module)
        return module

    def run(tensors: dict, spec: object) -> torch.Tensor:
        return reference.dequantize(tensors, spec)

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend=count)
    settings = [
        {"fmt": "uint4"},
        {"fmt": "int5", "svd_rank": 4},
        {"fmt": "int5", "svd_rank": 4},
        {"fmt": "float5_e3m1fn", "hadamard_group_size": 64},
        {"fmt": "float6_e2m3fn", "hadamard_group_size": 32},
        {"fmt": "uint2", "use_codebook": True, "group_size": 32},
        {"fmt": "int11"},
    ]
    for one in settings:
        weight = weights.quantize(torch.randn(64, 128), **one)
        found = compiled(weight.tensors, weight.spec)
        assert_near(found, weight.dequantize(), one, 2e-7)
    assert len(graphs) <= len(settings) - 1


def test_inference_mode_leaves_nothing_behind() -> None:
    """Constants that were first made in inference mode still serve a graph with gradients."""
    reference._constants.clear()
    torch.manual_seed(6)
    weight = weights.quantize(torch.randn(32, 64), "float4_e2m1fn", hadamard_group_size=64)
    with torch.inference_mode():
        reference.dequantize(weight.tensors, weight.spec)
    x = torch.randn(2, 64, requires_grad=True)
    reference.linear_dequantize(
        reference.hadamard(x, 64, 4), weight.tensors, weight.spec
    ).sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0
