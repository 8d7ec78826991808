"""Reports in a real server: on a model that sampled with a LoRA, and on two models side by side."""

from __future__ import annotations

import json

import pytest
import torch
from live import image_of, latent_of
from PIL import Image
from safetensors.torch import save_file
from test_server import exact, ours
from workbench import FailedError, RefusedError, flux_prompt, node


@pytest.fixture(scope="module")
def lora(server):
    """A LoRA with one name that the model does not have."""
    torch.manual_seed(8)
    tensors = {}
    for name, rows in (("img_attn.qkv", 768), ("img_attn.query", 256)):
        key = f"diffusion_model.double_blocks.0.{name}"
        tensors[f"{key}.lora_A.weight"] = torch.randn(4, 256) / 16
        tensors[f"{key}.lora_B.weight"] = torch.randn(rows, 4) * 0.2
    save_file(tensors, server.base / "models" / "loras" / "told.safetensors")
    return "told.safetensors"


def reported(prompt: dict, **inputs: object) -> dict:
    """The prompt with a report on its model, shown as JSON, and its chart saved."""
    return prompt | {
        "report": node("LowBitModelReport", model=["lora", 0], **inputs),
        "show": node("LowBitShowReport", report=["report", 0], show="json", width=768),
        "chart": node("SaveImage", images=["report", 2], filename_prefix="chart"),
        "small": node("SaveImage", images=["show", 1], filename_prefix="small"),
    }


@pytest.mark.both_hosts
def test_a_report_on_the_model_of_a_run(server, lora):
    prompt = flux_prompt(ours(matmul="dequantize"), prefix="reported", lora=lora)
    done = server.run(reported(prompt, lora=lora, after=["sampler", 0]))
    text = done.text("report")
    assert "scheme: sdnq" in text and "family: FLUX.1" in text
    assert "3 passes, " in text and "s each" in text  # told after the sampler's three steps
    assert "1 weight: lora at strength 1, by side matmul" in text
    assert "LoRA file told.safetensors: 2 of 4 tensors name layers of it (on this MODEL" in text
    assert "double_blocks.*.img_attn.query (2); nearest: " in text
    told = json.loads(done.text("show"))
    assert told["patches"][0]["carried"] == "side matmul" and told["memory"]["passes"] == 3
    assert told["lora_file"]["strengths"] == [1.0]
    sizes = []
    for name in ("chart", "small"):
        (file,) = done.files(name)
        with Image.open(file) as image:
            sizes.append(image.width)
            assert image.height > 300 and len(image.convert("RGB").getcolors(1 << 20)) > 20
    assert sizes == [1024, 768]


def test_a_report_is_made_again_only_where_something_changed(server, lora):
    prompt = reported(flux_prompt(ours(matmul="dequantize"), prefix="again", lora=lora), lora=lora)
    server.run(prompt)
    assert {"report", "show"} <= server.run(prompt).cached
    file = server.base / "models" / "loras" / lora
    file.write_bytes(file.read_bytes())
    assert "report" not in server.run(prompt).cached


def test_a_lora_that_is_not_there_is_refused(server, lora):
    prompt = flux_prompt(ours(), prefix="absent", lora=lora)
    for output in ("save", "latent"):  # ComfyUI would run these without the report
        del prompt[output]
    prompt = reported(prompt, lora="nowhere.safetensors")
    with pytest.raises(RefusedError) as refused:
        server.run(prompt)
    assert ("report", "value_not_in_list") in {error[:2] for error in refused.value.errors}


def test_a_file_that_is_no_lora_is_one_clear_error(server, lora):
    broken = server.base / "models" / "loras" / "broken.safetensors"
    broken.write_text("<html>not found</html>")
    prompt = reported(flux_prompt(ours(), prefix="broken", lora=lora), lora=broken.name)
    with pytest.raises(FailedError) as failed:
        server.run(prompt)
    assert failed.value.node == "LowBitModelReport" and broken.name in failed.value.message
    broken.unlink()


@pytest.mark.both_hosts
def test_two_models_compared(server):
    """Ours and the float model of the same weights are near; another matmul is further off."""
    prompt = flux_prompt(ours(matmul="dequantize"), prefix="pair")
    same = {key: prompt["sampler"]["inputs"][key] for key in ("positive", "negative", "seed")}
    prompt |= {
        "exact": exact(),
        "rounded": ours(matmul="int8"),
        "compare": node(
            "LowBitCompare",
            model_a=["exact", 0],
            model_b=["model", 0],
            latent_image=["empty", 0],
            steps=3,
            cfg=1.0,
            sampler_name="euler",
            scheduler="simple",
            vae=["vae", 0],
            **same,
        ),
        "picture": node("SaveImage", images=["compare", 1], filename_prefix="compared"),
        "told": node("LowBitShowReport", report=["compare", 0], show="json"),
    }
    prompt["further"] = node(
        "LowBitCompare", **(prompt["compare"]["inputs"] | {"model_b": ["rounded", 0]})
    )
    prompt["further_told"] = node("LowBitShowReport", report=["further", 0], show="json")
    done = server.run(prompt)
    near, far = (json.loads(done.text(name)) for name in ("told", "further_told"))
    assert near["difference"] < 1e-4 < far["difference"] < 0.5
    assert near["a"]["bytes"] > 1.5 * near["b"]["bytes"]
    # the first of the three pictures is the one that the sampler of the prompt saved
    assert latent_of(done).isfinite().all()
    (file,) = done.files("picture")
    with Image.open(file) as image:
        assert image.size == (3 * 128, 128)
        left = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8)
    left = left.view(128, 384, 3).int()
    assert (left[:, 128:256] - image_of(done)).abs().max() <= 1
    assert left[:, 256:].max() <= 16  # hardly any difference, even eight times as large
