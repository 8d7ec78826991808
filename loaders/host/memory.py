"""Where the weights of a MODEL are while it runs: offload modes, and what they cost.

Only what the host has is used, on a clone of its own patcher:

========== ============================== =============================================
mode       Dynamic VRAM                   the host's older management (estimates)
========== ============================== =============================================
auto       nothing of ours                nothing of ours
resident   no page gives way in a run     asked for with ``force_full_load``
model      as resident; pages are freed   as resident; the patcher is unloaded after
           after sampling                 sampling
layerwise  a ceiling for resident pages   what exceeds the budget is unloaded after the
           (the watermark)                host's load, which takes all that fits
sequential the ceiling is 0               all is unloaded after the host's load
========== ============================== =============================================

What is not resident the host streams by itself, packed as it is, through buffers and streams of
its own. The host chooses which layers stay; ours is only how many bytes.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field

import comfy.model_management as mm
import torch
from comfy.cli_args import args
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP, WrappersMP
from comfy.quant_ops import QuantizedTensor

from ...quant.errors import LowBitError
from ..memory_plan import MODES, MemoryPlan, Weights, budget_of, make_memory_plan, size
from .devices import device_facts

__all__ = [
    "Measured",
    "Offload",
    "activations_of",
    "explain",
    "forced_mode",
    "measured",
    "offload_of",
    "plan_of",
    "set_mode",
    "watch",
]

KEY = "lowbit_offload"
RUN = "lowbit_run"
PAGE = 32 * 2**20
"""Dynamic VRAM keeps or drops pages of this size."""

CLIPS = frozenset(
    {"cogvideox", "cosmos", "hunyuan_video", "kandinsky5", "ltxav", "ltxv", "mochi_preview",
     "wan2.1"}
)  # fmt: skip
"""The host's names of models that make clips; others that have a time axis make pictures too."""


LOADS_FIRST = (
    "at the start of a run ComfyUI loads what fits, then the rest is taken away again: that moment "
    "needs more memory than the run"
)
LOADS_OTHERS = "other models of the same sampling (ControlNet) are loaded whole as well"
KEEPS = "between runs other models may take its memory"
DYNAMIC_NOTES = {
    "resident": (f"no layer gives way to activations while a node runs; {KEEPS}",),
    "model": ("its copy in pinned RAM stays for the next run",),
    "layerwise": ("the budget is kept in pages of 32 MiB",),
    "sequential": ("layers of 16 KiB and less stay on the device: ComfyUI streams none of them",),
}
ESTIMATING_NOTES = {
    "resident": (f"the whole model is loaded for sampling; {KEEPS}", LOADS_OTHERS),
    "model": (LOADS_OTHERS,),
    "layerwise": (LOADS_FIRST,),
    "sequential": (LOADS_FIRST,),
}
"""What has to be known of a mode, by the host's way of managing memory."""

STREAMING = ("layerwise", "sequential")
FLAGS = (
    ("--gpu-only", "wins: the whole model stays on the device", ("model", *STREAMING)),
    ("--highvram", "wins: the whole model stays on the device", ("model", *STREAMING)),
    ("--novram", "wins: every layer streams", ("auto", "resident", "model", "layerwise")),
    ("--disable-smart-memory", "wins between runs: the model is unloaded", ("resident",)),
    ("--disable-dynamic-vram", "the mode is had by the older means", MODES[1:]),
    ("--disable-async-offload", "layers are copied without overlap", STREAMING),
    ("--disable-pinned-memory", "layers are copied from unpinned RAM", STREAMING),
    ("--lowvram", "concerns text encoders only", STREAMING),
    ("--reserve-vram", "{} GiB are not for models", MODES),
)
"""Flags of the host's command line, what they do to a mode, and the modes that they do it to."""


# ----------------------------------------------------------------------------------- the modes


@dataclass(frozen=True)
class Offload:
    """A mode in force on a MODEL, kept as ``attachments["lowbit_offload"]``.

    Attributes:
        mode: One of ``MODES``.
        budget: Bytes that weights and buffers may have in "layerwise".
    """

    mode: str
    budget: int | None = None

    @property
    def ceiling(self) -> int | None:
        """Bytes that may stay; None for all."""
        return {"layerwise": self.budget, "sequential": 0}.get(self.mode)

    # The host calls these with the patcher that it loads, a clone of ours as often as not.

    def hold(self, patcher: ModelPatcher, *_) -> None:
        """After a load and before sampling: keep to the mode. A second call changes nothing."""
        ceiling = self.ceiling
        limited = ceiling is not None and ceiling < _weights(patcher).total
        if not patcher.is_dynamic():
            if limited:
                _trim(patcher, ceiling)
            return
        vbar = patcher.model.dynamic_vbars.get(patcher.load_device)
        if vbar is None:
            return
        if limited:
            room = ceiling - patcher.model.model_loaded_weight_memory - _stream_buffers(patcher)
            vbar.set_watermark(max(0, room) // PAGE * PAGE)
        elif self.mode in ("resident", "model"):
            vbar.set_watermark_limit(vbar.offset)

    def prepare(self, executor: Callable, *positional, **named):
        """Around the host's preparation of sampling: ask for the whole model."""
        return executor(*positional, **(named | {"force_full_load": True}))

    def on_cleanup(self, patcher: ModelPatcher) -> None:
        """After sampling, even where it failed: leave nothing on the device."""
        if not patcher.is_dynamic():
            elsewhere = patcher.load_device != mm.get_torch_device()
            mm.unload_model_and_clones(patcher, False, all_devices=elsewhere)
            return
        vbar = patcher.model.dynamic_vbars.get(patcher.load_device)
        if vbar is not None:
            vbar.set_watermark_limit(0)
        # Its pins in RAM stay for the next run.
        patcher.partially_unload(patcher.offload_device, patcher.loaded_size() + PAGE)


def _trim(patcher: ModelPatcher, ceiling: int) -> None:
    """Unload what exceeds the ceiling; where that would free nothing, don't.

    The host counts its buffers in, so that a small ceiling leaves no weights at all.
    """
    if patcher.offload_device == patcher.load_device != torch.device("cpu"):
        return
    excess = patcher.loaded_size() + patcher.model.model_offload_buffer_memory - ceiling
    if excess > 0 and patcher.loaded_size() > 0:
        patcher.partially_unload(patcher.offload_device, excess)


def _stream_buffers(patcher: ModelPatcher) -> int:
    return max(1, mm.NUM_STREAMS) * _weights(patcher).largest


def set_mode(
    patcher: ModelPatcher, mode: str, vram_budget_gb: float = 0.0, blocks_on_gpu: int = 0
) -> ModelPatcher:
    """A clone of a MODEL with an offload mode; the last one set is the one in force.

    Args:
        patcher: The MODEL.
        mode: One of ``MODES``.
        vram_budget_gb: "layerwise" only: GiB for weights and the buffers that they stream
            through; 0 for what the blocks need.
        blocks_on_gpu: "layerwise" only: how many of the model's blocks stay.

    Raises:
        LowBitError: No such mode, or more blocks than the model has.
    """
    if mode not in MODES:
        raise LowBitError(
            "There is no such offload mode.",
            found=mode,
            expected=", ".join(MODES),
            remedy="Choose one of them.",
        )
    clone = patcher.clone()
    watch(clone)
    for call in (CallbacksMP.ON_LOAD, CallbacksMP.ON_PRE_RUN, CallbacksMP.ON_CLEANUP):
        clone.remove_callbacks_with_key(call, KEY)
    clone.remove_wrappers_with_key(WrappersMP.PREPARE_SAMPLING, KEY)
    budget = None
    if mode == "layerwise":
        facts = device_facts(patcher.load_device)
        budget = budget_of(_weights(patcher), facts, vram_budget_gb, blocks_on_gpu)
    offload = Offload(mode, budget)
    if mode != "auto":
        clone.add_callback_with_key(CallbacksMP.ON_LOAD, KEY, offload.hold)
        # The host does not load again what another clone of the model has loaded whole.
        clone.add_callback_with_key(CallbacksMP.ON_PRE_RUN, KEY, offload.hold)
    if mode in ("resident", "model"):
        clone.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, KEY, offload.prepare)
    if mode == "model":
        clone.add_callback_with_key(CallbacksMP.ON_CLEANUP, KEY, offload.on_cleanup)
    clone.set_attachments(KEY, offload)
    return clone


def offload_of(patcher: ModelPatcher) -> Offload:
    """The mode in force."""
    return patcher.get_attachment(KEY) or Offload("auto")


# ------------------------------------------------------------------------------------ the plan


def plan_of(patcher: ModelPatcher, offload: Offload | None = None) -> MemoryPlan:
    """Every mode for a MODEL on its device; "layerwise" with the budget in force."""
    offload = offload or offload_of(patcher)
    activations, assumed = activations_of(patcher.model)
    return make_memory_plan(
        _weights(patcher),
        device_facts(patcher.load_device),
        activations,
        assumed,
        offload.budget,
        forced_mode(),
    )


def _weights(patcher: ModelPatcher) -> Weights:
    compute = patcher.model.manual_cast_dtype or patcher.model.get_dtype()
    return Weights.of(_tensors(patcher.model.diffusion_model), compute.itemsize)


def _tensors(model: torch.nn.Module) -> Iterator[tuple[str, int, int]]:
    """``(name, elements, bytes)`` of every parameter, packed ones as they are packed."""
    for name, parameter in model.named_parameters():
        held = [parameter]
        if isinstance(parameter, QuantizedTensor):
            held = [getattr(parameter, inner) for inner in parameter.__tensor_flatten__()[0]]
        yield name, parameter.numel(), sum(tensor.nbytes for tensor in held)


def activations_of(model: torch.nn.Module | None) -> tuple[int | None, str]:
    """The host's own estimate of what a pass works in, and the picture or clip it is for.

    Args:
        model: The host's model, on whatever device; None gives no estimate.
    """
    if model is None:
        return None, ""
    latent = model.latent_format
    kind = model.model_config.unet_config.get("image_model")
    ratio = latent.spacial_downscale_ratio
    if latent.latent_dimensions == 1:
        return None, ""
    if latent.latent_dimensions == 2 or kind not in CLIPS:
        assumed, frames, high, wide = "1024 x 1024", 1, 1024, 1024
    else:
        assumed, frames, high, wide = "81 frames of 832 x 480", 81, 480, 832
    shape = [1, latent.latent_channels]
    if latent.latent_dimensions == 3:
        shape.append((frames - 1) // latent.temporal_downscale_ratio + 1)
    return int(model.memory_required([*shape, high // ratio, wide // ratio])), assumed


# ---------------------------------------------------------------------- what the host was told


def forced_mode() -> str | None:
    """The mode that a flag on the host's command line makes of every other, if one does."""
    if args.gpu_only or args.highvram:
        return "resident"
    return "sequential" if args.novram else None


def explain(patcher: ModelPatcher, vram_budget_gb: float = 0.0, blocks_on_gpu: int = 0) -> str:
    """What is in force on a MODEL, by which means, and what wins over it; then the plan.

    Args:
        patcher: The MODEL, its mode set.
        vram_budget_gb, blocks_on_gpu: The inputs, to say where they have no part.
    """
    offload = offload_of(patcher)
    plan = plan_of(patcher, offload)
    lines = [f"mode: {offload.mode}", *_notes(patcher, offload)]
    unused = {"vram_budget_gb": vram_budget_gb, "blocks_on_gpu": blocks_on_gpu}
    if offload.mode != "layerwise" and any(unused.values()):
        named = " and ".join(name for name, value in unused.items() if value)
        lines.append(f"{named}: no part in this mode, only in layerwise")
    lines += [*_flags(offload.mode), ""]
    chosen = plan.mode(offload.mode)
    if chosen.verdict == "too big":
        lines.append(
            f"too big: needs {size(chosen.peak)}, {plan.device} has {size(plan.memory)}; "
            "another mode, a smaller budget or a smaller picture needs less"
        )
    return "\n".join([*lines, plan.text, *_measured_lines(patcher)])


def _notes(patcher: ModelPatcher, offload: Offload) -> Iterator[str]:
    dynamic = patcher.is_dynamic()
    yield "by: ComfyUI's " + ("Dynamic VRAM" if dynamic else "estimating memory management")
    if offload.mode == "layerwise":
        yield (
            f"budget: {size(offload.budget)} for weights and the buffers they stream through; "
            "ComfyUI chooses the layers that stay"
        )
    if patcher.load_device.type == "cpu":
        yield "the device is a CPU: its RAM holds the weights in every mode"
    elif dynamic:
        yield from DYNAMIC_NOTES.get(offload.mode, ())
    else:
        yield from ESTIMATING_NOTES.get(offload.mode, ())


def _flags(mode: str) -> Iterator[str]:
    """What was given on the command line and wins over the mode, or changes what it does."""
    for flag, told, modes in FLAGS:
        value = getattr(args, flag.strip("-").replace("-", "_"))
        if value and mode in modes:
            yield f"{flag}: {told.format(value)}"


# ----------------------------------------------------------------------------- what was measured


@dataclass
class _Run:
    """The last sampling of a model, by whichever clone; noted while it runs."""

    mode: str | None = None
    load_peak: int | None = None
    peak: int | None = None
    resident: int | None = None
    passes: list[float] = field(default_factory=list)

    def on_pre_run(self, patcher: ModelPatcher) -> None:
        self.mode = offload_of(patcher).mode
        self.peak, self.resident, self.passes = None, None, []

    def on_prepare_state(self, patcher: ModelPatcher, *_) -> None:
        """Before each pass of the model."""
        if not self.passes:
            self.load_peak = _peak(patcher)
            if counters := _memory_counters(patcher.load_device):
                counters.reset_peak_memory_stats(patcher.load_device)
        self.passes.append(time.perf_counter())

    def on_cleanup(self, patcher: ModelPatcher) -> None:
        self.passes.append(time.perf_counter())
        self.peak, self.resident = _peak(patcher), int(patcher.loaded_size())


def _memory_counters(device: torch.device):
    """torch's module that counts a device's memory, None where it has none."""
    module = getattr(torch, device.type, None)
    return module if hasattr(module, "reset_peak_memory_stats") else None


def _peak(patcher: ModelPatcher) -> int | None:
    """Largest memory that torch had since the last run began, pages of Dynamic VRAM on top."""
    counters = _memory_counters(patcher.load_device)
    if counters is None:
        return None
    pages = patcher.loaded_size() if patcher.is_dynamic() else 0
    return int(counters.max_memory_allocated(patcher.load_device) + pages)


def watch(patcher: ModelPatcher) -> None:
    """Note what the runs of a MODEL take, for :func:`measured`; its clones share the notes."""
    if patcher.get_attachment(RUN) is not None:
        return
    run = _Run()
    patcher.set_attachments(RUN, run)
    for call, noting in (
        (CallbacksMP.ON_PRE_RUN, run.on_pre_run),
        (CallbacksMP.ON_PREPARE_STATE, run.on_prepare_state),
        (CallbacksMP.ON_CLEANUP, run.on_cleanup),
    ):
        patcher.add_callback_with_key(call, RUN, noting)


@dataclass(frozen=True)
class Measured:
    """What a MODEL has on its device, and what its last run took.

    Attributes:
        mode: The offload mode of the last run or, without one, in force.
        device: As people call it.
        dynamic: Whether Dynamic VRAM manages it.
        total: Bytes of its weights.
        resident: Bytes of them on the device, while the last run lasted or, without one, now.
        streamed: Bytes of them that are not.
        peak: Largest memory of the device in the last run; None without a run, or where torch
            does not count.
        load_peak: The same until that run began.
        passes: How often the model ran in it.
        seconds_per_pass: Median of those, the first one left out where there are more.
    """

    mode: str
    device: str
    dynamic: bool
    total: int
    resident: int
    streamed: int
    peak: int | None
    load_peak: int | None
    passes: int
    seconds_per_pass: float | None

    def to_json(self) -> dict:
        """Plain JSON values."""
        return asdict(self)

    @property
    def text(self) -> str:
        """The same for people."""
        lines = [
            f"measured on {self.device}, mode {self.mode}: {size(self.resident)} resident, "
            f"{size(self.streamed)} not"
        ]
        if not self.passes:
            lines.append("  the model has not run yet")
            return "\n".join(lines)
        lines.append(f"  {self.passes} passes, {self.seconds_per_pass:.3f} s each")
        if self.peak is not None:
            lines.append(f"  peak {size(self.peak)}; of loading {size(self.load_peak)}")
        return "\n".join(lines)


def measured(patcher: ModelPatcher) -> Measured:
    """What a MODEL has on its device, and what its last run took."""
    run = patcher.get_attachment(RUN) or _Run()
    total = int(patcher.model_size())
    resident = int(patcher.loaded_size()) if run.resident is None else run.resident
    times = [end - begin for begin, end in zip(run.passes, run.passes[1:], strict=False)]
    return Measured(
        mode=run.mode or offload_of(patcher).mode,
        device=device_facts(patcher.load_device).name,
        dynamic=patcher.is_dynamic(),
        total=total,
        resident=min(resident, total),
        streamed=max(0, total - resident),
        peak=run.peak,
        load_peak=run.load_peak,
        passes=len(times),
        seconds_per_pass=statistics.median(times[1:] or times) if times else None,
    )


def _measured_lines(patcher: ModelPatcher) -> list[str]:
    found = measured(patcher)
    return ["", found.text] if found.passes else []
