"""Single weights as ModelOpt's exporter stores them.

Run in the ``modelopt`` interpreter: ``python modelopt_weights.py OUT`` writes
``OUT/weights.safetensors`` with ``CASE/weight`` (as the exporter met it, smoothed where the case
smooths), ``CASE/codes``, ``CASE/scale``, ``CASE/scale_2``, ``CASE/input_scale`` and
``CASE/largest`` (of the activations), as far as the format has them.

Every number comes out of ModelOpt's own quantizers and the function by which its exporter packs a
layer.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""
warnings.filterwarnings("ignore")

import modelopt.torch.quantization as mtq  # noqa: E402
import torch  # noqa: E402
from modelopt.torch.export.unified_export_hf import _export_quantized_weight  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from torch import Tensor, nn  # noqa: E402

CONFIGS = {
    "fp8": "FP8_DEFAULT_CFG",
    "fp8_rows": "FP8_PER_CHANNEL_PER_TOKEN_CFG",
    "fp8_blocks": "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG",
    "nvfp4": "NVFP4_DEFAULT_CFG",
    "nvfp4_weights": "W4A16_NVFP4_CFG",
    "nvfp4_fp8": "W4A8_NVFP4_FP8_CFG",
    "mxfp8": "MXFP8_DEFAULT_CFG",
    "int8": "INT8_DEFAULT_CFG",
    "int8_weights": "INT8_WEIGHT_ONLY_CFG",
    "int4": "INT4_BLOCKWISE_WEIGHT_ONLY_CFG",
    "int4_awq": "INT4_AWQ_CFG",
}


def make(case: str, config: str, shape: tuple[int, int], dtype: torch.dtype, seed: int) -> dict:
    torch.manual_seed(seed)
    layer = nn.Sequential(nn.Linear(shape[1], shape[0], bias=False)).to(dtype).eval()
    weight = torch.randn(shape) * 0.05
    weight[torch.rand(shape) < 0.01] *= 7
    weight[1, :32] = 0  # a whole group of every format
    weight[:, shape[1] // 2] *= 20
    layer[0].weight.data.copy_(weight)
    x = (torch.randn(40, shape[1]) * torch.rand(shape[1]).mul(3).exp()).to(dtype)
    model = mtq.quantize(layer, getattr(mtq, config), forward_loop=lambda module: module(x))
    linear = model[0]
    met = linear.weight.detach().clone()
    _export_quantized_weight(linear, dtype)
    found: dict[str, Tensor | None] = {
        "weight": met,
        "codes": linear.weight.detach(),
        "largest": x.abs().max().float(),
    }
    for part in ("weight_scale", "weight_scale_2", "input_scale"):
        found[part.removeprefix("weight_")] = getattr(linear, part, None)
    name = f"{case}-{'x'.join(map(str, shape))}-{str(dtype).removeprefix('torch.')}-{seed}"
    return {f"{name}/{part}": t.contiguous() for part, t in found.items() if t is not None}


@torch.no_grad()
def main(out: str) -> None:
    torch.set_num_threads(1)
    tensors: dict[str, Tensor] = {}
    for case, config in CONFIGS.items():
        for seed, (shape, dtype) in enumerate(
            (
                ((48, 256), torch.bfloat16),
                ((130, 384), torch.bfloat16),
                ((64, 640), torch.float32),
            )
        ):
            tensors |= make(case, config, shape, dtype, seed + 1)
    save_file(tensors, Path(out) / "weights.safetensors")


if __name__ == "__main__":
    main(*sys.argv[1:])
