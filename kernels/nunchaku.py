"""nunchaku's compiled kernels, used where its wheel is present. Never imported unasked.

Only its operators are called, layer by layer, on plain tensors:

| argument          | shape                          | from ours                                 |
|-------------------|--------------------------------|-------------------------------------------|
| input             | half [M, K]                    | x                                         |
| smooth            | half [K], packed               | smooth                                    |
| lora_down         | half [K, R], packed            | svd_down, rank padded to 16               |
| wgt               | int8 [N, K/2], packed          | codes; two's complement for int4          |
| wscales           | half [K/64, N], packed (int4)  | scale * scale_2                           |
|                   | e4m3 [K/16, N], packed (nvfp4) | scale                                     |
| alpha, wcscales   | float, half [N] packed (nvfp4) | scale_2: its largest, and rows beside it  |
| lora_up           | half [N, R], packed            | svd_up, rank padded to 16                 |
| bias              | half [N], packed               | bias                                      |

Its quantizing operator is signed and does not shift, whatever the layer: a layer for shifted,
unsigned activations gets signed ones here, and so the bias of the float layer as it is.
"""

from __future__ import annotations

import importlib
from functools import lru_cache
from importlib.machinery import PathFinder
from importlib.util import find_spec
from types import SimpleNamespace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from . import fragments
from .reference import divided, full_scale
from .spec import WeightSpec

if TYPE_CHECKING:
    from .registry import Call

__all__ = ["ARCHITECTURES", "Architecture", "linear_faithful", "why_not_here", "why_unavailable"]

PAD_ROWS = 256  # its products take whole blocks of this many rows
_RANK_STEP = 16


class Architecture(NamedTuple):
    """What nunchaku computes on one compute capability."""

    name: str
    formats: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]


_HALF = (torch.float16, torch.bfloat16)
ARCHITECTURES: dict[tuple[int, int], Architecture] = {
    (7, 5): Architecture("Turing", ("int4",), (torch.float16,)),
    (8, 0): Architecture("Ampere", ("int4",), _HALF),
    (8, 6): Architecture("Ampere", ("int4",), _HALF),
    (8, 9): Architecture("Ada", ("int4",), _HALF),
    (12, 0): Architecture("Blackwell", ("float4_e2m1fn",), _HALF),
    (12, 1): Architecture("Blackwell", ("float4_e2m1fn",), _HALF),
}
"""Compute capabilities that nunchaku's wheels have kernels for."""


def why_unavailable(device: str) -> str | None:
    """None where the real nunchaku wheel is installed and the device is one it has kernels for.

    The package of that name on the Python package index is an unrelated statistics library; the
    real one is known by its ``_C`` extension module. Nothing is imported to tell.
    """
    if device != "cuda":
        return f"nunchaku has kernels for CUDA devices only, this is {device}"
    found = find_spec("nunchaku")
    if found is None:
        return "nunchaku is not installed"
    folders = list(found.submodule_search_locations or ())
    if PathFinder.find_spec("nunchaku._C", folders) is None:
        return (
            "the installed package called nunchaku is the statistics library of that name, "
            "not the diffusion engine"
        )
    return None


def why_not_here(call: Call) -> str | None:
    """None where nunchaku has kernels for the format, dtype and device, and can be imported."""
    capability = call.capability
    known = ARCHITECTURES.get(capability)
    if known is None:
        have = "none" if capability is None else "{}.{}".format(*capability)
        return (
            f"nunchaku refuses this device for its lack of 4-bit tensor cores: it has compute "
            f"capability {have}, and needs " + ", ".join(map("{0[0]}.{0[1]}".format, ARCHITECTURES))
        )
    if call.format not in known.formats:
        return f"on {known.name} devices nunchaku takes {known.formats[0]}, not {call.format}"
    if call.dtype not in known.dtypes:
        wanted = str(known.dtypes[0]).removeprefix("torch.")
        return f"on {known.name} devices nunchaku computes in {wanted} only"
    try:
        _operators()
    except Exception as error:  # a wheel for another torch or CUDA fails in many ways
        return f"nunchaku is installed but cannot be imported ({type(error).__name__}: {error})"
    return None


@lru_cache(maxsize=1)
def _operators() -> SimpleNamespace:
    """nunchaku's operators. Importing them imports the whole package, diffusers with it."""
    quantize = importlib.import_module("nunchaku.ops.quantize")
    gemm = importlib.import_module("nunchaku.ops.gemm")
    return SimpleNamespace(
        quantize=quantize.svdq_quantize_w4a4_act_fuse_lora_cuda, gemm=gemm.svdq_gemm_w4a4_cuda
    )


def _codes(tensors: dict[str, Tensor], spec: WeightSpec) -> Tensor:
    words = tensors["codes"].reshape(spec.rows, spec.columns // 2)
    if spec.format.is_integer:
        words = words ^ 0x88
    return fragments.stored(fragments.words_of(words, torch.int32), fragments.CODES).view(
        torch.int8
    )


def _branch(tensors: dict[str, Tensor], spec: WeightSpec, half: torch.dtype) -> tuple[Tensor, ...]:
    """lora_down [K, R] and lora_up [N, R]; without a branch, one of zeros."""
    device = tensors["codes"].device
    if spec.rank:
        down, up = tensors["svd_down"].to(half), tensors["svd_up"].to(half)
        padding = -spec.rank % _RANK_STEP
        down, up = functional.pad(down, (0, 0, 0, padding)), functional.pad(up, (0, padding))
    else:
        down = torch.zeros((_RANK_STEP, spec.columns), dtype=half, device=device)
        up = torch.zeros((spec.rows, _RANK_STEP), dtype=half, device=device)
    return fragments.stored(down, fragments.DOWN), fragments.stored(up, fragments.UP)


def _scales(tensors: dict[str, Tensor], spec: WeightSpec, half: torch.dtype) -> dict:
    """wscales, and for nvfp4 alpha and wcscales."""
    if spec.format.is_integer:
        scale = full_scale(tensors, spec).expand(*spec.code_shape[:2], 1).squeeze(2)
        return {"wscales": fragments.stored(scale.to(half), fragments.SCALES_INT4)}
    scale = tensors["scale"].expand(*spec.code_shape[:2], 1).squeeze(2)
    result = {"wscales": fragments.stored(scale.contiguous(), fragments.SCALES_NVFP4)}
    if spec.two_level:
        second = tensors["scale_2"].reshape(-1)
        alpha = second.max()
        result["alpha"] = alpha.item()
        if second.numel() > 1:
            result["wcscales"] = fragments.stored(divided(second, alpha).to(half), fragments.VECTOR)
    return result


def linear_faithful(
    x: Tensor, tensors: dict[str, Tensor], spec: WeightSpec, bias: Tensor | None = None
) -> Tensor:
    """SVDQuant's W4A4 linear in int4 or nvfp4.

    Args:
        x: ``[..., K]`` float16 or bfloat16.
        tensors: An "int4" weight in groups of 64, or a "float4_e2m1fn" one in groups of 16.
        spec: Of the weight; an activation without a sign is rounded with one.
        bias: ``[N]`` of the float layer, or None.

    Returns:
        ``[..., N]`` of ``x``'s dtype.
    """
    half = x.dtype
    rows = x.reshape(-1, spec.columns).contiguous()
    y = torch.empty((rows.shape[0], spec.rows), dtype=half, device=x.device)
    if rows.shape[0] == 0:
        return y.view(*x.shape[:-1], spec.rows)
    fp4 = not spec.format.is_integer
    if spec.smoothing:
        smooth = tensors["smooth"].to(half)
    else:
        smooth = torch.ones(spec.columns, dtype=half, device=x.device)
    down, up = _branch(tensors, spec, half)
    operators = _operators()
    with torch.cuda.device_of(x):
        codes, scales, inner = operators.quantize(
            rows,
            lora_down=down,
            smooth=fragments.stored(smooth, fragments.VECTOR),
            fp4=fp4,
            pad_size=PAD_ROWS,
        )
        operators.gemm(
            act=codes,
            wgt=_codes(tensors, spec),
            out=y,
            ascales=scales,
            lora_act_in=inner,
            lora_up=up,
            bias=None if bias is None else fragments.stored(bias.to(half), fragments.VECTOR),
            act_unsigned=False,
            fp4=fp4,
            **_scales(tensors, spec, half),
        )
    return y.view(*x.shape[:-1], spec.rows)
