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
    assert "int8 matmul, emulated in eager torch" in line and "needs a cuda device" in line
    assert line in report.text and "assumed" not in report.text


def test_fits_streams_or_is_too_big(tmp_path):
    inspect, plan = pack("loaders.report").inspect, plan_of(tmp_path / "m", SDNQ)
    assert inspect(plan, facts(host_memory=100)).verdict == "too big"
    assert inspect(plan, facts("xpu")).verdict == "fits"
    assert inspect(plan, facts("xpu", memory=100)).verdict == "streams"
    assert inspect(plan, facts("xpu", memory=100, host_memory=100)).verdict == "too big"


def test_what_was_assumed_is_said(tmp_path):
    report = pack("loaders.report").inspect(plan_of(tmp_path / "m", None), facts())
    assert "assumed for 1 layers:" in report.text
