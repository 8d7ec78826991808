"""What Inspect tells of a checkpoint."""

from __future__ import annotations

import json

import torch
from safetensors.torch import save_file
from support import pack

GIB = 2**30


def plan_of(folder, config):
    folder.mkdir()
    save_file(
        {
            "a.weight": torch.randint(-127, 128, (64, 128), dtype=torch.int8),
            "a.scale": torch.rand(64, 1) + 0.5,
            "b.weight": torch.randn(64),
        },
        folder / "diffusion_pytorch_model.safetensors",
    )
    if config is not None:
        (folder / "config.json").write_text(json.dumps({"quantization_config": config}))
    return pack("loaders.plan").make_plan(folder)


def facts(device="cpu", memory=GIB, host_memory=4 * GIB):
    return pack("loaders.report").DeviceFacts(
        device=torch.device(device),
        name=f"test {device}",
        memory=memory,
        free=memory // 2,
        host_memory=host_memory,
        reserve=0,
    )


SDNQ = {"quant_method": "sdnq", "weights_dtype": "int8", "sdnq_version": "0.2.8"}


def test_sizes_formats_and_kernels_are_told(tmp_path):
    inspect = pack("loaders.report").inspect
    report = inspect(plan_of(tmp_path / "m", SDNQ), facts(), "int8")
    assert report.scheme == "sdnq" and report.verdict == "fits"
    assert report.formats == {"int8": (1, 64 * 128, 64 * 128 + 64 * 4), "F32": (1, 64, 256)}
    assert report.float_bytes == (64 * 128 + 64) * 2
    (line,) = report.kernels
    sums = pack("kernels.registry").registry.backend_status("cpu")["torch"] is None
    by = "by torch" if sums else "emulated in eager torch"
    assert f"int8 matmul, {by}" in line and "needs a cuda device" in line
    assert line in report.text and "assumed" not in report.text


def test_fits_streams_or_is_too_big(tmp_path):
    inspect, plan = pack("loaders.report").inspect, plan_of(tmp_path / "m", SDNQ)
    assert inspect(plan, facts(host_memory=100)).verdict == "too big"
    assert inspect(plan, facts("xpu")).verdict == "fits"
    # Room for the larger layer and its float copy, not for both layers.
    small = 64 * 128 + 64 * 4 + 64 * 128 * 2 + 100
    assert inspect(plan, facts("xpu", memory=small)).verdict == "streams"
    assert inspect(plan, facts("xpu", memory=small, host_memory=100)).verdict == "too big"
    assert inspect(plan, facts("xpu", memory=small - 200)).verdict == "too big"


def test_what_was_assumed_is_said(tmp_path):
    report = pack("loaders.report").inspect(plan_of(tmp_path / "m", None), facts())
    assert "assumed for 1 layers:" in report.text


def test_what_a_device_can_run_is_told_by_operation(tmp_path, monkeypatch):
    kernels, dispatch = pack("kernels.registry"), pack("loaders.layouts.dispatch")
    lines = pack("loaders.kernel_lines").device_lines
    operations = kernels.registry.operations()
    here = lines(torch.device("cpu"), torch.bfloat16)
    assert [line.split(":")[0] for line in here[: len(operations)]] == list(operations)
    assert "dequantize: reference (not triton: needs a cuda or xpu device, this is cpu)" in here
    text = pack("loaders.report").inspect(plan_of(tmp_path / "m", SDNQ), facts()).text
    assert all(f"  {line}\n" in text for line in here)
    # An old card: what is faster on others is told with the reason.
    monkeypatch.setattr(dispatch, "capability_of", lambda _: (7, 5))
    monkeypatch.setattr(dispatch, "architecture_of", lambda _: "sm_75")
    old = {line.split(":")[0]: line for line in lines(torch.device("cuda"), torch.bfloat16)}
    assert "not triton: needs compute capability 8.0" in old["linear_int8"]
    assert "not triton: needs compute capability 8.9" in old["linear_fp8"]
    assert old["linear_weight_only"].startswith("linear_weight_only: triton")
    # What was compiled and tried, and what failed.
    monkeypatch.setattr(kernels.registry, "_trials", {})
    monkeypatch.setattr(kernels.registry, "_troubles", {})
    row = next(r for r in kernels.registry.implementations("dequantize") if r.backend == "triton")
    for number in range(3):
        kernels.registry._trials[row, ("cuda", "sm_75"), number] = 0.5
    kernels.registry._troubles[row, ("cuda", "sm_75"), "uint3"] = "is wrong"
    found = lines(torch.device("cuda"), torch.bfloat16)
    assert found[-1] == "kernels compiled and tried in 1.5 s: dequantize by triton 1.5 s"
    assert "dequantize: triton" in found
    assert found[-2] == "dequantize by triton is not used for uint3 weights: is wrong"
