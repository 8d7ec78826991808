"""Loading, partly and wholly, unloading, counting, cloning: ComfyUI's own patcher over our weights.

The CPU runs the patcher that NVIDIA cards get with Dynamic VRAM switched off, ``--novram``
included; what Dynamic VRAM does to a weight is in ``test_citizen_streaming``.
"""

from __future__ import annotations

import math
from pathlib import Path

import citizens
import comfy.model_management as mm
import comfy.model_patcher
import pytest
import torch
from safetensors.torch import load_file
from support import pack

CPU = torch.device("cpu")
EVERY_CASE = pytest.mark.parametrize("case", citizens.CASES)


def offloaded(patcher) -> list[str]:
    """Layers that wait for their turn instead of being resident."""
    return [
        name
        for name, module in citizens.layers(patcher).items()
        if hasattr(module, "prev_comfy_cast_weights")
    ]


def expected(case: str) -> torch.Tensor:
    return load_file(citizens.checkpoints() / f"{case}.run.safetensors")["out"]


@EVERY_CASE
def test_full_load_equals_the_float_model_of_the_same_weights(case):
    patcher = citizens.on_device(citizens.load(case))
    given = citizens.inputs(case)
    assert citizens.error(citizens.run(patcher, **given), expected(case)) < 1e-5
    assert patcher.loaded_size() == patcher.model_size()
    mm.unload_model_and_clones(patcher)


@EVERY_CASE
def test_partial_load_and_unload_change_nothing(case):
    patcher = citizens.load(case)
    bits = citizens.codes(patcher)
    size = patcher.model_size()
    whole = citizens.run(citizens.on_device(patcher))
    mm.unload_model_and_clones(patcher)
    assert patcher.loaded_size() == 0

    # The host fills this with the costliest layers first, and keeps room to stream the others.
    patcher.partially_load(CPU, size * 0.6)
    waiting = offloaded(patcher)
    assert 0 < len(waiting) < len(bits)
    assert 0 < patcher.loaded_size() < size
    assert torch.equal(citizens.run(patcher), whole)

    freed = patcher.partially_unload(CPU, size // 4)
    assert freed > 0
    assert torch.equal(citizens.run(patcher), whole)

    patcher.partially_load(CPU, size * 4)
    assert not offloaded(patcher)
    assert torch.equal(citizens.run(patcher), whole)

    patcher.detach()
    assert torch.equal(citizens.run(citizens.on_device(patcher)), whole)
    assert citizens.same_codes(bits, citizens.codes(patcher))
    mm.unload_model_and_clones(patcher)


@EVERY_CASE
def test_novram_runs_every_layer_from_outside(case):
    """What ``--novram`` asks of a patcher: 0.1 bytes of VRAM."""
    patcher = citizens.load(case, matmul="faithful")
    whole = citizens.run(patcher)
    patcher.patch_model(CPU, lowvram_model_memory=0.1)
    assert len(offloaded(patcher)) == len(citizens.layers(patcher))
    assert patcher.loaded_size() < 0.1 * patcher.model_size()
    assert torch.equal(citizens.run(patcher), whole)
    patcher.detach()
    assert not offloaded(patcher)
    assert torch.equal(citizens.run(patcher), whole)


def module_bytes(module) -> int:
    """Bytes of a composite weight, side included."""
    return sum(tensor.nbytes for tensor in citizens.memory_of(module.weight))


@EVERY_CASE
def test_memory_is_counted_as_packed(case):
    patcher = citizens.load(case, compute_dtype="bf16")
    composite = pack("loaders.layouts.composite")
    layers = citizens.layers(patcher)
    sizes = {name: module_bytes(module) for name, module in layers.items()}
    weights = sum(sizes.values())
    markers = sum(composite.marker(m.weight._params.spec).nbytes for m in layers.values())
    model = patcher.model.diffusion_model
    plain = sum(
        p.nbytes for p in model.parameters() if getattr(p.data, "_layout_cls", None) is None
    )
    assert mm.module_size(model) == weights + markers + plain
    for name, module in layers.items():
        held = sum(slot.nbytes for part in module.weight._params.spec.parts for slot in part.slots)
        parts = len(module.weight._params.spec.parts)
        assert held <= sizes[name] < held + 256 * 5 * parts, name
        assert sizes[name] < math.prod(module.weight.shape) * 1.4, name
    # What offloading one layer needs, its float copy included, as the patcher plans with it.
    plan = {entry[-3]: entry for entry in patcher._load_list()}
    name, module = next(iter(layers.items()))
    entry = plan[f"diffusion_model.{name}"]
    assert entry[0] == entry[1] + module.weight.numel() * 2


@EVERY_CASE
def test_a_forced_cast_without_a_patch_keeps_every_bit(case):
    """The host sends small layers through dequantize and quantize for nothing."""
    compute_dtype = "fp16" if case == citizens.MIXED else "bf16"
    patcher = citizens.load(case, compute_dtype=compute_dtype)
    bits = citizens.codes(patcher)
    for number, name in enumerate(bits):
        device = CPU if number % 2 else None
        patcher.patch_weight_to_device(
            f"diffusion_model.{name}.weight", device_to=device, force_cast=True
        )
    assert patcher.backup.keys() == {f"diffusion_model.{name}.weight" for name in bits}
    assert citizens.same_codes(bits, citizens.codes(patcher))
    patcher.unpatch_model(CPU)
    assert citizens.same_codes(bits, citizens.codes(patcher))


def test_a_loaded_weight_is_no_window_on_the_file():
    """The host writes into weights; the file must not change."""
    patcher = citizens.load("uint4", compute_dtype="bf16")
    files = sorted((citizens.checkpoints() / "uint4").glob("*.safetensors"))
    before = [file.read_bytes() for file in files]
    for module in citizens.layers(patcher).values():
        for tensor in citizens.memory_of(module.weight):
            tensor.zero_()
    assert [file.read_bytes() for file in files] == before


def test_moving_to_another_device_moves_every_tensor():
    """Parameters to the meta device, the only other one that every machine has."""
    patcher = citizens.load("uint4_svd")
    model = patcher.model.diffusion_model.to("meta")
    for name, parameter in model.named_parameters():
        assert parameter.device.type == "meta", name
        if hasattr(parameter.data, "_layout_cls"):
            for tensor in citizens.memory_of(parameter.data):
                assert tensor.device.type == "meta", name


def test_clones_share_the_weights_and_what_the_loader_noted():
    patcher = citizens.load("uint4")
    clone = patcher.clone()
    assert clone.model is patcher.model
    assert clone.is_clone(patcher)
    assert clone.get_attachment("lowbit") is patcher.get_attachment("lowbit")
    assert clone.get_attachment("lowbit").scheme == "sdnq"
    assert clone.cached_patcher_init == patcher.cached_patcher_init
    assert clone.model_size() == patcher.model_size()


@pytest.mark.parametrize("dynamic", [False, True])
def test_the_factory_makes_the_same_model_again(dynamic):
    """What SelectModelDevice, MultiGPU, TorchCompileModel and hooks reload a MODEL with."""
    patcher = citizens.load("uint4_svd", dynamic=dynamic, matmul="faithful", backend="reference")
    factory, arguments = patcher.cached_patcher_init
    again = factory(*arguments, disable_dynamic=True)
    assert type(again) is comfy.model_patcher.ModelPatcher
    assert again.model is not patcher.model
    assert citizens.same_codes(citizens.codes(patcher), citizens.codes(again))
    assert torch.equal(citizens.run(patcher), citizens.run(again))
    assert again.get_attachment("lowbit").options == patcher.get_attachment("lowbit").options
    assert again.cached_patcher_init == patcher.cached_patcher_init


def test_select_model_device_and_multigpu_copies():
    from comfy_extras.nodes_multigpu import SelectModelDeviceNode

    patcher = citizens.load("uint4")
    whole = citizens.run(patcher)
    (chosen,) = SelectModelDeviceNode.execute(patcher, "cpu").args
    assert torch.equal(citizens.run(chosen), whole)
    copy = patcher.deepclone_multigpu(new_load_device=CPU)
    assert copy.model is not patcher.model
    assert torch.equal(citizens.run(copy), whole)


def test_an_untouched_model_is_reloaded_by_the_same_factory(tmp_path):
    """A plain checkpoint through our loader is the host's own MODEL, with our factory."""
    from safetensors.torch import save_file

    weights = citizens.floats(citizens.load("int8"))
    file = tmp_path / "plain.safetensors"
    save_file(weights, file)
    patcher = citizens.load(file)
    assert not citizens.layers(patcher)
    assert citizens.error(citizens.run(patcher), citizens.run(citizens.load("int8"))) < 1e-5
    factory, arguments = patcher.cached_patcher_init
    assert torch.equal(
        citizens.run(factory(*arguments, disable_dynamic=True)), citizens.run(patcher)
    )


def test_codes_of_every_layer_stay_in_the_file_and_a_run_copies_none(monkeypatch):
    """Fused layers too: theirs are windows on the file, and the host's casts pass them on."""
    patcher = citizens.load("int8")
    layout = pack("loaders.layouts.composite").LowBitCompositeLayout
    windows = {
        name: [tensor.data_ptr() for tensor in citizens.memory_of(module.weight)]
        for name, module in citizens.layers(patcher).items()
    }
    assert len(windows["single_blocks.0.linear1"]) == 5, "q, k, v, mlp and the side"
    maps = Path("/proc/self/maps")
    if maps.exists():  # Linux
        mapped = [
            tuple(int(end, 16) for end in line.split()[0].split("-"))
            for line in maps.read_text().splitlines()
            if line.endswith(".safetensors")
        ]
        for name, module in citizens.layers(patcher).items():
            *codes, _ = windows[name]
            if module.weight._params.spec.parts[0].weight.format.name == "int8":
                inside = [any(start <= at < end for start, end in mapped) for at in codes]
                assert all(inside), f"{name} holds codes in memory of its own"
    copies = []
    clone = layout.Params.clone
    monkeypatch.setattr(
        layout.Params, "clone", lambda self: copies.append(self.spec.parts[0].name) or clone(self)
    )
    citizens.run(patcher)
    assert not copies
    citizens.floats(patcher)
    for name, module in citizens.layers(patcher).items():
        found = [tensor.data_ptr() for tensor in citizens.memory_of(module.weight)]
        assert found == windows[name], name
