"""Broken SVDQuant checkpoints: each a small right one with one thing made wrong.

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

import pytest
import torch
from support import pack
from svdq_files import awq, kitchen, kitchen_awq, lite, manifest, marker_of, named, svdq
from svdq_files import target as listed
from svdq_files import write as save

Tensors = dict[str, torch.Tensor]
LAYER = "blocks.0.proj"
MOD = "transformer_blocks.0.norm1.linear"
FC2 = "transformer_blocks.0.mlp_fc2"
MARKED, MARKED_AWQ = "blocks.1.proj", "blocks.1.mod"
ENGINE = {"model_class": "NunchakuFluxTransformer2dModel"}


class Case(NamedTuple):
    """``change(tensors)`` breaks a right checkpoint; ``told`` must stand in the error."""

    id: str
    change: Callable[[Tensors], None]
    told: tuple[str, ...]
    metadata: dict = ENGINE
    options: dict = {}  # noqa: RUF012 - never written


@cache
def layers() -> Tensors:
    """One layer of every kind: W4A4 plain, nvfp4 and unsigned, modulation, ComfyUI-quants'."""
    made = {
        LAYER: svdq(256, 384),
        "blocks.0.fp4": svdq(128, 256, precision="nvfp4", second="tc"),
        FC2: svdq(128, 256),
        MOD: awq(384, 128, 6),
        MARKED: kitchen(128, 128),
        MARKED_AWQ: kitchen_awq(128, 128),
    }
    return named(**made) | {"norm.weight": torch.randn(128)}


def right() -> Tensors:
    return dict(layers())


def put(layer: str = LAYER, /, **parts):
    """Replace tensors of a layer; None takes one away."""

    def change(tensors: Tensors) -> None:
        for suffix, value in parts.items():
            name = f"{layer}.{suffix}"
            if value is None:
                del tensors[name]
            else:
                tensors[name] = value(tensors[name]) if callable(value) else value

    return change


def poison(value: float, index: int = 3):
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[index] = value
        return tensor

    return change


def nothing(tensors: Tensors) -> None:
    pass


def added(**more: torch.Tensor):
    return lambda tensors: tensors.update({k.replace("__", "."): v for k, v in more.items()})


def only(*kept: str):
    def change(tensors: Tensors) -> None:
        for name in [name for name in tensors if not name.startswith(kept)]:
            del tensors[name]

    return change


def quantization(**config) -> dict:
    return ENGINE | {"quantization_config": {"method": "svdquant", **config}}


NAN = float("nan")
CASES = (
    # --- tensors that lack or are too many
    Case("wscales_missing", put(wscales=None), ("lacks its wscales", "qweight, wscales, smooth")),
    Case("smooth_missing", put(smooth=None), ("lacks its smooth",)),
    Case("qweight_missing", put(qweight=None), ("codes are missing", f"{LAYER}.qweight")),
    Case("down_missing", put(lora_down=None), ("one half", "lora_up")),
    Case("up_missing", put(lora_up=None), ("one half", "lora_down")),
    Case("wzeros_missing", put(MOD, wzeros=None), ("lacks its wzeros", MOD)),
    Case("zero_missing", put(MARKED_AWQ, weight_zero=None), ("lacks its weight_zero",)),
    Case("marked_scale_missing", put(MARKED, weight_scale=None), ("lacks its weight_scale",)),
    Case("marked_smooth_missing", put(MARKED, smooth_factor=None), ("lacks its smooth",)),
    Case("marked_branch_missing", put(MARKED, proj_up=None), ("lacks its lora_up",)),
    Case("unknown_tensor", put(wzeros=torch.ones(6, 256)), ("nothing accounts for", ".wzeros")),
    Case("unknown_name", put(lora_mid=torch.ones(4)), ("nothing accounts for", "lora_mid")),
    Case("weight_beside_codes", put(weight=torch.ones(4, 4)), ("nothing accounts for", ".weight")),
    Case(
        "both_spellings",
        put(smooth_factor=torch.ones(384)),
        ("twice", f"{LAYER}.smooth_factor", "one of them"),
    ),
    Case(
        "orphan_factor",
        added(blocks__7__a__proj_down=torch.ones(128, 16)),
        ("codes are missing", "blocks.7.a.qweight"),
    ),
    Case(
        "int8_weight",
        added(blocks__7__a__weight=torch.ones(4, 4, dtype=torch.int8)),
        ("holds codes", "blocks.7.a.weight", "I8[4, 4]"),
    ),
    Case("modulation_without_bias", put(MOD, bias=None), ("lacks its bias", MOD)),
    # --- shapes
    Case("outputs_no_tile", put(qweight=lambda t: t[:200]), ("tiles of 128", "200 outputs")),
    Case("inputs_no_tile", put(qweight=lambda t: t[:, :96]), ("tiles of 128", "192 inputs")),
    Case("codes_empty", put(qweight=lambda t: t[:0]), ("tiles of 128", "0 outputs")),
    Case("codes_truncated", put(qweight=lambda t: t[:128]), ("number of scales", "128 outputs")),
    Case("codes_of_one_axis", put(qweight=lambda t: t.view(-1)), ("no matrices",)),
    Case("groups_too_few", put(wscales=lambda t: t[:5]), ("number of scales", "[6, 256] (int4)")),
    Case("groups_of_16", put(wscales=lambda t: t.repeat(4, 1)), ("number of scales", "[24, 256]")),
    Case(
        "nvfp4_groups_of_64",
        put("blocks.0.fp4", wscales=lambda t: t[:4]),
        ("number of scales", "[16, 128] (nvfp4)"),
    ),
    Case(
        "byte_scales_of_no_format",
        put(wscales=torch.ones(6, 256, dtype=torch.uint8)),
        ("[24, 256] (nvfp4) or [12, 256] (mxfp4)",),
    ),
    Case("scales_turned", put(wscales=lambda t: t.t()), ("number of scales", "[256, 6]")),
    Case("smooth_short", put(smooth=lambda t: t[:-1]), ("does not fit", "[383]", "[384]")),
    Case("smooth_orig_short", put(smooth_orig=lambda t: t[:-1]), ("does not fit", "smooth_orig")),
    Case("bias_short", put(bias=lambda t: t[:-1]), ("does not fit", "[255]", "[256]")),
    Case("rank_differs", put(lora_up=lambda t: t[:, :8]), ("does not fit", "[256, 8]")),
    Case("down_differs", put(lora_down=lambda t: t[:-1]), ("does not fit", "[383, 16]")),
    Case("down_flat", put(lora_down=lambda t: t.view(-1)), ("low-rank branch", "[6144]")),
    Case(
        "rank_of_no_tile",
        put(lora_up=lambda t: t[:, :8], lora_down=lambda t: t[:, :8]),
        ("rank cannot be packed", "multiple of 16"),
    ),
    Case(
        "channel_scales_short",
        put("blocks.0.fp4", wcscales=lambda t: t[:5]),
        ("does not fit", "wcscales", "[128]"),
    ),
    Case(
        "tensor_scale_of_two",
        put("blocks.0.fp4", wtscale=torch.ones(2)),
        ("does not fit", "wtscale", "[2]"),
    ),
    Case("modulation_scales", put(MOD, wscales=lambda t: t[:1]), ("number of scales", "[2, 384]")),
    Case(
        "modulation_too_many_scales",
        put(MOD, wscales=lambda t: t.repeat(9, 1), wzeros=lambda t: t.repeat(9, 1)),
        ("number of scales", "[18, 384]"),
    ),
    Case("modulation_zeros", put(MOD, wzeros=lambda t: t[:1]), ("does not fit", "wzeros")),
    Case("modulation_bias", put(MOD, bias=lambda t: t[1:]), ("does not fit", "[383]")),
    Case(
        "modulation_of_no_chunks",
        put(
            MOD,
            **{"qweight": lambda t: t[:-1], "bias": lambda t: t[:-4]},
            **dict.fromkeys(("wscales", "wzeros"), lambda t: t[:, :-4]),
        ),
        ("no whole chunks", "380 outputs", "multiple of 6"),
    ),
    Case("modulation_columns", put(MOD, qweight=lambda t: t[:, :48]), ("96 inputs", "64")),
    Case("marked_codes", put(MARKED, weight=lambda t: t[:, :48]), ("no layout of comfy-kitchen",)),
    Case(
        "marked_tiles",
        put(MARKED, weight=lambda t: t.view(1, 2, 64, 64)),
        ("no layout of comfy-kitchen", "[1, 2, 64, 64]"),
    ),
    Case("marked_scales", put(MARKED, weight_scale=lambda t: t[:1]), ("does not fit", "[1, 128]")),
    Case("marked_factor", put(MARKED, proj_up=lambda t: t[1:]), ("does not fit", "[127, 8]")),
    Case(
        "marked_awq_scales",
        put(MARKED_AWQ, weight_scale=torch.ones(3, 128)),
        ("number of scales", "[3, 128]"),
    ),
    # --- dtypes
    Case("codes_of_floats", put(qweight=lambda t: t.float()), ("wrong dtype", "F32[256, 192]")),
    Case("codes_of_words", put(qweight=lambda t: t.int()), ("lacks its wzeros",)),
    Case("scales_of_32_bits", put(wscales=lambda t: t.float()), ("wrong dtype", "F32[6, 256]")),
    Case("scales_of_e5m2", put(wscales=lambda t: t.to(torch.float8_e5m2)), ("F8_E5M2",)),
    Case("smooth_of_integers", put(smooth=lambda t: t.int()), ("wrong dtype", "I32[384]")),
    Case("factor_of_bytes", put(lora_up=lambda t: t.to(torch.int8)), ("wrong dtype", "I8[256")),
    Case("modulation_of_floats", put(MOD, qweight=lambda t: t.float()), ("wrong dtype", "F32")),
    Case("marked_codes_wide", put(MARKED, weight=lambda t: t.int()), ("wrong dtype", "I32")),
    Case("tensor_scale_of_int4", put(wtscale=torch.ones(1)), ("int4", "whole tensor", "wtscale")),
    # --- values
    Case("scale_nan", put(wscales=poison(NAN)), ("wscales", "1 of 1536 are NaN")),
    Case("scale_infinite", put(wscales=poison(float("inf"))), ("cannot be meant", "wscales")),
    Case("scales_all_zero", put(wscales=torch.zeros_like), ("All scales of a layer are 0",)),
    Case(
        "nvfp4_scale_nan",
        put("blocks.0.fp4", wscales=lambda t: poison(127)(t.view(torch.uint8)).view(t.dtype)),
        ("1 of 2048 are NaN", "blocks.0.fp4.wscales"),
    ),
    Case(
        "nvfp4_scales_all_zero",
        put("blocks.0.fp4", wscales=torch.zeros(16, 128).to(torch.float8_e4m3fn)),
        ("All scales of a layer are 0", "blocks.0.fp4"),
    ),
    Case(
        "mxfp4_scale_nan",
        put(wscales=poison(255)(torch.full((12, 256), 127, dtype=torch.uint8))),
        ("1 of 3072 are NaN",),
    ),
    Case("tensor_scale_zero", put("blocks.0.fp4", wtscale=torch.zeros(1)), ("1 of 1 are 0",)),
    Case("tensor_scale_nan", put("blocks.0.fp4", wtscale=torch.full((1,), NAN)), ("NaN",)),
    Case("channel_scale_nan", put("blocks.0.fp4", wcscales=poison(NAN)), ("wcscales", "NaN")),
    Case("smooth_zero", put(smooth=poison(0)), ("smooth", "1 of 384 are 0")),
    Case("smooth_nan", put(smooth=poison(NAN)), ("smooth", "1 of 384 are NaN")),
    Case("factor_nan", put(lora_up=poison(NAN)), ("lora_up", "NaN")),
    Case("other_factor_nan", put(lora_down=poison(NAN)), ("lora_down", "NaN")),
    Case("bias_nan", put(bias=poison(NAN)), ("bias", "1 of 256 are NaN")),
    Case("unsigned_bias_nan", put(FC2, bias=poison(NAN)), (f"{FC2}.bias", "NaN")),
    Case("modulation_scale_nan", put(MOD, wscales=poison(NAN)), (f"{MOD}.wscales", "NaN")),
    Case("modulation_scales_zero", put(MOD, wscales=torch.zeros_like), ("All scales", MOD)),
    Case("modulation_zero_nan", put(MOD, wzeros=poison(NAN)), (f"{MOD}.wzeros", "NaN")),
    Case("modulation_bias_nan", put(MOD, bias=poison(NAN)), (f"{MOD}.bias", "NaN")),
    Case("marked_scale_nan", put(MARKED, weight_scale=poison(NAN)), ("weight_scale", "NaN")),
    Case("marked_smooth_zero", put(MARKED, smooth_factor=poison(0)), ("smooth_factor", "are 0")),
    # --- what the file says of itself
    Case("rank_no_number", nothing, ("wrong type", "rank", "'32'"), quantization(rank="32")),
    Case("weight_no_object", nothing, ("wrong type", "weight"), quantization(weight="int4")),
    Case("dtype_no_text", nothing, ("wrong type", "dtype"), quantization(weight={"dtype": 4})),
    Case("manifest_no_object", nothing, ("wrong type",), quantization(runtime_manifest=[])),
    Case("metadata_broken", nothing, ("metadata is broken",), {"quantization_config": "{"}),
    Case(
        "manifest_version",
        nothing,
        ("version that is not known", "runtime_manifest.version", "2"),
        quantization(runtime_manifest={"schema": "nunchaku_lite.runtime_manifest", "version": 2}),
    ),
    Case(
        "manifest_operation",
        nothing,
        ("operation that is not known", LAYER, "w8a8"),
        manifest(listed(LAYER, "w8a8")),
    ),
    Case(
        "manifest_splits",
        nothing,
        ("adanorm_splits 4", MOD),
        manifest(listed(MOD, "adanorm_awq_w4a16", op_options={"adanorm_splits": 4})),
    ),
    Case("manifest_target", nothing, ("wrong type", "targets"), manifest("a")),
    Case(
        "marker_basis",
        put(
            MARKED,
            comfy_quant=marker_of({"format": "svdquant_w4a4", "lowrank_branch_input_basis": "x"}),
        ),
        ("unknown kind", "'x'"),
    ),
    Case("marker_broken", put(MARKED, comfy_quant=torch.zeros(3, dtype=torch.uint8)), ("broken",)),
    # --- what the user insists on
    Case("asked_nvfp4", nothing, ("nvfp4 was asked", "BF16"), ENGINE, {"svdq_precision": "nvfp4"}),
    Case("asked_int4", nothing, ("int4 was asked", "F8_E4M3"), ENGINE, {"svdq_precision": "int4"}),
    Case("asked_other_precision", nothing, ("'int8'",), ENGINE, {"svdq_precision": "int8"}),
    Case("asked_rank", nothing, ("rank 32 was asked", "rank 16"), ENGINE, {"svdq_rank": 32}),
    Case("asked_rank_of_none", only(MOD), ("rank 32", "rank 0"), ENGINE, {"svdq_rank": 32}),
    Case("asked_unsigned", only(LAYER), ("no layer can", "GELU"), ENGINE, {"act_unsigned": "on"}),
    Case(
        "asked_unsigned_fp4",
        only("blocks.0.fp4"),
        ("no layer can", "svdq-nvfp4"),
        ENGINE,
        {"act_unsigned": "on"},
    ),
    Case("asked_signed_oddly", nothing, ("'maybe'",), ENGINE, {"act_unsigned": "maybe"}),
    # --- files that are something else
    Case("no_such_layers", only("norm"), ("no layer is stored so", "*.qweight")),
    Case(
        "text_encoder",
        added(
            encoder__qweight=torch.ones(2, 2, dtype=torch.int16),
            encoder__scales=torch.ones(1, 2).half(),
            encoder__scaled_zeros=torch.ones(1, 2).half(),
        ),
        ("text encoder",),
        {},
    ),
)


def load(path: Path, options: dict):
    pack("loaders.host.api").load_diffusion_model(str(path), options)


def test_the_unbroken_checkpoint_is_read(tmp_path):
    plan = pack("loaders.plan").make_plan(save(tmp_path / "m.safetensors", right(), ENGINE))
    assert len(plan.quantized()) == 6
    for entry in plan.quantized():
        assert torch.isfinite(entry.read().dequantize()).all()
    assert plan.entries[f"{FC2}.weight"].spec.activation.shift
    assert all(torch.isfinite(plan.entries[f"{e}.bias"].read()).all() for e in (LAYER, FC2, MOD))


@pytest.mark.timeout(30)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_broken_layer_is_an_error_that_says_what_to_do(case: Case, tmp_path):
    tensors = right() if case.id != "text_encoder" else {"norm.weight": torch.randn(4)}
    case.change(tensors)
    path = save(tmp_path / "m.safetensors", tensors, case.metadata)
    with pytest.raises(pack("quant.errors").LowBitError) as caught:
        load(path, case.options)
    error = caught.value
    text = str(error)
    for words in case.told:
        assert words in text, f"{words!r} is not in:\n{text}"
    assert str(tmp_path) in (error.file or ""), text
    assert error.found and error.expected and error.remedy, text
    assert error.layer or case.id == "text_encoder", text


def refused(path: Path) -> str:
    with pytest.raises(pack("quant.errors").LowBitError) as caught:
        load(path, {})
    error = caught.value
    assert str(path.parent) in error.file and error.found and error.expected and error.remedy
    return str(error)


def test_truncated_file(tmp_path):
    path = save(tmp_path / "m.safetensors", right(), ENGINE)
    os.truncate(path, path.stat().st_size - 1000)
    assert "cut off" in refused(path)


def test_half_of_the_older_form(tmp_path):
    for here, missing in (
        ("transformer_blocks.safetensors", "unquantized_layers.safetensors"),
        ("unquantized_layers.safetensors", "transformer_blocks.safetensors"),
    ):
        path = save(tmp_path / here / here, right(), ENGINE)
        text = refused(path)
        assert "Half of the checkpoint is missing" in text and f"layer: {missing}" in text
        assert "Half" in refused(path.parent)


def test_sana_is_refused_by_its_name(tmp_path):
    layer = "transformer_blocks.0.ff.inverted_conv"
    told = {"model_class": "NunchakuSanaTransformer2DModel"}
    text = refused(save(tmp_path / "m.safetensors", named(**{layer: svdq()}), told))
    assert "SANA" in text and layer in text


@pytest.mark.parametrize(
    ("section", "told"),
    [
        ({"svdq_w4a4": ["a"]}, "svdq_w4a4"),
        ({"svdq_w4a4": {"targets": "a"}}, "svdq_w4a4.targets"),
        ({"svdq_w4a4": {"targets": [3]}}, "svdq_w4a4.targets"),
        ({"awq_w4a16": {"targets": None}}, "awq_w4a16.targets"),
        ({"svdq_w4a4": {"targets": ["a"], "rank": "32"}}, "svdq_w4a4.rank"),
        ({"svdq_w4a4": {"targets": ["a"], "precision": 4}}, "svdq_w4a4.precision"),
    ],
    ids=str,
)
def test_broken_config_of_nunchaku_lite(section, told, tmp_path):
    text = refused(lite(tmp_path / "m", named(a=svdq()), **section))
    assert "wrong type" in text and told in text


def test_config_of_another_scheme(tmp_path):
    folder = tmp_path / "m"
    save(folder / "diffusion_pytorch_model.safetensors", named(a=svdq()))
    config = {"quantization_config": {"quant_method": "bitsandbytes"}}
    (folder / "config.json").write_text(json.dumps(config))
    text = refused(folder)
    assert "contradicts itself" in text and "set scheme to svdq" in text
