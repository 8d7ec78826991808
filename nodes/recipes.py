"""Quantization recipes: one node for each kind, made from the tables of settings."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from ..quant.dtypes import all_formats
from ..quant.recipe import METHODS, REFINEMENTS, Recipe, Setting, parse_overrides, parse_patterns

__all__ = [
    "RECIPES",
    "LowBitRecipeFP8",
    "LowBitRecipeFromText",
    "LowBitRecipeINT8",
    "LowBitRecipeNVFP4",
    "LowBitRecipeSDNQ",
    "LowBitRecipeSVDQuant",
    "RecipeType",
]

RecipeType = io.Custom("LOWBIT_RECIPE")

NOTHING = "auto"
"""What a list shows for a setting that leaves the decision to the method."""
UNSET = -1.0
"""The same for a number."""
LARGEST = 2**31 - 1
DIGITS = 1e-6
FORMATS = tuple(
    f.name
    for f in all_formats()
    if f.kind != "table" and f.bits <= 16 and f.name not in ("float8_e8m0fnu", "bfloat16")
)


class _RecipeNode(io.ComfyNode):
    """A node whose inputs are the settings of some methods.

    Attributes:
        methods: The first is the default; where there are several, an input chooses.
        shown: Settings that are not advanced.
    """

    methods: tuple[str, ...] = ()
    shown: tuple[str, ...] = ()

    @classmethod
    def widgets(cls) -> list[io.Input]:
        """The inputs, those for everyone before the advanced ones."""
        return [
            *cls._choice(),
            *cls._settings(advanced=False),
            *_patterns(),
            *cls._settings(advanced=True),
            *_refinements(),
        ]

    @classmethod
    def _choice(cls) -> list[io.Input]:
        if len(cls.methods) == 1:
            return []
        return [
            io.Combo.Input(
                "method",
                options=list(cls.methods),
                default=cls.methods[0],
                tooltip="Which of these formats; some settings below are of one of them alone.",
            )
        ]

    @classmethod
    def _settings(cls, *, advanced: bool) -> list[io.Input]:
        made = []
        for name, (setting, methods) in _merged(cls.methods).items():
            if advanced == (name in cls.shown):
                continue
            only = "" if len(methods) == len(cls.methods) else f"{' and '.join(methods)} only. "
            made.append(_input(setting, only, advanced=advanced))
        return made

    @classmethod
    def execute(cls, **given: Any) -> io.NodeOutput:
        """Make the recipe."""
        method = given.get("method", cls.methods[0])
        table = METHODS[method].settings
        recipe = Recipe.make(
            method,
            {name: _value(s, given[name]) for name, s in table.items() if name in given},
            keep=parse_patterns(given.get("keep", "")),
            overrides=parse_overrides(given.get("overrides", ""), method),
            refine={name: given[name] for name in REFINEMENTS if name in given},
        )
        return _told(recipe)


def _told(recipe: Recipe) -> io.NodeOutput:
    text = recipe.to_text()
    return io.NodeOutput(recipe, text, ui=ui.PreviewText(recipe.describe()))


def _outputs() -> list[io.Output]:
    return [
        RecipeType.Output(display_name="recipe", tooltip="For the nodes that quantize."),
        io.String.Output(
            display_name="json",
            tooltip="The same as text: to share, or to give to Quantization Recipe (from Text).",
        ),
    ]


def _merged(methods: tuple[str, ...]) -> dict[str, tuple[Setting, tuple[str, ...]]]:
    """Settings of several methods by name, with the methods that have them.

    One that differs between them is shown as the first has it, with the choices of all.
    """
    found: dict[str, tuple[Setting, tuple[str, ...]]] = {}
    for method in methods:
        for name, setting in METHODS[method].settings.items():
            known, having = found.get(name, (setting, ()))
            if set(setting.choices) <= set(known.choices):
                setting = known
            found[name] = (setting, (*having, method))
    return found


def _input(setting: Setting, only: str, *, advanced: bool) -> io.Input:
    """The widget of a setting."""
    told = {"tooltip": only + setting.help, "advanced": advanced, "optional": advanced}
    if setting.kind == "switch":
        return io.Boolean.Input(setting.name, default=setting.default, **told)
    if setting.kind in ("choice", "format"):
        options = list(FORMATS if setting.kind == "format" else setting.choices)
        if setting.optional:
            options.insert(0, NOTHING)
        default = NOTHING if setting.default is None else setting.default
        return io.Combo.Input(setting.name, options=options, default=default, **told)
    high = min(setting.high, LARGEST)
    if setting.kind == "whole":
        low = min(setting.low, *setting.special) if setting.special else setting.low
        # The page rounds to whole steps: those that special values are no multiple of are 1.
        step = 1 if setting.special else setting.step
        return io.Int.Input(
            setting.name, default=setting.default, min=int(low), max=int(high), step=step, **told
        )
    low = UNSET if setting.optional else setting.low
    if setting.optional:
        told["tooltip"] = f"{told['tooltip'].replace('nothing:', '-1:')}"
    default = UNSET if setting.default is None else setting.default
    return io.Float.Input(
        setting.name, default=default, min=low, max=high, step=0.01, round=DIGITS, **told
    )


def _value(setting: Setting, shown: Any) -> Any:
    """What a widget's value stands for."""
    if setting.optional and shown in (NOTHING, UNSET):
        return None
    return shown


def _patterns() -> list[io.Input]:
    return [
        io.String.Input(
            "keep",
            default="",
            multiline=True,
            optional=True,
            tooltip=(
                "Layers that stay as they are, one pattern a line: * stands for anything, and a "
                "pattern means everything below it, too. What the model's family keeps by itself "
                "comes on top; !pattern quantizes it after all, and !* empties that list. Names "
                "are ComfyUI's, as reports list them."
            ),
        ),
        io.String.Input(
            "overrides",
            default="",
            multiline=True,
            optional=True,
            tooltip=(
                "Layers that differ, one a line: pattern = what is different there, such as "
                '"*.img_mod = int8", "single_blocks.0.* = group_size=32, use_svd=true" or '
                '"*.mlp.* = fp8". Later lines win.'
            ),
        ),
    ]


def _refinements() -> list[io.Input]:
    """What costs time alone."""
    return [_input(setting, "", advanced=True) for setting in REFINEMENTS.values()]


class LowBitRecipeSDNQ(_RecipeNode):
    """SDNQ's settings."""

    methods = ("sdnq",)
    shown = (
        "weights_dtype",
        "group_size",
        "use_svd",
        "svd_rank",
        "use_hadamard",
        "use_codebook",
        "use_dynamic_quantization",
        "use_quantized_matmul",
    )

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LowBitRecipeSDNQ",
            display_name="Quantization Recipe (SDNQ)",
            category="LowBit/quantize",
            description=(
                "Integers and floats from 1 to 16 bits with scales by group, optionally with a "
                "low-rank branch, a rotation, learnt levels, or a format for each layer by its "
                "loss. Files open in the sdnq package."
            ),
            search_aliases=[
                "sdnq",
                "uint4",
                "int8",
                "codebook",
                "hadamard",
                "svd",
                "quantize settings",
            ],
            inputs=cls.widgets(),
            outputs=_outputs(),
        )


class LowBitRecipeSVDQuant(_RecipeNode):
    """SVDQuant's settings."""

    methods = ("svdquant",)
    shown = ("precision", "rank", "refinements")

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LowBitRecipeSVDQuant",
            display_name="Quantization Recipe (SVDQuant)",
            category="LowBit/quantize",
            description=(
                "4-bit weights and activations with a low-rank branch in 16 bits that takes the "
                "outliers. Files open in Nunchaku."
            ),
            search_aliases=["svdquant", "nunchaku", "int4", "nvfp4", "low rank"],
            inputs=cls.widgets(),
            outputs=_outputs(),
        )


class LowBitRecipeFP8(_RecipeNode):
    """FP8 and MXFP8."""

    methods = ("fp8", "mxfp8")
    shown = ("dtype", "granularity", "activations")

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LowBitRecipeFP8",
            display_name="Quantization Recipe (FP8)",
            category="LowBit/quantize",
            description=(
                "8-bit floats with one scale for a layer, a row or a block, or MXFP8 with "
                "powers of two for 32 values. With one scale for a layer, and as MXFP8, files "
                "open in ComfyUI without this pack."
            ),
            search_aliases=["fp8", "mxfp8", "float8", "e4m3", "scaled fp8"],
            inputs=cls.widgets(),
            outputs=_outputs(),
        )


class LowBitRecipeNVFP4(_RecipeNode):
    """NVFP4."""

    methods = ("nvfp4",)
    shown = ("activations", "awq", "rank")

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LowBitRecipeNVFP4",
            display_name="Quantization Recipe (NVFP4)",
            category="LowBit/quantize",
            description=(
                "4-bit floats with a scale for 16 values and one for the layer, optionally "
                "evened out (AWQ) or with a low-rank branch. Without a branch, files open in "
                "ComfyUI without this pack; with all of it in readers of ModelOpt's files."
            ),
            search_aliases=["nvfp4", "fp4", "modelopt", "blackwell", "awq"],
            inputs=cls.widgets(),
            outputs=_outputs(),
        )


class LowBitRecipeINT8(_RecipeNode):
    """INT8 and INT4."""

    methods = ("int8", "int4")
    shown = ("granularity", "activations", "group_size", "symmetric", "awq")

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LowBitRecipeINT8",
            display_name="Quantization Recipe (INT8)",
            category="LowBit/quantize",
            description=(
                "8-bit integers with one scale for a row or a layer, or 4-bit ones in groups, "
                "optionally evened out (AWQ). INT8 with dynamic activations opens in ComfyUI "
                "without this pack."
            ),
            search_aliases=["int8", "w8a8", "int4", "awq", "w4a16"],
            inputs=cls.widgets(),
            outputs=_outputs(),
        )


class LowBitRecipeFromText(io.ComfyNode):
    """A recipe that somebody shared."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LowBitRecipeFromText",
            display_name="Quantization Recipe (from Text)",
            category="LowBit/quantize",
            description=(
                "A recipe of its JSON text: as another recipe node gives it, as the terminal "
                "prints it, or as a quantized file tells it."
            ),
            search_aliases=["recipe json", "share recipe", "load recipe"],
            inputs=[
                io.String.Input(
                    "json",
                    default="",
                    multiline=True,
                    tooltip="The JSON text of a recipe; settings that it leaves out have their "
                    "defaults.",
                ),
            ],
            outputs=_outputs(),
        )

    @classmethod
    def execute(cls, json: str) -> io.NodeOutput:
        """Read it."""
        return _told(Recipe.from_json(json))


RECIPES = (
    LowBitRecipeSDNQ,
    LowBitRecipeSVDQuant,
    LowBitRecipeFP8,
    LowBitRecipeNVFP4,
    LowBitRecipeINT8,
    LowBitRecipeFromText,
)
