"""Key maps: diffusers' checkpoints against ComfyUI's own model classes.

Three measures, each with diffusers' own classes as the other side:

- the published architectures, by names and shapes alone: our moves fill exactly ComfyUI's model;
- small models with random weights: both sides compute the same;
- whole models at the smallest width that ComfyUI's detection takes (slow), where that is big.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from comfy_models import build_small, comfy_forward
from safetensors.torch import load_file
from support import oracle, pack

AGREEMENT = 1e-5

PUBLISHED = {
    "FLUX.1-dev": "flux",
    "FLUX.1-schnell": "flux",
    "FLUX.1-Fill-dev": "flux",
    "FLUX.1-Canny-dev": "flux",
    "FLUX.2-dev": "flux2",
    "FLUX.2-klein-4B": "flux2",
    "FLUX.2-klein-9B": "flux2",
    "Chroma1-HD": "chroma",
    "Qwen-Image": "qwen_image",
    "Qwen-Image-Edit-2511": "qwen_image",
    "Qwen-Image-Layered": "qwen_image",
    "Z-Image-Turbo": "z_image",
    "Z-Image-Omni": "z_image",
    "Lumina-Image-2.0": "lumina2",
    "Wan2.1-T2V-1.3B": "wan",
    "Wan2.1-T2V-14B": "wan",
    "Wan2.1-I2V-14B": "wan",
    "Wan2.1-FLF2V-14B": "wan",
    "Wan2.2-T2V-A14B": "wan",
    "Wan2.2-I2V-A14B": "wan",
    "Wan2.2-TI2V-5B": "wan",
    "stable-diffusion-3-medium": "sd3",
    "stable-diffusion-3.5-medium": "sd3",
    "stable-diffusion-3.5-large": "sd3",
    "AuraFlow": "auraflow",
    "PixArt-XL-2-1024-MS": "pixart",
    "PixArt-Sigma-XL-2-1024-MS": "pixart",
    "stable-diffusion-xl-base-1.0": "sdxl",
    "stable-diffusion-xl-inpainting": "sdxl",
    "SSD-1B": "sdxl",
    "stable-diffusion-v1-5": "sdxl",
    "stable-diffusion-2-1": "sdxl",
}

#: small models that ComfyUI's own loader takes
LOADED = {
    "flux": "flux",
    "flux_schnell": "flux",
    "flux2": "flux2",
    "flux2_klein": "flux2",
    "wan": "wan",
    "wan_i2v": "wan",
    "wan_flf2v": "wan",
    "wan_ti2v": "wan",
    "sd3": "sd3",
    "sd35": "sd3",
    "pixart_alpha": "pixart",
    "pixart_sigma": "pixart",
}

#: small models whose width ComfyUI's detection does not take: its class is built directly
BUILT = {
    "chroma": "chroma",
    "qwen_image": "qwen_image",
    "qwen_image_edit": "qwen_image",
    "qwen_image_layered": "qwen_image",
    "z_image": "z_image",
    "lumina2": "lumina2",
    "auraflow": "auraflow",
    "sdxl": "sdxl",
    "sd15": "sdxl",
}

#: the same families through ComfyUI's loader, at the smallest width that it takes
WHOLE = {
    "chroma_whole": "chroma",
    "qwen_image_whole": "qwen_image",
    "qwen_image_edit_whole": "qwen_image",
    "z_image_whole": "z_image",
    "lumina2_whole": "lumina2",
    "auraflow_whole": "auraflow",
    "sdxl_vega_whole": "sdxl",
    "sd15_whole": "sdxl",
}


# a float executor for moves: what a scheme does to tensors, in the plainest way


def execute(move, read):
    """The native tensor of a move, from float tensors."""
    pieces = []
    for piece in move.pieces:
        tensor = read(piece.key)
        if piece.rows is not None:
            first, number = piece.rows
            tensor = tensor[first : first + number]
        if piece.op is not None:
            assert piece.op == "swap_halves"
            upper, lower = tensor.chunk(2, dim=0)
            tensor = torch.cat([lower, upper])
        pieces.append(tensor)
    if move.axis == "sum":
        return sum(pieces)
    if move.axis == "single":
        return pieces[0]
    return torch.cat(pieces, dim=0 if move.axis == "rows" else 1)


def translate(source, config):
    """Family, its moves and the native state dict of a checkpoint ``{key: tensor}``."""
    families = pack("loaders.families")
    keys = set(source)
    family, evidence = families.detect_family(keys, config, lambda key: tuple(source[key].shape))
    assert evidence
    moves = family.moves(keys, config, lambda key: tuple(source[key].shape))
    ignored = family.ignored(keys, config)
    assert families.unused(keys, moves, ignored) == []
    native = {move.native: execute(move, source.__getitem__) for move in moves}
    return family, moves, native | family.extras(keys, config)


def hollow(shape):
    """A tensor of this shape: without memory, but vectors are real, as detection reads some."""
    return torch.ones(shape) if len(shape) < 2 else torch.empty(shape, device="meta")


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


def read_checkpoint(folder: Path):
    """Weights, config and the recorded forward pass of a model that the oracle saved."""
    weights = {}
    for file in sorted(folder.glob("diffusion_pytorch_model*.safetensors")):
        weights |= load_file(file)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return weights, config, load_file(folder / "run.safetensors")


# the published architectures


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_architecture_is_filled_exactly(published, name):
    from comfy import model_detection

    told = published(name)
    source = {key: hollow(shape) for key, shape in told["shapes"].items()}
    family, _, native = translate(source, told["config"])
    assert family.name == PUBLISHED[name]

    config = model_detection.model_config_from_unet(dict(native), "")
    assert config is not None, "ComfyUI does not know the translated checkpoint"
    config.set_inference_dtype(torch.bfloat16, None)
    model = config.get_model(dict(native), "", device=torch.device("meta")).diffusion_model
    wanted = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    for key in family.optional:
        wanted.pop(key, None)
    assert {key: tuple(value.shape) for key, value in native.items()} == wanted


def test_every_published_architecture_has_one_family(published):
    families = pack("loaders.families")
    for name, expected in PUBLISHED.items():
        told = published(name)
        keys, shapes = set(told["shapes"]), told["shapes"].__getitem__
        found = [f.name for f in families.FAMILIES if f.matches(keys, {}, shapes)]
        assert found == [expected, "native"], name


def own_map(published, name, kind, structure):
    """Our moves of a published architecture and ComfyUI's, both as {native: pieces}."""
    told = published(name)
    source = {key: hollow(shape) for key, shape in told["shapes"].items()}
    _, moves, _ = translate(source, told["config"])
    table = pack("loaders.host.maps").native_names(kind, structure)
    known = {key for key in source if key in table}
    theirs = pack("loaders.families.mapped").moves_from(
        table, known, lambda key: tuple(source[key].shape)
    )
    return {m.native: m.pieces for m in moves}, {m.native: m.pieces for m in theirs}


@pytest.mark.parametrize(
    ("name", "kind", "structure"),
    [
        ("FLUX.1-dev", "flux", {"depth": 19, "depth_single_blocks": 38, "hidden_size": 3072}),
        ("Chroma1-HD", "flux", {"depth": 19, "depth_single_blocks": 38, "hidden_size": 3072}),
        ("FLUX.2-dev", "flux", {"depth": 8, "depth_single_blocks": 48, "hidden_size": 6144}),
        ("Z-Image-Turbo", "z_image", {"n_layers": 30, "dim": 3840}),
    ],
)
def test_own_tables_agree_with_comfyuis_where_it_has_one(published, name, kind, structure):
    ours, theirs = own_map(published, name, kind, structure)
    assert len(theirs) > 100
    assert theirs == {native: ours[native] for native in theirs}
    if name in ("FLUX.1-dev", "Z-Image-Turbo"):
        assert ours == theirs


# forward passes


def assert_same_forward(family, model, run):
    given = {key.removeprefix("in."): value for key, value in run.items() if key != "out"}
    out = comfy_forward(family, model, given)
    expected = run["out"]
    assert out.shape == expected.shape
    error = (out - expected).abs().max() / expected.abs().max()
    print(f"relative error {error:.2e}")
    assert error < AGREEMENT


def assert_holds(model, native, optional):
    """The model holds the translated tensors, all of them and nothing else."""
    held = model.state_dict()
    assert set(native) - set(held) == set()
    assert set(held) - set(native) <= set(optional)
    for key, value in native.items():
        assert torch.equal(held[key], value), key


def load_whole(native):
    """ComfyUI's own loader, in float32 on the CPU."""
    import comfy.sd

    patcher = comfy.sd.load_diffusion_model_state_dict(
        dict(native), model_options={"dtype": torch.float32}
    )
    assert patcher is not None, "ComfyUI does not know the translated checkpoint"
    return patcher.model.diffusion_model


@pytest.mark.parametrize("name", LOADED)
def test_small_model_loads_and_agrees_with_diffusers(tiny, name):
    weights, config, run = tiny(name)
    family, _, native = translate(weights, config)
    assert family.name == LOADED[name]
    model = load_whole(native)
    assert_holds(model, native, family.optional)
    assert_same_forward(family.name, model, run)


@pytest.mark.parametrize("name", BUILT)
def test_small_class_agrees_with_diffusers(tiny, name):
    import comfy.ops

    weights, config, run = tiny(name)
    family, _, native = translate(weights, config)
    assert family.name == BUILT[name]
    model = build_small(family.name, config, native, operations=comfy.ops.disable_weight_init)
    assert_holds(model, native, ())
    assert_same_forward(family.name, model, run)


@pytest.mark.slow
@pytest.mark.parametrize("name", WHOLE)
def test_whole_model_loads_and_agrees_with_diffusers(name):
    folder = oracle("tiny_models.py", "tiny", name)
    try:
        weights, config, run = read_checkpoint(folder / name)
        family, _, native = translate(weights, config)
        del weights
        assert family.name == WHOLE[name]
        model = load_whole(native)
        assert_holds(model, native, family.optional)
        assert_same_forward(family.name, model, run)
    finally:
        shutil.rmtree(folder)  # gigabytes


# what stands around the maps


def flux_keys(published):
    return set(published("FLUX.1-dev")["shapes"])


def shape(key):
    return (8, 8)


@pytest.mark.parametrize(
    "prefix", ["", "model.diffusion_model.", "diffusion_model.", "transformer.", "unet."]
)
def test_wrapper_prefixes_come_off_and_pieces_keep_them(published, prefix):
    families = pack("loaders.families")
    keys = {prefix + key for key in flux_keys(published)}
    family, evidence = families.detect_family(keys, {}, shape)
    assert family.name == "flux"
    assert prefix + "x_embedder.weight" in evidence
    moves = family.moves(keys, {}, shape)
    assert families.unused(keys, moves, family.ignored(keys, {})) == []
    assert {move.native.partition(".")[0] for move in moves} == {
        "double_blocks",
        "final_layer",
        "guidance_in",
        "img_in",
        "single_blocks",
        "time_in",
        "txt_in",
        "vector_in",
    }
    assert all(piece.key.startswith(prefix) for move in moves for piece in move.pieces)


def test_native_names_are_moved_as_they_are():
    families = pack("loaders.families")
    keys = {"img_in.weight", "double_blocks.0.img_attn.qkv.weight", "blocks.7.gamma"}
    family, evidence = families.detect_family(keys, {"_class_name": "Novel"}, shape)
    assert family.name == "native"
    assert "Novel" in evidence
    assert [(m.native, m.pieces[0].key, m.axis) for m in family.moves(keys, {}, shape)] == [
        (key, key, "single") for key in sorted(keys)
    ]


def test_whole_checkpoint_gives_its_diffusion_model_alone():
    families = pack("loaders.families")
    inside = {"model.diffusion_model.img_in.weight", "model.diffusion_model.txt_in.weight"}
    outside = {"first_stage_model.encoder.conv_in.weight", "cond_stage_model.x", "betas"}
    family, _ = families.detect_family(inside | outside, {}, shape)
    assert family.name == "native"
    moves = family.moves(inside | outside, {}, shape)
    assert {m.native for m in moves} == {"img_in.weight", "txt_in.weight"}
    ignored = family.ignored(inside | outside, {})
    assert set(ignored) == outside
    assert all("outside model.diffusion_model" in reason for reason in ignored.values())


def test_native_names_that_begin_like_a_prefix_stay_whole():
    families = pack("loaders.families")
    keys = {"transformer.layers.0.weight", "to_cond_embed.0.weight"}
    family, _ = families.detect_family(keys, {}, shape)
    assert {m.native for m in family.moves(keys, {}, shape)} == keys


def test_class_name_alone_decides_nothing(published):
    families = pack("loaders.families")
    family, _ = families.detect_family(
        {"a.weight"}, {"_class_name": "FluxTransformer2DModel"}, shape
    )
    assert family.name == "native"
    family, evidence = families.detect_family(
        flux_keys(published), {"_class_name": "WanTransformer3DModel"}, shape
    )
    assert family.name == "flux"
    assert "overrule" in evidence


def test_no_tensors_no_family():
    assert pack("loaders.families").detect_family(set(), {}, shape) == (None, "no tensors")


@pytest.mark.parametrize("name", ["FLUX.1-dev", "Z-Image-Turbo", "stable-diffusion-3-medium"])
def test_missing_part_of_a_fused_layer_is_named(published, name):
    families = pack("loaders.families")
    shapes = published(name)["shapes"]
    lost = next(key for key in sorted(shapes) if "to_k.weight" in key)
    keys = set(shapes) - {lost}
    family, _ = families.detect_family(keys, {}, shapes.__getitem__)
    with pytest.raises(pack("quant.errors").LowBitError) as caught:
        family.moves(keys, {}, shapes.__getitem__)
    assert "lacks a part" in str(caught.value)
    assert lost in caught.value.expected or lost not in caught.value.found
    assert caught.value.layer.endswith(("qkv.weight", "linear1.weight"))


def test_wrong_width_of_a_fused_part_is_named(published):
    families = pack("loaders.families")
    shapes = published("stable-diffusion-3-medium")["shapes"]
    wrong = "transformer_blocks.3.attn.to_v.weight"
    told = shapes | {wrong: [7, 1536]}
    family, _ = families.detect_family(set(told), {}, told.__getitem__)
    with pytest.raises(pack("quant.errors").LowBitError) as caught:
        family.moves(set(told), {}, told.__getitem__)
    assert caught.value.layer == wrong
    assert caught.value.found == "7"


def test_two_tensors_for_one_place_are_an_error(published):
    families = pack("loaders.families")
    told = published("stable-diffusion-xl-base-1.0")["shapes"]
    told["class_embedding.linear_1.weight"] = told["add_embedding.linear_1.weight"]
    family, _ = families.detect_family(set(told), {}, told.__getitem__)
    with pytest.raises(pack("quant.errors").LowBitError, match="same place") as caught:
        family.moves(set(told), {}, told.__getitem__)
    assert caught.value.layer == "label_emb.0.0.weight"


def test_key_that_the_map_lacks_is_left_over(published):
    families = pack("loaders.families")
    keys = flux_keys(published) | {"transformer_blocks.0.attn.novelty.weight"}
    family, _ = families.detect_family(keys, {}, shape)
    moves = family.moves(keys, {}, shape)
    assert families.unused(keys, moves, family.ignored(keys, {})) == [
        "transformer_blocks.0.attn.novelty.weight"
    ]


def test_halves_are_swapped_in_weight_and_bias(published):
    told = published("FLUX.1-dev")
    source = {key: hollow(size) for key, size in told["shapes"].items()}
    _, moves, _ = translate(source, told["config"])
    swapped = {m.native for m in moves if m.pieces[0].op == "swap_halves"}
    assert swapped == {
        "final_layer.adaLN_modulation.1.weight",
        "final_layer.adaLN_modulation.1.bias",
    }


def test_edit_2511_is_told_by_its_config(published):
    families = pack("loaders.families")
    for name, expected in (("Qwen-Image", set()), ("Qwen-Image-Edit-2511", {"zero"})):
        told = published(name)
        family, _ = families.detect_family(set(told["shapes"]), told["config"], shape)
        extras = family.extras(set(told["shapes"]), told["config"])
        assert bool(expected) == ("__index_timestep_zero__" in extras)
        # a file that says so itself is not told twice
        keys = set(told["shapes"]) | {"__index_timestep_zero__"}
        assert family.extras(keys, told["config"]) == {}


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        (None, set()),
        ({"prediction_type": "epsilon"}, set()),
        ({"prediction_type": "v_prediction"}, {"v_pred"}),
        (
            {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
            {"v_pred", "ztsnr"},
        ),
    ],
)
def test_sdxl_prediction_comes_from_the_scheduler(published, scheduler, expected):
    import comfy.model_base
    import comfy.model_detection

    told = published("stable-diffusion-xl-base-1.0")
    config = told["config"] | ({"scheduler": scheduler} if scheduler else {})
    source = {key: hollow(size) for key, size in told["shapes"].items()}
    _, _, native = translate(source, config)
    assert {key for key in native if "." not in key} == expected
    found = comfy.model_detection.model_config_from_unet(native, "")
    kind = comfy.model_base.ModelType
    assert found.model_type(native) == (kind.V_PREDICTION if expected else kind.EPS)


def test_moves_and_pieces_refuse_nonsense():
    base = pack("loaders.families.base")
    with pytest.raises(ValueError, match="not one of"):
        base.Piece("a", op="rotate")
    with pytest.raises(ValueError, match="not one of"):
        base.Move("a", (base.Piece("b"),), "diagonal")
    with pytest.raises(ValueError, match="2 pieces"):
        base.Move("a", (base.Piece("b"), base.Piece("c")))


def test_changed_host_map_is_an_error(monkeypatch):
    import comfy.utils

    maps = pack("loaders.host.maps")
    error = pack("quant.errors").LowBitError
    monkeypatch.setattr(comfy.utils, "pixart_to_diffusers", lambda c: {"a": ("b", (1, 0, 4))})
    with pytest.raises(error, match="has changed"):
        maps.native_names("pixart", {})
    monkeypatch.delattr(comfy.utils, "pixart_to_diffusers")
    with pytest.raises(error, match="no such function"):
        maps.native_names("pixart", {})
