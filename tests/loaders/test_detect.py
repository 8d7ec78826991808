"""Which scheme a checkpoint is in, by each witness; what a choice of one can and cannot do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from broken_inputs import Tensor, marker, sdnq_layer, weights, write
from support import pack

source = pack("loaders.source")
detect = pack("loaders.detect")
LowBitError = pack("quant.errors").LowBitError

SDNQ = {"quant_method": "sdnq", "sdnq_version": "0.2.8", "weights_dtype": "int8"}
STATE = "quant_state.bitsandbytes__nf4"  # beside a weight
F8: Tensor = ("F8_E4M3", [2, 2], bytes(4))
ONE: Tensor = ("F32", [], bytes(4))


def opened(
    tmp_path: Path,
    tensors: dict[str, Tensor],
    config: dict | None = None,
    metadata: dict | None = None,
):
    write(tmp_path / "diffusion_pytorch_model.safetensors", tensors, metadata)
    if config is not None:
        text = json.dumps({"quantization_config": config})
        (tmp_path / "config.json").write_text(text, encoding="utf-8")
    return source.open_source(tmp_path)


def layers(**formats: str) -> dict[str, str]:
    entries = {name: {"format": value} for name, value in formats.items()}
    return {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": entries})}


@pytest.mark.parametrize("method", ["sdnq", "sdnq_training", "SDNQ"])
def test_sdnq_by_config(method: str, tmp_path: Path):
    found = detect.detect_scheme(opened(tmp_path, sdnq_layer("a"), SDNQ | {"quant_method": method}))
    assert found.scheme == "sdnq"
    told = " ".join(found.evidence)
    assert "config.json" in told and "0.2.8" in told and "1 layers" in told


def test_sdnq_by_a_config_without_method(tmp_path: Path):
    found = detect.detect_scheme(opened(tmp_path, sdnq_layer("a"), {"weights_dtype": "int8"}))
    assert found.scheme == "sdnq" and "weights_dtype int8" in " ".join(found.evidence)


SDNQ_PAIRS: dict[str, dict[str, Tensor]] = {
    "rowwise int8": sdnq_layer("a"),
    "packed uint4": {
        "a.weight": ("U8", [16], bytes(16)),
        "a.scale": ("BF16", [4, 2, 1], bytes(16)),
        "a.zero_point": ("BF16", [4, 2, 1], bytes(16)),
    },
    "uint1 in int64": {"a.weight": ("I64", [2], bytes(16)), "a.scale": ONE},
    "int12": {"a.weight": ("I16", [2, 3], bytes(12)), "a.scale": ("F32", [2, 1], bytes(8))},
    "custom 16-bit float": {
        "a.weight": ("U16", [2], bytes(4)),
        "a.scale": ("F32", [2, 1], bytes(8)),
    },
    "fp8 transposed": {"a.weight": F8, "a.scale": ("F32", [1, 2], bytes(8))},
    "fp16": {"a.weight": ("F16", [2, 2], bytes(8)), "a.scale": ("F32", [2, 1], bytes(8))},
    "conv": {
        "a.weight": ("I8", [2, 2, 1, 1], bytes(4)),
        "a.scale": ("F32", [2, 1, 1, 1], bytes(8)),
    },
    "double quantized": {
        "a.weight": ("U8", [2], bytes(2)),
        "a.scale": ("U8", [2, 1], bytes(2)),
        "a.scale_2": ("F32", [1], bytes(4)),
    },
    "codebook": {"a.weight": ("U8", [2], bytes(2)), "a.scale": ("F32", [16], bytes(64))},
}


@pytest.mark.parametrize("kind", SDNQ_PAIRS)
def test_sdnq_by_its_tensors_alone(kind: str, tmp_path: Path):
    found = detect.detect_scheme(opened(tmp_path, SDNQ_PAIRS[kind]))
    assert found.scheme == "sdnq" and "such as a with" in found.evidence[0]


def test_sdnq_pairs_across_shards(tmp_path: Path):
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    tensors = sdnq_layer("a")
    write(tmp_path / names[0], {"a.weight": tensors["a.weight"]})
    write(tmp_path / names[1], {"a.scale": tensors["a.scale"]})
    assert detect.detect_scheme(source.open_source(tmp_path)).scheme == "sdnq"


def test_a_layer_that_merely_has_a_scale_is_plain(tmp_path: Path):
    norm = {"a.weight": ("BF16", [4], bytes(8)), "a.scale": ("BF16", [4], bytes(8))}
    assert detect.detect_scheme(opened(tmp_path, norm)).scheme == "comfy"
    alone = {"norm.query_norm.scale": ("F32", [2, 1], bytes(8))}
    assert detect.detect_scheme(opened(tmp_path, alone)).scheme == "comfy"


def test_plain_weights_are_left_to_comfyui(tmp_path: Path):
    tensors = weights("a.weight", "b.weight") | {"c.weight": F8, "ids": ("I64", [1], bytes(8))}
    found = detect.detect_scheme(opened(tmp_path, tensors, metadata={"format": "pt"}))
    assert found.scheme == "comfy" and "2 F32, 1 F8_E4M3" in found.evidence[0]


COMFY: dict[str, tuple[dict[str, Tensor], dict | None]] = {
    "marker": (
        {"a.weight": F8, "a.weight_scale": ONE, "a.comfy_quant": marker({"format": "nvfp4"})},
        None,
    ),
    "marker padded by NULs": (
        {"a.weight": F8, "a.comfy_quant": marker(b'{"format": "nvfp4"}\0\0')},
        None,
    ),
    "marker of our own name elsewhere": (
        {"a.weight": F8, "a.comfy_quant": marker({"format": "not_lowbit_x"})},
        None,
    ),
    "metadata": ({"a.weight": F8, "a.weight_scale": ONE}, layers(a="float8_e4m3fn")),
    "metadata without the prefix": (
        {"model.diffusion_model.a.weight": F8, "model.diffusion_model.a.weight_scale": ONE},
        layers(a="float8_e4m3fn"),
    ),
    "scaled_fp8": ({"scaled_fp8": F8, "a.weight": F8, "a.scale_weight": ONE}, None),
    "scaled_fp8 in a checkpoint": (
        {"model.diffusion_model.scaled_fp8": F8, "model.diffusion_model.a.scale_weight": ONE},
        None,
    ),
}


@pytest.mark.parametrize("kind", COMFY)
def test_comfyuis_own_formats(kind: str, tmp_path: Path):
    tensors, metadata = COMFY[kind]
    assert detect.detect_scheme(opened(tmp_path, tensors, None, metadata)).scheme == "comfy"


QWEIGHT: Tensor = ("I8", [2, 2], bytes(4))

SVDQ: dict[str, tuple[dict[str, Tensor], dict | None, dict | None]] = {
    "W4A4 layers": ({"a.qweight": QWEIGHT, "a.wscales": F8}, None, None),
    "W4A16 layers": ({"a.qweight": QWEIGHT, "a.wscales": F8, "a.wzeros": F8}, None, None),
    "model_class": (
        {"a.qweight": QWEIGHT, "a.wscales": F8},
        {"model_class": "NunchakuFluxTransformer2dModel"},
        None,
    ),
    "method": (
        {"a.qweight": QWEIGHT, "a.wscales": F8},
        {"quantization_config": '{"method": "svdquant", "weight": {"dtype": "int4"}}'},
        None,
    ),
    "manifest alone": (
        {"a.qweight": QWEIGHT, "a.wscales": F8},
        {"quantization_config": '{"runtime_manifest": {}}'},
        None,
    ),
    "Nunchaku Lite": (
        {"a.qweight": QWEIGHT, "a.wscales": F8},
        None,
        {"quant_method": "nunchaku_lite", "svdq_w4a4": {"targets": ["a"]}},
    ),
    "config without method": (
        {"a.qweight": QWEIGHT, "a.wscales": F8},
        None,
        {"svdq_w4a4": {"targets": ["a"]}},
    ),
    "W4A4 marker": (
        {"a.weight": QWEIGHT, "a.comfy_quant": marker({"format": "svdquant_w4a4"})},
        None,
        None,
    ),
    "W4A16 marker": (
        {"a.weight": QWEIGHT, "a.comfy_quant": marker({"format": "awq_w4a16"})},
        None,
        None,
    ),
    "marker in the metadata": ({"a.weight": QWEIGHT}, layers(a="svdquant_w4a4"), None),
    "marker beside core's": (
        {
            "a.weight": QWEIGHT,
            "a.comfy_quant": marker({"format": "svdquant_w4a4"}),
            "b.weight": F8,
            "b.comfy_quant": marker({"format": "float8_e4m3fn"}),
        },
        None,
        None,
    ),
    "layers beside core's marker": (
        {
            "a.qweight": QWEIGHT,
            "a.wscales": F8,
            "b.weight": F8,
            "b.comfy_quant": marker({"format": "nvfp4"}),
        },
        None,
        None,
    ),
}


@pytest.mark.parametrize("kind", SVDQ)
def test_svdquant_in_all_its_forms(kind: str, tmp_path: Path):
    tensors, metadata, config = SVDQ[kind]
    found = opened(tmp_path, tensors, config, metadata)
    assert detect.detect_scheme(found).scheme == "svdq"
    assert detect.detect_scheme(found, "svdq").scheme == "svdq"


def test_a_name_is_no_sign_of_svdquant(tmp_path: Path):
    plain = write(tmp_path / "svdq-int4_r32-flux.safetensors", weights("a.weight"))
    assert detect.detect_scheme(source.open_source(plain)).scheme == "comfy"


@pytest.mark.parametrize("by", ["tensors", "model_class", "both"])
def test_nunchakus_text_encoder_is_no_diffusion_model(by: str, tmp_path: Path):
    tensors = weights("a.weight")
    if by != "model_class":
        tensors |= {f"b.{name}": F8 for name in ("qweight", "scales", "scaled_zeros")}
    metadata = {} if by == "tensors" else {"model_class": "NunchakuT5EncoderModel"}
    with pytest.raises(LowBitError) as caught:
        detect.detect_scheme(opened(tmp_path, tensors, None, metadata))
    assert "text encoder" in caught.value.what and "CLIP loader" in caught.value.remedy


def test_markers_by_layer(tmp_path: Path):
    """Those of the tensors come before those of the metadata."""
    tensors = {"b.weight": F8, "b.comfy_quant": marker({"format": "nvfp4", "x": 1})}
    found = detect.marked_layers(opened(tmp_path, tensors, None, layers(a="u", b="v")))
    assert found["a"] == found["model.diffusion_model.a"] == {"format": "u"}
    assert found["b"] == {"format": "nvfp4", "x": 1}
    assert detect.marked_layers(opened(tmp_path / "b", weights("a.weight"))) == {}


def test_our_own_saved_form(tmp_path: Path):
    """A layer that is our own makes the file ours, whatever core's formats the others have."""
    tensors = sdnq_layer("a") | {
        "a.comfy_quant": marker({"format": "lowbit_affine"}),
        "b.weight": F8,
        "b.comfy_quant": marker({"format": "float8_e4m3fn"}),
    }
    found = detect.detect_scheme(opened(tmp_path, tensors))
    assert found.scheme == "lowbit"
    assert "1 lowbit_affine" in found.evidence[0] and "1 float8_e4m3fn" in found.evidence[1]
    metadata = layers(a="lowbit_affine")
    assert (
        detect.detect_scheme(opened(tmp_path, sdnq_layer("a"), None, metadata)).scheme == "lowbit"
    )


def test_who_is_believed_beside_a_modelopt_config(tmp_path: Path):
    """Markers win over an export's config; mere metadata is ModelOpt's own then."""
    modelopt = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
    tensors = {"a.weight": F8, "a.comfy_quant": marker({"format": "nvfp4"})}
    assert detect.detect_scheme(opened(tmp_path, tensors, modelopt)).scheme == "comfy"
    metadata = layers(a="nvfp4") | {"quantization_config": json.dumps(modelopt)}
    found = opened(tmp_path / "b", {"a.weight": F8}, None, metadata)
    assert detect.detect_scheme(found).scheme == "modelopt"
    flat = {"_quantization_metadata": json.dumps(modelopt)}
    found = opened(tmp_path / "c", {"a.weight": F8}, None, flat)
    assert detect.detect_scheme(found).scheme == "modelopt"


MODELOPT: dict[str, dict | None] = {
    "tensors": None,
    "modelopt": {"quant_method": "modelopt", "quant_algo": "FP8"},
    "modelopt_fp4": {"quant_method": "modelopt_fp4"},
    "algorithm": {"quant_algo": "FP8", "producer": {}},
    "producer": {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8"}},
}


@pytest.mark.parametrize("by", MODELOPT)
def test_modelopt_by_tensors_and_config(by: str, tmp_path: Path):
    tensors = {"a.weight": F8, "a.weight_scale": ONE, "a.input_scale": ONE}
    found = opened(tmp_path, tensors, MODELOPT[by])
    assert detect.detect_scheme(found).scheme == "modelopt"
    assert detect.detect_scheme(found, "modelopt").scheme == "modelopt"


def test_modelopt_by_its_own_file(tmp_path: Path):
    (tmp_path / "hf_quant_config.json").write_text("{}", encoding="utf-8")
    assert detect.detect_scheme(opened(tmp_path, {"a.weight": F8}, {})).scheme == "modelopt"


CHANNELS = {"quant_method": "compressed-tensors", "format": "float-quantized"}


@pytest.mark.parametrize(
    ("scale", "config"),
    [
        ("weight_scale_inv", None),
        ("weight_scale_inv", {"quant_method": "fp8", "weight_block_size": [128, 128]}),
        ("weight_scale", {"quant_method": "fp8"}),
        ("weight_scale", CHANNELS),
    ],
)
def test_scaled_fp8_of_other_producers(scale: str, config: dict | None, tmp_path: Path):
    found = opened(tmp_path, {"a.weight": F8, f"a.{scale}": ONE}, config)
    assert detect.detect_scheme(found).scheme == "fp8"


@pytest.mark.parametrize(
    ("method", "named"),
    [
        ("gptq", "GPTQ / AWQ"),
        ("awq", "GPTQ / AWQ"),
        ("compressed-tensors", "compressed-tensors"),
        ("gguf", "GGUF"),
    ],
)
def test_other_methods_are_refused_by_name(method: str, named: str, tmp_path: Path):
    with pytest.raises(LowBitError) as caught:
        detect.detect_scheme(opened(tmp_path, weights("a.weight"), {"quant_method": method}))
    assert named in caught.value.what and method in caught.value.found and caught.value.remedy


@pytest.mark.parametrize(
    ("scheme", "names"),
    [
        ("bitsandbytes", ("weight", "weight.absmax", "weight.quant_map", f"weight.{STATE}")),
        ("bitsandbytes", ("weight", f"weight.{STATE}")),
        ("bitsandbytes", ("weight", "weight.quant_state.bitsandbytes__fp4")),
        ("bitsandbytes", ("weight", "SCB")),
        ("quanto", ("weight._data", "weight._scale")),
        ("quanto", ("weight._data._data", "weight._scale", "weight._shift")),
        ("torchao", ("_weight_qdata", "_weight_scale")),
    ],
)
def test_other_packages_by_their_tensors_or_config(scheme: str, names, tmp_path: Path):
    shown = opened(tmp_path, weights(*(f"a.b.{name}" for name in names)))
    found = detect.detect_scheme(shown)
    assert found.scheme == scheme
    assert "1 layers" in found.evidence[0] and "a.b" in found.evidence[0]
    told = opened(tmp_path / "b", weights("a.weight"), {"quant_method": scheme})
    assert detect.detect_scheme(told).scheme == scheme


def test_an_empty_config_declares_nothing(tmp_path: Path):
    assert detect.detect_scheme(opened(tmp_path, weights("a.weight"), {})).scheme == "comfy"


def test_an_agreeing_override(tmp_path: Path):
    found = detect.detect_scheme(opened(tmp_path, sdnq_layer("a"), SDNQ), "sdnq")
    assert found.scheme == "sdnq" and "chosen by the user" in found.evidence[0]
    assert len(found.evidence) == 3
    plain = opened(tmp_path / "b", weights("a.weight"))
    assert detect.detect_scheme(plain, "comfy").scheme == "comfy"


@pytest.mark.parametrize(
    ("tensors", "config", "override", "named"),
    [
        (sdnq_layer("a"), None, "comfy", ("comfy", "sdnq")),
        (sdnq_layer("a"), SDNQ, "lowbit", ("lowbit", "sdnq")),
        (weights("a.weight"), SDNQ, "comfy", ("comfy", "sdnq")),
        (weights("a.weight"), None, "sdnq", ("sdnq", "plain weights")),
        (COMFY["marker"][0], None, "sdnq", ("sdnq", "comfy")),
        (COMFY["marker"][0], SDNQ, "sdnq", ("sdnq", "comfy")),
        ({"a.qweight": F8, "a.wscales": ONE}, None, "sdnq", ("sdnq", "svdq")),
    ],
)
def test_a_contradicting_override_names_both(tensors, config, override, named, tmp_path: Path):
    with pytest.raises(LowBitError, match="was asked for") as caught:
        detect.detect_scheme(opened(tmp_path, tensors, config), override)
    assert all(name in caught.value.what for name in named)


def test_an_override_settles_a_config_that_belongs_elsewhere(tmp_path: Path):
    mixed = opened(tmp_path, sdnq_layer("a"), {"quant_method": "torchao"})
    with pytest.raises(LowBitError, match="contradicts itself"):
        detect.detect_scheme(mixed)
    assert detect.detect_scheme(mixed, "sdnq").scheme == "sdnq"


@pytest.mark.parametrize(("override", "what"), [("gptq", "GPTQ"), ("magic", "unknown scheme")])
def test_an_override_that_is_no_scheme(override: str, what: str, tmp_path: Path):
    with pytest.raises(LowBitError) as caught:
        detect.detect_scheme(opened(tmp_path, weights("a.weight")), override)
    assert (
        what in caught.value.what and ", ".join(("auto", *detect.SCHEMES)) in caught.value.expected
    )
