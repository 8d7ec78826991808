"""Quantizing a MODEL: the source stays, everything on it comes along, and it behaves as a MODEL."""

from __future__ import annotations

import gc
import weakref

import citizens
import comfy.lora
import comfy.model_management as mm
import comfy.sample
import comfy.utils
import pytest
import torch
from comfy.patcher_extension import CallbacksMP, WrappersMP
from support import pack

CHANGED = "diffusion_model.double_blocks.0.img_attn.qkv.weight"
CASES = {
    "uint4-svd": ("sdnq", {"weights_dtype": "uint4", "use_svd": True}),
    "svdquant": ("svdquant", {}),
    "fp8": ("fp8", {}),
    "fp8-block": ("fp8", {"granularity": "block"}),
    "nvfp4": ("nvfp4", {}),
    "mxfp8": ("mxfp8", {}),
    "int8": ("int8", {}),
    "int4": ("int4", {"symmetric": False}),
}


@pytest.fixture(autouse=True)
def as_nodes_run():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def weights():
    """Float weights under native names."""
    return citizens.floats(citizens.load("int8"))


@pytest.fixture
def source(weights):
    return citizens.plain_model(weights)


def quantized(patcher, case, recipe=None, **how):
    method, settings = CASES[case]
    recipe = {"settings": settings, **(recipe or {})}
    made = pack("quant.recipe").Recipe.make(method, recipe.pop("settings"), **recipe)
    return pack("loaders.host.rebuild").quantize_model(patcher, made, **how)


def state_of(patcher):
    mm.unload_model_and_clones(patcher)
    return {k: v.clone() for k, v in patcher.model.diffusion_model.state_dict().items()}


def dequantized(patcher):
    """What the layers multiply with, by the host's own dequantization where the format is its."""
    floats = pack("loaders.host.rebuild").ModelFloats(patcher)
    return {key: floats.read(key).float() for key in floats.shapes}


def lora(patcher, seed=2, key=CHANGED):
    clone = patcher.clone()
    shape = comfy.utils.get_attr(patcher.model, key).shape
    generator = torch.Generator().manual_seed(seed)
    up = torch.randn(shape[0], 2, generator=generator) * 0.05
    down = torch.randn(2, shape[1], generator=generator) * 0.05
    tensors = {"layer.lora_up.weight": up, "layer.lora_down.weight": down}
    assert clone.add_patches(comfy.lora.load_lora(tensors, {"layer": key}), 0.7)
    return clone, 0.7 * up @ down


@pytest.mark.parametrize("case", CASES)
def test_the_source_stays_and_the_forward_is_that_of_the_weights(source, case):
    before = state_of(source)
    made, report = quantized(source, case)
    after = state_of(source)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert made.model is not source.model and type(made.model) is type(source.model)
    assert made.model_size() < source.model_size() / 2
    assert report.totals.layers >= 25 and report.chart is not None
    out = citizens.run(citizens.on_device(made))
    wanted = citizens.run(citizens.on_device(citizens.plain_model(dequantized(made))))
    rounds_activations = case in ("svdquant", "int8")
    assert citizens.error(out, wanted) < (0.2 if rounds_activations else 2e-5)
    floats = citizens.run(citizens.on_device(source))
    assert not torch.equal(out, floats) and citizens.error(out, floats) < 0.6


def test_weights_are_those_of_the_engine(source, weights):
    """One layer by hand, whole and in the parts that SVDQuant makes of another."""
    made, _ = quantized(source, "uint4-svd")
    recipe = pack("quant.recipe").Recipe.make("sdnq", CASES["uint4-svd"][1])
    name = "double_blocks.1.img_mlp.0"
    weight = weights[f"{name}.weight"]
    wanted, error = pack("quant.engine").quantize_layer(weight, recipe.decide(name, weight.shape))
    module = made.model.diffusion_model.get_submodule(name)
    ((_, found, _),) = pack("loaders.layouts.composite").parts_of(module.weight)
    for key, tensor in wanted.tensors.items():
        assert torch.equal(found.tensors[key].view(torch.uint8), tensor.view(torch.uint8)), key
    report = made.get_attachment("lowbit_quantized")
    assert report.layers[name].relative == error.relative
    made, report = quantized(source, "svdquant")
    spec = made.model.diffusion_model.single_blocks[0].linear2.weight._params.spec
    assert spec.axis == 1 and len(spec.parts) == 2
    assert sum("single_blocks.0.linear2[" in key for key in report.layers) == 2


@pytest.mark.parametrize("case", ["uint4-svd", "fp8", "int4"])
def test_a_lora_stays_a_patch_and_is_exact(source, case):
    patched, delta = lora(source)
    made, _ = quantized(patched, case)
    assert CHANGED in made.patches
    plain, _ = quantized(source, case)
    assert citizens.same_codes(citizens.codes(made), citizens.codes(plain))
    wanted = dequantized(plain)
    wanted[CHANGED.removeprefix("diffusion_model.")] += delta
    expected = citizens.run(citizens.on_device(citizens.plain_model(wanted)))
    assert citizens.error(citizens.run(citizens.on_device(made)), expected) < 2e-5
    mm.unload_model_and_clones(made)
    assert citizens.error(citizens.run(citizens.on_device(plain)), expected) > 1e-3


def test_a_lora_is_baked_if_asked(source, weights):
    patched, delta = lora(source)
    made, _ = quantized(patched, "int4", bake=True)
    assert not made.patches and CHANGED in patched.patches
    merged = dict(weights)
    merged[CHANGED.removeprefix("diffusion_model.")] = (
        weights[CHANGED.removeprefix("diffusion_model.")] + delta
    )
    wanted, _ = quantized(citizens.plain_model(merged), "int4")
    found, expected = dequantized(made), dequantized(wanted)
    for key, value in expected.items():
        assert (found[key] - value).norm() <= 1e-3 * value.norm(), key
    # also while the source is loaded with it, which the host merges in place
    again, _ = quantized(citizens.on_device(patched), "int4", bake=True)
    assert citizens.same_codes(citizens.codes(again), citizens.codes(made))


def test_options_hooks_and_patches_come_along(source):
    calls = []
    source.set_model_unet_function_wrapper(
        lambda apply, given: calls.append(1) or apply(given["input"], given["timestep"])
    )
    source.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "test", lambda run, *a, **k: run(*a, **k))
    source.add_callback_with_key(CallbacksMP.ON_LOAD, "test", lambda *a: calls.append(2))
    source.set_attachments("mine", "kept")
    source.add_object_patch("model_sampling", source.get_model_object("model_sampling"))
    made, _ = quantized(source, "fp8")
    assert "model_function_wrapper" in made.model_options
    assert made.wrappers[WrappersMP.APPLY_MODEL]["test"]
    assert made.get_attachment("mine") == "kept" and "model_sampling" in made.object_patches
    citizens.on_device(made)
    assert 2 in calls
    assert made.get_attachment("lowbit").scheme.startswith("quantized here: FP8")
    assert "float8_e4m3fn" in pack("loaders.host.loaded").report_on(made).text


@pytest.mark.parametrize("case", ["uint4-svd", "nvfp4", "int8"])
def test_reloading_gives_the_quantized_weights(source, case):
    made, _ = quantized(source, case)
    out = citizens.run(citizens.on_device(made))
    factory, arguments = made.cached_patcher_init
    again = factory(*arguments, disable_dynamic=True)
    assert again.model is not made.model
    plain = dict(made.model.diffusion_model.named_parameters())
    for name, there in again.model.diffusion_model.named_parameters():
        if not hasattr(there, "dequantize") or type(there) is torch.nn.Parameter:
            assert there.data_ptr() != plain[name].data_ptr(), name  # patched in place by hooks
    assert torch.equal(citizens.run(citizens.on_device(again)), out)
    patched, _ = lora(again)
    citizens.run(citizens.on_device(patched))
    third = factory(*arguments, disable_dynamic=True)
    assert torch.equal(citizens.run(citizens.on_device(third)), out)


def test_the_source_can_be_freed(weights):
    source = citizens.plain_model(weights)
    alive = weakref.ref(source.model)
    made, _ = quantized(source, "fp8")
    mm.unload_all_models()
    del source
    gc.collect()
    assert alive() is None
    assert citizens.run(citizens.on_device(made)).isfinite().all()


def test_an_interrupt_at_any_layer_leaves_the_source(source):
    floats = citizens.run(citizens.on_device(source))
    before = state_of(source)
    steps = 57
    for stop in torch.randint(0, steps, (5,), generator=torch.Generator().manual_seed(3)).tolist():

        def progress(done, total, name, stop=stop):
            if done >= stop:
                raise mm.InterruptProcessingException

        with pytest.raises(mm.InterruptProcessingException):
            quantized(source, "int4", progress=progress)
    after = state_of(source)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert torch.equal(citizens.run(citizens.on_device(source)), floats)


def test_a_quantized_model_is_quantized_once_more_from_its_floats(source):
    first, _ = quantized(source, "fp8")
    ours, _ = quantized(first, "int4")
    wanted, _ = quantized(citizens.plain_model(dequantized(first)), "int4")
    assert citizens.same_codes(citizens.codes(ours), citizens.codes(wanted))


def test_kept_layers_and_overrides(source, weights):
    recipe = {
        "settings": {"weights_dtype": "uint4"},
        "keep": ("double_blocks.0.*",),
        "overrides": {"single_blocks.0.linear1": {"method": "fp8"}},
    }
    made, report = quantized(source, "uint4-svd", recipe)
    assert all("double_blocks.0." not in name for name in report.layers)
    key = "double_blocks.0.img_attn.qkv.weight"
    found = made.model.diffusion_model.state_dict()[key]
    assert torch.equal(found.float(), weights[key])
    assert found.data_ptr() != source.model.diffusion_model.state_dict()[key].data_ptr()
    assert report.layers["single_blocks.0.linear1"].dtype == "float8_e4m3fn"
    assert report.layers["single_blocks.1.linear1"].dtype == "uint4"


def conditioning():
    given = citizens.inputs()
    cond = [[given["context"], {"pooled_output": given["y"], "guidance": 3.5}]]
    return cond, {"samples": torch.zeros(1, 16, 16, 16)}


def test_activations_are_measured_by_sampling(source):
    positive, latent = conditioning()
    how = pack("loaders.host.compare").Sampling(
        0, 2, 1.0, "euler", "simple", positive, positive, latent
    )
    recipe = {"settings": {"activations": "static"}}
    error = pack("quant.errors").LowBitError
    with pytest.raises(error, match="none were measured"):
        quantized(source, "fp8", dict(recipe))
    made, _ = quantized(source, "fp8", dict(recipe), sampling=how)
    module = made.model.diffusion_model.double_blocks[0].img_mlp[0]
    seen = []
    hook = (
        source.model.diffusion_model.double_blocks[0]
        .img_mlp[0]
        .register_forward_pre_hook(lambda _, given: seen.append(float(given[0].abs().max())))
    )
    noise = comfy.sample.prepare_noise(latent["samples"], 0)
    comfy.sample.sample(
        source, noise, 2, 1.0, "euler", "simple", positive, positive, latent["samples"], seed=0,
        disable_pbar=True,
    )  # fmt: skip
    hook.remove()
    assert module.input_scale.item() == pytest.approx(max(seen) / 448, rel=1e-3)
    hooks = [m._forward_pre_hooks for m in source.model.diffusion_model.modules()]
    assert not any(hooks)


def test_weighing_by_activations_lowers_the_weighed_error(source):
    positive, latent = conditioning()
    how = pack("loaders.host.compare").Sampling(
        0, 2, 1.0, "euler", "simple", positive, positive, latent
    )
    plain = {"settings": {"group_size": 64}, "refine": {"scale_search": 10}}
    weighed = {**plain, "refine": {"scale_search": 10, "activation_weighted": True}}
    error = pack("quant.errors").LowBitError
    with pytest.raises(error, match="weighs errors by activations"):
        quantized(source, "int4", dict(weighed))
    before, _ = quantized(source, "int4", dict(plain))
    after, report = quantized(source, "int4", dict(weighed), sampling=how)
    made = pack("quant.recipe").Recipe.make("int4", plain["settings"])
    moments = pack("loaders.host.rebuild").measure(source, made, how)
    floats, one, other = map(dequantized, (source, before, after))
    shares = []
    for name, error in report.layers.items():
        key = f"{name}.weight"
        moment = moments[name].second_moment
        weight = (floats[key].square() * moment).sum()
        plain_, ours = (((w[key] - floats[key]).square() * moment).sum() for w in (one, other))
        assert error.weighted == pytest.approx(float((ours / weight).sqrt()), rel=1e-3), name
        shares.append(float(ours / plain_))
    assert len(shares) > 15 and max(shares) < 1.001 and sum(shares) / len(shares) < 0.98


def test_nothing_to_quantize_is_one_clear_error(source):
    error = pack("quant.errors").LowBitError
    with pytest.raises(error, match="Nothing would be quantized"):
        quantized(source, "fp8", {"settings": {}, "keep": ("*",)})


def test_dynamic_vram_is_kept_where_the_host_has_it(weights):
    source = citizens.plain_model(weights, dynamic=True)
    made, _ = quantized(source, "uint4-svd")
    assert made.is_dynamic() == source.is_dynamic()


def test_smoothed_layers_run_on_every_host(source, weights, tmp_path):
    """ComfyUI has smoothing from 0.30 on; before, such layers are ours, and a file is refused."""
    from comfy.quant_ops import QUANT_ALGOS

    recipe = {"settings": {"awq": True}}
    made, _ = quantized(source, "nvfp4", dict(recipe))
    formats = {m.quant_format for m in made.model.diffusion_model.modules()
               if getattr(m, "quant_format", None)}  # fmt: skip
    has = "pre_quant_scale" in QUANT_ALGOS["nvfp4"]["parameters"]
    assert formats == {"nvfp4" if has else "lowbit_composite"}
    out = citizens.run(citizens.on_device(made))
    wanted = citizens.run(citizens.on_device(citizens.plain_model(dequantized(made))))
    assert citizens.error(out, wanted) < 2e-5
    containers = pack("loaders.writers").CONTAINERS
    floats = pack("loaders.host.rebuild").ModelFloats(source)
    told = pack("quant.recipe").Recipe.make("nvfp4", recipe["settings"])
    job = pack("loaders.quantize_file").prepare(floats, told, containers["comfy"])
    file = tmp_path / "awq.safetensors"
    job.run(file)
    if has:
        assert citizens.error(citizens.run(citizens.on_device(citizens.load(file))), out) < 2e-5
    else:
        with pytest.raises(pack("quant.errors").LowBitError, match="leave out the smoothing"):
            citizens.load(file)
