"""From a composite weight to kernels: what runs on a device, and the product itself."""

from __future__ import annotations

from functools import lru_cache

import torch

from ...kernels.registry import MATMUL_OPERATIONS, Call, Choice, NoImplementationError, registry
from ...kernels.spec import WeightSpec
from .composite import CompositeSpec, Held, part_tensors

__all__ = ["MATMUL_MODES", "Decision", "call_of", "capability_of", "decide", "kernels_of", "linear"]

MATMUL_MODES = ("auto", "dequantize", "int8", "uint8", "fp8", "fp16", "faithful", "expand")
"""Values of the loader's ``matmul`` input.

``auto`` does what the file asks for where this device has a kernel for it, and dequantizes
elsewhere; ``faithful`` rounds activations as the format does, or does what the file asks for,
wherever it can be computed at all; ``expand`` rounds every layer to dense int8 at load and
multiplies in int8.
"""


@lru_cache(maxsize=16)
def capability_of(device: torch.device) -> tuple[int, int] | None:
    """CUDA compute capability; None on what is not CUDA."""
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    return torch.cuda.get_device_capability(device)


def call_of(weight: WeightSpec, device: torch.device, dtype: torch.dtype) -> Call:
    """What a weight asks of the kernel registry on a device."""
    grouped = len(weight.code_shape) > len(weight.shape)
    return Call(
        device=device.type,
        capability=capability_of(device),
        dtype=dtype,
        shape=weight.shape,
        format=weight.format.name,
        bits=weight.format.bits,
        rowwise=not grouped,
        symmetric=weight.format.signed and not weight.codebook,
        plain=not (weight.rank or weight.hadamard),
        group=weight.code_shape[2] if grouped else weight.columns,
        rank=weight.rank,
        rotated=bool(weight.hadamard),
        smoothing=weight.smoothing,
        two_level=weight.two_level,
        activation=weight.activation,
    )


class Decision(tuple):
    """``(mode, choice, reason)``: the resolved matmul mode, the kernel, and why not the wished.

    The mode "weight-only" is "dequantize" by a kernel that never writes the float weight.
    """

    __slots__ = ()

    @property
    def mode(self) -> str:
        return self[0]

    @property
    def choice(self) -> Choice:
        return self[1]

    @property
    def reason(self) -> str | None:
        return self[2]


def decide(
    weight: WeightSpec,
    wish: str | None,
    matmul: str,
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    scaled: bool = True,
) -> Decision:
    """The matmul mode and kernel of one part.

    Args:
        weight: Its spec.
        wish: The matmul that the file asks for.
        matmul: The loader's input, see ``MATMUL_MODES``.
        backend: The loader's input.
        device: Where it will run.
        dtype: Compute dtype.
        scaled: False for an unquantized part of a fused layer, which is always multiplied as it is.
    """
    call = call_of(weight, device, dtype)
    own = "faithful" if weight.activation else wish
    mode = {"auto": wish, "faithful": own, "expand": "int8"}.get(matmul, matmul) or "dequantize"
    reason = None
    if mode != "dequantize" and not scaled:
        mode, reason = "dequantize", "this part of the layer is not quantized"
    if mode != "dequantize":
        try:
            choice = registry.choose(MATMUL_OPERATIONS[mode], call, backend)
            if matmul != "auto" or choice.implementation.backend != "reference":
                return Decision((mode, choice, None))
            arithmetic = "arithmetic" if mode == "faithful" else mode
            reason = f"the {arithmetic} that the file asks for would be slower here: " + "; ".join(
                f"{name} {why}" for name, why in choice.refused
            )
        except NoImplementationError as error:
            reason = str(error)
    if scaled:
        choice = registry.choose("linear_weight_only", call, backend)
        if choice.implementation.backend != "reference":
            return Decision(("weight-only", choice, reason))
    return Decision(("dequantize", registry.choose("dequantize", call, backend), reason))


@lru_cache(maxsize=8192)
def kernels_of(
    spec: CompositeSpec, matmul: str, backend: str, device: torch.device, dtype: torch.dtype
) -> tuple[tuple[bool, object], ...]:
    """``(whether it dequantizes, function)`` of every part."""
    decisions = (
        decide(part.weight, part.wish, matmul, backend, device, dtype, part.scaled)
        for part in spec.parts
    )
    return tuple(
        (decision.mode == "dequantize", decision.choice.implementation.function())
        for decision in decisions
    )


def linear(
    x: torch.Tensor,
    held: Held,
    spec: CompositeSpec,
    bias: torch.Tensor | None,
    kernels: tuple[tuple[bool, object], ...],
) -> torch.Tensor:
    """``x`` times a composite weight.

    Args:
        x: ``[..., K]``.
        held: The weight's memory, on ``x``'s device.
        spec: What it holds; logical shape ``[N, K]``.
        bias: ``[N]`` or None.
        kernels: Of :func:`kernels_of`.

    Returns:
        ``[..., N]`` of ``x``'s dtype.
    """
    parts = [
        (part.weight, part_tensors(held, spec, number), dense, function)
        for number, (part, (dense, function)) in enumerate(zip(spec.parts, kernels, strict=True))
    ]
    if all(dense for dense, _ in kernels):
        weights = [function(tensors, weight, x.dtype) for weight, tensors, _, function in parts]
        weight = weights[0] if len(weights) == 1 else torch.cat(weights, dim=spec.axis)
        return torch.nn.functional.linear(x, weight, bias)
    sizes = [part.weight.shape[spec.axis] for part in spec.parts]
    rows = spec.axis == 0
    inputs = [x] * len(sizes) if rows else x.split(sizes, dim=-1)
    biases = bias.split(sizes) if rows and bias is not None else [None] * len(sizes)
    outputs = []
    for (weight, tensors, dense, function), piece, piece_bias in zip(
        parts, inputs, biases, strict=True
    ):
        if dense:
            dense_weight = function(tensors, weight, x.dtype)
            outputs.append(torch.nn.functional.linear(piece, dense_weight, piece_bias))
        else:
            outputs.append(function(piece, tensors, weight, piece_bias))
    if rows:
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
    total = torch.stack([y.float() for y in outputs]).sum(0)
    return (total if bias is None else total + bias.float()).to(x.dtype)
