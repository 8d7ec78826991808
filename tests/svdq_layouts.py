"""Nunchaku's and kitchen's layouts, element by element: where (row, column) stands in memory.

The independent statement that `quant.svdq` is tested against, and what synthetic checkpoints are
packed with. No reshapes and permutes: each layout is one address formula, read off the kernels'
indexing. A warp owns 128 output channels. Its 32 lanes load fragments of the tensor cores' B
operand, whose element (n, k) sits in lane 4·(n % 8) + k's place among the 4 lanes of the quad:

| operand      | a lane's fragment                   | its parts                            |
|--------------|-------------------------------------|--------------------------------------|
| 4-bit codes  | 4 32-bit words of a 16 x 64 block   | word: n's 8-row, k's 32-column half  |
| 16-bit ranks | 4 32-bit words of a 16 x 16 block   | word: n's 8-row, k's 8-column half   |
| 16-bit scale | 4 values of a column of 128         | the accumulator columns of the lane  |
| 8-bit scales | 4 words of a column of 128          | word: n's quarter, byte: group of 64 |

`pack_*` take torch tensors and give torch tensors; numpy arrays give numpy arrays.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

Index = np.ndarray
Address = Callable[[Index, Index], Index]

# ---------------------------------------------------------------------------------- addresses
# Each takes the row and the column of an element as integer arrays that broadcast.


def codes_nibble(n: Index, k: Index, columns: int) -> Index:
    """W4A4 codes: the 4-bit place of (n, k) in a weight of `columns` columns.

    The loop over k loads 64 columns at a time; a block is 8 tiles of 16 rows, each of 32 lanes
    with 16 bytes. m16n8k64 wants rows 0-7 in one pair of registers and 8-15 in the next, and in a
    pair columns 0-31, then 32-63; a register holds 8 neighbouring columns, lowest nibble first.
    """
    step = n // 128 * (columns // 64) + k // 64
    tile = n % 128 // 16
    lane = n % 8 * 4 + k % 32 // 8
    register = n % 16 // 8 * 2 + k % 64 // 32
    return (((step * 8 + tile) * 32 + lane) * 4 + register) * 8 + k % 8


def channel_place(n: Index) -> Index:
    """16-bit values of output channels: the element's place in its run of 128.

    A lane of a quad holds columns 2·lane and 2·lane + 1 of each 8-column accumulator. Quads take
    turns at 16 columns: lane L loads 4 values, a pair from columns 0-7 and one from 8-15.
    """
    lane = n % 128 // 16 * 4 + n % 8 // 2
    value = n % 16 // 8 * 2 + n % 2
    return lane * 4 + value


def vector_place(n: Index) -> Index:
    """bias, smooth, per-channel scales: one run of 128 after the other."""
    return n // 128 * 128 + channel_place(n)


def int4_scale_place(n: Index, group: Index, groups: int) -> Index:
    """16-bit scales: for every 128 channels, for every group, one run of 128."""
    return (n // 128 * groups + group) * 128 + channel_place(n)


def micro_scale_byte(n: Index, group: Index, groups: int, per_step: int) -> Index:
    """8-bit scales with `per_step` groups in 64 columns (4: nvfp4, 2: mxfp4).

    The block-scaled product takes a column's scales from lane (column, thread) of the quad, and
    the thread is chosen by the instruction: 4 instructions cover 32 channels with one word.
    """
    step = n // 128 * (groups // per_step) + group // per_step
    lane = n % 8 * 4 + n % 32 // 8
    word = n % 128 // 32
    return ((step * 32 + lane) * 4 + word) * per_step + group % per_step


def rank_place(n: Index, k: Index, channel: Index, rank: Index, ranks: int) -> Index:
    """Low-rank factors: tiles of 16 channels by 16 ranks, each the B operand (n, k) of m16n8k16.

    n is what the product leaves (rank of the down factor, channel of the up factor), k what it
    sums over. 8 elements a lane: rows 0-7 before 8-15, in each columns 0-7 before 8-15, in pairs.
    """
    tile = channel // 16 * (ranks // 16) + rank // 16
    lane = n % 8 * 4 + k % 8 // 2
    register = n % 16 // 8 * 2 + k % 16 // 8
    return ((tile * 32 + lane) * 4 + register) * 2 + k % 2


def awq_nibble(n: Index, k: Index, columns: int) -> Index:
    """W4A16 codes: the 4-bit place of (n, k).

    4 rows share a run of memory. In it thread t has 32 columns of row t // 2 % 4, from column
    t // 8 · 64 + t % 2 · 32 on, as 4 words. The conversion to halves gives nibble i of a word's low
    16 bits and nibble i of its high 16 bits as one pair; the shuffle after it puts pair i of word j
    at pair 4·i + j of the 32 columns.
    """
    thread = k // 64 * 8 + n % 4 * 2 + k % 64 // 32
    word = n // 4 * (columns // 2) + thread * 4 + k % 8 // 2
    return word * 8 + k % 32 // 8 + k % 2 * 4


def kitchen_nibble(n: Index, k: Index, columns: int) -> Index:
    """Kitchen's tiles [N/128, K/64, 32, 128]: 4 rows of 32 bytes in the last axis."""
    block = n // 128 * (columns // 64) + k // 64
    return ((block * 32 + n % 128 // 4) * 4 + n % 4) * 64 + k % 64


def kitchen_row_place(n: Index, item: Index, items: int) -> Index:
    """Kitchen's tiles [N/128, items, 128] of scales (items = groups) and of `proj_up` (ranks)."""
    return (n // 128 * items + item) * 128 + n % 128


# ------------------------------------------------------------------------------------ placing


def _array(values) -> np.ndarray:
    """A tensor's elements as numpy integers of the same width; numpy arrays as they are."""
    if isinstance(values, np.ndarray):
        return values
    values = values.detach().cpu()
    if values.is_floating_point():
        raw = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
        values = values.contiguous().view(raw[values.element_size()])
    return values.numpy()


def _like(array: np.ndarray, values):
    """`array` as what `values` is: numpy, or a torch tensor of the same dtype."""
    if isinstance(values, np.ndarray):
        return array
    tensor = torch.from_numpy(array)
    return tensor.view(values.dtype) if values.is_floating_point() else tensor.to(values.dtype)


def _scatter(values: np.ndarray, place: Address) -> np.ndarray:
    """A flat array with each value of [rows, columns] at its place, some rows at a time."""
    out = np.empty(values.size, values.dtype)
    column = np.arange(values.shape[1])[None, :]
    for first in range(0, values.shape[0], 128):
        some = values[first : first + 128]
        row = np.arange(first, first + len(some))[:, None]
        out[np.broadcast_to(place(row, column), some.shape)] = some
    return out


def _words(nibbles: np.ndarray, dtype: str, shape: tuple[int, ...], codes):
    """Nibbles in memory order as little-endian words; torch if the codes are."""
    packed = (nibbles[0::2] | nibbles[1::2] << 4).view(dtype).reshape(shape)
    return packed if isinstance(codes, np.ndarray) else torch.from_numpy(packed)


def _nibbles(codes) -> np.ndarray:
    """Codes -8..7 or 0..15 as 4 bits each."""
    return (_array(codes) & 15).astype(np.uint8)


# ---------------------------------------------------------------------------------- nunchaku


def pack_codes(codes):
    """[N, K] of -8..7 (two's complement) or 0..15 -> qweight int8 [N, K/2]."""
    rows, columns = codes.shape
    assert rows % 128 == 0 and columns % 128 == 0
    nibbles = _scatter(_nibbles(codes), lambda n, k: codes_nibble(n, k, columns))
    return _words(nibbles, "<i1", (rows, columns // 2), codes)


def pack_vector(vector):
    """[N] -> [N]."""
    (rows,) = vector.shape
    assert rows % 128 == 0
    return _like(_scatter(_array(vector)[:, None], lambda n, _: vector_place(n)), vector)


def pack_scales_int4(scales):
    """[N, G] -> wscales [G, N]."""
    rows, groups = scales.shape
    assert rows % 128 == 0
    placed = _scatter(_array(scales), lambda n, g: int4_scale_place(n, g, groups))
    return _like(placed.reshape(groups, rows), scales)


def pack_scales_nvfp4(scales):
    """[N, G] of one byte each, G groups of 16 -> wscales [G, N]."""
    return _pack_micro(scales, 4)


def pack_scales_mxfp4(scales):
    """[N, G] of one byte each, G groups of 32 -> wscales [G, N]."""
    return _pack_micro(scales, 2)


def _pack_micro(scales, per_step: int):
    rows, groups = scales.shape
    assert rows % 128 == 0 and groups % per_step == 0 and scales.itemsize == 1
    placed = _scatter(_array(scales), lambda n, g: micro_scale_byte(n, g, groups, per_step))
    return _like(placed.reshape(groups, rows), scales)


def pack_down(down):
    """[R, K] -> proj_down [K, R]."""
    ranks, columns = down.shape
    assert ranks % 16 == 0 and columns % 16 == 0
    placed = _scatter(_array(down), lambda r, k: rank_place(r, k, k, r, ranks))
    return _like(placed.reshape(columns, ranks), down)


def pack_up(up):
    """[N, R] -> proj_up [N, R]."""
    rows, ranks = up.shape
    assert ranks % 16 == 0 and rows % 16 == 0
    placed = _scatter(_array(up), lambda n, r: rank_place(n, r, n, r, ranks))
    return _like(placed.reshape(rows, ranks), up)


def pack_awq(codes, dtype: torch.dtype = torch.int32):
    """[N, K] of 0..15 -> qweight int32 [N/4, K/2] or int16 [N/4, K]."""
    rows, columns = codes.shape
    assert rows % 4 == 0 and columns % 64 == 0
    nibbles = _scatter(_nibbles(codes), lambda n, k: awq_nibble(n, k, columns))
    word, wide = {torch.int32: ("<i4", columns // 2), torch.int16: ("<i2", columns)}[dtype]
    return _words(nibbles, word, (rows // 4, wide), codes)


def interleave_rows(tensor, splits: int, dim: int = 0):
    """Chunk-major rows (row s·N/S + c) -> as adanorm layers store them (row c·S + s)."""
    stored = np.arange(tensor.shape[dim])
    source = stored % splits * (tensor.shape[dim] // splits) + stored // splits
    if isinstance(tensor, np.ndarray):
        return np.take(tensor, source, axis=dim)
    return tensor.index_select(dim, torch.from_numpy(source).to(tensor.device))


# ----------------------------------------------------------------------------------- kitchen


def pack_kitchen_codes(codes):
    """[N, K] of -8..7 or 0..15 -> kitchen's natural bytes int8 [N, K/2], low nibble first."""
    rows, columns = codes.shape
    nibbles = _scatter(_nibbles(codes), lambda n, k: n * columns + k)
    return _words(nibbles, "<i1", (rows, columns // 2), codes)


def tile_kitchen_codes(codes):
    """[N, K] of -8..7 or 0..15 -> int8 [N/128, K/64, 32, 128]."""
    rows, columns = codes.shape
    assert rows % 128 == 0 and columns % 64 == 0
    nibbles = _scatter(_nibbles(codes), lambda n, k: kitchen_nibble(n, k, columns))
    return _words(nibbles, "<i1", (rows // 128, columns // 64, 32, 128), codes)


def tile_kitchen_rows(values):
    """Scales [N, G] or `proj_up` [N, R] -> [N/128, G or R, 128]."""
    rows, items = values.shape
    assert rows % 128 == 0
    placed = _scatter(_array(values), lambda n, item: kitchen_row_place(n, item, items))
    return _like(placed.reshape(rows // 128, items, 128), values)
