"""Which implementation runs which operation on which device, and why the others do not.

An *operation* is a name with one eager definition in :mod:`.reference` or :mod:`.faithful`; an
*implementation* is one way to compute it, with constraints kept as data, so that the same rules
choose a kernel, explain a refusal in a node's text and produce test inputs.

Operations (all take plain tensors; ``spec`` is a :class:`~.spec.WeightSpec`):

======================  =====================================================================
``dequantize``          ``(tensors, spec, dtype) -> weight`` of ``spec.shape``
``linear_weight_only``  ``(x, tensors, spec, bias) -> y``, x in its own dtype
``linear_int8``         the same, W8A8, symmetric int8 activations
``linear_uint8``        the same with asymmetric activations
``linear_fp8``          the same in float8_e4m3fn
``linear_fp16``         the same in float16 with per-row scales
``linear_faithful``     the same with activations rounded as ``spec.activation`` says
======================  =====================================================================
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache

import torch

from .spec import ActivationSpec

__all__ = [
    "BACKENDS",
    "MATMUL_OPERATIONS",
    "Backend",
    "Call",
    "Choice",
    "Implementation",
    "NoImplementationError",
    "Registry",
    "registry",
]

MATMUL_OPERATIONS = {
    "dequantize": "dequantize",
    "int8": "linear_int8",
    "uint8": "linear_uint8",
    "fp8": "linear_fp8",
    "fp16": "linear_fp16",
    "faithful": "linear_faithful",
}
"""Operation behind each resolved ``matmul`` mode."""

EMULATED = "multiplies 4-bit integers, which compute capability {}.{} only emulates"
OPT_IN = "is used only where it is chosen as the backend: nobody has measured it yet"


class NoImplementationError(RuntimeError):
    """No implementation of an operation applies; the message lists the reason of each."""


@dataclass(frozen=True)
class Call:
    """What a layer asks for: all that constraints may look at.

    Attributes:
        device: Device type, "cpu", "cuda", "xpu", "mps" ...
        capability: CUDA compute capability, None elsewhere.
        dtype: Compute dtype of activations and output.
        shape: Logical weight shape, ``[N, K]`` for a Linear.
        format: Name of the number format of the codes.
        bits: Bits of one code.
        rowwise: One scale for each output row (or one in all), no groups.
        symmetric: No zero point and no codebook.
        plain: Neither low-rank branch nor Hadamard rotation.
        group: Elements of a row that share a scale.
        rank: Of the low-rank branch.
        rotated: With a Hadamard rotation.
        smoothing, two_level, activation: As in the :class:`~.spec.WeightSpec`.
    """

    device: str
    capability: tuple[int, int] | None
    dtype: torch.dtype
    shape: tuple[int, ...]
    format: str
    bits: int
    rowwise: bool
    symmetric: bool
    plain: bool
    group: int = 0
    rank: int = 0
    rotated: bool = False
    smoothing: str = ""
    two_level: bool = False
    activation: ActivationSpec | None = None


# ----------------------------------------------------------------------- constraints, as data


@dataclass(frozen=True)
class OnDevice:
    """The device type is one of these."""

    types: tuple[str, ...]

    def why_not(self, call: Call) -> str | None:
        if call.device in self.types:
            return None
        return f"needs a {' or '.join(self.types)} device, this is {call.device}"


@dataclass(frozen=True)
class MinCapability:
    """CUDA compute capability of at least this."""

    major: int
    minor: int = 0

    def why_not(self, call: Call) -> str | None:
        if call.capability is not None and call.capability >= (self.major, self.minor):
            return None
        have = "none" if call.capability is None else "{}.{}".format(*call.capability)
        return f"needs compute capability {self.major}.{self.minor}, this device has {have}"


@dataclass(frozen=True)
class IsLinear:
    """A two-dimensional weight."""

    def why_not(self, call: Call) -> str | None:
        return None if len(call.shape) == 2 else f"needs a 2-D weight, this one is {call.shape}"


@dataclass(frozen=True)
class MatmulShape:
    """Both channel counts at least ``minimum`` and divisible by ``factor``."""

    minimum: int = 32
    factor: int = 16

    def why_not(self, call: Call) -> str | None:
        if len(call.shape) == 2 and all(
            n >= self.minimum and n % self.factor == 0 for n in call.shape
        ):
            return None
        return (
            f"needs channels of at least {self.minimum} divisible by {self.factor}, "
            f"this weight is {'x'.join(map(str, call.shape))}"
        )


@dataclass(frozen=True)
class DtypeIn:
    """Activations are of one of these dtypes."""

    dtypes: tuple[torch.dtype, ...] = (torch.float16, torch.bfloat16)

    def why_not(self, call: Call) -> str | None:
        if call.dtype in self.dtypes:
            return None
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in self.dtypes)
        return f"needs {names} activations, these are {str(call.dtype).removeprefix('torch.')}"


@dataclass(frozen=True)
class FormatIn:
    """The codes are of one of these formats."""

    names: tuple[str, ...]

    def why_not(self, call: Call) -> str | None:
        if call.format in self.names:
            return None
        return f"needs {' or '.join(self.names)} codes, these are {call.format}"


@dataclass(frozen=True)
class Rowwise:
    """One scale for a row, no zero point, no codebook, no branch, no rotation."""

    def why_not(self, call: Call) -> str | None:
        if not call.rowwise:
            return "needs one scale for each row, this weight is grouped"
        if not call.symmetric:
            return "needs symmetric codes, this weight has a zero point or a codebook"
        return Plain().why_not(call)


@dataclass(frozen=True)
class Plain:
    """Neither a low-rank branch, a rotation, smoothing nor a second scale."""

    def why_not(self, call: Call) -> str | None:
        if not call.plain:
            return "cannot carry a low-rank branch or a Hadamard rotation"
        if call.smoothing:
            return "cannot carry the smoothing of activations"
        return "cannot carry scales of two levels" if call.two_level else None


@dataclass(frozen=True)
class GroupIn:
    """This many elements of a row share a scale."""

    sizes: tuple[int, ...]

    def why_not(self, call: Call) -> str | None:
        if call.group in self.sizes:
            return None
        wanted = " or ".join(map(str, self.sizes))
        return f"needs groups of {wanted}, this weight has groups of {call.group}"


@dataclass(frozen=True)
class RoundsActivations:
    """The format has an arithmetic of its own, which rounds activations."""

    def why_not(self, call: Call) -> str | None:
        return None if call.activation else "needs a format that says how activations are rounded"


@dataclass(frozen=True)
class SVDQuant:
    """Weight and activations in 4 bits with the groups and scales of SVDQuant.

    Attributes:
        precisions: ``(code format, group, format of the activations' scales)`` of each.
        largest_rank: Of the low-rank branch, None for any.
    """

    precisions: tuple[tuple[str, int, str], ...]
    largest_rank: int | None = None

    def why_not(self, call: Call) -> str | None:
        activation = call.activation
        if activation is None:
            return RoundsActivations().why_not(call)
        known = {name: (group, scale) for name, group, scale in self.precisions}
        if call.format not in known:
            return FormatIn(tuple(known)).why_not(call)
        group, scale = known[call.format]
        if call.group != group or activation.group != group:
            return (
                f"needs groups of {group}, this weight has groups of {call.group} and "
                f"activations of {activation.group}"
            )
        formats = (call.format, "uint4") if call.format == "int4" else (call.format,)
        if activation.format not in formats or activation.scale != scale or activation.static:
            return "needs activations that are rounded as in SVDQuant"
        if call.smoothing == "multiply":
            return "needs activations that are divided by the smoothing"
        if call.rotated:
            return "cannot carry a Hadamard rotation"
        if self.largest_rank is not None and call.rank > self.largest_rank:
            return f"needs a rank of at most {self.largest_rank}, this branch has {call.rank}"
        return None


@lru_cache(maxsize=64)
def _probe(target: str, device: str) -> str | None:
    return _load(target)(device)


def _load(target: str) -> Callable:
    module, name = target.split(":")
    return getattr(importlib.import_module(module, __package__), name)


# ------------------------------------------------------------------------------- the registry


@dataclass(frozen=True)
class Backend:
    """A family of implementations that a user can force.

    Attributes:
        name: As the node's ``backend`` input spells it.
        probe: ``module:function`` that takes a device type and gives None where the backend is
            usable on this machine, else the reason; empty for what is always usable.
        opt_in: Never chosen by "auto".
    """

    name: str
    probe: str = ""
    opt_in: bool = False

    def why_not(self, device: str) -> str | None:
        """None where usable, else the reason."""
        return _probe(self.probe, device) if self.probe else None


BACKENDS = (
    Backend("reference"),
    Backend("comfy_kitchen", ".kitchen:why_unavailable"),
    Backend("triton", ".triton:why_unavailable"),
    Backend("nunchaku", ".nunchaku:why_unavailable", opt_in=True),
)


@dataclass(frozen=True)
class Implementation:
    """One way to compute one operation.

    Attributes:
        operation: Operation name.
        backend: Backend it belongs to.
        target: ``module:function``, imported when first used.
        priority: The highest that applies is chosen.
        constraints: Objects with ``why_not(call) -> str | None``.
        probe: ``module:function`` that takes the call and is asked last: it may import the package
            behind the backend to see whether this can be computed.
        emulated_from: CUDA compute capability from which devices lack the matrix instruction behind
            it: it is right there, but only chosen where the user chose its backend.
    """

    operation: str
    backend: str
    target: str
    priority: int = 0
    constraints: tuple = ()
    probe: str = ""
    emulated_from: tuple[int, int] | None = None

    def why_not(self, call: Call, *, forced: bool = True) -> str | None:
        """None where it applies, else the first reason against it.

        Args:
            call: What is asked for.
            forced: Whether the user chose this backend.
        """
        for constraint in self.constraints:
            reason = constraint.why_not(call)
            if reason is not None:
                return reason
        backend = next(b for b in BACKENDS if b.name == self.backend)
        if backend.opt_in and not forced:
            return OPT_IN
        capability = call.capability
        if self.emulated_from and capability and capability >= self.emulated_from and not forced:
            return EMULATED.format(*capability)
        reason = backend.why_not(call.device)
        if reason is None and self.probe:
            reason = _load(self.probe)(call)
        return reason

    def function(self) -> Callable:
        """The callable itself."""
        return _load(self.target)


@dataclass(frozen=True)
class Choice:
    """What was chosen for a call and why not the others: ``((name, reason), ...)``."""

    implementation: Implementation
    refused: tuple[tuple[str, str], ...] = ()

    def describe(self) -> str:
        """One line for a report."""
        text = f"{self.implementation.operation} by {self.implementation.backend}"
        for name, reason in self.refused:
            text += f"; not {name}: {reason}"
        return text


@dataclass
class Registry:
    """Operations to implementations; safe to use from several threads."""

    _table: dict[str, list[Implementation]] = field(default_factory=dict)  # {operation: [...]}
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def register(self, implementation: Implementation) -> None:
        """Add an implementation; the highest priority stands first."""
        with self._lock:
            rows = self._table.setdefault(implementation.operation, [])
            rows.append(implementation)
            rows.sort(key=lambda row: -row.priority)

    def implementations(self, operation: str) -> tuple[Implementation, ...]:
        """All implementations of an operation, best first."""
        with self._lock:
            return tuple(self._table.get(operation, ()))

    def operations(self) -> tuple[str, ...]:
        """Names of the operations."""
        with self._lock:
            return tuple(sorted(self._table))

    def choose(self, operation: str, call: Call, backend: str = "auto") -> Choice:
        """The best implementation that applies.

        Args:
            operation: Operation name.
            call: What is asked for.
            backend: "auto", or a backend's name. A forced backend is never left silently: where
                it has no implementation that applies, the reference stands in and the reason is
                part of the choice.

        Raises:
            NoImplementationError: Nothing applies; lists the reason of each.
        """
        refused: list[tuple[str, str]] = []
        rows = self.implementations(operation)
        if backend not in ("auto", "reference") and all(r.backend != backend for r in rows):
            refused.append((backend, f"has no {operation}"))
        for row in rows:
            if backend not in ("auto", row.backend, "reference") and row.backend != "reference":
                continue
            if backend == "reference" and row.backend != "reference":
                continue
            reason = row.why_not(call, forced=backend == row.backend)
            if reason is None:
                return Choice(row, tuple(refused))
            refused.append((row.backend, reason))
        reasons = "; ".join(f"{name}: {reason}" for name, reason in refused) or "none registered"
        raise NoImplementationError(f"nothing computes {operation} here ({reasons})")

    def backend_status(self, device: str) -> dict[str, str | None]:
        """``{backend: None or the reason why it is not usable on this machine}``."""
        with self._lock:
            served = {row.backend for rows in self._table.values() for row in rows}
        return {
            b.name: b.why_not(device)
            if b.name in served
            else "this version of the pack has no kernels for it"
            for b in BACKENDS
        }


registry = Registry()

_QUANTIZED = (IsLinear(), MatmulShape())
for _operation, _constraints in (
    ("dequantize", ()),
    ("linear_int8", _QUANTIZED),
    ("linear_uint8", _QUANTIZED),
    ("linear_fp8", _QUANTIZED),
    ("linear_fp16", _QUANTIZED),
):
    registry.register(
        Implementation(_operation, "reference", f".reference:{_operation}", 0, _constraints)
    )
registry.register(Implementation("linear_weight_only", "reference", ".reference:linear_dequantize"))
registry.register(
    Implementation(
        "linear_faithful",
        "reference",
        ".faithful:linear_faithful",
        0,
        (IsLinear(), RoundsActivations()),
    )
)
registry.register(
    Implementation(
        "linear_int8",
        "comfy_kitchen",
        ".kitchen:linear_int8",
        20,
        (
            OnDevice(("cuda",)),
            MinCapability(7, 5),
            IsLinear(),
            MatmulShape(),
            FormatIn(("int8",)),
            Rowwise(),
        ),
    )
)
registry.register(
    Implementation(
        "linear_weight_only",
        "comfy_kitchen",
        ".kitchen:linear_weight_only",
        20,
        (
            OnDevice(("cuda",)),
            MinCapability(8, 0),
            IsLinear(),
            MatmulShape(128, 128),
            FormatIn(("uint4",)),
            GroupIn((64,)),
            Plain(),
            DtypeIn(),
        ),
        ".kitchen:why_no_weight_only",
    )
)
registry.register(
    Implementation(
        "linear_faithful",
        "comfy_kitchen",
        ".kitchen:linear_faithful",
        20,
        (
            OnDevice(("cuda",)),
            MinCapability(8, 0),
            IsLinear(),
            MatmulShape(128, 128),
            SVDQuant((("int4", 64, ""),)),
            DtypeIn(),
        ),
        ".kitchen:why_no_svdquant",
        emulated_from=(9, 0),
    )
)
registry.register(
    Implementation(
        "linear_faithful",
        "nunchaku",
        ".nunchaku:linear_faithful",
        30,
        (
            OnDevice(("cuda",)),
            IsLinear(),
            MatmulShape(128, 128),
            SVDQuant((("int4", 64, ""), ("float4_e2m1fn", 16, "float8_e4m3fn")), largest_rank=1024),
            DtypeIn(),
        ),
        ".nunchaku:why_not_here",
    )
)
