"""ModelOpt folders that this pack writes, against those of the real exporter.

The exporter calibrates the same float model; what it measured of activations is taken from its
files. All else must come out alike: the same tensors bit for bit, and a config that says the same.
"""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from support import oracle, pack
from test_written_sdnq import quantize, tensors_of

LowBitError = pack("quant.errors").LowBitError

# case of the oracle -> (method, settings, the input_scale of an activation's largest value)
CASES = {
    "fp8": ("fp8", {"activations": "static"}, 448),
    "fp8_per_channel_per_token": ("fp8", {"granularity": "row", "activations": "dynamic"}, None),
    "fp8_pb_wo": ("fp8", {"granularity": "block", "activations": "weight_only"}, None),
    "nvfp4": ("nvfp4", {"activations": "static"}, 448 * 6),
    "w4a16_nvfp4": ("nvfp4", {"activations": "weight_only"}, None),
    "w4a8_nvfp4_fp8": ("nvfp4", {"activations": "fp8"}, 448),
    "mxfp8": ("mxfp8", {"activations": "dynamic"}, None),
    "w8a8": ("int8", {"activations": "static"}, 127),
    "w8a16": ("int8", {"activations": "weight_only"}, None),
    "w4a16": ("int4", {"activations": "weight_only"}, None),
}
FAMILIES = ("flux", "wan_odd")
KEPT = ("!*", "*embedder*", "img_in", "txt_in", "time_in", "vector_in", "guidance_in",
        "final_layer", "patch_embedding", "text_embedding", "time_embedding", "time_projection",
        "head")  # fmt: skip


def cases_of(family):
    return [case for case in CASES if family == "flux" or case != "w4a16"]


@pytest.fixture(scope="module")
def made():
    return {family: oracle("modelopt_written.py", family, *cases_of(family)) for family in FAMILIES}


def write(folder, target, method, settings, scales, kept=KEPT):
    """Write ``folder`` with the activations' largest values of ``{module of the file: value}``."""
    job = pack("loaders.quantize_file")
    floats, containers = pack("loaders.float_model"), pack("loaders.writers").CONTAINERS
    plan = pack("loaders.plan").make_plan(folder)
    recipe = pack("quant.recipe").Recipe.make(method, settings, keep=kept)
    prepared = job.prepare(
        floats.FileFloats(plan), recipe, containers["modelopt"], config=plan.config
    )
    activations = pack("quant.engine").Activations
    by_native = {
        step.native[0]: activations(largest=scales[step.name])
        for step in prepared.steps
        if step.name in scales
    }
    report = prepared.run(target, activations=by_native)
    plan.source.close()
    return report


@pytest.mark.parametrize(
    ("family", "case"), [(family, case) for family in FAMILIES for case in cases_of(family)]
)
def test_tensors_are_the_exporters(made, tmp_path, family, case):
    method, settings, reach = CASES[case]
    theirs = tensors_of(made[family] / case)
    scales = {
        key.removesuffix(".input_scale"): float(value) * reach
        for key, value in theirs.items()
        if reach and key.endswith(".input_scale")
    }
    target = tmp_path / case
    # The exporter's default configs leave a single block's last layer alone.
    report = write(made[family] / "float", target, method, settings, scales,
                   (*KEPT, "single_blocks.*.linear2"))  # fmt: skip
    assert report.layers
    found = tensors_of(target)
    assert {k: (v.dtype, v.shape) for k, v in found.items()} == {
        k: (v.dtype, v.shape) for k, v in theirs.items()
    }
    for key, value in theirs.items():
        if key.endswith("input_scale"):
            assert torch.allclose(found[key], value, rtol=1e-6), key
        else:
            same = found[key].reshape(-1).view(torch.uint8) == value.reshape(-1).view(torch.uint8)
            assert same.all(), (key, float(same.float().mean()))
    ours, exported = (
        json.loads((folder / "config.json").read_text("utf-8"))["quantization_config"]
        for folder in (target, made[family] / case)
    )
    assert ours["quant_algo"].upper() == exported["quant_algo"].upper()
    assert ours["quant_method"] == "modelopt"
    assert ours.get("config_groups") == exported.get("config_groups")


@pytest.mark.parametrize("case", ["awq", "svd", "mixed"])
def test_what_needs_no_exporter_is_read_back(made, tmp_path, case):
    """Forms whose numbers are this pack's own: read back they are what was quantized."""
    more = {}
    if case == "mixed":
        settings = {}
        more["overrides"] = {
            "*.img_mlp*": {"method": "fp8"},
            "*.txt_mlp*": {"method": "int8", "activations": "weight_only"},
        }
    else:
        settings = {"awq": True, "rank": 16 if case == "svd" else 0}
    report = quantize(
        made["flux"] / "float", tmp_path / case, settings, "modelopt", "nvfp4", **more
    )
    make_plan, floats = pack("loaders.plan").make_plan, pack("loaders.float_model").FileFloats
    plans = [make_plan(made["flux"] / "float"), make_plan(tmp_path / case)]
    source, found = map(floats, plans)
    assert plans[1].detection.scheme == "modelopt"
    assert {p.key for m in plans[1].moves for p in m.pieces} == {
        p.key for m in plans[0].moves for p in m.pieces
    }
    entries = plans[1].entries
    for name, error in report.layers.items():
        meant = plans[0].entries[f"{name}.weight"].read().float()
        value = entries[f"{name}.weight"].read().dequantize()
        relative = (value - meant).norm() / meant.norm()
        assert abs(relative - error.relative) < 0.02 * error.relative, name
    assert found.shapes == source.shapes
    for plan in plans:
        plan.source.close()


def test_what_modelopt_has_no_form_for_is_told(made, tmp_path):
    source = made["flux"] / "float"
    for method, settings, word in (
        ("sdnq", {"weights_dtype": "uint4"}, "sdnq"),
        ("fp8", {"dtype": "float8_e5m2"}, "float8_e5m2"),
        ("int8", {"activations": "dynamic"}, "int8"),
        ("int4", {"symmetric": False}, "uint4"),
        ("int4", {"group_size": 64}, "groups of 64"),
    ):
        with pytest.raises(LowBitError, match="cannot hold this layer") as caught:
            quantize(source, tmp_path / "a", settings, "modelopt", method)
        assert word in caught.value.found
    assert not list(tmp_path.iterdir())


def test_float_files_are_as_they_were(made, tmp_path):
    target = tmp_path / "a"
    quantize(made["flux"] / "float", target, {}, "modelopt", "fp8")
    source = load_file(next((made["flux"] / "float").glob("*.safetensors")))
    found = tensors_of(target)
    plain = [key for key in source if found[key].dtype == torch.bfloat16]
    assert plain and all(torch.equal(found[key], source[key]) for key in plain)
