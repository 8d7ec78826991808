"""The whole path in a real server: workflows queued through the HTTP API, to the saved files."""

from __future__ import annotations

import os
import re
import shutil
import time

import pytest
import torch
from live import CASE, checkpoints, image_of, latent_of
from safetensors.torch import load_file, save_file
from workbench import FailedError, RefusedError, flux_prompt, node

LOADER = "LowBitLoadDiffusionModel"


def ours(model="tiny", **inputs):
    return node(LOADER, **{"model": model, "scheme": "auto", "matmul": "auto", **inputs})


def exact():
    return node("UNETLoader", unet_name="exact.safetensors", weight_dtype="default")


def away(got, want):
    return float((got - want).norm() / want.norm())


@pytest.fixture(scope="module")
def reference(server):
    """The same workflow with the package's own dequantized weights, by ComfyUI's own loader."""
    return server.run(flux_prompt(exact(), prefix="exact"))


@pytest.fixture(scope="module")
def plain(server):
    """The workflow through our loader."""
    return server.run(flux_prompt(ours(matmul="dequantize"), prefix="plain"))


@pytest.mark.both_hosts
def test_queued_workflow_to_saved_image(server, reference):
    begin = len(server.log())
    prompt = flux_prompt(ours(), prefix="quantized")
    done = server.run(prompt)

    picture, wanted = image_of(done), image_of(reference)
    assert picture.shape == (128, 128, 3)
    assert picture.float().std() > 10  # no flat field
    assert (picture - wanted).abs().max() <= 1
    assert away(latent_of(done), latent_of(reference)) < 1e-4

    again = server.run(prompt)
    assert set(prompt) == again.cached

    prompt["model"]["inputs"]["matmul"] = "int8"
    other = server.run(prompt)
    assert {"model", "sampler", "decode", "save"}.isdisjoint(other.cached)
    # int8 activations are a rounding of their own: another picture, but nearly the same
    assert 1e-4 < away(latent_of(other), latent_of(reference)) < 0.1
    assert "Traceback" not in server.log()[begin:]


def test_defaults_alone_are_enough(server, plain):
    prompt = flux_prompt(ours(), prefix="defaults")
    assert set(prompt["model"]["inputs"]) == {"model", "scheme", "matmul"}
    assert away(latent_of(server.run(prompt)), latent_of(plain)) == 0


def test_nodes_as_the_page_sees_them(server):
    info = server.get("/object_info")
    for name in (LOADER, "LowBitInspect"):
        about = info[name]
        assert about["category"].startswith("LowBit/") and about["description"]
        for group, inputs in about["input"].items():
            for key, value in inputs.items():
                assert group == "hidden" or value[1].get("tooltip"), f"{name}.{key} has no tooltip"
        order = [key for group in about["input_order"].values() for key in group]
        assert order[0] == "model"
        listed = about["input"]["required"]["model"][1]["options"]
        assert {
            "exact.safetensors",
            "tiny",
            "pipeline/transformer",
            "pipeline/transformer_2",
            "far/away",
        } <= set(listed)
        assert len(set(listed)) == len(listed)
        assert not any(".." in item for item in listed)
    # saved workflows hold widget values by their place
    inputs = info[LOADER]["input_order"]
    assert [*inputs["required"], *inputs["optional"]] == [
        "model", "scheme", "matmul", "compute_dtype", "dequantize_fp32", "backend",
        "svdq_precision", "svdq_rank", "act_unsigned", "nvfp4_layout",
    ]  # fmt: skip


@pytest.mark.parametrize("model", ["pipeline/transformer_2", "far/away"])
def test_folders_load_from_where_they_are_listed(server, plain, model):
    done = server.run(flux_prompt(ours(model, matmul="dequantize"), prefix="folder"))
    assert "model" not in done.cached
    assert away(latent_of(done), latent_of(plain)) == 0


@pytest.mark.parametrize("name", ["../../server.log", "../diffusers/tiny", "/etc/hostname"])
def test_names_outside_the_model_folders_are_refused(server, name):
    for prompt in (
        flux_prompt(ours(name), prefix="outside"),
        {"inspect": node("LowBitInspect", model=name)},
    ):
        with pytest.raises(RefusedError) as refused:
            server.queue(prompt)
        assert "value_not_in_list" in {kind for _, kind, _ in refused.value.errors}


def broken_scale(folder):
    """A NaN in one layer's scale; what the error must name."""
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    layer = "single_transformer_blocks.1.proj_mlp"
    tensors[f"{layer}.scale"] = tensors[f"{layer}.scale"].clone()
    tensors[f"{layer}.scale"].view(-1)[3] = float("nan")
    save_file(tensors, file)
    return layer


def missing_scale(folder):
    """One layer has lost its scale."""
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    layer = "transformer_blocks.0.attn.to_q"
    del tensors[f"{layer}.scale"]
    save_file(tensors, file)
    return layer


def cut_short(folder):
    """The file lost its last bytes."""
    (file,) = folder.glob("*.safetensors")
    data = file.read_bytes()
    file.write_bytes(data[: len(data) - 1000])
    return file.name


@pytest.mark.parametrize("spoil", [broken_scale, missing_scale, cut_short])
def test_broken_checkpoint_is_one_clear_error_and_the_server_goes_on(server, plain, spoil):
    name = f"broken-{spoil.__name__}"
    folder = server.base / "models" / "diffusers" / name
    shutil.copytree(checkpoints() / CASE, folder)
    layer = spoil(folder)
    with pytest.raises(FailedError) as failed:
        server.run(flux_prompt(ours(name), prefix="broken"))
    assert failed.value.event == "execution_error"
    assert failed.value.node == LOADER
    message = failed.value.message
    assert name in message and layer in message, message
    assert message.count("\n") < 12, message  # told, not dumped
    shutil.rmtree(folder)

    good = server.run(flux_prompt(ours(), prefix="after"))
    assert away(latent_of(good), latent_of(plain)) == 0


def test_replaced_file_is_loaded_again(server):
    prompt = {"model": ours("pipeline/transformer"), "end": node("PreviewAny", source=["model", 0])}
    server.run(prompt)
    assert "model" in server.run(prompt).cached
    (file,) = (server.base / "models/diffusers/pipeline/transformer").glob("*.safetensors")
    os.utime(file, (1, 1))
    assert "model" not in server.run(prompt).cached


def many_blocks(server, count):
    """A checkpoint that takes its time to load: the tiny one's blocks, again and again."""
    folder = server.base / "models" / "diffusers" / "long"
    shutil.copytree(checkpoints() / CASE, folder)
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    block = re.compile(r"(?:single_)?transformer_blocks\.0\.")
    for key in [key for key in tensors if block.match(key)]:
        for number in range(4, count):
            tensors[key.replace(".0.", f".{number}.", 1)] = tensors[key].clone()
        for number in (2, 3):
            tensors.setdefault(key.replace(".0.", f".{number}.", 1), tensors[key].clone())
    save_file(tensors, file)


def test_interrupt_while_loading(server, plain):
    many_blocks(server, 40)
    # expand decodes and rounds every layer, which is the slow way to load
    prompt = {
        "model": ours("long", matmul="expand"),
        "end": node("PreviewAny", source=["model", 0]),
    }
    prompt_id = server.queue(prompt)
    while not any(item[1] == prompt_id for item in server.get("/queue")["queue_running"]):
        time.sleep(0.02)
    time.sleep(0.5)
    server.post("/interrupt", {})
    with pytest.raises(FailedError) as failed:
        server.wait(prompt_id)
    assert failed.value.event == "execution_interrupted"
    assert failed.value.node == LOADER  # in the midst of it: after it, the next node would be told
    shutil.rmtree(server.base / "models" / "diffusers" / "long")

    good = server.run(flux_prompt(ours(matmul="dequantize"), prefix="after", seed=8))
    assert away(latent_of(good), latent_of(plain)) > 0.1  # another seed: it did run


def test_lora_by_the_stock_node(server, plain):
    torch.manual_seed(5)
    layers = {
        "double_blocks.0.img_attn.qkv": (768, 256),
        "double_blocks.1.txt_mlp.0": (1024, 256),
        "single_blocks.0.linear1": (1792, 256),
        "single_blocks.1.linear2": (256, 1280),
    }
    lora = {}
    for name, (rows, columns) in layers.items():
        lora[f"diffusion_model.{name}.lora_A.weight"] = torch.randn(4, columns) * columns**-0.5
        lora[f"diffusion_model.{name}.lora_B.weight"] = torch.randn(rows, 4) * 0.3
    save_file(lora, server.base / "models" / "loras" / "strong.safetensors")

    begin = len(server.log())
    wanted = latent_of(server.run(flux_prompt(exact(), prefix="lora", lora="strong.safetensors")))
    loader = ours(matmul="dequantize")
    got = latent_of(server.run(flux_prompt(loader, prefix="lora", lora="strong.safetensors")))
    effect = away(wanted, latent_of(plain))
    assert effect > 0.1
    assert away(got, wanted) < 0.5 * effect  # merged into 4-bit weights, which rounds anew
    said = server.log()[begin:]
    assert "lora key not loaded" not in said and "Traceback" not in said

    # and the MODEL without it is what it was
    back = server.run(flux_prompt(loader, prefix="lora-off", seed=7, text="a lighthouse"))
    want = server.run(flux_prompt(exact(), prefix="lora-off", seed=7, text="a lighthouse"))
    assert away(latent_of(back), latent_of(want)) < 1e-4


def test_saved_by_the_stock_node_and_loaded_again(server, plain):
    saving = {
        "model": ours(matmul="dequantize"),
        "save": node("ModelSave", model=["model", 0], filename_prefix="saved"),
    }
    server.run(saving)
    (file,) = (server.base / "output").glob("saved_*.safetensors")
    # nearly as small as it was: the quantized weights themselves are saved; the rest, bf16 in the
    # checkpoint, is held in float32 by a CPU
    before = sum(part.stat().st_size for part in (checkpoints() / CASE).glob("*.safetensors"))
    assert file.stat().st_size < 1.4 * before
    file.rename(server.base / "models" / "diffusion_models" / "saved.safetensors")
    done = server.run(flux_prompt(ours("saved.safetensors", matmul="dequantize"), prefix="saved"))
    assert away(latent_of(done), latent_of(plain)) < 1e-5


def test_inspect_tells_what_the_file_is(server):
    done = server.run({"inspect": node("LowBitInspect", model="tiny", matmul="auto")})
    text = done.text("inspect")
    assert "scheme: sdnq" in text and "family: FLUX.1" in text
    assert re.search(r"51 layers: uint4: dequantized", text)
