"""SVDQuant checkpoints through a real server: queued over HTTP, to the saved image."""

from __future__ import annotations

import shutil

import pytest
import svdq_models
import torch
from live import image_of, latent_of
from safetensors.torch import save_file
from test_server import away, ours
from workbench import FailedError, flux_prompt, node

CASES = ("int4", "nvfp4")
EVERY_CASE = pytest.mark.parametrize("case", CASES)


@pytest.fixture(scope="module")
def made(server):
    """Checkpoints ``svdq-CASE_r32-tiny`` and, in float32, ``meant-CASE`` in the model folder."""
    folder = server.base / "models" / "diffusion_models"
    checkpoints = {}
    for case in CASES:
        path = folder / f"svdq-{name_of(case)}_r32-tiny.safetensors"
        checkpoints[case] = svdq_models.make("flux_server", path, precision=case)
        native = {key: value.contiguous() for key, value in checkpoints[case].native().items()}
        save_file(native, folder / f"meant-{case}.safetensors")
    yield checkpoints
    for case in CASES:
        checkpoints[case].path.unlink()
        (folder / f"meant-{case}.safetensors").unlink()


def name_of(case: str) -> str:
    return {"int4": "int4", "nvfp4": "fp4"}[case]


def loader(case: str, **inputs) -> dict:
    return ours(f"svdq-{name_of(case)}_r32-tiny.safetensors", **inputs)


def meant(case: str) -> dict:
    return node("UNETLoader", unet_name=f"meant-{case}.safetensors", weight_dtype="default")


@pytest.fixture(scope="module")
def reference(server, made):
    """The latent of the workflow over the weights that each file stands for, by ComfyUI alone."""
    return {case: server.run(flux_prompt(meant(case), prefix=f"meant-{case}")) for case in CASES}


@pytest.mark.both_hosts
@EVERY_CASE
def test_queued_workflow_to_saved_image(server, made, reference, case):
    begin = len(server.log())
    done = server.run(flux_prompt(loader(case, matmul="dequantize"), prefix=f"svdq-{case}"))
    picture, wanted = image_of(done), image_of(reference[case])
    assert picture.shape == (128, 128, 3)
    assert picture.float().std() > 10  # no flat field
    assert (picture - wanted).abs().max() <= 1
    exact = latent_of(reference[case])
    assert away(latent_of(done), exact) < 1e-4

    # 4-bit activations: another picture, but nearly the same
    rounded = server.run(flux_prompt(loader(case, matmul="faithful"), prefix=f"faithful-{case}"))
    assert {"model", "sampler", "decode", "save"}.isdisjoint(rounded.cached)
    assert 1e-3 < away(latent_of(rounded), exact) < 0.5

    automatic = server.run(flux_prompt(loader(case), prefix=f"auto-{case}"))
    if not torch.accelerator.is_available():  # nothing there is faster than dequantizing
        assert away(latent_of(automatic), latent_of(done)) == 0
    assert away(latent_of(automatic), exact) < 0.5
    assert "Traceback" not in server.log()[begin:]


@EVERY_CASE
def test_lora_by_the_stock_node(server, made, reference, case):
    torch.manual_seed(6)
    layers = {
        "double_blocks.0.img_attn.qkv": (768, 256),
        "double_blocks.1.txt_mlp.2": (256, 1024),
        "double_blocks.0.img_mod.lin": (1536, 256),
        "single_blocks.0.linear1": (1792, 256),
        "single_blocks.1.linear2": (256, 1280),
    }
    lora = {}
    for name, (rows, columns) in layers.items():
        lora[f"diffusion_model.{name}.lora_A.weight"] = torch.randn(4, columns) * columns**-0.5
        lora[f"diffusion_model.{name}.lora_B.weight"] = torch.randn(rows, 4) * 0.3
    save_file(lora, server.base / "models" / "loras" / "svdq.safetensors")

    begin = len(server.log())
    with_lora = {"prefix": f"svdq-lora-{case}", "lora": "svdq.safetensors"}
    wanted = latent_of(server.run(flux_prompt(meant(case), **with_lora)))
    got = latent_of(server.run(flux_prompt(loader(case, matmul="dequantize"), **with_lora)))
    effect = away(wanted, latent_of(reference[case]))
    assert effect > 0.1
    assert away(got, wanted) < 0.5 * effect  # merged into 4-bit weights, which rounds anew
    said = server.log()[begin:]
    assert "lora key not loaded" not in said and "Traceback" not in said


def test_saved_by_the_stock_node_and_loaded_again(server, made):
    given = loader("int4", matmul="faithful")
    wanted = latent_of(server.run(flux_prompt(given, prefix="svdq-kept")))
    save = node("ModelSave", model=["model", 0], filename_prefix="svdq-saved")
    server.run({"model": given, "save": save})
    (file,) = (server.base / "output").glob("svdq-saved_*.safetensors")
    target = server.base / "models" / "diffusion_models" / "svdq-saved.safetensors"
    shutil.move(file, target)
    again = ours("svdq-saved.safetensors", matmul="faithful")
    done = server.run(flux_prompt(again, prefix="svdq-again"))
    assert away(latent_of(done), wanted) < 1e-5
    target.unlink()


@EVERY_CASE
def test_inspect_tells_what_the_file_is(server, made, case):
    file = f"svdq-{name_of(case)}_r32-tiny.safetensors"
    text = server.run({"inspect": node("LowBitInspect", model=file, matmul="auto")}).text("inspect")
    assert "scheme: svdq" in text and "family: FLUX.1" in text
    assert {"int4": "int4", "nvfp4": "float4_e2m1fn"}[case] in text


def test_a_setting_that_no_layer_can_have_is_one_clear_error(server, made):
    prompt = flux_prompt(loader("nvfp4", act_unsigned="on"), prefix="svdq-refused")
    with pytest.raises(FailedError) as failed:
        server.run(prompt)
    assert failed.value.node == "LowBitLoadDiffusionModel"
    assert "nsigned" in failed.value.message and "svdq-fp4_r32-tiny" in failed.value.message
    assert failed.value.message.count("\n") < 12
