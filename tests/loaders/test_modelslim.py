"""ModelSlim checkpoints: every type of layer alone, and Wan 2.2 models under both of its names.

The weights must be those that the fixtures were made of, and products in the format's own
arithmetic those of its formulas, for each layer and for whole models.
"""

from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from modelslim_models import (
    TYPES,
    Slim,
    diffusers_name,
    e2m1,
    e4m3,
    make_layer,
    stored,
    wan_floats,
    write,
)
from safetensors.torch import save_file
from support import pack

WEIGHTS = 1e-6
FORMULAS = 1e-3
OUTPUTS = 1e-5
#: Whole models whose float biases differ from what quant_bias rounds them to, in the last bits of
#: every activation that is rounded next.
BIASES = 1e-2

#: type, inputs, and what is special
LAYERS: dict[str, tuple[str, int, dict]] = {
    **{name: (name, 96, {}) for name in TYPES},
    "W8A8-odd": ("W8A8", 37, {}),
    "W8A8-int64": ("W8A8", 64, {"int64": True}),
    "W8A8-symmetric": ("W8A8", 64, {"offset": 0}),
    "W8A8-farthest": ("W8A8", 64, {"offset": -128}),
    "W8A8-older": ("W8A8", 64, {"stored_bias": False}),
    "W8A8_DYNAMIC-odd": ("W8A8_DYNAMIC", 37, {}),
    "W8A8_DYNAMIC-groups": ("W8A8_DYNAMIC", 96, {"group": 24}),
    "W8A8_DYNAMIC-offset": ("W8A8_DYNAMIC", 51, {"asymmetric": True}),
    "W8A16-groups": ("W8A16", 96, {"group": 32}),
    "W8A16-offset": ("W8A16", 96, {"asymmetric": True, "group": 32}),
    "W4A4_DYNAMIC-odd": ("W4A4_DYNAMIC", 37, {}),
    "W4A4_DYNAMIC-groups": ("W4A4_DYNAMIC", 96, {"group": 24}),
    "W4A4_DYNAMIC-offset": ("W4A4_DYNAMIC", 51, {"asymmetric": True}),
    "W4A4_MXFP4_DUALSCALE-long": ("W4A4_MXFP4_DUALSCALE", 1120, {}),
    **{f"{name}-smooth": (name, 96, {"smooth": True}) for name in TYPES},
    **{f"{name}-svd": (name, 96, {"rank": 3}) for name in TYPES},
    **{f"{name}-both": (name, 96, {"smooth": True, "rank": 3}) for name in TYPES},
}
ROUNDED = [name for name, (t, _, _) in LAYERS.items() if t not in ("W8A16", TYPES[-1])]
SEEDS = (0, 1, 2)


@pytest.fixture(scope="module", autouse=True)
def host():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # small tensors: threads only get in each other's way
    yield pack()
    torch.set_num_threads(before)


@cache
def built(case: str, seed: int, bias: bool = True) -> Slim:
    type_, columns, options = LAYERS[case]
    rng = np.random.default_rng([seed, columns])
    rows = 5 + 4 * seed
    weight = rng.standard_normal((rows, columns)) * rng.uniform(0.2, 2, (rows, 1))
    given = rng.standard_normal(rows) if bias else None
    return make_layer(type_, weight, given, seed, **options)


def inputs(layer: Slim, seed: int, rows: int = 7) -> torch.Tensor:
    """Activations of very different tokens; of static layers near what their scale is for."""
    rng = np.random.default_rng([7, seed])
    x = rng.standard_normal((rows, layer.residual.shape[1]))
    if layer.numbers.get("input_offset") == -128:
        x = np.abs(x)
    if layer.plain_type != "W8A8":
        x *= np.geomspace(0.1, 10, rows)[:, None]
    return torch.from_numpy(x.astype(np.float32))


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """``opened(seed, bias)``: a plan of all LAYERS in one file, and its entries."""
    folder = tmp_path_factory.mktemp("layers")
    plans = []

    @cache
    def plan(seed: int, bias: bool = True):
        tensors = {"norm.weight": (torch.ones(3), "FLOAT")}
        for number, case in enumerate(LAYERS):
            tensors |= stored(f"blocks.{number}.a", built(case, seed, bias), wrapped=number % 2)
        path = write(folder / f"{seed}-{bias}", tensors)
        plans.append(pack("loaders.plan").make_plan(path))
        return plans[-1]

    yield plan
    for one in plans:
        one.source.close()


def entry(plan, case: str, part: str = "weight"):
    return plan.entries.get(f"blocks.{list(LAYERS).index(case)}.a.{part}")


def away(found, wanted) -> float:
    """Largest difference relative to the largest expected value."""
    found, wanted = (np.asarray(torch.as_tensor(v).double()) for v in (found, wanted))
    assert found.shape == wanted.shape, (found.shape, wanted.shape)
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def apart(found, wanted) -> float:
    """Norm of the difference relative to the expected one."""
    found, wanted = (np.asarray(torch.as_tensor(v).double()) for v in (found, wanted))
    assert found.shape == wanted.shape, (found.shape, wanted.shape)
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


# ----------------------------------------------------------------------------------------- layers


def test_the_fixture_rounds_to_the_nearest():
    """Of the fixture itself, against torch and by hand."""
    x = np.random.default_rng(0).standard_normal(1000) * np.geomspace(1e-4, 1e3, 1000)
    wanted = torch.from_numpy(np.clip(x, -448, 448)).float().to(torch.float8_e4m3fn).double()
    assert np.array_equal(e4m3(np.float32(x).astype(float)), wanted.numpy())
    pairs = {0.25: 0, 0.75: 1, 1.25: 1, 1.75: 2, 2.5: 2, 3.5: 4, 5: 4, -5.1: -6, 9: 6, 0.6: 0.5}
    assert np.array_equal(e2m1(np.array(list(pairs))), np.array(list(pairs.values())))


@pytest.mark.parametrize("case", LAYERS)
def test_the_fixture_is_near_its_float_layer(case):
    """Of the fixture itself: the formulas are those of a layer that was rounded."""
    layer = built(case, 1)
    x = inputs(layer, 1).double().numpy()
    exact = x @ layer.weight().T + layer.bias
    error = apart(layer.forward(x), exact)
    assert error < (0.25 if "A4" in case else 0.08), error
    if case in ROUNDED:
        assert error > 1e-4


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("case", LAYERS)
def test_weight_is_the_constructed_one(opened, case, seed):
    layer, found = built(case, seed), entry(opened(seed), case)
    weight = found.read()
    weight.check()
    assert found.shape == layer.weight().shape
    assert found.dtype == layer.type
    assert found.wish == ("faithful" if case in ROUNDED else None)
    assert away(weight.dequantize(), layer.weight()) <= WEIGHTS


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("case", LAYERS)
def test_bias_is_that_of_the_float_layer(opened, case, seed):
    layer = built(case, seed)
    found = entry(opened(seed), case, "bias").read()
    assert away(found, layer.bias) <= (1e-3 if "older" in case else 0)
    if "older" in case:  # rounded to a whole number of steps
        assert (np.abs(found.numpy() - layer.bias) <= 0.51 * layer.numbers["deq"]).all()
    assert entry(opened(seed, bias=False), case, "bias") is None


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("case", LAYERS)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "bare"])
def test_product_is_that_of_the_formulas(opened, case, seed, bias):
    layer, plan = built(case, seed, bias), opened(seed, bias)
    weight = entry(plan, case).read()
    told = entry(plan, case, "bias")
    told = told.read() if told else None
    x = inputs(layer, seed)
    wanted = layer.forward(x.double().numpy())
    if case in ROUNDED:
        found = pack("kernels.faithful").linear_faithful(x, weight.tensors, weight.spec, told)
    else:
        found = torch.nn.functional.linear(x, weight.dequantize(), told)
    assert apart(found, wanted) <= FORMULAS


@pytest.mark.parametrize("case", ["W8A8", "W8A8_DYNAMIC", "W4A4_DYNAMIC", "WFP8AFP8_DYNAMIC"])
def test_a_wrong_reading_would_be_seen(case):
    layer = built(case, 1)
    x = inputs(layer, 1).double().numpy()
    right = layer.forward(x)
    wrong = {"offset_sign": -1} if case == "W8A8" else {"per_token": False}
    assert apart(layer.forward(x, **wrong), right) > 10 * FORMULAS


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ROUNDED)
def test_product_in_sixteen_bits(opened, case, dtype):
    layer, weight = built(case, 1), entry(opened(1), case).read()
    x = inputs(layer, 1).to(dtype)
    bias = entry(opened(1), case, "bias").read()
    found = pack("kernels.faithful").linear_faithful(x, weight.tensors, weight.spec, bias)
    assert found.dtype == dtype

    def half(values: np.ndarray) -> np.ndarray:
        return torch.from_numpy(values).float().to(dtype).double().numpy()

    wanted = layer.forward(x.double().numpy(), half=half)
    assert apart(found.float(), wanted) < torch.finfo(dtype).eps


def test_no_number_in_gives_no_number_out(opened):
    for case in ROUNDED:
        weight = entry(opened(1), case).read()
        x = inputs(built(case, 1), 1)
        x[2, 5] = float("nan")
        x[4] = 0
        y = pack("kernels.faithful").linear_faithful(x, weight.tensors, weight.spec)
        assert y[2].isnan().any(), case
        assert y[[0, 1, 3, 4, 5, 6]].isfinite().all(), case


def test_parts_keep_what_all_rows_share(opened):
    weights = pack("quant.weight")
    for case in ("W8A8", "W8A8-both", "W4A4_DYNAMIC-both", "W8A8_MXFP8-both"):
        whole = entry(opened(2), case).read()
        parts = [weights.take_rows(whole, 0, 4), weights.take_rows(whole, 4, whole.spec.rows - 4)]
        joined = weights.concat_rows(parts)
        assert joined.spec == whole.spec
        assert joined.tensors.keys() == whole.tensors.keys()
        assert torch.equal(joined.dequantize(), whole.dequantize())
    whole = entry(opened(2), "W8A8").read()
    moved = {"input_offset": whole.tensors["input_offset"] + 1}
    other = dataclasses.replace(whole, tensors=whole.tensors | moved)
    assert weights.concat_rows([whole, whole]) is not None
    assert weights.concat_rows([whole, other]) is None


def test_spec_goes_through_a_saved_file(opened):
    composite = pack("loaders.layouts.composite")
    for case in ROUNDED:
        found = entry(opened(1), case)
        built_ = composite.build([("a", found.read(), found.wish)], torch.float32, 0)
        spec = built_._params.spec
        assert composite.from_json(composite.to_json(spec)) == spec, case
        assert torch.equal(built_.dequantize(), found.read().dequantize()), case


def test_requantizing_keeps_the_type(opened):
    """A merged weight is rounded anew in the layer's own format."""
    again = pack("quant.weight").requantize_like
    for case in LAYERS:
        weight = entry(opened(1), case).read()
        changed = weight.dequantize() * 1.25
        tensors = again(changed, weight.spec, weight.tensors)
        new = dataclasses.replace(weight, tensors=tensors)
        new.check()
        assert apart(new.dequantize(), changed) < (0.2 if "W4" in case else 0.05), case


# -------------------------------------------------------------------------------- what is decided


def plan_of(path: Path):
    return pack("loaders.plan").make_plan(path)


def small(case: str = "W8A8_DYNAMIC", name: str = "blocks.0.a"):
    return stored(name, built(case, 0))


def test_report_tells_types_and_description(tmp_path):
    tensors = small() | small("W8A8", "blocks.1.a") | small("W8A16-smooth", "blocks.2.a")
    with plan_of(write(tmp_path / "m", tensors)).source as source:
        plan = plan_of(source.path)
        assert plan.detection.scheme == "modelslim"
        assert plan.contents.facts == {
            "layers": "1 W8A8_DYNAMIC, 1 W8A8, 1 W8A16",
            "described by": "quant_model_description.json (W8A16)",
        }
        assert not any(found.notes for found in plan.entries.values())
        plan.source.close()


def test_without_description_activations_are_not_rounded(tmp_path):
    for case, told in (
        ("W8A8_DYNAMIC", "W8A8_DYNAMIC or W8A16 or W4A4_DYNAMIC"),
        ("W4A4_DYNAMIC", "W8A8_DYNAMIC or W8A16 or W4A4_DYNAMIC"),
        ("W4A4_MXFP4-smooth", "W4A4_MXFP4 or W4A8_MXFP"),
    ):
        plan = plan_of(write(tmp_path / case, small(case), description=None))
        found = plan.entries["blocks.0.a.weight"]
        assert (found.wish, found.spec.activation) == (None, None)
        assert told in found.notes[0]
        assert away(found.read().dequantize(), built(case, 0).weight()) <= WEIGHTS
        plan.source.close()


def test_without_description_tensors_tell_the_rest(tmp_path):
    for case in ("W8A8", "W8A8_MXFP8-smooth", "WFP8AFP8_DYNAMIC", "W4A4_MXFP4_DUALSCALE"):
        plan = plan_of(write(tmp_path / case, small(case), description=None))
        found = plan.entries["blocks.0.a.weight"]
        assert found.dtype == case.removesuffix("-smooth")
        assert away(found.read().dequantize(), built(case, 0).weight()) <= WEIGHTS
        plan.source.close()


def test_layer_that_the_description_leaves_out(tmp_path):
    both = small() | small("W8A8_DYNAMIC-odd", "blocks.1.a")
    folder = write(tmp_path / "m", small())
    data = {name: tensor for name, (tensor, _) in both.items()}
    save_file(data, folder / "quant_model_weights.safetensors")
    plan = plan_of(folder)
    assert plan.entries["blocks.0.a.weight"].wish == "faithful"
    assert plan.entries["blocks.1.a.weight"].wish is None
    assert "has no word" in plan.entries["blocks.1.a.weight"].notes[0]
    plan.source.close()


def test_older_file_among_others_finds_its_own_description(tmp_path):
    for kind in ("w8a8", "w8a8_dynamic"):
        case = kind.upper()
        write(
            tmp_path,
            small(case),
            weights=f"quant_model_weight_{kind}",
            description=f"quant_model_description_{kind}",
        )
    write(tmp_path, small("W4A4_DYNAMIC"))
    plan = plan_of(tmp_path / "quant_model_weights.safetensors")
    assert plan.entries["blocks.0.a.weight"].dtype == "W4A4_DYNAMIC"
    plan.source.close()
    for kind in ("w8a8", "w8a8_dynamic"):
        plan = plan_of(tmp_path / f"quant_model_weight_{kind}.safetensors")
        assert plan.entries["blocks.0.a.weight"].dtype == kind.upper()
        assert f"_{kind}.json" in plan.contents.facts["described by"]
        plan.source.close()


def test_lone_file_is_not_described_by_what_lies_beside_it(tmp_path):
    write(tmp_path, small("W8A8", "elsewhere"), weights="quant_model_weights")
    for case in ("W8A8", "W8A8_DYNAMIC", "W8A8_MXFP8-smooth", "W4A4_MXFP4-svd", TYPES[-1]):
        file = tmp_path / f"{case}.safetensors"
        save_file({name: tensor for name, (tensor, _) in small(case).items()}, file)
        plan = plan_of(file)
        assert plan.detection.scheme == "modelslim"
        assert plan.contents.facts["described by"] == ""
        assert away(plan.quantized()[0].read().dequantize(), built(case, 0).weight()) <= WEIGHTS
        plan.source.close()


def test_shards(tmp_path):
    plan = plan_of(write(tmp_path / "m", small("W8A8") | small(name="b.1"), shards=3))
    assert len(plan.quantized()) == 2
    assert (
        away(plan.entries["b.1.weight"].read().dequantize(), built("W8A8_DYNAMIC", 0).weight())
        <= WEIGHTS
    )
    plan.source.close()


def test_float_layer_in_wrappers(tmp_path):
    """The saver wraps layers that it then leaves in floats."""
    rng = np.random.default_rng(0)
    weight, multiply = rng.standard_normal((6, 10)), rng.uniform(0.5, 2, 10)
    down, up = rng.standard_normal((2, 10)), rng.standard_normal((6, 2))
    parts = {
        "b.div.mul_scale": multiply,
        "b.linear.weight": weight,
        "b.linear.bias": np.ones(6),
        "b.linear.svd_lowrank_l1": down,
        "b.linear.svd_lowrank_l2": up,
    }
    floats = {name: (torch.from_numpy(value).float(), "FLOAT") for name, value in parts.items()}
    plan = plan_of(write(tmp_path / "m", small() | floats))
    assert [found.key for found in plan.quantized()] == ["blocks.0.a.weight"]
    found = plan.entries["b.weight"]
    assert away(found.read(), (weight + up @ down) * multiply) <= WEIGHTS
    assert torch.equal(plan.entries["b.bias"].read(), torch.ones(6))
    plan.source.close()


def test_what_only_rounded_attention_needs_is_left_out(tmp_path):
    rotation = torch.linalg.qr(torch.randn(4, 4))[0]
    more = {
        "blocks.0.q_rot": (rotation, "FLOAT"),
        "blocks.0.k_rot": (rotation.clone(), "FLOAT"),
        "blocks.0.fa_q.scale": (torch.ones(3, 1), "FAQuant"),
        "blocks.0.fa_q.offset": (torch.zeros(3, 1), "FAQuant"),
    }
    described = {"fa_quant_type": "FAKQuant", "blocks.0.quant_type": "FP8_DYNAMIC"}
    plan = plan_of(write(tmp_path / "m", small() | more, more=described))
    assert set(plan.contents.ignored) == set(more)
    assert plan.entries.keys().isdisjoint(more)
    plan.source.close()


# --------------------------------------------------------------------------------------- whole Wan

#: what becomes of the layers of a model, in turn
MODELS: dict[str, tuple[tuple[str, dict], ...]] = {
    "static": (("W8A8", {"stored_bias": False}), ("W8A8", {"stored_bias": False, "int64": True})),
    "static-biases": (("W8A8", {}), ("W8A8", {"int64": True})),
    "dynamic": (("W8A8_DYNAMIC", {}),),
    "weights": (("W8A16", {"group": 64}), ("W8A16", {"asymmetric": True})),
    "int4": (("W4A4_DYNAMIC", {}), ("W4A4_DYNAMIC", {"group": 128, "asymmetric": True})),
    "mx": (("W8A8_MXFP8", {}), ("W4A4_MXFP4", {}), ("W4A8_MXFP", {})),
    "wrapped": (
        ("W8A8", {"smooth": True, "stored_bias": False}),
        ("W8A8_DYNAMIC", {"smooth": True, "rank": 16}),
        ("W4A4_MXFP4", {"smooth": True, "rank": 16}),
        ("W4A4_MXFP4_DUALSCALE", {"smooth": True}),
        ("W8A16", {}),
    ),
}
NAMES = ("original", "diffusers")
EVERY = pytest.mark.parametrize(
    ("model", "names"), [(model, names) for model in MODELS for names in NAMES]
)


@cache
def layers_of(model: str) -> dict[str, Slim]:
    """``{native module: layer}`` of what the recipes quantize: attention and MLP of the blocks."""
    given = wan_floats()
    made, kinds = {}, MODELS[model]
    for name in given:
        module = name.removesuffix(".weight")
        if not name.startswith("blocks.") or module == name or given[name].ndim != 2:
            continue
        type_, options = kinds[len(made) % len(kinds)]
        bias, reach = given[f"{module}.bias"], reaches()[module]
        made[module] = make_layer(type_, given[name], bias, len(made), reach=reach, **options)
    return made


@cache
def reaches() -> dict[str, float]:
    """Largest input of every layer of the float model, as a calibration finds it."""
    model, found = comfy_model(wan_floats()), {}
    hooks = [
        module.register_forward_hook(
            lambda _, args, y, name=name: found.update({name: args[0].abs().max().item()})
        )
        for name, module in model.named_modules()
        if name.startswith("blocks.")
    ]
    run(model)
    for hook in hooks:
        hook.remove()
    return found


def comfy_model(native: dict[str, np.ndarray]) -> torch.nn.Module:
    """ComfyUI's own float model."""
    import comfy.sd

    tensors = {name: torch.from_numpy(value.astype(np.float32)) for name, value in native.items()}
    patcher = comfy.sd.load_diffusion_model_state_dict(tensors, {"dtype": torch.float32})
    return patcher.model.diffusion_model


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    """``wan(model, names)``: a folder as the saver or the repacking for diffusers writes it."""
    folder = tmp_path_factory.mktemp("wan")

    @cache
    def make(model: str, names: str) -> Path:
        renamed = diffusers_name if names == "diffusers" else str
        layers = layers_of(model)
        tensors = {}
        for name, value in wan_floats().items():
            module = name.rpartition(".")[0]
            if module not in layers:
                tensors[renamed(name)] = (torch.from_numpy(value), "FLOAT")
            elif name.endswith(".weight"):
                wrapped = names == "original"
                tensors |= stored(renamed(module), layers[module], wrapped)
        config = {"_class_name": "WanModel", "model_type": "t2v"}
        if names == "diffusers":
            config = {"_class_name": "WanTransformer3DModel"}
        weights = "quant_model_weights" if names == "original" else "diffusion_pytorch_model"
        return write(folder / model / names, tensors, weights=weights, config=config)

    return make


def ours(path: Path, matmul: str) -> torch.nn.Module:
    options = {"matmul": matmul, "compute_dtype": "fp32"}
    return pack("loaders.host.api").load_diffusion_model(str(path), options).model.diffusion_model


@cache
def floats(model: str) -> torch.nn.Module:
    """ComfyUI's own model of the dequantized weights."""
    native = wan_floats()
    for module, layer in layers_of(model).items():
        native[f"{module}.weight"], native[f"{module}.bias"] = layer.weight(), layer.bias
    return comfy_model(native)


def run(model: torch.nn.Module, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, 16, 2, 4, 6, generator=generator)
    context = torch.randn(1, 5, 4096, generator=generator)
    with torch.no_grad():
        return model(x, torch.tensor([12.0]), context=context, transformer_options={})


def test_names_are_those_of_the_families():
    """Of the fixture itself: the renames are undone by the map that diffusers was held against."""
    family = next(f for f in pack("loaders.families").FAMILIES if f.name == "wan")
    names = {diffusers_name(name): name for name in wan_floats()}
    moves = family.moves(set(names), {}, lambda key: wan_floats()[names[key]].shape)
    assert {move.pieces[0].key: move.native for move in moves} == names


@EVERY
def test_native_tensors_are_the_constructed_ones(wan, model, names):
    plan = plan_of(wan(model, names))
    assert plan.family.name == {"original": "native", "diffusers": "wan"}[names]
    translate = pack("loaders.translate")
    settings = translate.Settings(torch.float32)
    native = {key: value for key, value, _ in translate.translate(plan, settings)}
    layers = layers_of(model)
    assert native.keys() == wan_floats().keys()
    for key, value in wan_floats().items():
        module, _, part = key.rpartition(".")
        found, layer = native[key], layers.get(module)
        assert hasattr(found, "_layout_cls") == (layer is not None and part == "weight"), key
        if layer is None:
            assert torch.equal(found, torch.from_numpy(value)), key
        elif part == "weight":
            assert away(found.dequantize(), layer.weight()) <= WEIGHTS, key
        else:
            step = layer.numbers.get("deq", np.zeros(1)).max() if part == "bias" else 0
            assert np.abs(found.numpy() - layer.bias).max() <= 0.51 * step, key
    plan.source.close()


@EVERY
def test_dequantizing_it_is_the_float_model(wan, model, names):
    error = apart(run(ours(wan(model, names), "dequantize")), run(floats(model)))
    assert error <= (FORMULAS if model in ("static", "wrapped") else OUTPUTS), error


@EVERY
def test_faithfully_it_is_the_formulas(wan, model, names):
    """Layer by layer, and as a whole.

    Where two sums differ in their last bit, an activation may fall to the other side of a tie once
    in a while, and rounding carries that through all that follows: a pass that is off is tried with
    other inputs. What is wrong is wrong in every pass.
    """
    layers = layers_of(model)
    rounding, exact = ours(wan(model, names), "faithful"), floats(model)
    errors: dict[str, float] = {}

    def by_formula(name: str, layer: Slim):
        def hook(module, args, output):
            (x,) = args
            flat = x.reshape(-1, x.shape[-1]).double().numpy()
            y = torch.from_numpy(layer.forward(flat)).float().view(output.shape)
            errors[name] = max(errors.get(name, 0), apart(rounding.get_submodule(name)(x), y))
            return y

        return hook

    seen, limit = [], BIASES if model == "static-biases" else FORMULAS
    wanted = [run(exact, seed) for seed in range(3)]
    hooks = [
        exact.get_submodule(name).register_forward_hook(by_formula(name, layer))
        for name, layer in layers.items()
    ]
    try:
        for seed in range(3):
            by_formulas = run(exact, seed)
            seen.append(apart(run(rounding, seed), by_formulas))
            assert model == "weights" or apart(wanted[seed], by_formulas) > 3 * FORMULAS, seen
            if seen[-1] <= limit:
                break
    finally:
        for hook in hooks:
            hook.remove()
    assert errors.keys() == layers.keys()
    assert max(errors.values()) <= FORMULAS, max(errors, key=errors.get)
    assert min(seen) <= limit, seen


@pytest.mark.parametrize("model", MODELS)
def test_left_alone_it_runs_what_is_exact_here(wan, model):
    """No fast kernel on a CPU: what would be rounded is dequantized, and Inspect says so."""
    path = wan(model, "original")
    assert torch.equal(run(ours(path, "auto")), run(ours(path, "dequantize")))
    report, plan = pack("loaders.report"), plan_of(path)
    cpu = report.DeviceFacts(torch.device("cpu"), "a CPU", 2**30, 2**30, 2**30, 0)
    auto = report.inspect(plan, cpu)
    asked = report.inspect(plan, cpu, "faithful")
    plan.source.close()
    rounds = sum(found.wish is not None for found in plan.quantized())
    assert sum(auto.kernels.values()) == len(layers_of(model))
    slower = [count for line, count in auto.kernels.items() if "would be slower here" in line]
    emulated = [n for line, n in asked.kernels.items() if "faithful matmul, emulated" in line]
    assert sum(slower) == sum(emulated) == rounds
    assert all("dequantized" in line for line in auto.kernels)
    assert "described by: quant_model_description.json" in auto.text


def test_a_folder_is_listed_as_one_checkpoint(tmp_path):
    for name in ("high_noise_model", "low_noise_model"):
        layer = make_layer("W8A8_DYNAMIC", np.ones((8, 16)), None)
        write(tmp_path / "Wan2.2" / name, stored("blocks.0.ffn.0", layer))
    bare = tmp_path / "bare"
    write(bare, stored("blocks.0.ffn.0", layer), description=None)
    assert pack("loaders.folder").list_checkpoints([str(tmp_path)]) == [
        "Wan2.2/high_noise_model",
        "Wan2.2/low_noise_model",
        "bare/quant_model_weights.safetensors",
    ]
