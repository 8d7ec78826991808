"""Float models of the families that SVDQuant checkpoints are published of.

Run in the oracle interpreter: ``python svdq_floats.py OUT NAME ...`` writes ``OUT/NAME/`` as
``save_pretrained`` does it (float32) and ``OUT/NAME/run.safetensors`` with inputs ``in.*`` of one
pass. Widths are multiples of 128 and so are all layers that a converter quantizes. FLUX.1's other
models differ in what goes in; the server's takes CLIP-L's 768 channels as text.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tiny_models import build, example_inputs

SHORT = {"num_layers": 1, "num_single_layers": 1}
#: name -> key of ``tiny_models.SPECS``, width, arguments of the diffusers class
MODELS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "flux": ("flux", 256, {}),
    "flux_schnell": ("flux_schnell", 256, SHORT),
    "flux_depth": ("flux", 256, {**SHORT, "in_channels": 128, "out_channels": 64}),
    "flux_fill": ("flux", 256, {**SHORT, "in_channels": 384, "out_channels": 64}),
    "flux_server": (
        "flux", 256, {"joint_attention_dim": 768, "pooled_projection_dim": 768},
    ),
    "flux2_klein": ("flux2_klein", 256, SHORT),
    "chroma": ("chroma", 256, {"num_single_layers": 1}),
    "qwen_image": ("qwen_image", 256, {"num_layers": 1}),
    "qwen_image_edit": ("qwen_image_edit", 256, {"num_layers": 1}),
    "z_image": ("z_image", 384, {"n_layers": 1}),
    "sdxl": (
        "sdxl",
        128,
        {
            "block_out_channels": [128, 256],
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
            "transformer_layers_per_block": [1, 1],
            "attention_head_dim": [2, 4],
            "layers_per_block": 1,
        },
    ),
    "chroma_whole": ("chroma_whole", 3072, {}),
    "qwen_image_whole": ("qwen_image_whole", 3072, {}),
    "z_image_whole": ("z_image_whole", 3840, {}),
    "sdxl_vega_whole": ("sdxl_vega_whole", 320, {}),
}  # fmt: skip


def main(out: str, *names: str) -> None:
    torch.set_num_threads(2)
    for name in names:
        family, width, config = MODELS[name]
        model = build(family, width=width, seed=sum(map(ord, name)), **config)
        model.save_pretrained(Path(out) / name)
        inputs = example_inputs(family, model)
        tensors = {f"in.{key}": value.contiguous() for key, value in inputs.items()}
        save_file(tensors, Path(out) / name / "run.safetensors")


if __name__ == "__main__":
    main(*sys.argv[1:])
