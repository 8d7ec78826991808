"""A small float model, what the real sdnq package makes of it, and how it reads what others wrote.

Run in the oracle interpreter:

``python sdnq_written.py OUT make FAMILY WIDTH SETTINGS`` writes ``OUT/float/``, the model in bf16
as diffusers saves it, and for each ``{case: settings}`` of the JSON object SETTINGS the folder
``OUT/CASE/`` that the package saves.

``python sdnq_written.py OUT open FOLDER ...`` opens folders with the package's own loader and
writes ``OUT/NAME.safetensors`` for each: its float32 dequantization of every quantized weight, all
other tensors as they are, and ``out``, a pass of the model.
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import sdnq
import torch
from safetensors.torch import save_file
from sdnq_models import dequantized
from tiny_models import build, example_inputs, forward

SEED = 5


def make(out: Path, family: str, width: str, settings: str) -> None:
    """The float model and the package's checkpoints of it."""
    torch.manual_seed(SEED)
    source = build(family, width=int(width), seed=SEED).to(torch.bfloat16).eval()
    source.save_pretrained(out / "float")
    for case, config in json.loads(settings).items():
        torch.manual_seed(SEED)
        model = sdnq.sdnq_post_load_quant(
            copy.deepcopy(source),
            torch_dtype=torch.bfloat16,
            quantization_config=sdnq.SDNQConfig(**config),
        )
        model.save_pretrained(out / case)


def open_(out: Path, family: str, *folders: str) -> None:
    """What the package reads in each folder."""
    for folder in map(Path, folders):
        model = sdnq.load_sdnq_model(str(folder), dtype=torch.bfloat16, device="cpu").eval()
        golden = {
            f"{name}.weight": dequantized(module)
            for name, module in model.named_modules()
            if hasattr(module, "sdnq_dequantizer")
        }
        parts = ("scale", "zero_point", "svd_up", "svd_down")
        rest = {
            name: value.contiguous()
            for name, value in model.state_dict().items()
            if name not in golden and name.rpartition(".")[2] not in parts
        }
        inputs = example_inputs(family, model, SEED)
        for name, value in inputs.items():
            if value.is_floating_point():
                inputs[name] = value.to(torch.bfloat16)
        with torch.no_grad():
            result = forward(family, model, inputs)
        tensors = {**rest, **golden, "out": result.contiguous()}
        save_file(tensors, out / f"{folder.name}.safetensors")


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"make": make, "open": open_}[sys.argv[2]](Path(sys.argv[1]), *sys.argv[3:])
