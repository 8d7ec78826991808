"""Every operation on low-bit weights in eager torch: the definition of correct, on CPU and GPU.

A weight is (tensors, spec) in the normal form of `kernels.spec`. All arithmetic is float32; only
the result is cast. Branches depend on shapes, dtypes and the spec alone, so that torch.compile can
trace everything. Numbers of a spec that shift bits pass through `fixed`: when layers of several
formats share code, torch.compile would otherwise make them symbols.

    W = q * scale (* scale_2) (+ zero_point)   or   W = levels[q]      in code_shape
    W = W / smooth   or   W = W * smooth                   in [O, I]
    W = W + svd_up @ svd_down                              in [O, I]
    W = W rotated back by the Hadamard blocks              in [O, I], then in shape

Quantized matrix products quantize the rows of x on the fly; they rotate and smooth x instead of W,
because that is what makes x (and the codes as stored) easy to round. The low-rank branch is a
float32 product of its own. Fewer than `MATMUL_ROWS` rows are dequantized instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from operator import index as fixed  # a plain int; a symbol is made one by a guard

import torch
from torch import Tensor
from torch.nn import functional

from .spec import SHARED, CodeFormat, WeightSpec

__all__ = [
    "MATMUL_ROWS",
    "code_values",
    "decode",
    "dequantize",
    "dequantize_rows",
    "divided",
    "float_weight",
    "full_scale",
    "hadamard",
    "hadamard_matrix",
    "int8_codes",
    "int8_weight",
    "int_matmul",
    "linear_dequantize",
    "linear_fp8",
    "linear_fp16",
    "linear_int8",
    "linear_uint8",
    "plain_weight",
    "prepared",
    "reduced_axis",
    "row_chunks",
    "smoothed",
    "uint8_weight",
    "unpack",
]

MATMUL_ROWS = 32

# Values that are dequantized at once: what stays in a CPU's cache, and on other devices what
# bounds the float32 temporaries to 64 MB.
_CHUNK_CPU = 1 << 19
_CHUNK = 1 << 24
# Rows of a chunk are a multiple of the largest pack block, so that a chunk begins on a whole word.
_ROW_STEP = 16

_EXACT_IN_FLOAT32 = 1024  # products of int8 that always sum exactly: 1024 * 2^14 = 2^24

_constants: dict[tuple, Tensor] = {}


def _constant(key: tuple, device: torch.device, build: Callable[[torch.device], Tensor]) -> Tensor:
    """A small tensor that is built once per device, outside of any inference mode."""
    full_key = (*key, device)
    found = _constants.get(full_key)
    if found is None:
        with torch.inference_mode(False), torch.no_grad():
            found = _constants[full_key] = build(device)
    return found


def _is_plain(tensor: Tensor) -> bool:
    """Whether constants may be kept beside this tensor: it is real, and nothing is traced."""
    return not torch.compiler.is_compiling() and type(tensor) in (Tensor, torch.nn.Parameter)


# ---------------------------------------------------------------------------------------- codes


def unpack(codes: Tensor, fmt: CodeFormat, numel: int) -> Tensor:
    """The codes of the first `numel` values as integers, 1-D.

    Signed integers come out signed (int8, int16). Everything else comes out as the bit pattern
    (uint8; int16 for 9-15 bits; int32 for 16-bit formats without a sign). Native floats have no
    integer codes: they come back as stored.
    """
    codes = codes.reshape(-1)
    if not fmt.packed:
        if fmt.word == torch.uint16:
            codes = codes.view(torch.int16).to(torch.int32).bitwise_and(0xFFFF)
        return codes[:numel]
    words = codes.view(-1, fixed(fmt.block_words))
    columns = []
    for run in fmt.runs:
        count = fixed(run.count)
        column = None
        for word, word_bit, width, value_bit in (map(fixed, part) for part in run.parts):
            part = words[:, word : word + count]
            if word_bit:
                part = part >> word_bit
            part = part & ((1 << width) - 1)
            if value_bit:
                part = part << value_bit
            column = part if column is None else column | part
        columns.append(column)
    values = torch.cat(columns, dim=-1).view(-1)
    if fmt.kind == "int":
        values = values.view(torch.int8) if fmt.word == torch.uint8 else values
        values = values - (1 << (fixed(fmt.bits) - 1))
    return values[:numel]


def code_values(codes: Tensor, fmt: CodeFormat) -> Tensor:
    """The float32 values of bit patterns of a "float" format, by arithmetic."""
    exponent, mantissa = fixed(fmt.exponent), fixed(fmt.mantissa)
    bias = (1 << (exponent - 1)) - 1
    codes = codes.to(torch.int32)
    magnitude = codes & ((1 << (exponent + mantissa)) - 1)
    # Read as float32, with exponent 0 as one more normal binade: 2^-bias * (1 + m / 2^M).
    bits = (magnitude << (23 - mantissa)) + ((127 - bias) << 23)
    value = bits.view(torch.float32)
    if fmt.subnormals:
        value = torch.where(magnitude < (1 << mantissa), 2 * value - 2.0 ** (1 - bias), value)
    else:
        value = torch.where(magnitude == 0, 0.0, value)
    if fmt.signed:
        value = torch.where(codes > (1 << (exponent + mantissa)) - 1, -value, value)
    return value


def decode(codes: Tensor, fmt: CodeFormat, numel: int) -> Tensor:
    """The first `numel` values before scaling, float32, 1-D, in memory of their own."""
    values = unpack(codes, fmt, numel)
    on_cpu = codes.device.type == "cpu"
    # A CPU converts float8 one by one, four times slower than it looks them up.
    byte_floats = fmt.kind == "native" and fmt.word.itemsize == 1 and on_cpu
    plain = _is_plain(codes)
    if fmt.kind != "table" and not (plain and (fmt.kind == "float" or byte_floats)):
        if fmt.kind == "float":
            return code_values(values, fmt)
        return values.to(torch.float32, copy=True)
    if plain:
        key = ("values", fmt.name, fmt.subnormals)
        table = _constant(key, codes.device, lambda device: _value_table(fmt, device))
    else:
        table = _value_table(fmt, codes.device)
    if byte_floats:
        values = values.view(torch.uint8)
    return torch.index_select(table, 0, values.to(torch.int64 if on_cpu else torch.int32))


def _value_table(fmt: CodeFormat, device: torch.device) -> Tensor:
    """The float32 value of every bit pattern of a "float", "table" or one-byte "native" format."""
    if fmt.kind == "table":
        return torch.tensor(fmt.values, dtype=torch.float32, device=device)
    codes = torch.arange(1 << fmt.bits, device=device)
    if fmt.kind == "native":
        return codes.to(torch.uint8).view(fmt.word).to(torch.float32)
    return code_values(codes, fmt)


# ------------------------------------------------------------------------------------- hadamard


def hadamard_matrix(block: int, basis: int, device: torch.device | str = "cpu") -> Tensor:
    """The symmetric orthonormal matrix [block, block], float32.

    Basis 4 is the Kronecker power of [[1,1,1,-1],[1,1,-1,1],[1,-1,1,1],[-1,1,1,1]] and serves
    blocks that are powers of 4; basis 2, and every other block, is that of [[1,1],[1,-1]].
    """
    index = torch.arange(block, device=device)
    row, column = index.view(-1, 1), index.view(1, -1)
    if basis == 4 and block & 0x55555555:
        # An entry is negative where an odd number of base-4 digits are each other's complement.
        differ = row ^ column
        odd = differ & (differ >> 1) & 0x55555555
    else:
        odd = row & column
    for shift in (16, 8, 4, 2, 1):
        odd = odd ^ (odd >> shift)
    return (1 - 2 * (odd & 1)).to(torch.float32) * block**-0.5


def hadamard(x: Tensor, block: int, basis: int) -> Tensor:
    """x [..., I] with every `block` neighbours of its last dimension rotated; dtype of x.

    The rotation is computed in float32 and is its own inverse. I must be a multiple of `block`.
    """
    block = fixed(block)
    if _is_plain(x):
        matrix = _constant(
            ("hadamard", block, basis), x.device, lambda d: hadamard_matrix(block, basis, d)
        )
    else:
        matrix = hadamard_matrix(block, basis, x.device)
    rotated = x.to(torch.float32).reshape(-1, block) @ matrix
    return rotated.view(x.shape).to(x.dtype)


# ----------------------------------------------------------------------------------- dequantize


def reduced_axis(spec: WeightSpec) -> int:
    """The axis of code_shape whose values share a scale, or are indices into the same levels."""
    if len(spec.shape) == 2 or len(spec.code_shape) == 2:
        return len(spec.code_shape) - 1
    return 1 if len(spec.code_shape) == len(spec.shape) else 2


def _look_up(levels: Tensor, index: Tensor, axis: int) -> Tensor:
    """levels[..., index, ...] along `axis`; leading singleton dimensions of levels broadcast."""
    if levels.numel() == levels.shape[-1]:  # one set of levels for the whole weight
        levels = levels.view([-1 if i == axis else 1 for i in range(index.dim())])
    elif levels.dim() > index.dim():  # [O, 1, L] beside codes [O, I]
        levels = levels.squeeze(1)
    shape = list(index.shape)
    shape[axis] = levels.shape[axis]
    return levels.to(torch.float32).expand(shape).gather(axis, index.to(torch.int64))


def full_scale(tensors: dict[str, Tensor], spec: WeightSpec) -> Tensor:
    """The scale of both levels; float32 where it is stored in a byte."""
    scale = tensors["scale"]
    if scale.element_size() == 1:  # such dtypes have no arithmetic
        scale = scale.to(torch.float32)
    return scale * tensors["scale_2"] if spec.two_level else scale


def _residual(tensors: dict[str, Tensor], spec: WeightSpec, rows: int) -> Tensor:
    """q * scale + zero_point of whole rows, float32 [rows, columns]."""
    code_shape = (rows, *spec.code_shape[1:])
    numel = rows * spec.columns
    if spec.codebook:
        index = unpack(tensors["codes"], spec.format, numel).view(code_shape)
        weight = _look_up(tensors["levels"], index, reduced_axis(spec))
    else:
        weight = decode(tensors["codes"], spec.format, numel).view(code_shape)
        if "zero_point" in tensors:
            weight = torch.addcmul(tensors["zero_point"], weight, full_scale(tensors, spec))
        elif "scale" in tensors:
            weight = weight.mul_(full_scale(tensors, spec))
    return weight.reshape(rows, spec.columns)


def _dequantize_block(
    tensors: dict[str, Tensor],
    spec: WeightSpec,
    rows: int,
    branch: bool = True,
    unrotate: bool = True,
    unsmooth: bool = True,
) -> Tensor:
    weight = _residual(tensors, spec, rows)
    if unsmooth and spec.smoothing:
        smooth = tensors["smooth"].to(torch.float32)
        weight = weight.div_(smooth) if spec.smoothing == "divide" else weight.mul_(smooth)
    if branch and spec.rank:
        up, down = tensors["svd_up"], tensors["svd_down"]
        weight = weight.addmm_(up.to(torch.float32), down.to(torch.float32))
    if unrotate and spec.hadamard:
        weight = hadamard(weight, spec.hadamard, spec.hadamard_basis)
    return weight


def _row_range(tensors: dict[str, Tensor], spec: WeightSpec, start: int, stop: int) -> dict:
    """Views of the tensors of rows [start, stop); `start` must lie on a whole pack block."""
    fmt = spec.format
    rows: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name == "codes":
            begin = fmt.storage_numel(start * spec.columns)
            rows[name] = tensor.reshape(-1)[begin : fmt.storage_numel(stop * spec.columns)]
        elif name in SHARED or tensor.shape[0] == 1:
            rows[name] = tensor
        else:
            rows[name] = tensor[start:stop]
    return rows


def row_chunks(
    tensors: dict[str, Tensor], spec: WeightSpec, rows: int
) -> Iterator[tuple[int, int, dict[str, Tensor]]]:
    """``(start, stop, views of the tensors of these rows)``, about `rows` at a time."""
    step = max(rows // _ROW_STEP, 1) * _ROW_STEP
    for start in range(0, spec.rows, step):
        stop = min(start + step, spec.rows)
        yield start, stop, _row_range(tensors, spec, start, stop)


def dequantize(
    tensors: dict[str, Tensor],
    spec: WeightSpec,
    dtype: torch.dtype = torch.float32,
    *,
    branch: bool = True,
    unrotate: bool = True,
    unsmooth: bool = True,
) -> Tensor:
    """The whole weight in `spec.shape` and `dtype`.

    Args:
        tensors, spec: the weight in normal form.
        branch: add the low-rank branch.
        unrotate: undo the Hadamard rotation.
        unsmooth: undo the smoothing; without it the weight is one for smoothed activations.

    Large weights are done some rows at a time, which bounds the float32 temporaries.
    """
    codes = tensors["codes"]
    chunk = _CHUNK_CPU if codes.device.type == "cpu" else _CHUNK
    if spec.numel <= chunk or not _is_plain(codes):
        weight = _dequantize_block(tensors, spec, spec.rows, branch, unrotate, unsmooth)
        return weight.view(spec.shape).to(dtype)
    result = torch.empty((spec.rows, spec.columns), dtype=dtype, device=codes.device)
    for start, stop, part in row_chunks(tensors, spec, chunk // spec.columns):
        result[start:stop] = _dequantize_block(part, spec, stop - start, branch, unrotate, unsmooth)
    return result.view(spec.shape)


def dequantize_rows(
    tensors: dict[str, Tensor],
    spec: WeightSpec,
    index: Tensor,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Rows of a [V, E] table: [*index.shape, E] in `dtype`, equal to `dequantize(...)[index]`.

    Only the chosen rows are decoded where rows begin on whole words; otherwise the codes (not the
    floats) of the whole table are unpacked first.
    """
    fmt = spec.format
    picked = index.reshape(-1).to(torch.int64)
    codes = tensors["codes"].reshape(-1)
    if spec.columns % fmt.block_values == 0:
        words = fmt.storage_numel(spec.columns)
        plain = {1: torch.uint8, 2: torch.int16}.get(codes.element_size(), codes.dtype)
        # Not every dtype can be indexed; its bytes can.
        table = codes.view(plain).view(spec.rows, words)
        rows = {"codes": table.index_select(0, picked).view(fmt.word)}
    else:
        table = unpack(codes, fmt, spec.numel).view(spec.rows, spec.columns)
        rows = {"codes": table.index_select(0, picked)}
        spec = _unpacked(spec)
    for name, tensor in tensors.items():
        if name != "codes":
            shared = name in SHARED or tensor.shape[0] == 1
            rows[name] = tensor if shared else _pick_rows(tensor, picked)
    weight = _dequantize_block(rows, spec, picked.numel())
    return weight.view(*index.shape, spec.columns).to(dtype)


def _pick_rows(tensor: Tensor, index: Tensor) -> Tensor:
    if tensor.element_size() == 1:  # as above
        return tensor.view(torch.uint8).index_select(0, index).view(tensor.dtype)
    return tensor.index_select(0, index)


def _unpacked(spec: WeightSpec) -> WeightSpec:
    """The spec of the same weight whose codes were unpacked to one element per value."""
    kind = "uint" if spec.format.kind == "int" else spec.format.kind
    return replace(spec, format=replace(spec.format, kind=kind, packed=False, pieces=()))


# ----------------------------------------------------------------------------- quantized matmul


def linear_dequantize(
    x: Tensor, tensors: dict[str, Tensor], spec: WeightSpec, bias: Tensor | None = None
) -> Tensor:
    """x [..., I] times the dequantized weight [O, I] in the dtype of x, plus bias [O]."""
    weight = dequantize(tensors, spec, x.dtype).view(spec.rows, spec.columns)
    return functional.linear(x, weight, None if bias is None else bias.to(x.dtype))


def int_matmul(a: Tensor, b: Tensor) -> Tensor:
    """a [M, K] int8 times b [N, K] int8 transposed, exact in int32 [M, N] on every device.

    Sums of up to 1024 products are exact in float32 in any order, whatever the hardware does.
    """
    if a.shape[1] <= _EXACT_IN_FLOAT32:
        return (a.to(torch.float32) @ b.to(torch.float32).t()).to(torch.int32)
    total = torch.zeros((a.shape[0], b.shape[0]), dtype=torch.int32, device=a.device)
    for start in range(0, a.shape[1], _EXACT_IN_FLOAT32):
        stop = start + _EXACT_IN_FLOAT32
        part = a[:, start:stop].to(torch.float32) @ b[:, start:stop].to(torch.float32).t()
        total += part.to(torch.int32)
    return total


def divided(x: Tensor, scale: Tensor) -> Tensor:
    """x / scale, 0 where a constant row gave the scale 0."""
    return torch.where(scale == 0, 0.0, x / scale)


def _int8_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [M, K] as int8 codes and scale [M, 1]: symmetric, rounded half to even."""
    scale = x.abs().amax(dim=-1, keepdim=True) / 127
    return divided(x, scale).round_().clamp_(-128, 127).to(torch.int8), scale


def _uint8_rows(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x [M, K] as int8 codes, scale and zero point [M, 1]: x = q * scale + zero_point."""
    low, high = torch.aminmax(x, dim=-1, keepdim=True)
    scale = (high - low) / 255
    zero_point = torch.add(low, scale, alpha=128)
    codes = divided(x - zero_point, scale).round_().clamp_(-128, 127).to(torch.int8)
    return codes, scale, zero_point


def _float_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x [M, K] as floats of `dtype` that fill its range, and scale [M, 1]."""
    largest = torch.finfo(dtype).max
    scale = x.abs().amax(dim=-1, keepdim=True) / largest
    return divided(x, scale).clamp_(-largest, largest).to(dtype), scale


def _row_wise(spec: WeightSpec) -> bool:
    return len(spec.code_shape) == 2 and not spec.codebook


def plain_weight(tensors: dict[str, Tensor], spec: WeightSpec) -> Tensor:
    """The weight that rotated, smoothed activations meet, without branch: float32 [O, I]."""
    weight = dequantize(tensors, spec, branch=False, unrotate=False, unsmooth=False)
    return weight.view(spec.rows, spec.columns)


def int8_codes(
    tensors: dict[str, Tensor], spec: WeightSpec
) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """Stored codes that are int8 operands as they are, scale [1, O] and zero point [1, O]."""
    fmt = spec.format
    if not (_row_wise(spec) and fmt.is_integer and fmt.bits <= 8):
        return None
    codes = unpack(tensors["codes"], fmt, spec.numel).view(spec.rows, spec.columns)
    scale = full_scale(tensors, spec).to(torch.float32).reshape(1, -1)
    if fmt.signed:
        return codes, scale, None
    zero_point = tensors["zero_point"].to(torch.float32).reshape(1, -1)
    if fmt.bits == 8:
        codes = codes ^ 128
        zero_point = torch.add(zero_point, scale, alpha=128)
    return codes.view(torch.int8), scale, zero_point


def int8_weight(
    tensors: dict[str, Tensor], spec: WeightSpec
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The weight, without branch, un-rotation and un-smoothing, as int8 codes [O, I] for a product.

    Returns codes, scale [1, O] or [1, 1], and zero point of the same shape (None if symmetric).
    Row-wise integers of at most 8 bits are used as stored; all else is rounded row by row.
    """
    stored = int8_codes(tensors, spec)
    if stored is not None:
        return stored
    codes, scale = _int8_rows(plain_weight(tensors, spec))
    return codes, scale.t(), None


def uint8_weight(
    tensors: dict[str, Tensor], spec: WeightSpec
) -> tuple[Tensor, Tensor, Tensor | None]:
    """As `int8_weight`, but what must be rounded is rounded asymmetrically."""
    stored = int8_codes(tensors, spec)
    if stored is not None:
        return stored
    codes, scale, zero_point = _uint8_rows(plain_weight(tensors, spec))
    return codes, scale.t(), zero_point.t()


def _fits(fmt: CodeFormat, dtype: torch.dtype) -> bool:
    """Whether every value of a format is exact in `dtype`, or can be multiplied with it."""
    if fmt.kind == "native":
        if fmt.word == torch.float8_e5m2:
            return True
        return fmt.word in (dtype, torch.float8_e4m3fn)
    exponent, mantissa = {torch.float8_e4m3fn: (4, 3), torch.float16: (5, 10)}[dtype]
    return (
        fmt.kind == "float"
        and fmt.signed
        and fmt.exponent <= exponent
        and fmt.mantissa <= mantissa
        and fmt.qmax <= torch.finfo(dtype).max
    )


def float_weight(
    tensors: dict[str, Tensor], spec: WeightSpec, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The weight, without branch, un-rotation and un-smoothing, as `dtype` values [O, I].

    Args:
        dtype: torch.float8_e4m3fn or torch.float16.

    Returns values and scale [1, O] or [1, 1]. Row-wise floats whose values `dtype` holds are used
    as stored (float8_e5m2 keeps its own dtype); all else is rounded row by row.
    """
    fmt = spec.format
    if _row_wise(spec) and _fits(fmt, dtype) and "scale" in tensors:
        if fmt.word == torch.float8_e5m2 and dtype == torch.float8_e4m3fn:
            dtype = torch.float8_e5m2
        values = decode(tensors["codes"], fmt, spec.numel).to(dtype)
        scale = full_scale(tensors, spec).to(torch.float32).reshape(1, -1)
        return values.view(spec.rows, spec.columns), scale
    values, scale = _float_rows(plain_weight(tensors, spec), dtype)
    return values, scale.t()


def prepared(
    x: Tensor, tensors: dict[str, Tensor], spec: WeightSpec, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """x as rotated, smoothed float32 rows [M, I], and bias plus low-rank branch: [O], [M, O]."""
    rows = x.reshape(-1, x.shape[-1]).to(torch.float32)
    if spec.hadamard:
        rows = hadamard(rows, spec.hadamard, spec.hadamard_basis)
    if bias is not None:
        bias = bias.to(torch.float32)
    if spec.rank:
        down = rows @ tensors["svd_down"].to(torch.float32).t()
        up = tensors["svd_up"].to(torch.float32).t()
        bias = down @ up if bias is None else torch.addmm(bias, down, up)
    return smoothed(rows, tensors, spec), bias


def smoothed(rows: Tensor, tensors: dict[str, Tensor], spec: WeightSpec) -> Tensor:
    """Rows [M, I] as the stored codes want to meet them; at least the precision of both."""
    if spec.smoothing == "divide":
        return rows / tensors["smooth"]
    return rows * tensors["smooth"] if spec.smoothing else rows


def _scaled(
    product: Tensor, x: Tensor, x_scale: Tensor, scale: Tensor, bias: Tensor | None
) -> Tensor:
    """product * x_scale * scale + bias as [..., O] in the dtype of x."""
    result = product.to(torch.float32).mul_(x_scale)
    result = result.mul_(scale) if bias is None else torch.addcmul(bias, result, scale)
    return result.to(x.dtype).view(*x.shape[:-1], -1)


def _few_rows(x: Tensor) -> bool:
    return x.numel() // x.shape[-1] < MATMUL_ROWS


def linear_int8(
    x: Tensor,
    tensors: dict[str, Tensor],
    spec: WeightSpec,
    bias: Tensor | None = None,
    *,
    matmul: Callable[[Tensor, Tensor], Tensor] = int_matmul,
) -> Tensor:
    """x [..., I] @ W.T + bias with x rounded to int8 row by row (symmetric); dtype of x.

    y = int_mm(xq, Wq) * xs * ws + bias (+ rowsum(xq) * xs * zp when W has a zero point)

    Args:
        matmul: exact int8 product of [M, K] and [N, K] to int32 [M, N].
    """
    if _few_rows(x):
        return linear_dequantize(x, tensors, spec, bias)
    rows, bias = prepared(x, tensors, spec, bias)
    codes, scale, zero_point = int8_weight(tensors, spec)
    x_codes, x_scale = _int8_rows(rows)
    if zero_point is not None:
        row_sum = x_codes.sum(dim=-1, keepdim=True, dtype=torch.int32)
        offset = row_sum.to(torch.float32) * x_scale * zero_point
        bias = offset if bias is None else offset + bias
    return _scaled(matmul(x_codes, codes), x, x_scale, scale, bias)


def linear_uint8(
    x: Tensor,
    tensors: dict[str, Tensor],
    spec: WeightSpec,
    bias: Tensor | None = None,
    *,
    matmul: Callable[[Tensor, Tensor], Tensor] = int_matmul,
) -> Tensor:
    """As `linear_int8`, with x rounded asymmetrically: x = xq * xs + xz, which adds cross terms.

    y = int_mm(xq, Wq) * xs * ws + colsum(Wq) * ws * xz + rowsum(xq) * xs * zp + K * xz * zp + bias
    """
    if _few_rows(x):
        return linear_dequantize(x, tensors, spec, bias)
    rows, bias = prepared(x, tensors, spec, bias)
    codes, scale, zero_point = uint8_weight(tensors, spec)
    x_codes, x_scale, x_zero = _uint8_rows(rows)
    column_sum = codes.sum(dim=-1, dtype=torch.int32).view(1, -1)
    offset = column_sum.to(torch.float32) * scale * x_zero
    if zero_point is not None:
        row_sum = x_codes.sum(dim=-1, keepdim=True, dtype=torch.int32)
        offset.addcmul_(row_sum.to(torch.float32) * x_scale, zero_point)
        offset.addcmul_(x_zero, zero_point, value=rows.shape[-1])
    if bias is not None:
        offset = offset + bias
    return _scaled(matmul(x_codes, codes), x, x_scale, scale, offset)


def _linear_float(
    x: Tensor,
    tensors: dict[str, Tensor],
    spec: WeightSpec,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    if _few_rows(x):
        return linear_dequantize(x, tensors, spec, bias)
    rows, bias = prepared(x, tensors, spec, bias)
    values, scale = float_weight(tensors, spec, dtype)
    x_values, x_scale = _float_rows(rows, dtype)
    product = x_values.to(torch.float32) @ values.to(torch.float32).t()
    return _scaled(product, x, x_scale, scale, bias)


def linear_fp8(
    x: Tensor, tensors: dict[str, Tensor], spec: WeightSpec, bias: Tensor | None = None
) -> Tensor:
    """x [..., I] @ W.T + bias with both sides in float8_e4m3fn, row-wise scales; dtype of x."""
    return _linear_float(x, tensors, spec, bias, torch.float8_e4m3fn)


def linear_fp16(
    x: Tensor, tensors: dict[str, Tensor], spec: WeightSpec, bias: Tensor | None = None
) -> Tensor:
    """x [..., I] @ W.T + bias with both sides in scaled float16, summed in float32; dtype of x."""
    return _linear_float(x, tensors, spec, bias, torch.float16)
