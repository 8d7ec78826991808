"""Single layers in SVDQuant's packings from random numbers that stay known.

Packed by ``svdq_layouts`` alone. What a layer stands for is computed in float64 from the numbers,
by the formulas of the format.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import svdq_layouts as layouts
import torch
from safetensors.torch import save_file
from torch import Tensor

SHIFT = 0.171875
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]).double()
GROUPS = {"int4": 64, "nvfp4": 16, "mxfp4": 32}
SCALES = {1: [], 3: [1], 6: [1, 4]}  # chunks of a modulation layer that the engine adds 1 to
VERSION_2 = {
    "smooth": "smooth_factor",
    "smooth_orig": "smooth_factor_orig",
    "lora_down": "proj_down",
    "lora_up": "proj_up",
}


@dataclass(frozen=True)
class Made:
    """A layer: its tensors as stored, without its name, and what they mean.

    Attributes:
        tensors: ``{suffix: tensor}``.
        weight: ``[N, K]`` float64.
        sums: ``[N]``, the rounded part times a vector of ones.
        bias: ``[N]`` float64, as stored but in order.
    """

    tensors: dict[str, Tensor]
    weight: Tensor
    sums: Tensor
    bias: Tensor


def svdq(
    rows: int = 128,
    columns: int = 128,
    rank: int = 16,
    precision: str = "int4",
    names: int = 1,
    second: str = "",
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
) -> Made:
    """A W4A4 layer; ``second`` names its further scales, "t" of the tensor and "c" of channels."""
    torch.manual_seed(seed)
    groups = columns // GROUPS[precision]
    codes = torch.randint(0, 16, (rows, columns), dtype=torch.uint8)
    smooth = (torch.rand(columns) + 0.5).to(dtype)
    bias = torch.randn(rows).to(dtype)
    down, up = torch.randn(rank, columns).to(dtype), torch.randn(rows, rank).to(dtype)
    if precision == "int4":
        scale = (torch.rand(rows, groups) / 8).to(dtype)
        stored = layouts.pack_scales_int4(scale)
        values = (codes.long() - 16 * (codes > 7)).double()
        exact = scale.double()
    elif precision == "nvfp4":
        scale = (torch.rand(rows, groups) * 4).to(torch.float8_e4m3fn)
        stored = layouts.pack_scales_nvfp4(scale.view(torch.uint8)).view(torch.float8_e4m3fn)
        values, exact = E2M1[codes.long()], scale.double()
    else:
        scale = torch.randint(120, 130, (rows, groups), dtype=torch.uint8)
        stored = layouts.pack_scales_mxfp4(scale)
        values, exact = E2M1[codes.long()], torch.exp2(scale.double() - 127)
    tensors = {
        "qweight": layouts.pack_codes(codes),
        "wscales": stored,
        "smooth": layouts.pack_vector(smooth),
        "smooth_orig": layouts.pack_vector(smooth * 2),
        "bias": layouts.pack_vector(bias),
        "lora_down": layouts.pack_down(down) if rank else down.new_empty(columns, 0),
        "lora_up": layouts.pack_up(up) if rank else up,
    }
    rounded = (values.view(rows, groups, -1) * exact[:, :, None]).view(rows, columns)
    if "t" in second:
        tensors["wtscale"] = torch.rand(1) / 16
        rounded = rounded * tensors["wtscale"].double()
    if "c" in second:
        channels = (torch.rand(rows) + 0.5).to(dtype)
        tensors["wcscales"] = layouts.pack_vector(channels)
        rounded = rounded * channels.double()[:, None]
    if names == 2:
        tensors = {VERSION_2.get(part, part): tensor for part, tensor in tensors.items()}
    residual = rounded / smooth.double()
    weight = residual + up.double() @ down.double()
    return Made(tensors, weight, residual.sum(1), bias.double())


def awq(
    rows: int = 192,
    columns: int = 128,
    splits: int = 1,
    seed: int = 0,
    dtype: torch.dtype = torch.int32,
    pad: int = 0,
) -> Made:
    """A W4A16 layer. With ``splits``, rows are interleaved, and scales are 1 higher in the bias.

    ``weight`` and ``bias`` are in the model's order, the bias without the 1.
    """
    torch.manual_seed(seed)
    groups = columns // 64
    codes = torch.randint(0, 16, (rows, columns), dtype=torch.uint8)
    scale = (torch.rand(rows, groups) / 8).bfloat16()
    zero = torch.randn(rows, groups).bfloat16()
    bias = (torch.randn(rows) / 8).bfloat16()
    ones = torch.zeros(splits, rows // splits)
    ones[SCALES[splits]] = 1
    raised = (bias.float() + ones.view(-1)).bfloat16()

    def stored(tensor: Tensor) -> Tensor:
        return layouts.interleave_rows(tensor, splits)

    def padded(tensor: Tensor) -> Tensor:
        plain = stored(tensor).t()
        return torch.cat((plain, plain.new_full((pad, rows), 7.0))).contiguous()

    tensors = {
        "qweight": layouts.pack_awq(stored(codes), dtype),
        "wscales": padded(scale),
        "wzeros": padded(zero),
        "bias": stored(raised),
    }
    grouped = codes.double().view(rows, groups, 64) * scale.double()[:, :, None]
    weight = (grouped + zero.double()[:, :, None]).view(rows, columns)
    return Made(tensors, weight, weight.sum(1), raised.double() - ones.view(-1).double())


def kitchen(rows: int = 128, columns: int = 128, rank: int = 8, tiles: bool = False, **marker):
    """A W4A4 layer as ComfyUI-quants writes it; ``marker`` is added to its marker."""
    torch.manual_seed(rows + columns + rank)
    groups = columns // 64
    codes = torch.randint(0, 16, (rows, columns), dtype=torch.uint8)
    scale = (torch.rand(rows, groups) / 8).bfloat16()
    smooth = (torch.rand(columns) + 0.5).bfloat16()
    bias = torch.randn(rows).bfloat16()
    down, up = torch.randn(columns, rank).bfloat16(), torch.randn(rows, rank).bfloat16()
    tensors = {
        "weight": (layouts.tile_kitchen_codes if tiles else layouts.pack_kitchen_codes)(codes),
        "weight_scale": layouts.tile_kitchen_rows(scale) if tiles else scale.t().contiguous(),
        "smooth_factor": smooth,
        "proj_down": down,
        "proj_up": layouts.tile_kitchen_rows(up) if tiles else up,
        "bias": bias,
        "comfy_quant": marker_of({"format": "svdquant_w4a4", **marker}),
    }
    values = (codes.long() - 16 * (codes > 7)).double().view(rows, groups, 64)
    rounded = (values * scale.double()[:, :, None]).view(rows, columns)
    residual = rounded / smooth.double()
    branch = down.double()
    if marker.get("lowrank_branch_input_basis") == "post_smoothing":
        branch = branch / smooth.double()[:, None]
    weight = residual + up.double() @ branch.t()
    return Made(tensors, weight, residual.sum(1), bias.double())


def kitchen_awq(rows: int = 192, columns: int = 128) -> Made:
    """A W4A16 layer as ComfyUI-quants writes it."""
    torch.manual_seed(rows + columns)
    groups = columns // 64
    codes = torch.randint(0, 16, (rows, columns), dtype=torch.uint8)
    scale = (torch.rand(rows, groups) / 8).bfloat16()
    zero = torch.randn(rows, groups).bfloat16()
    bias = torch.randn(rows).bfloat16()
    tensors = {
        "weight": layouts.pack_kitchen_codes(codes),
        "weight_scale": scale.t().contiguous(),
        "weight_zero": zero.t().contiguous(),
        "bias": bias,
        "comfy_quant": marker_of({"format": "awq_w4a16", "group_size": 64}),
    }
    grouped = (codes.double() - 8).view(rows, groups, 64) * scale.double()[:, :, None]
    weight = (grouped + zero.double()[:, :, None]).view(rows, columns)
    return Made(tensors, weight, weight.sum(1), bias.double())


def marker_of(entry: dict) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(entry).encode()), dtype=torch.uint8)


def named(**layers: Made) -> dict[str, Tensor]:
    """The tensors of layers in one file; ``__`` in their names stands for a dot."""
    return {
        f"{name.replace('__', '.')}.{suffix}": tensor
        for name, layer in layers.items()
        for suffix, tensor in layer.tensors.items()
    }


def write(path: Path, tensors: dict[str, Tensor], metadata: dict | None = None) -> Path:
    """A safetensors file; objects in the metadata become JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    told = {k: v if isinstance(v, str) else json.dumps(v) for k, v in (metadata or {}).items()}
    save_file({key: value.contiguous() for key, value in tensors.items()}, path, told or None)
    return path


def manifest(*targets: dict) -> dict:
    """Metadata with a runtime manifest."""
    return {
        "quantization_config": {
            "method": "svdquant",
            "runtime_manifest": {
                "schema": "nunchaku_lite.runtime_manifest",
                "version": 1,
                "nunchaku_format_version": 1,
                "structural_patches": [],
                "targets": list(targets),
            },
        }
    }


def target(name: str, op: str, **more) -> dict:
    common = {"checkpoint_prefix": name, "source_modules": [name], "nunchaku_op": op}
    return common | {"precision": "int4", "group_size": 64, "rank": 16, "has_bias": True} | more


def lite(folder: Path, tensors: dict[str, Tensor], **sections) -> Path:
    """A folder of diffusers' Nunchaku Lite."""
    write(folder / "diffusion_pytorch_model.safetensors", tensors)
    config = {"quantization_config": {"quant_method": "nunchaku_lite", **sections}}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder
