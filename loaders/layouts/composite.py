"""One layout for every weight of this pack: parts side by side, told by a tensor-free spec.

Storage of a ``QuantizedTensor`` with ``LowBitCompositeLayout``:

======================  =====================  ===============================================
``qdata``               uint8, ``[n]``         the codes of the first part as the file has them,
                                               usually a window on the memory-mapped file
``Params.codes_1`` …    uint8, ``[n]``         the codes of the further parts
``Params.scale``        uint8, ``[side]``      every other tensor of every part, each at an offset
                                               of a multiple of 256 bytes
``Params.spec``         :class:`CompositeSpec` part names, axis, formats, shapes, offsets
======================  =====================  ===============================================

A weight that the host's model keeps fused (``qkv``, ``linear1``) may come from parts of different
formats; they stand side by side along the rows (``axis`` 0) or the columns (``axis`` 1, a K-split
whose products are summed), each exactly as its file had it. Codes need no copy: they stay in the
file's pages, which the system may drop and read again. What lies beside them shares one tensor,
because the host streams a weight as the flat list of its tensors and pays for each; 256 bytes,
because kernels want their operands aligned and views need whole elements.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

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
from ...kernels.spec import SMOOTHINGS, ActivationSpec, WeightSpec
from ...quant.dtypes import get_format
from ...quant.errors import LowBitError
from ...quant.weight import QuantizedWeight, requantize_like

__all__ = [
    "BESIDE",
    "CODES",
    "FORMAT",
    "LAYOUT",
    "STORED",
    "CompositeSpec",
    "Held",
    "LowBitCompositeLayout",
    "PartSpec",
    "Slot",
    "build",
    "from_json",
    "held_by",
    "marker",
    "part_tensors",
    "parts_of",
    "to_json",
]

FORMAT = "lowbit_composite"
LAYOUT = "LowBitCompositeLayout"
ALIGNMENT = 256
MAX_PARTS = 8
CODES = tuple(f"codes_{number}" for number in range(1, MAX_PARTS))
"""Fields of Params for the codes of the parts after the first."""
BESIDE = ("side", *CODES)
"""What a state dict holds beside ``X.weight``: ``X.weight_side``, ``X.weight_codes_1`` …"""
STORED = torch.float8_e4m3fn
"""Dtype that a buffer of bytes has in state dicts and files."""

_DTYPES = {
    name: getattr(torch, name)
    for name in (
        "uint8",
        "int8",
        "int16",
        "uint16",
        "float8_e4m3fn",
        "float8_e5m2",
        "float8_e4m3fnuz",
        "float8_e5m2fnuz",
        "float8_e8m0fnu",
        "float16",
        "bfloat16",
        "float32",
        "float64",
    )
    if hasattr(torch, name)
}


@dataclass(frozen=True)
class Slot:
    """Where one tensor of a part lies: ``offset : offset + bytes`` of its codes or of the side."""

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

    @property
    def code_bytes(self) -> int:
        """Bytes of its codes."""
        return next(slot.nbytes for slot in self.slots if slot.name == "codes")


@dataclass(frozen=True)
class CompositeSpec:
    """The parts of a weight and the axis they are joined along."""

    axis: int
    parts: tuple[PartSpec, ...]
    side_nbytes: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape of the joined weight."""
        first = self.parts[0].weight.shape
        if len(self.parts) == 1:
            return first
        joined = list(first)
        joined[self.axis] = sum(part.weight.shape[self.axis] for part in self.parts)
        return tuple(joined)


class Held(NamedTuple):
    """The memory of a weight: codes of each part and what lies beside them, uint8."""

    codes: tuple[torch.Tensor, ...]
    side: torch.Tensor


def held_by(weight: QuantizedTensor) -> Held:
    """The memory of a composite weight (no copy)."""
    return _held(weight._qdata, weight._params)


def _held(qdata: torch.Tensor, params: LowBitCompositeLayout.Params) -> Held:
    more = (getattr(params, name) for name in CODES[: len(params.spec.parts) - 1])
    return Held((qdata, *more), params.scale)


def part_tensors(held: Held, spec: CompositeSpec, number: int) -> dict[str, torch.Tensor]:
    """Views of the tensors of part ``number`` (no copy)."""
    found = {}
    for slot in spec.parts[number].slots:
        memory = held.codes[number] if slot.name == "codes" else held.side
        found[slot.name] = (
            memory[slot.offset : slot.offset + slot.nbytes].view(slot.dtype).view(slot.shape)
        )
    return found


def parts_of(weight: QuantizedTensor) -> list[tuple[str, QuantizedWeight, str | None]]:
    """``(name, weight, wish)`` of each part of a composite weight (no copy)."""
    spec, held = weight._params.spec, held_by(weight)
    return [
        (part.name, QuantizedWeight(part.weight, part_tensors(held, spec, number)), part.wish)
        for number, part in enumerate(spec.parts)
    ]


def build(
    parts: list[tuple[str, QuantizedWeight, str | None]], dtype: torch.dtype, axis: int = 0
) -> QuantizedTensor:
    """Wrap a weight around the codes of its parts; what lies beside them is copied together.

    Args:
        parts: ``(name, weight, wish)`` in order; their other axes must agree.
        dtype: Compute dtype, the dtype that the host sees.
        axis: 0 joins rows, 1 joins columns.

    Raises:
        LowBitError: More than ``MAX_PARTS`` parts.
    """
    if len(parts) > MAX_PARTS:
        raise LowBitError(
            "A layer would have to be joined from too many parts.",
            found=f"{len(parts)} parts: " + ", ".join(name for name, _, _ in parts),
            expected=f"at most {MAX_PARTS}",
            remedy="Please report the checkpoint's name.",
        )
    spec = _layout(parts, axis)
    codes = tuple(
        weight.tensors["codes"].contiguous().reshape(-1).view(torch.uint8) for _, weight, _ in parts
    )
    held = Held(codes, _new_side(spec, codes[0].device))
    for number, (_, weight, _) in enumerate(parts):
        for key, view in part_tensors(held, spec, number).items():
            if key != "codes":
                view.copy_(weight.tensors[key])
    return wrap(held, spec, dtype)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _layout(parts: list[tuple[str, QuantizedWeight, str | None]], axis: int) -> CompositeSpec:
    """Where every tensor of the parts will lie."""
    offset = 0
    specs = []
    for name, weight, wish in parts:
        slots = []
        for key, tensor in weight.tensors.items():
            if key == "codes":
                slots.append(Slot(key, tensor.dtype, tuple(tensor.shape), 0))
                continue
            slots.append(Slot(key, tensor.dtype, tuple(tensor.shape), offset))
            offset += _aligned(slots[-1].nbytes)
        specs.append(PartSpec(name, weight.spec, tuple(slots), wish))
    return CompositeSpec(axis, tuple(specs), max(offset, 1))


def _new_side(spec: CompositeSpec, device: torch.device) -> torch.Tensor:
    """Memory for what lies beside the codes; gaps are zero, so that equal weights are equal files.

    A weight of codes alone has one idle byte there.
    """
    side = torch.empty(spec.side_nbytes, dtype=torch.uint8, device=device)
    slots = [slot for part in spec.parts for slot in part.slots if slot.name != "codes"]
    for slot in slots:
        end = slot.offset + slot.nbytes
        side[end : _aligned(end)].zero_()
    return side if slots else side.zero_()


def wrap(held: Held, spec: CompositeSpec, dtype: torch.dtype) -> QuantizedTensor:
    """A ``QuantizedTensor`` over existing memory."""
    first, *more = held.codes
    params = LowBitCompositeLayout.Params(
        scale=held.side,
        orig_dtype=dtype,
        orig_shape=spec.shape,
        spec=spec,
        **dict(zip(CODES, more, strict=False)),
    )
    return QuantizedTensor(first, LAYOUT, params)


class LowBitCompositeLayout(QuantizedLayout):
    """comfy-kitchen's layout interface over composite weights."""

    @dataclass(frozen=True)
    class Params(BaseLayoutParams):
        """``scale`` is what lies beside the codes; ``spec`` says where everything is."""

        spec: CompositeSpec | None = None
        transposed: bool = False
        codes_1: torch.Tensor | None = None
        codes_2: torch.Tensor | None = None
        codes_3: torch.Tensor | None = None
        codes_4: torch.Tensor | None = None
        codes_5: torch.Tensor | None = None
        codes_6: torch.Tensor | None = None
        codes_7: torch.Tensor | None = None

        def _tensor_fields(self) -> list[str]:
            return ["scale", *CODES[: len(self.spec.parts) - 1]]

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
        old = held_by(like)
        device = tensor.device
        new = Held(
            tuple(torch.empty_like(codes, device=device) for codes in old.codes),
            _new_side(spec, device),
        )
        start = 0
        for number, part in enumerate(spec.parts):
            length = part.weight.shape[spec.axis]
            piece = tensor.narrow(spec.axis, start, length)
            start += length
            held = {key: value.to(device) for key, value in part_tensors(old, spec, number).items()}
            rounded = requantize_like(
                piece, part.weight, held, stochastic_seed=int(stochastic_rounding or 0)
            )
            for name, view in part_tensors(new, spec, number).items():
                view.copy_(rounded[name].reshape(view.shape))
        made = wrap(new, spec, tensor.dtype)
        return made._qdata, dataclasses.replace(
            made._params, orig_shape=like._params.orig_shape, transposed=like._params.transposed
        )

    @classmethod
    def dequantize(cls, qdata: torch.Tensor, params: Params) -> torch.Tensor:
        """The float weight, in ``orig_dtype``; physical (untransposed) shape."""
        return dequantize(_held(qdata, params), params.spec, params.orig_dtype)

    @classmethod
    def get_plain_tensors(cls, qtensor: QuantizedTensor) -> tuple[torch.Tensor, ...]:
        """Codes of every part, then the side: :func:`part_tensors` takes them apart."""
        held = held_by(qtensor)
        return (*held.codes, held.side)

    @classmethod
    def state_dict_tensors(cls, qdata: torch.Tensor, params: Params) -> dict[str, torch.Tensor]:
        """The first codes under the weight's own name, the rest beside; the marker tells the rest.

        Their bytes are called float8_e4m3fn here: while it saves a model that is not wholly loaded,
        the host makes a Parameter that requires gradients of every tensor, which integers cannot.
        """
        held = _held(qdata, params)
        names = ("", *(f"_{name}" for name in CODES))
        tensors = dict(zip(names, held.codes, strict=False)) | {"_side": held.side}
        return {name: tensor.view(STORED) for name, tensor in tensors.items()}

    @classmethod
    def requantize_kwargs(cls, qtensor: QuantizedTensor) -> dict[str, object]:
        return {"like": qtensor}


def dequantize(held: Held, spec: CompositeSpec, dtype: torch.dtype) -> torch.Tensor:
    """Every part dequantized in float32, joined and cast to ``dtype``."""
    weights = [
        reference.dequantize(part_tensors(held, spec, number), part.weight, dtype)
        for number, part in enumerate(spec.parts)
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
        "side_nbytes": spec.side_nbytes,
        "parts": [
            {
                "name": part.name,
                "wish": part.wish,
                **_weight_to_json(part.weight),
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


def _weight_to_json(weight: WeightSpec) -> dict:
    activation = weight.activation
    return {
        "format": weight.format.name,
        "subnormals": weight.format.subnormals,
        "shape": list(weight.shape),
        "code_shape": list(weight.code_shape),
        "hadamard": weight.hadamard,
        "hadamard_basis": weight.hadamard_basis,
        "rank": weight.rank,
        "codebook": weight.codebook,
        "smoothing": weight.smoothing,
        "two_level": weight.two_level,
        "activation": None if activation is None else dataclasses.asdict(activation),
    }


def _weight_from_json(entry: dict) -> WeightSpec:
    smoothing, activation = entry["smoothing"], entry["activation"]
    if smoothing not in SMOOTHINGS:
        raise ValueError(f"smoothing {smoothing!r} is not one of {SMOOTHINGS}")
    return WeightSpec(
        format=get_format(entry["format"], subnormals=bool(entry["subnormals"])),
        shape=tuple(map(int, entry["shape"])),
        code_shape=tuple(map(int, entry["code_shape"])),
        hadamard=int(entry["hadamard"]),
        hadamard_basis=int(entry["hadamard_basis"]),
        rank=int(entry["rank"]),
        codebook=bool(entry["codebook"]),
        smoothing=smoothing,
        two_level=bool(entry["two_level"]),
        activation=None if activation is None else ActivationSpec(**activation),
    )


def from_json(data: dict) -> CompositeSpec:
    """Inverse of :func:`to_json`.

    Raises:
        KeyError, TypeError, ValueError: The values are not those of a spec.
    """
    if data["version"] != 1:
        raise ValueError(f"version {data['version']} of the composite layout, this pack reads 1")
    parts = []
    for entry in data["parts"]:
        slots = tuple(
            Slot(name, _DTYPES[dtype], tuple(map(int, shape)), int(offset))
            for name, (dtype, shape, offset) in entry["tensors"].items()
        )
        if "codes" not in entry["tensors"]:
            raise ValueError(f"{entry['name']} has no codes")
        wish = entry["wish"]
        parts.append(
            PartSpec(
                str(entry["name"]),
                _weight_from_json(entry),
                slots,
                None if wish is None else str(wish),
            )
        )
    if not 1 <= len(parts) <= MAX_PARTS:
        raise ValueError(f"{len(parts)} parts, expected 1 to {MAX_PARTS}")
    spec = CompositeSpec(int(data["axis"]), tuple(parts), int(data["side_nbytes"]))
    for part in parts:
        for slot in part.slots:
            room = part.code_bytes if slot.name == "codes" else spec.side_nbytes
            if slot.offset % ALIGNMENT or slot.offset + slot.nbytes > room:
                raise ValueError(f"{part.name}.{slot.name} lies outside its memory or unaligned")
    return spec


@lru_cache(maxsize=4096)
def marker(spec: CompositeSpec) -> torch.Tensor:
    """The ``comfy_quant`` tensor of a layer: JSON as uint8."""
    text = json.dumps({"format": FORMAT, "spec": to_json(spec)}, separators=(",", ":"))
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
