"""Adapters on whole low-bit MODELs: scheduled hooks, torch.compile, the options, the account."""

from __future__ import annotations

import citizens
import comfy.hooks
import comfy.lora
import comfy.model_management as mm
import comfy.sd
import comfy.weight_adapter
import pytest
import torch
from comfy.hooks import EnumHookMode, EnumWeightTarget, HookKeyframe, HookKeyframeGroup
from comfy_extras.nodes_model_merging import save_checkpoint
from support import pack
from test_citizen_adapters import (
    fully,
    lokr,
    lora,
    noise,
    off,
    ours_of,
    patcher_of,
    scales,
    weight_of,
)
from test_citizen_compile import compiled
from test_citizen_compile import run as run_wrapped

CPU = torch.device("cpu")
#: layers of the model, and what is in each file
LAYERS = {
    "double_blocks.0.img_attn.qkv": (768, 256),
    "double_blocks.1.txt_mlp.0": (1024, 256),
    "single_blocks.0.linear2": (256, 1280),
}


@pytest.fixture(autouse=True)
def as_nodes_run():
    """Inference mode from loading to running: the server runs every node so."""
    with torch.inference_mode():
        yield


def file_of(make, factor: float = 8.0, **more) -> dict[str, torch.Tensor]:
    """An adapter of every layer, by native names; strong, so that its effect stands out."""
    tensors = {}
    for name, (rows, columns) in LAYERS.items():
        for key, value in make(rows, columns).items():
            strong = value * factor if key.endswith(("up.weight", "w1_a", "w2_a")) else value
            tensors[f"diffusion_model.{name}.{key}"] = strong
    return tensors


LORA = file_of(lora)
LOKR = file_of(lokr)
DORA = file_of(lambda rows, columns: lora(rows, columns, **scales(rows, 1)))


def with_file(patcher, tensors, strength: float = 1.0):
    changed, _ = comfy.sd.load_lora_for_models(patcher, None, tensors, strength, 0)
    assert len(changed.patches) == len(LAYERS)
    return changed


# --------------------------------------------------------------------------------------- hooks


def hooked(patcher, tensors, strength: float, keyframes=()):
    """A clone that knows a LoRA hook, as conditioning with hooks prepares it."""
    clone = patcher.clone()
    group = comfy.hooks.create_hook_lora(tensors, strength, 0.0)
    if keyframes:
        frames = HookKeyframeGroup()
        for start, frame_strength in keyframes:
            frame = HookKeyframe(frame_strength, start_percent=start, guarantee_steps=0)
            frame.start_t = 1.0 - start
            frames.add(frame)
        for hook in group.hooks:
            hook.hook_keyframe = frames
    clone.register_all_hook_patches(group, comfy.hooks.create_target_dict(EnumWeightTarget.Model))
    return clone, group


@pytest.mark.parametrize("mode", [EnumHookMode.MaxSpeed, EnumHookMode.MinVram])
@pytest.mark.parametrize("where", ["whole", "outside"])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_lora_hooks_come_and_go(mode, where, kind):
    """Conditionings with and without a hook take turns in each step, beside a LoRA of the MODEL."""
    tensors = {"lora": LORA, "dora": DORA}[kind]
    ours = citizens.load("uint4_svd")
    bits, floats = citizens.codes(ours), citizens.floats(ours)
    reference = citizens.plain_model(floats)
    results = []
    for base in (reference, ours):
        with_lokr = with_file(base, LOKR, 0.5)
        clone, group = hooked(with_lokr, tensors, 0.8)
        clone.set_hook_mode(mode if base is ours else EnumHookMode.MinVram)
        if where == "whole" or base is reference:  # the host's hooks forget partial loads' patches
            citizens.on_device(clone)
        else:
            clone.patch_model(CPU, lowvram_model_memory=0.1)
        found = []
        for _ in range(2):
            for hooks in (group, None):
                clone.apply_hooks(hooks)
                found.append(citizens.run(clone))
        results.append(found)
        clone.clean_hooks()
        clone.cleanup()
        assert torch.equal(citizens.run(clone), found[1])
        clone.detach()
    wanted, found = results
    assert citizens.error(wanted[0], wanted[1]) > 0.01
    for one, other in zip(found, wanted, strict=True):
        assert citizens.error(one, other) < 1e-4
    assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[3])
    assert citizens.same_codes(bits, citizens.codes(ours))
    mm.unload_all_models()


def test_scheduled_hooks_follow_their_keyframes():
    """A hook whose strength changed is taken off without a callback before what comes next."""
    ours = citizens.load(citizens.MIXED)
    base = citizens.run(citizens.on_device(ours))
    clone, group = hooked(ours, LORA, 1.0, keyframes=((0.0, 1.0), (0.5, 0.25), (0.8, 0.0)))
    citizens.on_device(clone)
    options = {"transformer_options": {"sample_sigmas": torch.tensor([1.0, 0.5, 0.0])}}
    for at, strength in ((1.0, 1.0), (0.5, 0.25), (0.1, 0.0)):
        time = torch.tensor([at])
        clone.prepare_hook_patches_current_keyframe(time, group, options)
        clone.prepare_state(time, options)
        clone.apply_hooks(None)
        assert torch.equal(citizens.run(clone), base), at
        clone.apply_hooks(group)
        found = citizens.run(clone)
        mm.unload_model_and_clones(clone)
        wanted = citizens.run(citizens.on_device(with_file(ours, LORA, strength or 1e-9)))
        assert citizens.error(found, wanted) < 1e-5, at
        mm.unload_all_models()
        citizens.on_device(clone)
        clone.apply_hooks(group)
        assert torch.equal(citizens.run(clone), found), at
    mm.unload_all_models()


# ------------------------------------------------------------------------------- torch.compile


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def test_a_compiled_layer_with_loras_is_one_graph(fresh_compiler):
    """Without a patch, with some, with others, and without again: never a break."""
    for scheme in ("sdnq svd", "svdq int4"):
        net = ours_of(weight_of(scheme))
        x = noise(5, 128, seed=4)
        run = torch.compile(net.layer, backend="aot_eager", fullgraph=True)
        before = net.layer(x)
        for rank, strength in ((8, 1.0), (8, -0.5), (4, 1.0)):
            assert citizens.error(run(x), before) < 1e-5
            given = {f"layer.{name}": part for name, part in lora(96, 128, rank).items()}
            given = comfy.lora.load_lora(given, {"layer": "layer.weight"})
            patcher = patcher_of(net, (given, strength))
            fully(patcher)
            wanted = net.layer(x)
            assert citizens.error(run(x), wanted) < 1e-5
            graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
            assert citizens.error(run(x), wanted) < 1e-5
            assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
            assert citizens.error(wanted, before) > 1e-3
            patcher.unpatch_model(CPU)


@pytest.mark.slow
def test_a_compiled_model_with_a_lora_is_one_graph(fresh_compiler):
    ours = citizens.load("uint4_svd")
    one, other = with_file(ours, LORA), with_file(ours, LORA, -0.5)
    eager = [run_wrapped(citizens.on_device(patcher)) for patcher in (one, other, ours)]
    clones = [compiled(patcher, fullgraph=True) for patcher in (one, other, ours)]
    first = run_wrapped(citizens.on_device(clones[0]))
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs == 1
    assert citizens.error(first, eager[0]) < 1e-5
    assert citizens.error(run_wrapped(clones[0]), eager[0]) < 1e-5
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    for clone, wanted in zip(clones[1:], eager[1:], strict=True):
        assert citizens.error(run_wrapped(citizens.on_device(clone)), wanted) < 1e-5
    assert citizens.error(eager[0], eager[2]) > 0.01
    mm.unload_all_models()


@pytest.mark.slow
def test_a_compiled_model_with_other_adapters_gives_the_same_numbers(fresh_compiler):
    """What is calculated in a step stays outside of the graph."""
    ours = citizens.load("uint4_svd")
    patched = with_file(ours, DORA)
    eager = run_wrapped(citizens.on_device(patched))
    clone = compiled(patched)
    assert citizens.error(run_wrapped(citizens.on_device(clone)), eager) < 1e-5
    mm.unload_all_models()


# --------------------------------------------------------------------------------- the options


def fates_of(patcher):
    return pack("loaders.host.patches").fates(patcher)


def test_a_branch_of_low_rank_instead_of_a_calculated_change():
    node = pack("nodes.lora").LowBitLoRAOptions
    ours = citizens.load("uint4_svd")
    exact = with_file(ours, LOKR)
    out, wanted = citizens.run(citizens.on_device(ours)), citizens.run(citizens.on_device(exact))
    meant = {name: citizens.floats(exact)[f"{name}.weight"] for name in LAYERS}
    base = {name: citizens.floats(citizens.on_device(ours))[f"{name}.weight"] for name in LAYERS}
    assert {fate.carried for fate in fates_of(exact)} == {"dequantized weight"}
    wrong = {}
    for rank in (4, 8, 16):
        (chosen,) = node.execute(exact, "svd", rank).args
        before = {fate.key: fate for fate in fates_of(chosen)}
        assert {fate.retained_energy for fate in before.values()} == {None}
        assert {fate.carried for fate in before.values()} == {"svd branch"}
        assert {fate.kind for fate in before.values()} == {"lokr"}
        found = citizens.run(citizens.on_device(chosen))
        told = {fate.key: fate for fate in fates_of(chosen)}
        for name, (rows, columns) in LAYERS.items():
            fate = told[f"diffusion_model.{name}.weight"]
            change = (meant[name] - base[name]).double()
            energy = torch.linalg.svdvals(change).square()
            assert abs(fate.retained_energy - (energy[:rank].sum() / energy.sum()).item()) < 1e-3
            assert fate.added_bytes == rank * (rows + columns) * 4
        for load in (citizens.on_device, None):  # again from nothing: the same
            if load is None:
                mm.unload_model_and_clones(chosen)
                chosen.patch_model(CPU, lowvram_model_memory=0.1)
            assert torch.equal(citizens.run(chosen), found)
        chosen.detach()
        wrong[rank] = off(found - out, wanted - out)
    assert wrong[16] < 1e-3 < wrong[8] < wrong[4] < 1  # it is of rank 4 x 4
    # And back: the option is the clone's own.
    assert citizens.error(citizens.run(citizens.on_device(exact)), wanted) == 0
    (again,) = node.execute(chosen, "exact", 64).args
    assert torch.equal(citizens.run(citizens.on_device(again)), wanted)
    mm.unload_all_models()


def test_options_on_a_model_without_low_bit_layers():
    plain = citizens.plain_model(citizens.floats(citizens.load("int8")))
    with pytest.raises(pack("quant.errors").LowBitError, match="no low-bit layers"):
        pack("nodes.lora").LowBitLoRAOptions.execute(plain, "svd", 8)


def test_the_account_of_every_patch():
    ours = citizens.load(citizens.MIXED)
    patched = with_file(with_file(ours, LORA, 0.5), DORA, -0.25)
    key = "diffusion_model.double_blocks.0.img_attn.qkv"
    patched.add_patches({f"{key}.bias": ("diff", (noise(768),))}, 0.1)
    factors = (noise(256, 2), noise(2, 256), None, None, None, None)
    piece = ("diffusion_model.single_blocks.1.linear1.weight", (0, 256, 256))
    patched.add_patches({piece: comfy.weight_adapter.LoRAAdapter(set(), factors)}, 1.0)
    patched.add_patches({f"{key}.weight": ("diff", (noise(768, 256),))}, 0.0)
    fates = fates_of(patched)
    by_key = {}
    for fate in fates:
        by_key.setdefault(fate.key, []).append((fate.kind, fate.carried, fate.strength))
    assert by_key[f"{key}.weight"] == [
        ("lora", "dequantized weight", 0.5),  # a DoRA that follows depends on it
        ("dora", "dequantized weight", -0.25),
        ("diff", "nothing", 0.0),
    ]
    assert by_key[f"{key}.bias"] == [("diff", "float weight", 0.1)]
    single = by_key["diffusion_model.single_blocks.1.linear1.weight"]
    assert single == [("lora", "side matmul", 1.0)]
    assert [f.added_bytes for f in fates if "linear1" in f.key] == [2 * (256 + 256) * 4]
    assert fates_of(ours) == ()


def test_what_is_exact_while_running_is_so_after_saving(tmp_path):
    """A model with low-rank branches: running after ModelSave, and the file, are both exact."""
    ours = citizens.load("uint4_svd")
    patched = with_file(ours, LORA)
    wanted = citizens.run(citizens.on_device(patched))
    save_checkpoint(patched, filename_prefix="saved", output_dir=str(tmp_path))
    assert torch.equal(citizens.run(citizens.on_device(patched)), wanted)
    mm.unload_all_models()
    (file,) = tmp_path.glob("*.safetensors")
    assert citizens.error(citizens.run(citizens.load(file)), wanted) < 0.01
    assert citizens.error(citizens.run(ours), wanted) > 0.02
