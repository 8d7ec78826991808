"""Facts of families against the layers of published architectures, under ComfyUI's own names."""

from __future__ import annotations

import json
import math
from fnmatch import fnmatchcase

import pytest
from support import oracle, pack

families = pack("loaders.families")
facts = pack("loaders.families.facts")
recipes = pack("quant.recipe")
Recipe = recipes.Recipe

PUBLISHED = {
    "FLUX.1-dev": "flux",
    "FLUX.2-dev": "flux2",
    "Chroma1-HD": "chroma",
    "Qwen-Image": "qwen_image",
    "Z-Image-Turbo": "z_image",
    "Lumina-Image-2.0": "lumina2",
    "Wan2.2-T2V-A14B": "wan",
    "stable-diffusion-3.5-large": "sd3",
    "AuraFlow": "auraflow",
    "PixArt-Sigma-XL-2-1024-MS": "pixart",
    "stable-diffusion-xl-base-1.0": "sdxl",
}
#: patterns of parts that only other members of a family have
ELSEWHERE = {
    "z_image": ("siglip_embedder",),
    "wan": ("img_emb",),
    "flux2": (),
    "pixart": ("csize_embedder", "ar_embedder"),
}


def native_shapes(name: str) -> dict[str, tuple[int, ...]]:
    """Native weights of a published architecture with their shapes, by the family's moves."""
    told = json.loads((oracle("tiny_models.py", "published") / f"{name}.json").read_text())
    shapes = {key: tuple(shape) for key, shape in told["shapes"].items()}
    keys = set(shapes)
    family, _ = families.detect_family(keys, told["config"], shapes.__getitem__)
    assert family.name == PUBLISHED[name]
    found = {}
    for move in family.moves(keys, told["config"], shapes.__getitem__):
        parts = [shapes[piece.key] for piece in move.pieces]
        rows = [
            piece.rows[1] if piece.rows else shape[0]
            for piece, shape in zip(move.pieces, parts, strict=True)
            if shape
        ]
        if move.native.endswith(".weight") and len(parts[0]) > 1:
            width = parts[0][1:]
            if move.axis == "columns":
                rows, width = rows[:1], (sum(shape[1] for shape in parts),)
            found[move.native.removesuffix(".weight")] = (sum(rows), *width)
    return found


@pytest.mark.parametrize("name", PUBLISHED)
def test_native_names_tell_the_family_and_every_pattern_means_a_layer(name: str) -> None:
    layers = native_shapes(name)
    told, found = facts.facts_of(f"{layer}.weight" for layer in layers)
    assert told == PUBLISHED[name]
    family = next(f for f in families.FAMILIES if f.name == told)
    assert family.facts is found
    patterns = [p for _, kept in found.keep for p in kept]
    patterns += [p for p, _ in (*found.modulation, *found.two_inputs)]
    patterns += [*found.behind_gelu, *(p for group in found.one_input for p in group)]
    for pattern in patterns:
        if pattern in ELSEWHERE.get(told, ()):
            continue
        assert any(recipes.matches(layer, pattern) for layer in layers), pattern


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_quantizes_nearly_all_of_a_model_and_keeps_its_ends(name: str) -> None:
    layers = native_shapes(name)
    _, found = facts.facts_of(layers)
    total = sum(math.prod(shape) for shape in layers.values())
    for method in recipes.METHODS:
        recipe = Recipe.make(method)
        taken = 0
        for layer, shape in layers.items():
            kind = "conv" if len(shape) > 2 else "linear"
            decided = recipe.decide(layer, shape, kind, found)
            if isinstance(decided, recipes.Kept):
                assert decided.reason
                continue
            taken += math.prod(shape)
            # A layer with an input or output of a few channels is an end of the model.
            assert min(shape) >= 256, (method, layer, shape)
        share = {"sdxl": 0.6, "wan": 0.8}.get(PUBLISHED[name], 0.85)
        if method == "svdquant":
            share -= 0.25  # modulation
        assert taken > share * total, (method, taken / total)


def test_layers_of_one_input_are_groups_of_the_same_width() -> None:
    for name, sizes in (("Qwen-Image", {3}), ("Z-Image-Turbo", {2}), ("FLUX.1-dev", set())):
        layers = native_shapes(name)
        groups = facts.facts_of(layers)[1].together(layers)
        assert {len(group) for group in groups} == sizes
        for group in groups:
            assert len({layers[layer][1] for layer in group}) == 1


def test_chunks_of_modulation_fit_the_rows() -> None:
    for name in ("FLUX.1-dev", "Qwen-Image"):
        layers = native_shapes(name)
        for pattern, chunks in facts.facts_of(layers)[1].modulation:
            met = [shape for layer, shape in layers.items() if fnmatchcase(layer, pattern)]
            assert met and all(rows == chunks * columns for rows, columns in met)


def test_a_model_that_no_family_knows_keeps_what_such_layers_are_called() -> None:
    told, found = facts.facts_of(["model.layers.0.q", "patch_embed.proj"])
    assert told == "" and found is facts.UNKNOWN
    recipe = Recipe.make("int8")
    for name in ("patch_embed.proj", "t_embedder.mlp.0", "final_layer.linear", "lm_head", "head"):
        assert recipe.keeps(name, found), name
    for name in ("blocks.0.attn.proj", "layers.3.feed_forward.w1", "blocks.1.head_gate"):
        assert recipe.keeps(name, found) is None, name
