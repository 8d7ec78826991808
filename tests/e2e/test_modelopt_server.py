"""ModelOpt checkpoints through a real server: queued over HTTP, to the saved image."""

from __future__ import annotations

import json
import re

import pytest
import torch
from live import image_of, latent_of
from safetensors.torch import load_file, save_file
from test_server import away, ours
from workbench import FailedError, flux_prompt, node

BLOCKS = re.compile(r"(?:single_)?transformer_blocks\..+\.weight")
LEVELS = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
CASES = {"fp8": {}, "nvfp4": {"nvfp4_layout": "low_rows"}}
EVERY_CASE = pytest.mark.parametrize("case", CASES)


def quantize(weight, case):
    """``({suffix: tensor}, what they mean)`` as ModelOpt scales and orders them."""
    if case == "fp8":
        scale = weight.abs().max() / 448
        codes = (weight / scale).to(torch.float8_e4m3fn)
        more = {"weight_scale": scale, "input_scale": torch.tensor(0.05)}
        return {"weight": codes, **more}, codes.float() * scale
    groups = weight.view(len(weight), -1, 16)
    second = weight.abs().max() / (6 * 448)
    scale = groups.abs().amax(-1).div(6 * second).clamp(2**-9, 448).to(torch.float8_e4m3fn)
    wide = scale.float()[..., None] * second
    codes = (groups.abs() / wide).unsqueeze(-1).sub(LEVELS).abs().argmin(-1)
    meant = (LEVELS[codes] * wide).copysign(groups).view(weight.shape)
    codes = (codes + 8 * groups.signbit()).view(weight.shape).to(torch.uint8)
    words = codes[:, 0::2] | (codes[:, 1::2] << 4)
    return {"weight": words, "weight_scale": scale, "weight_scale_2": second}, meant


@pytest.fixture(scope="module")
def made(server):
    """Checkpoints ``modelopt-CASE`` and, in float32, ``meant-modelopt-CASE``."""
    folder = server.base / "models" / "diffusion_models"
    exact = load_file(folder / "exact.safetensors")
    files = []
    for case in CASES:
        stored, meant = {}, {}
        for key, value in exact.items():
            tensors = {"weight": value}
            if value.ndim == 2 and BLOCKS.fullmatch(key):
                tensors, value = quantize(value.float(), case)
            meant[key] = value.contiguous()
            layer = key.removesuffix(".weight")
            for name, tensor in tensors.items():
                part = key if len(tensors) == 1 else f"{layer}.{name}"
                stored[part] = tensor.contiguous()
        config = {"quant_method": "modelopt", "quant_algo": case.upper()}
        metadata = {"quantization_config": json.dumps(config)}
        files += [folder / f"modelopt-{case}.safetensors", folder / f"meant-{case}.safetensors"]
        save_file(stored, files[-2], metadata=metadata)
        save_file(meant, files[-1])
    yield files
    for file in files:
        file.unlink()


def loader(case: str, **inputs) -> dict:
    return ours(f"modelopt-{case}.safetensors", **CASES[case], **inputs)


@EVERY_CASE
def test_queued_workflow_to_saved_image(server, made, case):
    begin = len(server.log())
    meant = node("UNETLoader", unet_name=f"meant-{case}.safetensors", weight_dtype="default")
    wanted = server.run(flux_prompt(meant, prefix=f"meant-modelopt-{case}"))
    done = server.run(flux_prompt(loader(case, matmul="dequantize"), prefix=f"modelopt-{case}"))
    picture = image_of(done)
    assert picture.shape == (128, 128, 3) and picture.float().std() > 10  # no flat field
    assert (picture - image_of(wanted)).abs().max() <= 1
    assert away(latent_of(done), latent_of(wanted)) < 1e-4
    if case == "fp8":  # activations rounded: another picture, but nearly the same
        rounded = server.run(flux_prompt(loader(case, matmul="faithful"), prefix="modelopt-own"))
        assert 1e-3 < away(latent_of(rounded), latent_of(wanted)) < 0.5
    else:  # another order of the bytes is another model
        inputs = {"matmul": "dequantize", "nvfp4_layout": "high_rows"}
        noise = server.run(
            flux_prompt(ours(f"modelopt-{case}.safetensors", **inputs), prefix="modelopt-noise")
        )
        assert away(latent_of(noise), latent_of(wanted)) > 0.1
    assert "Traceback" not in server.log()[begin:]


def test_bytes_of_unknown_order_are_one_clear_error(server, made):
    with pytest.raises(FailedError) as failed:
        server.run(flux_prompt(ours("modelopt-nvfp4.safetensors"), prefix="modelopt-refused"))
    assert failed.value.node == "LowBitLoadDiffusionModel"
    assert "nvfp4_layout" in failed.value.message and "modelopt-nvfp4" in failed.value.message


@EVERY_CASE
def test_inspect_tells_what_the_file_is(server, made, case):
    inputs = {"model": f"modelopt-{case}.safetensors", "matmul": "auto", **CASES[case]}
    text = server.run({"inspect": node("LowBitInspect", **inputs)}).text("inspect")
    assert "scheme: modelopt" in text and case.upper() in text
    assert ("nvfp4 layout: even columns in the low half" in text) == (case == "nvfp4")
