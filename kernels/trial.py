"""A small random problem that tells whether a kernel is right on this device.

The problem is cut from a real weight: the same format, groups, rotation, branch and dtypes, fewer
rows and columns. A kernel passes where it gives what the reference gives, or is as near to the
product with the exact weight: a kernel may round a weight otherwise than the reference does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import reference
from .spec import WeightSpec

__all__ = ["TRIAL_ROWS", "Trial"]

TRIAL_ROWS = (3, 2100)
"""Rows of the activations of a trial: of a modulation layer, and as many as make whole tiles."""

_OUTPUTS, _INPUTS = 128, 256  # about the size of a trial's weight
_STEP = 64
_SLACK = 1.25  # of a kernel's error over that of the reference
_NEAR = 1e-4  # what float32 sums in another order may differ by, and more


@dataclass(frozen=True)
class Trial:
    """What to try kernels with.

    Attributes:
        spec: Of the weight that asks.
        layout: ``((tensor's name, dtype, shape), ...)`` of that weight.
        device: Where to try.
        dtype: Of activations and results.
        rows: As TRIAL_ROWS.
    """

    spec: WeightSpec
    layout: tuple[tuple[str, torch.dtype, tuple[int, ...]], ...]
    device: torch.device
    dtype: torch.dtype
    rows: tuple[int, ...] = TRIAL_ROWS

    @property
    def problem(self) -> tuple:
        """What weights have in common that need only one trial."""
        spec, layout = self._small()
        return spec, layout, self.dtype

    def _small(self) -> tuple[WeightSpec, tuple]:
        spec = self.spec
        outputs, inputs = spec.shape[0], spec.columns
        grouped = len(spec.code_shape) > len(spec.shape)
        group = spec.code_shape[2] if grouped else 1
        step = math.lcm(group, max(spec.hadamard, 1), 1 if grouped else _STEP)
        columns = -(-_INPUTS // step) * step + (0 if grouped else inputs % _STEP)
        columns = min(columns, inputs)
        rows = min(_OUTPUTS + outputs % _STEP, outputs)
        code_shape = (rows, columns // group, group) if grouped else (rows, columns)
        small = replace(spec, shape=(rows, columns), code_shape=code_shape)
        layout = []
        for name, dtype, shape in self.layout:
            if name == "codes":
                shape = code_shape if len(shape) > 1 else (-1,)
            elif name == "smooth":
                shape = (columns,)
            elif name == "svd_down":
                shape = (spec.rank, columns)
            elif name == "svd_up":
                shape = (rows, spec.rank)
            elif name == "shift_bias":
                shape = (rows,)
            elif name not in ("input_scale", "input_offset"):
                full = (rows, *code_shape[1:])
                old = (outputs, *spec.code_shape[1:])
                shape = tuple(
                    n if n == 1 or n != was else now
                    for n, was, now in zip(shape, old, full, strict=True)
                )
            layout.append((name, dtype, shape))
        return small, tuple(layout)

    def why_wrong(self, kernel: Callable, definition: Callable, operation: str) -> str | None:
        """None where the kernel is right, else what is wrong with it.

        Args:
            kernel: To try.
            definition: The operation's reference.
            operation: Its name.
        """
        try:
            with torch.inference_mode(False), torch.no_grad():
                return self._why_wrong(kernel, definition, operation)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # compilers fail in many ways
            first = next(iter(str(error).strip().splitlines()), "")
            return f"{type(error).__name__}: {first[:200]}"

    def _why_wrong(self, kernel: Callable, definition: Callable, operation: str) -> str | None:
        spec, layout = self._small()
        noise = torch.Generator().manual_seed(0)
        tensors = random_tensors(spec, layout, noise)
        tensors = {name: tensor.to(self.device) for name, tensor in tensors.items()}
        exact = reference.dequantize(tensors, spec, torch.float32)
        if operation == "dequantize":
            found = kernel(tensors, spec, self.dtype)
            wanted = definition(tensors, spec, self.dtype)
            return self._compare(found, wanted, exact, "")
        bias = torch.randn(spec.rows, generator=noise).to(self.device, self.dtype)
        for rows in self.rows:
            x = torch.randn(rows, spec.columns, generator=noise).to(self.device, self.dtype)
            product = torch.nn.functional.linear(x.float(), exact, bias.float())
            wanted = definition(x, tensors, spec, bias)
            found = kernel(x, tensors, spec, bias)
            reason = self._compare(found, wanted, product, f" for {rows} rows")
            if reason is not None:
                return reason
        return None

    def _compare(self, found: Tensor, wanted: Tensor, exact: Tensor, what: str) -> str | None:
        if found.shape != wanted.shape or found.dtype != wanted.dtype:
            return f"gives {found.dtype} {tuple(found.shape)}{what}"
        size = exact.norm()
        near = max(torch.finfo(self.dtype).eps, _NEAR)
        error = float((found.float() - exact).norm() / size)
        bound = _SLACK * float((wanted.float() - exact).norm() / size) + near
        if error <= bound or float((found.float() - wanted.float()).norm() / size) <= near:
            return None
        return f"is wrong{what}: its relative error is {error:.2g}, at most {bound:.2g} is right"


def random_tensors(
    spec: WeightSpec,
    layout: tuple[tuple[str, torch.dtype, tuple[int, ...]], ...],
    noise: torch.Generator,
) -> dict[str, Tensor]:
    """Tensors of a weight in normal form with every code that its format has, on the CPU."""
    fmt = spec.format
    found: dict[str, Tensor] = {}
    for name, dtype, shape in layout:
        if name == "codes":
            found[name] = _codes(spec, dtype, shape, noise)
        elif name in ("scale", "scale_2"):
            # Powers between 1/4 and 4, so that narrow dtypes hold them.
            value = torch.exp2(torch.rand(shape, generator=noise) * 4 - 2)
            if name == "scale":
                value = value / max(abs(fmt.qmax), 1)
            found[name] = value.to(dtype)
        elif name == "levels":
            found[name] = torch.randn(shape, generator=noise).to(dtype)
        elif name == "smooth":
            found[name] = torch.exp2(torch.rand(shape, generator=noise) * 2 - 1).to(dtype)
        elif name == "input_scale":
            found[name] = torch.full(shape, 4 / _largest_activation(spec)).to(dtype)
        elif name == "input_offset":
            found[name] = torch.full(shape, 3.0).to(dtype)
        elif name != "shift_bias":  # zero_point, svd_up, svd_down
            found[name] = (torch.randn(shape, generator=noise) / 4).to(dtype)
    for name, dtype, _ in layout:
        if name == "shift_bias":
            weight = reference.plain_weight(found, spec)
            found[name] = (weight.sum(dim=1) * spec.activation.shift).to(dtype)
    return found


def _largest_activation(spec: WeightSpec) -> float:
    from .faithful import ACTIVATIONS

    return 1.0 if spec.activation is None else ACTIVATIONS[spec.activation.format].largest


def _codes(spec: WeightSpec, dtype: torch.dtype, shape: tuple, noise: torch.Generator) -> Tensor:
    fmt = spec.format
    count = fmt.storage_numel(spec.numel) if fmt.packed else spec.numel
    if dtype.is_floating_point:
        codes = torch.randn(count, generator=noise).to(dtype)
    elif fmt.packed:
        raw = torch.randint(0, 256, (count * dtype.itemsize,), generator=noise, dtype=torch.uint8)
        codes = raw.view(dtype)
    else:
        low = -(1 << (fmt.bits - 1)) if fmt.kind == "int" else 0
        codes = torch.randint(low, low + (1 << fmt.bits), (count,), generator=noise)
        codes = codes.to(torch.int32).to(dtype)
    return codes if shape == (-1,) else codes.view(shape)
