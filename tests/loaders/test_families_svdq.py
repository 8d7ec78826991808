"""Key maps of SVDQuant checkpoints: their names against ComfyUI's own model classes.

Nunchaku's names are stated here a second time, as what an exporter does to a diffusers checkpoint:
it renames modules, fuses some and takes others apart. On the published architectures the moves of
the result fill exactly ComfyUI's model; on small models every value lands where it lands from the
diffusers checkpoint, which the tests of the families compare with diffusers' own forward passes.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict

import pytest
import torch
from safetensors.torch import save_file
from support import oracle, pack
from test_families import BUILT, LOADED, hollow, read_checkpoint, shape, translate

ENDS = (".weight", ".bias")


@pytest.fixture(scope="session", autouse=True)
def host():
    """The pack, and with it ComfyUI, set to the device it runs on before anything imports it."""
    return pack()


@pytest.fixture(scope="session")
def published():
    folder = oracle("tiny_models.py", "published")
    return lambda name: json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def tiny():
    folder = oracle("tiny_models.py", "tiny", *LOADED, *BUILT)
    return lambda name: read_checkpoint(folder / name)


# what exporters do to a diffusers checkpoint


class Export(dict):
    """``{key: tensor}`` of a diffusers checkpoint on its way to an exporter's names."""

    def numbers(self, stack):
        found = {key.split(".")[1] for key in self if key.startswith(f"{stack}.")}
        return [f"{stack}.{number}" for number in sorted(found, key=int)]

    def rename(self, old, new):
        for end in ENDS:
            if old + end in self:
                self[new + end] = self.pop(old + end)

    def fuse(self, olds, new):
        for end in ENDS:
            if olds[0] + end in self:
                self[new + end] = torch.cat([self.pop(old + end) for old in olds])

    def cut_rows(self, old, first, *news):
        weight = self.pop(f"{old}.weight")
        for new, part in zip(news, weight.split([first, weight.shape[0] - first]), strict=True):
            self[f"{new}.weight"] = part.contiguous()

    def cut_columns(self, old, first, *news, biases="second"):
        """Parts that see some of the inputs each, the bias with the second one or with both."""
        weight = self.pop(f"{old}.weight")
        parts = weight.split([first, weight.shape[1] - first], dim=1)
        for new, part in zip(news, parts, strict=True):
            self[f"{new}.weight"] = part.contiguous()
        bias = self.pop(f"{old}.bias", None)
        if bias is None:
            return
        halved = biases == "both"
        self[f"{news[1]}.bias"] = bias / 2 if halved else bias
        if biases != "second":
            self[f"{news[0]}.bias"] = bias / 2 if halved else torch.zeros_like(bias)

    @property
    def width(self):
        return self["x_embedder.weight"].shape[0]


SHORT = {
    "attn.to_out.0": "out_proj",
    "attn.to_add_out": "out_proj_context",
    "attn.norm_q": "norm_q",
    "attn.norm_k": "norm_k",
    "attn.norm_added_q": "norm_added_q",
    "attn.norm_added_k": "norm_added_k",
}
SHORT_MLP = {
    "ff.net.0.proj": "mlp_fc1",
    "ff.net.2": "mlp_fc2",
    "ff_context.net.0.proj": "mlp_context_fc1",
    "ff_context.net.2": "mlp_context_fc2",
}
SHORT_GATED_MLP = {
    "ff.linear_in": "mlp_fc1",
    "ff.linear_out": "mlp_fc2",
    "ff_context.linear_in": "mlp_context_fc1",
    "ff_context.linear_out": "mlp_context_fc2",
}


def fuse_joint(made, block, image, text):
    made.fuse([f"{block}.attn.to_{part}" for part in "qkv"], f"{block}.{image}")
    made.fuse([f"{block}.attn.add_{part}_proj" for part in "qkv"], f"{block}.{text}")


def flux_v1(source):
    """deepcompressor's names; zeros for the bias that the attention half of a layer lacks."""
    made = Export(source)
    for block in made.numbers("transformer_blocks"):
        fuse_joint(made, block, "qkv_proj", "qkv_proj_context")
        for old, new in (SHORT | SHORT_MLP).items():
            made.rename(f"{block}.{old}", f"{block}.{new}")
    for block in made.numbers("single_transformer_blocks"):
        made.fuse([f"{block}.attn.to_{part}" for part in "qkv"], f"{block}.qkv_proj")
        made.rename(f"{block}.proj_mlp", f"{block}.mlp_fc1")
        parts = (f"{block}.out_proj", f"{block}.mlp_fc2")
        made.cut_columns(f"{block}.proj_out", made.width, *parts, biases="zeros")
        for norm in ("norm_q", "norm_k"):
            made.rename(f"{block}.attn.{norm}", f"{block}.{norm}")
    return made


def flux_v2(source):
    """The names of the second model class, close to diffusers'."""
    made = Export(source)
    for block in made.numbers("transformer_blocks"):
        fuse_joint(made, block, "attn.to_qkv", "attn.add_qkv_proj")
    for block in made.numbers("single_transformer_blocks"):
        made.fuse([f"{block}.attn.to_{part}" for part in "qkv"], f"{block}.attn.to_qkv")
        made.rename(f"{block}.proj_mlp", f"{block}.mlp_fc1")
        parts = (f"{block}.attn.to_out", f"{block}.mlp_fc2")
        made.cut_columns(f"{block}.proj_out", made.width, *parts)
    return made


def flux_manifest(source):
    """A runtime manifest: diffusers' names, but for layers taken apart by their inputs."""
    made = Export(source)
    for block in made.numbers("single_transformer_blocks"):
        parts = (f"{block}.proj_out.linears.0", f"{block}.proj_out.linears.1")
        made.cut_columns(f"{block}.proj_out", made.width, *parts, biases="both")
    return made


def chroma_twice(source):
    """The norms of q and k under both names."""
    made = flux_v1(source)
    for key in [key for key in made if re.search(r"\.norm_(added_)?[qk]\.weight$", key)]:
        head, _, norm = key.rpartition(".norm_")
        made[f"{head}.attn.norm_{norm}"] = made[key].clone()
    return made


def qwen_image(source):
    made = Export(source)
    for block in made.numbers("transformer_blocks"):
        fuse_joint(made, block, "attn.to_qkv", "attn.add_qkv_proj")
    return made


def z_image(source, refiners=True):
    made = Export(source)
    for stack in ("layers", "noise_refiner", "context_refiner"):
        for block in made.numbers(stack):
            if refiners or stack == "layers":
                parts = [f"{block}.attention.to_{part}" for part in "qkv"]
                made.fuse(parts, f"{block}.attention.to_qkv")
            parts = [f"{block}.feed_forward.{part}" for part in ("w3", "w1")]
            made.fuse(parts, f"{block}.feed_forward.net.0.proj")
            made.rename(f"{block}.feed_forward.w2", f"{block}.feed_forward.net.2")
    return made


def z_image_plain_refiners(source):
    return z_image(source, refiners=False)


def sdxl(source):
    made = Export(source)
    for key in [key for key in made if key.endswith(".attn1.to_q.weight")]:
        attention = key.removesuffix(".to_q.weight")
        made.fuse([f"{attention}.to_{part}" for part in "qkv"], f"{attention}.to_qkv")
    return made


def cut_single_blocks(made, first, second, halves=("attn.out_proj", "attn.mlp_fc2")):
    for block in made.numbers("single_transformer_blocks"):
        fused, last = f"{block}.attn.to_qkv_mlp_proj", f"{block}.attn.to_out"
        made.cut_rows(fused, 3 * made.width, f"{block}.{first}", f"{block}.{second}")
        made.cut_columns(last, made.width, *(f"{block}.{half}" for half in halves))


def flux2(source):
    made = Export(source)
    for block in made.numbers("transformer_blocks"):
        fuse_joint(made, block, "attn.to_qkv", "attn.to_added_qkv")
    cut_single_blocks(made, "attn.qkv_proj", "attn.mlp_fc1")
    return made


def flux2_v1(source):
    """deepcompressor's names, with the zeros that it writes for absent biases."""
    made = Export(source)
    for block in made.numbers("transformer_blocks"):
        fuse_joint(made, block, "qkv_proj", "qkv_proj_context")
        for old, new in (SHORT | SHORT_GATED_MLP).items():
            made.rename(f"{block}.{old}", f"{block}.{new}")
    cut_single_blocks(made, "qkv_proj", "mlp_fc1", ("out_proj", "mlp_fc2"))
    for block in made.numbers("single_transformer_blocks"):
        for norm in ("norm_q", "norm_k"):
            made.rename(f"{block}.attn.{norm}", f"{block}.{norm}")
    for key in [key for key in made if "_proj" in key or ".mlp_" in key]:
        if "blocks." in key:
            made[f"{key.removesuffix('.weight')}.bias"] = torch.zeros(made[key].shape[0])
    return made


def flux2_manifest(source):
    made = Export(source)
    cut_single_blocks(
        made,
        "attn.to_qkv_mlp_proj.linears.0",
        "attn.to_qkv_mlp_proj.linears.1",
        ("attn.to_out.linears.0", "attn.to_out.linears.1"),
    )
    return made


#: exporter, family, published architectures (Kontext and Krea are dev's, Depth is Canny's),
#: small models of the oracle
FORMS = (
    (
        flux_v1,
        "flux",
        ("FLUX.1-dev", "FLUX.1-schnell", "FLUX.1-Fill-dev", "FLUX.1-Canny-dev"),
        ("flux", "flux_schnell"),
    ),
    (
        flux_v2,
        "flux",
        ("FLUX.1-dev", "FLUX.1-schnell", "FLUX.1-Fill-dev", "FLUX.1-Canny-dev"),
        ("flux", "flux_schnell"),
    ),
    (flux_manifest, "flux", ("FLUX.1-dev",), ("flux",)),
    (flux_v1, "chroma", ("Chroma1-HD",), ("chroma",)),
    (flux_v2, "chroma", ("Chroma1-HD",), ("chroma",)),
    (chroma_twice, "chroma", ("Chroma1-HD",), ("chroma",)),
    (
        qwen_image,
        "qwen_image",
        ("Qwen-Image", "Qwen-Image-Edit-2511", "Qwen-Image-Layered"),
        ("qwen_image", "qwen_image_layered"),
    ),
    (z_image, "z_image", ("Z-Image-Turbo",), ("z_image",)),
    (z_image_plain_refiners, "z_image", ("Z-Image-Turbo",), ("z_image",)),
    (sdxl, "sdxl", ("stable-diffusion-xl-base-1.0", "SSD-1B"), ("sdxl",)),
    (flux2, "flux2", ("FLUX.2-klein-4B", "FLUX.2-klein-9B", "FLUX.2-dev"), ("flux2_klein",)),
    (flux2_v1, "flux2", ("FLUX.2-klein-4B",), ("flux2", "flux2_klein")),
    (flux2_manifest, "flux2", ("FLUX.2-klein-9B",), ("flux2_klein",)),
)


def cases(column):
    return [
        pytest.param(form[0], form[1], name, id=f"{form[0].__name__}-{name}")
        for form in FORMS
        for name in form[column]
    ]


def exported(published, export, name):
    """Hollow tensors of a published architecture under an exporter's names, and its config."""
    told = published(name)
    return export({key: hollow(size) for key, size in told["shapes"].items()}), told["config"]


def detected(source, config=()):
    """Family, evidence and moves of ``{key: tensor}``."""

    def shapes(key):
        return tuple(source[key].shape)

    family, evidence = pack("loaders.families").detect_family(set(source), dict(config), shapes)
    return family, evidence, family.moves(set(source), dict(config), shapes)


# the published architectures


@pytest.mark.parametrize(("export", "expected", "name"), cases(2))
def test_published_architecture_is_filled_exactly(published, export, expected, name):
    from comfy import model_detection

    source, config = exported(published, export, name)
    assert source.keys() != published(name)["shapes"].keys()
    family, moves, native = translate(source, config)
    assert family.name == expected

    found = model_detection.model_config_from_unet(dict(native), "")
    assert found is not None, "ComfyUI does not know the translated checkpoint"
    found.set_inference_dtype(torch.bfloat16, None)
    model = found.get_model(dict(native), "", device=torch.device("meta")).diffusion_model
    wanted = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert {key: tuple(value.shape) for key, value in native.items()} == wanted
    assert_every_row_used_once(source, moves, family.ignored(set(source), config))


def assert_every_row_used_once(source, moves, ignored):
    """The pieces of each tensor of the file cover its rows without gap or overlap."""
    used = defaultdict(list)
    for move in moves:
        for piece in move.pieces:
            used[piece.key].append(piece.rows or (0, source[piece.key].shape[0]))
    assert used.keys() | ignored.keys() == source.keys()
    assert not used.keys() & ignored.keys()
    for key, rows in used.items():
        end = 0
        for first, count in sorted(rows):
            assert first == end, key
            end += count
        assert end == source[key].shape[0], key


@pytest.mark.parametrize(("export", "expected", "name"), cases(2))
def test_every_spelling_has_one_family(published, export, expected, name):
    source, _ = exported(published, export, name)
    families = pack("loaders.families")
    found = [f for f in families.FAMILIES if f.matches(set(source), {}, shape)]
    assert [f.name for f in found] == [expected, "native"]
    # the evidence names what the file has
    for key in found[0].matches(set(source), {}, shape).removeprefix("keys ").split(", "):
        assert key in source


def test_fused_modulation_stays_in_its_order(published):
    source, config = exported(published, flux_v1, "FLUX.1-dev")
    moves = {move.native: move for move in detected(source, config)[2]}
    modulation = [key for key in moves if re.search(r"\.(img_mod|txt_mod|modulation)\.", key)]
    assert len(modulation) == 2 * (2 * 19 + 38)
    assert all(
        moves[key].axis == "single"
        and moves[key].pieces[0].op is None
        and moves[key].pieces[0].rows is None
        for key in modulation
    )
    assert moves["final_layer.adaLN_modulation.1.weight"].pieces[0].op == "swap_halves"


@pytest.mark.parametrize(
    "name", ["FLUX.1-dev", "Chroma1-HD", "Qwen-Image", "Z-Image-Turbo", "FLUX.2-klein-4B"]
)
def test_lite_folder_keeps_diffusers_names(published, name):
    told = published(name)
    source = {key: hollow(size) for key, size in told["shapes"].items()}
    lite = told["config"] | {
        "quantization_config": {
            "quant_method": "nunchaku_lite",
            "svdq_w4a4": {"precision": "int4", "group_size": 64, "rank": 32, "targets": ["x"]},
        }
    }
    family, moves, _ = translate(source, lite)
    plain, expected, _ = translate(source, told["config"])
    assert (family, moves) == (plain, expected)


# small models, through the pack's own translation


def native_tensors(path, tensors):
    save_file(tensors, path)
    plan = pack("loaders.plan").make_plan(path)
    translation = pack("loaders.translate")
    settings = translation.Settings(torch.float32)
    return plan, {key: value for key, value, _ in translation.translate(plan, settings)}


@pytest.mark.parametrize(("export", "expected", "name"), cases(3))
def test_values_land_where_those_of_diffusers_do(tiny, tmp_path, export, expected, name):
    weights, _, _ = tiny(name)
    source = export(weights)
    assert source.keys() != weights.keys()
    _, wanted = native_tensors(tmp_path / "diffusers.safetensors", weights)
    plan, native = native_tensors(tmp_path / "exported.safetensors", source)
    assert plan.family.name == expected
    assert native.keys() == wanted.keys()
    for key, value in wanted.items():
        assert torch.equal(native[key], value), key


def test_biases_of_a_layer_cut_by_its_inputs_are_added(tiny, tmp_path):
    weights, _, _ = tiny("flux")
    whole = weights["single_transformer_blocks.1.proj_out.bias"]
    for export, pieces in ((flux_v1, 2), (flux_v2, 1), (flux_manifest, 2)):
        plan, native = native_tensors(tmp_path / "x.safetensors", export(weights))
        (move,) = [m for m in plan.moves if m.native == "single_blocks.1.linear2.bias"]
        assert (len(move.pieces), move.axis) == (pieces, "sum" if pieces == 2 else "single")
        assert torch.equal(native[move.native], whole)


# what stands around the maps


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "transformer."])
@pytest.mark.parametrize(
    ("export", "name"), [(flux_v1, "FLUX.1-dev"), (qwen_image, "Qwen-Image"), (sdxl, "SSD-1B")]
)
def test_wrapper_prefixes_come_off_and_pieces_keep_them(published, prefix, export, name):
    bare, config = exported(published, export, name)
    expected = detected(bare, config)[2]
    source = {prefix + key: value for key, value in bare.items()}
    moves = detected(source, config)[2]
    assert [m.native for m in moves] == [m.native for m in expected]
    assert [(p.key, p.rows) for m in moves for p in m.pieces] == [
        (prefix + p.key, p.rows) for m in expected for p in m.pieces
    ]


@pytest.mark.parametrize(
    ("export", "name", "lost", "layer"),
    [
        (flux_v1, "FLUX.1-dev", "mlp_fc1.weight", "linear1.weight"),
        (flux_v1, "FLUX.1-dev", "qkv_proj.bias", "linear1.bias"),
        (flux_v1, "FLUX.1-schnell", "out_proj.weight", "linear2.weight"),
        (flux_v2, "FLUX.1-dev", "attn.to_qkv.weight", "linear1.weight"),
        (flux_v2, "Chroma1-HD", "mlp_fc2.weight", "linear2.weight"),
        (flux2, "FLUX.2-klein-4B", "attn.mlp_fc1.weight", "linear1.weight"),
        (flux2_manifest, "FLUX.2-klein-9B", "attn.to_out.linears.1.weight", "linear2.weight"),
    ],
)
def test_missing_part_is_named(published, export, name, lost, layer):
    source, config = exported(published, export, name)
    del source[f"single_transformer_blocks.3.{lost}"]
    with pytest.raises(pack("quant.errors").LowBitError, match="lacks a part") as caught:
        detected(source, config)
    assert caught.value.layer == f"single_blocks.3.{layer}"
    assert f"single_transformer_blocks.3.{lost}" in caught.value.expected
    assert f"single_transformer_blocks.3.{lost}" not in caught.value.found


@pytest.mark.parametrize(
    ("export", "name", "old", "new"),
    [
        # a fused layer under both names of Nunchaku's
        (flux_v1, "FLUX.1-dev", "transformer_blocks.2.qkv_proj", "attn.to_qkv"),
        (flux_v1, "FLUX.1-dev", "single_transformer_blocks.2.qkv_proj", "attn.to_qkv"),
        (flux_v1, "Chroma1-HD", "transformer_blocks.2.qkv_proj_context", "attn.add_qkv_proj"),
        (flux2, "FLUX.2-klein-4B", "single_transformer_blocks.2.attn.mlp_fc2", "mlp_fc2"),
        # Nunchaku's name and diffusers'
        (flux_v1, "FLUX.1-dev", "transformer_blocks.2.mlp_fc2", "ff.net.2"),
        (flux_v1, "FLUX.1-dev", "transformer_blocks.2.norm_q", "attn.norm_q"),
        (flux_v1, "FLUX.1-dev", "single_transformer_blocks.2.mlp_fc2", "proj_out"),
        (flux2, "FLUX.2-dev", "single_transformer_blocks.2.attn.out_proj", "attn.to_out"),
        (z_image, "Z-Image-Turbo", "layers.2.feed_forward.net.2", "feed_forward.w2"),
        # a fused layer and one of its parts
        (qwen_image, "Qwen-Image", "transformer_blocks.2.attn.to_qkv", "attn.to_k"),
        (qwen_image, "Qwen-Image", "transformer_blocks.2.attn.add_qkv_proj", "attn.add_v_proj"),
        (z_image, "Z-Image-Turbo", "layers.2.feed_forward.net.0.proj", "feed_forward.w1"),
        (
            sdxl,
            "SSD-1B",
            "down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_qkv",
            "attn1.to_v",
        ),
    ],
)
def test_mixed_names_are_an_error(published, export, name, old, new):
    source, config = exported(published, export, name)
    block = re.match(r"(.*(?:blocks|layers)\.\d+)\.", old)[1]
    source[f"{block}.{new}.weight"] = source[f"{old}.weight"]
    with pytest.raises(pack("quant.errors").LowBitError, match="same place") as caught:
        detected(source, config)
    assert f"{old}.weight" in caught.value.found
    assert f"{block}.{new}.weight" in caught.value.found


def test_fused_and_separate_attention_are_an_error(published):
    source, config = exported(published, z_image, "Z-Image-Turbo")
    for part in "qkv":
        source[f"layers.7.attention.to_{part}.weight"] = hollow((3840, 3840))
    with pytest.raises(pack("quant.errors").LowBitError, match="same place") as caught:
        detected(source, config)
    assert caught.value.layer == "layers.7.attention.qkv.weight"


@pytest.mark.parametrize(
    ("export", "name", "key"),
    [
        (qwen_image, "Qwen-Image", "transformer_blocks.5.attn.to_qkv.weight"),
        (qwen_image, "Qwen-Image", "transformer_blocks.5.attn.add_qkv_proj.bias"),
        (z_image, "Z-Image-Turbo", "noise_refiner.1.feed_forward.net.0.proj.weight"),
        (sdxl, "SSD-1B", "up_blocks.0.attentions.2.transformer_blocks.0.attn1.to_qkv.weight"),
    ],
)
@pytest.mark.parametrize("rows", [23, 1, 0, None])
def test_rows_that_cannot_be_shared_are_an_error(published, export, name, key, rows):
    source, config = exported(published, export, name)
    assert key in source
    # None: nothing tells the shape
    source[key] = torch.empty(() if rows is None else (rows, *source[key].shape[1:]))
    with pytest.raises(pack("quant.errors").LowBitError, match="cannot be taken apart") as caught:
        detected(source, config)
    assert caught.value.layer == key
    assert caught.value.found == f"{rows or 0} rows"


def test_key_that_the_map_lacks_is_left_over(published):
    families = pack("loaders.families")
    novel = {
        "FLUX.1-dev": (flux_v1, "transformer_blocks.0.mlp_fc3.weight"),
        "stable-diffusion-xl-base-1.0": (sdxl, "mid_block.attentions.0.novel.to_qkv.weight"),
        "Z-Image-Turbo": (z_image, "layers.0.feed_forward.net.1.weight"),
        "Chroma1-HD": (flux_v1, "transformer_blocks.0.norm_x.weight"),
    }
    for name, (export, key) in novel.items():
        source, config = exported(published, export, name)
        source[key] = torch.ones(3)
        family, _, moves = detected(source, config)
        assert families.unused(set(source), moves, family.ignored(set(source), config)) == [key]


def test_norms_that_chroma_files_hold_twice_are_told(published):
    source, config = exported(published, chroma_twice, "Chroma1-HD")
    family, _, moves = detected(source, config)
    ignored = family.ignored(set(source), config)
    assert len(ignored) == 19 * 4 + 38 * 2
    assert ignored["transformer_blocks.4.norm_added_k.weight"] == (
        "is transformer_blocks.4.attn.norm_added_k.weight once more"
    )
    used = {piece.key for move in moves for piece in move.pieces}
    assert "single_transformer_blocks.7.attn.norm_q.weight" in used
    # files that hold them once lose nothing
    source, config = exported(published, flux_v1, "Chroma1-HD")
    assert family.ignored(set(source), config) == {}


def test_biases_that_flux2_has_no_place_for_are_told(published):
    source, config = exported(published, flux2_v1, "FLUX.2-klein-4B")
    family, _, moves = detected(source, config)
    ignored = family.ignored(set(source), config)
    assert len(ignored) == 5 * 8 + 20 * 4
    assert all(key.endswith(".bias") and "no biases" in ignored[key] for key in ignored)
    assert not any(move.native.endswith(".bias") for move in moves)
    # a file under diffusers' names is not excused
    told = published("FLUX.2-klein-4B")
    keys = set(told["shapes"]) | {"transformer_blocks.0.attn.to_add_out.bias"}
    assert family.ignored(keys, told["config"]) == {}
    moves = family.moves(keys, told["config"], shape)
    assert "double_blocks.0.txt_attn.proj.bias" in {move.native for move in moves}


def test_biases_that_flux2_has_no_place_for_must_be_zero(tiny, tmp_path):
    source = flux2_v1(tiny("flux2")[0])
    key = "transformer_blocks.0.qkv_proj.bias"
    source[key][3] = -0.25
    with pytest.raises(pack("quant.errors").LowBitError, match="no place") as caught:
        native_tensors(tmp_path / "x.safetensors", source)
    assert caught.value.layer == key
    assert caught.value.found == "values up to 0.25"
    source[key][3] = 0
    _, native = native_tensors(tmp_path / "x.safetensors", source)
    assert native and not any(name.endswith(".bias") for name in native)


def test_edit_2511_is_told_by_its_config(published):
    for name, expected in (("Qwen-Image", set()), ("Qwen-Image-Edit-2511", {"zero_cond_t"})):
        source, config = exported(published, qwen_image, name)
        extras = detected(source, config)[0].extras(set(source), config)
        assert bool(expected) == ("__index_timestep_zero__" in extras)


# SANA

SANA = {
    "Nunchaku": (
        "transformer_blocks.0.ff.inverted_conv.weight",
        "transformer_blocks.0.ff.depth_conv.weight",
        "transformer_blocks.0.ff.point_conv.weight",
        "transformer_blocks.0.attn.qkv_proj.weight",
        "transformer_blocks.0.cross_attn.q_linear.weight",
        "transformer_blocks.0.scale_shift_table",
        "patch_embed.proj.weight",
        "caption_projection.linear_1.weight",
    ),
    "diffusers": (
        "transformer_blocks.0.ff.conv_inverted.weight",
        "transformer_blocks.0.ff.conv_depth.weight",
        "transformer_blocks.0.ff.conv_point.weight",
        "transformer_blocks.0.attn1.to_q.weight",
        "transformer_blocks.0.attn2.to_q.weight",
        "transformer_blocks.0.scale_shift_table",
        "patch_embed.proj.weight",
        "caption_projection.linear_1.weight",
    ),
    "own": (
        "blocks.0.mlp.inverted_conv.conv.weight",
        "blocks.0.mlp.depth_conv.conv.weight",
        "blocks.0.attn.qkv.weight",
        "blocks.0.cross_attn.q_linear.weight",
        "x_embedder.proj.weight",
        "y_embedder.y_proj.fc1.weight",
    ),
}


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("names", SANA)
def test_sana_is_refused_by_name(names, prefix):
    keys = {prefix + key for key in SANA[names]}
    with pytest.raises(pack("quant.errors").LowBitError, match="SANA") as caught:
        pack("loaders.families").detect_family(
            keys, {"_class_name": "SanaTransformer2DModel"}, shape
        )
    assert SANA[names][0] in caught.value.found
    assert "SanaTransformer2DModel" in caught.value.found
    assert "FLUX.1" in caught.value.expected
    assert "ComfyUI names" not in caught.value.expected


def test_refused_model_is_named_with_its_file(tmp_path):
    path = tmp_path / "svdq-int4_r32-sana.safetensors"
    save_file({key: torch.ones(2, 2) for key in SANA["diffusers"]}, path)
    with pytest.raises(pack("quant.errors").LowBitError, match="SANA") as caught:
        pack("loaders.plan").make_plan(path)
    assert str(caught.value.file) == str(path)


def test_comfyui_has_no_sana():
    import comfy.supported_models
    from comfy import model_detection

    assert not [name for name in vars(comfy.supported_models) if "sana" in name.lower()]
    for names in SANA.values():
        native = {key: torch.ones(2, 2) for key in names}
        assert model_detection.model_config_from_unet(native, "") is None


def test_a_model_with_sanas_layers_is_not_refused():
    from comfy import ops
    from comfy.ldm.ace.model import ACEStepTransformer2DModel

    model = ACEStepTransformer2DModel(
        num_layers=1, device="meta", dtype=torch.float32, operations=ops.disable_weight_init
    )
    keys = set(model.state_dict())
    assert "transformer_blocks.0.ff.inverted_conv.conv.weight" in keys
    family, _ = pack("loaders.families").detect_family(keys, {}, shape)
    assert family.name == "native"
