"""LoRAs by ComfyUI's own nodes on our weights: whole, partly loaded, bypassing, and taken off.

Other adapters are in ``test_citizen_adapters``.
"""

from __future__ import annotations

import citizens
import comfy.lora
import comfy.model_management as mm
import comfy.model_patcher
import comfy.sd
import folder_paths
import nodes
import pytest
import torch
from safetensors.torch import save_file
from support import pack

CPU = torch.device("cpu")
WIDTH, RANK = 256, 8
#: as LoRA files name layers -> rows, columns
DIFFUSERS = {
    "transformer.transformer_blocks.0.attn.to_q": (WIDTH, WIDTH),
    "transformer.transformer_blocks.0.attn.to_v": (WIDTH, WIDTH),
    "transformer.single_transformer_blocks.0.attn.to_k": (WIDTH, WIDTH),
    "transformer.single_transformer_blocks.0.proj_mlp": (4 * WIDTH, WIDTH),
}
NATIVE = {"diffusion_model.double_blocks.1.txt_mlp.0": (4 * WIDTH, WIDTH)}
KOHYA = {
    "lora_unet_single_blocks_1_linear2": (WIDTH, 5 * WIDTH),
    "lora_unet_double_blocks_1_img_attn_qkv": (3 * WIDTH, WIDTH),
}
#: the model's layers that the file changes
CHANGED = {
    "double_blocks.0.img_attn.qkv",
    "double_blocks.1.img_attn.qkv",
    "double_blocks.1.txt_mlp.0",
    "single_blocks.0.linear1",
    "single_blocks.1.linear2",
}
EVERY_CASE = pytest.mark.parametrize("case", citizens.CASES)


@pytest.fixture(autouse=True)
def as_nodes_run():
    """Inference mode from loading to running: the server runs every node so."""
    with torch.inference_mode():
        yield


def lora_tensors(*, whole_layers: bool = False) -> dict[str, torch.Tensor]:
    """A LoRA whose change is as large as the weights, so that effects stand above rounding."""
    generator = torch.Generator().manual_seed(7)
    tensors = {}
    for names, down, up in (
        (NATIVE if whole_layers else DIFFUSERS | NATIVE, "lora_A.weight", "lora_B.weight"),
        (KOHYA, "lora_down.weight", "lora_up.weight"),
    ):
        for name, (rows, columns) in names.items():
            tensors[f"{name}.{down}"] = torch.randn(RANK, columns, generator=generator) / RANK**0.5
            tensors[f"{name}.{up}"] = torch.randn(rows, RANK, generator=generator) / columns**0.5
            if names is KOHYA:
                tensors[f"{name}.alpha"] = torch.tensor(float(RANK))
    return tensors


@pytest.fixture
def lora_name(tmp_path):
    """A LoRA file where ComfyUI's nodes look for one."""
    known = folder_paths.folder_names_and_paths["loras"]
    folder_paths.add_model_folder_path("loras", str(tmp_path))
    folder_paths.filename_list_cache.clear()
    save_file(lora_tensors(), tmp_path / "made_up.safetensors")
    yield "made_up.safetensors"
    folder_paths.folder_names_and_paths["loras"] = known
    known[0].remove(str(tmp_path))
    folder_paths.filename_list_cache.clear()


def with_lora(patcher, name: str, strength: float = 1.0):
    return nodes.LoraLoaderModelOnly().load_lora_model_only(patcher, name, strength)[0]


def partly(patcher):
    """Load with every layer left outside, so that patches run in each forward pass."""
    patcher.patch_model(CPU, lowvram_model_memory=0.1)
    return patcher


@pytest.fixture(scope="module")
def float_models():
    """Host's own float MODELs by case: what a LoRA means."""
    made = {}

    def get(case):
        if case not in made:
            made[case] = citizens.plain_model(citizens.floats(citizens.load(case)))
        return made[case]

    return get


def applied(patcher, base: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The change of each layer's weight as it is loaded."""
    now = citizens.floats(patcher)
    return {name: now[f"{name}.weight"] - base[f"{name}.weight"] for name in CHANGED}


@EVERY_CASE
def test_a_lora_changes_the_model_as_it_does_the_float_one(case, lora_name, float_models):
    reference = float_models(case)
    base_weights = citizens.floats(reference)
    base_out = citizens.run(citizens.on_device(reference))
    patched = citizens.on_device(with_lora(reference, lora_name))
    true_out = citizens.run(patched)
    true_change = applied(patched, base_weights)
    mm.unload_model_and_clones(patched)
    assert all(change.abs().max() > 0.1 for change in true_change.values())

    ours = citizens.load(case)
    bits = citizens.codes(ours)
    out = citizens.run(ours)
    patched = with_lora(ours, lora_name)
    assert len(patched.patches) == len(CHANGED)

    for load in (partly, citizens.on_device):
        found = citizens.run(load(patched))
        assert citizens.error(found, true_out) < 1e-5
        effect, wanted = found - out, true_out - base_out
        assert ((effect - wanted).norm() / wanted.norm()).item() < 1e-4
        assert citizens.same_codes(bits, citizens.codes(ours))
        changes = applied(patched, base_weights)
        assert all(citizens.error(changes[name], true_change[name]) < 1e-4 for name in CHANGED)
        patched.detach()
    # As much of it as there is memory for is the same model, bit by bit.
    whole = citizens.run(citizens.on_device(patched))
    mm.unload_model_and_clones(patched)
    patched.partially_load(CPU, ours.model_size() * 0.6)
    assert torch.equal(citizens.run(patched), whole)
    patched.detach()
    assert citizens.floats(ours).keys() == base_weights.keys()
    mm.unload_model_and_clones(patched)
    assert citizens.same_codes(bits, citizens.codes(ours))
    assert torch.equal(citizens.run(ours), out)


@pytest.mark.parametrize("case", ["int8_mm", "uint4_had_svd", citizens.MIXED])
def test_strength_zero_changes_no_bit(case, lora_name):
    ours = citizens.load(case, compute_dtype="bf16", matmul="faithful")
    bits, out = citizens.codes(ours), citizens.run(ours)
    # The node itself gives the model back; a patch of no strength has to be as harmless.
    assert with_lora(ours, lora_name, 0.0) is ours
    patched = ours.clone()
    keys = comfy.lora.model_lora_keys_unet(ours.model, {})
    loaded = comfy.lora.load_lora(lora_tensors(), keys)
    assert patched.add_patches(loaded, 0.0)
    for load in (citizens.on_device, partly):
        load(patched)
        assert citizens.same_codes(bits, citizens.codes(patched))
        assert torch.equal(citizens.run(patched), out)
        patched.detach()
    mm.unload_model_and_clones(patched)
    assert torch.equal(citizens.run(ours), out)


def test_loras_follow_each_other_without_trace(lora_name):
    ours = citizens.load("uint4_svd")
    bits, out = citizens.codes(ours), citizens.run(citizens.on_device(ours))
    first = citizens.run(citizens.on_device(with_lora(ours, lora_name, 0.5)))
    second = citizens.run(citizens.on_device(with_lora(ours, lora_name, -1.0)))
    assert torch.equal(citizens.run(citizens.on_device(with_lora(ours, lora_name, 0.5))), first)
    assert citizens.error(first, second) > 0.01
    assert torch.equal(citizens.run(citizens.on_device(ours)), out)
    assert citizens.same_codes(bits, citizens.codes(ours))
    mm.unload_model_and_clones(ours)


def test_a_lora_moves_between_loaded_and_left_outside(lora_name):
    """Layers with a patch that are unloaded partly go on with it."""
    ours = citizens.load("int8")
    bits, out = citizens.codes(ours), citizens.run(ours)
    patched = citizens.on_device(with_lora(ours, lora_name))
    whole = citizens.run(patched)
    assert citizens.error(whole, out) > 0.1
    assert patched.partially_unload(CPU, patched.model_size() // 2) > 0
    assert torch.equal(citizens.run(patched), whole)
    patched.partially_unload(CPU, patched.model_size())
    assert torch.equal(citizens.run(patched), whole)
    patched.partially_load(CPU, patched.model_size() * 4)
    assert torch.equal(citizens.run(patched), whole)
    patched.detach()
    assert torch.equal(citizens.run(ours), out)
    assert citizens.same_codes(bits, citizens.codes(ours))
    assert torch.equal(citizens.run(partly(patched)), whole)
    patched.unpatch_model(CPU)
    assert torch.equal(citizens.run(ours), out)
    patched.patch_model(CPU)
    assert torch.equal(citizens.run(patched), whole)
    patched.unpatch_model(CPU)  # without a word to the callbacks
    assert torch.equal(citizens.run(ours), out)


def test_two_clones_with_other_loras_take_turns(lora_name):
    ours = citizens.load(citizens.MIXED)
    out = citizens.run(citizens.on_device(ours))
    one, other = with_lora(ours, lora_name, 0.5), with_lora(ours, lora_name, -0.7)
    both = with_lora(one, lora_name, -0.7)
    first = citizens.run(citizens.on_device(one))
    second = citizens.run(citizens.on_device(other))
    together = citizens.run(citizens.on_device(both))
    assert torch.equal(citizens.run(citizens.on_device(one)), first)
    assert torch.equal(citizens.run(citizens.on_device(other)), second)
    assert torch.equal(citizens.run(citizens.on_device(ours)), out)
    turned = with_lora(other, lora_name, 0.5)
    assert citizens.error(citizens.run(citizens.on_device(turned)), together) < 1e-5
    found = [out, first, second, together]
    assert all(citizens.error(a, b) > 1e-3 for n, a in enumerate(found) for b in found[:n])
    mm.unload_model_and_clones(ours)


def test_a_second_run_makes_nothing_anew(lora_name, monkeypatch):
    """Neither factors of LoRAs nor anything from a file."""
    patched = with_lora(citizens.load("uint4_svd"), lora_name)
    first = citizens.run(citizens.on_device(patched))
    carried = pack("loaders.host.carried").Patched
    source = pack("loaders.source")

    def never(*args, **kwargs):
        raise AssertionError("made anew")

    monkeypatch.setattr(carried, "prepare", never)
    monkeypatch.setattr(carried, "change", never)
    monkeypatch.setattr(source, "open_source", never)
    assert torch.equal(citizens.run(citizens.on_device(patched)), first)
    mm.unload_model_and_clones(patched)


def test_what_a_lora_takes_is_counted_while_it_is_loaded(lora_name):
    ours = citizens.load("uint4")
    patched = citizens.on_device(with_lora(ours, lora_name))
    fates = pack("loaders.host.patches").fates(patched)
    added = sum(fate.added_bytes for fate in fates)
    shapes = (DIFFUSERS | NATIVE | KOHYA).values()
    assert added == sum(RANK * (rows + columns) * 4 for rows, columns in shapes)
    assert {fate.carried for fate in fates} == {"side matmul"}
    assert {fate.kind for fate in fates} == {"lora"}
    assert patched.loaded_size() == patched.model_size() + added
    patched.partially_unload(CPU, patched.model_size())
    assert patched.loaded_size() < 0.1 * patched.model_size()
    layers = citizens.layers(ours).values()
    assert not any(made.ready or made.bytes for module in layers for made in module._made)
    mm.unload_model_and_clones(patched)
    assert patched.loaded_size() == 0
    assert not any(module._made for module in citizens.layers(ours).values())
    citizens.on_device(ours)
    assert ours.loaded_size() == ours.model_size()
    mm.unload_model_and_clones(ours)


@EVERY_CASE
def test_a_bypassing_lora_is_exact_and_touches_no_weight(case, float_models):
    # The host's bypass takes whole layers alone, of any model: it leaves out parts of a fused one.
    lora = lora_tensors(whole_layers=True)
    reference, _ = comfy.sd.load_lora_for_models(float_models(case), None, lora, 1.0, 1.0)
    wanted = citizens.run(citizens.on_device(reference))
    mm.unload_model_and_clones(reference)
    ours = citizens.load(case)
    bits, out = citizens.codes(ours), citizens.run(ours)
    patched, _ = comfy.sd.load_bypass_lora_for_models(ours, None, lora, 1.0, 1.0)
    citizens.on_device(patched)
    assert citizens.same_codes(bits, citizens.codes(patched))
    found = citizens.run(patched)
    assert citizens.error(found, wanted) < 1e-4
    assert citizens.error(found, out) > 0.1
    mm.unload_model_and_clones(patched)
    assert torch.equal(citizens.run(ours), out)


def test_a_lora_on_quantized_products(lora_name):
    """With ``faithful`` the unchanged weight still runs in int8, and the LoRA beside it."""
    ours = citizens.load("int8_mm", matmul="faithful")
    wide = {"x": torch.randn(1, 16, 12, 16, generator=torch.Generator().manual_seed(3))}
    exact = with_lora(citizens.load("int8_mm"), lora_name)
    wanted = citizens.run(citizens.on_device(exact), **wide)
    mm.unload_model_and_clones(exact)
    patched = with_lora(ours, lora_name)
    resident = citizens.run(citizens.on_device(patched), **wide)
    mm.unload_model_and_clones(patched)
    assert torch.equal(citizens.run(partly(patched), **wide), resident)
    patched.detach()
    assert 1e-4 < citizens.error(resident, wanted) < 0.1
    assert citizens.error(citizens.run(ours, **wide), wanted) > 0.1


# ------------------------------------------------------------------ modules that are no Linear


class Net(torch.nn.Module):
    """One layer of every kind that our operations know."""

    def __init__(self, ops):
        super().__init__()
        self.conv1d = ops.Conv1d(32, 24, 3)
        self.conv2d = ops.Conv2d(32, 24, 3, padding=1)
        self.conv3d = ops.Conv3d(16, 24, (1, 3, 3))
        self.embedding = ops.Embedding(40, 32)
        self.linear = ops.Linear(64, 32)

    def forward(self, name):
        generator = torch.Generator().manual_seed(11)
        x = torch.randn(INPUTS[name], generator=generator)
        if name == "embedding":
            return self.embedding(torch.tensor([[0, 39, 7], [7, 3, 3]]))
        return getattr(self, name)(x)


INPUTS = {
    "conv1d": (2, 32, 10),
    "conv2d": (2, 32, 6, 6),
    "conv3d": (2, 16, 3, 5, 5),
    "embedding": (),
    "linear": (3, 64),
}
SHAPES = {
    "conv1d": (24, 32, 3),
    "conv2d": (24, 32, 3, 3),
    "conv3d": (24, 16, 1, 3, 3),
    "embedding": (40, 32),
    "linear": (32, 64),
}
FORMATS = {"int8": {}, "uint4": {"svd_rank": 4}, "float8_e4m3fn": {}, "int6": {"group_size": 8}}
EVERY_LAYER = pytest.mark.parametrize("layer", SHAPES)
EVERY_FORMAT = pytest.mark.parametrize("fmt", FORMATS)


def net(fmt: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The net with quantized weights, and the host's own in float with the same weights."""
    import comfy.ops

    ops = pack("loaders.host.ops").make_ops(torch.float32)
    generator = torch.Generator().manual_seed(5)
    state = {}
    for name, shape in SHAPES.items():
        weight = torch.randn(shape, generator=generator) * 0.2
        how = FORMATS[fmt] | ({"embedding": True} if name == "embedding" else {})
        state[f"{name}.weight"] = citizens.composite(citizens.made(weight, fmt, **how))
        if name != "embedding":
            state[f"{name}.bias"] = torch.randn(shape[0], generator=generator)
    ours = Net(ops)
    missing, unexpected = ours.load_state_dict(dict(state), strict=False)
    assert not missing and not unexpected
    reference = Net(comfy.ops.manual_cast)
    reference.load_state_dict(
        {k: v.dequantize() if hasattr(v, "dequantize") and v.dim() > 1 else v
         for k, v in state.items()}
    )  # fmt: skip
    return ours.requires_grad_(False), reference.requires_grad_(False)


def patch_of(layer: str):
    """A LoRA of one layer as the host loads it."""
    shape = SHAPES[layer]
    generator = torch.Generator().manual_seed(13)
    down = torch.randn(RANK, *shape[1:], generator=generator) * 0.3
    up = torch.randn(shape[0], RANK, *[1] * (len(shape) - 2), generator=generator) * 0.3
    tensors = {f"{layer}.lora_down.weight": down, f"{layer}.lora_up.weight": up}
    return comfy.lora.load_lora(tensors, {layer: f"{layer}.weight"})


@EVERY_FORMAT
@EVERY_LAYER
def test_every_kind_of_layer_runs_quantized(layer, fmt):
    ours, reference = net(fmt)
    assert torch.allclose(ours(layer), reference(layer), atol=1e-5)


@EVERY_FORMAT
@EVERY_LAYER
def test_a_lora_on_every_kind_of_layer(layer, fmt):
    ours, reference = net(fmt)
    before = ours(layer)
    loaded = patch_of(layer)
    wanted = comfy.model_patcher.ModelPatcher(reference, CPU, CPU)
    assert wanted.add_patches(loaded) == [f"{layer}.weight"]
    wanted.patch_model(CPU)
    patcher = comfy.model_patcher.ModelPatcher(ours, CPU, CPU)
    assert patcher.add_patches(loaded) == [f"{layer}.weight"]
    bits = getattr(ours, layer).weight._qdata.clone()
    true = reference(layer)
    change = (true - before).norm()
    assert change > 0.2 * before.norm()
    patcher.patch_model(CPU, lowvram_model_memory=0.1)
    assert torch.allclose(ours(layer), true, atol=1e-4)
    patcher.unpatch_model(CPU)
    assert torch.equal(ours(layer), before)
    # A patcher that tells no patches: rounded in the layer's own format.
    patcher.patch_model(CPU)
    assert type(getattr(ours, layer).weight.data).__name__ == "QuantizedTensor"
    assert not torch.equal(getattr(ours, layer).weight._qdata, bits)
    wrong = ((ours(layer) - true).norm() / change).item()
    assert 1e-3 < wrong < {"int8": 0.03, "float8_e4m3fn": 0.08, "int6": 0.08, "uint4": 0.35}[fmt]
    patcher.unpatch_model(CPU)
    assert torch.equal(ours(layer), before)
    # One of ours.
    pack("loaders.host.patches").install(patcher)
    patcher.patch_model(CPU)
    assert torch.equal(getattr(ours, layer).weight._qdata, bits)
    assert torch.allclose(ours(layer), true, atol=1e-4)
    patcher.unpatch_model(CPU)
    assert torch.equal(ours(layer), before)


def test_a_state_dict_of_every_kind_of_layer():
    """What saving and memory counting see: codes, what lies beside them, the marker, the bias."""
    ours, _ = net("uint4")
    state = ours.state_dict()
    assert set(state) == {
        f"{layer}.{part}"
        for layer in SHAPES
        for part in ("weight", "weight_side", "comfy_quant", "bias")
        if (layer, part) != ("embedding", "bias")
    }
    for layer in SHAPES:
        stored = state[f"{layer}.weight"].view(torch.uint8)
        assert torch.equal(stored, getattr(ours, layer).weight._qdata)
        beside = state[f"{layer}.weight_side"].view(torch.uint8)
        assert torch.equal(beside, getattr(ours, layer).weight._params.scale)


def test_an_embedding_of_several_parts():
    made = citizens.made
    table = citizens.composite(
        {
            "first": made(torch.randn(24, 32), "uint4", embedding=True),
            "rest": made(torch.randn(16, 32), "int8", embedding=True),
        }
    )
    ours, _ = net("int8")
    ours.load_state_dict({"embedding.weight": table}, strict=False)
    index = torch.tensor([0, 23, 24, 39])
    assert torch.equal(ours.embedding(index), table.dequantize()[index])


def test_a_weight_of_another_shape_is_refused():
    ours, _ = net("int8")
    for layer, shape in SHAPES.items():
        wrong = citizens.composite(citizens.made(torch.randn(shape[0] + 8, *shape[1:]), "int8"))
        with pytest.raises(RuntimeError, match=f"{layer}.weight"):
            ours.load_state_dict({f"{layer}.weight": wrong}, strict=False)


def test_plain_weights_stay_the_hosts_own():
    """A layer that the checkpoint leaves in float behaves as in the host's operations."""
    import comfy.ops

    _, reference = net("int8")
    ours = Net(pack("loaders.host.ops").make_ops(torch.float32))
    ours.load_state_dict(reference.state_dict())
    assert not hasattr(ours.conv2d, "convert_weight") and not hasattr(ours.conv2d, "set_weight")
    assert issubclass(type(ours.conv2d), comfy.ops.manual_cast.Conv2d)
    for layer in SHAPES:
        assert torch.equal(ours(layer), reference(layer))
    assert set(ours.state_dict()) == set(reference.state_dict())
