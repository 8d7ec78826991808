"""Broken SDNQ layers: each a small right checkpoint with one thing made wrong.

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


class Case(NamedTuple):
    """``change(tensors, config)`` breaks a right checkpoint; ``told`` must stand in the error."""

    id: str
    change: Callable[[Tensors, dict], None]
    told: tuple[str, ...]


def right() -> tuple[Tensors, dict]:
    """A uint4 layer with a branch, a plain layer and a config; 64 outputs, 128 inputs, g 64."""
    torch.manual_seed(1)
    tensors = {
        f"{LAYER}.weight": torch.randint(0, 256, (64 * 128 // 2,), dtype=torch.uint8),
        f"{LAYER}.scale": torch.rand(64, 2, 1) + 0.5,
        f"{LAYER}.zero_point": torch.randn(64, 2, 1),
        f"{LAYER}.svd_up": torch.randn(64, 8).bfloat16(),
        f"{LAYER}.svd_down": torch.randn(8, 128).bfloat16(),
        f"{LAYER}.bias": torch.randn(64),
        "norm.weight": torch.randn(64),
    }
    config = {"quant_method": "sdnq", "weights_dtype": "uint4", "sdnq_version": "0.2.8"}
    return tensors, config


def put(**parts):
    """Replace tensors of the layer; None takes one away."""

    def change(tensors: Tensors, config: dict) -> None:
        for suffix, value in parts.items():
            name = f"{LAYER}.{suffix}"
            if value is None:
                del tensors[name]
            else:
                tensors[name] = value(tensors[name]) if callable(value) else value

    return change


def settings(**values):
    """Replace settings of the config."""

    def change(tensors: Tensors, config: dict) -> None:
        config.update(values)

    return change


def both(*changes):
    def change(tensors: Tensors, config: dict) -> None:
        for one in changes:
            one(tensors, config)

    return change


def poison(value: float):
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[3] = value
        return tensor

    return change


def add(**tensors_by_name):
    def change(tensors: Tensors, config: dict) -> None:
        tensors.update({name.replace("__", "."): t for name, t in tensors_by_name.items()})

    return change


BARE = put(svd_up=None, svd_down=None)
SIGNED = both(BARE, put(zero_point=None), settings(weights_dtype="int4"))

CASES = (
    Case("scale_missing", put(scale=None), ("scale", "missing", LAYER)),
    Case("scale_missing_int8", both(BARE, put(scale=None, zero_point=None, bias=None)), ("scale",)),
    Case("weight_missing", put(weight=None), ("no weight", LAYER)),
    Case("weight_too_short", put(weight=lambda t: t[:-32]), ("does not fit", "8128")),
    Case("weight_too_long", put(weight=lambda t: torch.cat((t, t))), ("does not fit",)),
    Case("weight_of_floats", put(weight=torch.randn(64, 128)), ("contradicts", "F32", "uint4")),
    Case("weight_empty", put(weight=torch.empty(0, dtype=torch.uint8)), (LAYER,)),
    Case("wrong_group_count", put(scale=torch.rand(64, 3, 1)), ("does not fit", "uint4")),
    Case("wrong_rows", put(scale=torch.rand(60, 2, 1)), (LAYER, "codes")),
    Case("odd_scale_shape", put(scale=torch.rand(64, 2, 2)), (LAYER,)),
    Case("scale_of_four_axes", put(scale=torch.rand(64, 2, 3, 1)), (LAYER,)),
    Case("scale_nan", put(scale=poison(float("nan"))), ("no numbers", "1 of 128")),
    Case("scale_infinite", put(scale=poison(float("inf"))), ("no numbers",)),
    Case("zero_point_nan", put(zero_point=poison(float("nan"))), ("no numbers", "zero_point")),
    Case("zero_point_count", put(zero_point=torch.randn(64, 1, 1)), ("zero points", "64", "128")),
    Case("zero_point_missing", put(zero_point=None), ("neither a zero point nor a codebook",)),
    Case("zero_point_on_signed", settings(weights_dtype="int4"), ("zero point", "int4")),
    Case("svd_up_missing", put(svd_up=None), ("one half", "svd_down")),
    Case("svd_down_missing", put(svd_down=None), ("one half", "svd_up")),
    Case("svd_rank_differs", put(svd_up=torch.randn(64, 9)), ("low-rank branch", "9")),
    Case("svd_rows_differ", put(svd_up=torch.randn(63, 8)), ("low-rank branch", "63")),
    Case("svd_columns_differ", put(svd_down=torch.randn(8, 100)), ("low-rank branch", "100")),
    Case("svd_of_three_axes", put(svd_up=torch.randn(64, 8, 1)), ("low-rank branch",)),
    Case("svd_nan", put(svd_up=poison(float("nan"))), ("no numbers", "svd_up")),
    Case("bias_differs", put(bias=torch.randn(65)), ("bias", "65", "64")),
    Case("unknown_dtype", settings(weights_dtype="uint4k"), ("uint4k", "uint4", LAYER)),
    Case("other_dtype", settings(weights_dtype="uint2"), (LAYER,)),
    Case("wider_dtype", settings(weights_dtype="int12"), ("contradicts", "int12")),
    Case("raw_dtype", settings(weights_dtype="int8"), ("contradicts", "U8", "int8")),
    Case("dtype_no_text", settings(weights_dtype=4), ("wrong type", "weights_dtype")),
    Case("dtype_list", settings(weights_dtype=["uint4"]), ("wrong type",)),
    Case("group_size_text", settings(group_size="64"), ("wrong type", "group_size")),
    Case("use_svd_text", settings(use_svd="yes"), ("wrong type", "use_svd")),
    Case("overrides_list", settings(modules_dtype_dict=["int5"]), ("wrong type",)),
    Case("override_text", settings(modules_dtype_dict={"int5": "a"}), ("wrong type", "int5")),
    Case("override_number", settings(modules_dtype_dict={"int5": [3]}), ("wrong type",)),
    Case(
        "override_no_dtype",
        settings(modules_dtype_dict={"sixbit": [f"{LAYER}.weight"]}),
        ("not a dtype", "sixbit"),
    ),
    Case(
        "override_contradicts",
        settings(modules_dtype_dict={"int5": [f"{LAYER}.weight"]}),
        (LAYER, "int5"),
    ),
    Case(
        "pattern_broken",
        settings(modules_dtype_dict={"int5": ["*blocks(*"]}),
        ("modules_", "blocks("),
    ),
    Case(
        "layer_settings_list",
        settings(modules_quant_config={LAYER: ["int8"]}),
        ("wrong type", "modules_quant_config"),
    ),
    Case(
        "layer_settings_unknown_dtype",
        settings(modules_quant_config={f"{LAYER}.weight": {"weights_dtype": "nf4"}}),
        ("nf4", LAYER),
    ),
    Case(
        "coded_scale_without_name",
        both(BARE, add(**{f"{LAYER.replace('.', '__')}__scale_2": torch.ones(1)})),
        ("does not name their format",),
    ),
    Case(
        "coded_scale_contradicts",
        both(
            BARE,
            settings(scale_dtype="uint6"),
            add(**{f"{LAYER.replace('.', '__')}__scale_2": torch.ones(1)}),
        ),
        ("scale", LAYER),
    ),
    Case(
        "coded_scale_unknown",
        both(
            BARE,
            settings(scale_dtype="fp77"),
            add(**{f"{LAYER.replace('.', '__')}__scale_2": torch.ones(1)}),
        ),
        ("fp77", LAYER),
    ),
    Case(
        "coded_scale_without_factor",
        both(BARE, put(scale=lambda t: (t * 9).to(torch.uint8))),
        ("their own scale is missing", "scale_2"),
    ),
    Case(
        "one_bit_words_out_of_range",
        both(
            BARE,
            settings(weights_dtype="uint1"),
            put(
                weight=torch.full((64 * 128 // 8,), 256, dtype=torch.int64),
                scale=torch.rand(64, 1),
                zero_point=torch.randn(64, 1),
            ),
        ),
        ("no bytes", "256"),
    ),
    Case(
        "codebook_of_wrong_size",
        both(BARE, put(zero_point=None, scale=torch.randn(64, 2, 15))),
        ("16 levels", "15"),
    ),
    Case(
        "codebook_nan",
        both(BARE, put(zero_point=None, scale=poison(float("nan"))(torch.rand(64, 2, 16)))),
        ("no numbers",),
    ),
    Case(
        "no_format_told",
        both(SIGNED, lambda tensors, config: config.pop("weights_dtype")),
        ("does not tell its number format", "config.json"),
    ),
)


def write(folder: Path, change: Callable[[Tensors, dict], None] | None) -> Path:
    tensors, config = right()
    if change is not None:
        change(tensors, config)
    folder.mkdir()
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": config}))
    return folder


def test_the_unbroken_checkpoint_is_read(tmp_path):
    plan = pack("loaders.plan").make_plan(write(tmp_path / "m", None))
    weight = plan.entries[f"{LAYER}.weight"]
    assert weight.shape == (64, 128) and weight.spec.rank == 8
    assert torch.isfinite(weight.read().dequantize()).all()


@pytest.mark.timeout(30)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_broken_layer_is_an_error_that_says_what_to_do(case: Case, tmp_path):
    folder = write(tmp_path / "m", case.change)
    with pytest.raises(pack("quant.errors").LowBitError) as caught:
        pack("loaders.host.api").load_diffusion_model(str(folder), {})
    error = caught.value
    text = str(error)
    for words in case.told:
        assert words in text, f"{words!r} is not in:\n{text}"
    assert str(tmp_path) in (error.file or ""), text
    assert error.layer and error.found and error.expected and error.remedy, text
