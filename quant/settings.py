"""The settings of every method of quantization: names, defaults, what they may be and are for.

Nodes and the command line are made from these tables, so that each setting is told in one place.
Those of SDNQ have the names of its own configuration.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from .dtypes import get_format
from .errors import LowBitError

__all__ = ["REFINEMENTS", "SETTINGS", "Setting", "did_you_mean"]


@dataclass(frozen=True)
class Setting:
    """One setting: its default, what it may be, and what it is for (in words for people).

    Attributes:
        kind: "choice", "switch", "whole", "number" or "format" (a name of `quant.dtypes`).
        choices: Of a choice.
        low, high: Of numbers.
        step: What a whole number must be a multiple of.
        special: Values outside of low and high that mean something of their own.
        optional: None is a value as well: it leaves the decision to the method.
    """

    name: str
    default: Any
    help: str
    kind: str
    choices: tuple[Any, ...] = ()
    low: float = 0
    high: float = math.inf
    step: int = 1
    special: tuple[Any, ...] = ()
    optional: bool = False

    def check(self, value: Any) -> Any:
        """The value as it is kept; LowBitError where it is none."""
        if (value is None and self.optional) or (value in self.special and value is not False):
            return value
        if self.kind == "format" and isinstance(value, str):
            return get_format(value).name
        if self.kind == "choice" and value in self.choices:
            return value
        if self.kind == "switch" and isinstance(value, bool):
            return value
        if self.kind in ("whole", "number") and not isinstance(value, bool):
            whole = self.kind == "whole"
            fits = isinstance(value, int) if whole else isinstance(value, int | float)
            if fits and self.low <= value <= self.high and (not whole or value % self.step == 0):
                return value if whole else float(value)
        raise LowBitError(
            f"The setting {self.name} cannot be that.",
            found=repr(value),
            expected=self.expected(),
            remedy=did_you_mean(value, self.choices),
        )

    def expected(self) -> str:
        """What it may be, in words."""
        if self.kind == "choice":
            said = "one of " + ", ".join(map(str, self.choices))
        elif self.kind == "switch":
            said = "true or false"
        elif self.kind == "format":
            said = "a number format, such as int8, uint4 or float8_e4m3fn"
        else:
            said = "a whole number" if self.kind == "whole" else "a number"
            if self.step > 1:
                said += f" that is a multiple of {self.step}"
            upper = "" if math.isinf(self.high) else f" to {self.high}"
            said += f" from {self.low}{upper}" if upper else f" of at least {self.low}"
        said += "".join(f", or {value}" for value in self.special)
        return said + (", or nothing" if self.optional else "")


def did_you_mean(value: object, known: Iterable[object]) -> str | None:
    """A remedy that names what is spelt alike; None where nothing is."""
    names = [str(name) for name in known]
    near = difflib.get_close_matches(str(value), names, n=3, cutoff=0.5)
    return f"Did you mean {', '.join(near)}?" if near else None


def _switch(name: str, default: bool, text: str) -> Setting:
    return Setting(name, default, text, "switch")


def _whole(name: str, default: int, text: str, low: int, high: float, **more: Any) -> Setting:
    return Setting(name, default, text, "whole", low=low, high=high, **more)


def _choice(name: str, default: str, text: str, *choices: str) -> Setting:
    return Setting(name, default, text, "choice", choices=choices)


_DTYPES = ("int8", "uint8", "float8_e4m3fn", "float16")
_ROUNDED = "How activations are rounded before the product: "

_SDNQ = (
    Setting("weights_dtype", "int8", "Number format of the weights.", "format"),
    _whole(
        "group_size", 0, "Inputs that share a scale: 0 chooses by the format's width, -1 is one "
        "scale a row, -2 one scale a layer.", 1, 1 << 20, special=(0, -1, -2),
    ),
    _switch("use_svd", False, "Keep the largest singular directions in 16 bits beside the codes."),
    _whole("svd_rank", 32, "Singular directions that are kept.", 1, 4096),
    _whole("svd_steps", 8, "Power iterations that find them.", 0, 100),
    _switch("use_hadamard", False, "Rotate the inputs, which spreads outliers."),
    _whole("hadamard_group_size", 256, "Inputs that are rotated together.", 4, 1 << 16),
    _switch("use_codebook", False, "Learn the levels of each group; unsigned integers only."),
    _whole("codebook_steps", 24, "Iterations that place the levels.", 0, 1000),
    _switch(
        "use_dynamic_quantization", False,
        "Give each layer the narrowest format, from weights_dtype on, whose loss is small enough.",
    ),
    Setting(
        "dynamic_loss_threshold", None, "Largest loss (mean squared error over the variance) of a "
        "layer; nothing: 10 to the power of minus half the bits.", "number", high=1, optional=True,
    ),
    _switch("dequantize_fp32", True, "Keep scales in float32, not in the model's dtype."),
    Setting(
        "scale_dtype", None, "Format that the scales themselves are rounded to.", "format",
        optional=True,
    ),
    Setting(
        "zero_point_dtype", None, "Format that zero points are rounded to; nothing: scale_dtype.",
        "format", optional=True,
    ),
    _switch("use_codebook_scale", False, "Learn the levels of rounded scales."),
    _switch("use_quantized_matmul", False, "Prepare for products with rounded activations."),
    _switch("use_quantized_matmul_conv", False, "The same for convolutions."),
    Setting(
        "quantized_matmul_dtype", None, "Format of rounded activations; nothing: by the weights'.",
        "choice", choices=_DTYPES, optional=True,
    ),
    _switch("quant_conv", False, "Quantize convolutions, too."),
    _switch("quant_embedding", False, "Quantize embedding tables, too."),
    _switch("use_stochastic_rounding", False, "Round up or down at random, unbiased."),
    _whole("minimum_allowed_numel", 16384, "Smaller layers are kept.", 0, 1 << 40),
    _whole("minimum_allowed_channel_size", 32, "Narrower layers are kept.", 0, 1 << 20),
)  # fmt: skip

_SVDQUANT = (
    _choice("precision", "int4", "Number format of weights and activations.", "int4", "nvfp4"),
    _whole("rank", 32, "Rank of the branch that stays in 16 bits.", 0, 1024, step=16),
    _whole("svd_steps", 8, "Power iterations that find the branch.", 0, 100),
    _choice("smoothing", "weights", "How columns are evened out.", "weights", "none"),
    Setting(
        "smoothing_strength", None, "Exponent of the column's largest weight; nothing: 0.5, and "
        "0.25 from rank 128 on.", "number", high=1, optional=True,
    ),
    _whole("refinements", 0, "Times that branch and codes are fitted to each other.", 0, 100),
    _choice("modulation", "awq", "Layers of adaptive norms: in 4 bits, or kept.", "awq", "keep"),
    _choice(
        "unsigned", "auto", "Round activations behind a GELU to 0..15, shifted, as Nunchaku's "
        "int4 engine does.", "auto", "never",
    ),
)  # fmt: skip

_FP8 = (
    _choice("dtype", "float8_e4m3fn", "Number format.", "float8_e4m3fn", "float8_e5m2"),
    _choice("granularity", "tensor", "What shares a scale.", "tensor", "row", "block"),
    _choice(
        "activations", "weight_only", _ROUNDED + "not at all, by their own largest value, or by "
        "one that was measured.", "weight_only", "dynamic", "static",
    ),
)  # fmt: skip

_AWQ = (
    _switch("awq", False, "Even out the columns by the exponent with the least error (AWQ)."),
    _whole("awq_steps", 8, "Exponents between 0 and 1 that are tried.", 1, 100),
)

_NVFP4 = (
    _choice(
        "activations", "weight_only", _ROUNDED + "not at all, to nvfp4 by their own largest "
        "values, to nvfp4 or to fp8 by a measured one.",
        "weight_only", "dynamic", "static", "fp8",
    ),
    *_AWQ,
    _whole("rank", 0, "Rank of a branch that stays in 16 bits.", 0, 1024),
    _whole("svd_steps", 8, "Power iterations that find the branch.", 0, 100),
)  # fmt: skip

_MXFP8 = (
    _choice(
        "activations", "weight_only", _ROUNDED + "not at all, or in groups of 32.",
        "weight_only", "dynamic",
    ),
)  # fmt: skip

_INT8 = (
    _choice("granularity", "row", "What shares a scale.", "row", "tensor"),
    _choice(
        "activations", "dynamic", _ROUNDED + "by the largest value of each row, by one that was "
        "measured, or not at all.", "dynamic", "static", "weight_only",
    ),
)  # fmt: skip

_INT4 = (
    _whole("group_size", 128, "Inputs that share a scale.", 16, 1 << 16, step=16),
    _switch("symmetric", True, "Signed codes (ModelOpt); otherwise codes with a zero point (AWQ)."),
    _choice("scale_dtype", "float32", "Dtype of scales.", "float32", "float16", "bfloat16"),
    _choice(
        "activations", "weight_only", _ROUNDED + "not at all, or to fp8 by their own largest value "
        "or by a measured one.", "weight_only", "dynamic", "static",
    ),
    *_AWQ,
)  # fmt: skip

REFINEMENTS: dict[str, Setting] = {
    setting.name: setting
    for setting in (
        _whole("scale_search", 0, "Smaller scales that are tried for each group.", 0, 200),
        _switch(
            "nearest_floats", False,
            "Round SDNQ's own floats to the nearest value; sdnq itself rounds some of them down.",
        ),
        _whole("svd_refits", 0, "Times that branch and codes are fitted to each other.", 0, 100),
        _switch(
            "activation_weighted", False,
            "Weigh errors by the activations that were measured for a layer.",
        ),
        _switch(
            "error_feedback", False,
            "Correct later columns for the rounding of earlier ones (GPTQ); needs the products of "
            "measured activations.",
        ),
    )
}  # fmt: skip
"""What is better than rounding to the nearest; it costs time alone."""

SETTINGS: dict[str, dict[str, Setting]] = {
    method: {setting.name: setting for setting in settings}
    for method, settings in (
        ("sdnq", _SDNQ),
        ("svdquant", _SVDQUANT),
        ("fp8", _FP8),
        ("nvfp4", _NVFP4),
        ("mxfp8", _MXFP8),
        ("int8", _INT8),
        ("int4", _INT4),
    )
}
"""Settings by name, of each method."""
