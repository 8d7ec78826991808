"""Broken ModelSlim checkpoints: each a small right one with one thing made wrong.

Every case must give one clear error that names the file, the layer, what was found, what was
expected and what to do, through the same call that the loader node makes; none may load.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from modelslim_models import make_layer, stored, write
from support import pack

Tensors = dict[str, tuple[torch.Tensor, str]]
STATIC, DYNAMIC, INT4, MX8, MX4, FP8 = (f"blocks.{number}.a" for number in range(6))
DUAL, SVD, SMOOTH = (f"blocks.{number}.a" for number in range(6, 9))
INNER = f"{SMOOTH}.linear"
LAYERS = {
    STATIC: ("W8A8", {}),
    DYNAMIC: ("W8A8_DYNAMIC", {}),
    INT4: ("W4A4_DYNAMIC", {"group": 32}),
    MX8: ("W8A8_MXFP8", {}),
    MX4: ("W4A4_MXFP4", {}),
    FP8: ("WFP8AFP8_DYNAMIC", {}),
    DUAL: ("W4A4_MXFP4_DUALSCALE", {}),
    SVD: ("W8A8_DYNAMIC", {"rank": 2}),
    SMOOTH: ("W8A8_DYNAMIC", {"smooth": True}),
}


class Case(NamedTuple):
    """``change(tensors)`` breaks a right checkpoint; ``told`` must stand in the error."""

    id: str
    change: Callable[[Tensors], None]
    told: tuple[str, ...]
    described: dict = {}  # noqa: RUF012 - never written


@cache
def layers() -> Tensors:
    """One layer of every kind."""
    rng = np.random.default_rng(0)
    made: Tensors = {"norm.weight": (torch.ones(4), "FLOAT")}
    for name, (type_, options) in LAYERS.items():
        weight, bias = rng.standard_normal((6, 64)), rng.standard_normal(6)
        made |= stored(name, make_layer(type_, weight, bias, **options))
    return made


def put(layer: str, /, type_: str | None = None, **parts):
    """Replace tensors of a layer; None takes one away, with its word in the description."""

    def change(tensors: Tensors) -> None:
        for suffix, value in parts.items():
            name = f"{layer}.{suffix}"
            if value is None:
                del tensors[name]
                continue
            old, old_type = tensors.get(name, (None, type_ or "FLOAT"))
            tensors[name] = value(old.clone()) if callable(value) else value, type_ or old_type

    return change


def types(layer: str, type_: str, *parts: str):
    """Another type in the description, of a layer or of some of its tensors."""

    def change(tensors: Tensors) -> None:
        for name, (tensor, old) in list(tensors.items()):
            prefix, _, part = name.rpartition(".")
            if prefix == layer and (part in parts if parts else old != "FLOAT"):
                tensors[name] = tensor, type_

    return change


def nothing(tensors: Tensors) -> None:
    pass


def only_floats(tensors: Tensors) -> None:
    for name in [name for name in tensors if name != "norm.weight"]:
        del tensors[name]


def poison(value: float):
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[0] = value
        return tensor

    return change


NAN = float("nan")
CASES = (
    # --- tensors that lack or are too many
    Case("weight_missing", put(DYNAMIC, weight=None), ("lacks its weight", DYNAMIC)),
    Case("deq_scale_missing", put(STATIC, deq_scale=None), ("lacks its deq_scale", "quant_bias")),
    Case("quant_bias_missing", put(STATIC, quant_bias=None), ("lacks its quant_bias",)),
    Case("input_scale_missing", put(STATIC, input_scale=None), ("lacks its input_scale",)),
    Case("input_offset_missing", put(STATIC, input_offset=None), ("lacks its input_offset",)),
    Case("weight_scale_missing", put(INT4, weight_scale=None), ("lacks its weight_scale",)),
    Case("weight_offset_missing", put(INT4, weight_offset=None), ("lacks its weight_offset",)),
    Case("block_scale_missing", put(MX8, weight_scale=None), ("contradict", "W8A8_MXFP8")),
    Case("dual_scale_missing", put(DUAL, weight_dual_scale=None), ("contradict", "DUALSCALE")),
    Case("inner_weight_missing", put(INNER, weight=None), ("lacks its weight",)),
    Case("half_a_branch", put(SVD, svd_lowrank_l2=None), ("one half", "svd_lowrank_l1")),
    Case(
        "surplus",
        put(STATIC, "W8A8", weight_scale=torch.ones(6, 1)),
        ("nothing accounts for", f"layer: {STATIC}.weight_scale"),
    ),
    Case("unknown", put(INT4, scale_bias=torch.ones(6, 1)), ("nothing accounts", "scale_bias")),
    Case("twice", put(SMOOTH, weight=torch.ones(6, 64)), ("twice", f"{INNER}.weight")),
    Case(
        "orphan_codes",
        put("x", weight=torch.ones(2, 2, dtype=torch.int8)),
        ("holds codes", "layer: x.weight", "I8[2, 2]"),
    ),
    Case("rotated", put(INT4, left_trans=torch.eye(8)), ("rotated", "left_trans", "FlatQuant")),
    Case("rotated_heads", put("o", heads_rotation=torch.eye(8)), ("rotated", "heads_rotation")),
    Case("lone_rotation", put("b", q_rot=torch.eye(4)), ("rotated differently", "k_rot")),
    Case(
        "other_rotations",
        put("b", q_rot=torch.eye(4), k_rot=-torch.eye(4)),
        ("rotated differently", "b.q_rot and b.k_rot"),
    ),
    # --- shapes and dtypes
    Case("weight_flat", put(DYNAMIC, weight=lambda t: t.view(-1)), ("no matrix", "[384]")),
    Case("weight_wide", put(STATIC, weight=lambda t: t.to(torch.int32)), ("dtype", "I32[6, 64]")),
    Case("weight_odd", put(DYNAMIC, weight=lambda t: t.to(torch.int16)), ("dtype", "I16[6, 64]")),
    Case("rows_lost", put(DYNAMIC, weight=lambda t: t[:5]), ("does not fit", "5 outputs")),
    Case("scale_rows", put(DYNAMIC, weight_scale=lambda t: t[:5]), ("does not fit", "[5, 1]")),
    Case("scale_groups", put(INT4, weight_scale=torch.ones(6, 3)), ("does not fit", "[6, 3]")),
    Case("offset_groups", put(INT4, weight_offset=torch.zeros(6, 1)), ("weight_offset", "[6, 2]")),
    Case("scale_in_bytes", put(DYNAMIC, weight_scale=torch.ones(6, 1).byte()), ("U8[6, 1]", "F32")),
    Case("block_scales", put(MX8, weight_scale=lambda t: t[:, :1]), ("does not fit", "[6, 2]")),
    Case(
        "blocks_cut",
        put(MX4, weight=lambda t: t[:, :20], weight_scale=lambda t: t[:, :1]),
        ("whole number of groups", "40 inputs", "32"),
    ),
    Case("dual_scales", put(DUAL, weight_dual_scale=torch.ones(6, 2, 1)), ("[6, 1, 1]",)),
    Case("deq_short", put(STATIC, deq_scale=lambda t: t[1:]), ("does not fit", "[5]")),
    Case("deq_in_half", put(STATIC, deq_scale=lambda t: t.half()), ("F16[6]", "F32 or I64")),
    Case("quant_bias_float", put(STATIC, quant_bias=torch.ones(6)), ("F32[6]", "I32")),
    Case("input_scales", put(STATIC, input_scale=torch.ones(64)), ("does not fit", "[64]")),
    Case("input_offsets", put(STATIC, input_offset=torch.ones(6)), ("does not fit", "[6]")),
    Case("bias_short", put(INT4, bias=lambda t: t[1:]), ("does not fit", "bias", "[5]")),
    Case("smooth_of_outputs", put(f"{SMOOTH}.div", mul_scale=torch.ones(6)), ("[6]", "[64]")),
    Case("branch_turned", put(SVD, svd_lowrank_l1=lambda t: t.t()), ("does not fit", "[64, 2]")),
    Case("branch_flat", put(SVD, svd_lowrank_l1=lambda t: t.view(-1)), ("svd_lowrank_l1", "[128]")),
    Case("branch_ranks", put(SVD, svd_lowrank_l2=torch.ones(6, 3)), ("does not fit", "[6, 2]")),
    # --- what the tensors hold
    Case("scale_nan", put(DYNAMIC, weight_scale=poison(NAN)), ("1 of 6 are NaN", "weight_scale")),
    Case("scale_negative", put(DYNAMIC, weight_scale=poison(-1)), ("cannot be scales", "-1")),
    Case("scales_zero", put(INT4, weight_scale=lambda t: 0 * t), ("cannot be scales", "0 to 0")),
    Case("offset_infinite", put(DYNAMIC, weight_offset=poison(float("inf"))), ("weight_offset",)),
    Case("input_scale_zero", put(STATIC, input_scale=poison(0)), ("input_scale", "0 to 0")),
    Case("input_offset_nan", put(STATIC, input_offset=poison(NAN)), ("input_offset", "NaN")),
    Case("deq_negative", put(STATIC, deq_scale=poison(-0.5)), ("deq_scale", "-0.5")),
    Case(
        "deq_of_64_bits",
        put(STATIC, deq_scale=torch.full((6,), 2**40 + 1)),
        ("more than the bits of a float", str(2**40 + 1)),
    ),
    Case("exponent_nan", put(MX8, weight_scale=poison(255)), ("weight_scale", "1 of 12")),
    Case("code_nan", put(FP8, weight=poison(NAN)), ("NaN among its codes",)),
    Case("float_offset", put(FP8, weight_offset=poison(1)), ("float codes have an offset",)),
    Case("dual_nan", put(DUAL, weight_dual_scale=poison(NAN)), ("weight_dual_scale", "NaN")),
    Case("smooth_zero", put(f"{SMOOTH}.div", mul_scale=poison(0)), ("mul_scale", "from 0 to")),
    Case("branch_nan", put(SVD, svd_lowrank_l1=poison(NAN)), ("svd_lowrank_l1", "1 of 128")),
    Case("bias_nan", put(DYNAMIC, bias=poison(NAN)), ("bias", "1 of 6 are NaN")),
    Case("codes_of_8_bits", put(INT4, weight=poison(8)), ("no 4-bit ones", "to 8", "-8 to 7")),
    Case(
        "bias_of_another",
        put(STATIC, bias=lambda t: t + 0.5),
        ("quant_bias contradicts", "6 of 6 differ"),
    ),
    Case(
        "offset_of_another",
        put(STATIC, input_offset=lambda t: -t),
        ("quant_bias contradicts", "for output"),
    ),
    # --- the description
    Case(
        "described_as_static",
        types(DYNAMIC, "W8A8"),
        ("contradict the description", "W8A8, as quant_model_description.json", DYNAMIC),
    ),
    Case("described_as_float", types(DYNAMIC, "FLOAT"), ("contradict", "FLOAT")),
    Case("described_as_4_bits", types(MX8, "W4A4_MXFP4"), ("contradict", "F8_E4M3[6, 64]")),
    Case("described_as_int4", types(STATIC, "W4A4_DYNAMIC"), ("contradict", "as W8A8 is stored")),
    Case(
        "float_described_as_int8",
        types("norm", "W8A8_DYNAMIC", "weight"),
        ("contradict", "weight F32[4]", "layer: norm.weight"),
    ),
    Case("described_with_branch", types(DYNAMIC, "W8A8_SVD_DYNAMIC"), ("no low-rank branch",)),
    Case("described_without_branch", types(SVD, "W8A8_DYNAMIC"), ("a low-rank branch", SVD)),
    Case("packed_type", types(INT4, "W4A8_DYNAMIC"), ("W4A8_DYNAMIC, which is not read", INT4)),
    Case("flat_type", types(INT4, "W4A4_FLATQUANT_DYNAMIC"), ("not read", "FLATQUANT")),
    Case("type_of_tomorrow", types(INT4, "W2A2"), ("W2A2, which is not read", "W8A8_DYNAMIC")),
    Case("type_no_text", nothing, ("no type", f"layer: {INT4}.weight", "4"), {f"{INT4}.weight": 4}),
    Case(
        "tensor_lost",
        nothing,
        ("lacks", "layer: blocks.9.a.weight", "W8A8 in quant_model"),
        {"blocks.9.a.weight": "W8A8"},
    ),
    Case("nothing_quantized", only_floats, ("no layer is quantized",)),
)
HOLDS_LAYER = {"nothing_quantized": "*.weight_scale"}


def load(path: Path):
    pack("loaders.host.api").load_diffusion_model(str(path), {})


def right() -> Tensors:
    return dict(layers())


def test_the_unbroken_checkpoint_is_read(tmp_path):
    plan = pack("loaders.plan").make_plan(write(tmp_path / "m", right()))
    assert len(plan.quantized()) == len(LAYERS)
    for entry in plan.entries.values():
        value = entry.read()
        value = value.dequantize() if entry.parts else value
        assert torch.isfinite(value).all(), entry.key
    plan.source.close()


@pytest.mark.timeout(30)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_broken_layer_is_an_error_that_says_what_to_do(case: Case, tmp_path):
    tensors = right()
    case.change(tensors)
    path = write(tmp_path / "m", tensors, more=case.described)
    with pytest.raises(pack("quant.errors").LowBitError) as caught:
        load(path)
    error = caught.value
    text = str(error)
    for words in case.told:
        assert words in text, f"{words!r} is not in:\n{text}"
    assert str(tmp_path) in (error.file or ""), text
    assert error.layer and error.found and error.expected and error.remedy, text


def refused(path: Path) -> str:
    with pytest.raises(pack("quant.errors").LowBitError) as caught:
        load(path)
    error = caught.value
    assert error.file and error.found and error.expected and error.remedy
    return str(error)


def test_two_descriptions(tmp_path):
    folder = write(tmp_path / "m", right())
    other = folder / "quant_model_description_w8a8.json"
    other.write_text("{}", encoding="utf-8")
    (folder / "quant_model_description.json").rename(folder / "quant_model_description_x.json")
    text = refused(folder)
    assert "which is meant" in text and "quant_model_description_w8a8.json" in text


def test_broken_description(tmp_path):
    folder = write(tmp_path / "m", right())
    file = folder / "quant_model_description.json"
    for content in ("{", "[]", json.dumps({"a.b": ["W8A8"]})):
        file.write_text(content, encoding="utf-8")
        assert file.name in refused(folder)


def test_truncated_weights(tmp_path):
    folder = write(tmp_path / "m", right())
    file = folder / "quant_model_weights.safetensors"
    os.truncate(file, file.stat().st_size - 100)
    assert "cut off" in refused(folder)


def test_missing_shard(tmp_path):
    folder = write(tmp_path / "m", right(), shards=3)
    (folder / "quant_model_weights-00002-of-00003.safetensors").unlink()
    assert "shard" in refused(folder)


def test_config_of_another_scheme(tmp_path):
    config = {"quantization_config": {"quant_method": "bitsandbytes"}}
    text = refused(write(tmp_path / "m", right(), config=config))
    assert "contradicts itself" in text and "set scheme to modelslim" in text


def test_other_schemes_tensors_beside_it(tmp_path):
    tensors = right() | {
        "z.qweight": (torch.ones(2, 2, dtype=torch.int8), "FLOAT"),
        "z.wscales": (torch.ones(2, 2), "FLOAT"),
    }
    text = refused(write(tmp_path / "m", tensors))
    assert "contradicts itself" in text and "svdq" in text
