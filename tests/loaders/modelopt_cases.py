"""ModelOpt's layers written by hand, each with the weight that it means.

``layer(kind, ...)`` gives the stored tensors of one layer and its float64 meaning, computed from
the codes element by element by formulas of its own: no function of the pack takes part.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
E2M1 = torch.cat([E2M1, -E2M1])

KINDS = {
    # what the reader calls it: algorithms that ModelOpt declares for it
    "fp8": ("FP8",),
    "fp8-rows": ("FP8_PER_CHANNEL_PER_TOKEN",),
    "fp8-blocks": ("fp8_pb_wo",),
    "nvfp4": ("NVFP4", "NVFP4_AWQ", "NVFP4_SVD", "W4A16_NVFP4"),
    "nvfp4-32": ("W4A8_NVFP4_FP8", "W4A16_NVFP4"),
    "mxfp8": ("MXFP8",),
    "mxfp4": ("mxfp4", "W4A8_MXFP4_FP8"),
    "int8": ("W8A8_SQ_PER_CHANNEL", "W8A16"),
    "int4": ("W4A16_AWQ", "W4A8_AWQ"),
}


def random_fp8(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Bytes of float8_e4m3fn without NaN."""
    codes = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0
    return codes.view(torch.float8_e4m3fn)


def pair_columns(codes: Tensor, high_first: bool = False) -> Tensor:
    """4-bit codes [N, K] to bytes [N, K / 2]: the even column in the low half, or in the high."""
    even, odd = codes[:, 0::2], codes[:, 1::2]
    return (even * 16 + odd if high_first else odd * 16 + even).to(torch.uint8)


def tile(scales: Tensor) -> Tensor:
    """Scales [N, G] in cuBLAS's tiles, element by element as its documentation has them."""
    rows, groups = scales.shape
    tall, wide = -(-rows // 128) * 128, -(-groups // 4) * 4
    data = torch.zeros(tall * wide, dtype=torch.uint8)
    row, group = torch.meshgrid(torch.arange(rows), torch.arange(groups), indexing="ij")
    at = (row // 128 * (wide // 4) + group // 4) * 512
    at = at + row % 32 * 16 + row % 128 // 32 * 4 + group % 4
    data[at.reshape(-1)] = scales.contiguous().view(torch.uint8).reshape(-1)
    return data.view(tall, wide).view(scales.dtype)


def layer(
    kind: str,
    shape: tuple[int, int] = (64, 128),
    seed: int = 0,
    *,
    bias: bool = True,
    input_scale: bool = False,
    smooth: bool = False,
    rank: int = 0,
    high_first: bool = False,
    tiles: bool = False,
    zero_dim: bool = True,
) -> tuple[dict[str, Tensor], Tensor]:
    """``({suffix: tensor}, meaning float64 [N, K])`` of one layer."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = shape
    one = () if zero_dim else (1,)

    def positive(*size: int) -> Tensor:
        return torch.rand(size, generator=generator) * 0.9 + 0.1

    tensors: dict[str, Tensor] = {}
    if kind.startswith("fp8"):
        codes = random_fp8(shape, generator)
        tensors["weight"] = codes
        wide = codes.double()
        if kind == "fp8":
            tensors["weight_scale"] = positive(1).reshape(one)
            wide = wide * tensors["weight_scale"].double()
        elif kind == "fp8-rows":
            scale = positive(rows)
            tensors["weight_scale"] = scale if zero_dim else scale[:, None]
            wide = wide * scale.double()[:, None]
        else:
            scale = positive(-(-rows // 128), -(-columns // 128))
            tensors["weight_scale"] = scale[:, None, :, None]
            row = torch.arange(rows)[:, None] // 128
            wide = wide * scale.double()[row, torch.arange(columns)[None] // 128]
    elif kind == "mxfp8":
        codes = random_fp8(shape, generator)
        exponent = torch.randint(110, 130, (rows, columns // 32), generator=generator)
        tensors |= {"weight": codes, "weight_scale": exponent.to(torch.uint8)}
        wide = codes.double() * 2.0 ** (exponent.double() - 127).repeat_interleave(32, 1)
    elif kind in ("nvfp4", "nvfp4-32", "mxfp4"):
        codes = torch.randint(0, 16, shape, generator=generator)
        tensors["weight"] = pair_columns(codes, high_first)
        wide = E2M1[codes]
        if kind == "mxfp4":
            exponent = torch.randint(110, 130, (rows, columns // 32), generator=generator)
            tensors["weight_scale"] = exponent.to(torch.uint8)
            wide = wide * 2.0 ** (exponent.double() - 127).repeat_interleave(32, 1)
        else:
            group = 32 if kind.endswith("32") else 16
            scale = torch.randint(1, 0x7F, (rows, columns // group), generator=generator)
            scale = scale.to(torch.uint8).view(torch.float8_e4m3fn)
            second = positive(1).reshape(one)
            tensors["weight_scale"] = tile(scale) if tiles else scale
            tensors["weight_scale_2"] = second
            wide = wide * scale.double().repeat_interleave(group, 1) * second.double()
    elif kind == "int8":
        codes = torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8)
        scale = positive(rows)
        tensors |= {"weight": codes, "weight_scale": scale}
        wide = codes.double() * scale.double()[:, None]
    else:
        codes = torch.randint(-8, 8, shape, generator=generator)
        nibbles = codes & 15
        scale = positive(rows, columns // 64)
        tensors["weight"] = (nibbles[1::2] * 16 + nibbles[0::2]).to(torch.uint8)
        tensors["weight_scale"] = scale
        wide = codes.double() * scale.double().repeat_interleave(64, 1)
    if input_scale:
        tensors["input_scale"] = positive(1).reshape(one)
    smoothing = torch.ones(columns, dtype=torch.float64)
    if smooth:
        tensors["pre_quant_scale"] = positive(columns).bfloat16()
        smoothing = tensors["pre_quant_scale"].double()
    if rank:
        down = torch.randn(rank, columns, generator=generator).bfloat16()
        up = torch.randn(rows, rank, generator=generator).bfloat16()
        tensors |= {"svdquant_lora_a": down, "svdquant_lora_b": up}
        wide = wide + up.double() @ down.double()
    if bias:
        tensors["bias"] = torch.randn(rows, generator=generator).bfloat16()
    return tensors, wide * smoothing


def declaration(algorithm: str, **more: object) -> dict[str, object]:
    """A ``quantization_config``."""
    producer = {"name": "modelopt", "version": "0.47.0"}
    return {"quant_algo": algorithm, "quant_method": "modelopt", "producer": producer, **more}


def write(
    folder: Path,
    layers: dict[str, dict[str, Tensor]],
    config: dict | None = None,
    metadata: dict | None = None,
    name: str = "diffusion_pytorch_model.safetensors",
) -> Path:
    """A component folder of ``{module: {suffix: tensor}}``."""
    folder.mkdir(parents=True, exist_ok=True)
    flat = {
        f"{module}.{suffix}": tensor.contiguous()
        for module, tensors in layers.items()
        for suffix, tensor in tensors.items()
    }
    texts = {key: v if isinstance(v, str) else json.dumps(v) for key, v in (metadata or {}).items()}
    save_file(flat, folder / name, metadata=texts or None)
    if config is not None:
        text = json.dumps({"_class_name": "SomeModel", "quantization_config": config})
        (folder / "config.json").write_text(text, encoding="utf-8")
    return folder
