"""The reference on a CUDA device gives what it gives on the CPU."""

from __future__ import annotations

import pytest
import torch
from support import pack
from units import assert_near, normal_form, units

reference = pack("kernels.reference")
weights = pack("quant.weight")

pytestmark = pytest.mark.gpu


def on_gpu(weight) -> dict[str, torch.Tensor]:
    return {name: tensor.cuda() for name, tensor in weight.tensors.items()}


def test_dequantization() -> None:
    for case in units("layers"):
        weight = normal_form(case)
        found = reference.dequantize(on_gpu(weight), weight.spec)
        assert found.device.type == "cuda"
        assert_near(found.cpu(), case.tensors["dequantized"], case.name)


def test_products() -> None:
    linear = {
        "int8": reference.linear_int8,
        "uint8": reference.linear_uint8,
        "fp8": reference.linear_fp8,
        "fp16": reference.linear_fp16,
    }
    for case in units("matmul"):
        weight = normal_form(case)
        bias = case.tensors.get("bias")
        found = linear[case.facts["matmul"]](
            case.tensors["x"].cuda(),
            on_gpu(weight),
            weight.spec,
            None if bias is None else bias.cuda(),
        )
        limit = 2e-6 if case.facts["exact"] else 4e-3
        assert_near(found.cpu(), case.tensors["y"], case.name, limit)


def test_rounding_anew() -> None:
    for case in units("layers"):
        weight = normal_form(case)
        original = case.tensors["original"]
        again = weights.requantize_like(original.cuda(), weight.spec, weight.tensors)
        assert all(tensor.device.type == "cuda" for tensor in again.values())
        ours = (reference.dequantize(again, weight.spec).cpu() - original).norm()
        theirs = (weight.dequantize() - original).norm()
        assert ours <= theirs * 1.01 + 1e-6, case.name
