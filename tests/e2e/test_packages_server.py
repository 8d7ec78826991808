"""Checkpoints of ModelOpt, ModelSlim, bitsandbytes, torchao and quanto through a real server."""

from __future__ import annotations

import re
import shutil

import modelslim_models
import pytest
import torch
from live import image_of, latent_of
from safetensors.torch import load_file, save_file
from support import oracle
from test_server import away, ours
from workbench import flux_prompt, node

SCRIPTS = {
    "modelopt_files.py": ("fp8", "nvfp4", "w8a8_sq"),
    "others_files.py": ("bnb_nf4_double", "torchao_int8", "quanto_int4"),
}
SCHEMES = {"bnb": "bitsandbytes", "torchao": "torchao", "quanto": "quanto", "slim": "modelslim"}
SLIM = {"slim_w8a8_dynamic": "W8A8_DYNAMIC", "slim_w4a4_mxfp4": "W4A4_MXFP4"}
CASES = [*(case for cases in SCRIPTS.values() for case in cases), *SLIM]
EVERY_CASE = pytest.mark.parametrize("case", CASES)
BLOCKS = re.compile(r"((?:single_)?transformer_blocks\..+)\.weight")


def plain(checkpoint, golden):
    """What the file means, under diffusers' names: its weights as the package dequantizes them."""
    tensors = {}
    for file in sorted(checkpoint.glob("*.safetensors")):
        tensors.update(load_file(file))
    meant = {}
    for name, weight in load_file(golden).items():
        if name.endswith(".weight"):
            meant.setdefault(name, weight)
        elif name.endswith(".meaning"):  # smoothed
            meant[f"{name.removesuffix('.meaning')}.weight"] = weight
    layers = {name.removesuffix(".weight") for name in meant}
    for name, tensor in tensors.items():
        layer, _, what = name.rpartition(".")
        if (layer not in layers or what == "bias") and tensor.is_floating_point():
            meant[name] = tensor.float()
    return meant


def slim(folder, floats, type_):
    """A folder as ModelSlim writes it, of FLUX's layers; what it means."""
    stored, meant = {}, dict(floats)
    for name, value in floats.items():
        block = BLOCKS.fullmatch(name)
        if block is None or value.ndim != 2:
            stored.setdefault(name, (value, "FLOAT"))
            continue
        bias = floats.get(f"{block[1]}.bias")
        layer = modelslim_models.make_layer(
            type_, value.numpy(), None if bias is None else bias.numpy(), seed=len(stored)
        )
        stored |= modelslim_models.stored(block[1], layer)
        meant[name] = torch.from_numpy(layer.weight()).float()
    modelslim_models.write(folder, stored)
    return meant


@pytest.fixture(scope="module")
def made(server):
    """Folders ``CASE`` and, in float32, files ``plain-CASE``."""
    folder = server.base / "models"
    meant = {}
    for script, cases in SCRIPTS.items():
        files = oracle(script, "flux_server", *cases)
        for case in cases:
            shutil.copytree(files / case, folder / "diffusers" / case)
            meant[case] = plain(files / case, files / f"{case}.golden.safetensors")
    for case, type_ in SLIM.items():
        meant[case] = slim(folder / "diffusers" / case, meant["fp8"], type_)
    for case in CASES:
        save_file(meant[case], folder / "diffusion_models" / f"plain-{case}.safetensors")
    yield
    for case in CASES:
        shutil.rmtree(folder / "diffusers" / case)
        (folder / "diffusion_models" / f"plain-{case}.safetensors").unlink()


@EVERY_CASE
def test_queued_workflow_to_saved_image(server, made, case):
    begin = len(server.log())
    stock = node("UNETLoader", unet_name=f"plain-{case}.safetensors", weight_dtype="default")
    wanted = server.run(flux_prompt(stock, prefix=f"plain-{case}"))
    done = server.run(flux_prompt(ours(case, matmul="dequantize"), prefix=f"low-{case}"))
    assert image_of(done).float().std() > 10  # no flat field
    assert away(latent_of(done), latent_of(wanted)) < 1e-4
    assert (image_of(done) - image_of(wanted)).abs().max() <= 1
    automatic = server.run(flux_prompt(ours(case), prefix=f"auto-{case}"))
    if not torch.accelerator.is_available():
        # Nothing there is faster than dequantizing but int8, on processors that sum it exactly.
        known = [done]
        if case == "w8a8_sq":
            known.append(server.run(flux_prompt(ours(case, matmul="int8"), prefix=f"int8-{case}")))
        assert min(away(latent_of(automatic), latent_of(one)) for one in known) == 0
    assert "Traceback" not in server.log()[begin:]


@EVERY_CASE
def test_inspect_tells_whose_it_is(server, made, case):
    text = server.run({"inspect": node("LowBitInspect", model=case, matmul="auto")}).text("inspect")
    scheme = SCHEMES.get(case.partition("_")[0], "modelopt")
    assert f"scheme: {scheme}" in text and "family: FLUX.1" in text
