"""The host's device and memory, as facts."""

from __future__ import annotations

import comfy.model_management as mm
import psutil

from ..report import DeviceFacts

__all__ = ["device_facts"]


def device_facts() -> DeviceFacts:
    """The device that the host loads models to, and its memory now."""
    device = mm.get_torch_device()
    return DeviceFacts(
        device=device,
        name=mm.get_torch_device_name(device),
        memory=int(mm.get_total_memory(device)),
        free=int(mm.get_free_memory(device)),
        host_memory=int(psutil.virtual_memory().available),
        reserve=int(mm.minimum_inference_memory()),
    )
