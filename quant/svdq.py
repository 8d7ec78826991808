"""The tensors of SVDQuant checkpoints: unpacked to plain row-major order, and packed again.

Nunchaku stores every tensor in the order in which its kernels load it: tiles of 128 output
channels, in them the fragments of the tensor cores. Pure permutations, exact in both directions.

| tensor               | plain          | stored                           | made of           |
|----------------------|----------------|----------------------------------|-------------------|
| qweight              | codes [N, K]   | int8 [N, K/2]                    | tiles of 128 x 64 |
| wscales of int4      | [N, G], G=K/64 | 16-bit [G, N]                    | tiles of 128 x 1  |
| wscales of nvfp4     | [N, G], G=K/16 | 8-bit [G, N]                     | tiles of 128 x 4  |
| wscales of mxfp4     | [N, G], G=K/32 | 8-bit [G, N]                     | tiles of 128 x 2  |
| bias, smooth, …      | [N]            | [N]                              | runs of 128       |
| lora_down, proj_down | [R, K]         | [K, R]                           | tiles of 16 x 16  |
| lora_up, proj_up     | [N, R]         | [N, R]                           | tiles of 16 x 16  |
| qweight of AWQ       | codes [N, K]   | int32 [N/4, K/2], int16 [N/4, K] | tiles of 4 x 64   |

The stored shapes of scales are nominal: their memory is tile after tile, so that columns of them
are no output channels. `slice_rows` and `slice_scales` cut stored tensors by whole tiles.

comfy-kitchen keeps codes row-major ([N, K/2], low nibble first, two's complement), or in tiles:

| tensor                | row-major    | tiles                  |
|-----------------------|--------------|------------------------|
| weight                | [N, K/2]     | [N/128, K/64, 32, 128] |
| weight_scale, proj_up | [N, G or R]  | [N/128, G or R, 128]   |

The functions of `int4`, `float4` and `uint4` go between stored codes and the words of the code
formats "int4", "float4_e2m1fn" and "uint4", many codes at a time: none is unpacked.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels import fragments
from .errors import LowBitError

__all__ = [
    "SHIFT",
    "deinterleave_rows",
    "int4_to_kitchen",
    "interleave_rows",
    "kitchen_to_int4",
    "pack_awq",
    "pack_codes",
    "pack_down",
    "pack_from_float4",
    "pack_from_int4",
    "pack_from_uint4",
    "pack_scales_int4",
    "pack_scales_mxfp4",
    "pack_scales_nvfp4",
    "pack_up",
    "pack_vector",
    "slice_rows",
    "slice_scales",
    "tile_codes",
    "tile_rows",
    "unpack_awq",
    "unpack_codes",
    "unpack_down",
    "unpack_scales_int4",
    "unpack_scales_mxfp4",
    "unpack_scales_nvfp4",
    "unpack_to_float4",
    "unpack_to_int4",
    "unpack_to_uint4",
    "unpack_up",
    "unpack_vector",
    "untile_codes",
    "untile_rows",
]

# Added to the activations of layers that round them to unsigned codes.
SHIFT = 0.171875

TILE = 128

_CODE_TYPES = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)
_BYTES = (torch.int8, torch.uint8)


# ---------------------------------------------------------------------------------------- checks


def _check(tensor: Tensor, name: str, shape: str, *multiples: int) -> list[int]:
    """The sizes of a tensor that is to be called `shape` ("N K/2"), multiples of `multiples`.

    Only the rank R may be 0.
    """
    letters = shape.split()
    sizes = list(tensor.shape)
    if len(sizes) != len(letters) or any(
        size % multiple or (not size and letter != "R")
        for size, multiple, letter in zip(sizes, multiples, letters, strict=True)
    ):
        raise LowBitError(
            f"The {name} does not have the shape of its layout.",
            found=sizes,
            expected=f"[{', '.join(letters)}] with "
            + ", ".join(f"{a} a multiple of {b}" for a, b in zip(letters, multiples, strict=True)),
            remedy="The file is damaged or was written in another layout.",
        )
    return sizes


def _check_dtype(tensor: Tensor, name: str, *dtypes: torch.dtype) -> None:
    if tensor.dtype not in dtypes:
        raise LowBitError(
            f"The {name} has a dtype that its layout does not have.",
            found=tensor.dtype,
            expected=" or ".join(str(dtype) for dtype in dtypes),
        )


def _check_words(words: Tensor, rows: int, columns: int) -> Tensor:
    """Words of a 4-bit format as bytes [N, K/2]."""
    _check_dtype(words, "packed codes", torch.uint8)
    if words.numel() * 2 != rows * columns:
        raise LowBitError(
            "There are not as many packed codes as the weight has elements.",
            found=f"{words.numel()} bytes",
            expected=f"{rows * columns // 2} bytes for [{rows}, {columns}]",
        )
    return words.reshape(rows, columns // 2)


def _check_splits(size: int, splits: int) -> None:
    if splits < 1 or size % splits:
        raise LowBitError(
            "The rows cannot be dealt to the chunks of a modulation layer.",
            found=f"{size} rows, {splits} chunks",
            expected="a multiple of the number of chunks",
        )


# --------------------------------------------------------------------------------------- helpers


def _to_nibbles(packed: Tensor) -> Tensor:
    """Bytes [N, K/2] -> codes 0..15 as uint8 [N, K]."""
    rows, half = packed.shape
    codes = torch.empty((rows, half, 2), dtype=torch.uint8, device=packed.device)
    torch.bitwise_and(packed, 15, out=codes[..., 0])
    torch.bitwise_right_shift(packed, 4, out=codes[..., 1])
    return codes.view(rows, half * 2)


def _from_nibbles(codes: Tensor) -> Tensor:
    """Codes -8..7 or 0..15 [N, K] -> bytes [N, K/2], low nibble first."""
    codes = codes.to(torch.uint8)
    return (codes[:, 0::2] & 15) | (codes[:, 1::2] << 4)


# ------------------------------------------------------------------------------- codes of W4A4
# A 32-bit word holds 8 neighbouring columns, as a row-major weight does: only words change place.


def _rows_of(qweight: Tensor) -> Tensor:
    """qweight [N, K/2] -> row-major bytes [N, K/2]."""
    _check(qweight, "qweight", "N K/2", TILE, 64)
    _check_dtype(qweight, "qweight", *_BYTES)
    words = fragments.words_of(qweight, torch.int32)
    return fragments.unstored(words, fragments.CODES).view(torch.uint8)


def _qweight_of(packed: Tensor) -> Tensor:
    """Row-major bytes [N, K/2] -> qweight [N, K/2]."""
    _check(packed, "weight", "N K/2", TILE, 64)
    words = fragments.words_of(packed, torch.int32)
    return fragments.stored(words, fragments.CODES).view(torch.int8)


def pack_codes(codes: Tensor) -> Tensor:
    """Codes [N, K], -8..7 or 0..15 -> qweight."""
    _check(codes, "codes", "N K", TILE, TILE)
    _check_dtype(codes, "codes", *_CODE_TYPES)
    return _qweight_of(_from_nibbles(codes))


def unpack_codes(qweight: Tensor) -> Tensor:
    """qweight -> the 4 bits of every code, 0..15, uint8 [N, K]."""
    return _to_nibbles(_rows_of(qweight))


def unpack_to_int4(qweight: Tensor) -> Tensor:
    """qweight of two's complement codes -> the words of "int4", 1-D."""
    return _rows_of(qweight).bitwise_xor_(0x88).view(-1)


def pack_from_int4(words: Tensor, rows: int, columns: int) -> Tensor:
    """The words of "int4" of a weight [rows, columns] -> qweight."""
    return _qweight_of(_check_words(words, rows, columns) ^ 0x88)


def unpack_to_float4(qweight: Tensor) -> Tensor:
    """qweight of e2m1 codes -> the words of "float4_e2m1fn", 1-D."""
    return _rows_of(qweight).view(-1)


def pack_from_float4(words: Tensor, rows: int, columns: int) -> Tensor:
    """The words of "float4_e2m1fn" of a weight [rows, columns] -> qweight."""
    return _qweight_of(_check_words(words, rows, columns))


# ---------------------------------------------------------------------------- vectors and scales


def pack_vector(vector: Tensor) -> Tensor:
    """bias, smooth or per-channel scales [N] -> stored [N]."""
    _check(vector, "vector", "N", TILE)
    return fragments.stored(vector, fragments.VECTOR)


def unpack_vector(vector: Tensor) -> Tensor:
    """Stored bias, smooth or per-channel scales [N] -> [N]."""
    _check(vector, "vector", "N", TILE)
    return fragments.unstored(vector, fragments.VECTOR)


def pack_scales_int4(scales: Tensor) -> Tensor:
    """Scales [N, G] of groups of 64 -> wscales [G, N]."""
    _check(scales, "scales", "N G", TILE, 1)
    return fragments.stored(scales, fragments.SCALES_INT4)


def unpack_scales_int4(wscales: Tensor) -> Tensor:
    """wscales [G, N] of groups of 64 -> scales [N, G]."""
    _check(wscales, "wscales", "G N", 1, TILE)
    return fragments.unstored(wscales, fragments.SCALES_INT4)


def _check_micro(scales: Tensor, shape: str, *multiples: int) -> None:
    _check(scales, "scales", shape, *multiples)
    if scales.element_size() != 1:
        raise LowBitError(
            "The scales have a dtype that their layout does not have.",
            found=scales.dtype,
            expected="float8_e4m3fn, float8_e8m0fnu or uint8",
        )


def pack_scales_nvfp4(scales: Tensor) -> Tensor:
    """8-bit scales [N, G] of groups of 16 -> wscales [G, N]."""
    _check_micro(scales, "N G", TILE, 4)
    return fragments.stored(scales, fragments.SCALES_NVFP4)


def unpack_scales_nvfp4(wscales: Tensor) -> Tensor:
    """wscales [G, N] of groups of 16 -> 8-bit scales [N, G]."""
    _check_micro(wscales, "G N", 4, TILE)
    return fragments.unstored(wscales, fragments.SCALES_NVFP4)


def pack_scales_mxfp4(scales: Tensor) -> Tensor:
    """8-bit scales [N, G] of groups of 32 -> wscales [G, N]."""
    _check_micro(scales, "N G", TILE, 2)
    return fragments.stored(scales, fragments.SCALES_MXFP4)


def unpack_scales_mxfp4(wscales: Tensor) -> Tensor:
    """wscales [G, N] of groups of 32 -> 8-bit scales [N, G]."""
    _check_micro(wscales, "G N", 2, TILE)
    return fragments.unstored(wscales, fragments.SCALES_MXFP4)


# -------------------------------------------------------------------------------------- low rank


def pack_down(down: Tensor) -> Tensor:
    """Low-rank factor [R, K] -> proj_down [K, R]."""
    _check(down, "down factor", "R K", 16, 16)
    return fragments.stored(down, fragments.DOWN)


def unpack_down(stored: Tensor) -> Tensor:
    """proj_down [K, R] -> low-rank factor [R, K]."""
    _check(stored, "proj_down", "K R", 16, 16)
    return fragments.unstored(stored, fragments.DOWN)


def pack_up(up: Tensor) -> Tensor:
    """Low-rank factor [N, R] -> proj_up [N, R]."""
    _check(up, "up factor", "N R", 16, 16)
    return fragments.stored(up, fragments.UP)


def unpack_up(stored: Tensor) -> Tensor:
    """proj_up [N, R] -> low-rank factor [N, R]."""
    _check(stored, "proj_up", "N R", 16, 16)
    return fragments.unstored(stored, fragments.UP)


# ------------------------------------------------------------------------------------- row slices


def _check_tiles(rows: int, start: int, stop: int) -> None:
    if not 0 <= start < stop <= rows or start % TILE or stop % TILE:
        raise LowBitError(
            "A stored weight cannot be cut there.",
            found=f"rows {start} to {stop} of {rows}",
            expected=f"multiples of {TILE}",
        )


def slice_rows(stored: Tensor, start: int, stop: int) -> Tensor:
    """The output channels start:stop of a stored qweight, proj_up or vector."""
    _check_tiles(stored.shape[0], start, stop)
    return stored[start:stop]


def slice_scales(wscales: Tensor, start: int, stop: int) -> Tensor:
    """The output channels start:stop of stored wscales [G, N] of any 4-bit format."""
    groups, rows = _check(wscales, "wscales", "G N", 1, TILE)
    _check_tiles(rows, start, stop)
    tiles = wscales.reshape(rows // TILE, groups * TILE)
    return tiles[start // TILE : stop // TILE].reshape(groups, stop - start)


# -------------------------------------------------------------------------------- codes of W4A16
# 32 columns are 4 words: nibble i + 4·p of word j is column 8·i + 2·j + p, nibble 2·j + p of word i
# in a row-major weight. In the place of a nibble in its 8 bytes, of bits (j0, p, i1, i0), two pairs
# of bits change places; the rest are whole 16-bit halves.

_SWAPS = ((24, 0x00000000_FF00FF00), (12, 0x0000F0F0_0000F0F0))
_CHUNK = 1 << 16


def _swap_nibbles(words: Tensor) -> None:
    """Swap j0 with i1 and p with i0 in every 8 bytes, in place."""
    # On a CPU every step stays in its caches.
    for part in words.split(_CHUNK) if words.device.type == "cpu" else (words,):
        for shift, mask in _SWAPS:
            swap = part >> shift
            swap.bitwise_xor_(part).bitwise_and_(mask)
            part.bitwise_xor_(swap).bitwise_xor_(swap.bitwise_left_shift_(shift))


def unpack_to_uint4(qweight: Tensor, splits: int = 1) -> Tensor:
    """AWQ qweight -> the words of "uint4", 1-D; the rows of `splits` chunks are put in order."""
    _check_dtype(qweight, "qweight", torch.int32, torch.int16)
    per_word = 2 if qweight.dtype == torch.int32 else 1
    shape = "N/4 K/2" if per_word == 2 else "N/4 K"
    quads, columns = _check(qweight, "qweight", shape, 1, 64 // per_word)
    columns *= per_word
    _check_splits(quads * 4, splits)
    words = fragments.words_of(qweight, torch.int64).view(-1).clone()
    _swap_nibbles(words)
    # [4 rows, 64 columns, row, 32 columns, j1, i1, i0]
    packed = fragments.permute(
        words.view(torch.int16),
        (quads, columns // 64, 4, 2, 2, 2, 2),
        (0, 2, 1, 3, 5, 6, 4),
        (quads * 4, columns // 4),
    )
    return deinterleave_rows(packed.view(torch.uint8), splits).view(-1)


def pack_from_uint4(
    words: Tensor, rows: int, columns: int, *, dtype: torch.dtype = torch.int32, splits: int = 1
) -> Tensor:
    """The words of "uint4" of a weight [rows, columns] -> AWQ qweight of int32 or int16."""
    if dtype not in (torch.int32, torch.int16):
        raise LowBitError(
            "AWQ codes are not stored in that dtype.",
            found=dtype,
            expected="torch.int32 or torch.int16",
        )
    packed = _check_words(words, rows, columns)
    _check(packed, "weight", "N K/2", 4, 32)
    # [4 rows, row, 64 columns, 32 columns, i1, i0, j1]
    stored = fragments.permute(
        fragments.words_of(interleave_rows(packed, splits), torch.int16),
        (rows // 4, 4, columns // 64, 2, 2, 2, 2),
        (0, 2, 1, 3, 6, 4, 5),
        (rows // 4, columns),
    )
    _swap_nibbles(stored.view(torch.int64).view(-1))
    return stored.view(dtype)


def pack_awq(codes: Tensor, dtype: torch.dtype = torch.int32) -> Tensor:
    """Codes 0..15 [N, K] -> AWQ qweight int32 [N/4, K/2] or int16 [N/4, K]."""
    rows, columns = _check(codes, "codes", "N K", 4, 64)
    _check_dtype(codes, "codes", *_CODE_TYPES)
    return pack_from_uint4(_from_nibbles(codes).view(-1), rows, columns, dtype=dtype)


def unpack_awq(qweight: Tensor) -> Tensor:
    """AWQ qweight int32 [N/4, K/2] or int16 [N/4, K] -> codes 0..15, uint8 [N, K]."""
    return _to_nibbles(unpack_to_uint4(qweight).view(qweight.shape[0] * 4, -1))


def interleave_rows(tensor: Tensor, splits: int, dim: int = 0) -> Tensor:
    """Rows of `splits` chunks, chunk after chunk -> as stored: row c of every chunk, then c + 1."""
    size = tensor.shape[dim]
    _check_splits(size, splits)
    chunks = tensor.unflatten(dim, (splits, size // splits))
    axis = dim % tensor.dim()
    return chunks.transpose(axis, axis + 1).reshape(tensor.shape)


def deinterleave_rows(tensor: Tensor, splits: int, dim: int = 0) -> Tensor:
    """The inverse of `interleave_rows`."""
    size = tensor.shape[dim]
    _check_splits(size, splits)
    chunks = tensor.unflatten(dim, (size // splits, splits))
    axis = dim % tensor.dim()
    return chunks.transpose(axis, axis + 1).reshape(tensor.shape)


# --------------------------------------------------------------------------------------- kitchen


def tile_codes(packed: Tensor) -> Tensor:
    """Row-major bytes [N, K/2] -> kitchen's tiles [N/128, K/64, 32, 128]."""
    rows, half = _check(packed, "weight", "N K/2", TILE, 32)
    _check_dtype(packed, "weight", *_BYTES)
    tiles = fragments.permute(
        fragments.words_of(packed, torch.int64),
        (rows // 128, 128, half // 32, 4),
        (0, 2, 1, 3),
        (rows // 128, half // 32, 32, 16),
    )
    return tiles.view(packed.dtype)


def untile_codes(tiles: Tensor) -> Tensor:
    """Kitchen's tiles [N/128, K/64, 32, 128] -> row-major bytes [N, K/2]."""
    blocks, groups, quads, width = _check(tiles, "weight", "N/128 K/64 32 128", 1, 1, 32, 128)
    _check_dtype(tiles, "weight", *_BYTES)
    if (quads, width) != (32, 128):
        raise LowBitError(
            "The weight's tiles have another size than kitchen's.",
            found=list(tiles.shape),
            expected="[N/128, K/64, 32, 128]",
        )
    packed = fragments.permute(
        fragments.words_of(tiles, torch.int64),
        (blocks, groups, 128, 4),
        (0, 2, 1, 3),
        (blocks * 128, groups * 4),
    )
    return packed.view(tiles.dtype)


def tile_rows(values: Tensor) -> Tensor:
    """Scales [N, G] or `proj_up` [N, R] -> kitchen's tiles [N/128, G or R, 128]."""
    rows, items = _check(values, "tensor", "N R", TILE, 1)
    shape = (rows // 128, items, 128)
    return fragments.permute(values, (rows // 128, 128, items), (0, 2, 1), shape)


def untile_rows(tiles: Tensor) -> Tensor:
    """Kitchen's tiles [N/128, G or R, 128] -> scales [N, G] or `proj_up` [N, R]."""
    blocks, items, width = _check(tiles, "tensor", "N/128 R 128", 1, 1, 128)
    if width != 128:
        raise LowBitError(
            "The tensor's tiles have another size than kitchen's.",
            found=list(tiles.shape),
            expected="[N/128, G or R, 128]",
        )
    return fragments.permute(tiles, (blocks, items, 128), (0, 2, 1), (blocks * 128, items))


def kitchen_to_int4(weight: Tensor) -> Tensor:
    """Kitchen's codes, row-major [N, K/2] or in tiles -> the words of "int4", 1-D."""
    packed = untile_codes(weight) if weight.dim() == 4 else weight
    _check(packed, "weight", "N K/2", 1, 1)
    _check_dtype(packed, "weight", *_BYTES)
    return (packed.contiguous().view(torch.uint8) ^ 0x88).view(-1)


def int4_to_kitchen(words: Tensor, rows: int, columns: int) -> Tensor:
    """The words of "int4" of a weight [rows, columns] -> kitchen's codes int8 [N, K/2]."""
    return (_check_words(words, rows, columns) ^ 0x88).view(torch.int8)
