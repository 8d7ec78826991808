"""Triton kernels. Triton itself is imported only when an implementation of this folder is asked."""

from __future__ import annotations

from importlib.util import find_spec

__all__ = ["why_unavailable"]


def why_unavailable(device: str) -> str | None:
    """None where Triton is installed and can drive this device."""
    if device not in ("cuda", "xpu"):
        return f"Triton has no driver for a {device} device"
    if find_spec("triton") is None:
        return "Triton is not installed"
    return None
