"""SVDQuant's stored tensors: exact both ways, and where the kernels look for each element."""

from __future__ import annotations

from collections.abc import Callable

import comfy_kitchen as ck
import numpy as np
import pytest
import svdq_layouts as layouts
import torch
from comfy_kitchen.backends.eager import svdquant as eager
from support import pack
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

svdq = pack("quant.svdq")
get_format = pack("quant.dtypes").get_format
pack_words = pack("quant.packing").pack
reference = pack("kernels.reference")
LowBitError = pack("quant.errors").LowBitError

SHAPES = [(128, 128), (256, 384), (640, 128), (384, 1280)]
RANKS = (16, 48, 128)
HALVES = (torch.bfloat16, torch.float16, torch.float32)
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
E2M1 = torch.cat((E2M1, -E2M1))

devices = pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu, id="cuda")]
)


def same(found: Tensor, expected: Tensor) -> bool:
    """Equal bit for bit, in shape and dtype too."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    bits = [tensor.cpu().contiguous().view(torch.uint8) for tensor in (found, expected)]
    return torch.equal(*bits)


def draw(seed: int, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    chance = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, shape, generator=chance, dtype=dtype)


def noise(seed: int, dtype: torch.dtype, *shape: int) -> Tensor:
    """Any bits, and so any of the dtype's values, zeros of both signs and infinities among them."""
    word = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[dtype.itemsize]
    limits = torch.iinfo(word)
    return draw(seed, limits.min, limits.max, *shape, dtype=word).view(dtype)


def plain(kind: str, seed: int, rows: int, columns: int) -> list[Tensor]:
    """What `pack_<kind>` of both modules takes, of a weight [rows, columns]."""
    small = [torch.uint8, torch.float8_e4m3fn]
    if hasattr(torch, "float8_e8m0fnu"):
        small.append(torch.float8_e8m0fnu)
    return {
        "vector": lambda: [noise(seed, dtype, rows) for dtype in HALVES],
        "scales_int4": lambda: [noise(seed, dtype, rows, columns // 64) for dtype in HALVES],
        "scales_nvfp4": lambda: [noise(seed, dtype, rows, columns // 16) for dtype in small],
        "scales_mxfp4": lambda: [noise(seed, dtype, rows, columns // 32) for dtype in small],
        "down": lambda: [noise(seed, d, r, columns) for d in HALVES for r in RANKS],
        "up": lambda: [noise(seed, d, rows, r) for d in HALVES for r in RANKS],
    }[kind]()


KINDS = ("vector", "scales_int4", "scales_nvfp4", "scales_mxfp4", "down", "up")


# ------------------------------------------------------------------------------ packing, exactly


@devices
@pytest.mark.parametrize("kind", KINDS)
def test_values(kind: str, device: str) -> None:
    store, restore = getattr(svdq, f"pack_{kind}"), getattr(svdq, f"unpack_{kind}")
    for seed, shape in enumerate(SHAPES):
        for values in plain(kind, seed, *shape):
            expected = getattr(layouts, f"pack_{kind}")(values)
            there = values.to(device)
            stored = store(there)
            assert stored.device.type == device
            assert same(stored, expected)
            assert same(restore(stored), values)
            assert same(there, values)


@devices
def test_codes(device: str) -> None:
    for seed, shape in enumerate(SHAPES):
        for dtype in (torch.int8, torch.int16, torch.int32, torch.int64):
            codes = draw(seed, -8, 8, *shape, dtype=dtype)
            stored = svdq.pack_codes(codes.to(device))
            assert same(stored, layouts.pack_codes(codes))
            assert stored.dtype == torch.int8 and stored.shape == (shape[0], shape[1] // 2)
            assert same(svdq.unpack_codes(stored), (codes & 15).to(torch.uint8))
            assert same(svdq.pack_codes((codes & 15).to(device)), stored)
            assert same(svdq.unpack_codes(stored.view(torch.uint8)), (codes & 15).to(torch.uint8))


@devices
@pytest.mark.parametrize("word", [torch.int32, torch.int16])
def test_awq_codes(word: torch.dtype, device: str) -> None:
    for seed, shape in enumerate([*SHAPES, (12, 64), (36, 192)]):
        codes = draw(seed, 0, 16, *shape, dtype=torch.uint8)
        stored = svdq.pack_awq(codes.to(device), word)
        assert same(stored, layouts.pack_awq(codes, word))
        assert stored.shape == (shape[0] // 4, shape[1] * 2 // word.itemsize)
        assert same(svdq.unpack_awq(stored), codes)


def test_awq_words_are_one_memory() -> None:
    codes = draw(5, 0, 16, 36, 192)
    assert same(svdq.pack_awq(codes, torch.int16), svdq.pack_awq(codes).view(torch.int16))


# ---------------------------------------------------------- between stored codes and code formats


@devices
def test_int4_words(device: str) -> None:
    fmt = get_format("int4")
    for seed, (rows, columns) in enumerate(SHAPES):
        codes = draw(seed, -8, 8, rows, columns)
        stored = layouts.pack_codes(codes).to(device)
        words = svdq.unpack_to_int4(stored)
        assert same(words, pack_words(codes, fmt))
        assert torch.equal(reference.unpack(words, fmt, codes.numel()).cpu(), codes.view(-1))
        assert same(svdq.pack_from_int4(words, rows, columns), stored)
        assert same(words, pack_words(codes, fmt)), "packing changed its input"
        assert same(stored, layouts.pack_codes(codes)), "unpacking changed its input"


@devices
def test_float4_words(device: str) -> None:
    fmt = get_format("float4_e2m1fn")
    for seed, (rows, columns) in enumerate(SHAPES):
        codes = draw(seed, 0, 16, rows, columns)
        stored = layouts.pack_codes(codes).to(device)
        words = svdq.unpack_to_float4(stored)
        values = reference.decode(words, fmt, codes.numel()).view(rows, columns)
        assert torch.equal(values.cpu(), E2M1[codes])
        assert same(words, pack_words(codes, fmt))
        assert same(svdq.pack_from_float4(words, rows, columns), stored)


@devices
@pytest.mark.parametrize("splits", [1, 2, 3, 6])
def test_uint4_words(splits: int, device: str) -> None:
    fmt = get_format("uint4")
    for seed, (rows, columns) in enumerate([(384, 128), (768, 192), (12, 64)]):
        codes = draw(seed, 0, 16, rows, columns)
        for word in (torch.int32, torch.int16):
            stored = layouts.pack_awq(layouts.interleave_rows(codes, splits), word).to(device)
            words = svdq.unpack_to_uint4(stored, splits)
            assert same(words, pack_words(codes, fmt))
            again = svdq.pack_from_uint4(words, rows, columns, dtype=word, splits=splits)
            assert same(again, stored)
            assert same(words, pack_words(codes, fmt))
            assert same(stored, layouts.pack_awq(layouts.interleave_rows(codes, splits), word))


@pytest.mark.parametrize("splits", [1, 3, 6])
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_rows_of_chunks(splits: int, dim: int) -> None:
    values = torch.randn(24, 36, generator=torch.Generator().manual_seed(splits))
    mixed = svdq.interleave_rows(values, splits, dim)
    assert same(mixed, layouts.interleave_rows(values, splits, dim))
    assert same(svdq.deinterleave_rows(mixed, splits, dim), values)
    # Stored next to the first row of the first chunk: that of the second chunk.
    if splits > 1:
        second = values.select(dim, values.shape[dim] // splits)
        assert same(mixed.select(dim, 1), second)


# ------------------------------------------------------------------------ where tensors come from


class LargestResult(TorchDispatchMode):
    """The bytes of the largest result of any operation."""

    nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            self.nbytes = max(self.nbytes, getattr(tensor, "nbytes", 0))
        return result


def test_words_are_made_without_numbers_of_their_own() -> None:
    rows, columns = 768, 1024
    stored = layouts.pack_codes(draw(0, -8, 8, rows, columns))
    awq = layouts.pack_awq(draw(0, 0, 16, rows, columns))
    words = svdq.unpack_to_int4(stored)
    calls: dict[str, Callable[[], Tensor]] = {
        "unpack_to_int4": lambda: svdq.unpack_to_int4(stored),
        "unpack_to_float4": lambda: svdq.unpack_to_float4(stored),
        "pack_from_int4": lambda: svdq.pack_from_int4(words, rows, columns),
        "pack_from_float4": lambda: svdq.pack_from_float4(words, rows, columns),
        "unpack_to_uint4": lambda: svdq.unpack_to_uint4(awq, 6),
        "pack_from_uint4": lambda: svdq.pack_from_uint4(words, rows, columns, splits=6),
        "kitchen_to_int4": lambda: svdq.kitchen_to_int4(svdq.tile_codes(stored)),
    }
    for name, call in calls.items():
        with LargestResult() as largest:
            call()
        assert largest.nbytes == rows * columns // 2, name


def strided(tensor: Tensor) -> Tensor:
    """The same values, others between them."""
    return torch.stack((tensor, tensor), dim=-1)[..., 0]


def turned(tensor: Tensor) -> Tensor:
    """The same values, in memory column after column."""
    return tensor.transpose(0, -1).contiguous().transpose(0, -1)


def shifted(tensor: Tensor) -> Tensor:
    """The same values, one element into memory that they share with others."""
    wide = torch.empty(tensor.nbytes + tensor.element_size(), dtype=torch.uint8)
    window = wide[tensor.element_size() :].view(tensor.dtype).view(tensor.shape)
    window.copy_(tensor)
    return window


@pytest.mark.parametrize("moved", [strided, turned, shifted])
def test_tensors_that_lie_anyhow(moved: Callable[[Tensor], Tensor]) -> None:
    rows, columns = 256, 384
    codes = draw(1, -8, 8, rows, columns)
    assert moved(codes).is_contiguous() == (moved is shifted)
    stored, awq = svdq.pack_codes(codes), svdq.pack_awq(codes & 15)
    words, tiles = svdq.unpack_to_int4(stored), layouts.tile_kitchen_codes(codes)
    assert same(svdq.unpack_codes(moved(stored)), svdq.unpack_codes(stored))
    assert same(svdq.unpack_to_int4(moved(stored)), words)
    assert same(svdq.unpack_to_float4(moved(stored)), svdq.unpack_to_float4(stored))
    assert same(svdq.pack_codes(moved(codes)), stored)
    assert same(svdq.pack_from_int4(moved(words), rows, columns), stored)
    assert same(svdq.unpack_to_uint4(moved(awq), 2), svdq.unpack_to_uint4(awq, 2))
    uint4 = svdq.unpack_to_uint4(awq)
    assert same(svdq.pack_from_uint4(moved(uint4), rows, columns), awq)
    natural = svdq.untile_codes(tiles)
    assert same(svdq.untile_codes(moved(tiles)), natural)
    assert same(svdq.kitchen_to_int4(moved(natural)), words)
    assert same(svdq.tile_codes(moved(natural)), tiles)
    for kind in KINDS:
        for values in plain(kind, 2, rows, columns):
            stored = getattr(layouts, f"pack_{kind}")(values)
            assert same(getattr(svdq, f"pack_{kind}")(moved(values)), stored)
            assert same(getattr(svdq, f"unpack_{kind}")(moved(stored)), values)
    groups = layouts.pack_scales_int4(noise(3, torch.float16, rows, 6))
    assert same(svdq.slice_scales(moved(groups), 128, 256), svdq.slice_scales(groups, 128, 256))


def test_results_have_memory_of_their_own() -> None:
    # The order of one group and of one chunk is the same in both forms.
    scales = noise(0, torch.bfloat16, 1, 128)
    kept = scales.clone()
    svdq.untile_rows(scales.view(1, 1, 128)).fill_(0)
    svdq.tile_rows(scales.view(128, 1)).fill_(0)
    assert same(scales, kept)
    awq = svdq.pack_awq(draw(0, 0, 16, 4, 64))
    kept = awq.clone()
    svdq.unpack_to_uint4(awq).fill_(0)
    assert same(awq, kept)


def test_rank_zero() -> None:
    assert svdq.unpack_down(torch.zeros(256, 0)).shape == (0, 256)
    assert svdq.pack_down(torch.zeros(0, 256)).shape == (256, 0)
    assert svdq.unpack_up(torch.zeros(384, 0)).shape == (384, 0)
    assert svdq.pack_up(torch.zeros(384, 0)).shape == (384, 0)
    assert svdq.tile_rows(torch.zeros(384, 0)).shape == (3, 0, 128)
    assert svdq.untile_rows(torch.zeros(3, 0, 128)).shape == (384, 0)


# ------------------------------------------------------------------------------------ row slices


@pytest.mark.parametrize("start, stop", [(0, 128), (128, 384), (384, 512), (0, 512)])
def test_output_channels_are_cut_without_unpacking(start: int, stop: int) -> None:
    rows, columns = 512, 384
    codes = draw(start, -8, 8, rows, columns)
    cut = svdq.slice_rows(layouts.pack_codes(codes), start, stop)
    assert same(cut, layouts.pack_codes(codes[start:stop]))
    (bias,) = plain("vector", start, rows, columns)[:1]
    assert same(
        svdq.slice_rows(layouts.pack_vector(bias), start, stop),
        layouts.pack_vector(bias[start:stop]),
    )
    for up in plain("up", start, rows, columns):
        cut = svdq.slice_rows(layouts.pack_up(up), start, stop)
        assert same(cut, layouts.pack_up(up[start:stop]))
    for kind in ("scales_int4", "scales_nvfp4", "scales_mxfp4"):
        store = getattr(layouts, f"pack_{kind}")
        for scales in plain(kind, start, rows, columns):
            stored = store(scales)
            expected = store(scales[start:stop])
            assert same(svdq.slice_scales(stored, start, stop), expected)
            if stop - start < rows:
                assert not same(stored[:, start:stop], expected)


# --------------------------------------------------------------------------------------- kitchen


def kitchen_case(seed: int, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    codes = draw(seed, -8, 8, rows, columns)
    return codes, layouts.pack_kitchen_codes(codes)


@devices
def test_kitchen_codes(device: str) -> None:
    fmt = get_format("int4")
    for seed, (rows, columns) in enumerate([*SHAPES, (128, 64), (256, 192)]):
        codes, natural = kitchen_case(seed, rows, columns)
        tiles = layouts.tile_kitchen_codes(codes)
        assert same(svdq.tile_codes(natural.to(device)), tiles)
        assert same(svdq.untile_codes(tiles.to(device)), natural)
        words = pack_words(codes, fmt)
        assert same(svdq.kitchen_to_int4(natural.to(device)), words)
        assert same(svdq.kitchen_to_int4(tiles.to(device)), words)
        assert same(svdq.int4_to_kitchen(words.to(device), rows, columns), natural)
        # As kitchen itself reads them.
        assert same(eager._tile_packed_weight_to_row_major(tiles), natural)
        assert torch.equal(eager._unpack_int4_row_major(natural), codes.to(torch.int8))


def test_kitchen_scales_and_up() -> None:
    for seed, (rows, columns) in enumerate(SHAPES):
        for scales in plain("scales_int4", seed, rows, columns):
            tiles = svdq.tile_rows(scales)
            assert same(tiles, layouts.tile_kitchen_rows(scales))
            assert same(svdq.untile_rows(tiles), scales)
            assert same(eager._tile_packed_scales_to_natural(tiles), scales.t().contiguous())
        for up in plain("up", seed, rows, columns):
            tiles = svdq.tile_rows(up)
            assert same(tiles, layouts.tile_kitchen_rows(up))
            assert same(svdq.untile_rows(tiles), up)
            assert same(eager._tile_packed_lora_up_to_natural(tiles), up)


@pytest.mark.parametrize("unsigned", [False, True])
def test_kitchen_multiplies_what_a_nunchaku_file_holds(unsigned: bool) -> None:
    """A stored layer goes to kitchen's product and gives x·W of the plain numbers."""
    rows, columns, rank, tokens = 256, 384, 32, 7
    chance = torch.Generator().manual_seed(int(unsigned))
    codes = draw(3, -8, 8, rows, columns)
    scales = torch.rand(rows, columns // 64, generator=chance) + 0.5
    down = torch.randn(rank, columns, generator=chance)
    up = torch.randn(rows, rank, generator=chance)
    bias = torch.randn(rows, generator=chance)
    stored = {
        "qweight": layouts.pack_codes(codes),
        "wscales": layouts.pack_scales_int4(scales),
        "down": layouts.pack_down(down),
        "up": layouts.pack_up(up),
        "bias": layouts.pack_vector(bias),
    }
    words = svdq.unpack_to_int4(stored["qweight"])
    natural = svdq.int4_to_kitchen(words, rows, columns)
    plain_scales = svdq.unpack_scales_int4(stored["wscales"])
    plain_up = svdq.unpack_up(stored["up"])
    acts = torch.randint(0 if unsigned else -7, 16 if unsigned else 8, (tokens, columns))
    act_scales = torch.rand(columns // 64, tokens, generator=chance) + 0.5
    x = torch.randn(tokens, columns, generator=chance)
    branch = x @ svdq.unpack_down(stored["down"]).t()
    arguments = {
        "act": eager._pack_int4_row_major(acts),
        "ascales": act_scales,
        "lora_act_in": branch,
        "bias": svdq.unpack_vector(stored["bias"]),
        "act_unsigned": unsigned,
    }
    with ck.use_backend("eager"):
        flat = ck.scaled_mm_svdquant_w4a4(
            wgt=natural, wscales=plain_scales.t().contiguous(), lora_up=plain_up, **arguments
        )
        tiled = ck.scaled_mm_svdquant_w4a4(
            wgt=svdq.tile_codes(natural),
            wscales=svdq.tile_rows(plain_scales),
            lora_up=svdq.tile_rows(plain_up),
            **arguments,
        )
    weight = codes * scales.repeat_interleave(64, dim=1)
    rounded = acts * act_scales.t().repeat_interleave(64, dim=1)
    expected = rounded @ weight.t() + x @ down.t() @ up.t() + bias
    assert torch.equal(flat, tiled)
    torch.testing.assert_close(flat, expected, rtol=1e-5, atol=1e-2)
    assert expected.abs().max() > 100


def test_kitchen_w4a16_is_the_same_words() -> None:
    """Kitchen's AWQ bytes are the words of "uint4"; its zero point is 8 steps above ours."""
    rows, columns, splits = 96, 128, 6
    chance = torch.Generator().manual_seed(0)
    codes = draw(0, 0, 16, rows, columns)
    scales = torch.rand(rows, columns // 64, generator=chance) + 0.5
    zeros = torch.randn(rows, columns // 64, generator=chance)
    stored = layouts.pack_awq(layouts.interleave_rows(codes, splits))
    words = svdq.unpack_to_uint4(stored, splits)
    x = torch.randn(3, columns, generator=chance)
    with ck.use_backend("eager"):
        found = ck.gemv_awq_w4a16(
            x,
            words.view(rows, columns // 2).view(torch.int8),
            scales.t().contiguous(),
            (zeros + 8 * scales).t().contiguous(),
        )
    weight = codes * scales.repeat_interleave(64, 1) + zeros.repeat_interleave(64, 1)
    torch.testing.assert_close(found, x @ weight.t(), rtol=1e-5, atol=1e-3)


# --------------------------------------------------------------- the kernels' walks over memory
# The other way round: from each lane's loads to the elements that its instruction takes them for.


def every_lane(walk: Callable[[int], list[tuple[int, int, int, int]]], rows: int, columns: int):
    """[rows, columns] of (address, part) filled by what the 32 lanes take for each element."""
    table = np.full((rows, columns, 2), -1)
    for lane in range(32):
        for n, k, address, part in walk(lane):
            assert (table[n, k] == -1).all()
            table[n, k] = address, part
    assert (table >= 0).all()
    return table


def operand(lane: int, columns: int, values: int) -> list[tuple[int, int, int, int]]:
    """The B fragment of an m16n8k`columns` instruction: (register, value, k, n) of a lane.

    `values` of a register stand side by side along k; the quad covers them, then the next register.
    """
    group, thread = lane // 4, lane % 4
    return [
        (register, i, register * 4 * values + thread * values + i, group)
        for register in range(columns // (4 * values))
        for i in range(values)
    ]


def test_walk_over_codes() -> None:
    rows, columns = 256, 256
    codes = np.arange(rows * columns).reshape(rows, columns)
    for block in range(rows // 128):
        for step in range(columns // 64):

            def walk(lane: int, block: int = block, step: int = step):
                base = block * (columns // 64) * 8 * 32 + step * 8 * 32
                for tile in range(8):  # one 16-byte load each
                    load = base + tile * 32 + lane
                    for half in range(2):  # two instructions of 8 rows
                        for register, nibble, k, n in operand(lane, 64, 8):
                            word = load * 4 + half * 2 + register
                            yield tile * 16 + half * 8 + n, k, word, nibble

            table = every_lane(walk, 128, 64)
            n = np.arange(block * 128, block * 128 + 128)[:, None]
            k = np.arange(step * 64, step * 64 + 64)[None, :]
            assert (layouts.codes_nibble(n, k, columns) == table[..., 0] * 8 + table[..., 1]).all()
    assert codes.size == np.unique(layouts.codes_nibble(*np.indices((rows, columns)), columns)).size


def test_walk_over_channel_scales() -> None:
    groups = 3
    for block in range(2):
        for group in range(groups):
            table = np.full(128, -1)
            for lane in range(32):
                for tile in range(8):
                    for first in (0, 2):
                        # A shuffle from another lane, which loaded 4 values.
                        k = tile * 4 + first
                        source, element = 4 * (k // 4) + lane % 4, k % 4 // 2
                        at = ((block * groups + group) * 32 + source) * 4 + element * 2
                        # The accumulator of an instruction: a lane holds 2 columns of its 8 rows.
                        column = tile * 16 + first // 2 * 8 + lane % 4 * 2
                        for i in range(2):
                            assert table[column + i] in (-1, at + i)
                            table[column + i] = at + i
            n = np.arange(block * 128, block * 128 + 128)
            assert (layouts.int4_scale_place(n, group, groups) == table).all()
            if group == 0:
                vector = table - block * (groups - 1) * 128
                assert (layouts.vector_place(n) == vector).all()


@pytest.mark.parametrize("per_step", [4, 2])
def test_walk_over_micro_scales(per_step: int) -> None:
    steps = 3
    for block in range(2):
        for step in range(steps):
            table = np.full((128, per_step), -1)
            for tile in range(8):
                for half in range(2):
                    thread = tile % 2 * 2 + half  # the instruction's choice of the quad's lane
                    for column in range(8):
                        lane = column * 4 + thread
                        load = (block * steps + step) * 32 + lane
                        word = load * 4 + tile // 2
                        for byte in range(per_step):
                            table[tile * 16 + half * 8 + column, byte] = word * per_step + byte
            n = np.arange(block * 128, block * 128 + 128)[:, None]
            g = np.arange(step * per_step, step * per_step + per_step)[None, :]
            found = layouts.micro_scale_byte(n, g, steps * per_step, per_step)
            assert (found == table).all()


@pytest.mark.parametrize("side", ["up", "down"])
def test_walk_over_low_rank(side: str) -> None:
    channels, ranks = 48, 32
    for channel in range(channels // 16):
        for rank in range(ranks // 16):

            def walk(lane: int, channel: int = channel, rank: int = rank):
                load = (channel * (ranks // 16) + rank) * 32 + lane
                for half in range(2):
                    for register, i, k, n in operand(lane, 16, 2):
                        yield half * 8 + n, k, load * 4 + half * 2 + register, i

            table = every_lane(walk, 16, 16)
            a, b = np.indices((16, 16))
            if side == "up":  # leaves channels, sums over ranks
                n, k = channel * 16 + a, rank * 16 + b
                found = layouts.rank_place(n, k, n, k, ranks)
            else:
                n, k = rank * 16 + a, channel * 16 + b
                found = layouts.rank_place(n, k, k, n, ranks)
            assert (found == table[..., 0] * 2 + table[..., 1]).all()


def test_walk_over_awq_codes() -> None:
    rows, columns = 16, 1280
    table = np.full((rows, columns), -1)
    for block in range(rows // 8):
        for loop in range(0, columns * 4, 256 * 32):
            for thread in range(256):
                at = loop + thread * 32
                if at >= columns * 4:
                    continue
                row = thread // 2 % 4
                column = thread // 8 * 64 + thread % 2 * 32 + loop // 4
                for idx in range(2):
                    words = (block * 8 * columns + idx * 4 * columns + at) // 8
                    # A word's halves: nibble q of the low 16 bits, nibble q of the high 16 bits.
                    buffer = [
                        (words + word) * 8 + q + 4 * high
                        for word in range(4)
                        for q in range(4)
                        for high in range(2)
                    ]
                    for i in range(4):
                        for j in range(4):
                            for half in range(2):
                                k = column + (i * 4 + j) * 2 + half
                                n = block * 8 + idx * 4 + row
                                assert table[n, k] == -1
                                table[n, k] = buffer[(i + j * 4) * 2 + half]
    assert (table >= 0).all()
    assert (layouts.awq_nibble(*np.indices((rows, columns)), columns) == table).all()


# ---------------------------------------------------------------------------------- what is refused

INT8, BF16, U8 = torch.int8, torch.bfloat16, torch.uint8


def zeros(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


BROKEN: dict[str, tuple[Callable[[], object], str, str]] = {
    "qweight rows": (lambda: svdq.unpack_codes(zeros(INT8, 64, 64)), "[64, 64]", "N a multiple"),
    "qweight columns": (lambda: svdq.unpack_to_int4(zeros(INT8, 128, 32)), "[128, 32]", "of 64"),
    "qweight dims": (lambda: svdq.unpack_to_float4(zeros(INT8, 128 * 64)), "[8192]", "[N, K/2]"),
    "qweight empty": (lambda: svdq.unpack_codes(zeros(INT8, 0, 64)), "[0, 64]", "[N, K/2]"),
    "qweight dtype": (lambda: svdq.unpack_codes(zeros(BF16, 128, 64)), "bfloat16", "torch.int8"),
    "codes rows": (lambda: svdq.pack_codes(zeros(INT8, 100, 128)), "[100, 128]", "128"),
    "codes columns": (lambda: svdq.pack_codes(zeros(INT8, 128, 64)), "[128, 64]", "128"),
    "codes dtype": (lambda: svdq.pack_codes(zeros(BF16, 128, 128)), "bfloat16", "torch.int8"),
    "words dtype": (lambda: svdq.pack_from_int4(zeros(INT8, 8192), 128, 128), "int8", "uint8"),
    "words few": (lambda: svdq.pack_from_int4(zeros(U8, 100), 128, 128), "100 bytes", "8192"),
    "words rows": (lambda: svdq.pack_from_float4(zeros(U8, 4096), 64, 128), "[64, 64]", "128"),
    "vector pack": (lambda: svdq.pack_vector(zeros(BF16, 64)), "[64]", "128"),
    "vector unpack": (lambda: svdq.unpack_vector(zeros(BF16, 1, 128)), "[1, 128]", "[N]"),
    "int4 pack": (lambda: svdq.pack_scales_int4(zeros(BF16, 64, 2)), "[64, 2]", "128"),
    "int4 unpack": (lambda: svdq.unpack_scales_int4(zeros(BF16, 128, 2)), "[128, 2]", "[G, N]"),
    "nvfp4 pack": (lambda: svdq.pack_scales_nvfp4(zeros(U8, 128, 6)), "[128, 6]", "of 4"),
    "nvfp4 unpack": (lambda: svdq.unpack_scales_nvfp4(zeros(U8, 6, 128)), "[6, 128]", "of 4"),
    "nvfp4 dtype": (lambda: svdq.unpack_scales_nvfp4(zeros(BF16, 8, 128)), "bfloat16", "float8"),
    "nvfp4 dtype to": (lambda: svdq.pack_scales_nvfp4(zeros(BF16, 128, 8)), "bfloat16", "float8"),
    "mxfp4 pack": (lambda: svdq.pack_scales_mxfp4(zeros(U8, 128, 3)), "[128, 3]", "of 2"),
    "mxfp4 unpack": (lambda: svdq.unpack_scales_mxfp4(zeros(U8, 4, 64)), "[4, 64]", "128"),
    "mxfp4 dtype": (lambda: svdq.unpack_scales_mxfp4(zeros(BF16, 4, 128)), "bfloat16", "uint8"),
    "down pack": (lambda: svdq.pack_down(zeros(BF16, 8, 128)), "[8, 128]", "of 16"),
    "down unpack": (lambda: svdq.unpack_down(zeros(BF16, 128, 24)), "[128, 24]", "of 16"),
    "down empty": (lambda: svdq.unpack_down(zeros(BF16, 0, 16)), "[0, 16]", "[K, R]"),
    "up pack": (lambda: svdq.pack_up(zeros(BF16, 120, 16)), "[120, 16]", "of 16"),
    "up unpack": (lambda: svdq.unpack_up(zeros(BF16, 128, 20)), "[128, 20]", "of 16"),
    "slice start": (
        lambda: svdq.slice_rows(zeros(INT8, 256, 64), 64, 128), "rows 64 to 128 of 256", "128",
    ),
    "slice stop": (lambda: svdq.slice_rows(zeros(INT8, 256, 64), 0, 384), "0 to 384", "128"),
    "slice nothing": (lambda: svdq.slice_rows(zeros(INT8, 256, 64), 128, 128), "128", "128"),
    "slice scales": (lambda: svdq.slice_scales(zeros(BF16, 2, 256), 0, 200), "0 to 200", "128"),
    "slice shape": (lambda: svdq.slice_scales(zeros(BF16, 2, 200), 0, 128), "[2, 200]", "[G, N]"),
    "awq columns": (lambda: svdq.unpack_awq(zeros(torch.int32, 2, 16)), "[2, 16]", "of 32"),
    "awq short": (lambda: svdq.unpack_awq(zeros(torch.int16, 2, 32)), "[2, 32]", "of 64"),
    "awq dtype": (lambda: svdq.unpack_to_uint4(zeros(INT8, 2, 128)), "int8", "int32"),
    "awq splits": (
        lambda: svdq.unpack_to_uint4(zeros(torch.int32, 2, 32), 3), "8 rows, 3 chunks", "multiple",
    ),
    "awq splits to": (
        lambda: svdq.pack_from_uint4(zeros(U8, 256), 8, 64, splits=6), "8 rows, 6", "multiple",
    ),
    "awq pack": (lambda: svdq.pack_awq(zeros(INT8, 6, 64)), "[6, 64]", "of 4"),
    "awq word": (
        lambda: svdq.pack_awq(zeros(INT8, 8, 64), torch.int64), "int64", "torch.int32",
    ),
    "awq codes": (lambda: svdq.pack_awq(zeros(BF16, 8, 64)), "bfloat16", "torch.int8"),
    "awq words": (lambda: svdq.pack_from_uint4(zeros(U8, 128), 8, 64), "128 bytes", "256"),
    "awq words rows": (lambda: svdq.pack_from_uint4(zeros(U8, 192), 6, 64), "[6, 32]", "of 4"),
    "chunks": (lambda: svdq.interleave_rows(zeros(BF16, 8, 2), 3), "8 rows, 3", "multiple"),
    "chunks back": (lambda: svdq.deinterleave_rows(zeros(BF16, 8), 0), "8 rows, 0", "multiple"),
    "kitchen rows": (lambda: svdq.tile_codes(zeros(INT8, 64, 32)), "[64, 32]", "128"),
    "kitchen dtype": (lambda: svdq.tile_codes(zeros(BF16, 128, 32)), "bfloat16", "int8"),
    "kitchen tiles": (lambda: svdq.untile_codes(zeros(INT8, 1, 1, 64, 128)), "64, 128]", "32, 128"),
    "kitchen dims": (lambda: svdq.untile_codes(zeros(INT8, 128, 32)), "[128, 32]", "N/128"),
    "kitchen tile dtype": (
        lambda: svdq.untile_codes(zeros(BF16, 1, 1, 32, 128)), "bfloat16", "int8",
    ),
    "kitchen scales": (lambda: svdq.untile_rows(zeros(BF16, 1, 2, 256)), "[1, 2, 256]", "128]"),
    "kitchen up": (lambda: svdq.tile_rows(zeros(BF16, 64, 16)), "[64, 16]", "128"),
    "kitchen plain": (lambda: svdq.kitchen_to_int4(zeros(INT8, 64)), "[64]", "[N, K/2]"),
    "kitchen plain dtype": (lambda: svdq.kitchen_to_int4(zeros(BF16, 2, 2)), "bfloat16", "int8"),
    "kitchen words": (lambda: svdq.int4_to_kitchen(zeros(U8, 3), 2, 4), "3 bytes", "4 bytes"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_wrong_shapes_and_dtypes(name: str) -> None:
    call, found, expected = BROKEN[name]
    with pytest.raises(LowBitError) as caught:
        call()
    assert found in caught.value.found, caught.value
    assert expected in caught.value.expected, caught.value
