"""One patch of a weight as the host lists it: what it is, what it is for, and its factors."""

from __future__ import annotations

from collections.abc import Iterator

import comfy.weight_adapter
import torch
from torch import Tensor

__all__ = ["Entry", "same", "tensors_of"]

_DORA = {"lora": 4, "loha": 7, "lokr": 8, "oft": 3, "boft": 3, "glora": 5}
"""Where the weights of an adapter hold the scale of a DoRA."""
_FREE = ("lora", "loha", "lokr", "diff", "merge")
"""Kinds whose change does not depend on the weight."""
_ORTHOGONAL = ("oft", "boft")
"""Adapters whose third weight bounds their norm."""


class Entry:
    """One patch as the host lists it: ``(strength, value, strength_model, offset, function)``."""

    def __init__(self, raw: tuple):
        self.raw = raw
        self.strength, self.value, self.strength_model, self.offset, self.function = raw
        self.kind = _kind(self.value)

    @property
    def reshaped(self) -> tuple[int, ...] | None:
        """The shape that it gives the weight; None where it leaves the shape."""
        value = self.value
        if self.offset is not None or isinstance(value, list):
            return None
        if isinstance(value, comfy.weight_adapter.WeightAdapterBase):
            return value.calculate_shape(None)
        padded = self.kind == "diff" and len(value) == 2 and len(value[1]) > 1
        return tuple(value[1][0].shape) if padded and value[1][1]["pad_weight"] else None

    def silent(self, shape: tuple[int, ...]) -> bool:
        """Whether it changes nothing."""
        return (
            self.strength == 0
            and self.strength_model == 1
            and self.kind != "set"
            and self.reshaped in (None, shape)
        )

    @property
    def free(self) -> bool:
        """Whether the change it makes does not depend on the weight."""
        return self.kind in _FREE and self.strength_model == 1 and self.reshaped is None

    @property
    def traceable(self) -> bool:
        """Whether torch.compile can follow the host, which asks some tensors for a value."""
        bounded = getattr(self.value, "name", "") in _ORTHOGONAL
        return not bounded or self.value.weights[2] is None

    def target(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the piece of the weight that it is for."""
        if self.offset is None:
            return shape
        dim, _, length = self.offset
        return (*shape[:dim], length, *shape[dim + 1 :])

    def is_product(self, shape: tuple[int, ...]) -> bool:
        """Whether the change is a product of two factors and nothing else."""
        return (
            type(self.value) is comfy.weight_adapter.LoRAAdapter
            and self.kind == "lora"
            and self.free
            and self.function is None
            and (self.offset is None or self.offset[0] < len(shape[:2]))
        )

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a LoRA or a difference has the size of its target; the host skips others."""
        rows, *rest = self.target(shape)
        numel = rows * torch.Size(rest).numel()
        if self.reshaped is not None or self.function is not None:
            return True
        if self.strength == 0:  # only scales the weight, and may hold no tensor at all
            return True
        if self.kind == "diff":
            value = self.value[1] if len(self.value) == 2 else self.value
            return tuple(value[0].shape) == (rows, *rest)
        if type(self.value) is comfy.weight_adapter.LoRAAdapter:
            up, down, mid = self.value.weights[0], self.value.weights[1], self.value.weights[3]
            wide = down[0].numel() if mid is None else down[0].numel() * mid[0, 0].numel()
            inner = down.shape[0] if mid is None else mid.shape[0]
            return up[0].numel() == inner and up.shape[0] * wide == numel and up.shape[0] == rows
        return True

    def factors(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """``up [rows, r]`` with every strength in it, ``down [r, ...]``; float32."""
        up, down, alpha, mid = (
            part.to(device=device, dtype=torch.float32) if isinstance(part, Tensor) else part
            for part in self.value.weights[:4]
        )
        scale = self.strength * (1.0 if alpha is None else alpha / down.shape[0])
        up = up.flatten(1)
        if mid is not None:
            down = torch.einsum("jc,ij...->ic...", down.flatten(1), mid)
        return up * scale, down.flatten(1)

    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(tensor.nbytes for tensor in tensors_of(self.value))

    @property
    def rank(self) -> int:
        up = self.value.weights[0]
        return up[0].numel()


def _kind(value) -> str:
    if isinstance(value, list):
        return "merge"
    if isinstance(value, comfy.weight_adapter.WeightAdapterBase):
        at = _DORA.get(value.name)
        if at is not None and len(value.weights) > at and value.weights[at] is not None:
            return "dora"
        return value.name
    return "diff" if len(value) == 1 else value[0]


def tensors_of(value) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, comfy.weight_adapter.WeightAdapterBase):
        yield from tensors_of(value.weights)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_of(item)


def same(one: tuple, other: tuple) -> bool:
    """Whether two patches are one, though a hook may have written its strength anew."""
    return all(
        mine is theirs or (index in (0, 2, 3) and mine == theirs)
        for index, (mine, theirs) in enumerate(zip(one, other, strict=True))
    )
