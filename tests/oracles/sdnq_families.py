"""Weights of small models of every family, quantized by the real sdnq package, with their meaning.

Run in the oracle interpreter: ``python sdnq_families.py OUT small FAMILY/CASE ...`` writes
``OUT/FAMILY/CASE/`` (as the package saves it) and ``OUT/FAMILY/CASE.golden.safetensors`` (its own
float32 dequantization of every quantized weight). Widths and depths are smaller than what ComfyUI
builds; only names, shapes and storage matter here. ``OUT whole FAMILY WIDTH CASE`` writes one case
as ``sdnq_models.py`` does, which knows no quantized convolutions.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import sdnq
import sdnq_models
import torch
from safetensors.torch import save_file
from sdnq_models import CASES, MM, SVD, dequantized
from tiny_models import build

#: ``{family: (width, arguments of the diffusers class that make it small)}``
FAMILIES: dict[str, tuple[int, dict[str, Any]]] = {
    "chroma": (128, {"num_layers": 1, "num_single_layers": 1}),
    "qwen_image": (128, {"num_layers": 1}),
    "qwen_image_edit": (128, {"num_layers": 1}),
    "z_image": (128, {"n_layers": 1, "n_refiner_layers": 1}),
    "lumina2": (288, {"num_layers": 1, "num_refiner_layers": 1}),
    "wan": (128, {"num_layers": 1, "text_dim": 256}),
    "wan_i2v": (128, {"num_layers": 1, "text_dim": 256, "image_dim": 256}),
    "sd3": (128, {}),
    "sd35": (128, {}),
    "auraflow": (128, {"num_single_dit_layers": 1}),
    "pixart_alpha": (128, {"caption_channels": 256}),
    "pixart_sigma": (128, {"caption_channels": 256}),
    "sdxl": (64, {"transformer_layers_per_block": [1, 1, 1], "layers_per_block": 1}),
    "sd15": (32, {"layers_per_block": 1}),
}

#: Convolutions, which the UNets have.
CONVS: dict[str, dict[str, Any]] = {
    "uint4_conv": {"weights_dtype": "uint4", "quant_conv": True},
    "int8_conv_mm": {
        "weights_dtype": "int8", "quant_conv": True, "use_quantized_matmul_conv": True, **MM,
    },
    "uint4_conv_svd": {"weights_dtype": "uint4", "quant_conv": True, **SVD},
}  # fmt: skip


def make(family: str, case: str, config: dict[str, Any], out: Path) -> None:
    """One checkpoint with its golden."""
    seed = sum(map(ord, family + case))
    torch.manual_seed(seed)
    width, less = FAMILIES[family]
    model = build(family, width=width, seed=seed, **less).to(torch.bfloat16)
    model = sdnq.sdnq_post_load_quant(
        model, torch_dtype=torch.bfloat16, quantization_config=sdnq.SDNQConfig(**config)
    )
    model.save_pretrained(out / case)
    golden = {
        f"{name}.weight": dequantized(module)
        for name, module in model.named_modules()
        if hasattr(module, "sdnq_dequantizer")
    }
    assert golden, f"{case} quantized no layer of {family}"
    save_file(golden, out / f"{case}.golden.safetensors")


def whole(out: str, family: str, width: str, case: str) -> None:
    """One case with its golden and one pass of the float model."""
    torch.set_num_threads(2)
    CASES.update(CONVS)
    sdnq_models.make(family, int(width), case, Path(out))


def small(out: str, *wanted: str) -> None:
    """Each FAMILY/CASE that is asked for."""
    torch.set_num_threads(1)  # tiny tensors: threads only get in each other's way
    for name in wanted:
        family, case = name.split("/")
        folder = Path(out) / family
        folder.mkdir(exist_ok=True)
        make(family, case, dict((CASES | CONVS)[case]), folder)


if __name__ == "__main__":
    {"small": small, "whole": whole}[sys.argv[2]](sys.argv[1], *sys.argv[3:])
