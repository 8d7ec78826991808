"""Every Linear of the models, in every scheme and matmul, beside bf16 and beside other packages.

A row of the results:

| field          | meaning                                                                         |
|----------------|---------------------------------------------------------------------------------|
| side           | ``float`` (``F.linear``), ``ours``, ``eager`` (the reference alone), ``no       |
|                | triton`` (comfy-kitchen where the host enables it, else eager), or a package    |
| form, mode     | scheme (:mod:`forms`) and the loader's ``matmul``; ``unpack`` is dequantizing   |
| us, ratio      | microseconds; time of ``F.linear`` in the same round over it                    |
| error          | of the result from the float64 product with the dequantized weight, relative    |
| differs        | from the eager definition, relative; ``wrong`` where that is too much           |
| copy, compute  | shares of the measured copy bandwidth and of the measured product of that kind  |
| absent         | why there is no number                                                          |
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from forms import FORMS, weight_of
from peers import AbsentError, Peers
from shapes import MODELS, Layer
from timing import Local, compete, peak_bytes, release
from torch.nn import functional

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CHECKED_ROWS = 64
"""Rows whose result is compared; 32 and more, so that products do not dequantize instead."""
WRONG = {"dequantize": 0.01, "int8": 0.02, "uint8": 0.02, "fp8": 0.02, "faithful": 0.06}
"""Difference from the eager definition from which a result may be wrong; 16-bit output is 0.004.

Activations that lie nearly between two codes may round either way, and a kernel may round a weight
to 8 bits otherwise than the definition does. So what is as near to the exact product is right.
"""
SLACK = 1.25
LIMIT_OF = {"int8": "int8", "uint8": "int8", "fp8": "fp8"}
SIDES = ("ours", "eager", "no triton", "peers")


@dataclass(frozen=True)
class Case:
    """A layer and how many rows it gets."""

    model: str
    layer: Layer
    rows: int


@dataclass
class Wanted:
    """What to measure.

    Attributes:
        device: "cpu" or "cuda".
        dtype: Of activations.
        rounds: Of every comparison.
        models, forms, modes, sides: Names, in order.
        rows: How many rows, empty for the model's own.
        layers: Names of layers, empty for all.
        shrink: Divides every size (``--smoke``).
        threads: Of torch.
        deadline: ``time.monotonic()`` after which nothing new begins.
    """

    device: str
    dtype: str = "bf16"
    rounds: int = 5
    models: tuple[str, ...] = ("flux1",)
    forms: tuple[str, ...] = tuple(FORMS)
    modes: tuple[str, ...] = ()
    sides: tuple[str, ...] = SIDES
    rows: tuple[int, ...] = ()
    layers: tuple[str, ...] = ()
    shrink: int = 1
    threads: int = 1
    deadline: float = float("inf")
    limits: dict[str, float] = field(default_factory=dict)


def cases(wanted: Wanted) -> Iterator[Case]:
    """Every layer and row count, no shape twice."""
    seen = set()
    for name in wanted.models:
        for layer in MODELS[name].layers:
            if wanted.layers and layer.name not in wanted.layers:
                continue
            small = Layer(
                layer.name,
                layer.out // wanted.shrink,
                layer.inputs // wanted.shrink,
                max(layer.rows // wanted.shrink, 1),
                layer.count,
            )
            for rows in wanted.rows or (small.rows,):
                key = (small.out, small.inputs, rows)
                if key not in seen:
                    seen.add(key)
                    yield Case(name, small, rows)


def measure(wanted: Wanted, pack: Callable, keep: Callable[[list[dict]], None]) -> list[dict]:
    """All rows; ``keep`` is called with those so far after each case."""
    peers = Peers(wanted.device, wanted.threads)
    found: list[dict] = []
    try:
        for case in cases(wanted):
            for name in wanted.forms:
                if time.monotonic() > wanted.deadline:
                    found.append({"stopped": f"no time left before {case.layer.name}, {name}"})
                    keep(found)
                    return found
                found += _case(case, name, wanted, pack, peers)
                keep(found)
                peers.drop()
                release()
    finally:
        peers.close()
    return found


# -------------------------------------------------------------------------------------- one case


@dataclass
class Ours:
    """One of our kernels on one weight, as our Linear runs it.

    Attributes:
        call: What is timed.
        kernel: What the registry says of it.
        mode: The loader's matmul.
        product: The same on other rows.
    """

    call: Callable[[], torch.Tensor]
    kernel: str
    mode: str
    product: Callable[[torch.Tensor], torch.Tensor]


def _case(case: Case, name: str, wanted: Wanted, pack: Callable, peers: Peers) -> list[dict]:
    form, dtype, device = FORMS[name], DTYPES[wanted.dtype], wanted.device
    n, k, m = case.layer.out, case.layer.inputs, case.rows
    base = {
        "model": case.model,
        "layer": case.layer.name,
        "m": m,
        "n": n,
        "k": k,
        "count": case.layer.count,
        "form": name,
        "dtype": wanted.dtype,
    }
    if form.group > 0 and k % form.group:
        return [base | {"side": "ours", "absent": f"{k} inputs are no whole groups"}]
    composite, dispatch = pack("loaders.layouts.composite"), pack("loaders.layouts.dispatch")
    weight = weight_of(form, pack, n, k, device)
    packed = composite.build([(name, weight, form.wish)], dtype)
    held, spec = composite.held_by(packed), packed._params.spec
    dense = weight.dequantize(dtype)
    x = torch.randn(m, k, generator=torch.Generator(device).manual_seed(1), device=device).to(dtype)
    bias = torch.zeros(n, device=device, dtype=dtype)
    stored = weight.nbytes
    place = torch.device(device) if device == "cpu" else torch.device("cuda", 0)

    def ours(mode: str, backend: str) -> Ours:
        kernels = dispatch.kernels_of(spec, mode, backend, place, dtype)  # tries them, too
        decision = dispatch.decide(*(weight.spec, form.wish, mode, backend, place, dtype), rows=m)
        if mode != "dequantize" and decision.mode != mode:
            raise AbsentError(decision.reason or f"{m} rows are multiplied as {decision.mode}")

        def product(rows: torch.Tensor) -> torch.Tensor:
            return dispatch.linear(rows, held, spec, bias, kernels)

        return Ours(partial(product, x), decision.choice.describe(), mode, product)

    contenders = {"float": Local(partial(functional.linear, x, dense, bias), device)}
    told: dict[str, dict] = {"float": {"side": "float", "mode": "float"}}
    modes = [mode for mode in form.modes if not wanted.modes or mode in wanted.modes]
    absent = []
    made: dict[str, Ours] = {}
    for mode in modes:
        for side, backend in (("ours", "auto"), ("eager", "reference"), ("no triton", NO_TRITON)):
            if side not in wanted.sides:
                continue
            key = f"{side} {mode}"
            try:
                one = ours(mode, backend)
            except AbsentError as error:
                absent.append(base | {"side": side, "mode": mode, "absent": str(error)})
                continue
            same = next((k for k, o in made.items() if (o.mode, _by(o)) == (mode, _by(one))), None)
            if same is not None:
                absent.append(base | {"side": side, "mode": mode, "same_as": told[same]["side"]})
                continue
            made[key] = one
            told[key] = {"side": side, "mode": mode, "kernel": one.kernel}
            contenders[key] = Local(one.call, device)
    if "ours" in wanted.sides and "dequantize" in modes:
        function = _unpack(dispatch, weight.spec, place, dtype)
        told["unpack"] = {"side": "ours", "mode": "unpack", "kernel": function[1]}
        contenders["unpack"] = Local(
            partial(function[0], weight.tensors, weight.spec, dtype), device
        )
    if "peers" in wanted.sides:
        for mode in modes:
            for peer, settings in form.peers.get(mode, ()):
                row = {"side": peer, "mode": mode, "settings": settings}
                try:
                    contenders[f"{peer} {mode}"] = peers.contender(
                        peer, settings, (m, n, k), wanted.dtype
                    )
                except AbsentError as error:
                    absent.append(base | row | {"absent": str(error)})
                    continue
                told[f"{peer} {mode}"] = row
    timed = compete(contenders, wanted.rounds, "float")
    rows = []
    checks = _Checks(x, weight, bias, dtype)
    for key, numbers in timed.items():
        row = base | told[key]
        if "failed" in numbers:
            rows.append(row | {"absent": numbers["failed"]})
            continue
        row |= numbers
        row |= _shares(row, stored, dtype.itemsize, wanted.limits)
        if key == "float":
            row |= {"error": distance(functional.linear(checks.rows, dense, bias), checks.exact)}
        elif key in made:
            row |= checks.of(made[key], ours)
            row |= {"peak_bytes": peak_bytes(made[key].call)}
        rows.append(row)
    return rows + absent


NO_TRITON = "comfy_kitchen"
"""Forced, it falls back to the eager reference, never to Triton."""


def _by(ours: Ours) -> str:
    return ours.kernel.split(";")[0]


def _unpack(dispatch, spec, place: torch.device, dtype: torch.dtype):
    decision = dispatch.decide(spec, None, "dequantize", "auto", place, dtype)
    choice = decision.choice
    if decision.mode == "weight-only":
        registry = dispatch.registry
        choice = registry.choose("dequantize", dispatch.call_of(spec, place, dtype), "auto")
    return choice.implementation.function(), choice.describe()


def _shares(row: dict, stored: int, itemsize: int, limits: dict[str, float]) -> dict:
    """Bytes that must move, products, and their shares of what the device was measured at."""
    m, n, k, seconds = row["m"], row["n"], row["k"], row["us"] / 1e6
    dense = n * k * itemsize
    if row["mode"] == "unpack":
        moved, flops = stored + dense, 0
    else:
        moved = (dense if row["mode"] == "float" else stored) + (m * k + n + m * n) * itemsize
        flops = 2 * m * n * k
    found = {"bytes": moved, "gb_s": moved / seconds / 1e9, "tflop_s": flops / seconds / 1e12}
    if "copy" in limits:
        found["copy"] = found["gb_s"] / limits["copy"]
    limit = LIMIT_OF.get(row["mode"], "fp32" if row["dtype"] == "fp32" else "bf16")
    if flops and limit in limits:
        found["compute"] = found["tflop_s"] / limits[limit]
    return found


class _Checks:
    """Results on a few rows against float64 and against the eager definition."""

    def __init__(self, x: torch.Tensor, weight, bias: torch.Tensor, dtype: torch.dtype) -> None:
        noise = torch.Generator(x.device).manual_seed(2)
        shape = (CHECKED_ROWS, x.shape[1])
        self.rows = torch.randn(shape, generator=noise, device=x.device).to(dtype)
        if x.shape[0] < 32:
            self.rows = self.rows[: x.shape[0]]
        self.exact = torch.cat(
            [
                self.rows.double() @ part.double().t()
                for part in weight.dequantize(torch.float32).split(2048)
            ],
            dim=1,
        )
        self.exact += bias.double()

    def of(self, one: Ours, ours: Callable[[str, str], Ours]) -> dict:
        """Errors of one of our kernels."""
        eager = ours(one.mode, "reference").product(self.rows)
        return compared(one.product(self.rows), eager, self.exact, one.mode)


def distance(y: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative, in norm; NaN stays NaN."""
    return float((y.double() - exact.double()).norm() / exact.double().norm())


def compared(y: torch.Tensor, eager: torch.Tensor, exact: torch.Tensor, mode: str) -> dict:
    """``error``, ``differs`` and, where it is, ``wrong`` of a result.

    Args:
        y: The result.
        eager: By the definition.
        exact: With the exact weight and activations, float64.
        mode: The loader's matmul.
    """
    error, differs = distance(y, exact), distance(y, eager)
    right = differs <= WRONG[mode] or error <= SLACK * distance(eager, exact)
    told = {"error": error, "differs": differs}
    return told if right and y.dtype == eager.dtype else told | {"wrong": True}
