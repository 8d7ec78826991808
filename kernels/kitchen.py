"""comfy-kitchen's kernels where their maths is the same as ours. Imported only when asked for."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from .spec import WeightSpec

__all__ = ["linear_int8", "why_unavailable"]


def why_unavailable(device: str) -> str | None:
    """None where comfy-kitchen has an accelerated backend that the host has not switched off."""
    try:
        import comfy_kitchen
    except ImportError as error:
        return f"comfy-kitchen cannot be imported ({error})"
    backends = comfy_kitchen.list_backends()
    reasons = []
    for name, state in backends.items():
        if name == "eager":
            continue
        if state.get("available") and not state.get("disabled"):
            return None
        reason = "switched off by the host" if state.get("disabled") else ""
        reasons.append(f"{name}: {state.get('unavailable_reason') or reason or 'unavailable'}")
    return "comfy-kitchen has only its eager backend here (" + "; ".join(reasons) + ")"


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
