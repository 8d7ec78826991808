"""Makes the benchmark's checkpoints with the real sdnq package.

Run in the oracle interpreter: ``python make_checkpoint.py OUT FORMAT``. FLUX.1 at its real width
with fewer blocks, or with all its blocks at a smaller width; random bf16 weights, quantized by the
package's own functions block by block, so that no more than one float block is in memory. Written
twice by the package: ``OUT/FORMAT-single`` (one file) and ``OUT/FORMAT-sharded`` (500 MB shards
and an index).

| FORMAT   | blocks (double, single) | width | weights | file   |
|----------|-------------------------|-------|---------|--------|
| uint4    | 5, 10                   | 3072  | 3.2 G   | 2.0 GB |
| int8     | 3, 7                    | 3072  | 2.1 G   | 2.1 GB |
| int8deep | 19, 38                  | 1280  | 2.1 G   | 2.1 GB |
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel
from sdnq import SDNQConfig
from sdnq.loader import save_sdnq_model
from sdnq.quantizer import add_module_skip_keys, apply_sdnq_to_module
from torch import nn

BLOCKS = {"uint4": (5, 10, 24), "int8": (3, 7, 24), "int8deep": (19, 38, 10)}  # and heads of 128
SHARD_SIZES = {"single": "50GB", "sharded": "500MB"}


def parts(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Modules that are filled and quantized one after another: blocks, and the rest."""
    found = []
    for name, child in model.named_children():
        if isinstance(child, nn.ModuleList):
            found += [(f"{name}.{index}", block) for index, block in enumerate(child)]
        else:
            found.append((name, child))
    return found


def fill(module: nn.Module) -> None:
    """Random bf16 weights in place of the meta tensors."""
    module.to_empty(device="cpu")
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape).mul_(0.02).to(torch.bfloat16)


@torch.no_grad()
def make(format_name: str) -> nn.Module:
    torch.manual_seed(0)
    double, single, heads = BLOCKS[format_name]
    with torch.device("meta"):
        model = FluxTransformer2DModel(
            num_layers=double,
            num_single_layers=single,
            num_attention_heads=heads,
            guidance_embeds=True,
        )
    model.eval()
    model, config = add_module_skip_keys(
        model, SDNQConfig(weights_dtype=format_name.removesuffix("deep"))
    )
    for name, module in parts(model):
        fill(module)
        if list(module.children()):  # a top-level Linear stands in the skip list of FLUX.1
            apply_sdnq_to_module(module, config, torch_dtype=torch.bfloat16, full_param_name=name)
    model.quantization_config = model.config.quantization_config = config
    model.config["quantization_config"] = config.to_dict()
    return model


def main(out: str, format_name: str) -> None:
    model = make(format_name)
    for kind, size in SHARD_SIZES.items():
        save_sdnq_model(model, str(Path(out) / f"{format_name}-{kind}"), max_shard_size=size)


if __name__ == "__main__":
    main(*sys.argv[1:])
