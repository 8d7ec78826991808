"""Whole checkpoints of the real ModelOpt, every algorithm and preset that it exports.

Two measures: each native tensor that the pack makes equals ModelOpt's own float32 dequantization
of the file, and the MODEL that the real ComfyUI builds of it computes what diffusers computes with
those weights. In the checkpoints that need it, layers left in 16 bits are smoothed, too.
"""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from comfy_models import comfy_forward, run_inputs
from safetensors.torch import load_file
from support import oracle, pack, run_oracle
from test_sdnq_models import expected_weights, native_tensor

WEIGHTS = 1e-6
OUTPUTS = 1e-5

ALGORITHMS = (
    "fp8", "fp8_per_channel_per_token", "fp8_pb_wo", "nvfp4", "w4a16_nvfp4", "nvfp4_awq",
    "nvfp4_svd", "w4a8_nvfp4_fp8", "mxfp8", "mxfp4", "w4a8_mxfp4_fp8", "w8a8_sq", "w8a8", "w8a16",
    "preset_fp8", "preset_int8", "preset_nvfp4", "preset_nvfp4_fp8_mha", "fp8_layerwise",
    "nvfp4_sharded", "fp8_half", "nvfp4_svd_half", "nvfp4_svd_early", "w8a8_sq_early",
)  # fmt: skip
REWRITTEN = ("nvfp4_layerwise", "nvfp4_swizzled", "nvfp4_swizzled_only", "nvfp4_padded_swizzled")
INT4 = ("w4a16_awq", "w4a16", "w4a8_awq", "mixed", "w4a16_nvfp4_mlp")
#: widths that are no multiples of 128 rows or of 4 groups, so that scales in tiles show it
ODD = (*ALGORITHMS, *REWRITTEN, "nvfp4_pipeline")
FLUX = ("fp8", "nvfp4", "nvfp4_awq", "preset_nvfp4", "preset_nvfp4_fp8_mha", "w8a8_sq", "w8a8",
        "mxfp4", "nvfp4_swizzled", *INT4)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def host():
    return pack()


@pytest.fixture(scope="module")
def odd():
    return oracle("modelopt_files.py", "wan_odd", *ODD)


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flux")
    run_oracle("modelopt_files.py", folder, "flux", *FLUX)
    yield folder
    shutil.rmtree(folder)


def meaning_of(folder, case):
    """``{key: float32 weight}``: what the layer multiplies raw activations by."""
    golden = load_file(folder / f"{case}.golden.safetensors")
    whole = {key: value for key, value in golden.items() if key.endswith(".meaning")}
    return golden, {
        **{key: value for key, value in golden.items() if key.endswith(".weight")},
        **{f"{key.removesuffix('.meaning')}.weight": value for key, value in whole.items()},
    }


def options_of(case):
    """The override that the user gives, where a file does not tell its bytes."""
    return {"nvfp4_layout": "low_tiles"} if case == "nvfp4_swizzled" else {}


def assert_native_tensors(plan, meaning, native):
    """Every native tensor is assembled of what ModelOpt says."""
    quantized = 0
    for key, expected in expected_weights(plan, meaning):
        got, low_bit = native(key)
        assert got.shape == expected.shape, key
        error = (got - expected).abs().max() / expected.abs().max().clamp_min(1e-30)
        assert error <= WEIGHTS, f"{key} differs by {error:.2e}"
        quantized += low_bit
    return quantized


@pytest.mark.parametrize("case", ODD)
def test_native_tensors_mean_what_modelopt_says(odd, case):
    _, meaning = meaning_of(odd, case)
    plan = pack("loaders.plan").make_plan(odd / case)
    assert plan.family.name == "wan" and plan.detection.scheme == "modelopt"
    formats = json.loads((odd / "cases.json").read_text())[case]["formats"]
    assert {entry.key for entry in plan.quantized()} == {f"{name}.weight" for name in formats}
    folded = {key for key, entry in plan.entries.items() if entry.notes and not entry.parts}
    assert folded == {key for key in meaning if key.removesuffix(".weight") not in formats}
    translate = pack("loaders.translate")
    made = {
        key: value for key, value, _ in translate.translate(plan, translate.Settings(torch.float32))
    }

    def native(key):
        low_bit = hasattr(made[key], "_layout_cls")
        return (made[key].dequantize() if low_bit else made[key]).float(), low_bit

    assert assert_native_tensors(plan, meaning, native) == len(formats)
    if case in REWRITTEN:
        want = "row by row" if case == "nvfp4_layerwise" else "in tiles"
        assert want in plan.contents.facts["nvfp4 layout"]
    assert not any(label.startswith("stale") for label in plan.contents.facts)
    plan.source.close()


@pytest.mark.parametrize("case", FLUX)
def test_a_model_means_and_computes_what_diffusers_does(flux, case):
    """Fused q, k, v and MLP stand side by side, each with scales and smoothing of its own."""
    api, plans = pack("loaders.host.api"), pack("loaders.plan")
    _, meaning = meaning_of(flux, case)
    run = load_file(flux / f"{case}.run.safetensors")
    options = {"matmul": "dequantize", "compute_dtype": "fp32", **options_of(case)}
    model = api.load_diffusion_model(str(flux / case), options).model.diffusion_model
    scheme = pack("loaders.schemes.base").SchemeOptions(**options_of(case))
    plan = plans.make_plan(flux / case, options=scheme, native_shapes=api.native_shapes)
    quantized = assert_native_tensors(plan, meaning, lambda key: native_tensor(model, key))
    assert quantized >= (1 if case == "w4a16_nvfp4_mlp" else 10)
    out = comfy_forward("flux", model, run_inputs(run))
    error = (out - run["out"]).abs().max() / run["out"].abs().max()
    assert error <= OUTPUTS, f"output differs by {error:.2e}"
    plan.source.close()


@pytest.mark.parametrize("case", ["preset_nvfp4", "preset_nvfp4_fp8_mha"])
def test_the_formats_own_arithmetic(flux, case):
    """With activations rounded as ModelOpt's own model rounds them, static second level and all.

    Its default configurations (not the presets) quantize inputs of norms as well, which no file
    says: only the presets can be compared whole.
    """
    run = load_file(flux / f"{case}.run.safetensors")
    options = {"matmul": "faithful", "compute_dtype": "fp32"}
    patcher = pack("loaders.host.api").load_diffusion_model(str(flux / case), options)
    out = comfy_forward("flux", patcher.model.diffusion_model, run_inputs(run))

    def apart(other):
        return float((out - other).abs().max() / other.abs().max())

    assert apart(run["fake"]) <= OUTPUTS and apart(run["out"]) > 0.01


@pytest.mark.parametrize("matmul", ["int8", "auto", "faithful"])
def test_int8_with_activations_of_one_scale_a_row(flux, matmul):
    run = load_file(flux / "w8a8.run.safetensors")
    options = {"matmul": matmul, "compute_dtype": "fp32"}
    patcher = pack("loaders.host.api").load_diffusion_model(str(flux / "w8a8"), options)
    out = comfy_forward("flux", patcher.model.diffusion_model, run_inputs(run))
    error = float((out - run["out"]).abs().max() / run["out"].abs().max())
    assert error <= (3e-2 if matmul == "faithful" else 1e-2)
    assert (error > 1e-3) == (matmul == "faithful")  # few rows are dequantized, unless faithful


@pytest.mark.parametrize(
    ("case", "capability", "layout"),
    [("fp8", (8, 9), "TensorCoreFP8E4M3Layout"), ("nvfp4", (10, 0), "TensorCoreNVFP4Layout")],
)
def test_unfused_layers_are_comfyuis_own_where_it_is_fast(
    flux, case, capability, layout, monkeypatch
):
    """Of the same weights, bit for bit; ComfyUI rounds the activations there."""
    api, plans, report = (
        pack(name) for name in ("loaders.host.api", "loaders.plan", "loaders.report")
    )
    for module in (api, report):
        monkeypatch.setattr(module, "capability_of", lambda device: capability)
    patcher = api.load_diffusion_model(str(flux / case), {"compute_dtype": "fp32"})
    model = patcher.model.diffusion_model
    _, meaning = meaning_of(flux, case)
    plan = plans.make_plan(flux / case, native_shapes=api.native_shapes)
    assert_native_tensors(plan, meaning, lambda key: native_tensor(model, key))
    layouts = [
        getattr(m.weight, "_layout_cls", "") for m in model.modules() if hasattr(m, "weight")
    ]
    assert layouts.count(layout) >= 9 and layouts.count("LowBitCompositeLayout") >= 1
    run = load_file(flux / f"{case}.run.safetensors")
    out = comfy_forward("flux", model, run_inputs(run))
    error = float((out - run["out"]).abs().max() / run["out"].abs().max())
    assert 1e-3 < error < 0.3  # rounded, as it would not be in a composite
    facts = pack("loaders.host.devices").device_facts()
    told = report.inspect(plan, facts).kernels
    assert any("by ComfyUI's own" in line and count >= 9 for line, count in told.items())
    plan.source.close()


def test_even_shapes_do_not_tell_the_exporters_tiles(flux):
    error = pack("quant.errors").LowBitError
    with pytest.raises(error, match="Nothing tells how the bytes") as caught:
        pack("loaders.host.api").load_diffusion_model(str(flux / "nvfp4_swizzled"), {})
    assert "low_tiles" in caught.value.remedy


def test_a_pipeline_of_two_transformers(odd):
    """Wan 2.2 with only the primary one quantized: each opens as its own model."""
    plans = pack("loaders.plan")
    whole = plans.make_plan(odd / "nvfp4_pipeline")
    first = plans.make_plan(odd / "nvfp4_pipeline" / "transformer")
    second = plans.make_plan(odd / "nvfp4_pipeline" / "transformer_2")
    assert whole.detection == first.detection and first.quantized()
    assert second.detection.scheme == "comfy" and not second.quantized()
    assert {move.native for move in second.moves} == {move.native for move in first.moves}
    listed = pack("loaders.source").list_checkpoints([str(odd / "nvfp4_pipeline")])
    assert listed == ["transformer", "transformer_2"]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["flux", "flux2", "wan"])
def test_every_case_of_every_family(tmp_path, family):
    run_oracle("modelopt_files.py", tmp_path, family, "all")
    api, plans = pack("loaders.host.api"), pack("loaders.plan")
    try:
        for case in json.loads((tmp_path / "cases.json").read_text()):
            _, meaning = meaning_of(tmp_path, case)
            run = load_file(tmp_path / f"{case}.run.safetensors")
            told = {}
            if case in REWRITTEN:
                layout = "low_rows" if case == "nvfp4_layerwise" else "low_tiles"
                told = {"nvfp4_layout": layout}
            options = {"matmul": "dequantize", "compute_dtype": "fp32", **told}
            model = api.load_diffusion_model(str(tmp_path / case), options).model.diffusion_model
            scheme = pack("loaders.schemes.base").SchemeOptions(**told)
            plan = plans.make_plan(tmp_path / case, options=scheme, native_shapes=api.native_shapes)
            assert_native_tensors(plan, meaning, lambda key, m=model: native_tensor(m, key))
            out = comfy_forward(family, model, run_inputs(run))
            error = (out - run["out"]).abs().max() / run["out"].abs().max()
            assert error <= OUTPUTS, f"{case}: output differs by {error:.2e}"
            plan.source.close()
    finally:
        shutil.rmtree(tmp_path)


@pytest.mark.slow
def test_layers_of_a_small_qwen_image(tmp_path):
    """ComfyUI builds it at full width only: tensors are compared, not outputs."""
    run_oracle("modelopt_files.py", tmp_path, "qwen_image", "all")
    translate, plans = pack("loaders.translate"), pack("loaders.plan")
    for case in json.loads((tmp_path / "cases.json").read_text()):
        told = {}
        if case in REWRITTEN:
            layout = "low_rows" if case == "nvfp4_layerwise" else "low_tiles"
            told = {"nvfp4_layout": layout}
        scheme = pack("loaders.schemes.base").SchemeOptions(**told)
        plan = plans.make_plan(tmp_path / case, options=scheme)
        made = {
            key: value
            for key, value, _ in translate.translate(plan, translate.Settings(torch.float32))
        }

        def native(key, made=made):
            low_bit = hasattr(made[key], "_layout_cls")
            return (made[key].dequantize() if low_bit else made[key]).float(), low_bit

        assert assert_native_tensors(plan, meaning_of(tmp_path, case)[1], native) >= 1
        plan.source.close()
    shutil.rmtree(tmp_path)
