"""Quantizing in a real server: a MODEL in the graph, a file, and what is saved opens again."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from pathlib import Path

import aiohttp
import pytest
import torch
from live import image_of, latent_of
from safetensors import safe_open
from test_server import exact, ours
from workbench import FailedError, flux_prompt, node

RECIPES = {
    "LowBitRecipeSDNQ": "sdnq",
    "LowBitRecipeSVDQuant": "svdquant",
    "LowBitRecipeFP8": "fp8",
    "LowBitRecipeNVFP4": "nvfp4",
    "LowBitRecipeINT8": "int8",
}
QUANTIZERS = ("LowBitQuantize", "LowBitQuantizeFile", "LowBitSave")
#: minutes of work on the small model, for tests that end it early
SLOW = {"weights_dtype": "uint4", "use_svd": True, "svd_steps": 100, "scale_search": 200}


def recipe(server, kind, **settings):
    """A recipe node with its defaults, as the page makes it."""
    inputs = server.get("/object_info")[kind]["input"]
    told = {name: about[1]["default"] for group in inputs.values() for name, about in group.items()}
    return node(kind, **(told | settings))


def quantized(server, kind="LowBitRecipeSDNQ", prefix="quantized", **settings):
    """The workflow with a float model that is quantized in the graph."""
    prompt = flux_prompt(exact(), prefix=prefix)
    prompt["recipe"] = recipe(server, kind, **settings)
    prompt["quantize"] = node(
        "LowBitQuantize", model=["model", 0], recipe=["recipe", 0], bake_patches=False
    )
    prompt["report"] = node("LowBitShowReport", report=["quantize", 1])
    prompt["sampler"]["inputs"]["model"] = ["quantize", 0]
    return prompt


def of_file(server, kind="LowBitRecipeSDNQ", container="comfy", dry_run=False, **settings):
    return {
        "recipe": recipe(server, kind, **settings),
        "file": node(
            "LowBitQuantizeFile",
            model="exact.safetensors",
            recipe=["recipe", 0],
            filename_prefix="diffusion_models/made",
            container=container,
            dry_run=dry_run,
        ),
    }


def path_in(text):
    return Path(text.partition("\n")[0])


class Listening:
    """What the server tells every page, while the block runs."""

    def __init__(self, server):
        self.url = f"{server.url}/ws"
        self.events, self.texts = [], []
        self._ready, self._loop = threading.Event(), asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self):
        self._thread.start()
        assert self._ready.wait(30)
        return self

    def __exit__(self, *_):
        self._loop.call_soon_threadsafe(self._task.cancel)
        self._thread.join(30)

    def _run(self):
        self._task = self._loop.create_task(self._listen())
        try:
            self._loop.run_until_complete(self._task)
        except asyncio.CancelledError:
            pass
        finally:
            self._loop.close()

    async def _listen(self):
        async with aiohttp.ClientSession() as session, session.ws_connect(self.url) as socket:
            self._ready.set()
            async for message in socket:
                if message.type == aiohttp.WSMsgType.TEXT:
                    self.events.append(json.loads(message.data))
                elif message.data[:4] == b"\0\0\0\3":  # text of a node
                    length = int.from_bytes(message.data[4:8], "big")
                    name = message.data[8 : 8 + length].decode()
                    self.texts.append((name, message.data[8 + length :].decode()))

    def until(self, found, seconds=60):
        end = time.monotonic() + seconds
        while not found():
            assert time.monotonic() < end, (self.events[-5:], self.texts[-5:])
            time.sleep(0.01)

    def progress(self, name):
        return [
            (told["value"], told["max"])
            for event in self.events
            if event["type"] == "progress_state"
            for which, told in event["data"]["nodes"].items()
            if which == name
        ]


def test_nodes_as_the_page_sees_them(server):
    info = server.get("/object_info")
    for name in (*RECIPES, *QUANTIZERS, "LowBitRecipeFromText"):
        about = info[name]
        assert about["category"] == "LowBit/quantize" and about["description"]
        for group, inputs in about["input"].items():
            for key, value in inputs.items():
                assert group == "hidden" or value[1].get("tooltip"), f"{name}.{key} has no tooltip"
        assert all(about["output_tooltips"]), name
    # saved workflows hold widget values by their place
    order = info["LowBitRecipeSDNQ"]["input_order"]
    assert order["required"] == [
        "weights_dtype", "group_size", "use_svd", "svd_rank", "use_hadamard", "use_codebook",
        "use_dynamic_quantization", "use_quantized_matmul",
    ]  # fmt: skip
    assert order["optional"][:2] == ["keep", "overrides"]
    formats = info["LowBitRecipeSDNQ"]["input"]["required"]["weights_dtype"][1]["options"]
    assert {"int8", "uint4", "uint1", "float8_e4m3fn"} <= set(formats)
    assert info["LowBitRecipeFP8"]["input"]["required"]["method"][1]["options"] == ["fp8", "mxfp8"]
    assert info["LowBitRecipeINT8"]["input"]["required"]["method"][1]["options"] == ["int8", "int4"]
    order = info["LowBitQuantizeFile"]["input_order"]
    assert order["required"] == ["model", "recipe", "filename_prefix", "container", "dry_run"]
    order = info["LowBitQuantize"]["input_order"]
    assert order["required"] == ["model", "recipe", "bake_patches"]
    assert order["optional"] == ["matmul", "seed", "positive", "latent", "steps"]
    order = info["LowBitSave"]["input_order"]
    assert order["required"] == ["model", "filename_prefix", "container"]
    assert order["optional"][:3] == ["recipe", "requantize", "seed"]


@pytest.mark.both_hosts
@pytest.mark.parametrize(
    ("kind", "settings", "away"),
    [
        ("LowBitRecipeSDNQ", {"weights_dtype": "uint4", "use_svd": True}, 0.3),
        ("LowBitRecipeSVDQuant", {}, 0.4),
        ("LowBitRecipeFP8", {}, 0.1),
        ("LowBitRecipeFP8", {"method": "mxfp8"}, 0.1),
        ("LowBitRecipeNVFP4", {}, 0.4),
        ("LowBitRecipeINT8", {}, 0.1),
    ],
)
def test_model_file_and_saved_model_are_the_same(server, kind, settings, away):
    """Quantized in the graph, saved from there, quantized on disk: the same weights, exactly."""
    prefix = "-".join((kind, *map(str, settings.values())))
    floats = server.run(flux_prompt(exact(), prefix="floats"))
    prompt = quantized(server, kind, prefix, **settings)
    prompt["saved"] = node(
        "LowBitSave",
        model=["quantize", 0],
        filename_prefix=f"diffusion_models/{prefix}",
        container="comfy",
    )
    done = server.run(prompt)
    latent, wanted = latent_of(done), latent_of(floats)
    assert 0 < float((latent - wanted).norm() / wanted.norm()) < away
    assert image_of(done).float().std() > 10
    assert "times smaller" in done.text("report")
    saved = path_in(done.text("saved"))
    assert saved.is_file() and saved.with_suffix(".report.json").is_file()
    assert saved.parent == server.base / "output" / "diffusion_models"

    made = path_in(server.run(of_file(server, kind, **settings)).text("file"))
    with safe_open(saved, "pt") as one, safe_open(made, "pt") as other:
        assert set(one.keys()) == set(other.keys())
        for name in list(one.keys()):
            here, there = one.get_tensor(name), other.get_tensor(name)
            assert here.dtype == there.dtype, name
            one_, other_ = (t.reshape(-1).view(torch.uint8) for t in (here, there))
            assert torch.equal(one_, other_), name
    for file in (saved, made):
        again = server.run(flux_prompt(ours(file.name, matmul="auto"), prefix="again"))
        # Plain weights lie elsewhere in memory now, which moves the last bits of float products.
        assert float((latent_of(again) - latent).norm() / latent.norm()) < 1e-5, file


def test_recipes_travel_as_text(server):
    prompt = {
        "recipe": recipe(server, "LowBitRecipeINT8", method="int4", keep="*.img_mlp"),
        "again": node("LowBitRecipeFromText", json=["recipe", 1]),
        "text": node("PreviewAny", source=["again", 1]),
    }
    told = json.loads(server.run(prompt).text("text"))
    assert told["method"] == "int4" and told["keep"] == ["*.img_mlp"]
    assert told["settings"]["group_size"] == 128
    prompt["again"]["inputs"]["json"] = "no recipe"
    with pytest.raises(FailedError, match="no JSON"):
        server.run(prompt)


@pytest.mark.both_hosts
def test_progress_reaches_the_page(server):
    settings = {"weights_dtype": "int7", "use_svd": True}
    with Listening(server) as heard:
        server.run(quantized(server, prefix="told", **settings))
        server.run(of_file(server, **settings))
        heard.until(lambda: len(heard.texts) > 100)
    for name in ("quantize", "file"):
        values = heard.progress(name)
        assert values and values == sorted(values) and values[-1][0] == values[-1][1] > 40, values
        texts = [text for which, text in heard.texts if which == name]
        assert any("double_blocks.0.img_attn.qkv" in text for text in texts)
        assert texts[-1].endswith("layers done")


@pytest.mark.both_hosts
def test_an_interrupt_leaves_nothing_and_the_model_usable(server):
    folder = server.base / "output" / "diffusion_models"
    before = set(folder.iterdir()) if folder.exists() else set()
    wanted = latent_of(server.run(flux_prompt(exact(), prefix="before")))
    for prompt in (quantized(server, prefix="never", **SLOW), of_file(server, **SLOW)):
        with Listening(server) as heard:
            queued = server.queue(prompt)
            heard.until(lambda h=heard: len(h.texts) > 3)
            server.post("/interrupt", {})
            with pytest.raises(FailedError) as failed:
                server.wait(queued)
        assert failed.value.event == "execution_interrupted"
    assert (set(folder.iterdir()) if folder.exists() else set()) == before
    again = flux_prompt(exact(), prefix="after")
    again["sampler"]["inputs"]["seed"] = 8
    server.run(again)  # so that the sampler is not cached
    assert torch.equal(latent_of(server.run(flux_prompt(exact(), prefix="after"))), wanted)


def test_a_dry_run_and_what_a_container_cannot_hold(server):
    folder = server.base / "output" / "diffusion_models"
    before = set(folder.iterdir()) if folder.exists() else set()
    prompt = of_file(server, dry_run=True, container="sdnq")
    prompt["save"] = node("SaveImage", images=["file", 2], filename_prefix="plan")
    done = server.run(prompt)
    assert "times smaller" in done.text("file") and image_of(done).float().std() > 5
    with pytest.raises(FailedError, match="container sdnq cannot hold") as failed:
        server.run(of_file(server, "LowBitRecipeSVDQuant", container="sdnq"))
    assert failed.value.node == "LowBitQuantizeFile"
    prompt = quantized(server, prefix="other")
    prompt["saved"] = node(
        "LowBitSave", model=["quantize", 0], filename_prefix="other", container="sdnq"
    )
    with pytest.raises(FailedError, match="rounding its weights once more") as failed:
        server.run({name: prompt[name] for name in ("model", "recipe", "quantize", "saved")})
    assert failed.value.node == "LowBitSave"
    assert (set(folder.iterdir()) if folder.exists() else set()) == before
