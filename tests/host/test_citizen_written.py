"""Save Quantized Model: a MODEL written as it is, or quantized to any container while it is."""

from __future__ import annotations

import json

import citizens
import comfy.model_management as mm
import pytest
import torch
from safetensors import safe_open
from support import pack
from test_citizen_quantize import CHANGED, dequantized, lora, quantized

KEY = CHANGED.removeprefix("diffusion_model.")


@pytest.fixture(autouse=True)
def as_nodes_run():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def weights():
    return citizens.floats(citizens.load("int8"))


@pytest.fixture
def source(weights):
    return citizens.plain_model(weights)


def save(patcher, target, container="comfy", method=None, settings=None, **how):
    if method is not None:
        how["recipe"] = pack("quant.recipe").Recipe.make(method, settings or {})
    return pack("loaders.host.saving").save_model(patcher, target, container, **how)


def read(path):
    plan = pack("loaders.plan").make_plan(path)
    with plan.source:
        floats = pack("loaders.float_model").FileFloats(plan)
        return {key: floats.read(key).float() for key in floats.shapes}, plan.detection.scheme


@pytest.mark.parametrize("case", ["uint4", "uint4_had_svd", citizens.MIXED])
def test_a_loaded_model_is_written_as_it_is(case, tmp_path):
    ours = citizens.load(case)
    bits, out = citizens.codes(ours), citizens.run(citizens.on_device(ours))
    assert save(ours, tmp_path / "out.safetensors") is None
    again = citizens.load(tmp_path / "out.safetensors")
    assert citizens.same_codes(bits, citizens.codes(again))
    assert citizens.error(citizens.run(citizens.on_device(again)), out) < 1e-5


@pytest.mark.parametrize("case", ["uint4-svd", "fp8"])
def test_a_lora_is_baked_into_the_file_alone(source, case, tmp_path):
    made, report = quantized(source, case)
    patched, delta = lora(made)
    bits = citizens.codes(made)
    save(patched, tmp_path / "out.safetensors")
    assert (tmp_path / "out.report.json").is_file()
    with safe_open(tmp_path / "out.safetensors", "pt") as opened:
        told = json.loads(opened.metadata()["lowbit"])
    assert told["recipe"] == report.recipe and told["error"]
    mm.unload_all_models()
    assert citizens.same_codes(bits, citizens.codes(made))
    found, before = read(tmp_path / "out.safetensors")[0], dequantized(made)
    for key, value in before.items():
        if key == KEY:
            apart = (found[key] - value - delta).norm() / delta.norm()
            assert apart < (0.02 if case == "uint4-svd" else 1), apart
            assert not torch.equal(found[key], value)
        else:
            assert torch.equal(found[key], value), key


@pytest.mark.parametrize(
    ("container", "method", "settings", "scheme", "bound"),
    [
        ("comfy", "int4", {}, "lowbit", 0.15),
        ("sdnq", "sdnq", {"weights_dtype": "uint4", "use_svd": True}, "sdnq", 0.12),
        ("modelopt", "nvfp4", {}, "modelopt", 0.12),
        ("modelopt", "fp8", {}, "modelopt", 0.04),
        ("nunchaku", "svdquant", {}, "svdq", 0.13),
    ],
)
def test_a_float_model_is_written_to_any_container(
    source, weights, tmp_path, container, method, settings, scheme, bound
):
    """And its LoRA with it; the source stays."""
    patched, delta = lora(source)
    target = tmp_path / "out.safetensors"
    report = save(patched, target, container, method, settings)
    assert report.totals.layers > 20 and report.chart is not None
    found, told = read(target)
    assert told == scheme and found.keys() == weights.keys()
    wanted = {**weights, KEY: weights[KEY] + delta}
    apart = {k: float((found[k] - v).norm() / v.norm()) for k, v in wanted.items() if v.norm() > 0}
    assert max(apart.values()) < bound, sorted(apart.items(), key=lambda item: -item[1])[:3]
    mm.unload_all_models()
    assert all(torch.equal(v, weights[k]) for k, v in dequantized(source).items())


def test_what_would_round_once_more_is_asked_for(source, tmp_path):
    error = pack("quant.errors").LowBitError
    made, _ = quantized(source, "uint4-svd")
    for how in ({"container": "sdnq"}, {"method": "fp8"}):
        with pytest.raises(error, match="rounding its weights once more"):
            save(made, tmp_path / "out", **how)
    with pytest.raises(error, match="has to be quantized first"):
        save(source, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    # the recipe that it was quantized with is known
    report = save(made, tmp_path / "out", "sdnq", requantize=True)
    assert report.recipe == made.get_attachment("lowbit_quantized").recipe
    assert read(tmp_path / "out")[1] == "sdnq"


@pytest.mark.parametrize("method", [None, "fp8"])
def test_an_interrupt_leaves_nothing(source, tmp_path, method):
    patcher = source if method else quantized(source, "fp8")[0]

    def progress(done, total, name):
        if done > 30:
            raise mm.InterruptProcessingException

    with pytest.raises(mm.InterruptProcessingException):
        save(patcher, tmp_path / "out.safetensors", method=method, progress=progress)
    assert list(tmp_path.iterdir()) == []
