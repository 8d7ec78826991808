"""Memory that kernels reuse: a buffer for each device, stream and slot, of the largest size wanted.

A weight that is unpacked for a product is needed until the product is done, and the next weight
may then stand in the same place: work of one stream is done in order. While a CUDA graph is
recorded the memory is the graph's own, since it may be replayed beside anything else.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from .configs import machine_of

__all__ = ["chunk_bytes", "get", "release"]

SMALL_CACHE = 16 << 20  # a cache below this cannot hold a useful part of a weight
LARGEST = 256 << 20

_buffers: dict[tuple[torch.device, int, int, str], Tensor | None] = {}
_lock = threading.Lock()


def get(device: torch.device, nbytes: int, dtype: torch.dtype, slot: str = "") -> Tensor:
    """A 1-D tensor of any content, valid until the next call for the same slot and stream."""
    stream = 0
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            return torch.empty(nbytes // dtype.itemsize, dtype=dtype, device=device)
        stream = torch.cuda.current_stream(device).cuda_stream
    elif device.type == "xpu":
        stream = torch.xpu.current_stream(device).sycl_queue
    key = (device, stream, threading.get_ident(), slot)
    with _lock:
        found = _buffers.get(key)
        if found is None or found.numel() < nbytes:
            found = _buffers[key] = None  # so that the memory is there for the larger one
            with torch.inference_mode(False):
                found = _buffers[key] = torch.empty(nbytes, dtype=torch.uint8, device=device)
    return found[:nbytes].view(dtype)


def release() -> None:
    """Forget all buffers."""
    with _lock:
        _buffers.clear()


def chunk_bytes(device: torch.device, *, whole: bool = False) -> int:
    """How much of a weight to unpack at once.

    Half of the last-level cache, where the product finds it again; `whole` for products that lose
    more by being cut than the cache gains. Never more than LARGEST.
    """
    cache = machine_of(device).cache
    return LARGEST if whole or cache < SMALL_CACHE else cache // 2
