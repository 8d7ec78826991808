"""Semi-private names of the host that this pack leans on, in one place, checked at import."""

from __future__ import annotations

import json

import comfy.ops
import torch
from comfy import quant_ops
from comfy.quant_ops import QuantizedTensor

from ...quant.errors import LowBitError
from ..layouts.composite import part_tensors, side_of

__all__ = ["check", "int8_tensorwise"]

MINIMUM_HOST = "0.27.0"
NEEDED = {
    comfy.ops: ("mixed_precision_ops", "cast_bias_weight", "uncast_bias_weight", "run_every_op",
                "_quantized_apply"),
    quant_ops: ("QUANT_ALGOS", "QuantizedTensor", "get_layout_class"),
    QuantizedTensor: ("requantize_from_float", "dequantize", "state_dict"),
}  # fmt: skip


def check() -> None:
    """Raise where the host lacks something, naming the version that has it."""
    absent = [
        f"{owner.__name__}.{name}"
        for owner, names in NEEDED.items()
        for name in names
        if not hasattr(owner, name)
    ]
    if absent:
        raise LowBitError(
            "This ComfyUI lacks what LowBit is built on.",
            found="no " + ", ".join(absent),
            expected=f"ComfyUI {MINIMUM_HOST} or newer",
            remedy="Update ComfyUI.",
        )


def int8_tensorwise(layer: str, weight: QuantizedTensor) -> dict[str, torch.Tensor]:
    """A single-part row-wise int8 composite as the host's on-disk tensors and marker.

    Args:
        layer: Native module name.
        weight: Composite of one part, format int8, scale ``[N, 1]`` or one element.

    Returns:
        ``{key: tensor}`` for the host's own loader.
    """
    part = weight._params.spec.parts[0]
    tensors = part_tensors(weight._qdata, part, side_of(weight._params))
    scale = tensors["scale"].float()
    text = json.dumps({"format": "int8_tensorwise"}).encode()
    return {
        f"{layer}.weight": tensors["codes"].view(part.weight.shape),
        f"{layer}.weight_scale": scale.reshape(()) if scale.numel() == 1 else scale,
        f"{layer}.comfy_quant": torch.frombuffer(bytearray(text), dtype=torch.uint8),
    }
