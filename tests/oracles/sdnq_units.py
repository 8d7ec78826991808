"""Unit facts of the sdnq package: packed words, float tables, single layers, matmul operands.

Run in the oracle interpreter: ``python sdnq_units.py OUT`` writes ``OUT/PART.safetensors`` (names
are CASE/TENSOR) and ``OUT/PART.json`` (what the package says about each case) for each part.

| part     | a case is                                                                          |
|----------|------------------------------------------------------------------------------------|
| words    | `values` that were packed into `words`, for every packed integer                     |
| floats   | `words` of every code and their `values`; `x` and what encoding made of it, `rounded`|
| hadamard | `matrix` of a size and basis                                                         |
| layers   | one quantized layer: `original`, its tensors (scales and factors float32),           |
|          | `dequantized` in float32                                                             |
| matmul   | the same layer with `x`, `bias` and the product `y` by the package's own operands    |
"""

from __future__ import annotations

import itertools
import json
import math
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from sdnq.common import dtype_dict
from sdnq.layers.linear.linear_fp8 import get_fp8_matmul_inputs
from sdnq.layers.linear.linear_fp16 import get_fp16_matmul_inputs
from sdnq.layers.linear.linear_int8 import get_int8_matmul_inputs
from sdnq.layers.linear.linear_uint8 import get_uint8_matmul_inputs
from sdnq.packed_float import pack_float, unpack_float
from sdnq.packed_int import pack_int, unpack_int
from sdnq.quant_utils import build_hadamard_n2, build_hadamard_n4, get_hadamard
from sdnq.quantizer import SDNQConfig, sdnq_quantize_layer
from sdnq.utils import get_sdnq_params
from torch import Tensor, nn

tensors: dict[str, Tensor] = {}
cases: dict[str, dict] = {}


def keep(case: str, facts: dict, **parts: Tensor | None) -> None:
    """Record a case; 1-bit words, which the package widens to int64, are kept as the bytes."""
    cases[case] = facts
    for name, tensor in parts.items():
        if tensor is not None:
            tensor = tensor.detach().contiguous().clone()
            if name in ("words", "weight") and tensor.dtype in (torch.int64, torch.bool):
                tensor = tensor.to(torch.uint8)
            tensors[f"{case}/{name}"] = tensor


def own_names() -> list[str]:
    """Every dtype once, without aliases and the 32-bit ones."""
    seen = {}
    for name, row in dtype_dict.items():
        seen.setdefault(id(row), name)
    return [name for name in seen.values() if dtype_dict[name]["num_bits"] <= 16]


# ------------------------------------------------------------------------------------ bit layouts


def words() -> None:
    for seed, name in itertools.product((1, 2), own_names()):
        row = dtype_dict[name]
        if not (row["is_integer"] and row["is_packed"]):
            continue
        torch.manual_seed(seed)
        top = 2 ** row["num_bits"] + row["min"]  # what the bits can hold
        values = torch.randint(row["min"], top, (16 * 23,), dtype=torch.int32)
        packed = pack_int(values.to(row["torch_dtype"]), name)
        back = unpack_int(packed, name, values.shape)
        assert torch.equal(back.to(torch.int32), values), name
        keep(f"{name}#{seed}", {"format": name}, values=values, words=packed)


def floats() -> None:
    for name in own_names():
        row = dtype_dict[name]
        if row["is_integer"] or not row["is_packed"]:
            continue
        bits = row["num_bits"]
        codes = torch.arange(1 << bits, dtype=torch.int32).repeat(max(1, 16 >> bits))
        if bits in (8, 16):
            packed = codes.to(row["storage_dtype"])
        else:
            integer = f"uint{bits}"
            packed = pack_int(codes.to(dtype_dict[integer]["torch_dtype"]), integer)
        values = unpack_float(packed, name, codes.shape)
        torch.manual_seed(bits)
        x = (torch.rand(256) * 2 - 1) * row["max"]
        x[:128] = torch.randn(128) * row["max"] / 8
        x = x.clamp(row["min"], row["max"])
        rounded = unpack_float(pack_float(x.clone(), name), name, x.shape)
        facts = {"format": name, "min": row["min"], "max": row["max"]}
        keep(name, facts, words=packed, values=values, x=x, rounded=rounded)


def hadamard() -> None:
    for size in (4, 8, 16, 32, 64, 128, 256):
        keep(f"2/{size}", {"size": size, "basis": 2}, matrix=build_hadamard_n2(size))
        if math.log2(size) % 2 == 0:
            keep(f"4/{size}", {"size": size, "basis": 4}, matrix=build_hadamard_n4(size))


# ----------------------------------------------------------------------------------------- layers

MAKE = {
    "linear": lambda o, i: nn.Linear(i, o),
    "embedding": lambda v, e: nn.Embedding(v, e),
    "conv1d": lambda o, c, k: nn.Conv1d(c, o, k),
    "conv2d": lambda o, c, h, w: nn.Conv2d(c, o, (h, w)),
    "conv3d": lambda o, c, d, h, w: nn.Conv3d(c, o, (d, h, w)),
}


def make_layer(kind: str, shape: list[int], seed: int, config: dict) -> tuple[nn.Module, Tensor]:
    """A layer with outliers in its weight, quantized in float32, and that weight."""
    torch.manual_seed(seed)
    layer = MAKE[kind](*shape)
    weight = torch.randn(shape) * 0.05
    weight[torch.rand(shape) < 0.01] *= 6
    weight[0] = weight[0].abs() + 0.01  # a row that does not straddle zero
    layer.weight = nn.Parameter(weight.clone())
    settings = {"quant_conv": True, "quant_embedding": True, **config}
    layer, _ = sdnq_quantize_layer(
        layer, SDNQConfig(**settings), torch_dtype=torch.float32, param_name="x.weight"
    )
    return layer, weight


def describe(kind: str, layer: nn.Module, config: dict) -> dict:
    told = layer.sdnq_dequantizer
    mm = told.use_quantized_matmul
    transposed = mm and not told.re_quantize_for_matmul and not told.is_packed
    code_shape = list(told.quantized_weight_shape)
    svd = getattr(layer, "svd_up", None) is not None
    return {
        "kind": kind,
        "format": told.weights_dtype,
        "config": config,
        "shape": list(told.original_shape),
        "code_shape": code_shape[::-1] if transposed else code_shape,
        "transposed": transposed,
        "svd_transposed": bool(svd and mm),
        "hadamard": told.hadamard_group_size if told.use_hadamard else 0,
        "codebook": told.use_codebook,
        "group_size": told.group_size,
    }


def add_layer(kind: str, shape: list[int], seed: int, **config: object) -> None:
    layer, original = make_layer(kind, shape, seed, config)
    params = get_sdnq_params(layer)
    dequantized = layer.sdnq_dequantizer(
        **params,
        skip_quantized_matmul=layer.sdnq_dequantizer.use_quantized_matmul,
        skip_compile=True,
        dtype=torch.float32,
    )
    name = f"{kind}-{'x'.join(map(str, shape))}-{seed}-" + "-".join(
        f"{key}={value}" for key, value in config.items()
    )
    if kind == "embedding":
        index = torch.randint(0, shape[0], (3, 7))
        params |= {"index": index, "embedded": layer(index)}
    keep(name, describe(kind, layer, config), original=original, dequantized=dequantized, **params)


def layers() -> None:
    for number, name in enumerate(own_names()):
        row = dtype_dict[name]
        if name in ("float8_e8m0fnu", "float32"):
            continue
        seed = 10 + number
        add_layer("linear", [32, 120], seed, weights_dtype=name)
        add_layer("linear", [48, 80], seed, weights_dtype=name, group_size=16)
        if row["is_integer"] or number % 5 == 0:
            add_layer("conv2d", [16, 24, 3, 2], seed, weights_dtype=name, group_size=8)
            add_layer("embedding", [80, 48], seed, weights_dtype=name, group_size=16)
    mm = {"use_quantized_matmul": True}
    svd = {"use_svd": True, "svd_rank": 8}
    rotated = {"use_hadamard": True}
    learnt = {"use_codebook": True}
    for seed, name in itertools.product((1, 2), ("int8", "uint8", "float8_e4m3fn")):
        add_layer("linear", [64, 96], seed, weights_dtype=name, **mm)
        add_layer("linear", [64, 96], seed, weights_dtype=name, **mm, **svd, **rotated)
        add_layer("linear", [64, 96], seed, weights_dtype=name, group_size=-2)
        add_layer(
            "conv2d", [32, 32, 3, 3], seed, weights_dtype=name, use_quantized_matmul_conv=True
        )
    for name in ("int4", "uint4", "int5", "uint2", "int8", "uint8", "int12", "float4_e2m1fn"):
        for extra in (svd, rotated, {**svd, **rotated}, {**svd, **mm}):
            add_layer("linear", [64, 160], 3, weights_dtype=name, **extra)
        add_layer("linear", [48, 90], 4, weights_dtype=name, group_size=30)
        add_layer("linear", [16, 45], 5, weights_dtype=name, group_size=-1)
        add_layer("linear", [32, 64], 5, weights_dtype=name, group_size=-2)
        add_layer("linear", [32, 192], 5, weights_dtype=name, **rotated, hadamard_group_size=128)
        add_layer("conv1d", [32, 48, 3], 6, weights_dtype=name, group_size=12)
        add_layer("conv1d", [32, 48, 3], 6, weights_dtype=name, group_size=-1)
        add_layer("conv3d", [16, 32, 1, 2, 2], 7, weights_dtype=name, group_size=16, **svd)
        add_layer("conv2d", [32, 64, 3, 3], 7, weights_dtype=name, **rotated, **svd)
        add_layer("embedding", [64, 96], 8, weights_dtype=name, **rotated, **svd)
    for name in ("uint1", "uint2", "uint3", "uint4", "uint6", "uint8"):
        add_layer("linear", [32, 512], 9, weights_dtype=name, group_size=256, **learnt)
        add_layer("linear", [32, 96], 9, weights_dtype=name, group_size=-1, **learnt)
        add_layer("linear", [32, 96], 9, weights_dtype=name, group_size=-2, **learnt)
        add_layer("linear", [32, 512], 9, weights_dtype=name, **learnt, **svd, **rotated)
        add_layer("conv2d", [32, 64, 3, 3], 9, weights_dtype=name, group_size=32, **learnt)
        add_layer("conv2d", [32, 64, 3, 3], 9, weights_dtype=name, group_size=-1, **learnt)
        add_layer("embedding", [64, 96], 9, weights_dtype=name, group_size=24, **learnt)


# ----------------------------------------------------------------------------------------- matmul

OPERANDS = {
    "int8": get_int8_matmul_inputs,
    "uint8": get_uint8_matmul_inputs,
    "fp8": get_fp8_matmul_inputs,
    "fp16": get_fp16_matmul_inputs,
}


def add_matmul(matmul: str, name: str, seed: int, bias: bool, **config: object) -> None:
    config = {
        "weights_dtype": name,
        "quantized_matmul_dtype": matmul,
        "use_quantized_matmul": True,
        **config,
    }
    layer, _ = make_layer("linear", [64, 1296], seed, config)
    x = torch.randn(2, 20, 1296) * torch.rand(2, 20, 1) + 0.3
    x[0, 3] = 0
    offset = torch.randn(64) if bias else None
    told = layer.sdnq_dequantizer
    stored = get_sdnq_params(layer)
    facts = describe("linear", layer, config)
    zero_point = None
    quantized_shape = None
    if told.re_quantize_for_matmul:
        weight, scale, *rest = told.re_quantize_matmul(**stored, skip_compile=True)
        zero_point = rest[0] if rest else None
    else:
        weight, scale, zero_point = layer.weight, layer.scale, layer.zero_point
        quantized_shape = told.quantized_weight_shape if told.is_packed else None
    more = {"zero_point": zero_point} if matmul in ("int8", "uint8") else {}
    xq, wq, x_scale, scale, added, _, _ = OPERANDS[matmul](
        x,
        weight,
        scale,
        bias=offset,
        svd_up=stored["svd_up"],
        svd_down=stored["svd_down"],
        hadamard=get_hadamard(facts["hadamard"]) if facts["hadamard"] else None,
        quantized_weight_shape=quantized_shape,
        weights_dtype=name,
        **more,
    )
    if matmul in ("int8", "uint8"):
        # The integers exactly, then the package's float32 operations.
        product = (xq.to(torch.int64) @ wq.to(torch.int64)).to(torch.int32).to(torch.float32)
        product.mul_(x_scale)
        y = product.mul_(scale) if added is None else torch.addcmul(added, product, scale)
    else:
        product = xq.to(torch.float64) @ wq.to(torch.float64)
        y = product * x_scale * scale
        y = y if added is None else y + added
    keep(
        f"{matmul}-{name}-{seed}-{bias}-" + "-".join(f"{k}={v}" for k, v in config.items()),
        {**facts, "matmul": matmul, "exact": stored["svd_up"] is None and not facts["hadamard"]},
        x=x,
        bias=offset,
        y=y.view(2, 20, -1),
        **stored,
    )


def matmul() -> None:
    more = {"use_svd": True, "svd_rank": 8, "use_hadamard": True}
    for matmul_dtype in ("int8", "uint8"):
        for name in ("int8", "uint8", "uint7", "int6", "int4", "uint4", "uint3", "int12", "uint1"):
            for seed, bias in ((1, False), (2, True)):
                add_matmul(matmul_dtype, name, seed, bias)
            add_matmul(matmul_dtype, name, 3, True, group_size=-1)
            add_matmul(matmul_dtype, name, 4, False, group_size=-2)
        for name in ("int8", "uint8", "uint4", "float4_e2m1fn", "float8_e4m3fn"):
            add_matmul(matmul_dtype, name, 5, True, **more)
        add_matmul(matmul_dtype, "float5_e3m1fn", 6, True)
        add_matmul(matmul_dtype, "uint4", 6, True, use_codebook=True, group_size=108)
    for matmul_dtype in ("fp8", "fp16"):
        for name in ("float8_e4m3fn", "float8_e5m2", "float4_e2m1fn", "float6_e3m2fn", "int4"):
            for seed, bias in ((1, False), (2, True)):
                add_matmul(matmul_dtype, name, seed, bias)
            add_matmul(matmul_dtype, name, 3, True, group_size=-1)
            add_matmul(matmul_dtype, name, 5, True, **more)
        add_matmul(matmul_dtype, "float16", 6, True)
        add_matmul(matmul_dtype, "float5_e3m2fnu", 7, True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for part in (words, floats, hadamard, layers, matmul):
        with torch.no_grad():
            part()
        save_file(tensors, Path(sys.argv[1]) / f"{part.__name__}.safetensors")
        told = json.dumps(cases)
        (Path(sys.argv[1]) / f"{part.__name__}.json").write_text(told, encoding="utf-8")
        tensors.clear()
        cases.clear()
