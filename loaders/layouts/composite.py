"""One layout for every weight of this pack: parts in one buffer, told by a tensor-free spec.

Storage of a ``QuantizedTensor`` with ``LowBitCompositeLayout``, of one part (``spec.split``):

=================  ==========================  ==========================================
``qdata``          uint8, ``[nbytes]``         the codes as the file has them, usually a
                                               window on the memory-mapped file
``Params.scale``   uint8, ``[side_nbytes]``    every other tensor, each at an offset of a
                                               multiple of 256 bytes
``Params.spec``    :class:`CompositeSpec`      part names, axis, formats, shapes, offsets
=================  ==========================  ==========================================

and of several parts: ``qdata`` holds every tensor of every part in the same way, and ``scale`` is a
dummy of one byte.

A weight that the host's model keeps fused (``qkv``, ``linear1``) may come from parts of different
formats; they stand side by side along the rows (``axis`` 0) or the columns (``axis`` 1, a K-split
whose products are summed), each exactly as its file had it. One buffer, because the host streams a
weight as the flat list of its tensors and cannot see inside nested ones; 256 bytes, because kernels
want their operands aligned and views need whole elements. One part needs no copy of its codes: they
stay in the file's pages, which the system may drop and read again.
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
    "side_of",
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
    """Where one tensor of a part lies: ``offset : offset + bytes`` of the buffer or the side."""

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
    side_nbytes: int = 0

    @property
    def split(self) -> bool:
        """One part, whose codes are ``qdata`` and whose other tensors are ``Params.scale``."""
        return len(self.parts) == 1

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape of the joined weight."""
        first = self.parts[0].weight.shape
        if len(self.parts) == 1:
            return first
        joined = list(first)
        joined[self.axis] = sum(part.weight.shape[self.axis] for part in self.parts)
        return tuple(joined)


def part_tensors(
    buffer: torch.Tensor, part: PartSpec, side: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """Views of a part's tensors (no copy).

    Args:
        buffer: ``qdata``.
        part: Which of its parts.
        side: ``Params.scale`` of a weight of one part, None for one of several.
    """
    found = {}
    for slot in part.slots:
        held = buffer if side is None or slot.name == "codes" else side
        found[slot.name] = (
            held[slot.offset : slot.offset + slot.nbytes].view(slot.dtype).view(slot.shape)
        )
    return found


def side_of(params: LowBitCompositeLayout.Params) -> torch.Tensor | None:
    """The tensors beside the codes of a weight of one part; None for one of several."""
    return params.scale if params.spec.split else None


def build(
    parts: list[tuple[str, QuantizedWeight, str | None]], dtype: torch.dtype, axis: int = 0
) -> QuantizedTensor:
    """Wrap one part around its codes, or copy several into one buffer.

    Args:
        parts: ``(name, weight, wish)`` in order; their other axes must agree.
        dtype: Compute dtype, the dtype that the host sees.
        axis: 0 joins rows, 1 joins columns.
    """
    spec = _layout(parts, axis)
    if spec.split:
        weight = parts[0][1]
        codes = weight.tensors["codes"].contiguous().reshape(-1).view(torch.uint8)
        side = _zeros_between(
            spec, torch.empty(spec.side_nbytes, dtype=torch.uint8, device=codes.device)
        )
        for key, view in part_tensors(codes, spec.parts[0], side).items():
            if key != "codes":
                view.copy_(weight.tensors[key])
        return wrap(codes, spec, dtype, side)
    device = next(iter(parts[0][1].tensors.values())).device
    buffer, _ = _allocate(spec, device)
    for part, (_, weight, _) in zip(spec.parts, parts, strict=True):
        for key, view in part_tensors(buffer, part).items():
            view.copy_(weight.tensors[key])
    return wrap(buffer, spec, dtype)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _layout(parts: list[tuple[str, QuantizedWeight, str | None]], axis: int) -> CompositeSpec:
    """Where every tensor of the parts will lie."""
    split = len(parts) == 1
    offset, codes_bytes = 0, 0
    specs = []
    for name, weight, wish in parts:
        slots = []
        for key, tensor in weight.tensors.items():
            if split and key == "codes":
                slots.append(Slot(key, tensor.dtype, tuple(tensor.shape), 0))
                codes_bytes = slots[-1].nbytes
                continue
            slots.append(Slot(key, tensor.dtype, tuple(tensor.shape), offset))
            offset += _aligned(slots[-1].nbytes)
        specs.append(PartSpec(name, weight.spec, tuple(slots), wish))
    if split:
        return CompositeSpec(axis, tuple(specs), codes_bytes, max(offset, 1))
    return CompositeSpec(axis, tuple(specs), offset)


def _allocate(
    spec: CompositeSpec, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Memory for a weight: buffer, and side for one part."""
    buffer = torch.empty(spec.nbytes, dtype=torch.uint8, device=device)
    if not spec.split:
        return _zeros_between(spec, buffer), None
    side = torch.empty(spec.side_nbytes, dtype=torch.uint8, device=device)
    return buffer, _zeros_between(spec, side)


def _zeros_between(spec: CompositeSpec, buffer: torch.Tensor) -> torch.Tensor:
    """Zero the gaps between tensors, so that equal weights make equal files."""
    if spec.split and len(spec.parts[0].slots) == 1:
        buffer.zero_()
    for part in spec.parts:
        for slot in part.slots:
            if not (spec.split and slot.name == "codes"):
                end = slot.offset + slot.nbytes
                buffer[end : _aligned(end)].zero_()
    return buffer


def wrap(
    buffer: torch.Tensor,
    spec: CompositeSpec,
    dtype: torch.dtype,
    side: torch.Tensor | None = None,
) -> QuantizedTensor:
    """A ``QuantizedTensor`` over existing memory; ``side`` goes with a weight of one part."""
    if side is None:
        side = torch.zeros(1, dtype=torch.uint8, device=buffer.device)
    params = LowBitCompositeLayout.Params(
        scale=side, orig_dtype=dtype, orig_shape=spec.shape, spec=spec
    )
    return QuantizedTensor(buffer, LAYOUT, params)


class LowBitCompositeLayout(QuantizedLayout):
    """comfy-kitchen's layout interface over composite weights."""

    @dataclass(frozen=True)
    class Params(BaseLayoutParams):
        """``scale`` is what lies beside the codes; ``spec`` says where everything is."""

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
        buffer, side = _allocate(spec, tensor.device)
        start = 0
        for part in spec.parts:
            length = part.weight.shape[spec.axis]
            piece = tensor.narrow(spec.axis, start, length)
            start += length
            held = part_tensors(like._qdata, part, side_of(like._params))
            old = {key: value.to(tensor.device) for key, value in held.items()}
            new = requantize_like(
                piece, part.weight, old, stochastic_seed=int(stochastic_rounding or 0)
            )
            for name, view in part_tensors(buffer, part, side).items():
                view.copy_(new[name].reshape(view.shape))
        scale = like._params.scale.to(tensor.device) if side is None else side
        return buffer, dataclasses.replace(like._params, scale=scale, orig_dtype=tensor.dtype)

    @classmethod
    def dequantize(cls, qdata: torch.Tensor, params: Params) -> torch.Tensor:
        """The float weight, in ``orig_dtype``; physical (untransposed) shape."""
        return dequantize(qdata, params.spec, params.orig_dtype, side_of(params))

    @classmethod
    def get_plain_tensors(cls, qtensor: QuantizedTensor) -> tuple[torch.Tensor, ...]:
        """Codes or buffer, and side: :func:`part_tensors` takes them apart."""
        return (qtensor._qdata, qtensor._params.scale)

    @classmethod
    def state_dict_tensors(cls, qdata: torch.Tensor, params: Params) -> dict[str, torch.Tensor]:
        """The codes or buffer under the weight's own name, and the side; the marker tells the rest.

        Its bytes are called float8_e4m3fn here: while it saves a model that is not wholly loaded,
        the host makes a Parameter that requires gradients of every tensor, which integers cannot.
        """
        tensors = {"": qdata.view(STORED)}
        if params.spec.split:
            tensors["_side"] = params.scale.view(STORED)
        return tensors

    @classmethod
    def requantize_kwargs(cls, qtensor: QuantizedTensor) -> dict[str, object]:
        return {"like": qtensor}


def dequantize(
    buffer: torch.Tensor,
    spec: CompositeSpec,
    dtype: torch.dtype,
    side: torch.Tensor | None = None,
) -> torch.Tensor:
    """Every part dequantized in float32, joined and cast to ``dtype``."""
    weights = [
        reference.dequantize(part_tensors(buffer, part, side), part.weight, dtype)
        for part in spec.parts
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
        "side_nbytes": spec.side_nbytes,
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
    spec = CompositeSpec(
        int(data["axis"]), tuple(parts), int(data["nbytes"]), int(data["side_nbytes"])
    )
    for part in parts:
        for slot in part.slots:
            beside = spec.split and slot.name != "codes"
            room = spec.side_nbytes if beside else spec.nbytes
            if slot.offset % ALIGNMENT or slot.offset + slot.nbytes > room:
                raise ValueError(f"{part.name}.{slot.name} lies outside the buffer or unaligned")
    return spec


@lru_cache(maxsize=4096)
def marker(spec: CompositeSpec) -> torch.Tensor:
    """The ``comfy_quant`` tensor of a layer: JSON as uint8."""
    text = json.dumps({"format": FORMAT, "spec": to_json(spec)}, separators=(",", ":"))
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
