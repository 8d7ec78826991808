"""What the sdnq package chooses and stores for single weights, beyond plain formats.

Run in the oracle interpreter: ``python sdnq_choices.py OUT`` writes ``OUT/choices.safetensors``
(``CASE/weight`` and the stored tensors) and ``OUT/choices.json`` (``{CASE: {"config", "chosen"}}``;
``chosen`` is the format, null where a dynamic configuration finds none) as well as
``OUT/order.json``, the formats that dynamic quantization tries.

A coded scale or zero point is written as what it decodes to, by the package's own decoder.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from sdnq.common import weights_dtype_order
from sdnq.dequantizer import dequantize_scales
from sdnq.quantizer import sdnq_quantize_layer_weight, sdnq_quantize_layer_weight_dynamic
from torch import Tensor

tensors: dict[str, Tensor] = {}
told: dict[str, dict] = {}


def weight_of(kind: str, shape: tuple[int, int], seed: int) -> Tensor:
    torch.manual_seed(seed)
    weight = torch.randn(shape)
    if kind == "heavy":
        weight = weight * torch.rand(shape).mul(4).exp()
    elif kind == "columns":
        weight[:, :: 1 + shape[1] // 5] *= 12
    elif kind == "flat":
        weight = torch.rand(shape)
    elif kind == "sparse":
        weight[torch.rand(shape) < 0.9] = 0
    return (weight * 0.03).to(torch.bfloat16)


def add(kind: str, shape: tuple[int, int], seed: int, **config: object) -> None:
    weight = weight_of(kind, shape, seed)
    name = f"{kind}-{'x'.join(map(str, shape))}-{seed}-" + "-".join(
        f"{key}={value}" for key, value in config.items()
    )
    function = sdnq_quantize_layer_weight
    settings = dict(config)
    if settings.pop("use_dynamic_quantization", False):
        function = sdnq_quantize_layer_weight_dynamic
    torch.manual_seed(seed)
    made = function(weight.clone(), layer_class_name="Linear", **settings)
    tensors[f"{name}/weight"] = weight
    told[name] = {"config": config, "chosen": None}
    if made is None:
        return
    how, stored = made
    told[name]["chosen"] = how.weights_dtype
    if how.scale_dtype is not None:
        names = ("scale", "scale_2", "scale_zero_point", "zero_point", "zero_point_scale")
        stored["scale"], stored["zero_point"] = dequantize_scales(
            how.scale_dtype,
            zero_point_dtype=how.zero_point_dtype,
            quantized_scale_shape=how.quantized_scale_shape,
            quantized_zero_point_shape=how.quantized_zero_point_shape,
            use_codebook=how.use_codebook_scale,
            zero_point_2=stored.pop("zero_point_2"),
            **{name: stored.pop(name) for name in names},
        )
    words = stored.pop("weight")
    tensors[f"{name}/codes"] = words.contiguous()
    for part, tensor in stored.items():
        if tensor is not None:
            tensors[f"{name}/{part}"] = tensor.contiguous()


def main(out: str) -> None:
    torch.set_num_threads(1)
    dynamic = {"use_dynamic_quantization": True}
    seed = 0
    for kind in ("normal", "heavy", "columns", "flat", "sparse"):
        for start, threshold in (
            ("uint4", None), ("int4", 8e-3), ("uint2", 3e-2), ("int5", 1e-4), ("int8", 2e-6),
        ):  # fmt: skip
            for more in ({}, {"use_svd": True, "svd_rank": 8}, {"use_hadamard": True}):
                seed += 1
                add(
                    kind, (64, 320), seed, weights_dtype=start, dynamic_loss_threshold=threshold,
                    **dynamic, **more,
                )  # fmt: skip
        seed += 1
        add(kind, (48, 256), seed, weights_dtype="uint3", use_codebook=True, **dynamic)
        add(kind, (48, 256), seed, weights_dtype="int15", dynamic_loss_threshold=1e-13, **dynamic)
        for dtype in ("int8", "uint8", "uint4", "int4", "float8_e4m3fn"):
            add(kind, (48, 256), seed, weights_dtype=dtype, dequantize_fp32=False)
            add(kind, (48, 256), seed, weights_dtype=dtype, use_quantized_matmul=True)
        for scale, zero in (
            ("float8_e4m3fn", None), ("uint6", "int8"), ("int8", "uint4"), ("uint8", None),
        ):  # fmt: skip
            for dtype in ("uint4", "int4"):
                add(
                    kind, (48, 256), seed, weights_dtype=dtype, scale_dtype=scale,
                    zero_point_dtype=zero,
                )  # fmt: skip
        add(
            kind, (48, 256), seed, weights_dtype="uint4", scale_dtype="uint6",
            use_codebook_scale=True,
        )  # fmt: skip
    folder = Path(out)
    save_file(tensors, folder / "choices.safetensors")
    (folder / "choices.json").write_text(json.dumps(told, indent=1))
    (folder / "order.json").write_text(json.dumps(weights_dtype_order))


if __name__ == "__main__":
    main(*sys.argv[1:])
