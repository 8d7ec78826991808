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

Nobody has run every kernel on every device. Kernels of a backend that is ``tried`` are therefore
compiled and compared with the reference when they are first needed (:mod:`.trial`); one that fails
is left out for its format from then on, said once in the log, and the next best is taken. The same
happens to one that fails later, for a shape that the trial did not have.
"""

from __future__ import annotations

import importlib
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import ClassVar

import torch

from .spec import ActivationSpec
from .trial import Trial

__all__ = [
    "BACKENDS",
    "FOUR_BITS",
    "MATMUL_OPERATIONS",
    "Backend",
    "Call",
    "Choice",
    "Implementation",
    "NoImplementationError",
    "Registry",
    "Running",
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

FOUR_BITS = ("int4", "uint4", "float4_e2m1fn")
"""Formats of activations that few devices multiply."""

GPUS = ("cuda", "xpu")
"""Device types of graphics cards; AMD's are "cuda" too."""

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
        architecture: "sm_90", "gfx1100", "xpu"; empty on others.
        rows: Of the activations; None for many, as images have.
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
    architecture: str = ""
    rows: int | None = None


# ----------------------------------------------------------------------- constraints, as data

# Those with ``of_device`` set ask the device alone: they tell what a device can run at all.


@dataclass(frozen=True)
class OnDevice:
    """The device type is one of these."""

    of_device: ClassVar[bool] = True
    types: tuple[str, ...]

    def why_not(self, call: Call) -> str | None:
        if call.device in self.types:
            return None
        return f"needs a {' or '.join(self.types)} device, this is {call.device}"


@dataclass(frozen=True)
class MinCapability:
    """CUDA compute capability of at least this."""

    of_device: ClassVar[bool] = True
    major: int
    minor: int = 0

    def why_not(self, call: Call) -> str | None:
        if call.capability is not None and call.capability >= (self.major, self.minor):
            return None
        have = "none" if call.capability is None else "{}.{}".format(*call.capability)
        if call.capability is None and call.architecture:
            have = f"none ({call.architecture})"
        return f"needs compute capability {self.major}.{self.minor}, this device has {have}"


@dataclass(frozen=True)
class Architectures:
    """A GPU of these makes.

    Attributes:
        cuda: Least compute capability of NVIDIA's, None for none of them.
        hip: How the names of AMD's begin: "gfx9", "gfx1100".
        xpu: Whether Intel's are among them.
    """

    of_device: ClassVar[bool] = True
    cuda: tuple[int, int] | None = None
    hip: tuple[str, ...] = ()
    xpu: bool = False

    def why_not(self, call: Call) -> str | None:
        if call.device == "xpu" and self.xpu:
            return None
        if call.capability is not None:
            if self.cuda is not None and call.capability >= self.cuda:
                return None
        elif call.device == "cuda" and call.architecture.startswith(self.hip or ("none",)):
            return None
        wanted = [] if self.cuda is None else ["compute capability {}.{}".format(*self.cuda)]
        wanted += [f"AMD {' or '.join(self.hip)}"] if self.hip else []
        wanted += ["Intel XPU"] if self.xpu else []
        if call.capability is not None:
            have = "compute capability {}.{}".format(*call.capability)
        else:
            have = call.architecture or call.device
        return f"needs {', '.join(wanted)}; this device is {have}"


@dataclass(frozen=True)
class Rows:
    """Activations of this many rows."""

    least: int = 0
    most: int | None = None

    def why_not(self, call: Call) -> str | None:
        if call.rows is not None and call.rows < self.least:
            return f"is for {self.least} rows and more"
        if self.most is not None and (call.rows is None or call.rows > self.most):
            return f"is for at most {self.most} rows"
        return None


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
class ActivationsIn:
    """Activations are rounded to one of these formats."""

    names: tuple[str, ...]

    def why_not(self, call: Call) -> str | None:
        if call.activation is None:
            return RoundsActivations().why_not(call)
        if call.activation.format in self.names:
            return None
        wanted = " or ".join(self.names)
        return f"needs activations in {wanted}, these are in {call.activation.format}"


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
        tried: Its implementations are compared with the reference before they are relied on.
    """

    name: str
    probe: str = ""
    opt_in: bool = False
    tried: bool = False

    def why_not(self, device: str) -> str | None:
        """None where usable, else the reason."""
        return _probe(self.probe, device) if self.probe else None


BACKENDS = (
    Backend("reference"),
    Backend("torch", ".cpu:why_unavailable"),
    Backend("comfy_kitchen", ".kitchen:why_unavailable"),
    Backend("triton", ".triton:why_unavailable", tried=True),
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
        priority_on: ``(architecture, priority)`` where it differs, by how the name begins.
        second_choice: Right, but a weight-only product is faster and more exact, so that "auto"
            takes that; for those who ask for this very arithmetic.
        prepare, finish: ``module:function`` of both halves of a product, for layers that share x:
            ``prepare(x, spec)`` rotates and rounds x, and depends on nothing else of the weight;
            ``finish(prepared, tensors, spec, bias)`` gives what the target would.
    """

    operation: str
    backend: str
    target: str
    priority: int = 0
    constraints: tuple = ()
    probe: str = ""
    emulated_from: tuple[int, int] | None = None
    priority_on: tuple[tuple[str, int], ...] = ()
    second_choice: bool = False
    prepare: str = ""
    finish: str = ""

    @property
    def family(self) -> Backend:
        """Its backend."""
        return next(b for b in BACKENDS if b.name == self.backend)

    def rank(self, architecture: str) -> int:
        """Its priority on an architecture."""
        for name, priority in self.priority_on:
            if architecture.startswith(name):
                return priority
        return self.priority

    def why_not(self, call: Call, *, forced: bool = True, device_only: bool = False) -> str | None:
        """None where it applies, else the first reason against it.

        Args:
            call: What is asked for.
            forced: Whether the user chose this backend.
            device_only: Ask about the device, whatever the weight.
        """
        for constraint in self.constraints:
            if device_only and not getattr(constraint, "of_device", False):
                continue
            reason = constraint.why_not(call)
            if reason is not None:
                return reason
        backend = self.family
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
    # {(implementation, device, format): why it is left out}
    _troubles: dict[tuple, str] = field(default_factory=dict)
    # {(implementation, device, problem): seconds that its trial took}
    _trials: dict[tuple, float] = field(default_factory=dict)
    _trial_lock: threading.RLock = field(default_factory=threading.RLock)

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

    def choose(
        self, operation: str, call: Call, backend: str = "auto", trial: Trial | None = None
    ) -> Choice:
        """The best implementation that applies.

        Args:
            operation: Operation name.
            call: What is asked for.
            backend: "auto", or a backend's name. A forced backend is never left silently: where
                it has no implementation that applies, the reference stands in and the reason is
                part of the choice.
            trial: What to try implementations with that are not known to be right yet; without
                one nothing is compiled, and only those that have failed are left out.

        Raises:
            NoImplementationError: Nothing applies; lists the reason of each.
        """
        refused: list[tuple[str, str]] = []
        rows = sorted(self.implementations(operation), key=lambda r: -r.rank(call.architecture))
        if backend not in ("auto", "reference") and all(r.backend != backend for r in rows):
            refused.append((backend, f"has no {operation}"))
        for row in rows:
            if backend not in ("auto", row.backend, "reference") and row.backend != "reference":
                continue
            if backend == "reference" and row.backend != "reference":
                continue
            reason = row.why_not(call, forced=backend == row.backend)
            if reason is None and row.family.tried:
                reason = self._why_left_out(row, call, trial)
            if reason is None:
                return Choice(row, tuple(refused))
            refused.append((row.backend, reason))
        reasons = "; ".join(f"{name}: {reason}" for name, reason in refused) or "none registered"
        raise NoImplementationError(f"nothing computes {operation} here ({reasons})")

    def _why_left_out(self, row: Implementation, call: Call, trial: Trial | None) -> str | None:
        """Why it failed here; tries it first, if it may."""
        where = (call.device, call.architecture)
        if trial is not None:
            key = (row, where, trial.problem)
            with self._trial_lock:
                if key not in self._trials and (row, where, call.format) not in self._troubles:
                    started = time.perf_counter()
                    reason = trial.why_wrong(row.function(), self._definition(row), row.operation)
                    self._trials[key] = time.perf_counter() - started
                    if reason is not None:
                        self.leave_out(row, call, reason)
        return self._troubles.get((row, where, call.format))

    def _definition(self, row: Implementation) -> Callable:
        """The reference of an implementation."""
        rows = self.implementations(row.operation)
        return next(r for r in rows if r.backend == "reference").function()

    def leave_out(self, row: Implementation, call: Call, reason: str) -> None:
        """Use an implementation no more for codes of this format on this kind of device."""
        key = (row, (call.device, call.architecture), call.format)
        with self._lock:
            if key in self._troubles:
                return
            self._troubles[key] = reason
        logging.warning(
            "LowBit: %s by %s is not used for %s weights on this device (%s); the next best "
            "kernel takes its place. Please report this with the line above.",
            *(row.operation, row.backend, call.format, reason),
        )

    def seconds_spent(self) -> dict[str, float]:
        """``{"operation by backend": seconds of compiling and trying it}`` in this process."""
        spent: dict[str, float] = {}
        for (row, *_), seconds in list(self._trials.items()):
            name = f"{row.operation} by {row.backend}"
            spent[name] = spent.get(name, 0.0) + seconds
        return spent

    def on_device(self, call: Call) -> dict[str, tuple[tuple[str, str | None], ...]]:
        """``{operation: ((backend, None or why not), ...)}`` best first, whatever the weight.

        Args:
            call: Of the device; the weight in it is not looked at.
        """
        table = {}
        for operation in self.operations():
            rows = sorted(self.implementations(operation), key=lambda r: -r.rank(call.architecture))
            told: dict[str, str | None] = {}
            for row in rows:
                reason = row.why_not(call, forced=False, device_only=True)
                if row.backend not in told or reason is None:
                    told[row.backend] = reason
            table[operation] = tuple(told.items())
        return table

    def failures(self) -> tuple[str, ...]:
        """What was left out in this process, a sentence for each implementation and format."""
        return tuple(
            f"{row.operation} by {row.backend} is not used for {format_} weights: {reason}"
            for (row, _, format_), reason in list(self._troubles.items())
        )

    def row_limits(self, operations: tuple[str, ...]) -> tuple[int, ...]:
        """The numbers of rows up to which another implementation may be best, in order."""
        limits = {
            limit
            for operation in operations
            for row in self.implementations(operation)
            for constraint in row.constraints
            if isinstance(constraint, Rows)
            for limit in (constraint.least - 1, constraint.most)
            if limit is not None and limit > 0
        }
        return tuple(sorted(limits))

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


class Running:
    """An implementation at work: gives way to the next best where its kernel cannot be built.

    A trial has few shapes; a kernel for another one may still fail to compile, or need more shared
    memory than the device has. Under torch.compile, whose graph cannot change its mind, and where
    the memory is full, errors stay errors.
    """

    def __init__(
        self, choice: Choice, call: Call, backend: str, source: Registry, shares: bool = False
    ) -> None:
        self._call, self._backend, self._registry = call, backend, source
        self._shares = shares
        self._use(choice)

    def _use(self, choice: Choice) -> None:
        row = self.implementation = choice.implementation
        self.function = row.function()
        self.guarded = row.family.tried
        both = self._shares and row.prepare
        self.prepare = _load(row.prepare) if both else None
        self.finish = _load(row.finish) if both else None

    def __call__(self, *args):
        """What the implementation's target gives."""
        if not self.guarded or torch.compiler.is_compiling():
            return self.function(*args)
        try:
            return self.function(*args)
        except Exception as error:
            self._give_way(error)
        return self(*args)

    def shared(self, x, prepared: dict, slot: str, *args):
        """The same by both halves; the first half's result is kept in ``prepared[slot]``."""
        if self.prepare is None:
            return self(x, *args)
        if torch.compiler.is_compiling():
            if slot not in prepared:
                prepared[slot] = self.prepare(x, args[1])
            return self.finish(prepared[slot], *args)
        try:
            if slot not in prepared:
                prepared[slot] = self.prepare(x, args[1])
            return self.finish(prepared[slot], *args)
        except Exception as error:
            if not self.guarded:
                raise
            self._give_way(error)
        return self(x, *args)

    def _give_way(self, error: Exception) -> None:
        if not _of_triton(error):
            raise error
        self._registry.leave_out(self.implementation, self._call, _told(error))
        self._use(self._registry.choose(self.implementation.operation, self._call, self._backend))


def _told(error: Exception) -> str:
    first = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first[:200]}"


def _of_triton(error: Exception) -> bool:
    """Whether compiling or launching by Triton raised it, not torch and not a want of memory."""
    if isinstance(error, torch.OutOfMemoryError):
        return False
    if type(error).__module__.split(".")[0] == "triton":
        return True
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_globals.get("__name__", "").split(".")[0] == "triton":
            return True
        trace = trace.tb_next
    return False


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
for _operation in ("linear_int8", "linear_uint8"):
    registry.register(
        Implementation(
            _operation, "torch", f".cpu:{_operation}", 10, (OnDevice(("cpu",)), *_QUANTIZED)
        )
    )
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
            Architectures(cuda=(7, 5), hip=("gfx11", "gfx12")),
            IsLinear(),
            MatmulShape(),
            FormatIn(("int8",)),
            Rowwise(),
        ),
        ".kitchen:why_no_int8",
        # It has no warp-group instructions there, and Triton's kernel has.
        priority_on=(("sm_90", 5),),
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
            Rows(most=64),  # it is made for modulation layers
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
            Architectures(cuda=(8, 0), hip=("gfx11", "gfx12")),
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

# Triton's kernels. What a device has no instructions for is not claimed: Triton has no products for
# Turing, where weights are unpacked for the library's.
_CARDS = ("gfx90a", "gfx94", "gfx95", "gfx11", "gfx12")
_UNPACKS = Architectures(cuda=(7, 5), hip=_CARDS, xpu=True)
_MULTIPLIES = Architectures(cuda=(8, 0), hip=_CARDS, xpu=True)
_MULTIPLIES_FP8 = Architectures(cuda=(8, 9))

for _operation, _target, _constraints in (
    ("dequantize", ".triton.unpack:dequantize", ()),
    ("linear_weight_only", ".triton.weight_only:linear_weight_only", (IsLinear(),)),
):
    registry.register(
        Implementation(_operation, "triton", _target, 10, (OnDevice(GPUS), _UNPACKS, *_constraints))
    )
for _operation, _module, _prepare, _devices in (
    ("linear_int8", "int8", "prepare_int8", _MULTIPLIES),
    ("linear_uint8", "int8", "prepare_uint8", _MULTIPLIES),
    ("linear_fp8", "fp8", "prepare", _MULTIPLIES_FP8),
):
    registry.register(
        Implementation(
            _operation,
            "triton",
            f".triton.{_module}:{_operation}",
            10,
            (OnDevice(GPUS), _devices, *_QUANTIZED),
            prepare=f".triton.{_module}:{_prepare}",
            finish=f".triton.{_module}:{_operation}_prepared",
        )
    )
for _formats in (("int8", "float8_e4m3fn"), FOUR_BITS):
    registry.register(
        Implementation(
            "linear_faithful",
            "triton",
            ".triton.faithful:linear_faithful",
            10,
            (OnDevice(GPUS), _MULTIPLIES, *_QUANTIZED, ActivationsIn(_formats)),
            ".triton.faithful:why_not",
            # Scales of groups are put in outside of the matrix instructions, which takes longer
            # than the product; rounding both sides to 8 bits a row does not.
            second_choice=_formats == FOUR_BITS,
            prepare=".triton.faithful:prepare",
            finish=".triton.faithful:linear_faithful_prepared",
        )
    )
