"""A plan's tensors under ComfyUI's names, layer by layer.

Codes stay memory-mapped; what must be turned is copied, one layer at a time. The parts of a fused
layer stand side by side in one composite, each in its own form. Nothing is rounded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from ..kernels.reference import dequantize
from ..kernels.spec import WeightSpec
from ..quant.dtypes import get_format
from ..quant.errors import LowBitError
from ..quant.weight import QuantizedWeight, swap_halves, take_rows
from .families import Move, Piece
from .layouts import composite
from .plan import Plan
from .schemes.lowbit import CompositeWeight

__all__ = ["Settings", "translate"]

SCALES = ("scale", "zero_point", "levels")
NATIVE = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


@dataclass(frozen=True)
class Settings:
    """What the loader's inputs ask for, as far as it touches the stored form.

    Attributes:
        dtype: Compute dtype; what the host sees as the dtype of quantized weights.
        expand: Turn every quantized Linear into dense row-wise int8, branches folded in.
        scale_dtype: Dtype that scales, zero points and levels are cast to; None leaves them.
    """

    dtype: torch.dtype
    expand: bool = False
    scale_dtype: torch.dtype | None = None


def translate(
    plan: Plan, settings: Settings
) -> Iterator[tuple[str, torch.Tensor, tuple[str, ...]]]:
    """Native tensors, one at a time.

    Yields:
        ``(native key, Tensor or QuantizedTensor, names of the source keys)``.

    Raises:
        LowBitError: A tensor cannot be read or its parts do not fit together.
    """
    _check_zeros(plan)
    read = _reader(plan)
    for move in plan.moves:
        try:
            yield move.native, _made(plan, move, settings, read), tuple(p.key for p in move.pieces)
        except LowBitError as error:
            raise error.located(file=plan.path, layer=move.pieces[0].key) from None
    for native, tensor in plan.family.extras(set(plan.entries), plan.config).items():
        yield native, tensor, ()


def _check_zeros(plan: Plan) -> None:
    """Tensors that were left out because they are zero are zero."""
    for key in sorted(plan.family.zeros(set(plan.entries), plan.config)):
        value = plan.entries[key].read()
        if value.count_nonzero():
            raise LowBitError(
                "The checkpoint holds values that ComfyUI's model has no place for.",
                file=plan.path,
                layer=key,
                found=f"values up to {value.abs().max().item():g}",
                expected=f"zeros: {plan.ignored[key]}",
                remedy="The file may be of a newer variant of the model than this pack knows: "
                "please report its name.",
            )


def _reader(plan: Plan) -> Callable[[str], torch.Tensor | QuantizedWeight]:
    """Reads tensors; one that is taken apart into several is kept until the next is read."""
    uses = Counter(piece.key for move in plan.moves for piece in move.pieces)
    kept: dict[str, torch.Tensor | QuantizedWeight] = {}

    def read(key: str) -> torch.Tensor | QuantizedWeight:
        if key in kept:
            return kept[key]
        kept.clear()
        value = plan.entries[key].read()
        if uses[key] > 1:
            kept[key] = value
        return value

    return read


def _made(plan: Plan, move: Move, settings: Settings, read: Callable) -> torch.Tensor:
    parts = [(piece, read(piece.key)) for piece in move.pieces]
    if all(isinstance(value, torch.Tensor) for _, value in parts):
        return _plain(move, [_float_piece(piece, value) for piece, value in parts])
    if len(parts) == 1 and isinstance(parts[0][1], CompositeWeight):
        piece, value = parts[0]
        if piece.rows is None and piece.op is None and not settings.expand:
            if settings.scale_dtype is None:
                return composite.wrap(value.held, value.spec, settings.dtype)
            cast = [(name, _cast(weight, settings), wish) for name, weight, wish in value.parts()]
            return composite.build(cast, settings.dtype, value.spec.axis)
    weights = [
        (piece.key.removesuffix(".weight"), _quantized_piece(piece, value, settings))
        for piece, value in parts
    ]
    if move.axis == "sum":
        raise LowBitError(
            "A quantized layer would have to be added to another one.",
            found="several quantized tensors for one native tensor",
            expected="parts that stand side by side",
            remedy="Please report the checkpoint's name.",
        )
    named = [
        (name, weight, plan.entries[piece.key].wish)
        for (name, weight), (piece, _) in zip(weights, parts, strict=True)
    ]
    return composite.build(named, settings.dtype, 1 if move.axis == "columns" else 0)


def _plain(move: Move, tensors: list[torch.Tensor]) -> torch.Tensor:
    if move.axis == "single":
        return tensors[0]
    if move.axis == "sum":
        return torch.stack([t.float() for t in tensors]).sum(0).to(tensors[0].dtype)
    return torch.cat(tensors, dim=0 if move.axis == "rows" else 1)


def _float_piece(piece: Piece, tensor: torch.Tensor) -> torch.Tensor:
    if piece.rows is not None:
        first, count = piece.rows
        tensor = tensor[first : first + count]
    if piece.op == "swap_halves":
        upper, lower = tensor.chunk(2, dim=0)
        tensor = torch.cat((lower, upper), dim=0)
    return tensor


def _quantized_piece(piece: Piece, value, settings: Settings) -> QuantizedWeight:
    """One piece in normal form, rows taken and halves swapped."""
    if isinstance(value, CompositeWeight):
        (_, weight, _), *others = value.parts()
        if others and settings.expand:
            weight = _dense(composite.dequantize(value.held, value.spec, torch.float32))
        elif others:
            raise LowBitError(
                "A saved layer of several parts cannot be taken apart again.",
                found=f"{len(value.spec.parts)} parts",
                expected="a file with ComfyUI's own names",
                remedy="Load the file as it was saved.",
            )
    elif isinstance(value, torch.Tensor):
        weight = _dense(value)
    else:
        weight = value
    weight.check()
    if piece.rows is not None:
        weight = take_rows(weight, *piece.rows)
    if piece.op == "swap_halves":
        weight = swap_halves(weight)
    if settings.expand and len(weight.spec.shape) == 2:
        weight = _expanded(weight)
    return _cast(weight, settings)


def _cast(weight: QuantizedWeight, settings: Settings) -> QuantizedWeight:
    """Scales in the dtype that the settings ask for."""
    if settings.scale_dtype is None:
        return weight
    tensors = {
        name: tensor.to(settings.scale_dtype) if name in SCALES else tensor
        for name, tensor in weight.tensors.items()
    }
    return QuantizedWeight(weight.spec, tensors)


def _dense(tensor: torch.Tensor) -> QuantizedWeight:
    """An unquantized part of a fused layer (dynamic models leave some)."""
    name = NATIVE.get(tensor.dtype)
    if name is None:
        tensor, name = tensor.to(torch.float32), "float32"
    shape = tuple(tensor.shape)
    return QuantizedWeight(
        WeightSpec(format=get_format(name), shape=shape, code_shape=shape),
        {"codes": tensor.contiguous()},
    )


def _expanded(weight: QuantizedWeight) -> QuantizedWeight:
    """Dense int8 with one scale for each row, low-rank branch and rotation folded in.

    The one mode that rounds anew: it is asked for by name, for speed on cards with room.
    """
    dense = dequantize(weight.tensors, weight.spec, torch.float32)
    scale = dense.abs().amax(dim=1, keepdim=True) / 127
    codes = (dense / scale.clamp_min(torch.finfo(torch.float32).tiny)).round_().clamp_(-127, 127)
    spec = WeightSpec(get_format("int8"), weight.spec.shape, weight.spec.shape)
    return QuantizedWeight(spec, {"codes": codes.to(torch.int8), "scale": scale})
