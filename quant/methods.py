"""How each method of quantization decides on a layer: its settings dissolved into plain numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from ..kernels.spec import ActivationSpec, CodeFormat
from . import affine, rotation
from .decisions import Decision, Facts, Kept, LayerRecipe, Split, fitting, matches
from .dtypes import all_formats, get_format
from .errors import LowBitError
from .settings import SETTINGS, Setting
from .svdq import SHIFT

__all__ = ["METHODS", "Layer", "Method", "check_settings"]


@dataclass(frozen=True)
class Layer:
    """What a method is told of a layer."""

    name: str
    shape: tuple[int, ...]
    kind: str
    facts: Facts
    refine: Mapping[str, Any]

    @property
    def rows(self) -> int:
        return self.shape[0]

    @property
    def columns(self) -> int:
        return math.prod(self.shape[1:])

    @property
    def refined(self) -> dict[str, Any]:
        """Fields of a LayerRecipe."""
        return {
            "scale_search": self.refine["scale_search"],
            "nearest": self.refine["nearest_floats"],
            "weighted": self.refine["activation_weighted"],
            "feedback": self.refine["error_feedback"],
        }


Decide = Callable[[Mapping[str, Any], Layer], Decision]


def _only_linear(layer: Layer, group: int = 1) -> Kept | None:
    """Why a method for linear layers of whole groups keeps a layer."""
    if layer.kind != "linear" or len(layer.shape) != 2:
        return Kept(f"{_KINDS[layer.kind]}: this method quantizes linear layers")
    if layer.columns % group:
        return Kept(f"{layer.columns} inputs are no multiple of {group}")
    return None


def _matmul_dtype(fmt: CodeFormat, wanted: str | None) -> str:
    """The product's format that SDNQ chooses for a weight's."""
    if wanted:
        return wanted
    if fmt.is_integer:
        return "uint8" if fmt.name == "uint8" else "int8"
    return "float8_e4m3fn" if fmt.bits < 16 else "float16"


def _rounds_anew(fmt: CodeFormat, mm: CodeFormat, told: Mapping[str, Any]) -> bool:
    """Whether SDNQ rounds a weight once more for a product in `mm`, apart from groups."""
    return bool(
        told["use_codebook"]
        or told["scale_dtype"]
        or told["zero_point_dtype"]
        or fmt.bits > mm.bits
        or fmt.is_integer != mm.is_integer
        or (not fmt.signed and not mm.is_integer)
        or (
            fmt.packed
            and not fmt.is_integer
            and not mm.is_integer
            and (fmt.bits >= mm.bits or fmt.largest > mm.largest)
        )
    )


def _sdnq_layer(told: Mapping[str, Any], layer: Layer, dtype: str) -> LayerRecipe:
    """The layer in one format."""
    fmt = get_format(dtype)
    conv, linear = layer.kind == "conv", layer.kind == "linear"
    channels = layer.shape[1]
    wished = told["use_quantized_matmul_conv"] if conv else told["use_quantized_matmul"]
    mm = get_format(_matmul_dtype(fmt, told["quantized_matmul_dtype"]))
    product = (
        wished
        and layer.kind != "embedding"
        and min(layer.rows, channels) >= 32
        and layer.rows % 16 == channels % 16 == 0
    )
    direct = product and not _rounds_anew(fmt, mm, told)
    flat = conv and direct and not fmt.packed
    rank = min(told["svd_rank"], layer.rows, layer.columns) if told["use_svd"] else 0
    wanted = told["group_size"]
    if wanted == 0 and direct and fmt.bits >= 6:
        wanted = -1
    if wanted == 0:
        wanted = affine.auto_group_size(
            fmt, linear=linear, svd=rank > 0, codebook=told["use_codebook"]
        )
    zero_dtype = told["zero_point_dtype"] or told["scale_dtype"] or ""
    coded = (told["scale_dtype"] or "", "" if fmt.signed or told["use_codebook"] else zero_dtype)
    in_model = not told["dequantize_fp32"] and coded == ("", "") and fmt.largest <= 16384
    if product and not mm.is_integer and mm.bits == 16:
        in_model = False
    groups = 1 if flat else affine.group_count(channels, wanted)
    return LayerRecipe(
        method="sdnq",
        format=fmt.name,
        kind=layer.kind,
        groups=groups,
        span=0 if wanted == -2 else 1,
        flat=flat,
        scale="model" if in_model else "float32",
        offset="" if fmt.signed else "float",
        coded=coded,
        coded_levels=told["codebook_steps"] if told["use_codebook_scale"] else -1,
        codebook=told["codebook_steps"] if told["use_codebook"] else -1,
        hadamard=rotation.block_size(channels, told["hadamard_group_size"])
        if told["use_hadamard"]
        else 0,
        rank=rank,
        svd_steps=told["svd_steps"],
        refits=layer.refine["svd_refits"] if rank else 0,
        matmul=mm.name if product else "",
        direct=bool(direct) and groups == 1 and not fmt.packed,
        stochastic=told["use_stochastic_rounding"],
        **layer.refined,
    )


def _sdnq(told: Mapping[str, Any], layer: Layer) -> Decision:
    if layer.kind == "conv" and not told["quant_conv"]:
        return Kept("a convolution, and quant_conv is off")
    if layer.kind == "embedding" and not told["quant_embedding"]:
        return Kept("an embedding, and quant_embedding is off")
    if math.prod(layer.shape) < told["minimum_allowed_numel"]:
        return Kept(f"fewer than {told['minimum_allowed_numel']} elements")
    if min(layer.shape[:2]) < told["minimum_allowed_channel_size"]:
        return Kept(f"a side of fewer than {told['minimum_allowed_channel_size']} channels")
    found = _sdnq_layer(told, layer, told["weights_dtype"])
    if not told["use_dynamic_quantization"]:
        return found
    threshold = told["dynamic_loss_threshold"]
    if threshold is None:
        threshold = 10 ** -(get_format(told["weights_dtype"]).bits / 2)
    tried = [
        _sdnq_layer(told, layer, name)
        for name in _from(told["weights_dtype"])
        if not told["use_codebook"] or _can_learn(get_format(name))
    ]
    return replace(found, candidates=tuple(tried), threshold=threshold)


def _can_learn(fmt: CodeFormat) -> bool:
    """Whether a format can have a codebook."""
    return fmt.kind == "uint" and fmt.bits <= 8


@lru_cache
def _in_order() -> tuple[str, ...]:
    """The formats that dynamic quantization tries: by bits, integers before floats."""

    def order(fmt: CodeFormat) -> tuple:
        own = fmt.kind not in ("int", "uint", "native")
        return fmt.bits, not fmt.signed, not fmt.is_integer, own, fmt.exponent

    fits = [f for f in all_formats() if f.bits <= 16 and f.name not in _NEVER_TRIED]
    return tuple(fmt.name for fmt in sorted(fits, key=order))


_NEVER_TRIED = frozenset(("float8_e8m0fnu", "float8_e4m3fnuz", "float8_e5m2fnuz", "bfloat16"))


def _from(dtype: str) -> tuple[str, ...]:
    names = _in_order()
    if dtype not in names:
        raise LowBitError(
            "Dynamic quantization cannot begin with this format.",
            found=dtype,
            expected="a format of at most 16 bits, such as uint4",
        )
    return names[names.index(dtype) :]


def _svdquant(told: Mapping[str, Any], layer: Layer) -> Decision:
    chunks = fitting(layer.name, layer.facts.modulation, 0)
    group = 16 if told["precision"] == "nvfp4" else 64
    why = _only_linear(layer, 64)
    if why is not None:
        return why
    if chunks:
        if told["modulation"] == "keep":
            return Kept("modulation")
        return LayerRecipe(
            method="svdquant",
            format="uint4",
            groups=layer.columns // 64,
            scale="model",
            offset="float",
            narrow=True,
            **layer.refined,
        )
    rank = min(told["rank"], *layer.shape) // 16 * 16
    strength = told["smoothing_strength"]
    if strength is None:
        strength = 0.25 if rank >= 128 else 0.5
    base = LayerRecipe(
        method="svdquant",
        format="float4_e2m1fn" if group == 16 else "int4",
        groups=layer.columns // group,
        scale="float8_e4m3fn" if group == 16 else "model",
        rank=rank,
        svd_steps=told["svd_steps"],
        refits=max(told["refinements"], layer.refine["svd_refits"]) if rank else 0,
        narrow=True,
        smoothing="divide",
        strength=strength if told["smoothing"] == "weights" else 0.0,
        activation=ActivationSpec("float4_e2m1fn", 16, "float8_e4m3fn")
        if group == 16
        else ActivationSpec("int4", 64),
        matmul="faithful",
        **layer.refined,
    )
    shifted = base
    if group == 64 and told["unsigned"] == "auto":
        shifted = replace(base, activation=ActivationSpec("uint4", 64, shift=SHIFT))
    gelu = fitting(layer.name, layer.facts.two_inputs, None)
    if gelu is not None and layer.columns > layer.rows and layer.rows % 64 == 0:
        second = shifted if gelu else base
        cut = layer.rows
        return Split(
            tuple(
                (first, last, replace(part, groups=(last - first) // group))
                for first, last, part in ((0, cut, base), (cut, layer.columns, second))
            )
        )
    behind = any(matches(layer.name, pattern) for pattern in layer.facts.behind_gelu)
    return shifted if behind else base


def _rounded(told: Mapping[str, Any], **forms: ActivationSpec) -> dict[str, Any]:
    """Fields of a LayerRecipe for the activations that the settings ask for."""
    activation = forms.get(told["activations"])
    return {"activation": activation, "matmul": "faithful" if activation else ""}


def _fp8(told: Mapping[str, Any], layer: Layer) -> Decision:
    why = _only_linear(layer)
    if why is not None:
        return why
    groups, span = 1, {"tensor": 0, "row": 1, "block": 128}[told["granularity"]]
    group = 0 if told["granularity"] == "row" else -1
    if span == 128:
        # Every group lies in one block, whatever the width is.
        groups = layer.columns // math.gcd(layer.columns, 128)
        group = 128 if layer.columns % 128 == 0 else -1
    return LayerRecipe(
        method="fp8",
        format=told["dtype"],
        groups=groups,
        span=span,
        **_rounded(
            told,
            dynamic=ActivationSpec("float8_e4m3fn", group, "float32"),
            static=ActivationSpec("float8_e4m3fn", -1, "float32", static=True),
        ),
        **layer.refined,
    )


def _awq(told: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a LayerRecipe for a smoothing that is searched."""
    if not told["awq"]:
        return {}
    return {"smoothing": "multiply", "search": told["awq_steps"], "narrow": True}


def _nvfp4(told: Mapping[str, Any], layer: Layer) -> Decision:
    group = 32 if told["activations"] == "fp8" else 16
    why = _only_linear(layer, group)
    if why is not None:
        return why
    rank = min(told["rank"], *layer.shape)
    return LayerRecipe(
        method="nvfp4",
        format="float4_e2m1fn",
        groups=layer.columns // group,
        scale="float8_e4m3fn",
        rank=rank,
        svd_steps=told["svd_steps"],
        refits=layer.refine["svd_refits"] if rank else 0,
        **_awq(told),
        **_rounded(
            told,
            dynamic=ActivationSpec("float4_e2m1fn", 16, "float8_e4m3fn"),
            static=ActivationSpec("float4_e2m1fn", 16, "float8_e4m3fn", static=True),
            fp8=ActivationSpec("float8_e4m3fn", -1, "float32", static=True),
        ),
        **layer.refined,
    )


def _mxfp8(told: Mapping[str, Any], layer: Layer) -> Decision:
    why = _only_linear(layer, 32)
    if why is not None:
        return why
    return LayerRecipe(
        method="mxfp8",
        format="float8_e4m3fn",
        groups=layer.columns // 32,
        scale="float8_e8m0fnu",
        **_rounded(told, dynamic=ActivationSpec("float8_e4m3fn", 32, "float8_e8m0fnu")),
        **layer.refined,
    )


def _int8(told: Mapping[str, Any], layer: Layer) -> Decision:
    why = _only_linear(layer)
    if why is not None:
        return why
    # Products of int8 take one scale for each row of activations.
    matmul = {"weight_only": {}, "dynamic": {"matmul": "int8"}}
    static = ActivationSpec("int8", -1, "float32", static=True)
    return LayerRecipe(
        method="int8",
        format="int8",
        span=1 if told["granularity"] == "row" else 0,
        **matmul.get(told["activations"], {"activation": static, "matmul": "int8"}),
        **layer.refined,
    )


def _int4(told: Mapping[str, Any], layer: Layer) -> Decision:
    why = _only_linear(layer, told["group_size"])
    if why is not None:
        return why
    return LayerRecipe(
        method="int4",
        format="int4" if told["symmetric"] else "uint4",
        groups=layer.columns // told["group_size"],
        scale=told["scale_dtype"],
        offset="" if told["symmetric"] else "integer",
        **_awq(told),
        **_rounded(
            told,
            dynamic=ActivationSpec("float8_e4m3fn", -1, "float32"),
            static=ActivationSpec("float8_e4m3fn", -1, "float32", static=True),
        ),
        **layer.refined,
    )


@dataclass(frozen=True)
class Method:
    """A method: its name for people, its settings, and how it decides on a layer."""

    display: str
    settings: Mapping[str, Setting]
    decide: Decide = field(repr=False)


METHODS: dict[str, Method] = {
    name: Method(display, SETTINGS[name], decide)
    for name, display, decide in (
        ("sdnq", "SDNQ", _sdnq),
        ("svdquant", "SVDQuant", _svdquant),
        ("fp8", "FP8", _fp8),
        ("nvfp4", "NVFP4", _nvfp4),
        ("mxfp8", "MXFP8", _mxfp8),
        ("int8", "INT8", _int8),
        ("int4", "INT4", _int4),
    )
}

_KINDS = {"linear": "a linear layer", "conv": "a convolution", "embedding": "an embedding"}


def check_settings(method: str, told: Mapping[str, Any]) -> None:
    """Raise LowBitError for settings that contradict each other."""
    if method != "sdnq":
        return
    fmt = get_format(told["weights_dtype"])
    if fmt.kind == "table" or fmt.name in ("float8_e8m0fnu", "float32"):
        raise LowBitError(
            "Weights cannot be quantized to this format.",
            found=fmt.name,
            expected="integers or floats of at most 16 bits that have a scale",
        )
    if told["use_codebook"] and not _can_learn(fmt):
        raise LowBitError(
            "This format cannot have a codebook.",
            found=fmt.name,
            expected="one of uint1 … uint8",
            remedy="Choose an unsigned integer format, or switch the codebook off.",
        )
    for name in ("scale_dtype", "zero_point_dtype"):
        coded = get_format(told[name]) if told[name] else None
        if coded is None:
            continue
        learnt = told["use_codebook_scale"] and not _can_learn(coded)
        if coded.kind == "table" or coded.name in ("float8_e8m0fnu", "float32") or learnt:
            raise LowBitError(
                f"The {name} cannot be that.",
                found=coded.name,
                expected="one of uint1 … uint8" if learnt else "an integer or a float with a sign",
            )
    if told["use_dynamic_quantization"]:
        _from(fmt.name)
