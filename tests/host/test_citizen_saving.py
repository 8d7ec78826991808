"""Saving by ComfyUI's ModelSave and reading back, here and in ComfyUI's own loader."""

from __future__ import annotations

import citizens
import comfy.lora
import comfy.model_management as mm
import comfy.model_patcher
import comfy.ops
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


@pytest.mark.parametrize("case", ["int8", "uint4", "uint4_had_svd", citizens.MIXED])
def test_a_lora_is_baked_into_what_is_saved(case, tmp_path):
    """By ModelSave, and layer by layer while a model is written that is not wholly loaded.

    As further rank of the branch where the format has one, else rounded in the layer's format.
    """
    ours = citizens.load(case)
    bits = citizens.codes(ours)
    before = citizens.floats(ours)
    clone = patched(ours)
    out = citizens.run(citizens.on_device(clone))
    meant = citizens.floats(clone)
    mm.unload_model_and_clones(clone)
    again = citizens.load(saved(clone, tmp_path))
    clone.patch_model(CPU, lowvram_model_memory=0.1)
    assert citizens.same_codes(bits, citizens.codes(ours))
    file = tmp_path / "by layers.safetensors"
    comfy.utils.save_torch_file(clone.state_dict_for_saving(), str(file))
    clone.detach()
    assert citizens.same_codes(citizens.codes(citizens.load(file)), citizens.codes(again))

    name = CHANGED.removeprefix("diffusion_model.").removesuffix(".weight")
    ranks = [part.weight.rank for part in citizens.layers(ours)[name].weight._params.spec.parts]
    now = [part.weight.rank for part in citizens.layers(again)[name].weight._params.spec.parts]
    weights = citizens.floats(again)
    change = weights[f"{name}.weight"] - before[f"{name}.weight"]
    wanted = meant[f"{name}.weight"] - before[f"{name}.weight"]
    wrong = ((change - wanted).norm() / wanted.norm()).item()
    if all(ranks):
        # One more; from a multiple of 16 to the next.
        assert now == [rank + (1 if rank % 16 else 16) for rank in ranks]
        assert wrong < 0.01  # the factors of the file are bfloat16
        assert citizens.error(citizens.run(again), out) < 0.01
    else:
        assert now == ranks
        assert wrong < (0.1 if case == "int8" else 0.9), wrong
    for key, value in before.items():
        assert key == f"{name}.weight" or torch.equal(weights[key], value), key
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
    registry = pack("kernels.registry").registry
    call_of = pack("loaders.layouts.dispatch").call_of
    calls = [call_of(part.weight, CPU, dtype) for part in spec.parts]
    rows = registry.implementations("linear_int8")
    (row,) = (row for row in rows if row.backend == "comfy_kitchen")
    about_weight = [r for r in row.constraints if not getattr(r, "of_device", False)]
    assert len(about_weight) < len(row.constraints)
    return spec.axis == 0 and all(r.why_not(call) is None for r in about_weight for call in calls)


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


def test_a_lora_where_the_host_goes_past_the_forward(hand_over):
    """MiniMax H3 multiplies its second MLP layer by itself where that is the host's own int8."""
    minimax = pytest.importorskip("comfy.ldm.minimax.model", reason="this ComfyUI has no MiniMax")
    api = pack("loaders.host.api")
    noise = torch.Generator().manual_seed(5)
    hidden, wide = 128, 256
    floats = {
        "blocks.0.mlp.fc1.weight": torch.randn(2 * wide, hidden, generator=noise) / hidden**0.5,
        "blocks.0.mlp.fc2.weight": torch.randn(hidden, wide, generator=noise) / wide**0.5,
    }
    packed = {
        key: citizens.composite(citizens.made(value, "int8")) for key, value in floats.items()
    }
    names = ("video_patch_proj.weight", "audio_patch_proj.weight")
    patches = comfy.lora.load_lora(
        {
            "layer.lora_up.weight": torch.randn(hidden, 4, generator=noise) * 0.1,
            "layer.lora_down.weight": torch.randn(4, wide, generator=noise) * 0.1,
        },
        {"layer": "blocks.0.mlp.fc2.weight"},
    )
    x = torch.randn(40, hidden, generator=noise)

    def change(state, ops, install):
        net = torch.nn.Module()
        net.blocks = torch.nn.ModuleList([torch.nn.Module()])
        net.blocks[0].mlp = mlp = minimax.MLP(hidden, wide, operations=ops)
        net.load_state_dict(dict(state))
        net.requires_grad_(False)
        patcher = comfy.model_patcher.ModelPatcher(net, CPU, CPU)
        if install:
            pack("loaders.host.patches").install(patcher)
        assert patcher.add_patches(patches, 0.8)
        before = mlp(x)
        patcher.patch_model(CPU)
        return mlp(x) - before, mlp

    wanted, _ = change(
        {key: value.dequantize() for key, value in packed.items()}, comfy.ops.manual_cast, False
    )
    hand_over()
    options = api.LoadOptions(matmul="int8")
    for known in (names, ()):
        state = packed | dict.fromkeys(known, torch.zeros(1))
        api.hand_over(state, options, CPU, torch.float32)
        state = {key: value for key, value in state.items() if key not in known}
        ops = pack("loaders.host.ops").make_ops(torch.float32, "int8")
        found, mlp = change(state, ops, True)
        assert mlp.fc1.weight._layout_cls == "TensorWiseINT8Layout"
        if known:
            assert ((found - wanted).norm() / wanted.norm()).item() < 0.01
        else:  # what would become of it
            assert mlp.fc2.weight._layout_cls == "TensorWiseINT8Layout"
            assert torch.equal(found, torch.zeros_like(found))
