"""comfy-kitchen's kernels where their maths is the same as ours. Imported only when asked for.

| tensor of an SVDQuant weight | kitchen's            | from ours                               |
|------------------------------|----------------------|-----------------------------------------|
| wgt                          | int8 [N, K/2]        | codes, two's complement: bytes xor 0x88 |
| wscales                      | half [K/64, N]       | scale transposed                        |
| smooth                       | half [K]             | smooth                                  |
| lora_down, lora_up           | half [K, R], [N, R]  | svd_down transposed, svd_up             |
| bias                         | half [N]             | bias - shift_bias                       |

x is shifted before it is handed over; the low-rank branch gets it as it came. A W4A16 weight is
(code - 8) * wscales + wzeros there, code * scale + zero_point here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from .reference import full_scale, linear_dequantize
from .spec import WeightSpec

if TYPE_CHECKING:
    from .registry import Call

__all__ = [
    "WEIGHT_ONLY_ROWS",
    "linear_faithful",
    "linear_int8",
    "linear_weight_only",
    "why_no_int8",
    "why_no_svdquant",
    "why_no_weight_only",
    "why_unavailable",
]

# With more rows a dequantized product is taken: kitchen's kernel is made for modulation layers.
WEIGHT_ONLY_ROWS = 64

_RANK_STEP = 16


def why_unavailable(
    device: str, operations: tuple[str, ...] = (), besides: tuple[str, ...] = ()
) -> str | None:
    """None where comfy-kitchen has an accelerated backend that the host has not switched off.

    Args:
        device: Device type.
        operations: What the backend must be able to do.
        besides: Backends that do not count.
    """
    try:
        import comfy_kitchen
    except ImportError as error:
        return f"comfy-kitchen cannot be imported ({error})"
    backends = comfy_kitchen.list_backends()
    reasons = []
    for name, state in backends.items():
        if name == "eager" or name in besides:
            continue
        if state.get("available") and not state.get("disabled"):
            lacking = [name for name in operations if name not in state.get("capabilities", ())]
            if not lacking:
                return None
            reasons.append(f"{name}: has no {' and no '.join(lacking)}")
            continue
        reason = "switched off by the host" if state.get("disabled") else ""
        reasons.append(f"{name}: {state.get('unavailable_reason') or reason or 'unavailable'}")
    return "comfy-kitchen has only its eager backend here (" + "; ".join(reasons) + ")"


def why_no_int8(call: Call) -> str | None:
    """None where comfy-kitchen has compiled int8 products; the pack's own Triton ones go before
    its.
    """
    return why_unavailable(call.device, ("int8_linear",), ("triton",))


def why_no_svdquant(call: Call) -> str | None:
    """None where comfy-kitchen accelerates both halves of an SVDQuant product."""
    return why_unavailable(call.device, ("quantize_svdquant_w4a4", "scaled_mm_svdquant_w4a4"))


def why_no_weight_only(call: Call) -> str | None:
    """None where comfy-kitchen accelerates W4A16 products."""
    return why_unavailable(call.device, ("gemv_awq_w4a16",))


def linear_int8(
    x: torch.Tensor, tensors: Mapping[str, torch.Tensor], spec: WeightSpec, bias
) -> torch.Tensor:
    """W8A8 linear with row-wise symmetric int8 weights and dynamic per-row activations.

    Args:
        x: ``[..., K]`` float.
        tensors: ``codes`` int8 ``[N, K]``, ``scale`` ``[N, 1]`` or one element.
        spec: Of the weight.
        bias: ``[N]`` or None.

    Returns:
        ``[..., N]`` of ``x``'s dtype.
    """
    import comfy_kitchen

    return comfy_kitchen.int8_linear(
        x,
        tensors["codes"].view(spec.shape),
        tensors["scale"].float().reshape(-1),
        bias,
        x.dtype,
    )


def linear_faithful(
    x: torch.Tensor, tensors: Mapping[str, torch.Tensor], spec: WeightSpec, bias
) -> torch.Tensor:
    """SVDQuant's W4A4 linear, signed or unsigned, in groups of 64.

    Args:
        x: ``[..., K]`` float16 or bfloat16.
        tensors: An "int4" weight with ``scale`` ``[N, K / 64, 1]``.
        spec: Of the weight; its ``activation`` is "int4" or "uint4".
        bias: ``[N]`` of the float layer, or None.

    Returns:
        ``[..., N]`` of ``x``'s dtype.
    """
    import comfy_kitchen

    half, (outputs, inputs) = x.dtype, spec.shape
    rows = x.reshape(-1, inputs).contiguous()
    if rows.shape[0] == 0:
        return x.new_zeros((*x.shape[:-1], outputs))
    activation = spec.activation
    shifted = rows
    if activation.shift:
        shifted = rows + activation.shift
        bias = -tensors["shift_bias"] if bias is None else bias - tensors["shift_bias"]
    if spec.smoothing:
        smooth = tensors["smooth"].to(half).contiguous()
    else:
        smooth = torch.ones(inputs, dtype=half, device=x.device)
    if spec.rank:
        padding = (0, -spec.rank % _RANK_STEP)
        down = functional.pad(tensors["svd_down"].to(half).t(), padding).contiguous()
        up = functional.pad(tensors["svd_up"].to(half), padding).contiguous()
    else:
        down = torch.zeros((inputs, _RANK_STEP), dtype=half, device=x.device)
        up = torch.zeros((outputs, _RANK_STEP), dtype=half, device=x.device)
    scale = full_scale(tensors, spec).expand(*spec.code_shape[:2], 1).squeeze(2)
    unsigned = activation.format == "uint4"
    codes, scales, inner = comfy_kitchen.quantize_svdquant_w4a4(
        shifted, smooth, down, act_unsigned=unsigned, lora_x=rows
    )
    y = comfy_kitchen.scaled_mm_svdquant_w4a4(
        codes,
        (tensors["codes"].reshape(outputs, -1) ^ 0x88).view(torch.int8),
        scales,
        scale.t().to(half).contiguous(),
        inner,
        up,
        None if bias is None else bias.to(half),
        act_unsigned=unsigned,
    )
    return y[: rows.shape[0]].reshape(*x.shape[:-1], outputs)


def linear_weight_only(
    x: torch.Tensor, tensors: Mapping[str, torch.Tensor], spec: WeightSpec, bias
) -> torch.Tensor:
    """W4A16 linear; scales and offsets are rounded to the dtype of ``x``.

    Args:
        x: ``[..., K]`` float16 or bfloat16.
        tensors: A "uint4" weight with ``scale`` and ``zero_point`` ``[N, G, 1]``.
        spec: Of the weight.
        bias: ``[N]`` or None.

    Returns:
        ``[..., N]`` of ``x``'s dtype.
    """
    outputs, inputs = spec.shape
    rows = x.numel() // inputs
    if not 0 < rows <= WEIGHT_ONLY_ROWS:
        return linear_dequantize(x, tensors, spec, bias)
    import comfy_kitchen

    shape = (*spec.code_shape[:2], 1)
    scale = tensors["scale"].float().expand(shape).squeeze(2)
    zeros = torch.add(tensors["zero_point"].float().expand(shape).squeeze(2), scale, alpha=8)
    return comfy_kitchen.gemv_awq_w4a16(
        x.contiguous(),
        tensors["codes"].reshape(outputs, inputs // 2).view(torch.int8),
        scale.t().to(x.dtype).contiguous(),
        zeros.t().to(x.dtype).contiguous(),
        None if bias is None else bias.to(x.dtype),
        spec.code_shape[2],
    )
