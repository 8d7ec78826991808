"""Single layers of every kind as the real sdnq package stores them, with what they mean.

Run in the oracle interpreter: ``python sdnq_layers.py OUT PACKAGE CASE ...`` writes the cases
("all": every one that the version can make) as one *book*: ``OUT/book.safetensors`` with
``stored/CASE/TENSOR`` (as the package saves it) and ``golden/CASE/TENSOR`` (its own float32
dequantization), and ``OUT/book.json`` with each case's config and logical shapes. PACKAGE is a
folder with another sdnq to use, or ``-`` for the interpreter's own.

What is done to the package, so that it runs here and tells exactly what a file means:

========  ==========================================================================================
versions  change
========  ==========================================================================================
all       scales and low-rank factors are made float32, and the layer's result dtype too: it would
          round sums and the Hadamard matrix to bf16 otherwise, even when asked for float32
< 0.2.2   its wish for Triton before it stores a quantized-matmul layout is granted
0.1.6 to  the all-zero code of floats with a 1-bit exponent decodes to +1.0 there, though it was
0.2.1     written for values near zero (0.1.3 and 0.2.2 decode it to zero): it means zero. The book
          counts such codes as ``zeros``
all       convolutions stored as matrices for quantized matmul: it cannot view its own transposed
          result, and rotates along the kernel's width what was rotated in [O, I]; so the weight is
          taken as a matrix, and the rotation undone by its own function in [O, I]
========  ==========================================================================================
"""

from __future__ import annotations

import copy
import inspect
import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

if __name__ == "__main__" and sys.argv[2] != "-":
    sys.path.insert(0, sys.argv[2])

import sdnq
import sdnq.dequantizer
import sdnq.quantizer
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from safetensors.torch import load_file, save_file
from torch import nn

VERSION = tuple(int(part) for part in sdnq.__version__.split(".")[:3])
PARTS = (
    "weight", "scale", "zero_point", "svd_up", "svd_down",
    "scale_2", "scale_zero_point", "zero_point_scale", "zero_point_2",
)  # fmt: skip

KINDS: dict[str, dict[str, Any]] = {
    "one": {"a": lambda: nn.Linear(32, 16, bias=False)},
    "linears": {
        "a": lambda: nn.Linear(128, 32),
        "b": lambda: nn.Linear(56, 24, bias=False),  # nothing divides it well
        "c": lambda: nn.Linear(32, 32, bias=False),  # square: its shape tells no direction
    },
    "wide": {"a": lambda: nn.Linear(256, 16, bias=False)},
    "deep": {"a": lambda: nn.Linear(256, 16), "b": lambda: nn.Linear(176, 16, bias=False)},
    "conv1": {"a": lambda: nn.Conv1d(64, 32, 3), "b": lambda: nn.Conv1d(32, 32, 1, bias=False)},
    "conv2": {
        "a": lambda: nn.Conv2d(64, 32, (1, 3)),
        "b": lambda: nn.Conv2d(32, 32, 1, bias=False),
    },
    "conv3": {
        "a": lambda: nn.Conv3d(32, 32, (1, 2, 2)),
        "b": lambda: nn.Conv3d(48, 16, (2, 1, 1), bias=False),
    },
    "transposed1": {"a": lambda: nn.ConvTranspose1d(32, 48, 3)},
    "transposed2": {"a": lambda: nn.ConvTranspose2d(32, 48, (1, 3))},
    "transposed3": {"a": lambda: nn.ConvTranspose3d(32, 48, (1, 2, 2))},
    "embedding": {"a": lambda: nn.Embedding(48, 96), "b": lambda: nn.Linear(96, 32)},
}

SVD = {"use_svd": True, "svd_rank": 8}
MM = {"use_quantized_matmul": True}
HAD = {"use_hadamard": True}
HAD16 = {"use_hadamard": True, "hadamard_group_size": 16}
HAD32 = {"use_hadamard": True, "hadamard_group_size": 32}
BF16 = {"dequantize_fp32": False}
CONV = {"quant_conv": True}
CONV_MM = {**CONV, "use_quantized_matmul_conv": True}
EMBEDDING = {"quant_embedding": True}
FIRST, WIDE, HADAMARD, LAST = (0, 1, 3), (0, 1, 6), (0, 1, 9), (0, 2, 8)

#: Widest number formats, where the version before decodes all of them as well.
WIDEST = {(0, 2, 1): 8}

#: ``{name: (kind of layers, config, first version that can make it)}``
VARIANTS: dict[str, tuple[str, dict[str, Any], tuple[int, ...]]] = {
    "int8": ("linears", {"weights_dtype": "int8"}, FIRST),
    "int8_bf16": ("linears", {"weights_dtype": "int8", **BF16}, FIRST),
    "int8_g32": ("linears", {"weights_dtype": "int8", "group_size": 32}, FIRST),
    "int8_rowwise": ("deep", {"weights_dtype": "int8", "group_size": -1}, FIRST),
    "int8_mm": ("linears", {"weights_dtype": "int8", **MM}, FIRST),
    "int8_mm_bf16": ("linears", {"weights_dtype": "int8", **MM, **BF16}, FIRST),
    "int8_mm_svd": ("linears", {"weights_dtype": "int8", **MM, **SVD}, FIRST),
    "int6_mm": ("linears", {"weights_dtype": "int6", **MM}, FIRST),
    "uint8_mm": ("linears", {"weights_dtype": "uint8", **MM}, FIRST),
    "uint8_mm_g32": ("linears", {"weights_dtype": "uint8", "group_size": 32, **MM}, FIRST),
    "fp8_mm": ("linears", {"weights_dtype": "fp8", **MM}, FIRST),
    "fp8_mm_svd": ("linears", {"weights_dtype": "fp8", **MM, **SVD}, FIRST),
    "fp16_mm": ("linears", {"weights_dtype": "fp16", **MM}, FIRST),
    "uint4": ("linears", {"weights_dtype": "uint4"}, FIRST),
    "uint4_deep": ("deep", {"weights_dtype": "uint4"}, FIRST),
    "uint4_bf16": ("linears", {"weights_dtype": "uint4", **BF16}, FIRST),
    "uint4_g32": ("linears", {"weights_dtype": "uint4", "group_size": 32}, FIRST),
    "uint4_rowwise": ("linears", {"weights_dtype": "uint4", "group_size": -1}, FIRST),
    "uint4_svd": ("deep", {"weights_dtype": "uint4", **SVD}, FIRST),
    "uint4_svd_bf16": ("linears", {"weights_dtype": "uint4", **SVD, **BF16}, FIRST),
    "uint4_svd_mm": ("linears", {"weights_dtype": "uint4", **SVD, **MM}, FIRST),
    "uint4_svd_mm_bf16": ("linears", {"weights_dtype": "uint4", **SVD, **MM, **BF16}, FIRST),
    "int5_svd_mm": ("linears", {"weights_dtype": "int5", **SVD, **MM}, FIRST),
    "fp4_svd": ("linears", {"weights_dtype": "fp4", **SVD}, FIRST),
    "fp6_mm": ("linears", {"weights_dtype": "fp6", **MM}, FIRST),
    "dtypes": (
        "linears",
        {"weights_dtype": "uint3", "modules_dtype_dict": {"int5": ["a"], "fp4": ["b.weight"]}},
        FIRST,
    ),
    "minimum": (
        "linears",
        {"weights_dtype": "uint3", "modules_dtype_dict": {"minimum_6bit": [".a"], "8bit": ["*b*"]}},
        FIRST,
    ),
    "left_out": ("linears", {"weights_dtype": "uint4", "modules_to_not_convert": ["b"]}, FIRST),
    "dynamic": (
        "linears",
        {"weights_dtype": "int4", "use_dynamic_quantization": True},
        FIRST,
    ),
    "dynamic_svd_mm": (
        "linears",
        {
            "weights_dtype": "int4", "use_dynamic_quantization": True,
            "dynamic_loss_threshold": 6e-3, **SVD, **MM,
        },
        FIRST,
    ),
    "quant_config": (
        "linears",
        {
            "weights_dtype": "uint4",
            "modules_quant_config": {
                "a": {"weights_dtype": "int8", "group_size": 32},
                "*b*": {"use_svd": True, "svd_rank": 4},
            },
        },
        WIDE,
    ),
    "not_matmul": (
        "linears",
        {"weights_dtype": "int8", **MM, "modules_to_not_use_matmul": ["a", "c.weight"]},
        HADAMARD,
    ),
    "int8_had": ("deep", {"weights_dtype": "int8", **HAD}, HADAMARD),
    "int8_had_mm": ("linears", {"weights_dtype": "int8", **HAD, **MM}, HADAMARD),
    "int8_had32_mm": ("linears", {"weights_dtype": "int8", **HAD32, **MM}, HADAMARD),
    "uint4_had": ("deep", {"weights_dtype": "uint4", **HAD}, HADAMARD),
    "uint4_had_wide": ("wide", {"weights_dtype": "uint4", **HAD}, HADAMARD),
    "uint4_had64": ("deep", {"weights_dtype": "uint4", **HAD, "hadamard_group_size": 64}, HADAMARD),
    "uint4_had_svd": ("deep", {"weights_dtype": "uint4", **HAD, **SVD}, HADAMARD),
    "uint4_had_svd_mm": ("linears", {"weights_dtype": "uint4", **HAD32, **SVD, **MM}, HADAMARD),
    "dynamic_had": (
        "deep", {"weights_dtype": "uint4", "use_dynamic_quantization": True, **HAD}, HADAMARD,
    ),
    "int8_tensorwise": ("linears", {"weights_dtype": "int8", "group_size": -2}, LAST),
    "int8_tensorwise_mm": ("linears", {"weights_dtype": "int8", "group_size": -2, **MM}, LAST),
    "uint8_tensorwise": ("linears", {"weights_dtype": "uint8", "group_size": -2}, LAST),
    "fp8_tensorwise_mm": ("linears", {"weights_dtype": "fp8", "group_size": -2, **MM}, LAST),
    "uint8_tensorwise_mm": ("linears", {"weights_dtype": "uint8", "group_size": -2, **MM}, LAST),
    "int16_tensorwise_mm": ("linears", {"weights_dtype": "int16", "group_size": -2, **MM}, LAST),
    "own_fp8_tensorwise_mm": (
        "linears", {"weights_dtype": "float8_e3m4fn", "group_size": -2, **MM}, LAST,
    ),
    "int8_tensorwise_mm_fp8": (
        "linears",
        {"weights_dtype": "int8", "group_size": -2, "quantized_matmul_dtype": "fp8", **MM},
        LAST,
    ),
    "int8_tensorwise_dq_mm": (
        "linears", {"weights_dtype": "int8", "group_size": -2, "scale_dtype": "uint8", **MM}, LAST,
    ),
    "uint8_cb_tensorwise_mm": (
        "linears", {"weights_dtype": "uint8", "group_size": -2, "use_codebook": True, **MM}, LAST,
    ),
    "uint4_tensorwise": ("linears", {"weights_dtype": "uint4", "group_size": -2}, LAST),
    "uint4_tensorwise_svd": ("linears", {"weights_dtype": "uint4", "group_size": -2, **SVD}, LAST),
    "uint2_cb": ("linears", {"weights_dtype": "uint2", "use_codebook": True}, LAST),
    "uint4_cb": ("deep", {"weights_dtype": "uint4", "use_codebook": True}, LAST),
    "uint4_cb_g16": (
        "linears", {"weights_dtype": "uint4", "use_codebook": True, "group_size": 16}, LAST,
    ),
    "uint4_cb_tensorwise": (
        "linears", {"weights_dtype": "uint4", "use_codebook": True, "group_size": -2}, LAST,
    ),
    "uint4_cb_had_svd": (
        "linears", {"weights_dtype": "uint4", "use_codebook": True, **HAD, **SVD}, LAST,
    ),
    "uint8_cb": ("one", {"weights_dtype": "uint8", "use_codebook": True}, LAST),
    "uint4_dq": ("linears", {"weights_dtype": "uint4", "scale_dtype": "fp8"}, LAST),
    "uint4_dq_mixed": (
        "linears",
        {"weights_dtype": "uint4", "scale_dtype": "uint6", "zero_point_dtype": "int8"},
        LAST,
    ),
    "uint4_dq_packed": ("linears", {"weights_dtype": "uint4", "scale_dtype": "uint6"}, LAST),
    "uint4_dq_cb": (
        "linears",
        {"weights_dtype": "uint4", "scale_dtype": "uint6", "use_codebook_scale": True},
        LAST,
    ),
    "int5_dq_svd": ("linears", {"weights_dtype": "int5", "scale_dtype": "uint8", **SVD}, LAST),
    "int8_dq_mm": ("linears", {"weights_dtype": "int8", "scale_dtype": "fp8", **MM}, LAST),
    "cb_dq": (
        "linears", {"weights_dtype": "uint4", "use_codebook": True, "scale_dtype": "int8"}, LAST,
    ),
}  # fmt: skip

CONVS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "int8": ({"weights_dtype": "int8", **CONV}, FIRST),
    "uint4": ({"weights_dtype": "uint4", **CONV}, FIRST),
    "uint4_svd": ({"weights_dtype": "uint4", **CONV, **SVD}, FIRST),
    "int5_rowwise": ({"weights_dtype": "int5", "group_size": -1, **CONV}, FIRST),
    "fp8": ({"weights_dtype": "fp8", **CONV}, FIRST),
    "int8_mm": ({"weights_dtype": "int8", **CONV_MM}, FIRST),
    "uint4_mm": ({"weights_dtype": "uint4", **CONV_MM}, FIRST),
    "uint8_mm": ({"weights_dtype": "uint8", **CONV_MM}, FIRST),
    "uint4_svd_mm": ({"weights_dtype": "uint4", **CONV_MM, **SVD}, FIRST),
    "int8_svd_mm": ({"weights_dtype": "int8", **CONV_MM, **SVD}, FIRST),
    "uint4_had": ({"weights_dtype": "uint4", **CONV, **HAD}, HADAMARD),
    "uint4_had16": ({"weights_dtype": "uint4", **CONV, **HAD16}, HADAMARD),
    "int8_had16_mm": ({"weights_dtype": "int8", **CONV_MM, **HAD16}, HADAMARD),
    "uint4_had16_svd": ({"weights_dtype": "uint4", **CONV, **HAD16, **SVD}, HADAMARD),
    "uint3": ({"weights_dtype": "uint3", **CONV}, LAST),
    "int8_g16": ({"weights_dtype": "int8", "group_size": 16, **CONV}, LAST),
    "int8_tensorwise": ({"weights_dtype": "int8", "group_size": -2, **CONV}, LAST),
    "int8_tensorwise_mm": ({"weights_dtype": "int8", "group_size": -2, **CONV_MM}, LAST),
    "uint4_tensorwise": ({"weights_dtype": "uint4", "group_size": -2, **CONV}, LAST),
    "uint4_cb": ({"weights_dtype": "uint4", "use_codebook": True, **CONV}, LAST),
    "uint2_cb_g16": (
        {"weights_dtype": "uint2", "use_codebook": True, "group_size": 16, **CONV}, LAST,
    ),
    "uint2_cb_tensorwise": (
        {"weights_dtype": "uint2", "use_codebook": True, "group_size": -2, **CONV}, LAST,
    ),
    "uint4_cb_mm": ({"weights_dtype": "uint4", "use_codebook": True, **CONV_MM}, LAST),
    "uint4_dq": ({"weights_dtype": "uint4", "scale_dtype": "fp8", **CONV}, LAST),
    "uint4_dq_packed": ({"weights_dtype": "uint4", "scale_dtype": "uint6", **CONV}, LAST),
    "int8_dq_packed": ({"weights_dtype": "int8", "scale_dtype": "uint4", **CONV}, LAST),
    "uint2_cb_dq": (
        {"weights_dtype": "uint2", "use_codebook": True, "scale_dtype": "uint6", **CONV}, LAST,
    ),
}  # fmt: skip

EMBEDDINGS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "int8": ({"weights_dtype": "int8", **EMBEDDING}, HADAMARD),
    "uint4": ({"weights_dtype": "uint4", **EMBEDDING}, HADAMARD),
    "uint4_svd_mm": ({"weights_dtype": "uint4", **EMBEDDING, **SVD, **MM}, HADAMARD),
    "int8_mm": ({"weights_dtype": "int8", **EMBEDDING, **MM}, HADAMARD),
    "uint4_had32": ({"weights_dtype": "uint4", **EMBEDDING, **HAD32}, (0, 2, 1)),
    "uint3": ({"weights_dtype": "uint3", **EMBEDDING}, LAST),
    "uint4_cb": ({"weights_dtype": "uint4", "use_codebook": True, **EMBEDDING}, LAST),
    "uint4_tensorwise": ({"weights_dtype": "uint4", "group_size": -2, **EMBEDDING}, LAST),
    "uint4_dq_packed": ({"weights_dtype": "uint4", "scale_dtype": "uint6", **EMBEDDING}, LAST),
}


def cases() -> dict[str, tuple[str, dict[str, Any]]]:
    """``{name: (kind of layers, config)}`` of everything that this version can make."""
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    seen: list[dict[str, Any]] = []
    for name, about in sdnq.common.dtype_dict.items():
        if about["num_bits"] <= WIDEST.get(VERSION, 16) and not any(about is s for s in seen):
            seen.append(about)  # aliases share their entry with a name before them
            found[f"dtype_{name}"] = ("one", {"weights_dtype": name})
    for name, (kind, config, since) in VARIANTS.items():
        if since <= VERSION:
            found[name] = (kind, config)
    kinds = [k for k in KINDS if k.startswith(("conv", "transposed"))]
    for name, (config, since) in CONVS.items():
        for kind in kinds if VERSION >= LAST else ("conv2", "conv3"):
            if since <= VERSION:
                found[f"{kind}_{name}"] = (kind, config)
    for name, (config, since) in EMBEDDINGS.items():
        if since <= VERSION:
            found[f"embedding_{name}"] = ("embedding", config)
    return found


class Layers(ModelMixin, ConfigMixin):
    """A model of a few layers, which the package quantizes and diffusers saves."""

    config_name = "config.json"

    @register_to_config
    def __init__(self, kind: str = "one") -> None:
        super().__init__()
        for name, make in KINDS[kind].items():
            self.add_module(name, make())


def build(kind: str, seed: int) -> Layers:
    """The layers with normal weights of std fan_in^-0.5, and a few larger ones."""
    generator = torch.Generator().manual_seed(seed)
    model = Layers(kind).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * parameter[0].numel() ** -0.5)
    return model.to(torch.bfloat16)


def zero_means_zero() -> list[int]:
    """Mend the decoding of zeros of 1-bit exponents; a counter of them."""
    module, counted = sdnq.dequantizer, [0]
    if not (0, 1, 6) <= VERSION < (0, 2, 2):
        return counted
    from sdnq.packed_float import float_bits_to_uint_dict, unpack_int

    theirs = module.unpack_float

    def mended(words, weights_dtype, shape):
        values = theirs(words, weights_dtype, shape)
        about = sdnq.common.dtype_dict[weights_dtype]
        if about["exponent"] != 1:
            return values
        codes = words
        if about["num_bits"] not in (8, 16):
            codes = unpack_int(words, float_bits_to_uint_dict[about["num_bits"]], shape)
        zero = codes.to(torch.int32) == 0
        assert torch.all(values[zero] == 1.0)
        counted[0] += int(zero.sum())
        return torch.where(zero, 0.0, values)

    module.unpack_float = mended
    return counted


def dequantized(module: nn.Module) -> torch.Tensor:
    """The package's own dequantization of one layer, in float32 throughout, in logical shape."""
    quantizer = copy.copy(module.sdnq_dequantizer)
    quantizer.result_dtype = torch.float32
    known = inspect.signature(type(quantizer).__call__).parameters
    params = {name: getattr(module, name, None) for name in PARTS if name in known}
    params = {
        name: value.detach().float()
        if value is not None and name != "weight" and value.dtype in (torch.bfloat16, torch.float16)
        else value
        for name, value in params.items()
    }
    flat_conv = len(quantizer.original_shape) > 2 and len(quantizer.quantized_weight_shape) == 2
    rotated = getattr(quantizer, "use_hadamard", False)
    extra = {"non_hadamard": True} if flat_conv and rotated else {}
    if flat_conv:
        quantizer.result_shape = None  # the package cannot view its own transposed result
    if "skip_compile" in known:
        extra["skip_compile"] = True
    weight = quantizer(
        **params,
        **extra,
        skip_quantized_matmul=quantizer.use_quantized_matmul,
        dtype=torch.float32,
    )
    if "non_hadamard" in extra:
        weight = sdnq.quant_utils.rotate_hadamard(
            weight.contiguous(), group_size=quantizer.hadamard_group_size
        )
    return weight.reshape(quantizer.original_shape).contiguous()


def make(name: str, kind: str, config: dict[str, Any], counted: list[int]):
    """``(entry of the book, {tensor name: tensor})`` of one case."""
    seed = sum(map(ord, name))
    torch.manual_seed(seed)
    model = build(kind, seed)
    config = copy.deepcopy(config)
    accepted = inspect.signature(sdnq.sdnq_post_load_quant).parameters
    if "quantization_config" in accepted:
        small = {"minimum_allowed_numel": 1, "minimum_allowed_channel_size": 1}
        config = {"quantization_config": sdnq.SDNQConfig(**config, **small)}
    model = sdnq.sdnq_post_load_quant(model, torch_dtype=torch.bfloat16, **config)
    counted[0] = 0
    golden = {
        f"{layer}.weight": dequantized(module)
        for layer, module in model.named_modules()
        if hasattr(module, "sdnq_dequantizer")
    }
    assert golden, f"{name} quantized no layer"
    with tempfile.TemporaryDirectory() as folder:
        sdnq.save_sdnq_model(model, folder)
        stored = load_file(Path(folder) / "diffusion_pytorch_model.safetensors")
        told = json.loads((Path(folder) / "quantization_config.json").read_text(encoding="utf-8"))
    entry = {
        "quantization_config": told,
        "shapes": {layer: list(value.shape) for layer, value in golden.items()},
        "kind": kind,
        "zeros": counted[0],
    }
    tensors = {f"stored/{name}/{key}": value for key, value in stored.items()}
    tensors |= {f"golden/{name}/{key}": value for key, value in golden.items()}
    return entry, tensors


def write_json(book: dict[str, Any], path: Path) -> None:
    """Settings that most cases share stand once, in ``common``; a line for each case."""
    configs = [entry["quantization_config"] for entry in book["cases"].values()]
    common = {}
    for key in configs[0]:
        values = [json.dumps(config.get(key)) for config in configs]
        common[key] = json.loads(max(set(values), key=values.count))
    for config in configs:
        assert set(config) == set(common)
        for key in [key for key, value in config.items() if value == common[key]]:
            del config[key]
    lines = [f"  {json.dumps(n)}: {json.dumps(e)}" for n, e in book.pop("cases").items()]
    head = "".join(f" {json.dumps(k)}: {json.dumps(v)},\n" for k, v in book.items())
    told = f' "common": {json.dumps(common)},\n "cases": {{\n'
    path.write_text("{\n" + head + told + ",\n".join(lines) + "\n }\n}\n", encoding="utf-8")


def main(out: str, package: str, *names: str) -> None:
    torch.set_num_threads(1)  # tiny tensors: threads only get in each other's way
    assert package == "-" or Path(sdnq.__file__).is_relative_to(package)
    if VERSION < (0, 2, 2):
        sdnq.quantizer.check_torch_compile = lambda: True
    counted = zero_means_zero()
    known = cases()
    book: dict[str, Any] = {"version": sdnq.__version__, "cases": {}, "failed": {}}
    tensors: dict[str, torch.Tensor] = {}
    for name in known if names == ("all",) else names:
        try:
            entry, made = make(name, *known[name], counted)
        except Exception as error:
            book["failed"][name] = f"{type(error).__name__}: {error}"[:300]
            continue
        assert all(math.prod(t.shape) for t in made.values())
        book["cases"][name] = entry
        tensors |= made
    save_file(tensors, Path(out) / "book.safetensors")
    write_json(book, Path(out) / "book.json")


if __name__ == "__main__":
    main(*sys.argv[1:])
