"""Broken layers of bitsandbytes, torchao and quanto: right checkpoints with one thing made wrong.

Every case must give one clear error that names the file, the layer, what was found, what was
expected and what to do, through the same call that the loader node makes; none may load.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import save_file
from support import pack

Tensors = dict[str, torch.Tensor]
LAYER = "blocks.0.proj"
ROWS, COLUMNS, BLOCK = 48, 160, 64  # rows begin within a block
NUMEL = ROWS * COLUMNS
BLOCKS = NUMEL // BLOCK
NAN, INFINITY = float("nan"), float("inf")


class File(NamedTuple):
    tensors: Tensors
    config: dict
    metadata: dict[str, str]


class Case(NamedTuple):
    """``change(file)`` breaks a right checkpoint; ``told`` must stand in the error."""

    id: str
    make: Callable[[], File]
    change: Callable[[File], None]
    told: tuple[str, ...]


# ------------------------------------------------------------------------------ right checkpoints


def words(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def text(value: object) -> torch.Tensor:
    raw = value if isinstance(value, bytes) else json.dumps(value).encode()
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8)


def nf4_values() -> torch.Tensor:
    return torch.tensor(pack("quant.dtypes").get_format("nf4_bnb").values)


STATE = {"quant_type": "nf4", "blocksize": BLOCK, "dtype": "bfloat16", "shape": [ROWS, COLUMNS]}
NESTED = STATE | {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.25}
JSON = "weight.quant_state.bitsandbytes__nf4"


def beside() -> Tensors:
    """What every checkpoint holds besides: the layer's bias and a plain layer."""
    torch.manual_seed(3)
    return {f"{LAYER}.bias": torch.randn(ROWS), "norm.weight": torch.randn(64)}


def bnb4() -> File:
    tensors = beside() | {
        f"{LAYER}.weight": words(NUMEL // 2, 1),
        f"{LAYER}.weight.absmax": torch.rand(BLOCKS) + 0.5,
        f"{LAYER}.weight.quant_map": nf4_values(),
        f"{LAYER}.{JSON}": text(STATE),
    }
    return File(tensors, {"quant_method": "bitsandbytes", "load_in_4bit": True}, {})


def bnb4_nested() -> File:
    file = bnb4()
    parts = {
        f"{LAYER}.weight.absmax": words(BLOCKS),
        f"{LAYER}.weight.nested_absmax": torch.rand(1) + 0.5,
        f"{LAYER}.weight.nested_quant_map": torch.linspace(-1, 1, 256),
        f"{LAYER}.{JSON}": text(NESTED),
    }
    file.tensors.update(parts)
    return file


def bnb8() -> File:
    tensors = beside() | {
        f"{LAYER}.weight": words(ROWS, COLUMNS).view(torch.int8),
        f"{LAYER}.SCB": torch.rand(ROWS) + 0.5,
        f"{LAYER}.weight_format": torch.zeros((), dtype=torch.uint8),
    }
    return File(tensors, {"quant_method": "bitsandbytes", "load_in_8bit": True}, {})


def described(cls: str, names: list[str], **settings: object) -> dict[str, str]:
    described = {"_type": cls, "_data": settings, "_tensor_data_names": names}
    return {f"{LAYER}.weight": json.dumps(described)}


def dtype(name: str) -> dict:
    return {"_type": "torch.dtype", "_data": name}


def ao(cls: str, tensors: Tensors, **settings: object) -> File:
    stored = {f"{LAYER}._weight_{name}": value for name, value in tensors.items()}
    metadata = described(cls, list(tensors), **settings)
    return File(beside() | stored, {"quant_method": "torchao"}, metadata)


def ao_int8() -> File:
    tensors = {
        "qdata": words(ROWS, COLUMNS).view(torch.int8),
        "scale": torch.rand(ROWS, 1) + 0.5,
        "zero_point": torch.zeros(ROWS, 1, dtype=torch.int8),
    }
    return ao("Int8Tensor", tensors, block_size=[1, COLUMNS], act_quant_kwargs=None)


def ao_intx() -> File:
    tensors = {
        "qdata": torch.randint(-8, 8, (ROWS, COLUMNS), dtype=torch.int8),
        "scale": torch.rand(ROWS, 5).bfloat16() + 0.5,
        "zero_point": torch.ones(ROWS, 5, dtype=torch.int8),
    }
    settings = {"block_size": [1, 32], "target_dtype": dtype("int4")}
    return ao("IntxUnpackedToInt8Tensor", tensors, **settings)


def ao_fp8() -> File:
    tensors = {
        "qdata": torch.randn(ROWS, COLUMNS).to(torch.float8_e4m3fn),
        "scale": torch.rand(ROWS, 1) + 0.5,
    }
    return ao("Float8Tensor", tensors, block_size=[1, COLUMNS], act_quant_kwargs=None)


def ao_nvfp4() -> File:
    tensors = {
        "qdata": words(ROWS, COLUMNS // 2),
        "scale": (torch.rand(32, 48) + 0.5).to(torch.float8_e4m3fn),
        "per_tensor_scale": torch.tensor(0.25),
    }
    return ao("NVFP4Tensor", tensors, block_size=16, is_swizzled_scales=True)


def ao_mx() -> File:
    tensors = {
        "qdata": torch.randn(ROWS, COLUMNS).to(torch.float8_e4m3fn),
        "scale": torch.randint(120, 130, (ROWS, 5), dtype=torch.uint8).view(torch.float8_e8m0fnu),
    }
    settings = {"block_size": 32, "is_swizzled_scales": False}
    return ao("MXTensor", tensors, elem_dtype=dtype("float8_e4m3fn"), **settings)


def quanto8() -> File:
    tensors = beside() | {
        f"{LAYER}.weight._data": words(ROWS, COLUMNS).view(torch.int8),
        f"{LAYER}.weight._scale": torch.rand(ROWS, 1).bfloat16() + 0.5,
        f"{LAYER}.input_scale": torch.ones(()),
        f"{LAYER}.output_scale": torch.ones(()),
    }
    return File(tensors, {"quant_method": "quanto", "weights_dtype": "int8"}, {})


def quanto4() -> File:
    groups = NUMEL // 32
    tensors = beside() | {
        f"{LAYER}.weight._data._data": words(groups // 2, 32),
        f"{LAYER}.weight._scale": torch.rand(groups, 1).bfloat16() + 0.5,
        f"{LAYER}.weight._shift": torch.rand(groups, 1).bfloat16(),
    }
    return File(tensors, {"quant_method": "quanto", "weights_dtype": "int4"}, {})


RIGHT = (
    (bnb4, "bitsandbytes"),
    (bnb4_nested, "bitsandbytes"),
    (bnb8, "bitsandbytes"),
    (ao_int8, "torchao"),
    (ao_intx, "torchao"),
    (ao_fp8, "torchao"),
    (ao_nvfp4, "torchao"),
    (ao_mx, "torchao"),
    (quanto8, "quanto"),
    (quanto4, "quanto"),
)


# ---------------------------------------------------------------------------------------- changes


def put(parts: dict[str, object]):
    """Replace tensors of the layer; None takes one away, a function changes it."""

    def change(file: File) -> None:
        for part, value in parts.items():
            name = f"{LAYER}.{part}"
            if value is None:
                del file.tensors[name]
            else:
                file.tensors[name] = value(file.tensors[name]) if callable(value) else value

    return change


def state(base: dict = STATE, **values: object):
    """Another quant_state; a value of ... takes the key away."""
    told = {key: value for key, value in (base | values).items() if value is not ...}
    return put({JSON: text(told)})


def meta(**values: object):
    """Other settings in the metadata of the weight."""

    def change(file: File) -> None:
        data = json.loads(file.metadata[f"{LAYER}.weight"])
        data["_data"].update(values)
        file.metadata[f"{LAYER}.weight"] = json.dumps(data)

    return change


def entry(value: str | None):
    """The whole entry of the metadata."""

    def change(file: File) -> None:
        file.metadata[f"{LAYER}.weight"] = value
        if value is None:
            del file.metadata[f"{LAYER}.weight"]

    return change


def poison(value: float):
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[0] = value
        return tensor

    return change


def byte(value: int):
    """The first byte of a tensor replaced."""

    def change(tensor: torch.Tensor) -> torch.Tensor:
        raw = tensor.clone().view(torch.uint8)
        raw.view(-1)[0] = value
        return raw.view(tensor.dtype)

    return change


def both(*changes):
    def change(file: File) -> None:
        for one in changes:
            one(file)

    return change


def settings(**values: object):
    def change(file: File) -> None:
        file.config.update(values)

    return change


def no_bias(file: File) -> None:
    del file.tensors[f"{LAYER}.bias"]


def described_as(cls: object):
    def change(file: File) -> None:
        data = json.loads(file.metadata[f"{LAYER}.weight"])
        file.metadata[f"{LAYER}.weight"] = json.dumps(data | {"_type": cls})

    return change


ABSMAX, MAP = "weight.absmax", "weight.quant_map"
SECOND, SECOND_MAP = "weight.nested_absmax", "weight.nested_quant_map"
Q, S, Z = "_weight_qdata", "_weight_scale", "_weight_zero_point"
DATA, SCALE, SHIFT = "weight._data._data", "weight._scale", "weight._shift"
AF4 = torch.linspace(-1, 1, 16)

CASES = (
    # ---- bitsandbytes, 4 bits
    Case("absmax_missing", bnb4, put({ABSMAX: None}), ("absmax is missing",)),
    Case("map_missing", bnb4, put({MAP: None}), ("quant_map is missing",)),
    Case("state_missing", bnb4, put({JSON: None}), ("does not tell its shape", "no quant_state")),
    Case("weight_missing", bnb4, put({"weight": None}), ("weight is missing",)),
    Case(
        "all_but_codes_missing", bnb4, put({ABSMAX: None, MAP: None, JSON: None}), ("U8[3840, 1]",)
    ),
    Case("weight_short", bnb4, put({"weight": lambda t: t[:-1]}), ("number of codes", "3839")),
    Case("weight_long", bnb4, put({"weight": lambda t: torch.cat((t, t))}), ("number of codes",)),
    Case("weight_wide", bnb4, put({"weight": lambda t: t.float()}), ("number of codes", "F32")),
    Case("too_few_blocks", bnb4, put({ABSMAX: torch.rand(BLOCKS - 1)}), ("absmax", "119", "120")),
    Case("absmax_table", bnb4, put({ABSMAX: torch.rand(BLOCKS, 1)}), ("absmax", "120")),
    Case("absmax_bytes", bnb4, put({ABSMAX: words(BLOCKS)}), ("absmax", "wrong dtype", "U8")),
    Case("absmax_nan", bnb4, put({ABSMAX: poison(NAN)}), ("absmax", "1 of 120 are NaN")),
    Case("absmax_infinite", bnb4, put({ABSMAX: poison(INFINITY)}), ("absmax", "1 of 120")),
    Case("map_of_8", bnb4, put({MAP: torch.rand(8)}), ("quant_map", "16")),
    Case("map_of_its_own", bnb4, put({MAP: AF4}), ("values of its own", "nf4", "-0.6962")),
    Case("map_nan", bnb4, put({MAP: poison(NAN)}), ("quant_map", "NaN")),
    Case("state_no_json", bnb4, put({JSON: text(b"{quant")}), ("quant_state is broken",)),
    Case("state_no_utf8", bnb4, put({JSON: text(b"\xff\xfe\x00")}), ("quant_state is broken",)),
    Case("state_list", bnb4, put({JSON: text([1])}), ("quant_state is broken", "[1]")),
    Case("state_deep", bnb4, put({JSON: text(b"[" * 20000)}), ("quant_state is broken",)),
    Case("state_huge", bnb4, put({JSON: words(1 << 17)}), ("quant_state is broken", "131072")),
    Case("state_floats", bnb4, put({JSON: torch.rand(20)}), ("quant_state is broken", "F32")),
    Case("state_fp4", bnb4, state(quant_type="fp4"), ("quant_type 'fp4'",)),
    Case("state_no_type", bnb4, state(quant_type=...), ("quant_type None",)),
    Case("state_no_shape", bnb4, state(shape=...), ("shape None",)),
    Case("state_1d", bnb4, state(shape=[NUMEL]), ("shape [7680]",)),
    Case("state_negative", bnb4, state(shape=[-ROWS, -COLUMNS]), ("shape [-48, -160]",)),
    Case("state_text_shape", bnb4, state(shape=["48", "160"]), ("shape",)),
    Case("state_bool_shape", bnb4, state(shape=[True, NUMEL]), ("shape",)),
    Case("state_other_shape", bnb4, state(shape=[ROWS, 128]), ("number of codes", "[48, 128]")),
    Case("state_no_block", bnb4, state(blocksize=...), ("blocksize None",)),
    Case("state_zero_block", bnb4, state(blocksize=0), ("blocksize 0",)),
    Case("state_float_block", bnb4, state(blocksize=64.0), ("blocksize 64.0",)),
    Case("state_other_block", bnb4, state(blocksize=128), ("absmax", "120", "60")),
    Case(
        "two_states",
        bnb4,
        put({"weight.quant_state.bitsandbytes__fp4": text(STATE)}),
        ("does not tell", "fp4", "nf4"),
    ),
    Case(
        "unknown_kind",
        bnb4,
        put({JSON: None, "weight.quant_state.bitsandbytes__af4": text(STATE)}),
        ("af4", "bitsandbytes__nf4"),
    ),
    Case("nested_missing", bnb4_nested, put({SECOND: None}), ("nested_absmax is missing",)),
    Case("nested_map_missing", bnb4_nested, put({SECOND_MAP: None}), ("nested_quant_map",)),
    Case("nested_both_missing", bnb4_nested, put({SECOND: None, SECOND_MAP: None}), ("missing",)),
    Case("nested_unsaid", bnb4_nested, state(STATE), ("nested_blocksize", "no nested_offset")),
    Case("nested_no_offset", bnb4_nested, state(NESTED, nested_offset=...), ("nested_offset",)),
    Case("nested_nan", bnb4_nested, state(NESTED, nested_offset=NAN), ("nested_offset nan",)),
    Case("nested_text", bnb4_nested, state(NESTED, nested_offset="0"), ("nested_offset '0'",)),
    Case("nested_zero", bnb4_nested, state(NESTED, nested_blocksize=0), ("nested_blocksize 0",)),
    Case("nested_size", bnb4_nested, state(NESTED, nested_blocksize=64), ("nested_absmax", "[2]")),
    Case("nested_float", bnb4_nested, put({ABSMAX: torch.rand(BLOCKS)}), ("absmax", "F32", "U8")),
    Case("nested_absmax_nan", bnb4_nested, put({SECOND: poison(NAN)}), ("nested_absmax", "NaN")),
    Case("nested_map_nan", bnb4_nested, put({SECOND_MAP: poison(NAN)}), ("nested_quant_map",)),
    # ---- bitsandbytes, 8 bits
    Case("scb_missing", bnb8, put({"SCB": None}), ("SCB is missing",)),
    Case("scb_and_format_missing", bnb8, put({"SCB": None, "weight_format": None}), ("I8",)),
    Case("scb_rows", bnb8, put({"SCB": torch.rand(ROWS - 1)}), ("SCB", "[47]", "[48]")),
    Case("scb_nan", bnb8, put({"SCB": poison(NAN)}), ("SCB", "NaN")),
    Case("scb_codes", bnb8, put({"SCB": words(ROWS)}), ("SCB", "U8")),
    Case(
        "tiles", bnb8, put({"weight_format": torch.tensor(2, dtype=torch.uint8)}), ("col_turing",)
    ),
    Case("weight_unsigned", bnb8, put({"weight": words(ROWS, COLUMNS)}), ("U8", "I8 [N, K]")),
    Case("weight_flat", bnb8, put({"weight": lambda t: t.view(-1)}), ("I8[7680]",)),
    Case("int8_weight_missing", bnb8, put({"weight": None}), ("weight is missing",)),
    # ---- torchao
    Case("not_described", ao_int8, entry(None), ("does not describe", "without its metadata")),
    Case("no_json", ao_int8, entry("{"), ("metadata of a layer is broken",)),
    Case("no_object", ao_int8, entry("[]"), ("metadata of a layer is broken",)),
    Case("deep_json", ao_int8, entry("[" * 20000), ("metadata of a layer is broken",)),
    Case("no_names", ao_int8, entry('{"_type": "Int8Tensor", "_data": {}}'), ("is broken",)),
    Case("unknown_class", ao_int8, described_as("Int4Tensor"), ("not read", "Int4Tensor", "MXT")),
    Case("class_no_text", ao_int8, described_as(["Int8Tensor"]), ("not read",)),
    Case("plain_class", ao_int8, described_as("Tensor"), ("not read", "'Tensor'")),
    Case("scale_missing", ao_int8, put({S: None}), ("_weight_scale is missing",)),
    Case("zero_missing", ao_int8, put({Z: None}), ("_weight_zero_point is missing",)),
    Case("qdata_missing", ao_int8, put({Q: None}), ("_weight_qdata is missing",)),
    Case("only_zero", ao_int8, put({Q: None, S: None}), ("missing",)),
    Case("scale_rows", ao_int8, put({S: torch.rand(ROWS - 1, 1)}), ("does not fit", "[47, 1]")),
    Case("scale_flat", ao_int8, put({S: torch.rand(ROWS)}), ("does not fit", "F32[48]")),
    Case("scale_groups", ao_int8, put({S: torch.rand(ROWS, 3)}), ("does not fit", "[48, 3]")),
    Case("scale_other_groups", ao_int8, put({S: torch.rand(ROWS, 5)}), ("block_size", "[1, 32]")),
    Case("scale_codes", ao_int8, put({S: words(ROWS, 1)}), ("no floats", "U8")),
    Case("scale_nan", ao_int8, put({S: poison(NAN)}), ("_weight_scale", "NaN")),
    Case("zero_rows", ao_int8, put({Z: torch.zeros(1, 1, dtype=torch.int8)}), ("zero_point",)),
    Case("zero_wide", ao_int8, put({Z: torch.zeros(ROWS, 1, dtype=torch.int64)}), ("I64",)),
    Case("qdata_unsigned", ao_int8, put({Q: words(ROWS, COLUMNS)}), ("U8", "I8 [N, K]")),
    Case("qdata_empty", ao_int8, put({Q: torch.empty(0, 5, dtype=torch.int8)}), ("I8[0, 5]",)),
    Case("block_text", ao_int8, meta(block_size="rows"), ("block_size", "rows")),
    Case("block_wrong", ao_int8, meta(block_size=[1, 16]), ("block_size [1, 16]", "[1, 160]")),
    Case(
        "smoothing_short",
        ao_int8,
        put({"_weight_act_pre_scale": torch.rand(3)}),
        ("act_pre_scale", "[3]", "[160]"),
    ),
    Case(
        "smoothing_nan",
        ao_int8,
        put({"_weight_act_pre_scale": poison(NAN)(torch.rand(COLUMNS))}),
        ("act_pre_scale", "NaN"),
    ),
    Case("codes_too_large", ao_intx, put({Q: poison(8)}), ("codes from -8 to 8", "-8 to 7")),
    Case("codes_too_small", ao_intx, put({Q: poison(-9)}), ("codes from -9 to 7",)),
    Case("target_unknown", ao_intx, meta(target_dtype=dtype("int3x")), ("target_dtype", "int3x")),
    Case("target_missing", ao_intx, meta(target_dtype=None), ("target_dtype None",)),
    Case("zero_nan", ao_intx, put({Z: poison(NAN)(torch.ones(ROWS, 5))}), ("zero_point", "NaN")),
    Case("intx_scale_nan", ao_intx, put({S: poison(INFINITY)}), ("_weight_scale", "infinite")),
    Case("fp8_scale_nan", ao_fp8, put({S: poison(NAN)}), ("_weight_scale", "NaN")),
    Case("fp8_of_int8", ao_fp8, put({Q: words(ROWS, COLUMNS).view(torch.int8)}), ("I8", "F8_E4M3")),
    Case("fp8_rows", ao_fp8, put({S: torch.rand(7, 1)}), ("does not fit", "[7, 1]")),
    Case("nvfp4_block", ao_nvfp4, meta(block_size=32), ("block_size 32", "16")),
    Case("nvfp4_not_tiled", ao_nvfp4, meta(is_swizzled_scales=False), ("[32, 48]", "[48, 10]")),
    Case("nvfp4_untold", ao_nvfp4, meta(is_swizzled_scales=None), ("is_swizzled_scales None",)),
    Case("nvfp4_odd", ao_nvfp4, put({Q: words(ROWS, 77)}), ("block_size 16", "154")),
    Case("nvfp4_scale_nan", ao_nvfp4, put({S: byte(0x7F)}), ("_weight_scale", "1 of 1536", "NaN")),
    Case("nvfp4_negative", ao_nvfp4, put({S: byte(0xB8)}), ("_weight_scale", "negative")),
    Case("nvfp4_float_scale", ao_nvfp4, put({S: torch.rand(32, 48)}), ("F32", "F8_E4M3")),
    Case(
        "nvfp4_second_missing",
        ao_nvfp4,
        put({"_weight_per_tensor_scale": None}),
        ("per_tensor_scale is missing",),
    ),
    Case(
        "nvfp4_second_rows",
        ao_nvfp4,
        put({"_weight_per_tensor_scale": torch.rand(ROWS)}),
        ("per_tensor_scale", "[48]"),
    ),
    Case(
        "nvfp4_second_nan",
        ao_nvfp4,
        put({"_weight_per_tensor_scale": torch.tensor(NAN)}),
        ("per_tensor_scale", "NaN"),
    ),
    Case("mx_elements", ao_mx, meta(elem_dtype="fp6_e3m2"), ("elem_dtype 'fp6_e3m2'", "e5m2")),
    Case("mx_no_elements", ao_mx, meta(elem_dtype=None), ("elem_dtype None",)),
    Case("mx_block", ao_mx, meta(block_size=33), ("block_size 33",)),
    Case("mx_block_no_divisor", ao_mx, meta(block_size=64), ("block_size 64", "160")),
    Case("mx_scale_nan", ao_mx, put({S: byte(255)}), ("_weight_scale", "1 of 240", "NaN")),
    Case("mx_scale_shape", ao_mx, put({S: lambda t: t[:, :4].contiguous()}), ("[48, 4]",)),
    # ---- quanto
    Case("quanto_scale_missing", quanto8, put({SCALE: None}), ("_scale is missing",)),
    Case("quanto_data_missing", quanto8, put({"weight._data": None}), ("_data is missing",)),
    Case("quanto_rows", quanto8, put({SCALE: torch.rand(ROWS - 1, 1)}), ("_scale", "[47, 1]")),
    Case("quanto_nan", quanto8, put({SCALE: poison(NAN)}), ("_scale", "NaN")),
    Case("quanto_codes", quanto8, put({SCALE: words(ROWS, 1)}), ("_scale", "wrong dtype")),
    Case(
        "quanto_bytes", quanto8, put({"weight._data": words(ROWS, 160)}), ("does not write", "U8")
    ),
    Case("quanto_flat", quanto8, put({"weight._data": lambda t: t.view(-1)}), ("I8[7680]",)),
    Case("packed_scale_missing", quanto4, put({SCALE: None}), ("_scale is missing",)),
    Case("packed_shift_missing", quanto4, put({SHIFT: None}), ("_shift is missing",)),
    Case("packed_data_missing", quanto4, put({DATA: None}), ("_data is missing",)),
    Case("packed_short", quanto4, put({DATA: lambda t: t[:-1].contiguous()}), ("[119, 32]", "240")),
    Case("packed_shift_count", quanto4, put({SHIFT: torch.rand(239, 1)}), ("_shift", "[239, 1]")),
    Case("packed_scale_flat", quanto4, put({SCALE: torch.rand(240)}), ("one for each group",)),
    Case("packed_scale_nan", quanto4, put({SCALE: poison(NAN)}), ("_scale", "NaN")),
    Case("packed_shift_nan", quanto4, put({SHIFT: poison(NAN)}), ("_shift", "NaN")),
    Case("packed_shift_int", quanto4, put({SHIFT: words(240, 1)}), ("_shift", "U8")),
    Case("packed_wide", quanto4, put({DATA: lambda t: t.to(torch.int16)}), ("I16", "U8")),
    Case("packed_other_bias", quanto4, put({"bias": torch.randn(7)}), ("groups", "[7, ")),
    Case("packed_cut_groups", quanto4, put({"bias": torch.randn(96)}), ("groups", "[96, 80]")),
    Case("packed_no_bias", quanto4, no_bias, ("architecture is unknown", "240 groups of 32")),
    Case(
        "packed_untold_width",
        quanto4,
        both(
            settings(weights_dtype=None),
            put({DATA: words(1, 160), SCALE: torch.rand(2, 1), SHIFT: torch.rand(2, 1)}),
        ),
        ("does not tell the width", "weights_dtype"),
    ),
    # ---- of two schemes
    Case(
        "other_config",
        bnb4,
        settings(quant_method="torchao"),
        ("contradicts itself", "bitsandbytes", "torchao"),
    ),
)


def write(folder: Path, file: File) -> Path:
    folder.mkdir()
    tensors = {name: value.contiguous() for name, value in file.tensors.items()}
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors", file.metadata or None)
    config = {"quantization_config": file.config}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("make", "scheme"), RIGHT, ids=lambda value: getattr(value, "__name__", "")
)
def test_the_unbroken_checkpoint_is_read(make, scheme, tmp_path):
    plan = pack("loaders.plan").make_plan(write(tmp_path / "m", make()))
    weight = plan.entries[f"{LAYER}.weight"]
    assert plan.detection.scheme == scheme
    assert weight.shape == (ROWS, COLUMNS)
    made = weight.read()
    made.check()
    assert torch.isfinite(made.dequantize()).all() or make in (ao_fp8, ao_mx)
    plan.source.close()


def test_every_case_has_a_name_of_its_own():
    assert len({case.id for case in CASES}) == len(CASES)


@pytest.mark.timeout(30)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_broken_layer_is_an_error_that_says_what_to_do(case: Case, tmp_path):
    file = case.make()
    case.change(file)
    folder = write(tmp_path / "m", file)
    with pytest.raises(pack("quant.errors").LowBitError) as caught:
        pack("loaders.host.api").load_diffusion_model(str(folder), {})
    error = caught.value
    message = str(error)
    for told in case.told:
        assert told in message, f"{told!r} is not in:\n{message}"
    assert str(tmp_path) in (error.file or ""), message
    assert error.found and error.expected and error.remedy, message
    assert error.layer or case.id == "other_config", message
