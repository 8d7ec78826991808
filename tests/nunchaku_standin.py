"""A package to be imported as `nunchaku`: its operators' published interface, checked and computed.

`install` writes it to a folder: the Python wrappers with their published signatures, and in place
of the compiled extension the functions below. They assert what the extension asserts (shapes,
dtypes, padding) and what it takes for granted (contiguous memory), note every call, and compute
the result from the packed bytes by the address formulas of `svdq_layouts`.

How the quantizing function hands activations to the multiplying one is the package's own matter:
here it is row-major nibbles, and scales [G, M].
"""

from __future__ import annotations

import textwrap
from pathlib import Path

import numpy as np
import svdq_layouts
import torch
from torch import Tensor
from w4a4 import E2M1

BLOCK_ROWS, BLOCK_COLUMNS = 256, 128

calls: list[tuple[str, dict]] = []
"""(function, arguments) of every call of the extension."""

_WRAPPERS = {
    "__init__.py": "",
    "_C.py": """
        import nunchaku_standin as ops
    """,
    "ops/quantize.py": """
        import torch
        from .._C import ops

        def svdq_quantize_w4a4_act_fuse_lora_cuda(
            input, output=None, oscales=None, lora_down=None, lora_act_out=None, smooth=None,
            fuse_glu=False, fp4=False, pad_size=256,
        ):
            rows = -(-input.shape[0] // pad_size) * pad_size
            like = dict(device=input.device)
            half = input.dtype
            if output is None:
                output = torch.empty(rows, input.shape[1] // 2, dtype=torch.uint8, **like)
            if oscales is None:
                groups = input.shape[1] // (16 if fp4 else 64)
                kind = torch.float8_e4m3fn if fp4 else half
                oscales = torch.empty(groups, rows, dtype=kind, **like)
            if lora_act_out is None:
                lora_act_out = torch.empty(rows, lora_down.shape[1], dtype=torch.float32, **like)
            ops.quantize_w4a4_act_fuse_lora(
                input, output, oscales, lora_down, lora_act_out, smooth, fuse_glu, fp4
            )
            return output, oscales, lora_act_out
    """,
    "ops/gemm.py": """
        import math
        from .._C import ops

        def svdq_gemm_w4a4_cuda(
            act, wgt, out=None, qout=None, ascales=None, wscales=None, oscales=None, poolout=None,
            lora_act_in=None, lora_up=None, lora_down=None, lora_act_out=None, norm_q=None,
            norm_k=None, rotary_emb=None, bias=None, smooth_factor=None, out_vk=None,
            out_linearattn=None, act_unsigned=False, lora_scales=None, fuse_silu=False, fp4=False,
            alpha=1.0, wcscales=None, out_q=None, out_k=None, out_v=None, attn_tokens=0,
        ):
            if lora_scales is None:
                lora_scales = [1.0] * math.ceil(lora_up.shape[1] / 16)
            ops.gemm_w4a4(
                act, wgt, out, qout, ascales, wscales, oscales, poolout, lora_act_in, lora_up,
                lora_down, lora_act_out, norm_q, norm_k, rotary_emb, bias, smooth_factor, out_vk,
                out_linearattn, act_unsigned, lora_scales, fuse_silu, fp4,
                1.0 if alpha is None else alpha, wcscales, out_q, out_k, out_v, attn_tokens,
            )
    """,
}


def install(folder: Path) -> None:
    """Write the package to ``folder``, which is then put on the path."""
    for name, text in _WRAPPERS.items():
        file = folder / "nunchaku" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(textwrap.dedent(text), encoding="utf-8")


# ------------------------------------------------------------------------------------ the bytes


def _plain(stored: Tensor, pack, *shape: int) -> Tensor:
    """The row-major tensor of which `pack` makes `stored`: by where it puts each index."""
    places = pack(np.arange(int(np.prod(shape))).reshape(shape)).reshape(-1)
    plain = torch.empty_like(stored).reshape(-1)
    plain[torch.from_numpy(places)] = stored.reshape(-1)
    return plain.view(shape)


def _nibbles(wgt: Tensor) -> Tensor:
    """The 4 bits of every code [N, K]."""
    rows, columns = wgt.shape[0], wgt.shape[1] * 2
    n, k = np.arange(rows)[:, None], np.arange(columns)[None, :]
    place = svdq_layouts.codes_nibble(n, k, columns)
    packed = wgt.contiguous().view(torch.uint8).numpy().reshape(-1)
    return torch.from_numpy((packed[place // 2] >> (4 * (place % 2)) & 15).astype(np.int64))


def _scales(wscales: Tensor, fp4: bool) -> Tensor:
    groups, rows = wscales.shape
    if fp4:
        n, g = np.arange(rows)[:, None], np.arange(groups)[None, :]
        place = torch.from_numpy(svdq_layouts.micro_scale_byte(n, g, groups, 4))
        plain = wscales.view(torch.uint8).reshape(-1)[place]
        return plain.view(torch.float8_e4m3fn).double()
    return _plain(wscales, svdq_layouts.pack_scales_int4, rows, groups).double()


def _values(bits: Tensor, fp4: bool) -> Tensor:
    return E2M1.double()[bits] if fp4 else ((bits ^ 8) - 8).double()


def _check(dtype: torch.dtype, *tensors: Tensor) -> None:
    for tensor in tensors:
        assert tensor.dtype == dtype, (tensor.dtype, dtype)
        assert tensor.is_contiguous()


# ------------------------------------------------------------------------------- the extension


def quantize_w4a4_act_fuse_lora(
    input: Tensor,
    output: Tensor,
    oscales: Tensor,
    lora_down: Tensor,
    lora_act_out: Tensor,
    smooth: Tensor,
    fuse_glu: bool,
    fp4: bool,
) -> None:
    """Signed, unshifted 4-bit activations, and the low-rank product of the raw ones."""
    calls.append(("quantize", dict(locals())))
    half = input.dtype
    assert half in (torch.float16, torch.bfloat16) and input.dim() == 2
    _check(half, input, lora_down, smooth)
    rows = -(-input.shape[0] // BLOCK_ROWS) * BLOCK_ROWS
    columns = -(-input.shape[1] // BLOCK_COLUMNS) * BLOCK_COLUMNS
    assert columns == input.shape[1] and smooth.shape == (columns,)
    assert fuse_glu is False and isinstance(fp4, bool)
    group = 16 if fp4 else 64
    _check(torch.uint8, output)
    assert output.shape == (rows, columns // 2)
    _check(torch.float8_e4m3fn if fp4 else half, oscales)
    assert oscales.numel() == rows * columns // group
    rank = lora_down.shape[1]
    assert rank % 16 == 0 and 0 < rank <= 1024 and lora_down.shape[0] == columns
    _check(torch.float32, lora_act_out)
    assert lora_act_out.shape == (rows, rank)

    x = torch.zeros(rows, columns, dtype=half)
    x[: input.shape[0]] = input
    down = _plain(lora_down, svdq_layouts.pack_down, rank, columns)
    lora_act_out.copy_(x.double() @ down.double().T)
    divisor = _plain(smooth, svdq_layouts.pack_vector, columns).float()
    groups = (x.float() / divisor).to(half).float().view(rows, -1, group)
    largest = groups.abs().amax(-1, keepdim=True)
    scale = largest * (torch.tensor(1.0) / (6 if fp4 else 7))
    units = torch.where(largest == 0, 0, groups * (1 / scale))
    if fp4:
        order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])  # of two as near, the even code
        nearest = (units.double().abs()[..., None] - E2M1[order].abs()).abs().argmin(-1)
        bits = order[nearest] + 8 * (units < 0)
        scale = scale.clamp(max=448)
    else:
        bits = units.round().clamp(-8, 7).long() & 15
    oscales.copy_(scale.squeeze(-1).to(oscales.dtype).T)
    bits = bits.view(rows, columns)
    output.copy_(bits[:, 0::2] | bits[:, 1::2] << 4)


def gemm_w4a4(
    act: Tensor,
    wgt: Tensor,
    out: Tensor,
    qout: None,
    ascales: Tensor,
    wscales: Tensor,
    oscales: None,
    poolout: None,
    lora_act_in: Tensor,
    lora_up: Tensor,
    lora_down: None,
    lora_act_out: None,
    norm_q: None,
    norm_k: None,
    rotary_emb: None,
    bias: Tensor | None,
    smooth_factor: None,
    out_vk: None,
    out_linearattn: None,
    act_unsigned: bool,
    lora_scales: list[float],
    fuse_silu: bool,
    fp4: bool,
    alpha: float,
    wcscales: Tensor | None,
    out_q: None,
    out_k: None,
    out_v: None,
    attn_tokens: int,
) -> None:
    """The product in 4 bits, per-channel scale, bias and low-rank branch."""
    calls.append(("gemm", dict(locals())))
    for unused in (qout, oscales, poolout, lora_down, lora_act_out, norm_q, norm_k, rotary_emb,
                   smooth_factor, out_vk, out_linearattn, out_q, out_k, out_v):  # fmt: skip
        assert unused is None
    assert fuse_silu is False and attn_tokens == 0 and act_unsigned is False
    _check(torch.uint8, act)
    _check(torch.int8, wgt)
    rows, outputs, columns = act.shape[0], wgt.shape[0], wgt.shape[1] * 2
    assert act.shape[1] * 2 == columns
    assert rows % BLOCK_ROWS == 0 and outputs % 128 == 0 and columns % 128 == 0
    half = out.dtype
    assert half in (torch.float16, torch.bfloat16)
    _check(half, out, lora_up, *(t for t in (bias, wcscales) if t is not None))
    assert out.shape[1] == outputs and 0 <= rows - out.shape[0] < BLOCK_ROWS
    group = 16 if fp4 else 64
    _check(torch.float8_e4m3fn if fp4 else half, ascales, wscales)
    assert ascales.shape == (columns // group, rows)
    assert wscales.shape == (columns // group, outputs)
    _check(torch.float32, lora_act_in)
    rank = lora_up.shape[1]
    assert rank % 16 == 0 and lora_up.shape[0] == outputs and lora_act_in.shape == (rows, rank)
    assert lora_scales == [1.0] * (rank // 16)
    assert isinstance(alpha, float) and (fp4 or alpha == 1.0)
    for vector in (bias, wcscales):
        assert vector is None or vector.shape == (outputs,)

    low, high = (act & 15).long(), (act >> 4).long()
    codes = _values(torch.stack([low, high], -1).view(rows, columns), fp4)
    weight = (
        _values(_nibbles(wgt), fp4).view(outputs, -1, group) * _scales(wscales, fp4)[:, :, None]
    )
    x = codes.view(rows, -1, group) * ascales.double().T[:, :, None]
    y = (x.view(rows, -1) @ weight.view(outputs, -1).T * alpha).to(half).double()
    if wcscales is not None:
        y = y * _plain(wcscales, svdq_layouts.pack_vector, outputs).double()
    if bias is not None:
        y = y + _plain(bias, svdq_layouts.pack_vector, outputs).double()
    up = _plain(lora_up, svdq_layouts.pack_up, outputs, rank).double()
    y = y.to(half).double() + lora_act_in.to(half).double() @ up.T
    out.copy_(y[: out.shape[0]])
