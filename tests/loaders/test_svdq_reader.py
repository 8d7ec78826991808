"""SVDQuant layers in every packing: what they decode to, and what is decided by which evidence."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from support import pack
from svdq_files import (
    GROUPS,
    SCALES,
    SHIFT,
    Made,
    awq,
    kitchen,
    kitchen_awq,
    lite,
    manifest,
    marker_of,
    named,
    svdq,
    target,
    write,
)

base = pack("loaders.schemes.base")
LowBitError = pack("quant.errors").LowBitError

FLUX = {"model_class": "NunchakuFluxTransformer2dModel"}
QKV = "transformer_blocks.0.attn.to_qkv"


def read(path, told=None, **options):
    """Contents of a checkpoint."""
    source = pack("loaders.source").open_source(path)
    return pack("loaders.schemes.svdq").read(source, told, base.SchemeOptions(**options))


def opened(tmp_path, tensors, metadata=None, told=None, name="model.safetensors", **options):
    return read(write(tmp_path / name, tensors, metadata), told, **options)


def near(found: torch.Tensor, wanted: torch.Tensor, relative: float = 1e-6) -> None:
    assert found.shape == wanted.shape
    error = (found.double() - wanted.double()).abs().max() / wanted.double().abs().max()
    assert error <= relative, float(error)


def check(contents, name: str, layer: Made, unsigned: bool = False):
    """The layer reads as it was made; its weight's entry."""
    entry, bias = contents.entries[f"{name}.weight"], contents.entries[f"{name}.bias"]
    weight = entry.read()
    weight.check()
    assert weight.spec == entry.spec and entry.shape == tuple(layer.weight.shape)
    near(weight.dequantize(), layer.weight)
    shift = SHIFT * layer.sums if unsigned else torch.zeros(1)
    assert bias.shape == entry.shape[:1] and bias.read().dtype == torch.float32
    near(bias.read(), layer.bias + shift)
    if unsigned:
        near(weight.tensors["shift_bias"], shift)
    return entry


# ----------------------------------------------------------------------------------------- packings

PACKINGS = [
    {},
    {"names": 2, "rows": 256, "columns": 384, "rank": 32, "seed": 1},
    {"rank": 0, "seed": 2},
    {"dtype": torch.float16, "rank": 48, "rows": 384, "seed": 3},
    {"second": "c", "seed": 4},
    {"precision": "nvfp4", "seed": 5},
    {"precision": "nvfp4", "second": "t", "columns": 256, "seed": 6},
    {"precision": "nvfp4", "second": "c", "names": 2, "rank": 128, "seed": 7},
    {"precision": "nvfp4", "second": "tc", "rows": 256, "rank": 0, "seed": 8},
    {"precision": "mxfp4", "columns": 256, "seed": 9},
    {"precision": "mxfp4", "names": 2, "rank": 32, "rows": 256, "seed": 10},
]


@pytest.mark.parametrize("made", PACKINGS, ids=str)
def test_a_layer_in_nunchakus_packing(made: dict, tmp_path):
    layer = svdq(**made)
    contents = opened(tmp_path, named(blocks__0__proj=layer))
    entry = check(contents, "blocks.0.proj", layer)
    precision, spec = made.get("precision", "int4"), entry.spec
    rows, columns = layer.weight.shape
    group = GROUPS[precision]
    assert spec.code_shape == (rows, columns // group, group) and entry.wish == "faithful"
    assert spec.format.name == ("int4" if precision == "int4" else "float4_e2m1fn")
    assert spec.rank == made.get("rank", 16) and spec.smoothing == "divide"
    assert spec.two_level == bool(made.get("second"))
    activation = spec.activation
    assert (activation.format, activation.group) == (spec.format.name, group)
    rounding = {"int4": "", "nvfp4": "float8_e4m3fn", "mxfp4": "float8_e8m0fnu"}
    assert activation.scale == rounding[precision] and not activation.shift
    assert not entry.notes and not entry.doubtful
    # Every stored byte is accounted for, once.
    (ignored,) = contents.ignored
    assert ignored.endswith(("smooth_orig", "smooth_factor_orig"))
    stored = [name for e in contents.entries.values() for name in e.stored]
    assert sorted([*stored, ignored]) == sorted(f"blocks.0.proj.{part}" for part in layer.tensors)
    left = layer.tensors[ignored.rpartition(".")[2]].nbytes
    whole = sum(tensor.nbytes for tensor in layer.tensors.values())
    assert sum(e.nbytes for e in contents.entries.values()) == whole - left


def test_scales_that_are_stored_as_bytes(tmp_path):
    """Their number tells nvfp4 from mxfp4."""
    layer = svdq(precision="nvfp4", seed=3)
    layer.tensors["wscales"] = layer.tensors["wscales"].view(torch.uint8)
    entry = check(opened(tmp_path, named(a=layer)), "a", layer)
    assert entry.dtype == "svdq-nvfp4"


def test_a_layer_without_bias_has_none(tmp_path):
    layer = svdq()
    del layer.tensors["bias"]
    contents = opened(tmp_path, named(a=layer))
    assert list(contents.entries) == ["a.weight"]
    near(contents.entries["a.weight"].read().dequantize(), layer.weight)


def test_a_layer_of_no_branch_at_all(tmp_path):
    layer = svdq(rank=0)
    for part in ("lora_down", "lora_up", "smooth_orig"):
        del layer.tensors[part]
    contents = opened(tmp_path, named(a=layer))
    assert check(contents, "a", layer).spec.rank == 0 and not contents.ignored


@pytest.mark.parametrize("precision", ["int4", "nvfp4"])
def test_padding_is_cut_where_the_architecture_says_so(precision, tmp_path):
    """2240 channels are stored as 2304, by zeros; another tensor of the file makes one ask."""
    layer = svdq(256, 384, precision=precision, second="c")
    norm = {"norm.weight": torch.randn(192)}
    tensors = named(a=layer) | norm
    assert opened(tmp_path, tensors).entries["a.weight"].doubtful
    told = {"a.weight": (192, 320)}.get
    contents = opened(tmp_path, tensors, None, told)
    entry = contents.entries["a.weight"]
    assert entry.shape == (192, 320) and not entry.doubtful
    weight = entry.read()
    weight.check()
    near(weight.dequantize(), layer.weight[:192, :320])
    near(contents.entries["a.bias"].read(), layer.bias[:192])


def test_small_tensors_are_no_sign_of_padding(tmp_path):
    """64 latent channels stand beside layers of 128 in many a model."""
    tensors = named(a=svdq()) | {"x_embedder.weight": torch.randn(128, 64)}
    assert not opened(tmp_path, tensors).entries["a.weight"].doubtful


def test_the_architecture_is_asked_about_padded_layers(tmp_path):
    """Of a fused layer that is taken apart it tells nothing."""
    block = "transformer_blocks.0"
    mlp = f"{block}.img_mlp.net.2"
    fused, out = f"{block}.attn.to_qkv", f"{block}.attn.to_out.0"
    rest = ("txt_norm", "img_in", f"{block}.img_mod.1", f"{block}.attn.add_q_proj")
    tensors = named(**{fused: svdq(384, 256), out: svdq(256, 128), mlp: svdq()})
    tensors |= {f"{name}.weight": torch.randn(192) for name in rest}
    asked = {}

    def native_shapes(wanted):
        asked.update(wanted)
        return {f"{out}.weight": (192, 128), f"{block}.attn.to_q.weight": (64, 192)}

    path = write(tmp_path / "m.safetensors", tensors, FLUX)
    options = base.SchemeOptions(act_unsigned="off")
    plan = pack("loaders.plan").make_plan(path, options=options, native_shapes=native_shapes)
    assert not plan.entries[f"{mlp}.weight"].spec.activation.shift
    assert plan.family.name == "qwen_image"
    assert asked[f"{block}.attn.to_q.weight"] == (128, 256)
    assert asked[f"{out}.weight"] == (256, 128)
    assert plan.entries[f"{out}.weight"].shape == (192, 128)
    assert plan.entries[f"{fused}.weight"].shape == (384, 256)


def test_an_unsigned_layer_that_is_padded(tmp_path):
    layer = svdq(128, 256)
    name = "transformer_blocks.0.mlp_fc2"
    told = {f"{name}.weight": (100, 192)}.get
    contents = opened(tmp_path, named(**{name: layer}), FLUX, told)
    shift = SHIFT * contents.entries[f"{name}.weight"].read().dequantize()
    # What the branch adds is no part of it.
    weight = contents.entries[f"{name}.weight"].read()
    branch = weight.tensors["svd_up"].float() @ weight.tensors["svd_down"].float()
    shift = shift - SHIFT * branch
    near(contents.entries[f"{name}.bias"].read(), layer.bias[:100] + shift.sum(1), 1e-5)


# ---------------------------------------------------------------------------------- unsigned layers

ENGINE = "file for Nunchaku's engine"


@pytest.mark.parametrize(
    "name",
    [
        "transformer_blocks.3.mlp_fc2",
        "transformer_blocks.3.mlp_context_fc2",
        "single_transformer_blocks.12.mlp_fc2",
        "transformer_blocks.3.img_mlp.net.2",
        "transformer_blocks.3.txt_mlp.net.2",
        "model.diffusion_model.transformer_blocks.3.mlp_fc2",
    ],
)
@pytest.mark.parametrize("how", ["model_class", "fused layers"])
def test_second_mlp_layers_of_the_engine_are_unsigned(name, how, tmp_path):
    layer = svdq(384, 256, seed=len(name))
    prefix = "model.diffusion_model." if name.startswith("model.") else ""
    tensors = named(**{name: layer, f"{prefix}transformer_blocks.3.other": svdq()})
    if how == "fused layers":
        tensors |= named(**{prefix + QKV: svdq(384)})
    contents = opened(tmp_path, tensors, FLUX if how == "model_class" else None)
    entry = check(contents, name, layer, unsigned=True)
    activation = entry.spec.activation
    assert (activation.format, activation.group, activation.shift) == ("uint4", 64, SHIFT)
    (note,) = entry.notes
    assert "are unsigned" in note and ENGINE in note and how in note
    other = contents.entries[f"{prefix}transformer_blocks.3.other.weight"]
    assert not other.spec.activation.shift and not other.notes
    assert contents.facts["unsigned activations"] == "1 layers"


@pytest.mark.parametrize("name", ["ff.net.2", "ff_context.net.2"])
def test_the_second_generation_of_flux_names(name, tmp_path):
    """``ff.net.2`` stands behind a GELU in models with single blocks, not in every model."""
    layer, name = svdq(), f"transformer_blocks.0.{name}"
    tensors = named(**{name: layer, QKV: svdq(384)})
    single = {"single_transformer_blocks.0.norm.linear.weight": torch.randn(6, 4)}
    contents = opened(tmp_path, tensors | single)
    check(contents, name, layer, unsigned=True)
    assert not opened(tmp_path, tensors).entries[f"{name}.weight"].spec.activation.shift


def test_an_unsigned_layer_without_bias_gets_one(tmp_path):
    layer, name = svdq(), "transformer_blocks.0.mlp_fc2"
    del layer.tensors["bias"]
    bias = opened(tmp_path, named(**{name: layer}), FLUX).entries[f"{name}.bias"]
    assert bias.stored == () and bias.nbytes == 0
    near(bias.read(), SHIFT * layer.sums)


def never(tmp_path):
    """Files whose second MLP layer is signed: ``{kind: (path, module)}``."""
    flux = "transformer_blocks.0.mlp_fc2"
    qwen = "transformer_blocks.0.img_mlp.net.2"
    sdxl = "down_blocks.1.attentions.0.transformer_blocks.0.ff.net.2"
    files = {
        "nvfp4": (svdq(precision="nvfp4"), flux, FLUX),
        "mxfp4": (svdq(precision="mxfp4"), flux, FLUX),
        "SDXL": (svdq(), sdxl, {"model_class": "NunchakuSDXLUNet2DConditionModel"}),
        "Z-Image": (
            svdq(),
            "layers.0.feed_forward.net.2",
            {"model_class": "NunchakuZImageTransformer2DModel"},
        ),
        "FLUX.2": (svdq(), "single_transformer_blocks.0.attn.mlp_fc2", FLUX),
        "manifest": (svdq(), qwen, manifest(target(qwen, "svdq_w4a4"))),
        "unlabelled": (svdq(), qwen, None),
    }
    for kind, (layer, name, metadata) in files.items():
        fused = {} if kind in ("manifest", "unlabelled") else {QKV: svdq(384)}
        tensors = named(**{name: layer}, **fused)
        yield kind, write(tmp_path / kind / "m.safetensors", tensors, metadata), name
    section = {"precision": "int4", "group_size": 64, "rank": 16, "targets": [qwen]}
    folder = lite(tmp_path / "lite", named(**{qwen: svdq()}), svdq_w4a4=section)
    yield "lite", folder, qwen


def test_layers_that_are_never_unsigned(tmp_path):
    kinds = []
    for kind, path, name in never(tmp_path):
        contents = read(path)
        entry = contents.entries[f"{name}.weight"]
        assert not entry.spec.activation.shift, kind
        assert "shift_bias" not in entry.read().tensors
        reason = {
            "manifest": "the runtime manifest lists the layer",
            "lite": "Nunchaku Lite",
            "unlabelled": "nothing says",
        }.get(kind)
        assert [reason in note for note in entry.notes] == ([True] if reason else []), kind
        assert contents.facts["unsigned activations"] == "none"
        kinds.append(kind)
    assert len(kinds) == 8


def test_a_lite_folder_of_fused_layers_is_for_the_adapters_to_the_engine(tmp_path):
    """Stock names are what diffusers itself reads; fused ones are the engine's."""
    name, layer = "transformer_blocks.0.img_mlp.net.2", svdq()
    section = {"precision": "int4", "group_size": 64, "rank": 16, "targets": [name, QKV]}
    tensors = named(**{name: layer, QKV: svdq(384)})
    contents = read(lite(tmp_path / "m", tensors, svdq_w4a4=section))
    check(contents, name, layer, unsigned=True)


def test_the_user_decides(tmp_path):
    name, layer = "transformer_blocks.0.img_mlp.net.2", svdq()
    path = write(tmp_path / "m.safetensors", named(**{name: layer, QKV: svdq(384)}), FLUX)
    (note,) = check(read(path, act_unsigned="off"), name, layer).notes
    assert "act_unsigned off" in note
    stock = write(tmp_path / "n.safetensors", named(**{name: layer}))
    (note,) = check(read(stock, act_unsigned="on"), name, layer, unsigned=True).notes
    assert "act_unsigned on" in note
    other = read(path, act_unsigned="on").entries[f"{QKV}.weight"]
    assert not other.spec.activation.shift


# --------------------------------------------------------------------------------------- modulation

DOUBLE = "transformer_blocks.0.norm1.linear"


@pytest.mark.parametrize(
    ("name", "splits", "rows"),
    [
        (DOUBLE, 6, 768),
        ("transformer_blocks.0.norm1_context.linear", 6, 384),
        ("transformer_blocks.0.txt_mod.1", 6, 192),
        ("single_transformer_blocks.0.norm.linear", 3, 384),
    ],
)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int16])
def test_modulation_of_the_engine(name, splits, rows, dtype, tmp_path):
    layer = awq(rows, 192, splits, seed=rows, dtype=dtype)
    entry = check(opened(tmp_path, named(**{name: layer}), FLUX), name, layer)
    assert entry.wish is None and entry.spec.format.name == "uint4"
    assert entry.spec.code_shape == (rows, 3, 64) and entry.spec.activation is None
    (note,) = entry.notes
    assert f"interleaved by {splits}" in note and "by the layer's name" in note


def test_scales_of_modulation_may_be_padded(tmp_path):
    layer = awq(384, 192, 6, pad=13)
    check(opened(tmp_path, named(**{DOUBLE: layer}), FLUX), DOUBLE, layer)


def test_other_w4a16_layers_are_in_order(tmp_path):
    layer = awq()
    name = "double_stream_modulation_img.linear"
    entry = check(opened(tmp_path, named(**{name: layer}), FLUX), name, layer)
    assert not entry.notes


def test_a_manifest_says_how_modulation_is_ordered(tmp_path):
    turned, plain = awq(384, splits=3), awq(384, seed=1)
    name = "blocks.0.mod"
    told = manifest(
        target(name, "adanorm_awq_w4a16", op_options={"adanorm_splits": 3}),
        target(DOUBLE, "awq_w4a16"),
    )
    contents = opened(tmp_path, named(**{name: turned, DOUBLE: plain}), told)
    (note,) = check(contents, name, turned).notes
    assert "adanorm_awq_w4a16" in note
    (note,) = check(contents, DOUBLE, plain).notes
    assert "own order" in note and "the runtime manifest says awq_w4a16" in note


def test_modulation_in_a_lite_folder_is_in_order(tmp_path):
    layer = awq(384)
    section = {"precision": "int4", "group_size": 64, "targets": [DOUBLE]}
    contents = read(lite(tmp_path / "m", named(**{DOUBLE: layer}), awq_w4a16=section))
    (note,) = check(contents, DOUBLE, layer).notes
    assert "config.json" in note


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("splits", [1, 6])
def test_unlabelled_modulation_is_told_by_its_bias(splits, seed, tmp_path):
    layer = awq(768, splits=splits, seed=seed)
    (note,) = check(opened(tmp_path, named(**{DOUBLE: layer})), DOUBLE, layer).notes
    assert "told by the bias" in note and ("by 6" in note) == (splits == 6)


@pytest.mark.parametrize("splits", [3, 6])
@pytest.mark.parametrize("turned", [True, False])
def test_plain_modulation_is_told_by_its_bias(splits, turned, tmp_path):
    layouts = pack("quant.svdq")
    name = DOUBLE if splits == 6 else "single_transformer_blocks.0.norm.linear"
    torch.manual_seed(splits)
    weight, bias = torch.randn(splits * 64, 32).bfloat16(), torch.randn(splits * 64) / 4
    stored = {f"{name}.weight": weight, f"{name}.bias": bias.clone()}
    if turned:
        raised = bias.view(splits, -1).clone()
        raised[SCALES[splits]] += 1
        stored = {
            f"{name}.weight": layouts.interleave_rows(weight, splits),
            f"{name}.bias": layouts.interleave_rows(raised.view(-1), splits),
        }
    contents = opened(tmp_path, stored | named(a=svdq()), FLUX)
    entry = contents.entries[f"{name}.weight"]
    assert torch.equal(entry.read(), weight) and not entry.parts
    near(contents.entries[f"{name}.bias"].read(), bias)
    (note,) = entry.notes
    assert ("interleaved" in note.partition("(")[0]) == turned
    assert not contents.entries[f"{name}.bias"].notes


def test_large_biases_in_the_models_order_are_left_there(tmp_path):
    """What counts is not how large they are, but where."""
    bias = torch.full((6, 64), 0.8)
    bias[SCALES[6]] = 1.2
    plain = {f"{DOUBLE}.weight": torch.randn(384, 16), f"{DOUBLE}.bias": bias.view(-1)}
    contents = opened(tmp_path, plain | named(a=svdq()), FLUX)
    assert torch.equal(contents.entries[f"{DOUBLE}.bias"].read(), bias.view(-1))


def test_plain_modulation_of_other_files_is_taken_as_it_is(tmp_path):
    bias = torch.ones(384)
    plain = {f"{DOUBLE}.weight": torch.randn(384, 16), f"{DOUBLE}.bias": bias}
    contents = opened(tmp_path, plain | named(a=svdq()))
    assert torch.equal(contents.entries[f"{DOUBLE}.bias"].read(), bias)
    assert not contents.entries[f"{DOUBLE}.weight"].notes


# ------------------------------------------------------------------------------- ComfyUI-quants


@pytest.mark.parametrize("tiles", [False, True])
@pytest.mark.parametrize("basis", ["raw", "post_smoothing", None])
def test_svdquant_w4a4(tiles, basis, tmp_path):
    told = {"lowrank_branch_input_basis": basis} if basis else {}
    layer = kitchen(256, 192, tiles=tiles, layout="kitchen_tile_packed_w4a4", **told)
    entry = check(opened(tmp_path, named(a=layer)), "a", layer)
    assert entry.wish == "faithful" and entry.dtype == "svdq-int4" and entry.spec.rank == 8


def test_svdquant_w4a4_of_odd_rows(tmp_path):
    layer = kitchen(72, 64, rank=5)
    check(opened(tmp_path, named(a=layer)), "a", layer)


@pytest.mark.parametrize(
    ("name", "marker", "unsigned", "why"),
    [
        ("blocks.0.a", {"act_unsigned": True}, True, "said by"),
        ("transformer_blocks.0.img_mlp.net.2", {"act_unsigned": False}, False, "said by"),
        ("transformer_blocks.0.txt_mlp.net.2", {}, True, "the layer's name"),
        ("transformer_blocks.0.mlp_fc2", {}, False, "the layer's name"),
    ],
)
def test_a_marker_says_whether_activations_are_unsigned(name, marker, unsigned, why, tmp_path):
    layer = kitchen(**marker)
    entry = check(opened(tmp_path, named(**{name: layer})), name, layer, unsigned)
    assert entry.spec.activation.format == ("uint4" if unsigned else "int4")
    (note,) = entry.notes
    assert why in note and ("are unsigned" in note) == unsigned


@pytest.mark.parametrize("asked", ["on", "off"])
def test_the_user_decides_on_second_mlp_layers_alone(asked, tmp_path):
    """Before what a marker says of them, and of no other layer."""
    name = "transformer_blocks.0.img_mlp.net.2"
    other, layer = kitchen(act_unsigned=True), kitchen(act_unsigned=asked == "off")
    contents = opened(tmp_path, named(**{name: layer, "a": other}), act_unsigned=asked)
    check(contents, name, layer, asked == "on")
    check(contents, "a", other, unsigned=True)


def test_awq_w4a16(tmp_path):
    """Modulation too: ComfyUI-quants keeps the model's order, and its bias."""
    layer = kitchen_awq()
    entry = check(opened(tmp_path, named(**{DOUBLE: layer}), FLUX), DOUBLE, layer)
    assert entry.wish is None and entry.dtype == "awq-uint4"


def test_markers_in_the_metadata_and_names_of_the_layout_class(tmp_path):
    layer = kitchen(tiles=True)
    del layer.tensors["comfy_quant"]
    for part in ("proj_down", "proj_up", "smooth_factor"):
        layer.tensors[f"weight_{part}"] = layer.tensors.pop(part)
    told = {"layers": {"a": {"format": "svdquant_w4a4"}}}
    contents = opened(tmp_path, named(a=layer), {"_quantization_metadata": told})
    check(contents, "a", layer)


def test_comfyuis_own_formats_beside_it_are_left_alone(tmp_path):
    layer = kitchen()
    own = {
        "b.weight": torch.randn(64, 64).to(torch.float8_e4m3fn),
        "b.weight_scale": torch.ones(()),
        "b.comfy_quant": marker_of({"format": "float8_e4m3fn"}),
        "c.weight": torch.zeros(64, 64, dtype=torch.int8),
        "c.comfy_quant": marker_of({"format": "int8_tensorwise"}),
    }
    path = write(tmp_path / "m.safetensors", named(a=layer) | own)
    source = pack("loaders.source").open_source(path)
    assert pack("loaders.detect").detect_scheme(source).scheme == "svdq"
    contents = read(path)
    check(contents, "a", layer)
    assert own.keys() < contents.entries.keys() and not contents.entries["b.weight"].parts


# ------------------------------------------------------------------------------- what the file says


def quantization(dtype="int4", group=64, rank=16, **weight):
    number = {"dtype": dtype, "group_size": group, **weight}
    return {"quantization_config": {"method": "svdquant", "weight": number, "rank": rank}}


@pytest.mark.parametrize(
    ("precision", "metadata", "name", "said"),
    [
        ("int4", quantization(), "svdq-int4_r16-x", ()),
        ("int4", quantization(rank=32), "x", ("rank 32", "have rank 16")),
        ("int4", quantization("fp4_e2m1_all", 16), "x", ("says nvfp4", "are int4")),
        ("int4", quantization(), "svdq-fp4_r32-x", ("file's name says nvfp4", "says rank 32")),
        ("nvfp4", quantization("fp4_e2m1_all", 16, scale_dtype=[None, "fp8_e4m3_nan"]), "x", ()),
        ("nvfp4", quantization("fp4_e2m1_all", 16, scale_dtypes=[None, "sfp8_e4m3_nan"]), "x", ()),
        ("nvfp4", quantization("fp4_e2m1_all", 32, scale_dtype="ue8m0"), "x", ("says mxfp4",)),
        ("mxfp4", quantization("fp4_e2m1_all", 32, scale_dtype="ue8m0"), "x", ()),
        ("mxfp4", quantization("fp4_e2m1_all", 32), "x", ()),
        ("mxfp4", quantization("fp4_e2m1_all", None, scale_dtypes=["ue8m0"]), "x", ()),
    ],
)
def test_tensors_are_believed(precision, metadata, name, said, tmp_path):
    layer = svdq(precision=precision)
    contents = opened(tmp_path, named(a=layer), metadata, name=f"{name}.safetensors")
    notes = check(contents, "a", layer).notes
    assert bool(notes) == bool(said), notes
    assert all(any(words in note for note in notes) for words in said), notes
    assert contents.facts["the file says"]


def test_what_is_said_of_a_layer_comes_before_what_is_said_of_the_file(tmp_path):
    metadata = manifest(target("a", "svdq_w4a4", rank=16), target("b", "svdq_w4a4", rank=32))
    metadata["quantization_config"]["rank"] = 64
    layers = {"a": svdq(rank=16), "b": svdq(rank=16), "c": svdq(rank=64)}
    entries = opened(tmp_path, named(**layers), metadata).entries
    assert not entries["a.weight"].notes and not entries["c.weight"].notes
    (note,) = entries["b.weight"].notes
    assert "the runtime manifest says rank 32" in note


def test_insisting_on_what_is_there(tmp_path):
    layer = svdq(precision="nvfp4", rank=32)
    path = write(tmp_path / "m.safetensors", named(a=layer, b=svdq(precision="nvfp4", rank=0)))
    contents = read(path, svdq_precision="nvfp4", svdq_rank=32)
    check(contents, "a", layer)
    assert "nvfp4" in contents.facts["precision"]
    assert contents.facts["low-rank branch"] == "rank 32 x1, rank 0 x1"


def test_only_markers_and_biases_are_read_for_a_plan(tmp_path, monkeypatch):
    source = pack("loaders.source").open_source(
        write(
            tmp_path / "m.safetensors",
            named(**{"a": svdq(), DOUBLE: awq(384), QKV: kitchen()}),
        )
    )
    asked = []
    inner = type(source).get

    def get(self, name):
        asked.append(name)
        return inner(self, name)

    monkeypatch.setattr(type(source), "get", get)
    pack("loaders.schemes.svdq").read(source)
    assert {name.rpartition(".")[2] for name in asked} == {"bias", "comfy_quant"}


# ---------------------------------------------------------------------------------- files and nodes

HALVES = ("transformer_blocks.safetensors", "unquantized_layers.safetensors")


@pytest.mark.parametrize("config", [True, False])
def test_the_older_form_of_two_files(config, tmp_path):
    layer, rest = svdq(), {"x_embedder.weight": torch.randn(8, 4)}
    name = "transformer_blocks.0.attn.to_out.0"
    folder = tmp_path / "models" / "flux"
    write(folder / HALVES[0], named(**{name: layer}))
    write(folder / HALVES[1], rest)
    if config:
        (folder / "config.json").write_text("{}")
        (folder / "comfy_config.json").write_text('{"model_class": "Flux"}')
    for path in (folder, folder / HALVES[0], folder / HALVES[1]):
        contents = read(path)
        check(contents, name, layer)
        assert torch.equal(contents.entries["x_embedder.weight"].read(), rest["x_embedder.weight"])
    listed = pack("loaders.folder").list_checkpoints([tmp_path / "models"])
    assert listed == ["flux"]


def test_the_config_of_a_single_file_stands_in_its_header(tmp_path):
    tensors = named(**{"a": svdq()})
    told = {"model_class": "NunchakuQwenImageTransformer2DModel", "config": {"zero_cond_t": True}}
    plan = pack("loaders.plan").make_plan(write(tmp_path / "m.safetensors", tensors, told))
    assert plan.config == {"zero_cond_t": True}


def test_inspect_tells_what_was_decided(tmp_path):
    name, mod = "transformer_blocks.0.mlp_fc2", "transformer_blocks.0.norm1.linear"
    layers = {name: svdq(), "transformer_blocks.0.out": svdq(rank=32), mod: awq(384, splits=6)}
    path = write(tmp_path / "svdq-fp4_r16-x.safetensors", named(**layers), FLUX)
    plan = pack("loaders.plan").make_plan(path)
    report = pack("loaders.report")
    facts = report.DeviceFacts(torch.device("cpu"), "test", 2**30, 2**30, 2**30, 0)
    found = report.inspect(plan, facts)
    assert found.scheme == "svdq"
    assert found.facts["precision"] == ("svdq-int4 (groups of 64) x2, awq-uint4 (groups of 64) x1")
    assert found.facts["low-rank branch"] == "rank 16 x1, rank 32 x1"
    assert found.facts["unsigned activations"] == "1 layers"
    assert found.facts["W4A16 layers"] == "1 interleaved by 6"
    assert "NunchakuFluxTransformer2dModel" in found.facts["made for"]
    assert "nvfp4 (the file's name)" in found.facts["the file says"]
    assert all(f"{label}: {text}" in found.text for label, text in found.facts.items())
    assert len(found.notes) == 4 and found.notes.keys() == {
        note for entry in plan.entries.values() for note in entry.notes
    }
    assert all(f"assumed for {n} layers: {note}" in found.text for note, n in found.notes.items())


def test_the_settings_stand_last_in_both_nodes():
    """Saved widget values are positional."""
    names = [field.name for field in dataclasses.fields(base.SchemeOptions)]
    assert names[:3] == ["svdq_precision", "svdq_rank", "act_unsigned"]
    for module, node in (("load", "LowBitLoadDiffusionModel"), ("inspect", "LowBitInspect")):
        inputs = getattr(pack(f"nodes.{module}"), node).define_schema().inputs
        last = inputs[-len(names) :]
        assert [entry.id for entry in last] == names
        assert all(entry.optional and entry.advanced and entry.tooltip for entry in last)
        defaults = dataclasses.astuple(base.SchemeOptions())
        assert tuple(entry.default for entry in last) == defaults
    options = pack("loaders.host.api").LoadOptions(svdq_rank=48, act_unsigned="on")
    assert options.of_scheme() == base.SchemeOptions("auto", 48, "on")


def test_settings_reach_the_reader_through_a_plan(tmp_path):
    name = "transformer_blocks.0.mlp_fc2"
    path = write(tmp_path / "m.safetensors", named(**{name: svdq()}), FLUX)
    make_plan = pack("loaders.plan").make_plan
    assert make_plan(path).entries[f"{name}.weight"].spec.activation.shift
    plan = make_plan(path, options=base.SchemeOptions(act_unsigned="off"))
    assert not plan.entries[f"{name}.weight"].spec.activation.shift
    with pytest.raises(LowBitError, match="rank 48"):
        make_plan(path, options=base.SchemeOptions(svdq_rank=48))
