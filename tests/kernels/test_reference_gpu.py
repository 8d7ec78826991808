"""The reference on a CUDA device gives what it gives on the CPU."""

from __future__ import annotations

import pytest
import torch
from support import pack
from units import assert_near, normal_form, units
from w4a4 import activations, layer, relative
from w4a4 import normal_form as of_numbers

faithful = pack("kernels.faithful")
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


@pytest.mark.parametrize("kind", ["int4", "uint4", "nvfp4"])
def test_faithful_products(kind: str) -> None:
    for seed, dtype in enumerate((torch.float32, torch.bfloat16, torch.float16)):
        made = layer(kind, 128, 384, rank=16, seed=seed)
        weight = of_numbers(made)
        x = activations(made, 3, 41, seed=seed, dtype=dtype)
        found = faithful.linear_faithful(x.cuda(), on_gpu(weight), weight.spec, made.bias.cuda())
        expected = faithful.linear_faithful(x, weight.tensors, weight.spec, made.bias)
        assert relative(found.cpu(), expected) < 1e-3
        again = weights.requantize_like(weight.dequantize().cuda(), weight.spec, weight.tensors)
        assert relative(reference.dequantize(again, weight.spec).cpu(), weight.dequantize()) < 0.1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["int4", "uint4", "nvfp4", "weight-only"])
def test_every_kernel_that_runs_here(kind: str, dtype: torch.dtype) -> None:
    """Those that do not run say why; those that do agree with the reference."""
    registry = pack("kernels.registry").registry
    call_of = pack("loaders.layouts.dispatch").call_of
    device = torch.device("cuda", torch.cuda.current_device())
    for seed, (rows, columns, count) in enumerate(((128, 128, 1), (384, 256, 60), (256, 640, 300))):
        made = layer(
            "int4" if kind == "weight-only" else kind, rows, columns, seed=seed, half=dtype
        )
        weight = of_numbers(made)
        operation = "linear_faithful"
        if kind == "weight-only":
            operation = "linear_weight_only"
            weight = weights.quantize(made.dense.float(), "uint4", group_size=64, scale_dtype=dtype)
        x = activations(made, count, seed=seed, dtype=dtype).cuda()
        tensors, bias = on_gpu(weight), made.bias.to(dtype).cuda()
        (expected,) = (
            row.function()(x, tensors, weight.spec, bias)
            for row in registry.implementations(operation)
            if row.backend == "reference"
        )
        for row in registry.implementations(operation):
            reason = row.why_not(call_of(weight.spec, device, dtype))
            if reason is None:
                found = row.function()(x, tensors, weight.spec, bias)
                # Nearly a tie may round either way; nunchaku rounds unsigned layers with a sign.
                limit = 0.15 if (kind, row.backend) == ("uint4", "nunchaku") else 0.04
                assert relative(found, expected) < limit, row.backend
            else:
                assert row.backend != "reference" and len(reason) > 20
