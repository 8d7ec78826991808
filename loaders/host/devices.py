"""The host's device and memory, as facts."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import comfy.model_management as mm
import folder_paths
import psutil
import torch

from ...kernels.triton.configs import use_folder
from ..memory_plan import DeviceFacts

__all__ = ["device_facts", "tiles_folder", "use_searched_tiles"]


def device_facts(device: torch.device | None = None) -> DeviceFacts:
    """A device, or the one that the host loads models to, and its memory now."""
    device = device or mm.get_torch_device()
    return DeviceFacts(
        device=device,
        name=mm.get_torch_device_name(device),
        memory=int(mm.get_total_memory(device)),
        free=int(mm.get_free_memory(device)),
        host_memory=int(psutil.virtual_memory().available),
        reserve=int(mm.minimum_inference_memory()),
        streams=mm.NUM_STREAMS,
    )


def tiles_folder() -> Path:
    """Where tiles of the Triton kernels are that somebody searched on this computer."""
    return Path(folder_paths.get_user_directory()) / "lowbit"


@lru_cache(maxsize=16)
def use_searched_tiles(device: torch.device) -> int:
    """Use those of a device from now on; how many there are. Read once in a process."""
    return use_folder(tiles_folder(), device) if device.type in ("cuda", "xpu") else 0
