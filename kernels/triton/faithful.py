"""Products as `kernels.faithful` defines them: activations rounded as the format says.

| way    | activations                     | weight                          | product          |
|--------|---------------------------------|---------------------------------|------------------|
| rows   | int8, int4, one scale a row or  | integers of at most 8 bits, one | int8, exact      |
|        | in all; static, with an offset  | scale a row                     |                  |
| rows   | float8_e4m3fn, the same         | float8_e4m3fn, one scale a row  | fp8              |
| groups | int8, int4, uint4 in groups     | integers in the same groups, or | int8 in a group, |
|        |                                 | with one scale a row            | float32 beyond   |
| groups | float8_e4m3fn in groups         | float8_e4m3fn likewise          | fp8, the same    |
| folded | float4_e2m1fn or float8_e4m3fn  | float4_e2m1fn or float8_e4m3fn, | operands that    |
|        | in groups, scales of one byte   | scales of one byte              | bfloat16 holds   |

A 4-bit float times an 8-bit scale has six significant bits, and an 8-bit float times a power of two
four: bfloat16 holds both, so that no native 4-bit instruction is needed for the same numbers.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..reference import full_scale
from ..spec import ActivationSpec, WeightSpec
from . import gemm, unpack, workspace
from .flat import activation_of, activation_text, named, packed, spec_of, text_of
from .fp8 import is_stored_fp8, stored_fp8
from .fp8 import product as fp8_product
from .int8 import Prepared, branch_of, stored_codes
from .library import operation
from .rows import Rows, quantize_rows

if TYPE_CHECKING:
    from ..registry import Call

__all__ = ["linear_faithful", "linear_faithful_prepared", "prepare", "way_of", "why_not"]

_CODES = {
    "int8": "int8",
    "int4": "int4",
    "uint4": "uint4",
    "float8_e4m3fn": "fp8",
    "float4_e2m1fn": "e2m1",
}
_INTEGERS = tuple(f"int{bits}" for bits in range(2, 9))
_SMALL_FLOATS = ("float4_e2m1fn", "float8_e4m3fn")
_BYTE_SCALES = {
    "float4_e2m1fn": ("float8_e4m3fn", "float8_e8m0fnu", "ocp_e8m0"),
    "float8_e4m3fn": ("float8_e8m0fnu", "ocp_e8m0"),
}
_LEAST_GROUP = 32  # what one int8 or fp8 instruction multiplies


def way_of(
    format: str, group: int, rowwise: bool, symmetric: bool, activation: ActivationSpec | None
) -> str:
    """How a product is done: "rows", "groups", "folded", or "" where none of them is right.

    Args:
        format: of the weight's codes.
        group: of the weight.
        rowwise: whether a row of the weight has one scale.
        symmetric: whether the weight has neither a zero point nor a codebook.
        activation: as in the spec.
    """
    if activation is None or not symmetric or activation.format not in _CODES:
        return ""
    integers = activation.format in ("int8", "int4", "uint4") and format in _INTEGERS
    eights = activation.format == format == "float8_e4m3fn"
    if activation.group <= 0:
        return "rows" if rowwise and (integers or eights) else ""
    size = activation.group
    if size & (size - 1):
        return ""
    if activation.scale in _BYTE_SCALES.get(activation.format, ()):
        return "folded" if format in _SMALL_FLOATS else ""
    same = rowwise or group == size
    plain = not activation.static and activation.scale in ("", "float32")
    return "groups" if same and plain and size >= _LEAST_GROUP and (integers or eights) else ""


def why_not(call: Call) -> str | None:
    """None where `linear_faithful` computes what is asked for."""
    if call.activation is None:
        return "needs a format that says how activations are rounded"
    activation = call.activation
    way = way_of(call.format, call.group, call.rowwise, call.symmetric, activation)
    if not way:
        return (
            f"has no product of {activation.format} activations in groups of "
            f"{activation.group} with {call.format} codes in groups of {call.group}"
        )
    if way == "folded" or activation.format != "float8_e4m3fn":
        return None
    if call.capability is None or call.capability < (8, 9):
        return "multiplies float8 only from compute capability 8.9 on"
    return None


def _way(spec: WeightSpec) -> str:
    rowwise = len(spec.code_shape) == len(spec.shape)
    group = spec.columns if rowwise else spec.code_shape[2]
    symmetric = spec.format.signed and not spec.codebook
    way = way_of(spec.format.name, group, rowwise, symmetric, spec.activation)
    if not way:
        raise ValueError(f"no faithful product of {spec.format.name} as {spec.activation}")
    return way


# --------------------------------------------------------------------------------- activations


def _rounded(
    x: Tensor,
    spec: WeightSpec,
    smooth: Tensor | None,
    input_scale: Tensor | None,
    input_offset: Tensor | None,
) -> Rows:
    activation = spec.activation
    by_group = activation.group > 0
    scaling = activation.scale
    given = None
    if activation.static:
        scaling = "static groups" if by_group else "static"
        given = input_scale.to(torch.float32)
    options = {
        "format": _CODES[activation.format],
        "precise": False,
        "smooth": smooth,
        "smoothing": spec.smoothing,
        "hadamard": spec.hadamard,
        "basis": spec.hadamard_basis,
        "shift": activation.shift,
    }
    if activation.group < 0 and given is None:
        # The largest scale of a row is that of all rows together.
        given = quantize_rows(x, scaling=scaling, **options).scale.amax().view(1)
        scaling = "static"
    return quantize_rows(
        x,
        scaling=scaling,
        group=activation.group if by_group else 0,
        folded=_way(spec) == "folded",
        given=given,
        given_offset=input_offset.to(torch.float32) if activation.offset else None,
        **options,
    )


def prepare(x: Tensor, spec: WeightSpec) -> Prepared:
    """The half of `linear_faithful` that depends on x alone: no smoothing, no static scales."""
    if x.numel() == 0:
        return Prepared(x, None)
    return Prepared(x, _rounded(x, spec, None, None, None))


# ------------------------------------------------------------------------------------ products


_ones: dict[torch.device, Tensor] = {}


def _one(device: torch.device) -> Tensor:
    found = _ones.get(device)
    if found is None:
        with torch.inference_mode(False):
            found = _ones[device] = torch.ones(1).to(device)  # waits: any stream may read it
    return found


def _scales(tensors: dict[str, Tensor], spec: WeightSpec) -> Tensor:
    """[N or 1, G or 1]."""
    scale = full_scale(tensors, spec)
    return scale.squeeze(2) if scale.dim() == 3 else scale


def _folded_weight(tensors: dict[str, Tensor], spec: WeightSpec) -> Tensor:
    """Codes times scales of the first level, bfloat16 [N, K]."""
    plain = replace(spec, rank=0, hadamard=0, smoothing="", two_level=False)
    tensors = {"codes": tensors["codes"], "scale": tensors["scale"]}
    buffer = workspace.get(tensors["codes"].device, 2 * spec.numel, torch.bfloat16)
    weight = buffer.view(spec.rows, spec.columns)
    unpack.dequantize_into(tensors, plain, weight)
    return weight


def _fake(
    x, q, q_scale, q_zero, codes, scale, scale_2, zero_point, levels, smooth, svd_up, svd_down,
    input_scale, shift_bias, bias, spec, activation,
):  # fmt: skip
    return x.new_empty((x.shape[0], spec_of(spec).rows))


@operation("linear_faithful", fake=_fake)
def _finish(
    x: Tensor,
    q: Tensor,
    q_scale: Tensor,
    q_zero: Tensor | None,
    codes: Tensor,
    scale: Tensor | None,
    scale_2: Tensor | None,
    zero_point: Tensor | None,
    levels: Tensor | None,
    smooth: Tensor | None,
    svd_up: Tensor | None,
    svd_down: Tensor | None,
    input_scale: Tensor | None,
    shift_bias: Tensor | None,
    bias: Tensor | None,
    spec: str,
    activation: str,
) -> Tensor:
    """x [M, K] and its codes times a weight, [M, N]."""
    weight_spec = replace(spec_of(spec), activation=activation_of(activation))
    tensors = named(codes, scale, scale_2, zero_point, levels, smooth, svd_up, svd_down)
    branch = branch_of(x, tensors, weight_spec)
    fused = branch if x.dtype != torch.float32 else None
    way = _way(weight_spec)
    if way == "rows" and is_stored_fp8(weight_spec):
        fused = None
        values, b_scale = stored_fp8(tensors, weight_spec)
        bias = _without(bias, shift_bias)
        y = fp8_product(q, values, q_scale, b_scale, x.dtype, bias)
    elif way == "rows":
        weight = stored_codes(tensors, weight_spec)
        column = None
        if q_zero is not None:
            column = gemm.column_sums(weight.values).to(torch.float32) * weight.scale
        y = gemm.scaled_product(
            q, weight.values, q_scale, weight.scale, x.dtype, _without(bias, shift_bias), q_zero,
            column, None, None, *(fused or (None, None)), True,
        )  # fmt: skip
    elif way == "groups":
        if q.dtype == torch.float8_e4m3fn:
            values = tensors["codes"].view(weight_spec.rows, weight_spec.columns)
        else:
            values = unpack.to_codes(tensors, weight_spec)
        y = gemm.grouped_product(
            q, values, q_scale, _scales(tensors, weight_spec), x.dtype,
            weight_spec.activation.group, bias, shift_bias, *(fused or (None, None)),
        )  # fmt: skip
    else:
        one = _one(x.device)
        y = gemm.scaled_product(
            q,
            _folded_weight(tensors, weight_spec),
            one if input_scale is None else input_scale.to(torch.float32),
            scale_2.to(torch.float32).reshape(-1) if weight_spec.two_level else one,
            x.dtype,
            _without(bias, shift_bias),
            None, None, None, None, *(fused or (None, None)), True,
        )  # fmt: skip
    return branch.add_to(y) if branch is not None and fused is None else y


def _without(bias: Tensor | None, shift_bias: Tensor | None) -> Tensor | None:
    if shift_bias is None:
        return bias
    return -shift_bias if bias is None else bias - shift_bias


def linear_faithful_prepared(
    prepared: Prepared, tensors: dict[str, Tensor], spec: WeightSpec, bias: Tensor | None = None
) -> Tensor:
    """`linear_faithful` of what `prepare` gave."""
    x, rows = prepared
    if rows is None:
        return x.new_zeros((*x.shape[:-1], spec.rows))
    activation = spec.activation
    y = _finish(
        x.reshape(-1, x.shape[-1]),
        rows.codes,
        rows.scale,
        rows.zero,
        *packed(tensors),
        tensors["input_scale"] if activation.static else None,
        tensors["shift_bias"] if activation.shift else None,
        bias,
        text_of(spec),
        activation_text(activation),
    )
    return y.view(*x.shape[:-1], spec.rows)


def linear_faithful(
    x: Tensor, tensors: dict[str, Tensor], spec: WeightSpec, bias: Tensor | None = None
) -> Tensor:
    """x [..., K] @ W.T + bias as `spec.activation` says, for any number of rows; dtype of x.

    Args:
        x: float16, bfloat16 or float32.
        tensors, spec: a weight that `why_not` has nothing against.
        bias: [N] of the float layer, or None.
    """
    if x.numel() == 0:
        return x.new_zeros((*x.shape[:-1], spec.rows))
    rows = _rounded(
        x, spec, tensors.get("smooth"), tensors.get("input_scale"), tensors.get("input_offset")
    )
    return linear_faithful_prepared(Prepared(x, rows), tensors, spec, bias)
