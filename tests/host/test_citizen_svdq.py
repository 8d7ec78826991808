"""SVDQuant weights as citizens of the host: products, LoRAs, partial loads, saving.

What ``test_citizen_*`` ask of SDNQ weights, of a FLUX checkpoint in int4 and one in nvfp4. Their
layers have parts with a smoothing and a branch each, shifted activations, and zero points.
"""

from __future__ import annotations

from functools import cache

import citizens
import comfy.lora
import comfy.model_management as mm
import comfy.sd
import pytest
import svdq_formulas
import svdq_models
import torch
from comfy_extras.nodes_model_merging import save_checkpoint
from support import pack
from test_citizen_lora import partly

CPU = torch.device("cpu")
RANK = 8
EVERY_CASE = pytest.mark.parametrize("case", ["int4", "nvfp4"])
#: 4-bit layers of the model: two blocks of each kind
LAYERS = 26


@pytest.fixture(autouse=True)
def as_nodes_run():
    """Inference mode from loading to running: the server runs every node so."""
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tensors are tiny here: threads only get in each other's way."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """``made(case)``: a checkpoint and what was put into it."""
    folder = tmp_path_factory.mktemp("svdq")

    @cache
    def write(case: str) -> svdq_models.Made:
        return svdq_models.make("flux", folder / f"{case}.safetensors", precision=case)

    return write


@pytest.fixture(scope="module")
def float_model(made):
    """The host's own float MODEL of a case: what a LoRA means."""
    return cache(lambda case: citizens.plain_model(made(case).native()))


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def lora_of(patcher, names=None) -> dict[str, torch.Tensor]:
    """A LoRA that changes layers about as much as they are, by their native names."""
    tensors = {}
    for number, (name, module) in enumerate(citizens.layers(patcher).items()):
        if names is not None and name not in names:
            continue
        rows, columns = module.weight.shape
        key = f"diffusion_model.{name}"
        tensors[f"{key}.lora_A.weight"] = noise(RANK, columns, seed=2 * number) / RANK**0.5
        tensors[f"{key}.lora_B.weight"] = noise(rows, RANK, seed=2 * number + 1) / columns**0.5
    return tensors


def with_lora(patcher, lora: dict[str, torch.Tensor], strength: float = 1.0):
    """By the function behind the stock nodes."""
    changed, _ = comfy.sd.load_lora_for_models(patcher, None, lora, strength, 0)
    assert len(changed.patches) == len(lora) // 2
    return changed


def off(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Norm of the difference relative to the expected one."""
    return ((found - wanted).norm() / wanted.norm()).item()


#: Noises for a model that rounds activations. Weights that lie elsewhere in memory move the last
#: bits of float products, and once in a while a code with them: not in every pass.
PASSES = [{}, *({"x": noise(1, 16, 4, 6, seed=seed)} for seed in (21, 22))]


def runs(patcher) -> list[torch.Tensor]:
    return [citizens.run(patcher, **changed) for changed in PASSES]


def same(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> bool:
    """Whether two models are the same one: some pass agrees."""
    return min(citizens.error(*both) for both in zip(found, wanted, strict=True)) < 1e-5


# ------------------------------------------------------------------------------------- products


def by_hand(layer: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """The parts of a layer one by one with the reference kernels, joined in float32."""
    composite = pack("loaders.layouts.composite")
    faithful, reference = pack("kernels.faithful"), pack("kernels.reference")
    weight = layer.weight.data
    spec, outputs, start = weight._params.spec, [], 0
    for number, part in enumerate(spec.parts):
        piece = x
        if spec.axis == 1:
            piece = x[..., start : start + part.weight.shape[1]]
            start += part.weight.shape[1]
        tensors = composite.part_tensors(composite.held_by(weight), spec, number)
        one = faithful.linear_faithful
        if part.weight.activation is None:
            one = reference.linear_dequantize
        outputs.append(one(piece, tensors, part.weight, None).float())
    y = torch.cat(outputs, -1) if spec.axis == 0 else sum(outputs)
    return y + layer.bias.float()


@EVERY_CASE
def test_a_composite_is_its_parts(made, case):
    """Single blocks: two layers of the file side by side, and two that share the columns."""
    patcher = citizens.load(made(case).path, matmul="faithful")
    first, second = (citizens.layers(patcher)[f"single_blocks.0.linear{n}"] for n in (1, 2))
    parts = {layer: layer.weight._params.spec.parts for layer in (first, second)}
    assert [part.name.rpartition(".")[2] for part in parts[first]] == ["qkv_proj", "mlp_fc1"]
    assert [part.name.rpartition(".")[2] for part in parts[second]] == ["out_proj", "mlp_fc2"]
    assert first.weight._params.spec.axis == 0 and second.weight._params.spec.axis == 1
    shifts = [part.weight.activation.shift for layer in parts.values() for part in layer]
    assert shifts == [0, 0, 0, svdq_models.SHIFT if case == "int4" else 0]
    for layer, name in ((first, "single_blocks.0.linear1"), (second, "single_blocks.0.linear2")):
        x = noise(2, 20, layer.in_features, seed=3)
        if layer is second:
            x = torch.nn.functional.gelu(x, approximate="tanh")
        found = layer(x)
        assert citizens.error(found, by_hand(layer, x)) < 1e-6
        assert off(found, svdq_formulas.formula(made(case), name)(x)) < 2e-3
        exact = torch.nn.functional.linear(x, layer.weight.data.dequantize(), layer.bias)
        assert 0.02 < off(found, exact) < 0.3


@EVERY_CASE
def test_what_auto_does_where_no_kernel_is_fast(made, case):
    """W4A4 needs a kernel to be worth it; without one the weights are dequantized."""
    exact = citizens.run(citizens.load(made(case).path, matmul="dequantize"))
    automatic = citizens.run(citizens.load(made(case).path, matmul="auto"))
    rounded = citizens.run(citizens.load(made(case).path, matmul="faithful"))
    if not torch.cuda.is_available():
        assert citizens.error(automatic, exact) < 1e-5
    assert 1e-3 < citizens.error(rounded, exact) < 0.5


# ----------------------------------------------------------------------------------------- LoRAs


@EVERY_CASE
def test_a_lora_changes_every_layer_as_it_does_the_float_one(made, float_model, case):
    reference = float_model(case)
    ours = citizens.load(made(case).path)
    lora = lora_of(ours)
    assert len(lora) == 2 * LAYERS
    base, base_out = citizens.floats(reference), citizens.run(citizens.on_device(reference))
    patched = citizens.on_device(with_lora(reference, lora))
    true, true_out = citizens.floats(patched), citizens.run(patched)
    mm.unload_model_and_clones(patched)
    bits, out, before = citizens.codes(ours), citizens.run(ours), citizens.floats(ours)
    assert off(out, base_out) < 1e-5
    patched = with_lora(ours, lora)

    # Partly loaded: the weight is dequantized and patched in every pass. Exact.
    assert citizens.error(citizens.run(partly(patched)), true_out) < 1e-4
    assert citizens.same_codes(bits, citizens.codes(ours))
    patched.detach()

    # Wholly loaded: the same.
    assert citizens.error(citizens.run(citizens.on_device(patched)), true_out) < 1e-5
    now = citizens.floats(patched)
    for name in citizens.layers(ours):
        key = f"{name}.weight"
        assert citizens.error(now[key] - base[key], true[key] - base[key]) < 1e-4, name
        assert torch.equal(now[f"{name}.bias"], before[f"{name}.bias"]), name
    assert citizens.same_codes(bits, citizens.codes(patched))

    mm.unload_model_and_clones(patched)
    assert citizens.same_codes(bits, citizens.codes(ours))
    assert torch.equal(citizens.run(ours), out)


@EVERY_CASE
def test_a_lora_on_faithful_products(made, case):
    """A patched layer that is resident still rounds its activations, shifted ones rightly."""
    ours = citizens.load(made(case).path, matmul="faithful")
    plain = citizens.run(ours)
    names = {name for name in citizens.layers(ours) if name.endswith(("mlp.2", "linear2"))}
    assert len(names) == 6
    patched = with_lora(ours, lora_of(ours, names))
    outside = citizens.run(partly(patched))
    patched.detach()
    resident = citizens.run(citizens.on_device(patched))
    assert torch.equal(outside, resident)
    meant = citizens.floats(patched)
    for name in names:
        layer = citizens.layers(patched)[name]
        x = torch.nn.functional.gelu(noise(20, layer.in_features, seed=5), approximate="tanh")
        wanted = torch.nn.functional.linear(x, meant[f"{name}.weight"], layer.bias)
        assert 1e-3 < off(layer(x), wanted) < 0.2, name
    mm.unload_model_and_clones(patched)
    exact = with_lora(citizens.load(made(case).path), lora_of(ours, names))
    exact = citizens.run(citizens.on_device(exact))
    assert off(resident, exact) < 0.5 * off(plain, exact)
    assert torch.equal(citizens.run(ours), plain)


@EVERY_CASE
def test_a_bypassing_lora_is_exact_and_touches_no_weight(made, float_model, case):
    ours = citizens.load(made(case).path)
    lora = lora_of(ours)
    reference, _ = comfy.sd.load_lora_for_models(float_model(case), None, lora, 0.5, 0)
    wanted = citizens.run(citizens.on_device(reference))
    mm.unload_model_and_clones(reference)
    bits, out = citizens.codes(ours), citizens.run(ours)
    patched, _ = comfy.sd.load_bypass_lora_for_models(ours, None, lora, 0.5, 0)
    found = citizens.run(citizens.on_device(patched))
    assert citizens.same_codes(bits, citizens.codes(patched))
    assert citizens.error(found, wanted) < 1e-4
    assert citizens.error(found, out) > 0.05
    mm.unload_model_and_clones(patched)
    assert torch.equal(citizens.run(ours), out)


@EVERY_CASE
def test_strength_zero_changes_no_bit(made, case):
    ours = citizens.load(made(case).path, matmul="faithful")
    bits, out = citizens.codes(ours), citizens.run(ours)
    keys = comfy.lora.model_lora_keys_unet(ours.model, {})
    patched = ours.clone()
    assert patched.add_patches(comfy.lora.load_lora(lora_of(ours), keys), 0.0)
    citizens.on_device(patched)
    assert patched.backup
    assert citizens.same_codes(bits, citizens.codes(patched))
    assert torch.equal(citizens.run(patched), out)
    mm.unload_model_and_clones(patched)


# --------------------------------------------------------------------- memory, saving, other nodes


@EVERY_CASE
@pytest.mark.parametrize("matmul", ["dequantize", "faithful"])
def test_partly_loaded_it_is_the_same_model(made, case, matmul):
    ours = citizens.load(made(case).path, matmul=matmul)
    whole = runs(citizens.on_device(ours))
    mm.unload_model_and_clones(ours)
    bits = citizens.codes(ours)
    assert same(runs(partly(ours)), whole)
    assert citizens.same_codes(bits, citizens.codes(ours))
    ours.detach()
    # At full depth the modulation, the norms and the embedders weigh less against it.
    assert ours.model_size() < 0.5 * sum(v.numel() * 4 for v in made(case).native().values())


def saved(patcher, folder):
    """What the node ModelSave writes."""
    save_checkpoint(patcher, filename_prefix="saved", output_dir=str(folder))
    mm.unload_model_and_clones(patcher)
    (file,) = folder.glob("*.safetensors")
    return file


@EVERY_CASE
def test_a_saved_model_comes_back_bit_by_bit(made, case, tmp_path):
    ours = citizens.load(made(case).path, matmul="faithful")
    bits, out, weights = citizens.codes(ours), runs(ours), citizens.floats(ours)
    file = saved(ours, tmp_path)
    assert file.stat().st_size < ours.model_size() * 1.05
    again = citizens.load(file, matmul="faithful")
    assert again.get_attachment("lowbit").scheme == "lowbit"
    assert citizens.same_codes(bits, citizens.codes(again))
    here, there = citizens.layers(ours), citizens.layers(again)
    assert here.keys() == there.keys() and len(here) == LAYERS
    for name, module in here.items():
        assert module.weight._params.spec == there[name].weight._params.spec, name
        x = noise(3, module.in_features, seed=6)
        assert torch.equal(module(x), there[name](x)), name
    for name, value in citizens.floats(again).items():
        assert torch.equal(value, weights[name]), name
    assert same(runs(again), out)
    exact = citizens.run(citizens.load(file, matmul="dequantize"))
    wanted = citizens.run(citizens.plain_model(made(case).native()))
    assert citizens.error(exact, wanted) < 1e-5


@EVERY_CASE
def test_a_lora_is_baked_into_what_is_saved(made, case, tmp_path):
    ours = citizens.load(made(case).path, matmul="faithful")
    bits = citizens.codes(ours)
    clone = citizens.on_device(with_lora(ours, lora_of(ours)))
    meant, out = citizens.floats(clone), runs(clone)
    mm.unload_model_and_clones(clone)
    again = citizens.load(saved(clone, tmp_path), matmul="faithful")
    found, before = citizens.floats(again), citizens.floats(ours)
    for name, layer in citizens.layers(ours).items():
        key = f"{name}.weight"
        wrong = off(found[key] - before[key], meant[key] - before[key])
        ranks = [part.weight.rank for part in layer.weight._params.spec.parts]
        now = [part.weight.rank for part in citizens.layers(again)[name].weight._params.spec.parts]
        if all(ranks):  # further rank of the branch
            assert wrong < 1e-2 and now == [rank + -(-RANK // 16) * 16 for rank in ranks], name
        else:  # rounded anew
            assert now == ranks and wrong < 0.5, (name, wrong)
    plain = runs(ours)
    for one, meant_one, without in zip(runs(again), out, plain, strict=True):
        assert off(one, meant_one) < 0.5 * off(without, meant_one)
    assert citizens.same_codes(bits, citizens.codes(ours))


@EVERY_CASE
def test_expand_rounds_every_layer_to_dense_int8(made, case):
    expanded = citizens.load(made(case).path, matmul="expand")
    weights = made(case).native()
    for name, module in citizens.layers(expanded).items():
        for part in module.weight._params.spec.parts:
            assert part.weight.format.name == "int8" and not part.weight.rank, name
            assert not part.weight.smoothing and part.weight.activation is None, name
        assert off(module.weight.data.dequantize(), weights[f"{name}.weight"]) < 0.02, name
    exact = citizens.run(citizens.load(made(case).path, matmul="dequantize"))
    assert 0 < off(citizens.run(expanded), exact) < 0.1
