"""The patches of one weight, and the products that carry them beside it."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import comfy.lora
import comfy.utils
import comfy.weight_adapter
import torch
from comfy.quant_ops import QuantizedTensor
from torch import Tensor
from torch.nn import functional

from ..layouts.baked import grown
from ..layouts.composite import LAYOUT, dequantize, held_by
from .entries import Entry, same, tensors_of

__all__ = [
    "BRANCH",
    "DENSE",
    "EXACT",
    "METHODS",
    "SIDE",
    "Handling",
    "Patched",
    "float32",
    "resident",
]

SIDE, DENSE, BRANCH = "side matmul", "dequantized weight", "svd branch"
METHODS = ("exact", "svd")
"""What is done with changes that have no low rank of their own."""


@dataclass(frozen=True)
class Handling:
    """How a MODEL carries changes that are no LoRA.

    Attributes:
        method: "exact" calculates them in each forward; "svd" once, and keeps what has low rank.
        rank: Rank that "svd" keeps.
    """

    method: str = "exact"
    rank: int = 64


EXACT = Handling()


class Block(NamedTuple):
    """``up`` takes ``length`` columns from ``start`` of the inner product into ``rows``."""

    rows: tuple[int, int] | None
    start: int
    length: int
    up: Tensor


class Factors(NamedTuple):
    """One low-rank product: ``down`` over ``columns`` of the input, then every block."""

    columns: tuple[int, int] | None
    down: Tensor
    blocks: tuple[Block, ...]


def float32(weight: Tensor, module: torch.nn.Module) -> Tensor:
    """What the layer multiplies its input with, in float32; a copy of its own."""
    if not isinstance(weight, QuantizedTensor):
        return weight.to(torch.float32, copy=True)
    if weight._layout_cls == LAYOUT:
        return dequantize(held_by(weight), weight._params.spec, torch.float32)
    found = weight.dequantize().to(torch.float32, copy=True)
    smooth = getattr(module, "pre_quant_scale", None)
    return found if smooth is None else found * smooth.to(found)


class Patched:
    """The patches in force on one weight, and what their products need on a device.

    Args:
        key: Name of the weight.
        entries: The patches as the host lists them.
        module: The layer.
        handling: Of changes that are no LoRA.
        counted: The model whose loaded memory counts what :meth:`prepare` makes.
    """

    def __init__(
        self,
        key: str,
        entries: tuple[tuple, ...],
        module: torch.nn.Module,
        handling: Handling = EXACT,
        counted: torch.nn.Module | None = None,
    ):
        shape = tuple(module.weight.shape)
        self.key, self.raw, self.shape, self.handling = key, entries, shape, handling
        loud = [entry for entry in map(Entry, entries) if not entry.silent(shape)]
        for entry in loud:
            if not entry.fits(shape):
                logging.warning(
                    "LowBit: a patch (%s) of another size is not applied to %s, which is %s",
                    entry.kind,
                    key,
                    entry.target(shape),
                )
        loud = [entry for entry in loud if entry.fits(shape)]
        self.reshapes = any(entry.reshaped not in (None, shape) for entry in loud)
        self.free = all(entry.free for entry in loud)
        low = [e for e in loud if e.is_product(shape) and module.takes_product(e.offset)]
        self.low = tuple(low) if self.free and not self.reshapes else ()
        self.dense = tuple(entry for entry in loud if entry not in self.low)
        self.traceable = all(entry.traceable for entry in self.dense)
        #: Whether a forward calculates a change of the whole weight.
        self.calculates = len(self.dense) > 0 and (handling.method == "exact" or self.reshapes)
        self.shapes: QuantizedTensor | None = None
        self.branch: tuple[Tensor, Tensor] | None = None
        self.retained: float | None = None
        self.ready: dict[tuple[torch.device, torch.dtype], tuple[Factors, ...]] = {}
        self.moved: dict[torch.device, tuple[tuple, ...]] = {}
        self.loud = bool(loud)
        self.bytes = 0
        self.model = None if counted is None else weakref.ref(counted)

    def is_of(self, entries: tuple[tuple, ...], handling: Handling) -> bool:
        """Whether this is already made of them."""
        return (
            len(entries) == len(self.raw)
            and handling == self.handling
            and all(map(same, entries, self.raw))
        )

    def carried(self, entry: Entry) -> str:
        """How an entry is carried."""
        if any(entry.raw is low.raw for low in self.low):
            return SIDE
        if self.handling.method == "svd" and not self.reshapes:
            return BRANCH
        return DENSE

    # ------------------------------------------------------------------ factors of side matmuls

    def factors(self, module, weight, device, dtype, resident: bool) -> tuple[Factors, ...]:
        """The side matmuls on a device; kept there while the layer is."""
        found = self.ready.get((device, dtype))
        if found is None:
            found = self.prepare(module, weight, device, dtype, resident)
        return found

    @torch.compiler.disable
    @torch.inference_mode(False)  # kept for a forward that may need gradients
    @torch.no_grad()
    def prepare(self, module, weight, device, dtype, resident: bool) -> tuple[Factors, ...]:
        """Make them; for a layer that is streamed they are kept in RAM, and moved each time."""
        home = device if resident else torch.device("cpu")
        if (home, dtype) not in self.ready:
            if self.dense and not self.calculates and self.branch is None:
                self._find_branch(module, weight, device)
            if resident and self.calculates:
                self._entries_on(device)
            self.ready[home, dtype] = made = self._make(home, dtype)
            if home == device:
                parts = (part for f in made for part in (f.down, *(b.up for b in f.blocks)))
                self._count(sum(part.nbytes for part in parts))
        made = self.ready[home, dtype]
        if home == device:
            return made
        return tuple(
            Factors(
                factors.columns,
                factors.down.to(device),
                tuple(block._replace(up=block.up.to(device)) for block in factors.blocks),
            )
            for factors in made
        )

    def _make(self, device: torch.device, dtype: torch.dtype) -> tuple[Factors, ...]:
        groups: dict[tuple | None, dict[tuple | None, list[tuple[Tensor, Tensor]]]] = {}
        for entry in self.low:
            dim, *piece = entry.offset or (None, None, None)
            columns = tuple(piece) if dim == 1 else None
            rows = tuple(piece) if dim == 0 else None
            pairs = groups.setdefault(columns, {}).setdefault(rows, [])
            pairs.append(entry.factors(device))
        if self.branch is not None:
            pair = tuple(part.to(device=device, dtype=torch.float32) for part in self.branch)
            groups.setdefault(None, {}).setdefault(None, []).append(pair)
        made = []
        for columns, by_rows in groups.items():
            downs, blocks, start = [], [], 0
            for rows, pairs in by_rows.items():
                up = torch.cat([up for up, _ in pairs], dim=1).to(dtype)
                blocks.append(Block(rows, start, up.shape[1], up))
                start += up.shape[1]
                downs += [down for _, down in pairs]
            made.append(Factors(columns, torch.cat(downs).to(dtype), tuple(blocks)))
        return tuple(made)

    def _find_branch(self, module, weight, device: torch.device) -> None:
        """The largest part of the dense change that has the wanted rank."""
        change = self.change(module, weight, device, resident=False).flatten(1)
        whole = change.square().sum()
        rank = min(self.handling.rank, *change.shape)
        if rank * 4 < min(change.shape):
            # Its basis is random; the seed makes a second load the same.
            devices = [change.device] if change.is_cuda else []
            with torch.random.fork_rng(devices):
                torch.manual_seed(0)
                u, s, v = torch.svd_lowrank(change, q=rank + 8, niter=4)
        else:
            u, s, vh = torch.linalg.svd(change, full_matrices=False)
            v = vh.mT
        root = s[:rank].sqrt()
        self.branch = ((u[:, :rank] * root).cpu(), (v[:, :rank] * root).mT.contiguous().cpu())
        kept = s[:rank].square().sum()
        self.retained = 1.0 if whole == 0 else min(1.0, (kept / whole).item())

    def release(self, counted: bool = True) -> None:
        """Forget what lies on devices: the layer moves, or its patches go."""
        self.ready.clear()
        self.moved.clear()
        if counted:
            self.count(-self.bytes)
        self.bytes = 0

    def _count(self, nbytes: int) -> None:
        self.bytes += nbytes
        self.count(nbytes)

    def count(self, nbytes: int) -> None:
        """Tell the host of memory."""
        model = None if self.model is None else self.model()
        if model is not None:
            left = getattr(model, "model_loaded_weight_memory", 0) + nbytes
            model.model_loaded_weight_memory = max(left, 0)

    # ---------------------------------------------------------------------- dense changes

    def change(self, module, weight, device: torch.device, resident: bool) -> Tensor:
        """What the dense entries add to the weight; float32."""
        if self.traceable:
            return self._change(module, weight, device, resident)
        return self._change_apart(module, weight, device, resident)

    @torch.compiler.disable
    def _change_apart(self, *args) -> Tensor:
        return self._change(*args)

    @torch.no_grad()
    def _change(self, module, weight, device: torch.device, resident: bool) -> Tensor:
        entries = self._entries_on(device) if resident else tuple(e.raw for e in self.dense)
        if self.free:
            blank = torch.zeros(self.shape, dtype=torch.float32, device=device)
            return comfy.lora.calculate_weight(list(entries), blank, self.key)
        base = float32(_on(weight, device), module)
        return self._patched(entries, base) - base

    @torch.compiler.disable
    @torch.no_grad()
    def whole(self, module, weight, device: torch.device) -> Tensor:
        """The patched weight, of whatever shape; float32."""
        entries = tuple(entry.raw for entry in (*self.low, *self.dense))
        return self._patched(entries, float32(_on(weight, device), module))

    def _patched(self, entries: tuple[tuple, ...], base: Tensor) -> Tensor:
        return comfy.lora.calculate_weight(
            list(entries), base.clone(), self.key, original_weights={self.key: [(base, None)]}
        )

    def _entries_on(self, device: torch.device) -> tuple[tuple, ...]:
        """Dense entries with the small tensors of adapters on the device."""
        if device not in self.moved:
            moved = []
            for entry in self.dense:
                value = entry.value
                if isinstance(value, comfy.weight_adapter.WeightAdapterBase):
                    weights = [
                        part.to(device) if isinstance(part, Tensor) else part
                        for part in value.weights
                    ]
                    if device.type != "cpu":
                        self._count(sum(tensor.nbytes for tensor in tensors_of(weights)))
                    value = type(value)(value.loaded_keys, type(value.weights)(weights))
                moved.append((entry.strength, value, *entry.raw[2:]))
            self.moved[device] = tuple(moved)
        return self.moved[device]

    # ------------------------------------------------------------------------- in a forward

    def linear(self, module, weight, x: Tensor, y: Tensor) -> Tensor:
        """Add what the patches change to ``y``, the product of ``x`` and the unchanged weight."""
        stays = resident(module, x.device)
        for columns, down, blocks in self.factors(module, weight, x.device, x.dtype, stays):
            inner = functional.linear(x if columns is None else x.narrow(-1, *columns), down)
            for rows, start, length, up in blocks:
                part = functional.linear(inner.narrow(-1, start, length), up)
                (y if rows is None else y.narrow(-1, *rows)).add_(part)
        if self.calculates:
            change = self.change(module, weight, x.device, stays)
            y.add_(functional.linear(x, change.to(x.dtype)))
        return y

    def conv(self, module, weight, x: Tensor, y: Tensor, run: Callable) -> Tensor:
        """As :meth:`linear`; ``run(x, weight)`` is the layer's convolution."""
        stays = resident(module, x.device)
        kernel = self.shape[1:]
        pointwise = (functional.conv1d, functional.conv2d, functional.conv3d)[len(kernel) - 2]
        for _, down, blocks in self.factors(module, weight, x.device, x.dtype, stays):
            inner = run(x, down.view(-1, *kernel))
            for rows, start, length, up in blocks:
                part = pointwise(
                    inner.narrow(1, start, length), up.view(*up.shape, *[1] * (len(kernel) - 1))
                )
                (y if rows is None else y.narrow(1, *rows)).add_(part)
        if self.calculates:
            change = self.change(module, weight, x.device, stays)
            y.add_(run(x, change.to(x.dtype)))
        return y

    def embedding(self, module, weight, index: Tensor, y: Tensor) -> Tensor:
        """As :meth:`linear`, of a table whose rows ``index`` were looked up."""
        stays = resident(module, index.device)
        for _, down, blocks in self.factors(module, weight, index.device, y.dtype, stays):
            for _, start, length, up in blocks:
                y.add_(functional.embedding(index, up) @ down.narrow(0, start, length))
        if self.calculates:
            change = self.change(module, weight, index.device, stays)
            y.add_(functional.embedding(index, change).to(y.dtype))
        return y

    # ------------------------------------------------------------------------------- saving

    def saved_as(self, weight: QuantizedTensor) -> QuantizedTensor:
        """Something of the shapes of :meth:`baked`."""
        if self.shapes is None:
            more = None
            if not self.dense and weight._layout_cls == LAYOUT:
                away = torch.device("meta")
                products = [(entry.offset, *entry.factors(away)) for entry in self.low]
                more = grown(weight.to(away), products)
            self.shapes = weight if more is None else more
        return self.shapes

    def baked(self, module, weight: QuantizedTensor) -> QuantizedTensor:
        """The weight with the patches in it, as a file holds it.

        Where its parts have low-rank branches, LoRAs become further rank there, exactly; other
        patched weights are rounded anew in their own format.
        """
        if not self.dense and weight._layout_cls == LAYOUT:
            products = [(entry.offset, *entry.factors(weight._qdata.device)) for entry in self.low]
            more = grown(weight, products)
            if more is not None:
                return more
        whole = self.whole(module, weight, weight._qdata.device)
        return module.rounded(whole, comfy.utils.string_to_seed(self.key))


def _on(weight: Tensor, device: torch.device) -> Tensor:
    """The weight on a device; torch.compile cannot trace a move that is none."""
    return weight if weight.device == device else weight.to(device)


def resident(module: torch.nn.Module, device: torch.device) -> bool:
    """Whether the layer stays on the device, as far as the host tells."""
    return module.weight.device == device or hasattr(module, "_v")
