"""Report on Model: what it tells of kernels, formats, memory, LoRAs and LoRA files, in the host."""

from __future__ import annotations

import json

import citizens
import comfy.model_management as mm
import folder_paths
import nodes
import pytest
import torch
from safetensors.torch import save_file
from support import pack

WIDTH = 256
RANK = 4


@pytest.fixture(autouse=True)
def as_nodes_run():
    """Inference mode from loading to running: the server runs every node so."""
    with torch.inference_mode():
        yield


@pytest.fixture
def lora_folder(tmp_path):
    """A folder where ComfyUI's nodes look for LoRA files."""
    known = folder_paths.folder_names_and_paths["loras"]
    folder_paths.add_model_folder_path("loras", str(tmp_path))
    folder_paths.filename_list_cache.clear()
    yield tmp_path
    folder_paths.folder_names_and_paths["loras"] = known
    known[0].remove(str(tmp_path))
    folder_paths.filename_list_cache.clear()


def pair(name: str, rows: int, columns: int, generator, kohya: bool = False):
    """A LoRA of one layer."""
    down, up = ("lora_down", "lora_up") if kohya else ("lora_A", "lora_B")
    return {
        f"{name}.{down}.weight": torch.randn(RANK, columns, generator=generator),
        f"{name}.{up}.weight": torch.randn(rows, RANK, generator=generator),
    }


def lora_file(folder, seed: int = 3) -> str:
    """Hits by three conventions, slices of fused layers, misses, misfits and text encoders."""
    g = torch.Generator().manual_seed(seed)
    tensors = {
        **pair("diffusion_model.double_blocks.0.img_attn.qkv", 3 * WIDTH, WIDTH, g),
        **pair("transformer.transformer_blocks.1.attn.to_v", WIDTH, WIDTH, g),
        **pair("lora_unet_single_blocks_1_linear2", WIDTH, 5 * WIDTH, g, kohya=True),
        "lora_unet_single_blocks_1_linear2.alpha": torch.tensor(2.0),
        "diffusion_model.final_layer.linear.diff_b": torch.randn(64, generator=g),
        # of another model, by its width
        **pair("diffusion_model.double_blocks.0.img_mlp.0", 512, 128, g),
    }
    for block in range(3):
        tensors |= pair(f"transformer.transformer_blocks.{block}.attn.to_query", 8, 8, g)
        tensors |= pair(f"lora_te1_text_model_encoder_layers_{block}_mlp_fc1", 8, 8, g, True)
    tensors["nobody.knows.this"] = torch.zeros(3)
    save_file(tensors, folder / f"mixed{seed}.safetensors")
    return f"mixed{seed}.safetensors"


def report(patcher, lora: str = "none"):
    """Of the node itself, with its text and picture checked against it."""
    node = pack("nodes.report").LowBitModelReport
    made, text, image = node.execute(patcher, lora).args
    assert made.text == text
    assert image.ndim == 4 and image.shape[-1] == 3 and image.std() > 0.01
    json.dumps(made.to_json(), allow_nan=False)
    return made


def with_lora(patcher, name: str, strength: float = 1.0):
    return nodes.LoraLoaderModelOnly().load_lora_model_only(patcher, name, strength)[0]


@pytest.mark.parametrize("case", ["uint4_svd", citizens.MIXED, "fp8"])
def test_formats_and_bytes_are_those_of_the_weights(case):
    patcher = citizens.load(case)
    told = report(patcher).to_json()
    layers = citizens.layers(patcher)
    ours = sum(sum(t.nbytes for t in citizens.memory_of(m.weight)) for m in layers.values())
    plain = sum(
        p.nbytes
        for name, p in patcher.model.diffusion_model.named_parameters()
        if name.removesuffix(".weight") not in layers
    )
    floats = citizens.floats(patcher)
    assert told["bytes"] == ours + plain == sum(n for _, _, n in told["formats"].values())
    assert told["bf16_bytes"] == 2 * sum(value.numel() for value in floats.values())
    assert sum(count for count, _, _ in told["formats"].values()) == len(floats)
    assert told["formats"]["float32"][2] == plain
    assert told["loaded_by_lowbit"] and told["loaded"]["scheme"] == "sdnq"


def test_kernels_are_those_that_the_layers_call():
    dispatch = pack("loaders.layouts.dispatch")
    for matmul in ("dequantize", "int8"):
        patcher = citizens.load("int8", matmul=matmul)
        parts = [
            part
            for module in citizens.layers(patcher).values()
            for part in module.weight._params.spec.parts
        ]
        told = report(patcher).to_json()["kernels"]
        assert sum(told.values()) == len(parts)
        for part in parts:
            made = dispatch.decide(
                part.weight, part.wish, matmul, "auto", patcher.load_device, torch.float32
            )
            wanted = {"dequantize": "then a float matmul"}.get(made.mode, f"{made.mode} matmul")
            assert any(wanted in line for line in told), told
        assert any("int8 matmul" in line for line in told) == (matmul == "int8")


def test_fused_layers_name_their_parts():
    told = report(citizens.load(citizens.MIXED)).to_json()["fused"]
    (line,) = [
        text
        for text in told
        if text.startswith("double_blocks.*.img_attn.qkv")
        and "to_q int5, to_k uint4, to_v int5" in text
    ]
    assert "of 3 parts along rows" in line and told[line] == 1
    assert sum(told.values()) == sum(
        len(module.weight._params.spec.parts) > 1
        for module in citizens.layers(citizens.load(citizens.MIXED)).values()
    )


def test_memory_before_and_after_a_load():
    patcher = citizens.load("uint4")
    assert "has not run yet" in report(patcher).text
    assert report(patcher).to_json()["memory"]["resident"] == 0
    citizens.on_device(patcher)
    held = report(patcher).to_json()["memory"]
    assert held["resident"] == patcher.loaded_size() > 0 and held["streamed"] == 0
    mm.unload_model_and_clones(patcher)


def test_another_loaders_model_is_told_of_politely():
    plain = citizens.plain_model(citizens.floats(citizens.load("uint4")))
    made = report(plain)
    assert "not loaded by LowBit" in made.text and "floats only" in made.text
    told = made.to_json()
    assert not told["loaded_by_lowbit"] and told["kernels"] == {} and told["fused"] == {}
    assert list(told["formats"]) == ["float32"]


def test_layers_in_the_hosts_own_formats():
    """Of a file that ComfyUI's loader opened, and with its bytes as it holds them."""
    import comfy.sd

    weights = dict(citizens.floats(citizens.load("uint4")))
    layers = ("double_blocks.0.img_mlp.0", "single_blocks.1.linear2")
    held = 0
    for layer in layers:
        weight = weights.pop(f"{layer}.weight")
        scale = weight.abs().max() / 448
        mark = json.dumps({"format": "float8_e4m3fn"}).encode()
        weights |= {
            f"{layer}.weight": (weight / scale).to(torch.float8_e4m3fn),
            f"{layer}.weight_scale": scale,
            f"{layer}.comfy_quant": torch.frombuffer(bytearray(mark), dtype=torch.uint8),
        }
        held += weight.numel() + 4
    told = report(comfy.sd.load_diffusion_model_state_dict(weights)).to_json()
    assert told["handed_over"] == {"float8_e4m3fn": 2}
    assert told["kernels"] == {"float8_e4m3fn: linear by ComfyUI's own kernels": 2}
    assert told["formats"]["float8_e4m3fn"][2] == held


def test_each_lora_on_the_model_and_how_it_is_carried(lora_folder):
    first, second = lora_file(lora_folder, 3), lora_file(lora_folder, 4)
    patcher = with_lora(with_lora(citizens.load("uint4"), first, 0.75), second, -0.5)
    patches = report(patcher).to_json()["patches"]
    by_side = {item["strength"]: item for item in patches if item["carried"] == "side matmul"}
    assert set(by_side) == {0.75, -0.5}
    for item in by_side.values():
        assert item["kind"] == "lora" and item["weights"] >= 3 and item["retained"] is None
        # qkv, one of its rows' thirds, linear2: up and down in float32
        sides = RANK * 4 * ((3 * WIDTH + WIDTH) + 2 * WIDTH + (WIDTH + 5 * WIDTH))
        assert item["added_bytes"] >= sides
    biases = [item for item in patches if item["kind"] == "diff"]
    assert {item["carried"] for item in biases} == {"float weight"}
    text = report(patcher).text
    assert "lora at strength 0.75, by side matmul" in text and "strength -0.5" in text


def test_the_energy_that_a_low_rank_keeps_is_told(lora_folder):
    patches = pack("loaders.host.patches")
    key = "diffusion_model.double_blocks.0.img_mlp.0.weight"
    patcher = patches.with_handling(citizens.load("uint4"), patches.Handling("svd", 8))
    change = torch.randn(1024, 8) @ torch.randn(8, 256) + 0.5 * torch.randn(1024, 256)
    patcher.add_patches({key: ("diff", (change,))}, 1.0)
    values = torch.linalg.svdvals(change.double()) ** 2
    kept = float(values[:8].sum() / values.sum())
    citizens.on_device(patcher)
    citizens.run(patcher)
    (item,) = report(patcher).to_json()["patches"]
    assert item["carried"] == "svd branch" and abs(item["retained"] - kept) < 0.01
    assert f"{item['retained']:.2%} of its energy" in report(patcher).text
    mm.unload_model_and_clones(patcher)


@pytest.mark.parametrize("ours", [True, False])
def test_a_lora_file_against_the_model(lora_folder, ours):
    patcher = citizens.load("uint4_svd")
    if not ours:
        patcher = citizens.plain_model(citizens.floats(patcher))
    name = lora_file(lora_folder)
    told = report(patcher, name).to_json()["lora_file"]
    # the host's own judgement: what it warns of, and what it patches
    patched = with_lora(patcher, name)
    assert set(told["targets"]) | set(told["misfits"]) == set(patched.patches)
    assert told["tensors"] == 23 and told["text_encoder"] == 6
    assert told["missed"] == {
        "transformer.transformer_blocks.*.attn.to_query": 6,
        "nobody.knows.this": 1,
    }
    assert told["hit"] == 23 - 6 - 7
    near = told["nearest"]["transformer.transformer_blocks.*.attn.to_query"]
    assert near[0] == "transformer.transformer_blocks.*.attn.to_q"
    (misfit,) = told["misfits"].items()
    assert misfit == (
        "diffusion_model.double_blocks.0.img_mlp.0.weight",
        "is for 512 x 128, the model has 1024 x 256",
    )
    assert told["kinds"] == {"LoRA": 3, "difference": 1}
    assert told["strengths"] == []


def test_what_the_host_would_warn_of_is_what_is_missed(lora_folder, caplog):
    patcher, name = citizens.load("uint4"), lora_file(lora_folder)
    with caplog.at_level("WARNING"):
        with_lora(patcher, name)
    warned = [r.getMessage() for r in caplog.records if "lora key not loaded" in r.getMessage()]
    told = report(patcher, name).to_json()["lora_file"]
    assert len(warned) == sum(told["missed"].values()) + told["text_encoder"]


def test_whether_this_very_file_is_on_the_model(lora_folder):
    first, second = lora_file(lora_folder, 3), lora_file(lora_folder, 4)
    patcher = with_lora(citizens.load("uint4"), first, 0.25)
    assert report(patcher, first).to_json()["lora_file"]["strengths"] == [0.25]
    assert report(patcher, second).to_json()["lora_file"]["strengths"] == []
    patcher = with_lora(with_lora(patcher, second, 0.5), first, -1.5)
    assert report(patcher, first).to_json()["lora_file"]["strengths"] == [0.25, -1.5]
    assert "on this MODEL at strength 0.5" in report(patcher, second).text


def test_a_broken_lora_file_is_one_clear_error(lora_folder):
    error = pack("quant.errors").LowBitError
    patcher, generator = citizens.load("uint4"), torch.Generator().manual_seed(1)
    half = pair("diffusion_model.double_blocks.0.img_mlp.0", 1024, WIDTH, generator)
    half = {key: value for key, value in half.items() if "lora_B" in key}
    save_file(half, lora_folder / "half.safetensors")
    with pytest.raises(error, match="lacks a tensor") as raised:
        report(patcher, "half.safetensors")
    assert "double_blocks.0.img_mlp.0.lora_A.weight" in str(raised.value)
    (lora_folder / "text.safetensors").write_text("no tensors at all")
    with pytest.raises(error, match=r"text\.safetensors"):
        report(patcher, "text.safetensors")


def test_reading_a_file_takes_no_memory_and_changes_nothing(lora_folder):
    patcher, name = citizens.load("uint4"), lora_file(lora_folder)
    before, bits = patcher.patches_uuid, citizens.codes(patcher)
    report(patcher, name)
    assert patcher.patches == {} and patcher.patches_uuid == before
    assert citizens.same_codes(bits, citizens.codes(patcher))


def test_show_report_gives_text_json_and_picture():
    made = report(citizens.load("uint4"))
    show = pack("nodes.report").LowBitShowReport.execute
    text, image = show(made).args
    assert text == made.text and image.shape[2] == 1024
    text, image = show(made, "json", 512).args
    assert json.loads(text) == json.loads(json.dumps(made.to_json())) and image.shape[2] == 512
