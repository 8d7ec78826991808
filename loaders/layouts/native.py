"""Which weights ComfyUI's own quantized formats can hold exactly, and multiply faster.

The host's FP8 and NVFP4 layers round activations as ModelOpt's static arithmetic does, with the
same codes and scales: handed over, such a layer computes what ``faithful`` means, on tensor cores.
"""

from __future__ import annotations

from collections.abc import Sequence

from ...kernels.spec import ActivationSpec, WeightSpec

__all__ = ["native_format"]

# format of the host -> (code format, elements of a group, rounding of activations, least CUDA
# compute capability that multiplies it without dequantizing)
_NATIVE = {
    "float8_e4m3fn": (
        "float8_e4m3fn",
        0,
        ActivationSpec("float8_e4m3fn", -1, "float32", static=True),
        (8, 9),
    ),
    "nvfp4": (
        "float4_e2m1fn",
        16,
        ActivationSpec("float4_e2m1fn", 16, "float8_e4m3fn", static=True),
        (10, 0),
    ),
}


def native_format(
    parts: Sequence[tuple[WeightSpec, str | None]],
    matmul: str,
    backend: str,
    capability: tuple[int, int] | None,
) -> str | None:
    """The host's format for a Linear of these parts, where it is faster there; None elsewhere.

    Args:
        parts: ``(spec, wish)`` of each part, below each other.
        matmul, backend: The loader's inputs.
        capability: CUDA compute capability of the device, None on others.

    Whether scales are one for all parts, their tensors must tell.
    """
    if matmul not in ("auto", "faithful") or backend not in ("auto", "comfy_kitchen"):
        return None
    for name, (codes, group, rounding, least) in _NATIVE.items():
        if capability is None or capability < least:
            continue
        if all(
            wish == "faithful"
            and spec.format.name == codes
            and spec.activation == rounding
            and len(spec.shape) == 2
            and not (spec.rank or spec.hadamard)
            and (not spec.smoothing or (name == "nvfp4" and spec.smoothing == "multiply"))
            and spec.code_shape[2:] == ((group,) if group else ())
            for spec, wish in parts
        ):
            return name
    return None
