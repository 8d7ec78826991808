"""Unpacking kernels against the reference: every format, every place of scales, bit by bit."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import triton
import triton.language as tl
from support import pack
from triton_host import DEVICE, kernels, poisoned

unpack = kernels("unpack")
flat = kernels("flat")
configs = kernels("configs")
workspace = kernels("workspace")
reference = pack("kernels.reference")
dtypes = pack("quant.dtypes")
WeightSpec = pack("kernels.spec").WeightSpec

FORMATS = [
    *(fmt for era in (True, False) for fmt in dtypes.all_formats(subnormals=era)),
    *(dtypes.get_format(name) for name in dtypes.TABLES),
]
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def case(**arguments) -> dict:
    """Arguments of `weight_of`."""
    return arguments


def random_codes(fmt, numel: int, seed: int) -> torch.Tensor:
    """Words of any content, which is any code; not-a-number among them where a format has it."""
    generator = torch.Generator().manual_seed(seed)
    count = fmt.storage_numel(numel) * fmt.word.itemsize
    words = torch.randint(0, 256, (count,), generator=generator, dtype=torch.uint8)
    if fmt.kind == "native" and fmt.bits > 8:  # their not-a-numbers would be most of a sum
        return torch.randn(numel, generator=generator).to(fmt.word).to(DEVICE)
    return words.to(DEVICE).view(fmt.word)


def weight_of(
    fmt, shape, code_shape=None, scale=None, *, seed=0, scale_dtype=torch.float32, zero=False,
    levels=None, rank=0, branch=torch.bfloat16, **options,
):  # fmt: skip
    """A weight of random codes under random tables of the given shapes."""
    fmt = dtypes.get_format(fmt) if isinstance(fmt, str) else fmt
    torch.manual_seed(seed)
    spec = WeightSpec(
        fmt, tuple(shape), tuple(code_shape or shape), rank=rank, codebook=levels is not None,
        **options,
    )  # fmt: skip
    tensors = {"codes": random_codes(fmt, spec.numel, seed)}
    if levels is not None:
        tensors["levels"] = torch.randn(levels)
    elif scale is not None:
        values = torch.rand(scale) + 0.25
        if scale_dtype == torch.float8_e8m0fnu:
            values = torch.exp2(torch.randint(-8, 8, scale).float())
        tensors["scale"] = values.to(scale_dtype)
        if zero:
            tensors["zero_point"] = (torch.randn(scale) * 4).to(scale_dtype)
        if spec.two_level:
            tensors["scale_2"] = torch.rand(1) + 0.5
    if spec.smoothing:
        tensors["smooth"] = torch.rand(spec.columns) + 0.5
    if rank:
        tensors["svd_up"] = torch.randn(spec.rows, rank).to(branch)
        tensors["svd_down"] = torch.randn(rank, spec.columns).to(branch)
    return {name: tensor.to(DEVICE) for name, tensor in tensors.items()}, spec


def written(tensors, spec, dtype, start=0, stop=None, **options) -> torch.Tensor:
    """What the kernel writes of some rows, nothing beyond them and all of them."""
    stop = spec.rows if stop is None else stop
    numel = (stop - start) * spec.columns
    whole = poisoned(numel + 64, dtype=dtype)
    unpack.unpack_rows(tensors, spec, whole[:numel], start, stop, **options)
    assert torch.equal(whole[numel:].view(torch.uint8), poisoned(64, dtype=dtype).view(torch.uint8))
    return whole[:numel].view(stop - start, spec.columns)


def bits_equal(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal, not-a-number in the same places."""
    same = torch.equal(found.isnan(), expected.isnan())
    return same and torch.equal(found.nan_to_num(), expected.nan_to_num())


# -------------------------------------------------------------------------------------- codes


@triton.jit
def decode_kernel(codes, out, HEAD: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, unpack.decode(tl.load(codes + at), HEAD))


@pytest.mark.parametrize("bits", range(1, 17))
def test_every_code_of_every_format_decodes_as_the_reference_does(bits: int) -> None:
    count = 0
    for fmt in FORMATS:
        if fmt.bits != bits or fmt.kind == "table":
            continue
        codes = torch.arange(1 << bits, dtype=torch.int32, device=DEVICE)
        stored = codes
        if fmt.kind == "native":
            word = torch.int16 if bits == 16 else torch.uint8
            expected = codes.to(word).view(fmt.word).to(torch.float32)
        elif fmt.kind == "float":
            expected = reference.code_values(codes, fmt)
        elif fmt.kind == "uint":
            expected = codes.to(torch.float32)
        elif fmt.packed:
            expected = codes.to(torch.float32) - (1 << (bits - 1))
        else:  # two's complement
            expected = codes.to({8: torch.int8, 16: torch.int16}[bits]).to(torch.float32)
        found = torch.full_like(expected, float("nan"))
        head = unpack.layout_of(fmt, True).number & ((1 << 40) - 1)
        block = min(1 << bits, 4096)
        decode_kernel[(codes.numel() // block,)](stored, found, HEAD=head, BLOCK=block)
        assert bits_equal(found, expected), fmt
        assert torch.equal(torch.signbit(found.nan_to_num()), torch.signbit(expected.nan_to_num()))
        count += 1
    assert count >= 3


@pytest.mark.parametrize("columns", [96, 24, 33])
@pytest.mark.parametrize("bits", range(1, 17))
def test_every_bit_layout(bits: int, columns: int) -> None:
    """In 32-bit words, in stored words, and as one long row."""
    fmt = dtypes.get_format(f"uint{bits}")
    tensors, spec = weight_of(fmt, (5, columns), scale=(5, 1), seed=bits)
    expected = reference.dequantize(tensors, spec)
    assert torch.equal(written(tensors, spec, torch.float32), expected)
    codes = unpack.codes_of(tensors, spec, 0, 5)
    assert codes.flat == bool(columns % fmt.block_values)
    wide = unpack.layout_of(fmt, True).values
    assert codes.layout.word == (
        torch.int32 if columns % wide == 0 else unpack.layout_of(fmt, False).word
    )


def test_codes_that_begin_inside_of_a_word() -> None:
    tensors, spec = weight_of("uint4", (4, 64), (4, 2, 32), (4, 2, 1))
    expected = reference.dequantize(tensors, spec)
    for offset in (1, 2):
        moved = torch.zeros(tensors["codes"].numel() + 8, dtype=torch.uint8, device=DEVICE)
        moved = moved[offset : offset + tensors["codes"].numel()]
        moved.copy_(tensors["codes"])
        found = written({**tensors, "codes": moved}, spec, torch.float32)
        assert torch.equal(found, expected)


# ------------------------------------------------------------------------------------- scales

PLACES = {
    "groups": case(fmt="int4", shape=(6, 96), code_shape=(6, 3, 32), scale=(6, 3, 1)),
    "odd groups": case(fmt="int5", shape=(6, 48), code_shape=(6, 16, 3), scale=(6, 16, 1)),
    "odd groups, flat": case(fmt="int6", shape=(5, 33), code_shape=(5, 3, 11), scale=(5, 3, 1)),
    "groups of all rows": case(fmt="int4", shape=(6, 96), code_shape=(6, 3, 32), scale=(1, 3, 1)),
    "one group in three axes": case(
        fmt="int4", shape=(6, 96), code_shape=(6, 3, 32), scale=(6, 1, 1)
    ),
    "rows": case(fmt="int8", shape=(6, 20), scale=(6, 1)),
    "tensor": case(fmt="float8_e4m3fn", shape=(6, 20), scale=(1,)),
    "columns": case(fmt="int8", shape=(6, 20), scale=(1, 20)),
    "every value": case(fmt="int8", shape=(6, 24), code_shape=(6, 3, 8), scale=(6, 3, 8)),
    "no scale": case(fmt="bfloat16", shape=(6, 20)),
    "no scale, float32": case(fmt="float32", shape=(6, 20)),
    "int16": case(fmt="int16", shape=(6, 20), scale=(6, 1), scale_dtype=torch.bfloat16),
    "nvfp4": case(
        fmt="float4_e2m1fn", shape=(6, 64), code_shape=(6, 4, 16), scale=(6, 4, 1),
        scale_dtype=torch.float8_e4m3fn, two_level=True,
    ),
    "mxfp8": case(
        fmt="float8_e5m2", shape=(6, 64), code_shape=(6, 2, 32), scale=(6, 2, 1),
        scale_dtype=torch.float8_e8m0fnu,
    ),
    "mxfp6 before subnormals": case(
        fmt=dtypes.get_format("float6_e3m2fn", subnormals=False), shape=(6, 64),
        code_shape=(6, 2, 32), scale=(6, 2, 1), scale_dtype=torch.float8_e8m0fnu,
    ),
    "nf4": case(fmt="nf4_bnb", shape=(6, 64), code_shape=(6, 2, 32), scale=(6, 2, 1)),
    "fp4, flat": case(fmt="fp4_bnb", shape=(5, 33), code_shape=(5, 3, 11), scale=(5, 3, 1)),
    "smoothed": case(
        fmt="int4", shape=(6, 64), code_shape=(6, 2, 32), scale=(6, 2, 1), smoothing="divide",
    ),
    "smoothed, flat": case(
        fmt="int3", shape=(6, 20), scale=(6, 1), smoothing="multiply", scale_dtype=torch.float16,
    ),
    "codebook": case(fmt="uint3", shape=(6, 64), levels=(6, 8)),
    "one codebook": case(fmt="uint4", shape=(5, 33), levels=(1, 1, 16)),
    "codebook of groups": case(fmt="uint2", shape=(6, 64), code_shape=(6, 4, 16), levels=(6, 4, 4)),
    "codebook of rows in three axes": case(fmt="uint4", shape=(6, 32), levels=(6, 1, 16)),
    "convolution": case(fmt="uint8", shape=(4, 6, 3, 3), scale=(4, 1, 3, 3)),
    "convolution of rows": case(fmt="int5", shape=(4, 8, 3, 3), scale=(4, 1, 1, 1)),
    "convolution in groups": case(
        fmt="int4", shape=(4, 8, 3, 2), code_shape=(4, 2, 4, 3, 2), scale=(4, 2, 1, 3, 2)
    ),
    "convolution in groups without a kernel's scales": case(
        fmt="int4", shape=(4, 8, 3, 2), code_shape=(4, 2, 4, 3, 2), scale=(4, 2, 1, 1, 1)
    ),
    "half of a kernel": case(fmt="int8", shape=(4, 6, 3, 2), scale=(4, 1, 1, 2)),
    "transposed convolution": case(fmt="int4", shape=(4, 8, 3, 3), scale=(1, 8, 3, 3)),
    "convolution as a matrix": case(
        fmt="int8", shape=(4, 8, 3, 3), code_shape=(4, 72), scale=(4, 1)
    ),
    "codebook of a convolution": case(fmt="uint2", shape=(4, 8, 3, 3), levels=(4, 4, 3, 3)),
    "convolution of three axes": case(fmt="int4", shape=(4, 4, 2, 2, 3), scale=(4, 1, 2, 2, 3)),
}  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_every_place_of_scales(place: str) -> None:
    for seed, dtype in enumerate(FLOATS):
        tensors, spec = weight_of(**PLACES[place], seed=seed)
        expected = reference.dequantize(tensors, spec, dtype)
        found = written(tensors, spec, dtype)
        assert bits_equal(found.view(spec.shape), expected), dtype
        if dtype == torch.bfloat16:
            assert bits_equal(unpack.dequantize(tensors, spec, dtype), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "place",
    [
        case(fmt="uint4", shape=(6, 96), code_shape=(6, 3, 32), scale=(6, 3, 1)),
        case(fmt="uint7", shape=(5, 33), code_shape=(5, 3, 11), scale=(5, 3, 1)),
        case(fmt="uint8", shape=(4, 6, 3, 3), scale=(4, 1, 3, 3)),
        case(fmt="int4", shape=(6, 64), code_shape=(6, 2, 32), scale=(1,)),
    ],
)
def test_zero_points(place: dict, dtype: torch.dtype) -> None:
    """A fused multiply-add rounds once where the reference may round twice."""
    for seed, scale_dtype in enumerate((dtype, torch.float32)):
        tensors, spec = weight_of(**place, zero=True, seed=seed, scale_dtype=scale_dtype)
        found = written(tensors, spec, torch.float32)
        wide = {n: t.double() if n != "codes" else t for n, t in tensors.items()}
        codes = reference.decode(tensors["codes"], spec.format, spec.numel).double()
        product = codes.view(spec.code_shape) * wide["scale"]
        exact = product + wide["zero_point"]
        bound = (product.abs() + exact.abs()) * 2.0**-24
        assert ((found.double().view(spec.code_shape) - exact).abs() <= bound).all()
        assert torch.equal(written(tensors, spec, dtype), found.to(dtype))


def test_tables_that_are_not_contiguous() -> None:
    tensors, spec = weight_of("int4", (6, 64), (6, 2, 32), (6, 2, 1))
    expected = reference.dequantize(tensors, spec)
    scale = tensors["scale"].view(6, 2).t().contiguous().t().unsqueeze(-1)
    assert not scale.is_contiguous()
    assert torch.equal(written({**tensors, "scale": scale}, spec, torch.float32), expected)


@pytest.mark.parametrize("place", ["groups", "rows", "nvfp4", "codebook of groups", "nf4"])
def test_some_rows_alone_and_several_steps(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {**PLACES[place]}
    rows = 19
    for name in ("shape", "code_shape", "scale", "levels"):
        if given.get(name):
            given[name] = (rows, *given[name][1:])
    tensors, spec = weight_of(**given)
    expected = reference.dequantize(tensors, spec)
    assert bits_equal(written(tensors, spec, torch.float32, 16), expected[16:])
    assert bits_equal(written(tensors, spec, torch.float32, 0, 16), expected[:16])
    # As on a GPU: some rows a program, one by one.
    monkeypatch.setattr(unpack, "tile_for", lambda *_: configs.Tile(7, 1, 64, 4, 1))
    assert bits_equal(written(tensors, spec, torch.float32), expected)


# -------------------------------------------------------------------- low-rank branch, rotation


@pytest.mark.parametrize("branch", FLOATS)
@pytest.mark.parametrize(
    "given",
    [
        case(fmt="int4", shape=(19, 64), code_shape=(19, 2, 32), scale=(19, 2, 1), rank=5),
        case(fmt="int3", shape=(19, 33), scale=(19, 1), rank=33),
        case(
            fmt="int4", shape=(19, 64), code_shape=(19, 1, 64), scale=(19, 1, 1), rank=32,
            smoothing="divide",
        ),
        case(fmt="int8", shape=(19, 48), scale=(19, 1), hadamard=16),
        case(fmt="int8", shape=(19, 48), scale=(19, 1), hadamard=8, rank=3),
        case(fmt="int8", shape=(6, 4, 2, 2), scale=(6, 1, 2, 2), hadamard=16, rank=2),
    ],
)  # fmt: skip
def test_branch_and_rotation(
    given: dict, branch: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors, spec = weight_of(**given, branch=branch, seed=7)
    expected = reference.dequantize(tensors, spec)
    monkeypatch.setattr(workspace, "chunk_bytes", lambda *_, **__: 4 * 16 * spec.columns)
    scale = expected.abs().max().item()
    found = unpack.dequantize(tensors, spec, torch.float32)
    assert (found - expected).abs().max().item() <= 1e-6 * scale
    half = unpack.dequantize(tensors, spec, torch.bfloat16)
    off = (half.float() - expected).abs()
    assert (off <= expected.abs() * 2.0**-8 + 1e-6 * scale).all()


def test_targets_without_a_fitting_product_add_the_branch_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tensors, spec = weight_of(
        "int4", (19, 64), (19, 2, 32), (19, 2, 1), rank=5, smoothing="multiply"
    )
    expected = reference.dequantize(tensors, spec)
    assert unpack.fuses_branch(tensors, spec)
    turing = configs.Machine("sm_75", 40, 64 << 10)
    monkeypatch.setattr(unpack, "machine_of", lambda _: turing)
    assert not unpack.fuses_branch(tensors, spec)
    monkeypatch.undo()
    monkeypatch.setattr(unpack, "fuses_branch", lambda *_: False)
    found = unpack.dequantize(tensors, spec, torch.float32)
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()


# ------------------------------------------------------------------------------- 8-bit operands

GROUPED = [
    case(fmt="int4", shape=(9, 64), code_shape=(9, 2, 32), scale=(9, 2, 1), smoothing="divide",
         rank=4),
    case(fmt="uint4", shape=(9, 64), code_shape=(9, 4, 16), scale=(9, 4, 1), zero=True,
         scale_dtype=torch.bfloat16),
    case(fmt="float4_e2m1fn", shape=(9, 64), code_shape=(9, 4, 16), scale=(9, 4, 1),
         scale_dtype=torch.float8_e4m3fn, two_level=True),
    case(fmt="uint3", shape=(9, 33), code_shape=(9, 3, 11), levels=(9, 3, 8)),
    case(fmt="uint2", shape=(9, 32), levels=(1, 4)),
    case(fmt="nf4_bnb", shape=(9, 64), code_shape=(9, 2, 32), scale=(9, 2, 1)),
    case(fmt="uint5", shape=(9, 33), scale=(9, 1), zero=True),
    case(fmt="float6_e3m2fn", shape=(9, 64), scale=(9, 1)),
    case(fmt="bfloat16", shape=(9, 64)),
]  # fmt: skip


@pytest.mark.parametrize("given", GROUPED, ids=lambda given: given["fmt"])
def test_rows_as_int8_and_fp8(given: dict) -> None:
    for seed in range(2):
        tensors, spec = weight_of(**given, seed=seed)
        if spec.format.is_integer and "scale" in tensors:
            tensors["scale"][2] = 0  # a row of nothing
        plain = reference.plain_weight(tensors, spec)
        largest = plain.abs().amax(1)
        out = poisoned(spec.numel, dtype=torch.int8)
        codes, scale = unpack.to_int8(tensors, spec, out)
        assert codes.data_ptr() == out.data_ptr() and scale.dtype == torch.float32
        assert (scale * 127.0001 >= largest).all()
        assert codes.to(torch.int32).abs().max() <= 127
        error = (codes.float() * scale[:, None] - plain).abs()
        assert (error <= 0.5001 * scale[:, None]).all()
        values, scale = unpack.to_fp8(tensors, spec)
        assert values.dtype == torch.float8_e4m3fn
        inverse = torch.where(scale == 0, 0.0, 1 / scale)
        expected = (plain * inverse[:, None]).clamp(-448, 448)
        error = (values.float() - expected).abs()
        assert (error <= expected.abs() * 2.0**-4 + 2.0**-10).all()


def test_rows_of_next_to_nothing_are_nothing() -> None:
    """The inverse of their scale would be infinite."""
    for given in (GROUPED[0], GROUPED[1], GROUPED[6]):
        tensors, spec = weight_of(**given)
        tensors["scale"][3] = 1e-38
        if "zero_point" in tensors:
            tensors["zero_point"][3] = 0
        codes, scale = unpack.to_int8(tensors, spec)
        assert scale.isfinite().all() and not codes[3].any() and codes[4].any()
        values, scale = unpack.to_fp8(tensors, spec)
        assert scale.isfinite().all() and not values[3].float().any()


def test_a_grid_never_has_more_programs_than_devices_take() -> None:
    for rows in (1, 3072, 65535 * 4, 262208, 1 << 20):
        shape = unpack._shape(unpack.MACHINE, rows, 3840, 8, 0)
        assert math.ceil(rows / (shape["ROWS"] * shape["STEPS"])) <= 65535
    assert unpack._shape(unpack.MACHINE, 3072, 3840, 8, 0)["STEPS"] == 4


def test_the_largest_value_that_scales_allow() -> None:
    """Exact where the codes reach it, and never less than a row's largest value."""
    tensors, spec = weight_of("uint4", (4, 32), (4, 2, 16), (4, 2, 1), zero=True)
    low, high = tensors["zero_point"], tensors["zero_point"] + 15 * tensors["scale"]
    expected = torch.maximum(low.abs(), high.abs()).amax((1, 2)) / 127
    _, scale = unpack.to_int8(tensors, spec)
    assert torch.allclose(scale, expected, rtol=1e-6)
    tensors, spec = weight_of("int4", (4, 32), (4, 2, 16), (4, 2, 1))
    _, scale = unpack.to_int8(tensors, spec)
    assert torch.allclose(scale, 8 * tensors["scale"].amax((1, 2)) / 127, rtol=1e-6)


@pytest.mark.parametrize("name", [f"{sign}int{bits}" for sign in ("", "u") for bits in range(2, 9)])
@pytest.mark.parametrize("columns", [64, 33])
def test_integers_of_rows_are_taken_as_stored(name: str, columns: int) -> None:
    tensors, spec = weight_of(name, (5, columns), scale=(5, 1), zero=name.startswith("u"))
    expected, scale, _ = reference.int8_codes(tensors, spec)
    assert torch.equal(unpack.to_codes(tensors, spec), expected)
    if spec.format.signed:
        codes, found = unpack.to_int8(tensors, spec)
        assert torch.equal(codes, expected) and torch.equal(found, scale.reshape(-1))


# ----------------------------------------------------------------------------- around a kernel


def test_a_spec_survives_as_text() -> None:
    for fmt in FORMATS:
        for spec in (
            WeightSpec(fmt, (6, 64), (6, 2, 32), rank=3, hadamard=16, smoothing="divide"),
            WeightSpec(fmt, (6, 4, 3, 3), (6, 36), two_level=True),
        ):
            text = flat.text_of(spec)
            assert flat.spec_of(text) == spec and flat.spec_of(text).format.runs == fmt.runs
            assert flat.spec_of(text) is flat.spec_of(flat.text_of(dataclasses.replace(spec)))


def test_one_operator_in_a_compiled_graph() -> None:
    tensors, spec = weight_of("int4", (6, 64), (6, 2, 32), (6, 2, 1))
    graphs = []

    def keep(module, _):
        graphs.append(module)
        return module.forward

    def double(tensors):
        return unpack.dequantize(tensors, spec, torch.bfloat16) * 2

    compiled = torch.compile(double, backend=keep, fullgraph=True)
    assert torch.equal(compiled(tensors), double(tensors))
    (graph,) = graphs
    called = [str(n.target) for n in graph.graph.nodes if n.op == "call_function"]
    assert any("lowbit.dequantize" in name for name in called) and len(called) == 2


def test_workspace_is_reused_and_grows() -> None:
    workspace.release()
    first = workspace.get(DEVICE, 1000, torch.int8)
    again = workspace.get(DEVICE, 400, torch.bfloat16)
    assert first.numel() == 1000 and again.numel() == 200
    assert first.data_ptr() == again.data_ptr()
    other = workspace.get(DEVICE, 100, torch.int8, "other")
    assert other.data_ptr() != first.data_ptr()
    larger = workspace.get(DEVICE, 5000, torch.float32)
    assert larger.numel() == 1250
    assert workspace.get(DEVICE, 5000, torch.int8).data_ptr() == larger.data_ptr()
    assert workspace.chunk_bytes(DEVICE) == workspace.LARGEST
    workspace.release()


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["uint4", "int3", "float8_e4m3fn", "float4_e2m1fn", "uint11"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_real_sizes(name: str, dtype: torch.dtype) -> None:
    group = 96
    shape = (12288, 3072)
    code_shape = (12288, 3072 // group, group)
    tensors, spec = weight_of(name, shape, code_shape, (*code_shape[:2], 1))
    found = written(tensors, spec, dtype)
    assert bits_equal(found, reference.dequantize(tensors, spec, dtype))
    assert math.prod(found.shape) == spec.numel
    tensors, spec = weight_of(name, shape, code_shape, (*code_shape[:2], 1), rank=32)
    expected = reference.dequantize(tensors, spec)
    off = (unpack.dequantize(tensors, spec, dtype).float() - expected).abs()
    step = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}[dtype]
    scale = expected.abs().nan_to_num().amax()
    assert not (off > expected.abs() * step + scale * 1e-6).any()
