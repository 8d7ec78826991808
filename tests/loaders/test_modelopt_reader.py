"""ModelOpt layers of every kind, written by hand: what they mean, and what is told of them."""

from __future__ import annotations

import json

import pytest
import torch
from modelopt_cases import KINDS, declaration, layer, random_fp8, write
from support import pack

source = pack("loaders.source")
detect = pack("loaders.detect")
base = pack("loaders.schemes.base")
modelopt = pack("loaders.schemes.modelopt")
LowBitError = pack("quant.errors").LowBitError

SHAPES = {
    "fp8": [(5, 7), (64, 128)],
    "fp8-rows": [(5, 7), (64, 128)],
    "fp8-blocks": [(130, 96), (256, 384), (300, 200), (64, 131)],
    "nvfp4": [(3, 16), (96, 176), (64, 128)],
    "nvfp4-32": [(3, 96), (64, 128)],
    "mxfp8": [(3, 32), (64, 96)],
    "mxfp4": [(3, 32), (64, 96)],
    "int8": [(5, 7), (64, 128)],
    "int4": [(6, 128), (64, 192)],
}


def read(folder, **options):
    """Contents of a folder, as the plan would get them."""
    opened = source.open_source(folder)
    assert detect.detect_scheme(opened).scheme == "modelopt"
    return modelopt.read(opened, None, base.SchemeOptions(**options))


def relative(got, want) -> float:
    return float((got.double() - want).abs().max() / want.abs().max())


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(("kind", "shape"), [(k, s) for k, sizes in SHAPES.items() for s in sizes])
def test_a_layer_means_what_its_formula_says(kind, shape, seed, tmp_path):
    algorithm = KINDS[kind][0]
    extras = [{}, {"smooth": True}, {"rank": 4}, {"smooth": True, "rank": 4, "zero_dim": False}]
    layers, meanings = {}, {}
    for number, extra in enumerate(extras):
        layers[f"l{number}"], meanings[f"l{number}"] = layer(kind, shape, seed + number, **extra)
    contents = read(write(tmp_path, layers, declaration(algorithm)))
    for name, meaning in meanings.items():
        entry = contents.entries[f"{name}.weight"]
        weight = entry.read()
        weight.check()
        assert entry.shape == shape and entry.spec == weight.spec
        assert relative(weight.dequantize(), meaning) <= 1e-6
        assert set(entry.stored) == {f"{name}.{part}" for part in layers[name]} - {f"{name}.bias"}
        assert torch.equal(contents.entries[f"{name}.bias"].read(), layers[name]["bias"])
    assert len(contents.entries) == 2 * len(layers)


def test_a_convolution(tmp_path):
    """FP8 and int8 UNets have some."""
    generator = torch.Generator().manual_seed(3)
    eight = random_fp8((6, 4, 3, 3), generator)
    codes = torch.randint(-127, 128, (6, 4, 3, 3), dtype=torch.int8, generator=generator)
    scale = torch.rand(6, generator=generator) + 0.1
    layers = {
        "a": {"weight": eight, "weight_scale": torch.tensor(0.5), "input_scale": torch.tensor(2.0)},
        "b": {"weight": codes, "weight_scale": scale},
    }
    contents = read(write(tmp_path, layers))
    assert relative(contents.entries["a.weight"].read().dequantize(), eight.double() * 0.5) == 0
    want = codes.double() * scale.double()[:, None, None, None]
    assert relative(contents.entries["b.weight"].read().dequantize(), want) <= 1e-6
    assert contents.entries["a.weight"].wish is None


def test_float_layers_that_were_smoothed_before_they_were_left_out(tmp_path):
    quantized, _ = layer("int8", smooth=True)
    folded, meanings = {}, {}
    for name, smooth, rank in (("s", True, 0), ("sr", True, 8), ("r", False, 8)):
        tensors, _ = layer("int8", (24, 40), 4, smooth=smooth, rank=rank)
        tensors.pop("weight_scale")
        weight = torch.randn(24, 40).bfloat16()
        whole = weight.double()
        if rank:
            up, down = tensors["svdquant_lora_b"].double(), tensors["svdquant_lora_a"].double()
            whole = whole + up @ down
        meanings[name] = whole * tensors["pre_quant_scale"].double() if smooth else whole
        folded[name] = tensors | {"weight": weight}
    plain = {"weight": torch.randn(8, 8).bfloat16(), "bias": torch.randn(8)}
    contents = read(write(tmp_path, {"a": quantized, "p": plain, **folded}))
    for name, meaning in meanings.items():
        entry = contents.entries[f"{name}.weight"]
        assert entry.parts == () and "folded" in entry.notes[0]
        assert relative(entry.read(), meaning) <= 1e-6
    assert torch.equal(contents.entries["p.weight"].read(), plain["weight"])
    assert {"s.weight", "s.bias", "p.bias"} <= set(contents.entries)
    assert "left in 16 bits" in contents.facts and "sr" in contents.facts["left in 16 bits"]


ROUNDING = {
    # (kind, algorithm, input_scale): (format, group, scale, static), wish
    ("fp8", "FP8", True): (("float8_e4m3fn", -1, "float32", True), "faithful"),
    ("fp8", "FP8", False): (None, None),
    ("fp8", None, True): (("float8_e4m3fn", -1, "float32", True), "faithful"),
    ("fp8-rows", "FP8_PER_CHANNEL_PER_TOKEN", False): (
        ("float8_e4m3fn", 0, "float32", False),
        "faithful",
    ),
    ("fp8-rows", None, False): (None, None),
    ("fp8-blocks", "fp8_pb_wo", False): (None, None),
    ("nvfp4", "NVFP4", True): (("float4_e2m1fn", 16, "float8_e4m3fn", True), "faithful"),
    ("nvfp4", "W4A16_NVFP4", False): (None, None),
    ("nvfp4-32", "W4A8_NVFP4_FP8", True): (("float8_e4m3fn", -1, "float32", True), "faithful"),
    ("nvfp4-32", "W4A16_NVFP4", False): (None, None),
    ("mxfp8", "MXFP8", False): (("float8_e4m3fn", 32, "float8_e8m0fnu", False), "faithful"),
    ("mxfp8", None, False): (("float8_e4m3fn", 32, "float8_e8m0fnu", False), "faithful"),
    ("mxfp4", "mxfp4", False): (("float4_e2m1fn", 32, "float8_e8m0fnu", False), "faithful"),
    ("mxfp4", "W4A8_MXFP4_FP8", False): (("float8_e4m3fn", -1, "float32", False), "faithful"),
    ("mxfp4", None, False): (None, None),
    ("int8", "W8A8_SQ_PER_CHANNEL", True): (("int8", -1, "float32", True), "int8"),
    ("int8", "W8A16", False): (None, None),
    ("int4", "W4A16_AWQ", False): (None, None),
    ("int4", "W4A8_AWQ", True): (("float8_e4m3fn", -1, "float32", True), "faithful"),
}


@pytest.mark.parametrize(("kind", "algorithm", "scaled"), ROUNDING)
def test_what_rounds_activations(kind, algorithm, scaled, tmp_path):
    tensors, _ = layer(kind, input_scale=scaled)
    if algorithm == "W4A8_AWQ":  # a scale that only its kernel needs
        tensors["weight_scale_2"] = torch.tensor(0.25)
    config = declaration(algorithm) if algorithm else None
    entry = read(write(tmp_path, {"a": tensors}, config)).entries["a.weight"]
    rounding, wish = ROUNDING[kind, algorithm, scaled]
    found = entry.spec.activation
    told = found and (found.format, found.group, found.scale, found.static)
    assert (told, entry.wish) == (rounding, wish)
    weight = entry.read()
    weight.check()
    if found and found.static:
        assert torch.equal(weight.tensors["input_scale"], tensors["input_scale"].reshape(1))
    else:
        assert "input_scale" not in weight.tensors


def test_a_mixed_file_layer_by_layer(tmp_path):
    """Every layer as it is; what the config lists otherwise is told."""
    layers, meanings, listed = {}, {}, {}
    for number, kind in enumerate(KINDS):
        layers[f"b.{number}.l"], meanings[f"b.{number}.l"] = layer(kind, (256, 128), number)
        listed[f"b.{number}.l"] = {"quant_algo": KINDS[kind][0]}
    layers["plain"] = {"weight": torch.randn(4, 4)}
    listed["plain"] = {"quant_algo": "FP8"}
    del listed["b.0.l"]
    config = declaration("MIXED_PRECISION", quantized_layers=listed, ignore=["b.1*", "plain"])
    contents = read(write(tmp_path, layers, config))
    for name, meaning in meanings.items():
        assert relative(contents.entries[f"{name}.weight"].read().dequantize(), meaning) <= 1e-6
    assert contents.entries["plain.weight"].parts == ()
    stale = contents.facts["stale in config.json"]
    assert "1 layers such as b.1.l are said to be left out, but are quantized" in stale
    assert "1 layers such as plain are listed as quantized, but are not" in stale
    assert "1 layers such as b.0.l are quantized, but not listed" in stale
    assert all(f"{kind} x1" in contents.facts["formats"] for kind in KINDS)


def test_a_true_ignore_list_is_not_called_stale(tmp_path):
    layers = {"a": layer("fp8")[0], "proj_out": {"weight": torch.randn(4, 4)}}
    contents = read(write(tmp_path, layers, declaration("FP8", ignore=["proj_out*", "norm"])))
    assert not any(label.startswith("stale") for label in contents.facts)
    assert contents.facts["left in 16 bits"] == "proj_out"
    assert contents.facts["declared"] == "FP8 (config.json, modelopt 0.47.0)"


@pytest.mark.parametrize("name", pack("loaders.schemes.modelopt_fallbacks").FALLBACKS)
def test_known_sets_of_layers_left_out_are_named(name, tmp_path):
    kept = pack("loaders.schemes.modelopt_fallbacks").FALLBACKS[name]
    plain = {
        module.replace("*", str(block)): {"weight": torch.randn(4, 4)}
        for module in sorted(kept)
        for block in (0, 11)
    }
    plain["time_text_embed.timestep_embedder.linear_1"] = {"weight": torch.randn(4, 4)}
    low = {f"single_transformer_blocks.{block}.proj_out": layer("fp8")[0] for block in (0, 11)}

    def told(layers, folder):
        contents = read(write(tmp_path / folder, layers, declaration("FP8")))
        return contents.facts["left in 16 bits"]

    assert told(low | plain, "whole").endswith(f"(SGLang's fallback set for {name})")
    one = {"single_transformer_blocks.3.novel": {"weight": torch.randn(4, 4)}}
    assert f"for {name}" not in told(low | plain | one, "more")
    least = dict(plain)
    for key in [key for key in plain if key.endswith(max(kept).rpartition("*")[2])]:
        del least[key]
    assert f"for {name}" not in told(low | least, "less")


def nested(tmp_path, layers):
    write(tmp_path, layers)
    inner = {"quant_algo": "FP8", "exclude_modules": ["x"], "kv_cache_quant_algo": None}
    text = json.dumps({"producer": {"name": "modelopt"}, "quantization": inner})
    (tmp_path / "hf_quant_config.json").write_text(text, encoding="utf-8")
    return tmp_path


DECLARED = {
    "config.json": lambda path, layers: write(path, layers, declaration("FP8")),
    "hf_quant_config.json": nested,
    "metadata quantization_config": lambda path, layers: write(
        path, layers, metadata={"quantization_config": declaration("FP8")}
    ),
    "metadata _quantization_metadata": lambda path, layers: write(
        path, layers, metadata={"_quantization_metadata": declaration("FP8")}
    ),
}


@pytest.mark.parametrize("where", DECLARED)
def test_every_place_of_a_declaration_is_heard(where, tmp_path):
    good, meaning = layer("fp8")
    contents = read(DECLARED[where](tmp_path / "good", {"a": good}))
    assert f"FP8 ({where}" in contents.facts["declared"]
    assert relative(contents.entries["a.weight"].read().dequantize(), meaning) <= 1e-6
    with pytest.raises(LowBitError, match="declared as FP8, but stored as int8") as caught:
        read(DECLARED[where](tmp_path / "bad", {"a": good, "b.c": layer("int8")[0]}))
    assert caught.value.layer == "b.c" and where in caught.value.found


def test_scales_without_any_declaration(tmp_path):
    """All but NVFP4, whose bytes may be in any order, are told by their tensors."""
    kinds = [kind for kind in KINDS if not kind.startswith("nvfp4")]
    made = {kind: layer(kind, (256, 128)) for kind in kinds}
    contents = read(write(tmp_path, {kind: tensors for kind, (tensors, _) in made.items()}))
    for kind, (_, meaning) in made.items():
        assert relative(contents.entries[f"{kind}.weight"].read().dequantize(), meaning) <= 1e-6
    assert "nothing" in contents.facts["declared"]


def test_what_attention_and_calibration_left_behind(tmp_path):
    tensors, _ = layer("fp8")
    extra = {"k_scale": torch.tensor(1.0), "input_quantizer._amax": torch.tensor(2.0)}
    contents = read(write(tmp_path, {"a.k_proj": tensors | extra}, declaration("FP8")))
    assert set(contents.entries) == {"a.k_proj.weight", "a.k_proj.bias"}
    assert set(contents.ignored) == {"a.k_proj.k_scale", "a.k_proj.input_quantizer._amax"}


def test_names_under_a_prefix_are_those_of_the_config(tmp_path):
    name = "model.diffusion_model.b.0.l"
    listed = {"b.0.l": {"quant_algo": "FP8"}}
    config = declaration("MIXED_PRECISION", quantized_layers=listed, ignore=[])
    good = read(write(tmp_path / "good", {name: layer("fp8")[0]}, config))
    assert not any(label.startswith("stale") for label in good.facts)
    with pytest.raises(LowBitError, match="declared as FP8"):
        read(write(tmp_path / "bad", {name: layer("int8")[0]}, config))


def test_reading_changes_nothing_that_need_not_change(tmp_path):
    """Codes stay in the file's pages."""
    for kind in ("fp8", "nvfp4", "mxfp8", "mxfp4", "int8"):
        folder = write(tmp_path / kind, {"a": layer(kind)[0]}, declaration(KINDS[kind][0]))
        opened = source.open_source(folder)
        weight = modelopt.read(opened).entries["a.weight"].read()
        assert weight.tensors["codes"].data_ptr() == opened.get("a.weight").data_ptr(), kind


CHANNELS = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "config_groups": {
        "group_0": {
            "weights": {"strategy": "channel", "num_bits": 8, "type": "float"},
            "input_activations": {"strategy": "token", "dynamic": True},
        }
    },
}
FP8 = {
    # of other producers: (kind, config) -> what rounds activations
    "blocks": ("fp8-blocks", {"weight_block_size": [128, 128]}, None),
    "dynamic blocks": (
        "fp8-blocks",
        {"weight_block_size": [128, 128], "activation_scheme": "dynamic"},
        ("float8_e4m3fn", 128, False),
    ),
    "dynamic": ("fp8", {"activation_scheme": "dynamic"}, ("float8_e4m3fn", -1, False)),
    "static": ("fp8", {"activation_scheme": "static"}, ("float8_e4m3fn", -1, True)),
    "channels": ("fp8-rows", CHANNELS, ("float8_e4m3fn", 0, False)),
}


@pytest.mark.parametrize("name", FP8)
def test_scaled_fp8_of_other_producers(name, tmp_path):
    kind, config, rounding = FP8[name]
    tensors, meaning = layer(kind, (256, 384), input_scale=name == "static", zero_dim=False)
    if kind == "fp8-blocks":
        tensors["weight_scale_inv"] = tensors.pop("weight_scale")[:, 0, :, 0]
    folder = write(tmp_path, {"a": tensors}, {"quant_method": "fp8", **config})
    opened = source.open_source(folder)
    assert detect.detect_scheme(opened).scheme == "fp8"
    entry = modelopt.read(opened).entries["a.weight"]
    weight = entry.read()
    weight.check()
    assert relative(weight.dequantize(), meaning) <= 1e-6
    found = entry.spec.activation
    assert (found and (found.format, found.group, found.static)) == rounding
    assert entry.wish == (rounding and "faithful")


def test_blocks_of_another_size_are_refused(tmp_path):
    config = {"quant_method": "fp8", "weight_block_size": [64, 64]}
    with pytest.raises(LowBitError, match="size that is not read") as caught:
        modelopt.read(source.open_source(write(tmp_path, {"a": layer("fp8")[0]}, config)))
    assert "[64, 64]" in caught.value.found


def test_a_mixed_file_beside_a_plain_one(tmp_path):
    """As Black Forest Labs publish them: the folder stands for the mixed one, which is told."""
    plain, mixed = layer("fp8", seed=1)[0], layer("fp8", seed=2)
    write(tmp_path, {"a": plain}, name="flux2-nvfp4.safetensors")
    write(tmp_path, {"a": mixed[0]}, declaration("FP8"), name="flux2-nvfp4-mixed.safetensors")
    contents = read(tmp_path)
    assert relative(contents.entries["a.weight"].read().dequantize(), mixed[1]) <= 1e-6
    assert contents.facts["weights"] == "flux2-nvfp4-mixed.safetensors"
    listed = source.list_checkpoints([str(tmp_path.parent)])
    name = tmp_path.name
    assert {name, f"{name}/flux2-nvfp4.safetensors"} <= set(listed)
    # shards too, and before a plain name
    for number in (1, 2):
        shard = f"big-mixed-0000{number}-of-00002.safetensors"
        write(tmp_path / "s", {f"l{number}": mixed[0]}, name=shard)
    write(tmp_path / "s", {"a": plain})
    assert set(read(tmp_path / "s").entries) == {
        f"l{number}.{part}" for number in (1, 2) for part in ("weight", "bias")
    }
