"""From a composite weight to kernels: what runs on a device, and the product itself."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from ...kernels.reference import MATMUL_ROWS
from ...kernels.registry import (
    FOUR_BITS,
    MATMUL_OPERATIONS,
    Call,
    Choice,
    NoImplementationError,
    Running,
    registry,
)
from ...kernels.spec import WeightSpec
from ...kernels.trial import Trial
from .composite import CompositeSpec, Held, PartSpec, part_tensors

__all__ = [
    "MATMUL_MODES",
    "Decision",
    "Step",
    "architecture_of",
    "call_of",
    "capability_of",
    "decide",
    "device_table",
    "kernels_of",
    "linear",
    "steps_of",
]

MATMUL_MODES = ("auto", "dequantize", "int8", "uint8", "fp8", "fp16", "faithful", "expand")
"""Values of the loader's ``matmul`` input.

``auto`` does what the file asks for where this device has a kernel for it, and dequantizes
elsewhere; ``faithful`` rounds activations as the format does, or does what the file asks for,
wherever it can be computed at all; ``expand`` rounds every layer to dense int8 at load and
multiplies in int8.
"""

# What "auto" may do instead of products of 4-bit activations: on GPUs that have no instruction for
# them, weights and activations are rounded to 8 bits on the way, which is faster and loses less.
_EIGHT_BITS = {"sm_103": "fp8"}  # has no int8 instructions to speak of
_EIGHT_BITS_ELSEWHERE = "int8"

# Products that round activations only where there are rows enough to gain from it.
_FOR_MANY_ROWS = ("int8", "uint8", "fp8", "fp16")


@lru_cache(maxsize=16)
def capability_of(device: torch.device) -> tuple[int, int] | None:
    """CUDA compute capability; None on what is not CUDA."""
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    return torch.cuda.get_device_capability(device)


@lru_cache(maxsize=16)
def architecture_of(device: torch.device) -> str:
    """ "sm_90", "gfx1100" or "xpu"; empty on others."""
    if device.type == "xpu":
        return "xpu"
    if device.type != "cuda":
        return ""
    capability = capability_of(device)
    if capability is None:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    return "sm_{}{}".format(*capability)


def call_of(
    weight: WeightSpec, device: torch.device, dtype: torch.dtype, rows: int | None = None
) -> Call:
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
        architecture=architecture_of(device),
        rows=rows,
    )


def device_table(
    device: torch.device, dtype: torch.dtype
) -> dict[str, tuple[tuple[str, str | None], ...]]:
    """``{operation: ((backend, None or why not), ...)}`` on a device, best first."""
    call = Call(
        device=device.type,
        capability=capability_of(device),
        dtype=dtype,
        shape=(),
        format="",
        bits=0,
        rowwise=True,
        symmetric=True,
        plain=True,
        architecture=architecture_of(device),
    )
    return registry.on_device(call)


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
    rows: int | None = None,
    trial: Trial | None = None,
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
        rows: Of the activations; None for as many as images have.
        trial: Try kernels that nobody has tried yet; without one nothing is compiled.
    """
    call = call_of(weight, device, dtype, rows)
    modes = _modes(weight, wish, matmul, call.architecture)
    reason = None
    if modes and not scaled:
        modes, reason = (), "this part of the layer is not quantized"
    weight_only = None
    if scaled:
        choice = registry.choose("linear_weight_only", call, backend, trial)
        if choice.implementation.backend != "reference":
            weight_only = choice
    found, reasons = [], []
    for mode in modes:
        if mode in _FOR_MANY_ROWS and rows is not None and rows < MATMUL_ROWS and weight_only:
            continue
        try:
            choice = registry.choose(MATMUL_OPERATIONS[mode], call, backend, trial)
        except NoImplementationError as error:
            reasons.append(str(error))
            continue
        if matmul == "auto" and choice.implementation.backend == "reference":
            arithmetic = "arithmetic" if mode == "faithful" else mode
            reasons.append(
                f"the {arithmetic} that the file asks for would be slower here: "
                + "; ".join(f"{name} {why}" for name, why in choice.refused)
            )
            continue
        found.append(Decision((mode, choice, None)))
    if matmul == "auto" and weight_only:  # which is faster than a second choice
        found = [one for one in found if not one.choice.implementation.second_choice]
    if found:
        return found[0]
    if reasons:
        reason = reasons[0]
    if weight_only:
        return Decision(("weight-only", weight_only, reason))
    return Decision(("dequantize", registry.choose("dequantize", call, backend, trial), reason))


def _modes(weight: WeightSpec, wish: str | None, matmul: str, architecture: str) -> tuple[str, ...]:
    """Modes to look for a kernel of, best first; none to dequantize."""
    if matmul == "expand":
        wanted = "int8"
    elif matmul == "faithful":
        wanted = "faithful" if weight.activation else wish
    else:
        wanted = wish if matmul == "auto" else matmul
    if wanted in (None, "dequantize"):
        return ()
    activation = weight.activation
    own = matmul == "auto" and wanted == "faithful" and activation is not None
    if own and architecture and activation.format in FOUR_BITS:
        return wanted, _EIGHT_BITS.get(architecture, _EIGHT_BITS_ELSEWHERE)
    return (wanted,)


def steps_of(
    part: PartSpec,
    matmul: str,
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    *,
    tried: bool = False,
) -> tuple[tuple[int | None, Decision], ...]:
    """``(rows up to which it holds, decision)`` of one part, ascending; the last holds for all.

    Args:
        part: Of a composite.
        matmul, backend, device, dtype: As for :func:`decide`.
        tried: Try kernels that nobody has tried yet.
    """
    weight = part.weight
    layout = tuple((slot.name, slot.dtype, slot.shape) for slot in part.slots)
    trial = Trial(weight, layout, device, dtype) if tried else None
    operations = {"linear_weight_only", "dequantize"}
    operations |= {
        MATMUL_OPERATIONS[mode]
        for mode in _modes(weight, part.wish, matmul, architecture_of(device))
    }
    limits = sorted({MATMUL_ROWS - 1, *registry.row_limits(tuple(operations))})
    steps: list[tuple[int | None, Decision]] = []
    for limit in (*limits, None):
        decision = decide(
            *(weight, part.wish, matmul, backend, device, dtype, part.scaled), limit, trial
        )
        if steps and _alike(steps[-1][1], decision):
            steps.pop()
        steps.append((limit, decision))
    return tuple(steps)


def _alike(one: Decision, other: Decision) -> bool:
    return one.mode == other.mode and one.choice.implementation == other.choice.implementation


@dataclass(frozen=True)
class Part:
    """How one part is multiplied: mode, kernel, and which rounded activations it shares if any."""

    mode: str
    run: Running
    slot: str | None = None

    @property
    def dense(self) -> bool:
        """Whether it gives a float weight instead of a product."""
        return self.mode == "dequantize"


@dataclass(frozen=True)
class Step:
    """How all parts are multiplied with up to ``rows`` rows of activations; None for any number."""

    rows: int | None
    parts: tuple[Part, ...]


@lru_cache(maxsize=8192)
def kernels_of(
    spec: CompositeSpec, matmul: str, backend: str, device: torch.device, dtype: torch.dtype
) -> tuple[Step, ...]:
    """What to run for how many rows, ascending; kernels that nobody has tried yet are tried."""
    each = [steps_of(part, matmul, backend, device, dtype, tried=True) for part in spec.parts]
    limits = {limit for steps in each for limit, _ in steps if limit is not None}
    if len(each) > 1 and any(d.choice.implementation.prepare for steps in each for _, d in steps):
        limits.add(MATMUL_ROWS - 1)
    found = []
    for limit in (*sorted(limits), None):
        chosen = [
            next(d for end, d in steps if end is None or (limit is not None and limit <= end))
            for steps in each
        ]
        keys = [
            _shared_key(part.weight, decision, limit) if spec.axis == 0 else None
            for part, decision in zip(spec.parts, chosen, strict=True)
        ]
        slots = [key for key in dict.fromkeys(keys) if key is not None and keys.count(key) > 1]
        parts = []
        for part, decision, key in zip(spec.parts, chosen, keys, strict=True):
            call = call_of(part.weight, device, dtype, limit)
            # A text, because torch.compile may make symbols of numbers.
            slot = str(slots.index(key)) if key in slots else None
            run = Running(decision.choice, call, backend, registry, slot is not None)
            parts.append(Part(decision.mode, run, slot))
        found.append(Step(limit, tuple(parts)))
    return tuple(found)


def _shared_key(weight: WeightSpec, decision: Decision, rows: int | None) -> tuple | None:
    """Parts of the same key round the same activations to the same codes; None where each its own.

    Smoothing and static scales are tensors of a part, which nobody compares; few rows may not be
    rounded at all.
    """
    row = decision.choice.implementation
    if decision.mode in _FOR_MANY_ROWS and rows is not None and rows < MATMUL_ROWS:
        return None
    activation = weight.activation if decision.mode == "faithful" else None
    if not row.prepare or weight.smoothing or (activation and activation.static):
        return None
    return row.prepare, weight.hadamard, weight.hadamard_basis, activation


def linear(
    x: torch.Tensor,
    held: Held,
    spec: CompositeSpec,
    bias: torch.Tensor | None,
    kernels: tuple[Step, ...],
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
    step = kernels[-1]
    if len(kernels) > 1:
        count = x.numel() // x.shape[-1]
        step = next(one for one in kernels if one.rows is None or count <= one.rows)
    parts = [
        (part.weight, part_tensors(held, spec, number), how)
        for number, (part, how) in enumerate(zip(spec.parts, step.parts, strict=True))
    ]
    if all(how.dense for how in step.parts):
        weights = [how.run(tensors, weight, x.dtype) for weight, tensors, how in parts]
        weight = weights[0] if len(weights) == 1 else torch.cat(weights, dim=spec.axis)
        return torch.nn.functional.linear(x, weight, bias)
    sizes = [part.weight.shape[spec.axis] for part in spec.parts]
    rows = spec.axis == 0
    inputs = [x] * len(sizes) if rows else x.split(sizes, dim=-1)
    biases = bias.split(sizes) if rows and bias is not None else [None] * len(sizes)
    outputs = []
    prepared: dict = {}
    for (weight, tensors, how), piece, piece_bias in zip(parts, inputs, biases, strict=True):
        if how.dense:
            dense_weight = how.run(tensors, weight, x.dtype)
            outputs.append(torch.nn.functional.linear(piece, dense_weight, piece_bias))
        elif how.slot is None:
            outputs.append(how.run(piece, tensors, weight, piece_bias))
        else:
            arguments = (tensors, weight, piece_bias)
            outputs.append(how.run.shared(piece, prepared, how.slot, *arguments))
    if rows:
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
    total = torch.stack([y.float() for y in outputs]).sum(0)
    return (total if bias is None else total + bias.float()).to(x.dtype)
