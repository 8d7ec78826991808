"""Broken ModelOpt checkpoints: each is one error that names the layer, what is there and a remedy.

Errors of values come when the layer is read, all others before anything is read.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from modelopt_cases import KINDS, declaration, layer, write
from support import pack
from test_modelopt_reader import read

LowBitError = pack("quant.errors").LowBitError

Tensors = dict[str, torch.Tensor]


def drop(name: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.pop(name)


def put(name: str, value: torch.Tensor) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({name: value})


def cast(name: str, dtype: torch.dtype) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({name: tensors[name].to(dtype)})


def cut(name: str, rows: int) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({name: tensors[name][:rows]})


def spoil(name: str, value: float) -> Callable[[Tensors], object]:
    """One element of a tensor becomes ``value``."""

    def change(tensors: Tensors) -> None:
        flat = tensors[name].clone().reshape(-1)
        flat[0] = value
        tensors[name] = flat.reshape(tensors[name].shape)

    return change


def byte(name: str, value: int) -> Callable[[Tensors], object]:
    """One byte of a tensor of one-byte elements becomes ``value``."""

    def change(tensors: Tensors) -> None:
        data = tensors[name].view(torch.uint8).clone()
        data[1, 1] = value
        tensors[name] = data.view(tensors[name].dtype)

    return change


class Case(NamedTuple):
    """A layer's kind, how it is broken, and what the error must say."""

    name: str
    kind: str
    change: Callable[[Tensors], object]
    says: tuple[str, ...]
    part: str = ""
    more: dict | None = None


WHOLE = {"smooth": True, "rank": 4, "input_scale": True}
CASES = (
    Case("no_scale", "fp8", drop("weight_scale"), ("scale is missing", "F8_E4M3"), "weight_scale"),
    Case("no_scale_nvfp4", "nvfp4", drop("weight_scale"), ("scale is missing",), "weight_scale"),
    Case("no_weight", "fp8", drop("weight"), ("scales but no weight",), "weight_scale"),
    Case("no_second", "nvfp4", drop("weight_scale_2"), ("second scale",), "weight_scale_2"),
    Case(
        "second_of_fp8",
        "fp8",
        put("weight_scale_2", torch.tensor(1.0)),
        ("second scale that its format",),
        "weight_scale_2",
    ),
    Case("float_weight", "fp8", cast("weight", torch.bfloat16), ("no pair",), "weight_scale"),
    Case("int_scale", "fp8", cast("weight_scale", torch.int32), ("no pair",), "weight_scale"),
    Case("fp8_scale", "fp8", put("weight_scale", torch.ones(3)), ("no pair",), "weight_scale"),
    Case("rows_scale", "fp8-rows", cut("weight_scale", 63), ("no pair", "[63]"), "weight_scale"),
    Case(
        "blocks_scale",
        "fp8-blocks",
        put("weight_scale", torch.ones(2, 1, 2, 1)),
        ("no pair",),
        "weight_scale",
    ),
    Case("int8_scale", "int8", cut("weight_scale", 5), ("no pair", "I8"), "weight_scale"),
    Case("nvfp4_rows", "nvfp4", cut("weight_scale", 63), ("do not fit",), "weight_scale"),
    Case("nvfp4_weight", "nvfp4", cut("weight", 63), ("do not fit",), "weight_scale"),
    Case("mxfp8_rows", "mxfp8", cut("weight_scale", 63), ("does not fit",), "weight_scale"),
    Case("mxfp4_rows", "mxfp4", cut("weight_scale", 63), ("does not fit",), "weight_scale"),
    Case("int4_rows", "int4", cut("weight_scale", 63), ("no pair",), "weight_scale"),
    Case(
        "int4_groups",
        "int4",
        put("weight_scale", torch.ones(64, 3)),
        ("do not fit",),
        "weight_scale",
    ),
    Case(
        "mx_input",
        "mxfp8",
        put("input_scale", torch.tensor(1.0)),
        ("does not have",),
        "input_scale",
    ),
    Case("two_inputs", "fp8", put("input_scale", torch.ones(2)), ("does not fit",), "input_scale"),
    Case(
        "half_input", "fp8", put("input_scale", torch.ones(1).half()), ("dtype",), "input_scale"
    ),
    Case("short_smooth", "fp8", cut("pre_quant_scale", 5), ("[128]",), "pre_quant_scale", WHOLE),
    Case(
        "int_smooth",
        "nvfp4",
        cast("pre_quant_scale", torch.int8),
        ("dtype",),
        "pre_quant_scale",
        WHOLE,
    ),
    Case("no_lora_b", "nvfp4", drop("svdquant_lora_b"), ("one half",), "svdquant_lora_a", WHOLE),
    Case("no_lora_a", "nvfp4", drop("svdquant_lora_a"), ("one half",), "svdquant_lora_b", WHOLE),
    Case("rank", "nvfp4", cut("svdquant_lora_a", 3), ("does not fit",), "svdquant_lora_b", WHOLE),
    Case("no_rank", "nvfp4", cut("svdquant_lora_a", 0), ("empty",), "svdquant_lora_a", WHOLE),
    Case("bias", "fp8", cut("bias", 5), ("bias does not fit", "[64]"), "bias"),
    Case("surplus", "fp8", put("weight_zero", torch.ones(1)), ("accounts for",), "weight_zero"),
    # values
    Case("nan_scale", "fp8", spoil("weight_scale", torch.nan), ("NaN",), "weight_scale"),
    Case("negative_scale", "int8", spoil("weight_scale", -1), ("negative",), "weight_scale"),
    Case("zero_scale", "fp8", put("weight_scale", torch.zeros(())), ("zeros",), "weight_scale"),
    Case("infinite", "nvfp4", spoil("weight_scale_2", torch.inf), ("NaN",), "weight_scale_2"),
    Case("zero_second", "nvfp4", spoil("weight_scale_2", 0), ("<= 0",), "weight_scale_2"),
    Case("nan_block", "nvfp4", byte("weight_scale", 0x7F), ("1 of 512",), "weight_scale"),
    Case("negative_block", "nvfp4", byte("weight_scale", 0xB0), ("1 of 512",), "weight_scale"),
    Case("nan_exponent", "mxfp4", byte("weight_scale", 255), ("1 of 256",), "weight_scale"),
    Case("zero_input", "fp8", spoil("input_scale", 0), ("<= 0",), "input_scale", WHOLE),
    Case("zero_smooth", "nvfp4", spoil("pre_quant_scale", 0), ("<= 0",), "pre_quant_scale", WHOLE),
    Case("nan", "nvfp4", spoil("svdquant_lora_a", torch.nan), ("NaN",), "svdquant_lora_a", WHOLE),
)  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_a_broken_layer_is_one_clear_error(case, tmp_path):
    good, _ = layer("int8")
    tensors, _ = layer(case.kind, **(case.more or {}))
    config = declaration("MIXED_PRECISION", quantized_layers={})
    whole = read(write(tmp_path / "good", {"good": good, "bad.0": dict(tensors)}, config))
    for entry in whole.entries.values():
        entry.read()
    case.change(tensors)
    with pytest.raises(LowBitError) as caught:
        folder = write(tmp_path / "bad", {"good": good, "bad.0": tensors}, config)
        for entry in read(folder).entries.values():
            entry.read()
    error = caught.value
    assert error.layer.startswith(f"bad.0.{case.part}"), error
    assert all(text in f"{error.what} {error.found} {error.expected}" for text in case.says), error
    assert error.file and error.found and error.expected and error.remedy


def test_a_float_layer_with_half_a_branch(tmp_path):
    tensors = {"weight": torch.randn(8, 8), "svdquant_lora_a": torch.randn(2, 8)}
    with pytest.raises(LowBitError, match="one half"):
        read(write(tmp_path, {"good": layer("int8")[0], "a": tensors}))
    tensors = {"weight": torch.randn(8, 8, 1, 1), "pre_quant_scale": torch.ones(8)}
    with pytest.raises(LowBitError, match="Only the inputs of a Linear"):
        read(write(tmp_path / "b", {"good": layer("int8")[0], "a": tensors}))


def test_nothing_is_quantized(tmp_path):
    with pytest.raises(LowBitError, match="no layer is quantized") as caught:
        read(write(tmp_path, {"a": {"weight": torch.randn(4, 4)}}, declaration("NVFP4")))
    assert "NVFP4 (config.json" in caught.value.found


PAIRS = [
    (algorithm, kind)
    for own, algorithms in KINDS.items()
    for algorithm in algorithms[:1]
    for kind in KINDS
    if kind != own and (algorithm, kind) != ("fp8_pb_wo", "fp8")
]


@pytest.mark.parametrize(("algorithm", "kind"), PAIRS)
def test_a_declared_algorithm_that_the_tensors_are_not(algorithm, kind, tmp_path):
    layers = {"x.1": layer(kind, (256, 128))[0]}
    with pytest.raises(LowBitError, match="contradicts itself: a layer is declared as") as caught:
        read(write(tmp_path, layers, declaration(algorithm)))
    assert caught.value.layer == "x.1" and f"stored as {kind}." in caught.value.what
    assert algorithm.upper() in caught.value.found and "config.json" in caught.value.found
    listed = {"x.1": {"quant_algo": algorithm}}
    mixed = declaration("MIXED_PRECISION", quantized_layers=listed)
    with pytest.raises(LowBitError, match="declared as") as caught:
        read(write(tmp_path, layers, mixed))
    assert caught.value.layer == "x.1"


BAD_CONFIGS = {
    "unknown algorithm": (declaration("NVFP5"), ("NVFP5", "MIXED_PRECISION")),
    "unknown algorithm of a layer": (
        declaration("MIXED_PRECISION", quantized_layers={"a": {"quant_algo": "INT3"}}),
        ("INT3",),
    ),
    "algorithm of another type": (declaration(4), ("quant_algo", "4")),
    "layers in a list": (declaration("FP8", quantized_layers=["a"]), ("quantized_layers",)),
    "a layer without algorithm": (
        declaration("MIXED_PRECISION", quantized_layers={"a": {}}),
        ("quantized_layers, a",),
    ),
    "ignore as a text": (declaration("FP8", ignore="a"), ("ignore",)),
    "ignore of numbers": (declaration("FP8", ignore=[1]), ("ignore",)),
    "swapped as a text": (declaration("FP8", swap_weight_nibbles="yes"), ("swap_weight",)),
    "quantization as a list": (declaration("FP8", quantization=[]), ("quantization",)),
}


@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_a_damaged_config(name, tmp_path):
    config, says = BAD_CONFIGS[name]
    with pytest.raises(LowBitError) as caught:
        read(write(tmp_path, {"a": layer("fp8")[0]}, config))
    error = caught.value
    told = f"{error.layer} {error.found} {error.expected}"
    assert all(text in told for text in says) and "config.json" in error.layer and error.remedy


def test_a_damaged_file_beside_the_weights(tmp_path):
    folder = write(tmp_path, {"a": layer("fp8")[0]})
    (folder / "hf_quant_config.json").write_text("{", encoding="utf-8")
    with pytest.raises(LowBitError) as caught:
        read(folder)
    assert "hf_quant_config.json" in caught.value.file
    text = json.dumps({"quantization": {"quant_algo": "INT8"}})
    (folder / "hf_quant_config.json").write_text(text, encoding="utf-8")
    with pytest.raises(LowBitError, match="not known") as caught:
        read(folder)
    assert "hf_quant_config.json" in caught.value.layer
