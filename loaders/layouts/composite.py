"""One layout for every weight of this pack: parts in one buffer, told by a tensor-free spec.

Storage of a ``QuantizedTensor`` with ``LowBitCompositeLayout``:

=================  ==========================  ==========================================
``qdata``          uint8, ``[nbytes]``         every tensor of every part, each at an
                                               offset of a multiple of 256 bytes
``Params.scale``   float32, ``[1]``            a dummy that the host's base class wants
``Params.spec``    :class:`CompositeSpec`      part names, axis, formats, shapes, offsets
=================  ==========================  ==========================================

A weight that the host's model keeps fused (``qkv``, ``linear1``) may come from parts of different
formats; they stand side by side along the rows (``axis`` 0) or the columns (``axis`` 1, a K-split
whose products are summed), each exactly as its file had it. One buffer, because the host streams a
weight as the flat list of its tensors and cannot see inside nested ones; 256 bytes, because kernels
want their operands aligned and views need whole elements.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from comfy_kitchen.tensor.base import (
    BaseLayoutParams,
    QuantizedLayout,
    QuantizedTensor,
    dequantize_args,
    register_layout_class,
    register_layout_op,
)

from ...kernels import reference
from ...kernels.spec import WeightSpec
from ...quant.dtypes import get_format
from ...quant.weight import QuantizedWeight, requantize_like

__all__ = [
    "FORMAT",
    "LAYOUT",
    "STORED",
    "CompositeSpec",
    "LowBitCompositeLayout",
    "PartSpec",
    "Slot",
    "build",
    "from_json",
    "marker",
    "part_tensors",
    "to_json",
]

FORMAT = "lowbit_composite"
LAYOUT = "LowBitCompositeLayout"
ALIGNMENT = 256
STORED = torch.float8_e4m3fn
"""Dtype that a buffer of bytes has in state dicts and files."""

_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.uint8,
        torch.int8,
        torch.int16,
        torch.uint16,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
        torch.float8_e4m3fnuz,
        torch.float8_e5m2fnuz,
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.float64,
    )
}


@dataclass(frozen=True)
class Slot:
    """Where one tensor of a part lies: ``buffer[offset : offset + bytes]``."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class PartSpec:
    """One part: the name its file gives it, its format, its slots, and the matmul it asks for."""

    name: str
    weight: WeightSpec
    slots: tuple[Slot, ...]
    wish: str | None = None

    @property
    def scaled(self) -> bool:
        """False for an unquantized part."""
        return any(slot.name in ("scale", "levels") for slot in self.slots)


@dataclass(frozen=True)
class CompositeSpec:
    """The parts of a weight and the axis they are joined along."""

    axis: int
    parts: tuple[PartSpec, ...]
    nbytes: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape of the joined weight."""
        first = self.parts[0].weight.shape
        if len(self.parts) == 1:
            return first
        joined = list(first)
        joined[self.axis] = sum(part.weight.shape[self.axis] for part in self.parts)
        return tuple(joined)


def part_tensors(buffer: torch.Tensor, part: PartSpec) -> dict[str, torch.Tensor]:
    """Views of a part's tensors in the buffer (no copy)."""
    return {
        slot.name: buffer[slot.offset : slot.offset + slot.nbytes].view(slot.dtype).view(slot.shape)
        for slot in part.slots
    }


def build(
    parts: list[tuple[str, QuantizedWeight, str | None]], dtype: torch.dtype, axis: int = 0
) -> QuantizedTensor:
    """Copy parts into one buffer and wrap it.

    Args:
        parts: ``(name, weight, wish)`` in order; their other axes must agree.
        dtype: Compute dtype, the dtype that the host sees.
        axis: 0 joins rows, 1 joins columns.
    """
    offset = 0
    specs = []
    for name, weight, wish in parts:
        slots = []
        for key, tensor in weight.tensors.items():
            slots.append(Slot(key, tensor.dtype, tuple(tensor.shape), offset))
            offset += -(-slots[-1].nbytes // ALIGNMENT) * ALIGNMENT
        specs.append(PartSpec(name, weight.spec, tuple(slots), wish))
    spec = CompositeSpec(axis, tuple(specs), offset)
    buffer = _buffer(spec, next(iter(parts[0][1].tensors.values())).device)
    for part, (_, weight, _) in zip(spec.parts, parts, strict=True):
        for key, view in part_tensors(buffer, part).items():
            view.copy_(weight.tensors[key])
    return wrap(buffer, spec, dtype)


def _buffer(spec: CompositeSpec, device: torch.device) -> torch.Tensor:
    """Memory for a weight; the gaps are zero, so that equal weights make equal files."""
    buffer = torch.empty(spec.nbytes, dtype=torch.uint8, device=device)
    for part in spec.parts:
        for slot in part.slots:
            end = slot.offset + slot.nbytes
            buffer[end : -(-end // ALIGNMENT) * ALIGNMENT].zero_()
    return buffer


def wrap(buffer: torch.Tensor, spec: CompositeSpec, dtype: torch.dtype) -> QuantizedTensor:
    """A ``QuantizedTensor`` over an existing buffer."""
    params = LowBitCompositeLayout.Params(
        scale=torch.ones(1, dtype=torch.float32, device=buffer.device),
        orig_dtype=dtype,
        orig_shape=spec.shape,
        spec=spec,
    )
    return QuantizedTensor(buffer, LAYOUT, params)


class LowBitCompositeLayout(QuantizedLayout):
    """comfy-kitchen's layout interface over composite weights."""

    @dataclass(frozen=True)
    class Params(BaseLayoutParams):
        """``scale`` is a dummy; ``spec`` says what the buffer holds."""

        spec: CompositeSpec | None = None
        transposed: bool = False

        def _tensor_fields(self) -> list[str]:
            return ["scale"]

    @classmethod
    def quantize(
        cls,
        tensor: torch.Tensor,
        like: QuantizedTensor | None = None,
        scale=None,
        stochastic_rounding: int | None = 0,
        inplace_ops: bool = False,
        **kwargs,
    ):
        """Round a float weight anew in the format of ``like``.

        Args:
            tensor: The float weight, of ``like``'s logical shape.
            like: The weight whose parts, groups, low-rank branches and levels are kept; only the
                residual is rounded anew, with fresh scales.
            scale: Ignored: scales are recalculated.
            stochastic_rounding: Seed; 0 or None rounds to nearest.
            inplace_ops: Ignored: the input stays as it is.

        Raises:
            ValueError: Without ``like``; a float weight alone does not tell a format.
        """
        if like is None:
            raise ValueError(f"{LAYOUT} rounds a weight in the format of another: like= is missing")
        spec: CompositeSpec = like._params.spec
        buffer = _buffer(spec, tensor.device)
        start = 0
        for part in spec.parts:
            length = part.weight.shape[spec.axis]
            piece = tensor.narrow(spec.axis, start, length)
            start += length
            old = {k: v.to(tensor.device) for k, v in part_tensors(like._qdata, part).items()}
            new = requantize_like(
                piece, part.weight, old, stochastic_seed=int(stochastic_rounding or 0)
            )
            for name, view in part_tensors(buffer, part).items():
                view.copy_(new[name].reshape(view.shape))
        return buffer, dataclasses.replace(
            like._params,
            scale=like._params.scale.to(tensor.device),
            orig_dtype=tensor.dtype,
        )

    @classmethod
    def dequantize(cls, qdata: torch.Tensor, params: Params) -> torch.Tensor:
        """The float weight, in ``orig_dtype``; physical (untransposed) shape."""
        return dequantize(qdata, params.spec, params.orig_dtype)

    @classmethod
    def get_plain_tensors(cls, qtensor: QuantizedTensor) -> tuple[torch.Tensor, ...]:
        """The buffer alone: :func:`part_tensors` takes it apart."""
        return (qtensor._qdata,)

    @classmethod
    def state_dict_tensors(cls, qdata: torch.Tensor, params: Params) -> dict[str, torch.Tensor]:
        """The buffer under the weight's own name; the marker beside it tells the rest.

        Its bytes are called float8_e4m3fn here: while it saves a model that is not wholly loaded,
        the host makes a Parameter that requires gradients of every tensor, which integers cannot.
        """
        return {"": qdata.view(STORED)}

    @classmethod
    def requantize_kwargs(cls, qtensor: QuantizedTensor) -> dict[str, object]:
        return {"like": qtensor}


def dequantize(buffer: torch.Tensor, spec: CompositeSpec, dtype: torch.dtype) -> torch.Tensor:
    """Every part dequantized in float32, joined and cast to ``dtype``."""
    weights = [
        reference.dequantize(part_tensors(buffer, part), part.weight, dtype) for part in spec.parts
    ]
    return weights[0] if len(weights) == 1 else torch.cat(weights, dim=spec.axis)


register_layout_class(LAYOUT, LowBitCompositeLayout)


# --------------------------------------------------------------------- tensor-subclass dispatch
# The operations class calls kernels by itself; these serve compile, training and other callers.


@register_layout_op(torch.ops.aten.t.default, LowBitCompositeLayout)
def _t(qt, args, kwargs):
    old = qt._params
    params = dataclasses.replace(
        old,
        orig_shape=(old.orig_shape[1], old.orig_shape[0]),
        transposed=not old.transposed,
    )
    return QuantizedTensor(qt._qdata, LAYOUT, params)


def _dense(func):
    def handler(qt, args, kwargs):
        return func(*dequantize_args(args), **dequantize_args(kwargs))

    return handler


for _op in (
    torch.ops.aten.linear.default,
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
):
    register_layout_op(_op, LowBitCompositeLayout)(_dense(_op))


# ------------------------------------------------------------------------------------ on disk


def to_json(spec: CompositeSpec) -> dict:
    """The spec as plain JSON values."""
    return {
        "version": 1,
        "axis": spec.axis,
        "nbytes": spec.nbytes,
        "parts": [
            {
                "name": part.name,
                "wish": part.wish,
                "format": part.weight.format.name,
                "subnormals": part.weight.format.subnormals,
                "shape": list(part.weight.shape),
                "code_shape": list(part.weight.code_shape),
                "hadamard": part.weight.hadamard,
                "hadamard_basis": part.weight.hadamard_basis,
                "rank": part.weight.rank,
                "codebook": part.weight.codebook,
                "tensors": {
                    slot.name: [
                        str(slot.dtype).removeprefix("torch."),
                        list(slot.shape),
                        slot.offset,
                    ]
                    for slot in part.slots
                },
            }
            for part in spec.parts
        ],
    }


def from_json(data: dict) -> CompositeSpec:
    """Inverse of :func:`to_json`.

    Raises:
        KeyError, TypeError, ValueError: The values are not those of a spec.
    """
    if data["version"] != 1:
        raise ValueError(f"version {data['version']} of the composite layout, this pack reads 1")
    parts = []
    for entry in data["parts"]:
        format_ = get_format(entry["format"], subnormals=bool(entry["subnormals"]))
        weight = WeightSpec(
            format=format_,
            shape=tuple(map(int, entry["shape"])),
            code_shape=tuple(map(int, entry["code_shape"])),
            hadamard=int(entry["hadamard"]),
            hadamard_basis=int(entry["hadamard_basis"]),
            rank=int(entry["rank"]),
            codebook=bool(entry["codebook"]),
        )
        slots = tuple(
            Slot(name, _DTYPES[dtype], tuple(map(int, shape)), int(offset))
            for name, (dtype, shape, offset) in entry["tensors"].items()
        )
        wish = entry["wish"]
        parts.append(
            PartSpec(str(entry["name"]), weight, slots, None if wish is None else str(wish))
        )
    spec = CompositeSpec(int(data["axis"]), tuple(parts), int(data["nbytes"]))
    for part in parts:
        for slot in part.slots:
            if slot.offset % ALIGNMENT or slot.offset + slot.nbytes > spec.nbytes:
                raise ValueError(f"{part.name}.{slot.name} lies outside the buffer or unaligned")
    return spec


@lru_cache(maxsize=4096)
def marker(spec: CompositeSpec) -> torch.Tensor:
    """The ``comfy_quant`` tensor of a layer: JSON as uint8."""
    text = json.dumps({"format": FORMAT, "spec": to_json(spec)}, separators=(",", ":"))
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
