"""LoRAs and other weight patches on low-bit layers, exact whatever the layers' formats hold.

Rounding a patched weight anew would lose most of a small change below 8 bits, and much of it at 8.
So a patched layer keeps its packed weight, and its forward adds what the patches change:

================================  =================================================================
LoRA, LoCon, mid weights          "side matmul": ``x @ down @ up`` beside the layer's own product,
                                  each into the rows of a fused layer that it is for
LoHa, LoKr, full differences,     "dequantized weight": the change of the weight is calculated in
merges                            float32 in that forward, and multiplied beside
DoRA, OFT, set and what else      the same, from the dequantized weight
depends on the weight
any of the last two, as an        "svd branch": the change is calculated once, and the largest part
option                            of it that has a low rank becomes a side matmul
what changes a weight's shape     the layer holds the patched weight in float while it is loaded
================================  =================================================================

The host hands patches over in three ways: merged by ``set_weight`` where it loads a layer wholly,
as a ``weight_function`` where it loads in parts, as ``weight_lowvram_function`` under Dynamic VRAM.
Layers take all three in (see :class:`Patchable`); for the first, which does not tell the patches, a
callback of the MODEL hands them over after each load. Weights that are saved have the patches
baked in while the file is written.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass

import comfy.lora
import comfy.model_patcher
import torch
from comfy.patcher_extension import CallbacksMP
from comfy.quant_ops import QuantizedTensor
from torch import Tensor

from ...quant.errors import LowBitError
from ..layouts.composite import LAYOUT
from . import control
from .carried import BRANCH, DENSE, EXACT, SIDE, Handling, Patched, resident
from .entries import Entry

__all__ = [
    "AWAITED",
    "Fate",
    "Patchable",
    "baked_state",
    "fates",
    "handling_of",
    "install",
    "with_handling",
]

CALLBACKS = "lowbit_patches"
ATTACHMENT = "lowbit_patches"
REMEMBERED = 3
"""Patches of a layer that are kept beside those in force, for hooks that take turns."""
FLOAT, NOTHING = "float weight", "nothing"


@dataclass(frozen=True)
class Fate:
    """How one patch of a MODEL is carried.

    Attributes:
        key: Name of the weight or bias.
        kind: "lora", "dora", "loha", "lokr", "oft", "diff", "set", "merge" and so on.
        carried: One of the ways of this module; "float weight" where ComfyUI patches a plain
            tensor, "nothing" where the strength is 0.
        added_bytes: What it takes beside the weight.
        retained_energy: Share of the squared change that an "svd branch" keeps; None before it was
            calculated, and everywhere else.
        strength: Its strength.
    """

    key: str
    kind: str
    carried: str
    added_bytes: int
    retained_energy: float | None
    strength: float


class _Awaited:
    """A weight was patched, and the MODEL's callback has not told with what."""

    loud = True

    def __getattr__(self, name: str):
        raise LowBitError(
            "A low-bit layer was patched outside of its MODEL's own loading.",
            expected="patches by add_patches, applied by ComfyUI's load_models_gpu",
            remedy="Please report which node did it.",
        )


AWAITED = _Awaited()


# ---------------------------------------------------------------------------- layers that take them


def _is_patch(function) -> bool:
    return getattr(function, "is_lowvram_patch", False)


class _Functions(list):
    """A layer's ``weight_function`` list, without the patches that the host puts there."""

    def __init__(self, module: Patchable, items=()):
        super().__init__()
        self.module = weakref.ref(module)  # the module has this: no cycle, models are large
        self.patched: Patched | None = None
        self.extend(items)

    def append(self, item) -> None:
        module = self.module()
        if module.carries and _is_patch(item):
            self.patched = module.patched_by(item)
        else:
            super().append(item)

    def extend(self, items) -> None:
        for item in items:
            self.append(item)


class Patchable:
    """A layer that carries its patches beside a quantized weight (mixin, before the host's class).

    Attributes:
        managed: Whether a MODEL's callback tells the patches after a load.
        handling: Of changes that are no LoRA.
        resident: Patches of a wholly loaded weight; None again when the host restores its backup.
        hooked: Patches with those of the scheduled hooks of this moment.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.managed = False
        self.handling = EXACT
        self.resident: Patched | _Awaited | None = None
        self.hooked: Patched | None = None
        self.counted: weakref.ref | None = None
        self._dynamic: object | None = None
        self._dynamic_patched: Patched | None = None
        self._made: list[Patched] = []
        self._functions = _Functions(self)

    @property
    def carries(self) -> bool:
        """Whether the weight is one whose patches are carried beside it."""
        return _layout_of(self) == LAYOUT

    def takes_product(self, offset: tuple[int, int, int] | None) -> bool:
        """Whether a low-rank change of a piece can be multiplied beside."""
        return True

    @property
    def patched(self) -> Patched | None:
        """What is in force now."""
        found = self.hooked
        if found is None:
            found = self.resident
        if found is None:
            found = self._functions.patched
        if found is None:
            found = self._dynamic_patched
        return found if found is not None and found.loud else None

    def patched_by(self, function) -> Patched:
        """The patches of one of the host's functions."""
        return self.patched_with(function.key, tuple(function.patches[function.key]))

    def patched_with(self, key: str, entries: tuple[tuple, ...]) -> Patched:
        """Made once: the last few of a layer are remembered, for hooks that take turns."""
        made = self.made_of(entries, self.handling)
        if made is None:
            counted = None if self.counted is None else self.counted()
            made = Patched(key, entries, self, self.handling, counted)
        others = [old for old in self._made if old is not made]
        for old in others[REMEMBERED:]:
            old.release()
        self._made = [made, *others[:REMEMBERED]]
        return made

    def made_of(self, entries: tuple[tuple, ...], handling: Handling) -> Patched | None:
        """The remembered one of these patches."""
        return next((old for old in self._made if old.is_of(entries, handling)), None)

    def forget(self, keep: Patched | None = None, counted: bool = True) -> None:
        """Free what lies on devices for other patches."""
        for made in self._made:
            if made is not keep:
                made.release(counted)
        self._made = [made for made in self._made if made is keep]

    def release(self) -> None:
        """Free what lies on devices: the layer moves."""
        for made in self._made:
            made.release()

    def __setattr__(self, name: str, value) -> None:
        if name == "weight":
            self.__dict__["resident"] = None
        super().__setattr__(name, value)

    @property
    def weight_function(self) -> list:
        """What the host still applies to the weight."""
        return self._functions

    @weight_function.setter
    def weight_function(self, functions) -> None:
        self._functions = _Functions(self, functions)

    @property
    def weight_lowvram_function(self):
        """Dynamic VRAM's patch: not told where it is carried here."""
        return None if self.carries else self._dynamic

    @weight_lowvram_function.setter
    def weight_lowvram_function(self, function) -> None:
        self._dynamic = function
        taken = function is not None and self.carries
        self._dynamic_patched = self.patched_by(function) if taken else None


def _layout_of(module: torch.nn.Module) -> str | None:
    return getattr(getattr(module, "weight", None), "_layout_cls", None)


# --------------------------------------------------------------------------- what saving writes


class _Baking:
    """Bakes a layer when the first of its tensors is written, and lets go of it after the last."""

    def __init__(self, module, patched: Patched, prefix: str):
        self.module, self.patched, self.prefix = module, patched, prefix
        self.tensors: dict[str, Tensor] = {}

    def take(self, name: str) -> Tensor:
        if name not in self.tensors:
            with torch.no_grad():
                made = self.patched.baked(self.module, self.module.weight)
            self.tensors = {
                key: value.to("cpu") for key, value in made.state_dict(self.prefix).items()
            }
        return self.tensors.pop(name)


class BakedPiece(Tensor):
    """One tensor of a patched layer in a state dict: its shape now, its values when written.

    The host does the same for layers that it has not patched itself. Memory counts it as packed.
    """

    @staticmethod
    def __new__(cls, shape_of: Tensor, baking: _Baking, name: str, counted: int):
        piece = torch.Tensor._make_subclass(cls, torch.empty_like(shape_of, device="meta"))
        piece.baking, piece.name_there, piece.counted = baking, name, counted
        return piece

    @property
    def device(self):
        return comfy.model_patcher.CustomTorchDevice

    @property
    def nbytes(self) -> int:
        return self.counted

    def to(self, *args, **kwargs) -> Tensor:
        return self.baking.take(self.name_there)

    def cpu(self) -> Tensor:
        return self.to("cpu")

    def detach(self) -> BakedPiece:
        return self

    def requires_grad_(self, requires_grad: bool = True) -> BakedPiece:
        return self


def baked_state(module, patched: Patched, prefix: str) -> tuple[dict[str, Tensor], QuantizedTensor]:
    """``X.weight`` and what lies beside it with the patches baked in, and its shape."""
    weight = module.weight
    shapes = patched.saved_as(weight)
    baking = _Baking(module, patched, prefix)
    packed = weight.state_dict(prefix)
    pieces = {
        name: BakedPiece(tensor, baking, name, packed[name].nbytes)
        for name, tensor in shapes.state_dict(prefix).items()
    }
    return pieces, shapes


# ----------------------------------------------------------------------------- what a MODEL does


def install(patcher: comfy.model_patcher.ModelPatcher) -> None:
    """Let a MODEL, and every clone of it, hand its patches to its low-bit layers."""
    for call, function in (
        (CallbacksMP.ON_LOAD, _on_load),
        (CallbacksMP.ON_DETACH, _on_detach),
        (CallbacksMP.ON_APPLY_HOOKS, _on_apply_hooks),
        (CallbacksMP.ON_PREPARE_STATE, _on_prepare_state),
        (CallbacksMP.ON_CLEANUP, _on_cleanup),
    ):
        patcher.remove_callbacks_with_key(call, CALLBACKS)
        patcher.add_callback_with_key(call, CALLBACKS, function)
    for _, module in _layers(patcher):
        module.managed = True
        module.counted = weakref.ref(patcher.model)
    control.install(patcher)


def _layers(patcher) -> Iterator[tuple[str, Patchable]]:
    """``(name of the weight, layer)`` of every layer that can carry patches."""
    for name, module in patcher.model.named_modules():
        if isinstance(module, Patchable):
            yield f"{name}.weight", module


def _on_load(patcher, device_to, lowvram_model_memory, force_patch_weights, full_load) -> None:
    handling = handling_of(patcher)
    for key, module in _layers(patcher):
        module.hooked = None
        module.handling = handling
        entries = tuple(patcher.patches.get(key, ()))
        patched = module.patched_with(key, entries) if entries and module.carries else None
        module.forget(keep=patched, counted=False)  # the host counts a load from nothing
        module._dynamic_patched = None
        function = module._functions.patched is not None
        module._functions.patched = patched if function else None
        module.resident = None if function else patched
        if patched is None:
            if entries and not module.carries and _waits_for_another_shape(key, module):
                _hold_in_float(patcher, key, module, device_to)
            continue
        if patched.reshapes:
            _hold_in_float(patcher, key, module, device_to)
        elif patched.loud and resident(module, device_to):
            patched.count(patched.bytes)
            patched.factors(module, module.weight, device_to, module.weight.dtype, True)


def _hold_in_float(patcher, key: str, module: Patchable, device_to) -> None:
    """A weight of another shape, which the host's model looks at, lies there while it is loaded."""
    module.resident = None
    module.weight_function = [f for f in module._functions if not _is_patch(f)]
    patcher.patch_weight_to_device(key, device_to=device_to)
    module.comfy_patched_weights = True


def _waits_for_another_shape(key: str, module: Patchable) -> bool:
    """Whether a float weight that is streamed would only get its new shape in a forward."""
    weight = module.weight
    return any(
        tuple(comfy.lora.calculate_shape(f.patches[key], weight, key)) != tuple(weight.shape)
        for f in module._functions
        if _is_patch(f)
    )


def _on_detach(patcher, unpatch_all: bool) -> None:
    if unpatch_all:  # otherwise a clone went, and the model is still there
        for _, module in _layers(patcher):
            module.resident = module.hooked = module._dynamic_patched = None
            module._functions.patched = None
            module.forget()


def _on_apply_hooks(patcher, hooks) -> None:
    """Scheduled LoRAs: the host has sent each weight through ``set_weight``, which kept it."""
    combined = patcher.get_combined_hook_patches(hooks)
    cached = patcher.cached_hook_patches.get(hooks, {})
    for key, module in _layers(patcher):
        module.hooked = None
        if key in combined and module.carries:
            entries = (*patcher.patches.get(key, ()), *combined[key])
            module.hooked = module.patched_with(key, entries)
            # The host's copies: one float weight for a later visit, and one to restore.
            cached.pop(key, None)
            patcher.hook_backup.pop(key, None)


def _on_prepare_state(patcher, timestep, model_options) -> None:
    """A hook whose strength changed was taken off; what comes next may be without it."""
    if patcher.current_hooks is None:
        _drop_hooks(patcher)


def _on_cleanup(patcher) -> None:
    _drop_hooks(patcher)


def _drop_hooks(patcher) -> None:
    for _, module in _layers(patcher):
        if module.hooked is not None:
            module.hooked = None
            module.forget(keep=module.patched)


# -------------------------------------------------------------------------------- for the user


def handling_of(patcher) -> Handling:
    """How a MODEL carries changes that are no LoRA."""
    return patcher.get_attachment(ATTACHMENT) or EXACT


def with_handling(patcher, handling: Handling):
    """A clone of the MODEL that carries them so.

    Raises:
        LowBitError: It has no low-bit layers.
    """
    if not any(module.carries for _, module in _layers(patcher)):
        raise LowBitError(
            "This MODEL has no low-bit layers: ComfyUI applies its LoRAs itself.",
            expected="a MODEL of Load Quantized Diffusion Model",
        )
    clone = patcher.clone()
    clone.set_attachments(ATTACHMENT, handling)
    # The host takes clones with equal patches for one; adding none marks this one as another.
    clone.add_patches({})
    return clone


def fates(patcher) -> tuple[Fate, ...]:
    """How each patch of a MODEL is carried, loaded or not."""
    layers = dict(_layers(patcher))
    handling = handling_of(patcher)
    found = []
    for key, entries in patcher.patches.items():
        if key.rpartition(".")[2] not in ("weight", "bias"):
            continue  # merges list every tensor of a layer; the host patches parameters alone
        module = layers.get(key)
        patched = None
        if module is not None and module.carries:
            patched = module.made_of(tuple(entries), handling)
            patched = patched or Patched(key, tuple(entries), module, handling)
        for entry in map(Entry, entries):
            if patched is None:
                found.append(Fate(key, entry.kind, FLOAT, 0, None, entry.strength))
                continue
            carried = NOTHING if entry.silent(patched.shape) else patched.carried(entry)
            size = _added_bytes(carried, entry, patched, module)
            retained = patched.retained if carried == BRANCH else None
            found.append(Fate(key, entry.kind, carried, size, retained, entry.strength))
    return tuple(found)


def _added_bytes(carried: str, entry: Entry, patched: Patched, module: Patchable) -> int:
    width = module.weight.dtype.itemsize
    rows, *rest = entry.target(patched.shape)
    columns = torch.Size(rest).numel()
    if carried == SIDE:
        return entry.rank * (rows + columns) * width
    if carried == BRANCH:
        rows, *rest = patched.shape
        columns = torch.Size(rest).numel()
        rank = min(patched.handling.rank, rows, columns)
        return rank * (rows + columns) * width // len(patched.dense)
    return entry.nbytes() if carried == DENSE else 0
