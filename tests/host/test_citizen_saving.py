"""Saving by ComfyUI's ModelSave and reading back, here and in ComfyUI's own loader."""

from __future__ import annotations

import citizens
import comfy.model_management as mm
import comfy.sd
import comfy.utils
import pytest
import torch
from comfy.quant_ops import QuantizedTensor
from comfy_extras.nodes_model_merging import save_checkpoint
from safetensors import safe_open
from support import pack

CPU = torch.device("cpu")
EVERY_CASE = pytest.mark.parametrize("case", citizens.CASES)
CHANGED = "diffusion_model.double_blocks.0.img_attn.qkv.weight"


@pytest.fixture(autouse=True)
def as_nodes_run():
    """Inference mode from loading to running: the server runs every node so."""
    with torch.inference_mode():
        yield


def saved(patcher, folder):
    """What the node ModelSave writes."""
    save_checkpoint(patcher, filename_prefix="saved", output_dir=str(folder))
    mm.unload_model_and_clones(patcher)
    (file,) = folder.glob("*.safetensors")
    return file


def patched(patcher, strength: float = 0.5):
    """A MODEL with one layer changed by a rank-one LoRA."""
    clone = patcher.clone()
    generator = torch.Generator().manual_seed(2)
    up = torch.randn(768, 1, generator=generator)
    down = torch.randn(1, 256, generator=generator)
    tensors = {"layer.lora_up.weight": up * 0.2, "layer.lora_down.weight": down * 0.2}
    assert clone.add_patches(comfy.lora.load_lora(tensors, {"layer": CHANGED}), strength)
    return clone


@EVERY_CASE
def test_a_saved_model_comes_back_bit_by_bit(case, tmp_path):
    ours = citizens.load(case)
    bits, out = citizens.codes(ours), citizens.run(ours)
    file = saved(ours, tmp_path)
    again = citizens.load(file)
    assert again.get_attachment("lowbit").scheme == "lowbit"
    assert citizens.same_codes(bits, citizens.codes(again))
    # Plain weights lie elsewhere in memory now, which moves the last bits of float products.
    assert citizens.error(citizens.run(again), out) < 1e-5
    here, there = citizens.layers(ours), citizens.layers(again)
    for name, module in here.items():
        assert module.weight._params.spec == there[name].weight._params.spec, name
    assert file.stat().st_size < ours.model_size() * 1.05
    weights = citizens.floats(again)
    for name, value in citizens.floats(ours).items():
        assert torch.equal(weights[name], value), name
    before = file.read_bytes()
    for module in there.values():
        module.weight._qdata.zero_()
    assert file.read_bytes() == before


@pytest.mark.parametrize("case", ["int8", "uint4_had_svd", citizens.MIXED])
@pytest.mark.parametrize("resident", [True, False])
def test_a_lora_is_baked_into_what_is_saved(case, resident, tmp_path):
    """Resident weights are written as they are; others are patched one by one while writing."""
    ours = citizens.load(case)
    bits = citizens.codes(ours)
    clone = patched(ours)
    citizens.on_device(clone)
    baked = citizens.codes(clone)
    out = citizens.run(clone)
    mm.unload_model_and_clones(clone)
    if resident:
        file = saved(clone, tmp_path)
    else:
        clone.patch_model(CPU, lowvram_model_memory=0.1)
        assert citizens.same_codes(bits, citizens.codes(clone))
        file = tmp_path / "saved.safetensors"
        comfy.utils.save_torch_file(clone.state_dict_for_saving(), str(file))
        clone.detach()
    again = citizens.load(file)
    assert citizens.same_codes(baked, citizens.codes(again))
    assert citizens.error(citizens.run(again), out) < 1e-5
    changed = {name for name, value in bits.items() if not torch.equal(value, baked[name])}
    assert {f"diffusion_model.{name}.weight" for name in changed} == {CHANGED}
    assert citizens.same_codes(bits, citizens.codes(ours))


def test_the_hosts_own_loader_refuses_our_format_aloud(tmp_path):
    file = saved(citizens.load("uint4"), tmp_path)
    with pytest.raises(ValueError, match=r"Unsupported quantization format: lowbit_composite"):
        comfy.sd.load_diffusion_model(str(file))


def test_a_damaged_save_is_refused(tmp_path):
    import safetensors.torch

    error = pack("quant.errors").LowBitError
    file = saved(citizens.load("uint4"), tmp_path)
    tensors = safetensors.torch.load_file(file)
    name = "model.diffusion_model.double_blocks.0.img_mlp.0"
    for key, value, words in (
        (f"{name}.weight", tensors[f"{name}.weight"][:-256].clone(), "buffer"),
        (f"{name}.comfy_quant", tensors[f"{name}.comfy_quant"][:-20].clone(), "marker"),
    ):
        safetensors.torch.save_file(tensors | {key: value}, tmp_path / "damaged.safetensors")
        with pytest.raises(error, match=words) as caught:
            citizens.load(tmp_path / "damaged.safetensors")
        assert caught.value.layer.startswith(name)
        assert caught.value.file.endswith("damaged.safetensors")


# --------------------------------------------------------- layers in the host's own int8 format


def fits_kitchen(spec, dtype: torch.dtype = torch.float32) -> bool:
    """Whether comfy-kitchen's kernel takes the layer, its constraints on the device aside."""
    registry = pack("kernels.registry")
    call_of = pack("loaders.layouts.dispatch").call_of
    calls = [call_of(part.weight, CPU, dtype) for part in spec.parts]
    (row,) = (
        row
        for row in registry.registry.implementations("linear_int8")
        if row.backend == "comfy_kitchen"
    )
    about_device = (registry.OnDevice, registry.MinCapability)
    return spec.axis == 0 and all(
        isinstance(rule, about_device) or rule.why_not(call) is None
        for rule in row.constraints
        for call in calls
    )


@pytest.fixture
def hand_over(monkeypatch):
    """The loader hands int8 layers over as it does where comfy-kitchen has a GPU."""

    def choose(only=lambda spec: True):
        monkeypatch.setattr(
            pack("loaders.host.api"),
            "_runs_in_kitchen",
            lambda spec, *rest: fits_kitchen(spec) and only(spec),
        )

    return choose


def hosts_layers(patcher) -> dict[str, torch.nn.Module]:
    return {
        name: module
        for name, module in patcher.model.diffusion_model.named_modules()
        if getattr(getattr(module, "weight", None), "_layout_cls", None) == "TensorWiseINT8Layout"
    }


def test_int8_handed_to_the_host_is_the_same_model(hand_over, tmp_path):
    kept = citizens.load("int8_mm", matmul="int8")
    hand_over()
    given = citizens.load("int8_mm", matmul="int8")
    theirs = hosts_layers(given)
    assert len(theirs) > 10
    assert theirs.keys() | citizens.layers(given).keys() == citizens.layers(kept).keys()
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(1))
    for name, module in theirs.items():
        mine = citizens.layers(kept)[name]
        assert torch.equal(module.weight.data.dequantize(), mine.weight.data.dequantize()), name
        if mine.in_features == 256:
            assert citizens.error(module(x), mine(x)) < 1e-5, name
    wide = {"x": torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(3))}
    wide["context"] = torch.randn(1, 40, 192, generator=torch.Generator().manual_seed(4))
    assert citizens.error(citizens.run(given, **wide), citizens.run(kept, **wide)) < 0.02

    # Saved, it is a file for every ComfyUI.
    weights, out = citizens.floats(given), citizens.run(given)
    file = saved(given, tmp_path)
    with safe_open(file, "pt") as data:
        marker = data.get_tensor(f"model.diffusion_model.{next(iter(theirs))}.comfy_quant")
    assert bytes(marker.tolist()) == b'{"format": "int8_tensorwise"}'
    assert not citizens.layers(given)
    stock = comfy.sd.load_diffusion_model(str(file), {"dtype": torch.float32})
    for name, value in citizens.floats(stock).items():
        assert torch.equal(value, weights[name]), name
    assert citizens.error(citizens.run(stock), out) < 1e-5
    again = citizens.load(file, matmul="int8")
    for name, value in citizens.floats(again).items():
        assert torch.equal(value, weights[name]), name
    assert citizens.error(citizens.run(again), out) < 1e-5


def aligned(patcher):
    """The model with its float layers in memory of their own.

    Sums of a layer depend on how its weight is aligned in memory, in the last bit: enough to round
    an activation of an int8 product to its neighbour.
    """
    for parameter in patcher.model.diffusion_model.parameters():
        if type(parameter.data) is torch.Tensor:
            parameter.data = parameter.data.clone()
    return patcher


def test_a_file_of_both_formats_comes_back(hand_over, tmp_path):
    """A save holds the host's layers beside ours where only some fit its kernel."""
    hand_over(lambda spec: "single" in spec.parts[0].name)
    ours = citizens.load("int8_mm", matmul="int8")
    assert hosts_layers(ours) and citizens.layers(ours)
    names = hosts_layers(ours).keys()
    weights, bits, out = citizens.floats(ours), citizens.codes(ours), citizens.run(aligned(ours))
    again = citizens.load(saved(ours, tmp_path), matmul="int8")
    assert again.get_attachment("lowbit").scheme == "lowbit"
    assert hosts_layers(again).keys() == names
    assert citizens.same_codes(bits, citizens.codes(again))
    for name, value in citizens.floats(again).items():
        assert torch.equal(value, weights[name]), name
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(1))
    for name in names | citizens.layers(ours).keys():
        mine, theirs = (m.model.diffusion_model.get_submodule(name) for m in (ours, again))
        if mine.in_features == 256:
            assert torch.equal(theirs(x), mine(x)), name
    assert citizens.error(citizens.run(aligned(again)), out) < 1e-5


def test_key_patches_of_layers_that_the_host_keeps(hand_over):
    hand_over()
    ours = citizens.load("int8_mm", matmul="int8")
    patches = ours.get_key_patches("diffusion_model.")
    for name, module in hosts_layers(ours).items():
        weight, convert = patches[f"diffusion_model.{name}.weight"][0]
        assert torch.equal(convert(weight), module.weight.data.dequantize()), name
        scale, _ = patches[f"diffusion_model.{name}.weight_scale"][0]
        assert torch.equal(scale, module.weight._params.scale), name
        marker, _ = patches[f"diffusion_model.{name}.comfy_quant"][0]
        assert b"int8_tensorwise" in bytes(marker.tolist()), name


def test_a_lora_on_a_layer_that_the_host_keeps(hand_over):
    hand_over()
    ours = citizens.load("int8_mm", matmul="int8")
    before = citizens.floats(ours)
    key = CHANGED.removeprefix("diffusion_model.")
    assert isinstance(ours.model.get_parameter(CHANGED).data, QuantizedTensor)
    clone = citizens.on_device(patched(ours))
    change = citizens.floats(clone)[key] - before[key]
    mm.unload_model_and_clones(clone)
    plain = citizens.plain_model(before)
    wanted = citizens.floats(citizens.on_device(patched(plain)))[key] - before[key]
    assert ((change - wanted).norm() / wanted.norm()).item() < 0.1
    assert torch.equal(citizens.floats(ours)[key], before[key])
