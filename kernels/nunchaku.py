"""nunchaku's compiled kernels, used where its wheel is present. Never imported unasked."""

from __future__ import annotations

from importlib.util import find_spec

__all__ = ["why_unavailable"]


def why_unavailable(device: str) -> str | None:
    """None where the real nunchaku wheel is installed and the device is one it has kernels for.

    The package of that name on the Python package index is an unrelated statistics library; the
    real one is known by its ``_C`` extension module.
    """
    if device != "cuda":
        return f"nunchaku has kernels for CUDA devices only, this is {device}"
    if find_spec("nunchaku") is None:
        return "nunchaku is not installed"
    if find_spec("nunchaku._C") is None:
        return (
            "the installed package called nunchaku is the statistics library of that name, "
            "not the diffusion engine"
        )
    return None
