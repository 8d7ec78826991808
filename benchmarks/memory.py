"""The host's memory management over our weights: every step must give the same bits.

| check        | what happens                                                                      |
|--------------|-----------------------------------------------------------------------------------|
| load         | a MODEL under Dynamic VRAM (comfy-aimdo), sampled                                 |
| static       | the same weights without Dynamic VRAM: the same latent                            |
| cap          | all but a few gigabytes of the device are taken, sampled again                    |
| evict        | another MODEL is sampled in between                                               |
| LoRA         | one put on changes the latent; taken off, the first one comes back                |
| bits         | every code of every weight is what it was                                         |
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable

import torch
from flux import SMALL, Size, model, shapes_of, state_dict
from layers import DTYPES, Wanted
from sampling import sample, unload

MIDDLE = Size(double=6, single=12, side=512)
STEPS = 2
LEFT_FREE = 4 << 30
LORA_RANK = 16


def enable_dynamic_vram() -> str | None:
    """As the host's ``main.py`` does at its start; None, or why there is none.

    Call it before torch makes a CUDA context.
    """
    if not torch.cuda.is_available():
        return "Dynamic VRAM needs an NVIDIA GPU"
    import comfy_aimdo.control as control

    try:
        control.init(simple_vram_headroom=None, nvml_pressure=True)
    except TypeError:  # older protocols take less
        control.init()
    import comfy.memory_management
    import comfy.model_management as mm
    import comfy.model_patcher

    devices = mm.get_all_torch_devices()
    try:
        ready = control.init_devices((device.index, 0) for device in devices)
    except TypeError:
        ready = control.init_devices(device.index for device in devices)
    if not ready:
        return "comfy-aimdo does not work here"
    comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcherDynamic
    comfy.memory_management.aimdo_enabled = True
    return None


def digest(patcher, pack: Callable) -> str:
    """Of every composite weight's bytes."""
    layout = pack("loaders.layouts.composite").LAYOUT
    total = hashlib.sha256()
    for _, module in sorted(patcher.model.diffusion_model.named_modules()):
        weight = getattr(module, "weight", None)
        if getattr(weight, "_layout_cls", None) == layout:
            for tensor in weight.layout_cls.get_plain_tensors(weight):
                total.update(tensor.cpu().contiguous().view(torch.uint8).numpy())
    return total.hexdigest()


def lora(size: Size) -> dict[str, torch.Tensor]:
    """A LoRA of two kinds of layers, as files name them."""
    noise = torch.Generator().manual_seed(5)
    found = {}
    for name, (n, k) in {
        "diffusion_model.double_blocks.0.img_attn.qkv": (3 * size.hidden, size.hidden),
        "diffusion_model.single_blocks.0.linear2": (size.hidden, 5 * size.hidden),
    }.items():
        found[f"{name}.lora_A.weight"] = torch.randn(LORA_RANK, k, generator=noise) * k**-0.5
        found[f"{name}.lora_B.weight"] = torch.randn(n, LORA_RANK, generator=noise) * 0.1
    return found


def measure(
    wanted: Wanted,
    pack: Callable,
    keep: Callable[[list[dict]], None],
    smoke: bool,
    no_dynamic: str | None,
) -> list[dict]:
    """Rows ``{"form", "check", "equal" or "ok", "seconds", ...}``."""
    found: list[dict] = []
    size, dtype = SMALL if smoke else MIDDLE, DTYPES[wanted.dtype]
    dynamic = no_dynamic is None
    for form in wanted.forms:
        if time.monotonic() > wanted.deadline:
            return [*found, {"stopped": f"no time left before {form}"}]
        _form(form, size, dtype, wanted, pack, found, dynamic, no_dynamic)
        keep(found)
        unload()
    return found


def _form(form, size, dtype, wanted, pack, found, dynamic: bool, no_dynamic: str | None) -> None:
    def note(check: str, started: float, **told) -> None:
        row = {"form": form, "check": check, "seconds": time.perf_counter() - started}
        found.append(row | told)

    def same(out: torch.Tensor) -> dict:
        difference = float((out.double() - first.double()).norm() / first.double().norm())
        return {"equal": torch.equal(out, first), "differs": difference}

    import comfy.sd

    sd = state_dict(shapes_of(size), form, pack, dtype, wanted.device, "cpu")

    def made(dynamic: bool):
        return model(size, form, "auto", pack, dtype, wanted.device, dynamic=dynamic, sd=sd)

    started = time.perf_counter()
    patcher = made(dynamic)
    before = digest(patcher, pack)
    first, _ = sample(patcher, size, STEPS)
    note(
        "load",
        started,
        ok=bool(torch.isfinite(first).all()),
        dynamic=type(patcher).__name__ if dynamic else no_dynamic,
    )
    started = time.perf_counter()
    unload()
    note("unload and again", started, **same(sample(patcher, size, STEPS)[0]))
    started = time.perf_counter()
    static = made(False)
    note("static", started, **same(sample(static, size, STEPS)[0]))
    del static
    unload()
    if wanted.device == "cuda":
        started = time.perf_counter()
        free, _ = torch.cuda.mem_get_info()
        taken = torch.empty(max(free - LEFT_FREE, 0), dtype=torch.uint8, device="cuda")
        note("cap", started, left_gb=LEFT_FREE / 1e9, **same(sample(patcher, size, STEPS)[0]))
        del taken
        unload()
    else:
        found.append({"form": form, "check": "cap", "absent": "needs memory of a device to take"})
    started = time.perf_counter()
    other = model(size, "int8", "dequantize", pack, dtype, wanted.device, dynamic=dynamic)
    sample(other, size, 1)
    note("evict", started, **same(sample(patcher, size, STEPS)[0]))
    del other
    started = time.perf_counter()
    patched, _ = comfy.sd.load_lora_for_models(patcher, None, lora(size), 1.0, 0.0)
    changed, _ = sample(patched, size, STEPS)
    difference = float((changed.double() - first.double()).norm() / first.double().norm())
    note("LoRA on", started, ok=bool(difference > 1e-4), differs=difference)
    del patched
    started = time.perf_counter()
    note("LoRA off", started, **same(sample(patcher, size, STEPS)[0]))
    unload()
    note("bits", started, equal=digest(patcher, pack) == before)
