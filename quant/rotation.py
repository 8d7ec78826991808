"""Which Hadamard block rotates a weight."""

from __future__ import annotations

__all__ = ["block_size"]


def block_size(channels: int, wanted: int) -> int:
    """The largest power of two that divides `channels` and is at most about `wanted`; 0 below 4.

    The search starts at the power of two at or above min(channels, wanted), as the producer's does.
    """
    size = 1 << (min(channels, wanted) - 1).bit_length()
    while channels % size:
        size //= 2
    return size if size >= 4 else 0
