"""A small float model and what the real ModelOpt exports of it.

Run in the ``modelopt`` interpreter: ``python modelopt_written.py OUT FAMILY CASE ...`` writes
``OUT/float/``, the model in bf16 as diffusers saves it, and ``OUT/CASE/`` for each case of
``modelopt_files``, all of that model.
"""

from __future__ import annotations

import copy
import re
import sys
from pathlib import Path

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.export import export_hf_checkpoint
from modelopt_files import CASES, FAMILIES, cast, cpu_stand_ins, quant_config, shake
from tiny_models import build, example_inputs, forward

SEED = 11


def main(out: str, family: str, *cases: str) -> None:
    """Write the model and the cases."""
    torch.set_num_threads(1)
    cpu_stand_ins()
    spec, width, less, skip = FAMILIES[family]
    torch.manual_seed(SEED)
    source = build(spec, width=width, seed=SEED, **less)
    shake(source, SEED)
    source = source.to(torch.bfloat16).eval()
    source.save_pretrained(Path(out) / "float")
    for case in cases:
        model = copy.deepcopy(source)

        def calibrate(module: torch.nn.Module) -> None:
            inputs = cast(example_inputs(spec, module, SEED), torch.bfloat16)
            with torch.no_grad():
                forward(spec, module, inputs)

        model = mtq.quantize(model, quant_config(CASES[case].config), forward_loop=calibrate)
        mtq.disable_quantizer(model, lambda name: re.match(skip, name) is not None)
        export_hf_checkpoint(model, export_dir=Path(out) / case)


if __name__ == "__main__":
    main(*sys.argv[1:])
