"""Recipes: settings and their errors, the JSON form, patterns, and what is decided on a layer."""

from __future__ import annotations

import json

import pytest
from support import oracle, pack

recipes = pack("quant.recipe")
settings = pack("quant.settings")
dtypes = pack("quant.dtypes")
Recipe, Kept, Split, Facts = recipes.Recipe, recipes.Kept, recipes.Split, recipes.Facts
LowBitError = pack("quant.errors").LowBitError
SHIFT = pack("quant.svdq").SHIFT

WIDE = (3072, 3072)


def decide(method: str, shape=WIDE, name: str = "a.b", kind: str = "linear", **told):
    more = {key: told.pop(key) for key in ("keep", "overrides", "refine") if key in told}
    facts = told.pop("facts", Facts())
    return Recipe.make(method, told, **more).decide(name, shape, kind, facts)


# -------------------------------------------------------------------------------- settings, JSON


def test_every_setting_has_a_default_that_it_takes_and_words_for_people() -> None:
    for method, told in recipes.METHODS.items():
        assert Recipe.make(method).method == method
        for name, setting in {**told.settings, **recipes.REFINEMENTS}.items():
            assert setting.name == name
            assert setting.check(setting.default) == setting.default
            assert setting.help.endswith((".", "…")) and setting.expected()


def example(setting):
    """A value other than the default."""
    if setting.kind == "switch":
        return not setting.default
    if setting.kind == "format":
        return "uint6"
    if setting.kind == "choice":
        return next(choice for choice in setting.choices if choice != setting.default)
    return setting.step * 16 if setting.kind == "whole" else 0.125


@pytest.mark.parametrize("method", list(recipes.METHODS))
def test_json_gives_every_setting_back(method: str) -> None:
    known = recipes.METHODS[method].settings
    for name, setting in known.items():
        wished = {name: example(setting)}
        if name == "use_codebook":
            wished["weights_dtype"] = "uint4"
        made = Recipe.make(
            method,
            wished,
            keep=("a.*", "!a.b"),
            overrides={"b.*": {"method": "int8", "granularity": "tensor"}, "c": wished},
            refine={name: example(s) for name, s in recipes.REFINEMENTS.items()},
        )
        text = made.to_text()
        back = Recipe.from_json(text)
        assert back == made and hash(back) == hash(made)
        assert Recipe.from_json(json.loads(text)) == made
        assert back[name] == example(setting)
        assert back != Recipe.make(method, wished)
        assert list(json.loads(text)["overrides"]) == ["b.*", "c"]
        assert name in made.describe()


def test_formats_are_kept_by_their_own_names() -> None:
    assert Recipe.make("sdnq", {"weights_dtype": "fp8"})["weights_dtype"] == "float8_e4m3fn"


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("{", "no JSON"),
        ([], "no recipe"),
        ({"method": "sdnq"}, "lowbit_recipe"),
        ({"lowbit_recipe": 2, "method": "sdnq"}, "another version"),
        ({"lowbit_recipe": 1}, "no such method"),
        ({"lowbit_recipe": 1, "method": "sdqn"}, "sdnq"),
        ({"lowbit_recipe": 1, "method": "sdnq", "setings": {}}, "settings"),
        ({"lowbit_recipe": 1, "method": "sdnq", "settings": {"weight_dtype": "int8"}}, "weights_d"),
        ({"lowbit_recipe": 1, "method": "sdnq", "settings": []}, "no table"),
        ({"lowbit_recipe": 1, "method": "sdnq", "keep": "a"}, "no list"),
        ({"lowbit_recipe": 1, "method": "sdnq", "keep": [""]}, "pattern"),
        ({"lowbit_recipe": 1, "method": "sdnq", "keep": ["!"]}, "pattern"),
        ({"lowbit_recipe": 1, "method": "sdnq", "overrides": {"a": 1}}, "no table"),
        ({"lowbit_recipe": 1, "method": "sdnq", "overrides": {"a": {"rank": 3}}}, "svd_rank"),
        ({"lowbit_recipe": 1, "method": "sdnq", "refine": {"scale_serch": 3}}, "scale_search"),
    ],
)
def test_what_is_no_recipe_is_refused_with_what_is_near(data, said: str) -> None:
    with pytest.raises(LowBitError) as caught:
        Recipe.from_json(data)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("method", "told", "said"),
    [
        ("sdnq", {"weights_dtype": "int88"}, "int8"),
        ("sdnq", {"weights_dtype": 8}, "weights_dtype"),
        ("sdnq", {"weights_dtype": "nf4_bnb"}, "cannot be quantized"),
        ("sdnq", {"weights_dtype": "float32"}, "cannot be quantized"),
        ("sdnq", {"group_size": -3}, "-1, or -2"),
        ("sdnq", {"group_size": 2.5}, "whole number"),
        ("sdnq", {"use_svd": 1}, "true or false"),
        ("sdnq", {"svd_rank": True}, "whole number"),
        ("sdnq", {"use_codebook": True}, "codebook"),
        ("sdnq", {"scale_dtype": "float32"}, "scale_dtype"),
        ("sdnq", {"scale_dtype": "int8", "use_codebook_scale": True}, "uint1"),
        ("sdnq", {"use_dynamic_quantization": True, "weights_dtype": "bfloat16"}, "begin"),
        ("sdnq", {"dynamic_loss_threshold": 2.0}, "from 0 to 1, or nothing"),
        ("svdquant", {"rank": 24}, "multiple of 16"),
        ("svdquant", {"precision": "nvfp"}, "Did you mean nvfp4?"),
        ("fp8", {"granularity": "rows"}, "Did you mean row?"),
        ("int4", {"group_size": 8}, "from 16"),
    ],
)
def test_values_that_are_none_are_refused(method: str, told: dict, said: str) -> None:
    for settings_, overrides in ((told, {}), ({}, {"*": told})):
        with pytest.raises(LowBitError) as caught:
            Recipe.make(method, settings_, overrides=overrides)
        assert said in str(caught.value)


# -------------------------------------------------------------------------------------- patterns


@pytest.mark.parametrize(
    ("name", "pattern", "fits"),
    [
        ("img_in", "img_in", True),
        ("time_in.in_layer", "time_in", True),
        ("time_in2.in_layer", "time_in", False),
        ("double_blocks.3.img_mod.lin", "double_blocks.*.img_mod", True),
        ("double_blocks.3.img_mod.lin", "*.lin", True),
        ("blocks.10.ffn", "blocks.1", False),
        ("a.final_layer", "final_layer", False),
        ("A.b", "a.b", False),
    ],
)
def test_patterns(name: str, pattern: str, fits: bool) -> None:
    assert recipes.matches(name, pattern) is fits


def test_the_last_pattern_counts_and_the_familys_come_first() -> None:
    facts = Facts(keep=(("*", ("img_in",)), ("int8", ("head",)), ("fp8", ("tail",))))

    def kept(name: str, *keep: str) -> str | None:
        return Recipe.make("int8", keep=keep).keeps(name, facts)

    assert "family" in kept("img_in.weight") and "family" in kept("head")
    assert kept("tail") is None and kept("body") is None
    assert kept("img_in", "!*") is None
    assert kept("head", "!img_in") is not None
    assert "recipe" in kept("body.0", "body", "!body.1")
    assert kept("body.1", "body", "!body.1") is None
    decided = Recipe.make("int8", keep=("!*",)).decide("img_in.weight", WIDE, facts=facts)
    assert decided.format == "int8"


def test_overrides_change_settings_and_methods_the_later_ones_counting() -> None:
    recipe = Recipe.make(
        "sdnq",
        {"weights_dtype": "uint4", "use_svd": True},
        overrides={
            "a": {"weights_dtype": "int8"},
            "a.deep": {"group_size": -1},
            "b": {"method": "fp8", "granularity": "row"},
            "b.0": {"method": "sdnq"},
        },
    )
    found = {name: recipe.settings_for(name) for name in ("a.x", "a.deep.x.weight", "b", "b.0")}
    assert found["a.x"][1]["weights_dtype"] == "int8" and found["a.x"][1]["use_svd"]
    assert found["a.deep.x.weight"][1]["group_size"] == -1
    assert found["a.deep.x.weight"][1]["weights_dtype"] == "int8"
    assert found["b"] == ("fp8", {**dict(Recipe.make("fp8").settings), "granularity": "row"})
    assert found["b.0"] == ("sdnq", dict(Recipe.make("sdnq").settings))
    assert recipe.decide("b", WIDE).method == "fp8"


def test_patterns_and_overrides_out_of_text() -> None:
    assert recipes.parse_patterns("a, b.*\n\n c # no\n#d") == ("a", "b.*", "c")
    text = "*.img_mod = int8\na.* = group_size=32, use_svd=true  # why\nb=svdquant\na.*=uint5"
    found = recipes.parse_overrides(text, "sdnq")
    assert found == {
        "*.img_mod": {"weights_dtype": "int8", "method": "sdnq"},
        "a.*": {
            "group_size": 32, "use_svd": True, "weights_dtype": "uint5", "method": "sdnq",
        },
        "b": {"method": "svdquant"},
    }  # fmt: skip
    Recipe.make("sdnq", overrides=found)
    other = recipes.parse_overrides("a = int8\nb = uint3\nc = activations=static", "fp8")
    assert other == {
        "a": {"method": "int8"},
        "b": {"weights_dtype": "uint3", "method": "sdnq"},
        "c": {"activations": "static"},
    }
    Recipe.make("fp8", overrides=other)
    for line in ("a", "= int8", "a =", "a = int99"):
        with pytest.raises(LowBitError):
            recipes.parse_overrides(line, "sdnq")


# -------------------------------------------------------------------------------------- deciding


def test_sdnq_tries_the_packages_formats_in_its_order() -> None:
    order = json.loads((oracle("sdnq_choices.py") / "order.json").read_text())
    for start in ("uint1", "uint4", "int8", "uint16"):
        found = decide("sdnq", weights_dtype=start, use_dynamic_quantization=True)
        assert [c.format for c in found.candidates] == order[order.index(start) :]
        assert found.threshold == pytest.approx(10 ** -(dtypes.get_format(start).bits / 2))
    learnt = decide(
        "sdnq", weights_dtype="uint3", use_dynamic_quantization=True, use_codebook=True,
        dynamic_loss_threshold=0.5,
    )  # fmt: skip
    assert [c.format for c in learnt.candidates] == [f"uint{bits}" for bits in range(3, 17)][:6]
    assert learnt.threshold == 0.5


@pytest.mark.parametrize(
    ("told", "kind", "shape", "said"),
    [
        ({}, "linear", (3072,), "1 dimensions"),
        ({}, "conv", (64, 64, 3, 3), "quant_conv"),
        ({}, "embedding", (640, 64), "quant_embedding"),
        ({}, "linear", (64, 64), "16384"),
        ({}, "linear", (16, 4096), "32 channels"),
        ({}, "linear", (4096, 16), "32 channels"),
    ],
)
def test_what_sdnq_leaves_alone(told: dict, kind: str, shape, said: str) -> None:
    found = decide("sdnq", shape, kind=kind, **told)
    assert isinstance(found, Kept) and said in found.reason


@pytest.mark.parametrize(
    ("method", "shape", "kind", "said"),
    [
        ("svdquant", (128, 96), "linear", "multiple of 64"),
        ("nvfp4", (128, 40), "linear", "multiple of 16"),
        ("mxfp8", (128, 48), "linear", "multiple of 32"),
        ("int4", (128, 96), "linear", "multiple of 128"),
        ("fp8", (128, 64, 3, 3), "conv", "convolution"),
        ("int8", (128, 64), "embedding", "embedding"),
    ],
)
def test_what_other_methods_leave_alone(method: str, shape, kind: str, said: str) -> None:
    found = decide(method, shape, kind=kind)
    assert isinstance(found, Kept) and said in found.reason


def test_a_quantized_matmul_decides_groups_as_the_package_does() -> None:
    assert decide("sdnq", weights_dtype="int8").groups == 3
    direct = decide("sdnq", weights_dtype="int8", use_quantized_matmul=True)
    assert (direct.groups, direct.matmul) == (1, "int8")
    assert decide("sdnq", weights_dtype="uint4", use_quantized_matmul=True).groups == 48
    assert decide("sdnq", weights_dtype="uint8", use_quantized_matmul=True).matmul == "uint8"
    fp8 = decide("sdnq", weights_dtype="fp8", use_quantized_matmul=True)
    assert (fp8.groups, fp8.matmul) == (1, "float8_e4m3fn")
    odd = decide("sdnq", (3070, 3072), weights_dtype="int8", use_quantized_matmul=True)
    assert (odd.groups, odd.matmul) == (3, "")
    conv = decide(
        "sdnq", (320, 320, 3, 3), kind="conv", weights_dtype="int8", quant_conv=True,
        use_quantized_matmul_conv=True,
    )  # fmt: skip
    assert conv.flat and conv.groups == 1


FLUX = Facts(
    modulation=(("*.mod.lin", 6),),
    behind_gelu=("*.mlp.2",),
    two_inputs=(("single.*.linear2", True), ("gated.*.linear2", False)),
    one_input=(("*.to_q", "*.to_k", "*.to_v"),),
)


def test_svdquant_knows_the_layers_that_its_engine_treats_apart() -> None:
    plain = decide("svdquant", name="x.mlp.0", facts=FLUX)
    assert plain.activation.format == "int4" and plain.groups == 48 and plain.rank == 32
    behind = decide("svdquant", name="x.mlp.2", facts=FLUX)
    assert behind.activation.format == "uint4" and behind.activation.shift == SHIFT
    assert decide("svdquant", name="x.mlp.2", facts=FLUX, unsigned="never") == plain
    four = decide("svdquant", name="x.mlp.2", facts=FLUX, precision="nvfp4")
    assert four.activation.shift == 0 and four.groups == 192
    modulation = decide("svdquant", name="x.mod.lin", facts=FLUX)
    assert (modulation.format, modulation.groups, modulation.rank) == ("uint4", 48, 0)
    assert isinstance(decide("svdquant", name="x.mod.lin", facts=FLUX, modulation="keep"), Kept)
    both = decide("svdquant", (3072, 15360), name="single.0.linear2", facts=FLUX)
    assert isinstance(both, Split)
    (first, middle, left), (start, last, right) = both.parts
    assert (first, middle, start, last) == (0, 3072, 3072, 15360)
    assert left.activation.shift == 0 and right.activation.shift == SHIFT
    assert (left.groups, right.groups) == (48, 192)
    gated = decide("svdquant", (3072, 12288), name="gated.0.linear2", facts=FLUX)
    assert all(part.activation.shift == 0 for *_, part in gated.parts)
    assert not isinstance(decide("int8", (3072, 15360), "single.0.linear2", facts=FLUX), Split)


def test_layers_of_one_input_are_told_by_what_stands_for_the_star() -> None:
    names = ["b.0.to_q", "b.0.to_k", "b.0.to_v", "b.1.to_q", "b.1.to_k", "c.to_out"]
    assert FLUX.together(names) == [("b.0.to_q", "b.0.to_k", "b.0.to_v")]


def test_refinements_reach_the_layer() -> None:
    found = decide(
        "svdquant", refinements=3,
        refine={"scale_search": 7, "svd_refits": 5, "activation_weighted": True,
                "error_feedback": True},
    )  # fmt: skip
    assert (found.scale_search, found.refits, found.weighted, found.feedback) == (7, 5, True, True)
    plain = decide("svdquant")
    assert (plain.scale_search, plain.refits, plain.weighted, plain.feedback) == (
        0,
        0,
        False,
        False,
    )
