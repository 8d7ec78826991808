"""Charts as ComfyUI's IMAGE."""

from __future__ import annotations

import numpy as np
import torch

from ..loaders.charts import Chart, draw

__all__ = ["image_of"]


def image_of(chart: Chart, width: int = 1024) -> torch.Tensor:
    """The drawn chart, float32 ``[1, H, W, 3]`` from 0 to 1."""
    pixels = np.asarray(draw(chart, width), dtype=np.float32) / 255
    return torch.from_numpy(pixels)[None]
