"""Single layers quantized by bitsandbytes, torchao and quanto, of shapes that models seldom have.

Run in the ``others`` interpreter: ``python others_layers.py OUT`` writes for each package

    OUT/PACKAGE.safetensors         layers ``blocks.<n>.<name>`` as the package saves them
    OUT/PACKAGE.golden.safetensors  ``<layer>.weight``: the package's own dequantization, float32

What no model of ``others_files.py`` has: blocks of other sizes, rows that end within a block or a
byte, asymmetric codes, every integer width, MX formats, scales in rows and padded tiles.
"""

from __future__ import annotations

import os
import sys
import warnings
from functools import partial
from pathlib import Path
from types import ModuleType

os.environ["CUDA_VISIBLE_DEVICES"] = ""
warnings.filterwarnings("ignore")
# Without this part of it quanto unpacks in Python, instead of compiling C++ for a minute.
sys.modules["optimum.quanto.library.extensions.cpp"] = ModuleType("cpp")

import bitsandbytes as bnb  # noqa: E402
import torch  # noqa: E402
from optimum.quanto import QLinear, freeze, qint2, qint4  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torchao.prototype.mx_formats.mx_tensor import MXTensor  # noqa: E402
from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor  # noqa: E402
from torchao.prototype.safetensors.safetensors_support import (  # noqa: E402
    flatten_tensor_state_dict,
)
from torchao.quantization import (  # noqa: E402
    Float8Tensor,
    Int8Tensor,
    IntxUnpackedToInt8Tensor,
    MappingType,
    PerGroup,
    PerRow,
    PerTensor,
)
from torchao.quantization.granularity import PerBlock  # noqa: E402
from torchao.quantization.quantize_.workflows import (  # noqa: E402
    QuantizeTensorToFloat8Kwargs,
    QuantizeTensorToInt8Kwargs,
)

Tensors = dict[str, Tensor]


def weight(rows: int, columns: int, shift: float = 0.0, tiny: float = 0.0) -> Tensor:
    """A weight with outliers, a row of (nearly) zeros and rows of very different size."""
    made = torch.randn(rows, columns) + shift
    made *= torch.logspace(-2, 2, rows).unsqueeze(1)
    made[torch.rand(rows, columns) < 0.01] *= 8
    made[rows // 2] = tiny
    return made


def bitsandbytes_layers() -> tuple[Tensors, Tensors, dict[str, str]]:
    """4 bits in blocks of every size; rows that end within a block, a byte or neither."""
    stored: Tensors = {}
    golden: Tensors = {}
    shapes = [(7, 3, 64), (5, 40, 64), (33, 100, 128), (3, 65, 64), (2, 1000, 256), (9, 4096, 4096)]
    shapes += [(130, 200, 64)]  # more than 256 blocks, whose scales have two scales
    for kind in ("nf4", "fp4"):
        for number, (rows, columns, block) in enumerate(shapes):
            for nested in (False, True):
                layer = f"blocks.{number}.{kind}{'_nested' if nested else ''}"
                value = weight(rows, columns)
                codes, state = bnb.functional.quantize_4bit(
                    value, blocksize=block, quant_type=kind, compress_statistics=nested
                )
                stored[f"{layer}.weight"] = codes
                parts = state.as_dict(packed=True)
                stored |= {f"{layer}.weight.{name}": part for name, part in parts.items()}
                golden[f"{layer}.weight"] = bnb.functional.dequantize_4bit(codes, state)
    return stored, golden, {}


def torchao_layers() -> tuple[Tensors, Tensors, dict[str, str]]:
    """Every class of its safetensors that a CPU can make."""
    # Where all values under a scale are 0, Float8Tensor has codes that are NaN.
    small = partial(weight, tiny=1e-9)
    asymmetric = {"mapping_type": MappingType.ASYMMETRIC}
    smooth = torch.rand(48) + 0.5
    rows_int8 = QuantizeTensorToInt8Kwargs(PerRow(), MappingType.ASYMMETRIC)
    layers = {
        "int8_rows": Int8Tensor.from_hp(weight(10, 48, 0.5), PerRow(), **asymmetric),
        "int8_smoothed": Int8Tensor.from_hp(weight(10, 48), PerRow(), act_pre_scale=smooth),
        "int8_group": Int8Tensor.from_hp(weight(6, 96, 0.5), PerGroup(32), **asymmetric),
        "int8_tensor": Int8Tensor.from_hp(weight(6, 40, 0.5), PerTensor(), **asymmetric),
        "int8_dynamic": Int8Tensor.from_hp(weight(6, 40), PerRow(), act_quant_kwargs=rows_int8),
        "fp8_tensor": Float8Tensor.from_hp(weight(12, 20), granularity=PerTensor()),
        "fp8_block": Float8Tensor.from_hp(weight(256, 384), granularity=PerBlock([128, 128])),
        "fp8_rows_of_blocks": Float8Tensor.from_hp(small(5, 256), granularity=PerBlock([1, 128])),
        "fp8_dynamic": Float8Tensor.from_hp(
            small(6, 40),
            act_quant_kwargs=QuantizeTensorToFloat8Kwargs(torch.float8_e4m3fn, PerRow()),
        ),
    }
    for bits in range(1, 9):
        target = getattr(torch, f"int{bits}")
        for name, mapping in (("symmetric", {}), ("asymmetric", asymmetric)):
            layers[f"int{bits}_{name}"] = IntxUnpackedToInt8Tensor.from_hp(
                weight(5, 64, 0.3), (1, 32), target, **mapping
            )
    for rows, columns in ((100, 80), (256, 128), (2, 16), (129, 272)):
        value = weight(rows, columns)
        whole = value.abs().amax() / (448 * 6)
        for tiled in (False, True):
            for name, scale in (("", None), ("_two_levels", whole)):
                layers[f"nvfp4_{rows}_{tiled}{name}".lower()] = NVFP4Tensor.to_nvfp4(
                    value, per_tensor_scale=scale, is_swizzled_scales=tiled
                )
    for rows, columns in ((100, 96), (130, 256)):
        for name in ("float8_e4m3fn", "float8_e5m2", "float4_e2m1fn_x2"):
            for tiled in (False, True):
                layers[f"mx_{name}_{rows}_{tiled}".lower()] = MXTensor.to_mx(
                    weight(rows, columns), getattr(torch, name), 32, is_swizzled_scales=tiled
                )
    layers = {f"blocks.0.{name}.weight": value for name, value in layers.items()}
    stored, metadata = flatten_tensor_state_dict(layers)
    golden = {name: value.dequantize() for name, value in layers.items()}
    # torchao only multiplies x by this while it computes.
    golden["blocks.0.int8_smoothed.weight"] *= smooth
    return stored, golden, metadata


def quanto_layers() -> tuple[Tensors, Tensors, dict[str, str]]:
    """Packed codes in numbers of groups that do not fill their bytes, with and without a bias."""
    stored: Tensors = {}
    golden: Tensors = {}
    for kind in (qint4, qint2):
        for rows, columns in ((3, 100), (5, 192), (3, 130), (7, 256), (33, 64), (9, 1000)):
            for bias in (True, False):
                name = f"{kind.name}_{rows}_{columns}{'_bias' if bias else ''}"
                layer = nn.Linear(columns, rows, bias=bias)
                layer.weight.data = weight(rows, columns)
                made = QLinear.from_module(layer, weights=kind)
                freeze(made)
                golden[f"blocks.0.{name}.weight"] = made.weight.dequantize()
                stored |= {f"blocks.0.{name}.{k}": v for k, v in made.state_dict().items()}
    return stored, golden, {}


def main(out: str) -> None:
    """Write the layers of every package."""
    torch.set_num_threads(1)
    made = {
        "bitsandbytes": bitsandbytes_layers,
        "torchao": torchao_layers,
        "quanto": quanto_layers,
    }
    for number, (package, make) in enumerate(made.items()):
        torch.manual_seed(number)
        stored, golden, metadata = make()
        stored, golden = (
            {name: value.detach().contiguous().clone() for name, value in tensors.items()}
            for tensors in (stored, golden)
        )
        save_file(stored, Path(out) / f"{package}.safetensors", {"format": "pt"} | metadata)
        save_file(golden, Path(out) / f"{package}.golden.safetensors")


if __name__ == "__main__":
    main(*sys.argv[1:])
