"""What all kernels share: how they become torch operators, and arithmetic that is right everywhere.

Triton's interpreter, which runs the kernels where there is no GPU, does bfloat16 arithmetic on bit
patterns, truncates float32 to bfloat16 and rounds float32 to float8 wrongly. Kernels therefore
widen bfloat16 by `widen` before they calculate with it, and round by `narrow`; on a device both
are the plain thing. Neither these nor kernels use libdevice, which is not on every target.
"""

from __future__ import annotations

import functools
import inspect
import types
import typing
from collections.abc import Callable

import torch
import triton
import triton.language as tl

__all__ = ["INTERPRETED", "narrow", "operation", "round_even", "widen"]

NAMESPACE = "lowbit"


# ------------------------------------------------------------------------------ torch operators


def operation(name: str, *, fake: Callable, mutates: tuple[str, ...] = ()) -> Callable:
    """Make a launcher of kernels a torch operator for torch.compile, and leave it fast otherwise.

    The launcher takes and returns flat values that a torch schema knows (tensors, None for an
    optional one, ints, floats, bools, strings, dtypes, lists of these), all annotated. Its outputs
    are tensors of their own. Called eagerly it is called as it is: an operator's way through the
    dispatcher takes longer than a small kernel. Under torch.compile ``torch.ops.lowbit.<name>``
    stands in the graph instead, whole and not looked into. Kernels are launched on the device of
    the tensors: Triton itself takes the current one.

    Args:
        name: Of the operator.
        fake: The launcher's signature; gives empty tensors as the launcher would.
        mutates: Names of the arguments that the launcher writes to.
    """

    def decorate(launcher: Callable) -> Callable:
        @functools.wraps(launcher)
        def implementation(*args, **kwargs):
            device = _other_device(args)
            if device is None:
                return launcher(*args, **kwargs)
            with getattr(torch, device.type).device(device):
                return launcher(*args, **kwargs)

        implementation.__signature__ = _plain_signature(launcher)
        operator = torch.library.custom_op(
            f"{NAMESPACE}::{name}", implementation, mutates_args=mutates
        )
        operator.register_fake(fake)
        overload = getattr(getattr(torch.ops, NAMESPACE), name).default

        @functools.wraps(launcher)
        def call(*args, **kwargs):
            if torch.compiler.is_compiling():
                return overload(*args, **kwargs)
            return implementation(*args, **kwargs)

        call.operator = overload
        return call

    return decorate


def _other_device(args: tuple) -> torch.device | None:
    """The device of the first tensor, if it is a GPU and not the current one."""
    for value in args:
        if isinstance(value, torch.Tensor):
            device = value.device
            if device.type in ("cuda", "xpu"):
                current = getattr(torch, device.type).current_device()
                return None if device.index == current else device
            return None
    return None


def _plain_signature(function: Callable) -> inspect.Signature:
    """The signature with the annotations that torch makes schemas from: types, not strings."""
    hints = typing.get_type_hints(function)
    signature = inspect.signature(function)
    parameters = [
        parameter.replace(annotation=_plain_type(hints[name]))
        for name, parameter in signature.parameters.items()
    ]
    return signature.replace(parameters=parameters, return_annotation=_plain_type(hints["return"]))


def _plain_type(annotation):
    if isinstance(annotation, types.UnionType):
        return typing.Union[tuple(map(_plain_type, typing.get_args(annotation)))]  # noqa: UP007
    origin = typing.get_origin(annotation)
    if origin in (list, tuple):
        generic = typing.List if origin is list else typing.Tuple  # noqa: UP006
        return generic[tuple(map(_plain_type, typing.get_args(annotation)))]
    return annotation


# --------------------------------------------------------------------------------- in kernels


@triton.jit
def _probe():
    pass


INTERPRETED = tl.constexpr(not isinstance(_probe, triton.JITFunction))
"""Whether kernels of this process run in Triton's interpreter; a constant inside kernels."""


@triton.jit
def widen(x):
    """Operands as they are; in the interpreter bfloat16 as float32, which holds it exactly."""
    if INTERPRETED:
        if x.dtype == tl.bfloat16:
            return x.to(tl.float32)
        else:
            return x
    else:
        return x


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """float32 rounded to a float dtype, ties to even; what float8_e4m3fn cannot hold saturates."""
    if dtype == tl.float8e4nv:
        # A conversion of its own saturates on some devices only; not-a-number stays one.
        x = tl.where(x != x, x, tl.minimum(tl.maximum(x, -448.0), 448.0))
    if INTERPRETED:
        if dtype == tl.bfloat16:
            bits = x.to(tl.uint32, bitcast=True)
            rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
            rounded = tl.where(x != x, 0x7FC0, rounded)
            return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
        elif dtype == tl.float8e4nv:
            bits = x.to(tl.uint32, bitcast=True)
            size = bits & 0x7FFFFFFF
            normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
            small = round_even(tl.abs(x) * 512.0).to(tl.uint32)
            code = tl.where(size < 0x3C800000, small, normal)  # 2^-6
            code = tl.where(x != x, 0x7F, code) | ((bits >> 24) & 0x80)
            return code.to(tl.uint8).to(tl.float8e4nv, bitcast=True)
        else:
            return x.to(dtype)
    else:
        return x.to(dtype)


@triton.jit
def round_even(x):
    """float32 below 2^22 to whole numbers, ties to even."""
    return (x + 12582912.0) - 12582912.0
