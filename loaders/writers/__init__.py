"""Containers that a quantized model can be written to."""

from __future__ import annotations

from .base import Container, Layer, Model, Part
from .comfy import Comfy
from .modelopt import ModelOpt
from .nunchaku import Nunchaku
from .sdnq import Sdnq

__all__ = ["CONTAINERS", "Container", "Layer", "Model", "Part"]

CONTAINERS: dict[str, Container] = {
    container.name: container for container in (Comfy(), Sdnq(), Nunchaku(), ModelOpt())
}
"""By the names that nodes and the terminal know them by."""
