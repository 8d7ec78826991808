"""SVDQuant checkpoints of every family, opened as models, against what was put into them.

Three measures for each checkpoint: every native tensor is what the construction says; dequantizing,
the model computes what ComfyUI's float model computes with those tensors; and ``faithful``, it
computes what the formulas of the engine say, layer by layer inside ComfyUI's float model.

Families that ComfyUI's detection takes at a small width go through the loader; of the others the
class is built (everyday), and the smallest that is detected goes through the loader (slow).
"""

from __future__ import annotations

import shutil
from functools import cache
from pathlib import Path

import comfy_models
import pytest
import svdq_formulas
import svdq_models
import torch
from support import pack

WEIGHTS = 1e-6
OUTPUTS = 1e-5
FORMULAS = 2e-3

#: families that ComfyUI's loader takes small
SMALL = ("flux", "flux2")
#: small models, and in which precision each is made
CASES = {
    "flux_schnell": ("int4", "nvfp4"),
    "flux_depth": ("int4",),
    "flux_fill": ("nvfp4",),
    "flux2_klein": ("int4", "nvfp4"),
    "chroma": ("int4", "nvfp4"),
    "qwen_image": ("int4", "nvfp4"),
    "qwen_image_edit": ("int4",),
    "z_image": ("int4", "nvfp4"),
    "sdxl": ("int4", "nvfp4"),
}
WHOLE = ("chroma_whole", "qwen_image_whole", "z_image_whole", "sdxl_vega_whole")
UNSIGNED = ("flux_schnell", "chroma", "qwen_image")
#: 4-bit layers in the file, and in the model that they go into
LAYERS = {
    "flux_schnell": (15, 13),
    "flux_depth": (15, 13),
    "flux_fill": (15, 13),
    "flux2_klein": (12, 10),
    "chroma": (12, 10),
    "qwen_image": (10, 14),
    "qwen_image_edit": (10, 14),
    "z_image": (20, 25),
    "sdxl": (24, 32),
    "chroma_whole": (12, 10),
    "qwen_image_whole": (10, 14),
    "z_image_whole": (20, 25),
    "sdxl_vega_whole": (90, 120),
}

#: what published files differ in, each in a family where it matters
VARIANTS = {
    "rank-0": ("flux_schnell", {"rank": 0}),
    "rank-0-bare": ("chroma", {"rank": 0, "precision": "nvfp4", "metadata": False}),
    "rank-16": ("flux_schnell", {"rank": 16, "precision": "nvfp4", "metadata": False}),
    "rank-48-bare": ("z_image", {"rank": 48, "metadata": False}),
    "fp16": ("flux_schnell", {"dtype": torch.float16}),
    "fp16-nvfp4": ("qwen_image", {"dtype": torch.float16, "precision": "nvfp4"}),
    "scales-of-rows": ("flux_schnell", {"precision": "nvfp4", "scales": "rows"}),
    "scales-of-both": ("flux_schnell", {"precision": "nvfp4", "scales": "both"}),
    "scales-of-neither": ("qwen_image", {"precision": "nvfp4", "scales": "none"}),
    "plain-modulation": ("qwen_image", {"modulation": "plain"}),
    "plain-modulation-turned": ("flux_schnell", {"modulation": "interleaved"}),
    "plain-modulation-turned-qwen": ("qwen_image", {"modulation": "interleaved"}),
    "plain-refiners": ("z_image", {"refiners": False}),
    "new-names": ("flux_schnell", {"names": 2}),
    "new-names-chroma": ("chroma", {"names": 2}),
    "bare-flux": ("flux_schnell", {"metadata": False}),
    "bare-qwen": ("qwen_image", {"metadata": False}),
    "bare-klein": ("flux2_klein", {"metadata": False}),
    "bare-sdxl": ("sdxl", {"metadata": False}),
    "two-files": ("flux_schnell", {"form": "folder"}),
    "lite-flux": ("flux_schnell", {"form": "lite"}),
    "lite-klein": ("flux2_klein", {"form": "lite", "precision": "nvfp4"}),
    "lite-qwen": ("qwen_image", {"form": "lite"}),
    "lite-z-image": ("z_image", {"form": "lite", "precision": "nvfp4"}),
    "manifest-qwen": ("qwen_image", {"form": "manifest"}),
    "manifest-flux": ("flux_schnell", {"form": "manifest"}),
}
NAMED = {
    f"{name}-{precision}": (name, {"precision": precision})
    for name, precisions in CASES.items()
    for precision in precisions
}
EVERY = NAMED | VARIANTS
EVERY_CASE = pytest.mark.parametrize("case", EVERY)


@pytest.fixture(scope="module", autouse=True)
def host():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # small tensors: threads only get in each other's way
    yield pack()
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """``made(case)``: the checkpoint; written once."""
    folder = tmp_path_factory.mktemp("svdq")

    @cache
    def write(case: str) -> svdq_models.Made:
        name, options = EVERY[case]
        single = options.get("form", "file") in ("file", "manifest")
        return svdq_models.make(
            name, folder / (f"{case}.safetensors" if single else case), **options
        )

    yield write
    shutil.rmtree(folder)


def translated(path: Path, **options) -> dict[str, torch.Tensor]:
    """Native tensors as the pack reads them."""
    base, plans = pack("loaders.schemes.base"), pack("loaders.plan")
    plan = plans.make_plan(path, options=base.SchemeOptions(**options))
    try:
        settings = pack("loaders.translate").Settings(torch.float32)
        return {
            name: value for name, value, _ in pack("loaders.translate").translate(plan, settings)
        }
    finally:
        plan.source.close()


def loaded(made: svdq_models.Made, matmul: str, **options) -> torch.nn.Module:
    """The model inside the MODEL that the pack's loader gives."""
    given = {"matmul": matmul, "compute_dtype": "fp32", **options}
    return (
        pack("loaders.host.api").load_diffusion_model(str(made.path), given).model.diffusion_model
    )


def ours(made: svdq_models.Made, matmul: str, **options) -> torch.nn.Module:
    """The model that the pack makes of a checkpoint, in float32."""
    family, _ = made.moves()
    if family.name in SMALL:
        return loaded(made, matmul, **options)
    ops = pack("loaders.host.ops").make_ops(torch.float32, matmul)
    native = translated(made.path, **options)
    return comfy_models.build_small(family.name, made.config, native, ops)


def floats(made: svdq_models.Made) -> torch.nn.Module:
    """ComfyUI's own float model with what the checkpoint means."""
    import comfy.ops
    import comfy.sd

    family, _ = made.moves()
    native = made.native()
    if family.name in SMALL:
        patcher = comfy.sd.load_diffusion_model_state_dict(native, {"dtype": torch.float32})
        return patcher.model.diffusion_model
    operations = comfy.ops.disable_weight_init
    return comfy_models.build_small(family.name, made.config, native, operations)


def run(made: svdq_models.Made, model: torch.nn.Module, number: int = 0) -> torch.Tensor:
    """One pass; ``number`` other than 0 for another noise."""
    given = dict(made.inputs)
    if number:
        generator = torch.Generator().manual_seed(number)
        given["x"] = torch.randn(given["x"].shape, generator=generator)
    return comfy_models.comfy_forward(made.moves()[0].name, model, given)


def away(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest difference relative to the largest expected value."""
    return ((found - wanted).abs().max() / wanted.abs().max()).item()


def apart(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Norm of the difference relative to the expected one."""
    return ((found.double() - wanted.double()).norm() / wanted.double().norm()).item()


def from_formulas(made: svdq_models.Made, rounding: torch.nn.Module) -> tuple[dict, float, float]:
    """How far a model is from ComfyUI's float model with every quantized layer as a formula.

    Returns:
        The difference of each layer's output, given the input that the formulas give it; the
        difference of the model's output; and that of the float model's, for comparison. Where two
        sums differ in their last bit, an activation may fall to the other side of a tie once in a
        while, and rounding carries that through all that follows: a pass that is off is tried
        with other inputs. What is wrong is wrong in every pass.
    """
    formulas, exact = floats(made), floats(made)
    layers: dict[str, float] = {}

    def watch(name: str, x: torch.Tensor, y: torch.Tensor) -> None:
        layers[name] = max(layers.get(name, 0), apart(rounding.get_submodule(name)(x), y))

    svdq_formulas.by_formulas(made, formulas, watch)
    for number in range(5):
        wanted = run(made, formulas, number)
        output = apart(run(made, rounding, number), wanted)
        if output < FORMULAS:
            break
    return layers, output, apart(run(made, exact, number), wanted)


def low_bit(value: torch.Tensor) -> bool:
    return hasattr(value, "_layout_cls")


def dequantized(value: torch.Tensor) -> torch.Tensor:
    return (value.dequantize() if low_bit(value) else value).float()


def test_the_construction_is_near_the_float_model(made):
    """Of the fixture itself: what was rounded is still the model, and so are the formulas."""
    for case in ("flux_schnell-int4", "flux_schnell-nvfp4", "qwen_image-int4"):
        for name, layer in made(case).layers.items():
            weight, bias = layer.wanted
            assert 0.01 < apart(layer.weight, weight) < 0.2, name
            if bias is not None:
                assert (layer.bias - bias).abs().max() <= 2**-7 * max(1, bias.abs().max()), name
            x = torch.randn(40, weight.shape[1], generator=torch.Generator().manual_seed(1))
            if getattr(layer, "unsigned", False):
                x = torch.nn.functional.gelu(x, approximate="tanh")
            found = svdq_formulas.forward(layer, x)
            wanted = torch.nn.functional.linear(x, layer.weight, layer.bias)
            assert apart(found, wanted) < (0.16 if isinstance(layer, svdq_models.Svdq) else 1e-6), (
                name
            )


@EVERY_CASE
def test_native_tensors_are_what_was_constructed(made, case):
    checkpoint = made(case)
    name, _ = EVERY[case]
    found = translated(checkpoint.path)
    quantized = 0
    for key, wanted in checkpoint.native().items():
        value = found.pop(key)
        quantized += low_bit(value)
        assert value.shape == wanted.shape, key
        if wanted.numel():
            error = away(dequantized(value), wanted)
            assert error <= WEIGHTS, f"{key} differs by {error:.2e}"
    assert not found
    if case in NAMED:
        assert (len(checkpoint.layers), quantized) == LAYERS[name]
    assert quantized


@EVERY_CASE
def test_dequantizing_it_is_the_float_model(made, case):
    checkpoint = made(case)
    found, wanted = (
        run(checkpoint, ours(checkpoint, "dequantize")),
        run(checkpoint, floats(checkpoint)),
    )
    assert away(found, wanted) < OUTPUTS


@EVERY_CASE
def test_faithful_it_computes_the_formulas(made, case):
    checkpoint = made(case)
    model = ours(checkpoint, "faithful")
    layers, output, exact = from_formulas(checkpoint, model)
    quantized = {name for name, m in model.named_modules() if low_bit(getattr(m, "weight", None))}
    assert layers.keys() == quantized
    assert max(layers.values()) < FORMULAS, layers
    assert output < FORMULAS
    assert exact > 5 * FORMULAS  # the formulas do round


@pytest.mark.parametrize("name", UNSIGNED)
def test_a_shifted_layer_taken_for_a_signed_one_is_found_out(made, name):
    """The third trap: without its shift, the same file is another model under every measure."""
    checkpoint = made(f"{name}-int4")
    shifted = {name for name, layer in checkpoint.layers.items() if getattr(layer, "unsigned", 0)}
    found, meant = translated(checkpoint.path, act_unsigned="off"), checkpoint.native()
    wrong = {key for key, value in meant.items() if away(dequantized(found[key]), value) > WEIGHTS}
    assert shifted and len(wrong) == len(shifted)
    assert all(key.endswith(".bias") for key in wrong)
    exact = run(checkpoint, floats(checkpoint))
    taken = run(checkpoint, ours(checkpoint, "dequantize", act_unsigned="off"))
    assert apart(taken, exact) > 100 * OUTPUTS
    layers, output, _ = from_formulas(checkpoint, ours(checkpoint, "faithful", act_unsigned="off"))
    signed = {f"{key.removesuffix('.bias')}" for key in wrong}
    assert {name for name, error in layers.items() if error > FORMULAS} == signed
    assert output > 5 * FORMULAS


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("case", ["flux_schnell-int4", "flux_schnell-nvfp4", "scales-of-both"])
def test_a_layer_in_half_precision_computes_its_formula(made, case, dtype):
    checkpoint = made(case)
    short = {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    model = ours(checkpoint, "faithful", compute_dtype=short)
    generator = torch.Generator().manual_seed(4)
    seen = 0
    for name, module in model.named_modules():
        if not low_bit(getattr(module, "weight", None)):
            continue
        x = torch.randn(2, 24, module.in_features, generator=generator)
        if name.endswith("mlp.2"):
            x = torch.nn.functional.gelu(x, approximate="tanh")
        x = x.to(dtype)
        with torch.no_grad():
            found = module(x)
        assert found.dtype == dtype
        error = apart(found, svdq_formulas.formula(checkpoint, name)(x))
        # a layer of two K-splits adds two products that were rounded before
        limit = torch.finfo(dtype).eps / (2 if module.weight._params.spec.axis else 4)
        assert error < limit, f"{name}: {error:.1e}"
        seen += 1
    assert seen == LAYERS["flux_schnell"][1]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["int4", "nvfp4"])
@pytest.mark.parametrize("name", WHOLE)
def test_whole_model_through_the_loader(tmp_path, name, precision):
    import comfy.sd

    try:
        checkpoint = svdq_models.make(name, tmp_path / "model.safetensors", precision=precision)
        meant = checkpoint.native()
        model = loaded(checkpoint, "dequantize")
        quantized = 0
        for key, tensor in meant.items():
            value = model.get_parameter(key).data
            quantized += low_bit(value)
            assert away(dequantized(value), tensor) <= WEIGHTS, key
        assert (len(checkpoint.layers), quantized) == LAYERS[name]
        found = run(checkpoint, model)
        del model
        plain = comfy.sd.load_diffusion_model_state_dict(meant, {"dtype": torch.float32})
        del meant
        assert away(found, run(checkpoint, plain.model.diffusion_model)) < OUTPUTS
        errors = {}
        rounding = loaded(checkpoint, "faithful")

        def watch(name: str, x: torch.Tensor, y: torch.Tensor) -> None:
            errors[name] = apart(rounding.get_submodule(name)(x), y)

        svdq_formulas.by_formulas(checkpoint, plain.model.diffusion_model, watch)
        wanted = run(checkpoint, plain.model.diffusion_model)
        assert len(errors) == quantized
        assert max(errors.values()) < FORMULAS, errors
        print(f"{name} {precision}: {apart(run(checkpoint, rounding), wanted):.1e} from formulas")
    finally:
        shutil.rmtree(tmp_path)  # gigabytes
