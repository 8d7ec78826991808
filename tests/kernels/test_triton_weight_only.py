"""Products with weights that are decoded on the way, against float64 of the dequantized weight."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support import pack
from test_triton_unpack import case as given
from test_triton_unpack import weight_of
from torch.nn import functional
from triton_host import DEVICE, kernels, poisoned

weight_only = kernels("weight_only")
configs = kernels("configs")
unpack = kernels("unpack")
workspace = kernels("workspace")
reference = pack("kernels.reference")

WAYS = {"_gemv": 3, "_fused": 17, "_two_passes": 40}  # rows that take each way in the interpreter
STEP = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-22}

CASES = {
    "zero points": given(
        fmt="uint4", shape=(35, 96), code_shape=(35, 3, 32), scale=(35, 3, 1), zero=True,
        scale_dtype=torch.bfloat16,
    ),
    "odd groups": given(fmt="int3", shape=(19, 96), code_shape=(19, 8, 12), scale=(19, 8, 1)),
    "svdq": given(
        fmt="int4", shape=(19, 64), code_shape=(19, 2, 32), scale=(19, 2, 1), smoothing="divide",
        rank=19,
    ),
    "nvfp4": given(
        fmt="float4_e2m1fn", shape=(19, 64), code_shape=(19, 4, 16), scale=(19, 4, 1),
        scale_dtype=torch.float8_e4m3fn, two_level=True, smoothing="multiply",
    ),
    "rows": given(fmt="int8", shape=(19, 52), scale=(19, 1)),
    "tensor": given(fmt="int8", shape=(19, 52), scale=(1,)),
    "codebook": given(fmt="uint2", shape=(19, 64), code_shape=(19, 4, 16), levels=(19, 4, 4)),
    "rotation and branch": given(
        fmt="int6", shape=(19, 64), code_shape=(19, 2, 32), scale=(19, 2, 1), hadamard=16, rank=4,
        branch=torch.float32,
    ),
    "nf4": given(fmt="nf4_bnb", shape=(19, 64), code_shape=(19, 2, 32), scale=(19, 2, 1)),
    "one long row": given(fmt="uint5", shape=(19, 33), scale=(19, 1), zero=True),
}  # fmt: skip


@pytest.fixture(autouse=True)
def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ways that were taken; outputs and workspaces begin as what would show."""
    names: list[str] = []

    def get(device, nbytes, dtype, slot=""):
        return poisoned(nbytes // dtype.itemsize, dtype=dtype)

    def watched(name: str):
        kernel = getattr(weight_only, name)

        def way(*arguments):
            names.append(name)
            arguments[-1].fill_(float("nan"))
            kernel(*arguments)

        return way

    monkeypatch.setattr(workspace, "get", get)
    for name in WAYS:
        monkeypatch.setattr(weight_only, name, watched(name))
    return names


def check(x, tensors, spec, bias, what: object, steps: float = 1.0) -> None:
    """The result is as near to the exact one as rounding operands and result once may leave it.

    In the norm of the whole output: half a step for the result, and for each operand (weight, and
    activations where they are rotated or smoothed) about as much.
    """
    found = weight_only.linear_weight_only(x, tensors, spec, bias)
    assert found.dtype == x.dtype and found.shape == (*x.shape[:-1], spec.rows)
    weight = reference.dequantize(tensors, spec).double().view(spec.rows, spec.columns)
    exact = x.double() @ weight.t()
    if bias is not None:
        exact = exact + bias.double()
    error = (found.double() - exact).norm() / exact.norm()
    assert error <= steps * STEP[x.dtype], (what, error.item() / STEP[x.dtype])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", CASES)
def test_every_way(case: str, way: str, taken: list[str]) -> None:
    tensors, spec = weight_of(**CASES[case], seed=len(case))
    number = list(CASES).index(case) + list(WAYS).index(way)
    dtype = (torch.bfloat16, torch.float16)[number % 2]
    x = torch.randn(WAYS[way], spec.columns, device=DEVICE).to(dtype)
    bias = torch.randn(spec.rows, device=DEVICE).to(dtype) if number % 3 else None
    check(x, tensors, spec, bias, (case, way, dtype))
    assert taken == ["_two_passes" if case == "one long row" else way]


@pytest.mark.parametrize("rows", [1, 5, 9])
def test_float32(rows: int) -> None:
    tensors, spec = weight_of(**CASES["svdq"], seed=rows, branch=torch.float32)
    x = torch.randn(rows, spec.columns, device=DEVICE)
    check(x, tensors, spec, torch.randn(spec.rows, device=DEVICE), rows)


@pytest.mark.parametrize("rows", [4, 20, 40])
def test_any_shape_of_x(rows: int) -> None:
    tensors, spec = weight_of(**CASES["zero points"], seed=rows)
    wide = torch.randn(rows, 2 * spec.columns, device=DEVICE).to(torch.bfloat16)
    columns = wide[:, : spec.columns]
    assert not columns.is_contiguous()
    check(columns, tensors, spec, None, "rows apart")
    turned = torch.randn(spec.columns, rows, device=DEVICE).to(torch.bfloat16).t()
    check(turned, tensors, spec, None, "columns together")
    cube = torch.randn(2, rows // 2, spec.columns, device=DEVICE).to(torch.bfloat16)
    check(cube, tensors, spec, None, "three axes")
    check(cube.transpose(0, 1), tensors, spec, None, "three axes, turned")


@pytest.mark.skipif(DEVICE.type != "cpu", reason="maps a file that is mostly holes")
def test_rows_that_are_gigabytes_apart(tmp_path: Path) -> None:
    """Their offsets do not fit 32 bits. What is between them is never touched."""
    tensors, spec = weight_of(**CASES["rows"])
    apart, rows = 1 << 30, 4
    whole = torch.from_file(
        str(tmp_path / "rows"), shared=True, size=rows * apart, dtype=torch.float16
    )
    x = whole.as_strided((rows, spec.columns), (apart, 1))
    x.copy_(torch.randn(rows, spec.columns))
    check(x, tensors, spec, None, rows)


def test_one_row_and_none() -> None:
    tensors, spec = weight_of(**CASES["rows"])
    check(torch.randn(spec.columns, device=DEVICE).half(), tensors, spec, None, "a vector")
    for shape in ((0, spec.columns), (2, 0, 3, spec.columns)):
        x = torch.randn(shape, device=DEVICE).half()
        found = weight_only.linear_weight_only(x, tensors, spec, None)
        assert found.shape == (*shape[:-1], spec.rows) and found.dtype == torch.float16


@pytest.mark.parametrize("case", ["zero points", "svdq"])
def test_split_sums_have_one_order(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of the inner dimension, the last of them short, give the same result every time."""
    place = {**CASES[case], "shape": (35, 256), "code_shape": (35, 8, 32)}
    tensors, spec = weight_of(**{**place, "scale": (35, 8, 1)})
    monkeypatch.setattr(weight_only, "split_of", lambda *_: (4, 96))
    x = torch.randn(17, spec.columns, device=DEVICE).to(torch.bfloat16)
    bias = torch.randn(spec.rows, device=DEVICE)
    check(x, tensors, spec, bias, case)
    first = weight_only.linear_weight_only(x, tensors, spec, bias)
    assert torch.equal(weight_only.linear_weight_only(x, tensors, spec, bias), first)


def test_how_sums_are_split() -> None:
    for tiles, columns, block_k, processors in (
        (1, 3072, 128, 132), (48, 3072, 128, 132), (400, 12288, 64, 132), (3, 100, 64, 80),
        (2, 15360, 128, 16),
    ):  # fmt: skip
        split, span = weight_only.split_of(tiles, columns, block_k, processors)
        assert 1 <= split <= 8 and span % block_k == 0 and split * span >= columns
        assert split == 1 or span >= 4 * block_k
        assert split == 1 or tiles * split < 2 * processors
    assert weight_only.split_of(48, 3072, 128, 132)[0] > 1


@pytest.mark.parametrize("biased", [False, True])
def test_two_passes_in_parts(biased: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workspace, "LARGEST", 2 * 64 * 256)
    place = {**CASES["zero points"], "shape": (300, 64), "code_shape": (300, 2, 32)}
    tensors, spec = weight_of(**{**place, "scale": (300, 2, 1)})
    x = torch.randn(33, spec.columns, device=DEVICE).to(torch.bfloat16)
    bias = torch.randn(300, device=DEVICE) if biased else None
    check(x, tensors, spec, bias, biased)


def test_rotated_activations() -> None:
    for block, basis in ((16, 2), (16, 4), (32, 4), (8, 2)):
        x = torch.randn(5, 64, device=DEVICE)
        found = weight_only._rotated(x, block, basis)
        expected = reference.hadamard(x, block, basis)
        assert torch.allclose(found, expected, atol=1e-5)


def test_where_each_way_pays() -> None:
    rows = {
        name: weight_only.fused_rows(configs.Machine(name, 132, 1 << 16))
        for name in ("sm_75", "sm_80", "sm_89", "sm_90", "gfx1100", "xpu")
    }
    assert rows["sm_75"] == rows["xpu"] == 0
    assert 64 < rows["sm_90"] < rows["sm_80"] < rows["sm_89"] < 1024


def test_gradients_of_activations() -> None:
    tensors, spec = weight_of(**CASES["rows"])
    x = torch.randn(3, spec.columns, device=DEVICE, requires_grad=True)
    weight_only.linear_weight_only(x, tensors, spec, None).sum().backward()
    expected = reference.dequantize(tensors, spec).sum(0).expand(3, -1)
    assert torch.allclose(x.grad, expected, rtol=1e-5, atol=1e-5)


def test_one_operator_in_a_compiled_graph() -> None:
    tensors, spec = weight_of(**CASES["svdq"])
    graphs = []

    def keep(module, _):
        graphs.append(module)
        return module.forward

    def twice(x):
        return weight_only.linear_weight_only(x, tensors, spec, None) * 2

    x = torch.randn(2, 3, spec.columns, device=DEVICE).half()
    compiled = torch.compile(twice, backend=keep, fullgraph=True)
    assert torch.equal(compiled(x), twice(x))
    (graph,) = graphs
    called = [str(n.target) for n in graph.graph.nodes if n.op == "call_function"]
    assert sum("lowbit.linear_weight_only" in name for name in called) == 1 and len(called) == 2


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 8, 16, 77, 512, 4608])
@pytest.mark.parametrize("name", ["uint4", "int3", "float8_e4m3fn", "int8"])
def test_real_sizes(name: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    code_shape = (9216, 48, 64)
    for options in ({}, {"rank": 32, "smoothing": "divide"}):
        tensors, spec = weight_of(
            name, (9216, 3072), code_shape, (*code_shape[:2], 1), zero=name == "uint4", **options
        )
        tensors["codes"] = (
            tensors["codes"].view(torch.uint8).clamp_(max=0x7E).view(spec.format.word)
        )  # no not-a-numbers
        x = torch.randn(rows, 3072, device=DEVICE).to(torch.bfloat16)
        bias = torch.randn(9216, device=DEVICE).to(torch.bfloat16)
        found = weight_only.linear_weight_only(x, tensors, spec, bias).double()
        weight = reference.dequantize(tensors, spec)
        exact = functional.linear(x.double(), weight.double(), bias.double())
        assert (found - exact).norm() <= 2.0**-7 * exact.norm()
        assert torch.equal(weight_only.linear_weight_only(x, tensors, spec, bias).double(), found)
