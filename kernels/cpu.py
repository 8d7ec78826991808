"""Quantized products on a CPU by ``torch._int_mm``, bit for bit what the reference gives.

torch multiplies int8 matrices through oneDNN, whose kernels for processors without 8-bit dot
products (AVX512-VNNI, AMX, Arm's dotprod) add pairs of products in 16 bits, which saturate. Whether
this machine sums exactly is asked of its numbers, not of its name: see :func:`why_unavailable`.

| step                      | done for                | because                                |
|---------------------------|-------------------------|----------------------------------------|
| rotation, low-rank branch | all rows at once        | a float product of fewer rows may sum  |
|                           |                         | in another order                       |
| rounding of x, scaling    | as many rows as a       | every pass over more would wait for    |
|                           | core's cache holds      | memory                                 |
| the integer product       | ``_PRODUCT_ROWS`` rows  | bounds its int32 result; fewer would   |
|                           |                         | read W too often                       |
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from . import reference
from .reference import MATMUL_ROWS
from .spec import WeightSpec

__all__ = ["int_matmul", "linear_int8", "linear_uint8", "why_unavailable"]

_PRODUCT_ROWS = 1024
_CHUNK = 1 << 17  # values of a chunk, for each thread: 512 KB of float32

# Shapes that a probe multiplies: vector lengths and tails of every kernel, a K of real layers, and
# the two of sums over rows and columns.
_PROBES = (
    (33, 64, 48),
    (40, 127, 65),
    (128, 3072, 96),
    (32, 12288, 32),
    (1, 3072, 80),
    (80, 512, 1),
)


def int_matmul(a: Tensor, b: Tensor) -> Tensor:
    """a [M, K] int8 times b [N, K] int8 transposed, int32 [M, N]."""
    return torch._int_mm(a, b.t())


def why_unavailable(device: str) -> str | None:
    """None where torch's int8 product is exact on this machine, else what is wrong with it."""
    if device != "cpu":
        return f"computes on a CPU, this device is {device}"
    if not torch.backends.mkldnn.is_available():
        return "this build of torch has no oneDNN, without which its int8 product is slow"
    reason = _why_wrong(int_matmul)
    if reason is not None:
        logging.warning("LowBit: int8 products are summed in float32 on this CPU: %s", reason)
    return reason


def _why_wrong(matmul: Callable[[Tensor, Tensor], Tensor]) -> str | None:
    """Compare an int8 product with exact sums, of extreme and of random operands."""
    for a, b in _operands():
        exact = reference.int_matmul(a, b)
        try:
            found = matmul(a, b)
        except (RuntimeError, NotImplementedError) as error:
            return f"torch._int_mm fails: {str(error).splitlines()[0]}"
        if found.dtype != torch.int32 or not torch.equal(found, exact):
            rows, columns = a.shape
            return (
                f"torch._int_mm is wrong for {rows}x{columns} times {columns}x{b.shape[0]} "
                "(a processor without 8-bit dot products)"
            )
    return None


def _operands() -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs that saturate 16 bits wherever two products are added in them, and random ones."""
    noise = torch.Generator().manual_seed(0)
    for rows, inner, columns in _PROBES:
        for first, second in ((127, 127), (-128, 127), (127, -128), (-128, -128)):
            yield (
                torch.full((rows, inner), first, dtype=torch.int8),
                torch.full((columns, inner), second, dtype=torch.int8),
            )
        yield tuple(
            torch.randint(-128, 128, (size, inner), dtype=torch.int8, generator=noise)
            for size in (rows, columns)
        )


# ------------------------------------------------------------------------------------ the linears


def linear_int8(
    x: Tensor, tensors: dict[str, Tensor], spec: WeightSpec, bias: Tensor | None = None
) -> Tensor:
    """`reference.linear_int8`, with the same result."""
    return _linear(x, tensors, spec, bias, reference.linear_int8, asymmetric=False)


def linear_uint8(
    x: Tensor, tensors: dict[str, Tensor], spec: WeightSpec, bias: Tensor | None = None
) -> Tensor:
    """`reference.linear_uint8`, with the same result."""
    return _linear(x, tensors, spec, bias, reference.linear_uint8, asymmetric=True)


def _linear(
    x: Tensor,
    tensors: dict[str, Tensor],
    spec: WeightSpec,
    bias: Tensor | None,
    definition: Callable[..., Tensor],
    asymmetric: bool,
) -> Tensor:
    columns = x.shape[-1]
    count = x.numel() // columns
    if count < MATMUL_ROWS:
        return reference.linear_dequantize(x, tensors, spec, bias)
    if torch.compiler.is_compiling():
        return definition(x, tensors, spec, bias, matmul=int_matmul)
    rows = x.reshape(-1, columns)
    if spec.rank or spec.hadamard:
        rows, bias = reference.prepared(x, tensors, spec, bias)
        smooth = ""
    else:
        bias = None if bias is None else bias.to(torch.float32)
        smooth = spec.smoothing
    codes, scale, zero_point = _weight(tensors, spec, asymmetric)
    ones = torch.ones((1, columns), dtype=torch.int8)  # sums of int8 are slow any other way
    if asymmetric:
        column_sum = int_matmul(ones, codes).to(torch.float32) * scale
    y = torch.empty((count, spec.rows), dtype=x.dtype, device=x.device)
    step = _rows_of(max(columns, spec.rows))
    x_codes = torch.empty((min(count, _PRODUCT_ROWS), columns), dtype=torch.int8)
    for block in range(0, count, _PRODUCT_ROWS):
        stop = min(block + _PRODUCT_ROWS, count)
        scales = []
        for start in range(block, stop, step):
            end = min(start + step, stop)
            chunk = rows[start:end].to(torch.float32)
            if smooth:
                chunk = reference.smoothed(chunk, tensors, spec)
            scales.append(_round(chunk, x_codes[start - block : end - block], asymmetric))
        product = int_matmul(x_codes[: stop - block], codes)
        if zero_point is not None:
            row_sum = int_matmul(x_codes[: stop - block], ones).to(torch.float32)
        for start, (x_scale, x_zero) in zip(range(block, stop, step), scales, strict=True):
            end = min(start + step, stop)
            inside = slice(start - block, end - block)
            offset = bias if bias is None or bias.dim() == 1 else bias[start:end]
            if asymmetric:
                cross = column_sum * x_zero
                if zero_point is not None:
                    cross.addcmul_(row_sum[inside] * x_scale, zero_point)
                    cross.addcmul_(x_zero, zero_point, value=columns)
                offset = cross if offset is None else cross.add_(offset)
            elif zero_point is not None:
                cross = row_sum[inside] * x_scale * zero_point
                offset = cross if offset is None else cross.add_(offset)
            part = product[inside].to(torch.float32).mul_(x_scale)
            part = part.mul_(scale) if offset is None else torch.addcmul(offset, part, scale)
            y[start:end] = part
    return y.view(*x.shape[:-1], spec.rows)


def _rows_of(columns: int) -> int:
    """Rows whose float32 values the threads' caches hold."""
    return max(_CHUNK * torch.get_num_threads() // columns, 1)


def _round(x: Tensor, codes: Tensor, asymmetric: bool) -> tuple[Tensor, Tensor | None]:
    """Write the int8 codes of rows; their scale and, of asymmetric ones, zero point [M, 1]."""
    zero_point = None
    if asymmetric:
        low, high = x.amin(dim=-1, keepdim=True), x.amax(dim=-1, keepdim=True)
        scale = (high - low) / 255
        zero_point = torch.add(low, scale, alpha=128)
        x = x - zero_point
    else:
        scale = x.abs().amax(dim=-1, keepdim=True) / 127
    # A constant row has the scale 0 and the codes 0.
    x = x / torch.where(scale == 0, 1.0, scale)
    codes.copy_(x.round_().clamp_(-128, 127))
    return scale, zero_point


def _weight(
    tensors: dict[str, Tensor], spec: WeightSpec, asymmetric: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`reference.int8_weight` or `uint8_weight`, rounding some rows at a time."""
    stored = reference.int8_codes(tensors, spec)
    if stored is not None:
        return stored
    codes = torch.empty((spec.rows, spec.columns), dtype=torch.int8)
    found = []
    for start, stop, part in reference.row_chunks(tensors, spec, _rows_of(spec.columns)):
        piece = replace(
            spec,
            shape=(stop - start, *spec.shape[1:]),
            code_shape=(stop - start, *spec.code_shape[1:]),
        )
        found.append(_round(reference.plain_weight(part, piece), codes[start:stop], asymmetric))
    scale = torch.cat([scale for scale, _ in found]).t()
    return codes, scale, torch.cat([zero for _, zero in found]).t() if asymmetric else None
