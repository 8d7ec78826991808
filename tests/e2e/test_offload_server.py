"""Set Offload Mode in a real server: every mode gives the same bits, before and after running out
of memory."""

from __future__ import annotations

import re

import pytest
import torch
from live import image_of, latent_of, server_in
from test_server import ours
from workbench import FailedError, RefusedError, flux_prompt, node

MODES = {
    "auto": (0.0, 0),
    "resident": (0.0, 0),
    "model": (0.0, 0),
    "layerwise": (0.0, 1),
    "sequential": (0.0, 0),
}

# A custom node of the test: memory runs out within a layer, in the second pass, once.
RUNS_OUT = """
import torch

class RunsOut:
    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "go", "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",)}}

    def go(self, model):
        passes = []

        def fail(*_):
            passes.append(1)
            if len(passes) == 2:
                hook.remove()
                raise torch.OutOfMemoryError("no memory left")

        layer = model.model.diffusion_model.single_blocks[1].linear1
        hook = layer.register_forward_pre_hook(fail)
        return (model,)

NODE_CLASS_MAPPINGS = {"RunsOut": RunsOut}
"""


#: ComfyUI runs what an output needs
AN_END = {"end": node("PreviewAny", source=["offload", 0])}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    base = tmp_path_factory.mktemp("offload")
    server = server_in(base, ["--disable-smart-memory"])
    (base / "custom_nodes" / "runs_out.py").write_text(RUNS_OUT, encoding="utf-8")
    with server:
        yield server


@pytest.fixture(scope="module")
def wanted(server):
    """The latent without the node."""
    return latent_of(server.run(flux_prompt(ours(), prefix="as-it-is")))


def with_mode(mode, prefix, **inputs):
    budget, blocks = MODES[mode]
    prompt = flux_prompt(ours(), prefix=prefix)
    given = {"vram_budget_gb": budget, "blocks_on_gpu": blocks, **inputs}
    prompt["offload"] = node("LowBitOffload", model=["model", 0], mode=mode, **given)
    prompt["sampler"]["inputs"]["model"] = ["offload", 0]
    return prompt


@pytest.mark.both_hosts
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_gives_the_same_bits(server, wanted, mode):
    begin = len(server.log())
    done = server.run(with_mode(mode, mode))
    assert "model" in done.cached, "the checkpoint was read again"
    assert torch.equal(latent_of(done), wanted)
    assert image_of(done).float().std() > 10
    told = done.text("offload")
    assert told.startswith(f"mode: {mode}\n")
    assert all(f"\n  {other} " in told for other in MODES), told
    assert ("--disable-smart-memory: wins" in told) == (mode == "resident")
    log = server.log()[begin:]
    assert "Traceback" not in log
    if not torch.accelerator.is_available():
        assert ("Unloaded partially" in log) == (mode in ("layerwise", "sequential")), log
    # The same mode, asked again: the node tells what the run took.
    again = with_mode(mode, mode, vram_budget_gb=1.0)
    told = server.run({name: again[name] for name in ("model", "offload")} | AN_END).text("offload")
    assert f"measured on {told.split('memory of ')[1].split(':')[0]}" in told
    assert f", mode {mode}: " in told and "3 passes, " in told


@pytest.mark.both_hosts
@pytest.mark.parametrize("mode", MODES)
def test_out_of_memory_leaves_a_usable_server(server, wanted, mode):
    prompt = with_mode(mode, f"out-{mode}", vram_budget_gb=0.001)
    broken = {**prompt, "out": node("RunsOut", model=["offload", 0])}
    broken["sampler"] = node("KSampler", **(prompt["sampler"]["inputs"] | {"model": ["out", 0]}))
    with pytest.raises(FailedError, match="no memory left") as failed:
        server.run(broken)
    assert failed.value.node == "KSampler"
    assert torch.equal(latent_of(server.run(prompt)), wanted)


def test_a_wrong_number_of_blocks_is_one_clear_error(server):
    with pytest.raises(FailedError, match="blocks_on_gpu 99") as failed:
        server.run(with_mode("layerwise", "wrong", blocks_on_gpu=99))
    assert failed.value.node == "LowBitOffload"
    with pytest.raises(RefusedError):
        server.run(with_mode("layerwise", "wrong", vram_budget_gb=-1))


def test_the_node_as_the_page_sees_it(server):
    about = server.get("/object_info")["LowBitOffload"]
    # saved workflows hold widget values by their place
    assert about["input_order"]["required"] == ["model", "mode", "vram_budget_gb", "blocks_on_gpu"]
    assert about["input"]["required"]["mode"][1]["options"] == list(MODES)
    for key, value in about["input"]["required"].items():
        assert value[1].get("tooltip"), key
    assert about["output"] == ["MODEL"] and about["category"] == "LowBit/memory"


def test_inspect_tells_and_draws_the_plan(server):
    prompt = {
        "inspect": node("LowBitInspect", model="tiny", matmul="auto"),
        "save": node("SaveImage", images=["inspect", 2], filename_prefix="plan"),
    }
    done = server.run(prompt)
    told = done.text("inspect")
    assert "memory of " in told and "activations: " in told and "activations: unknown" not in told
    assert all(f"\n  {mode} " in told for mode in MODES), told
    picture = image_of(done)
    assert picture.shape[1] == 1024 and picture.shape[0] > 300 and picture.float().std() > 5


@pytest.mark.gpu
def test_dynamic_vram_keeps_its_ceiling(server, wanted):
    """The model is smaller than one page: it is resident as a whole or not at all."""
    for mode in ("resident", "sequential"):
        prompt = with_mode(mode, f"ceiling-{mode}")
        assert torch.equal(latent_of(server.run(prompt)), wanted)
        again = with_mode(mode, "again", vram_budget_gb=2.0)
        told = server.run({name: again[name] for name in ("model", "offload")} | AN_END)
        text = told.text("offload")
        assert "by: ComfyUI's Dynamic VRAM" in text
        resident, streamed = re.search(r": ([\d.]+) MiB resident, ([\d.]+) MiB not", text).groups()
        kept, gone = float(resident), float(streamed)
        assert (gone == 0) if mode == "resident" else (kept < 0.1 * gone), text
