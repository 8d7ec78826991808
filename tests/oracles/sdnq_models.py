"""Checkpoints of whole small models made by the real sdnq package, with what they mean.

Run in the oracle interpreter: ``python sdnq_models.py OUT FAMILY WIDTH CASE ...`` writes for each
case ``OUT/CASE/`` (as the package saves it), ``OUT/CASE.golden.safetensors`` (its own float32
dequantization of every quantized weight, under the file's names) and ``OUT/CASE.run.safetensors``
(one pass of the float diffusers model that holds those weights: ``in.*`` and ``out``). ``all`` as
a case stands for every one.

The package rounds a sum to bf16 where the low-rank factors or scales are bf16, even when asked for
float32; its factors and scales are made float32 first, so that the golden is exact.
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import sdnq
import torch
from safetensors.torch import save_file
from tiny_models import build, example_inputs, forward

INTEGERS = {f"{sign}int{bits}": {"weights_dtype": f"{sign}int{bits}"}
            for bits in range(1, 17) for sign in ("", "u") if (sign, bits) != ("", 1)}  # fmt: skip
FLOATS = {
    name: {"weights_dtype": name}
    for name in (
        "fp2", "fp3", "fp4", "fp5", "fp6", "fp7", "fp8", "fp9", "fp10", "fp11", "fp12", "fp13",
        "fp14", "fp15", "fp16", "ufp2", "ufp3", "ufp4", "ufp5", "ufp6", "ufp7", "ufp8",
        "float8_e5m2", "float8_e4m3fn_sdnq", "float4_e3m0fn", "float5_e3m1fn", "float6_e2m3fn",
        "float7_e1m5fn", "float8_e3m4fn", "float12_e4m7fn", "float16_e3m12fn",
    )
}  # fmt: skip
SVD = {"use_svd": True, "svd_rank": 16}
MM = {"use_quantized_matmul": True}
HAD = {"use_hadamard": True}
VARIANTS = {
    "int8_rowwise": {"weights_dtype": "int8", "group_size": -1},
    "int8_grouped": {"weights_dtype": "int8", "group_size": 64},
    "int8_tensorwise": {"weights_dtype": "int8", "group_size": -2},
    "int8_mm": {"weights_dtype": "int8", **MM},
    "int8_svd_mm": {"weights_dtype": "int8", **SVD, **MM},
    "int8_had": {"weights_dtype": "int8", **HAD},
    "int8_had_mm": {"weights_dtype": "int8", **HAD, **MM},
    "int8_bf16scale": {"weights_dtype": "int8", "dequantize_fp32": False},
    "uint8_mm": {"weights_dtype": "uint8", **MM},
    "uint8_tensorwise": {"weights_dtype": "uint8", "group_size": -2},
    "fp8_mm": {"weights_dtype": "fp8", **MM},
    "fp8_tensorwise": {"weights_dtype": "fp8", "group_size": -2},
    "fp8_svd_mm": {"weights_dtype": "fp8", **SVD, **MM},
    "fp16_mm": {"weights_dtype": "fp16", **MM},
    "int6_mm": {"weights_dtype": "int6", **MM},
    "uint4_mm": {"weights_dtype": "uint4", **MM},
    "uint4_mm_fp8": {"weights_dtype": "uint4", "quantized_matmul_dtype": "fp8", **MM},
    "uint4_bf16scale": {"weights_dtype": "uint4", "dequantize_fp32": False},
    "uint4_g32": {"weights_dtype": "uint4", "group_size": 32},
    "uint4_tensorwise": {"weights_dtype": "uint4", "group_size": -2},
    "uint4_svd": {"weights_dtype": "uint4", **SVD},
    "uint4_svd_mm": {"weights_dtype": "uint4", **SVD, **MM},
    "uint4_svd_bf16scale": {"weights_dtype": "uint4", "dequantize_fp32": False, **SVD},
    "uint4_had": {"weights_dtype": "uint4", **HAD},
    "uint4_had128": {"weights_dtype": "uint4", "hadamard_group_size": 128, **HAD},
    "uint4_had64_svd": {"weights_dtype": "uint4", "hadamard_group_size": 64, **HAD, **SVD},
    "uint4_had_svd": {"weights_dtype": "uint4", **HAD, **SVD},
    "uint4_cb": {"weights_dtype": "uint4", "use_codebook": True},
    "uint4_cb_svd": {"weights_dtype": "uint4", "use_codebook": True, **SVD},
    "uint4_cb_rowwise": {"weights_dtype": "uint4", "use_codebook": True, "group_size": -1},
    "uint4_cb_tensorwise": {"weights_dtype": "uint4", "use_codebook": True, "group_size": -2},
    "uint3_cb": {"weights_dtype": "uint3", "use_codebook": True},
    "uint8_cb": {
        "weights_dtype": "uint8", "use_codebook": True, "group_size": -1,
        "modules_to_not_convert": ["*.ff*", "*.norm*", "*.proj_*"],
    },
    "uint4_dq": {"weights_dtype": "uint4", "scale_dtype": "fp8"},
    "uint4_dqint": {"weights_dtype": "uint4", "scale_dtype": "uint6", "zero_point_dtype": "int8"},
    "uint4_dqint6": {"weights_dtype": "uint4", "scale_dtype": "uint6"},
    "uint4_dqfloat": {"weights_dtype": "uint4", "scale_dtype": "ufp8", "zero_point_dtype": "fp8"},
    "int5_dq": {"weights_dtype": "int5", "scale_dtype": "uint8"},
    "uint4_cb_dq": {"weights_dtype": "uint4", "use_codebook": True, "scale_dtype": "int8"},
    "uint4_dqcb": {
        "weights_dtype": "uint4", "scale_dtype": "uint6", "use_codebook_scale": True,
    },
    "minimum": {
        "weights_dtype": "uint3",
        "modules_dtype_dict": {"minimum_6bit": ["*.to_q*"], "minimum_uint4": ["*.to_v*"]},
    },
    "overrides": {
        "weights_dtype": "uint4",
        "modules_quant_config": {
            "*.to_k*": {"weights_dtype": "int8", "group_size": -1},
            "*.to_out*": {"use_svd": True, "svd_rank": 8},
            "*ff*": {"use_hadamard": True},
        },
    },
    "unquantized_part": {"weights_dtype": "uint4", "modules_to_not_convert": ["*.to_k.*"]},
    "dyn4": {
        "weights_dtype": "uint4", "use_dynamic_quantization": True,
    },
    "dyn4_mixed": {
        "weights_dtype": "int4", "use_dynamic_quantization": True, "dynamic_loss_threshold": 8e-3,
    },
    "dyn4_mixed_svd_mm": {
        "weights_dtype": "int4", "use_dynamic_quantization": True, "dynamic_loss_threshold": 8e-3,
        **SVD, **MM,
    },
    "dyn4_had_svd": {
        "weights_dtype": "uint4", "use_dynamic_quantization": True, **SVD, **HAD,
    },
}  # fmt: skip
CASES = {**INTEGERS, **FLOATS, **VARIANTS}


def dequantized(module: torch.nn.Module) -> torch.Tensor:
    """The package's own dequantization of one layer, in float32 throughout."""
    params = {
        name: value.detach().float()
        if value is not None and name != "weight" and value.dtype in (torch.bfloat16, torch.float16)
        else value
        for name, value in sdnq.utils.get_sdnq_params(module).items()
    }
    quantizer = module.sdnq_dequantizer
    return quantizer(
        **params,
        skip_quantized_matmul=quantizer.use_quantized_matmul,
        skip_compile=True,
        dtype=torch.float32,
    ).contiguous()


def make(family: str, width: int, case: str, out: Path) -> None:
    """One checkpoint with its goldens."""
    seed = sum(map(ord, case))
    torch.manual_seed(seed)
    source = build(family, width=width, seed=seed)
    model = copy.deepcopy(source).to(torch.bfloat16).eval()
    config = copy.deepcopy(CASES[case])
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
    state = {
        name: golden[name] if name in golden else value.float()
        for name, value in model.state_dict().items()
        if name in golden or name in source.state_dict()  # with buffers: SD3 saves its positions
    }
    target = source.float().eval()
    target.load_state_dict(state, strict=False)
    inputs = example_inputs(family, target, seed)
    with torch.no_grad():
        result = forward(family, target, inputs)
    tensors = {f"in.{name}": value.contiguous() for name, value in inputs.items()}
    save_file(tensors | {"out": result.contiguous()}, out / f"{case}.run.safetensors")


def main(out: str, family: str, width: str, *cases: str) -> None:
    """Write the cases and a list of them."""
    torch.set_num_threads(2)
    names = list(CASES) if cases == ("all",) else list(cases)
    for case in names:
        make(family, int(width), case, Path(out))
    (Path(out) / "cases.json").write_text(json.dumps(names))


if __name__ == "__main__":
    main(*sys.argv[1:])
