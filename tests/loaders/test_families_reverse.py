"""ComfyUI's names back to those of files: what a loader joins, a writer takes apart alike."""

from __future__ import annotations

import json

import pytest
import torch
from support import oracle, pack
from test_families import BUILT, LOADED, PUBLISHED, execute, hollow, read_checkpoint, translate

LowBitError = pack("quant.errors").LowBitError


@pytest.fixture(scope="module")
def published():
    folder = oracle("tiny_models.py", "published")
    return lambda name: json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def tiny():
    folder = oracle("tiny_models.py", "tiny", *LOADED, *BUILT)
    return lambda name: read_checkpoint(folder / name)


def undone(moves, native):
    """The file's tensors, from ComfyUI's."""

    def cut(piece):
        tensor = native[piece.key]
        if piece.columns is not None:
            tensor = tensor.narrow(1, *piece.columns)
        return tensor

    made = {}
    for move in moves:
        (first, *_) = move.pieces
        if first.columns is not None:
            made[move.native] = cut(first)
        else:
            made[move.native] = execute(move, native.__getitem__)
    return made


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_architectures_get_their_names_back(published, name):
    reverse = pack("loaders.families.reverse").reverse
    told = published(name)
    source = {key: hollow(shape) for key, shape in told["shapes"].items()}
    family, _, native = translate(source, told["config"])
    back = reverse({key: tuple(value.shape) for key, value in native.items()})
    assert back.family is family
    found = {key: tuple(value.shape) for key, value in undone(back.moves, native).items()}
    assert found == {key: tuple(value.shape) for key, value in source.items()}
    extras = family.extras(set(source), told["config"])
    assert set(back.left) == set(extras)


@pytest.mark.parametrize("name", LOADED | BUILT)
def test_values_come_back_bit_for_bit(tiny, name):
    reverse = pack("loaders.families.reverse").reverse
    weights, config, _ = tiny(name)
    family, _, native = translate(weights, config)
    back = reverse({key: tuple(value.shape) for key, value in native.items()})
    assert back.family is family
    found = undone(back.moves, native)
    assert found.keys() == weights.keys()
    for key, value in weights.items():
        assert torch.equal(found[key], value), key


@pytest.mark.parametrize(
    "name", ["FLUX.1-dev", "Chroma1-HD", "FLUX.2-klein-4B", "Qwen-Image", "Z-Image-Turbo",
             "stable-diffusion-xl-base-1.0"]
)  # fmt: skip
def test_nunchaku_names_are_read_back_to_the_same_model(published, name):
    reverse = pack("loaders.families.reverse").reverse
    told = published(name)
    source = {key: hollow(shape) for key, shape in told["shapes"].items()}
    _, _, native = translate(source, told["config"])
    shapes = {key: tuple(value.shape) for key, value in native.items()}
    written = undone(reverse(shapes, "nunchaku").moves, native)
    projections = [key for key in written if key.endswith(".to_q.weight") and "attn2" not in key]
    assert projections == []
    _, moves, again = translate(written, told["config"])
    assert {key: tuple(value.shape) for key, value in again.items()} == shapes
    joined = {move.native: move for move in moves}
    if name == "FLUX.1-dev":
        assert "single_transformer_blocks.0.qkv_proj.weight" in written
        assert "transformer_blocks.0.mlp_fc1.weight" in written
        assert "transformer_blocks.0.qkv_proj_context.weight" in written
        assert joined["single_blocks.0.linear2.weight"].axis == "columns"
        assert joined["single_blocks.0.linear1.weight"].axis == "rows"
    if name == "Qwen-Image":
        assert "transformer_blocks.0.attn.to_qkv.weight" in written
        assert "transformer_blocks.0.attn.to_q.weight" not in written


@pytest.mark.parametrize("seed", range(2))
def test_values_of_nunchaku_names_are_the_models(tiny, seed):
    """Columns of the last layer of a single block stand where the loader puts them."""
    reverse = pack("loaders.families.reverse").reverse
    weights, config, _ = tiny("flux")
    torch.manual_seed(seed)
    weights = {key: torch.randn_like(value) for key, value in weights.items()}
    _, _, native = translate(weights, config)
    written = undone(
        reverse({key: tuple(value.shape) for key, value in native.items()}, "nunchaku").moves,
        native,
    )
    _, _, again = translate(written, config)
    assert again.keys() == native.keys()
    for key, value in native.items():
        assert torch.equal(again[key], value), key


def test_unknown_models_and_styles_are_told(published):
    reverse = pack("loaders.families.reverse").reverse
    with pytest.raises(LowBitError, match="cannot be written with names of diffusers"):
        reverse({"some.weight": (4, 4)})
    with pytest.raises(LowBitError, match="cannot be written with names of diffusers"):
        reverse({})
    told = published("Wan2.1-T2V-1.3B")
    source = {key: hollow(shape) for key, shape in told["shapes"].items()}
    _, _, native = translate(source, told["config"])
    shapes = {key: tuple(value.shape) for key, value in native.items()}
    with pytest.raises(LowBitError, match="names of nunchaku"):
        reverse(shapes, "nunchaku")
    with pytest.raises(LowBitError, match="cannot be written with names of diffusers"):
        reverse({**shapes, "surplus.weight": (2, 2)})


def test_a_layer_that_is_not_as_wide_as_attention_is_told(published):
    reverse = pack("loaders.families.reverse").reverse
    told = published("FLUX.1-dev")
    source = {key: hollow(shape) for key, shape in told["shapes"].items()}
    _, _, native = translate(source, told["config"])
    shapes = {key: tuple(value.shape) for key, value in native.items()}
    shapes["single_blocks.3.linear1.weight"] = (9000, 3072)
    with pytest.raises(LowBitError, match="cannot be taken apart") as caught:
        reverse(shapes)
    assert caught.value.layer == "single_blocks.3.linear1.weight"


# ---------------------------------------------------------------------- configs, told from shapes

#: What shapes cannot tell: which of two models of equal tensors it is, and what nothing reads.
UNTOLD = {"_diffusers_version", "zero_cond_t", "sample_size"}


@pytest.mark.parametrize(
    "name",
    [n for n, family in PUBLISHED.items() if family not in ("auraflow", "pixart", "sdxl")],
)
def test_the_config_of_a_published_model_is_told_from_its_shapes(published, name):
    told = published(name)
    shapes = {key: tuple(shape) for key, shape in told["shapes"].items()}
    families, teller = pack("loaders.families"), pack("loaders.families.configs").diffusers_config
    family, _ = families.detect_family(set(shapes), told["config"], shapes.get)
    extras = family.extras(set(shapes), told["config"])
    config = teller(told["config"]["_class_name"], shapes, extras)
    assert config.get("zero_cond_t", False) == told["config"].get("zero_cond_t", False)
    assert config.keys() - UNTOLD == told["config"].keys() - UNTOLD
    assert {k: v for k, v in config.items() if k not in UNTOLD} == {
        k: v for k, v in told["config"].items() if k not in UNTOLD
    }


def test_a_config_that_shapes_do_not_tell_is_an_error():
    configs = pack("loaders.families.configs")
    with pytest.raises(LowBitError, match="cannot be told") as caught:
        configs.diffusers_config("UNet2DConditionModel", {})
    assert "FluxTransformer2DModel" in caught.value.expected
