"""ModelMerge and key patches between our MODELs, and between ours and plain ones."""

from __future__ import annotations

import citizens
import comfy.model_management as mm
import pytest
import torch
from comfy_extras.nodes_model_merging import (
    ModelAdd,
    ModelMergeBlocks,
    ModelMergeSimple,
    ModelSubtract,
    save_checkpoint,
)

LAYER = "double_blocks.0.img_attn.qkv.weight"


@pytest.fixture(autouse=True)
def as_nodes_run():
    """Inference mode from loading to running: the server runs every node so."""
    with torch.inference_mode():
        yield


def merged(one, other, ratio: float):
    return ModelMergeSimple().merge(one, other, ratio)[0]


def loaded_floats(patcher) -> dict[str, torch.Tensor]:
    """The weights as merged, dequantized; the patcher is left unloaded."""
    found = citizens.floats(citizens.on_device(patcher))
    mm.unload_model_and_clones(patcher)
    return found


def mixed(one, other, ratio: float) -> dict[str, torch.Tensor]:
    """What a merge means: ``ratio`` of the first and the rest of the second."""
    first, second = citizens.floats(one), citizens.floats(other)
    return {name: ratio * value + (1 - ratio) * second[name] for name, value in first.items()}


@pytest.mark.parametrize("case", citizens.CASES)
def test_key_patches_name_every_tensor(case):
    patcher = citizens.load(case)
    patches = patcher.get_key_patches("diffusion_model.")
    names = {f"diffusion_model.{name}" for name, _ in citizens.layers(patcher).items()}
    for name in names:
        weight, convert = patches[f"{name}.weight"][0]
        assert torch.equal(convert(weight), weight.data.dequantize())
    every = {f"diffusion_model.{name}" for name in citizens.floats(patcher)}
    markers = {f"{name}.comfy_quant" for name in names}
    beside = {
        f"diffusion_model.{name}.{key}"
        for name, module in citizens.layers(patcher).items()
        for key in module.weight.state_dict("weight")
    }
    assert any(name.endswith("linear1.weight_codes_3") for name in beside)
    assert every | markers | beside == set(patches)


def test_key_patches_of_a_changed_model_tell_the_unchanged_weight():
    """The weight before its LoRA, with the LoRA beside it, also while it is loaded."""
    key = f"diffusion_model.{LAYER}"
    patcher = citizens.load("uint4")
    before = citizens.floats(patcher)[LAYER]
    patcher.add_patches({key: ("diff", (torch.ones_like(before),))}, 0.5)
    citizens.on_device(patcher)
    (weight, convert), patch = patcher.get_key_patches("diffusion_model.")[key]
    assert torch.equal(convert(weight), before)
    assert patch[0] == 0.5
    mm.unload_model_and_clones(patcher)


@pytest.mark.parametrize(
    ("first", "second", "near"),
    [("int8", "int8_mm", 0.02), ("uint4_svd", "int8", 0.3), ("int8", "uint4_had_svd", 0.02)],
)
def test_two_of_our_models_merge(first, second, near):
    one, other = citizens.load(first), citizens.load(second)
    out, bits = citizens.run(one), citizens.codes(one)
    wanted = mixed(one, other, 0.75)
    found = loaded_floats(merged(one, other, 0.75))
    for name, value in wanted.items():
        quantized = name.removesuffix(".weight") in citizens.layers(one)
        limit = near if quantized else 1e-5
        assert citizens.error(found[name], value) < limit, name
    assert citizens.same_codes(bits, citizens.codes(one))
    assert torch.equal(citizens.run(one), out)


@pytest.mark.parametrize("case", ["int8", citizens.MIXED])
def test_ours_into_a_plain_model_is_exact(case):
    ours = citizens.load(case)
    plain = citizens.plain_model(citizens.floats(citizens.load("uint4")))
    wanted = mixed(plain, ours, 0.5)
    found = loaded_floats(merged(plain, ours, 0.5))
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert citizens.error(found[name], value) < 1e-5, name


def test_a_plain_model_into_ours():
    ours = citizens.load("int8")
    plain = citizens.plain_model(citizens.floats(citizens.load("uint4")))
    wanted = mixed(ours, plain, 0.5)
    patched = merged(ours, plain, 0.5)
    found = loaded_floats(patched)
    for name, value in wanted.items():
        assert citizens.error(found[name], value) < 0.02, name
    # Every weight left outside: merged in each pass, not rounded at all.
    exact = citizens.plain_model(wanted)
    patched.patch_model(torch.device("cpu"), lowvram_model_memory=0.1)
    assert citizens.error(citizens.run(patched), citizens.run(exact)) < 1e-4
    patched.detach()


def test_merging_with_all_of_the_first_changes_no_bit():
    ours, other = citizens.load("uint4_cb"), citizens.load("uint4")
    bits = citizens.codes(ours)
    patched = citizens.on_device(merged(ours, other, 1.0))
    assert patched.backup
    assert citizens.same_codes(bits, citizens.codes(patched))
    mm.unload_model_and_clones(patched)


def test_merging_by_blocks():
    ours, other = citizens.load("int8"), citizens.load("int8_mm")
    theirs, bits = citizens.floats(other), citizens.codes(ours)
    patched = ModelMergeBlocks().merge(ours, other, **{"": 0.0, "double_blocks.": 1.0})[0]
    citizens.on_device(patched)
    found, now = citizens.floats(patched), citizens.codes(patched)
    mm.unload_model_and_clones(patched)
    for name in bits:
        if name.startswith("double_blocks."):
            assert torch.equal(now[name], bits[name]), name
        else:
            assert citizens.error(found[f"{name}.weight"], theirs[f"{name}.weight"]) < 0.02, name
    assert citizens.same_codes(bits, citizens.codes(ours))


def test_adding_and_subtracting():
    ours, other = citizens.load("int8"), citizens.load("int8_mm")
    first, second = citizens.floats(ours), citizens.floats(other)
    added = loaded_floats(ModelAdd().merge(ours, other)[0])
    less = loaded_floats(ModelSubtract().merge(ours, other, 0.5)[0])
    for name in first:
        assert citizens.error(added[name], first[name] + second[name]) < 0.02, name
        assert citizens.error(less[name], 0.5 * (first[name] - second[name])) < 0.03, name


def test_a_merge_is_saved_and_read_back(tmp_path):
    patched = merged(citizens.load("uint4_svd"), citizens.load("uint4"), 0.5)
    meant = citizens.floats(citizens.on_device(patched))
    save_checkpoint(patched, filename_prefix="merged", output_dir=str(tmp_path))
    mm.unload_model_and_clones(patched)
    (file,) = tmp_path.glob("*.safetensors")
    again = citizens.load(file)
    found = citizens.floats(again)
    for name in citizens.layers(again):
        key = f"{name}.weight"
        wrong = ((found[key] - meant[key]).norm() / meant[key].norm()).item()
        assert wrong < 0.15, (name, wrong)  # of all of the weight: rounded to 4 bits anew
