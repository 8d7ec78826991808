"""What nunchaku's operators are called with, and why it is not used.

The package cannot be installed here. A stand-in is imported in its place (``nunchaku_standin``):
the published signatures, every argument checked as the extension checks it, and the product
computed from the packed bytes by address formulas that share nothing with the pack's permutations.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path

import nunchaku_standin
import pytest
import torch
from support import pack
from w4a4 import activations, layer, normal_form, relative

faithful = pack("kernels.faithful")
nunchaku = pack("kernels.nunchaku")
registry = pack("kernels.registry")

CALL = registry.Call(
    device="cuda",
    capability=(8, 9),
    dtype=torch.bfloat16,
    shape=(256, 512),
    format="int4",
    bits=4,
    rowwise=False,
    symmetric=True,
    plain=False,
    group=64,
    rank=32,
    smoothing="divide",
    activation=pack("kernels.spec").ActivationSpec("int4", 64),
)
FP4 = dataclasses.replace(
    CALL,
    capability=(12, 0),
    format="float4_e2m1fn",
    group=16,
    two_level=True,
    activation=pack("kernels.spec").ActivationSpec("float4_e2m1fn", 16, "float8_e4m3fn"),
)


def forget() -> None:
    """Nothing of an earlier package, or of what was thought of it, stays."""
    for name in [name for name in sys.modules if name.split(".")[0] == "nunchaku"]:
        del sys.modules[name]
    registry._probe.cache_clear()
    nunchaku._operators.cache_clear()


@pytest.fixture(autouse=True)
def clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(tmp_path)
    nunchaku_standin.calls.clear()
    forget()
    yield
    forget()


@pytest.fixture
def installed(tmp_path: Path) -> None:
    nunchaku_standin.install(tmp_path)


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        file = folder / "nunchaku" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")


def why(call=CALL) -> str | None:
    """The reason against nunchaku where the user chose it."""
    (row,) = (
        row
        for row in registry.registry.implementations("linear_faithful")
        if row.backend == "nunchaku"
    )
    return row.why_not(call)


# ------------------------------------------------------------------------------------- products


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["int4", "uint4", "nvfp4"])
def test_products_are_those_of_the_reference(kind, dtype, installed) -> None:
    shapes = ((128, 128, 16, (1,)), (256, 128, 3, (2, 3)), (128, 384, 0, (257,)))
    for seed, (rows, columns, rank, shape) in enumerate(shapes):
        by_row = seed == 1
        made = layer(kind, rows, columns, rank=rank, seed=seed, half=dtype, by_row=by_row)
        weight = normal_form(made)
        x = activations(made, *shape, seed=seed, dtype=dtype)
        # Its operators round activations with a sign and do not shift them.
        spec = weight.spec
        if made.unsigned:
            signed = dataclasses.replace(spec.activation, format="int4", shift=0.0)
            spec = dataclasses.replace(spec, activation=signed)
        for bias in (made.bias.to(dtype), None):
            expected = faithful.linear_faithful(x, weight.tensors, spec, bias)
            found = nunchaku.linear_faithful(x, weight.tensors, weight.spec, bias)
            assert found.shape == (*shape, rows) and found.dtype == dtype
            # It rounds the sum before bias and per-channel scales, which are halves themselves.
            limit = (4e-3 if dtype == torch.bfloat16 else 6e-4) * (1 + by_row)
            assert relative(found, expected) < limit, (seed, relative(found, expected))
        none = nunchaku.linear_faithful(x[:0], weight.tensors, weight.spec, None)
        assert none.shape == (0, *shape[1:], rows) and none.dtype == dtype


@pytest.mark.parametrize("kind", ["int4", "uint4", "nvfp4"])
def test_arguments(kind, installed) -> None:
    made = layer(kind, 256, 384, rank=20, seed=7)
    weight = normal_form(made)
    x = activations(made, 300, seed=7, dtype=torch.bfloat16).T.contiguous().T
    assert not x.is_contiguous()
    nunchaku.linear_faithful(x, weight.tensors, weight.spec, made.bias)
    (first, quantize), (second, gemm) = nunchaku_standin.calls
    assert (first, second) == ("quantize", "gemm")
    groups = 24 if kind == "nvfp4" else 6

    def shapes(given: dict) -> dict:
        return {k: tuple(v.shape) for k, v in given.items() if isinstance(v, torch.Tensor)}

    assert shapes(quantize) == {
        "input": (300, 384), "output": (512, 192), "oscales": (groups, 512),
        "lora_down": (384, 32), "lora_act_out": (512, 32), "smooth": (384,),
    }  # fmt: skip
    assert shapes(gemm) == {
        "act": (512, 192), "wgt": (256, 192), "out": (300, 256), "ascales": (groups, 512),
        "wscales": (groups, 256), "lora_act_in": (512, 32), "lora_up": (256, 32), "bias": (256,),
    }  # fmt: skip
    assert gemm["act"] is quantize["output"] and gemm["ascales"] is quantize["oscales"]
    assert gemm["lora_act_in"] is quantize["lora_act_out"]
    assert quantize["fp4"] is gemm["fp4"] is (kind == "nvfp4")
    assert gemm["act_unsigned"] is False and quantize["fuse_glu"] is False
    assert gemm["alpha"] == (made.second.item() if kind == "nvfp4" else 1.0)
    if kind == "nvfp4":
        made = layer(kind, 256, 384, rank=16, seed=8, by_row=True)
        weight = normal_form(made)
        nunchaku.linear_faithful(x, weight.tensors, weight.spec, made.bias)
        gemm = nunchaku_standin.calls[-1][1]
        assert gemm["alpha"] == made.second.max().item()
        assert gemm["wcscales"].shape == (256,) and gemm["wcscales"].max() == 1


def test_codes_that_begin_anywhere(installed) -> None:
    """Codes are windows of a file, at any byte."""
    made = layer("int4", 128, 128, seed=9)
    weight = normal_form(made)
    x = activations(made, 3, seed=9, dtype=torch.bfloat16)
    expected = nunchaku.linear_faithful(x, weight.tensors, weight.spec, made.bias)
    codes = weight.tensors["codes"]
    shifted = torch.cat([codes.new_zeros(1), codes])[1:]
    tensors = weight.tensors | {"codes": shifted}
    assert torch.equal(nunchaku.linear_faithful(x, tensors, weight.spec, made.bias), expected)
    made = layer("nvfp4", 128, 128, seed=9)
    weight = normal_form(made)
    expected = nunchaku.linear_faithful(x, weight.tensors, weight.spec, made.bias)
    codes = weight.tensors["codes"]
    tensors = weight.tensors | {"codes": torch.cat([codes.new_zeros(1), codes])[1:]}
    assert torch.equal(nunchaku.linear_faithful(x, tensors, weight.spec, made.bias), expected)


def test_the_published_signatures(installed) -> None:
    """Names and order of the arguments, as of nunchaku 1.2 and 1.3."""
    operators = nunchaku._operators()
    assert list(inspect.signature(operators.quantize).parameters) == [
        "input", "output", "oscales", "lora_down", "lora_act_out", "smooth", "fuse_glu", "fp4",
        "pad_size",
    ]  # fmt: skip
    names = list(inspect.signature(operators.gemm).parameters)
    assert names == list(inspect.signature(nunchaku_standin.gemm_w4a4).parameters)
    assert len(names) == 29


# -------------------------------------------------------------------------------------- reasons


def test_auto_never_takes_it(installed) -> None:
    assert why() is None and why(FP4) is None
    for call in (CALL, FP4):
        for backend in ("auto", "comfy_kitchen", "reference"):
            choice = registry.registry.choose("linear_faithful", call, backend)
            assert choice.implementation.backend != "nunchaku"
        refused = dict(registry.registry.choose("linear_faithful", call).refused)
        assert refused["nunchaku"] == registry.OPT_IN
        forced = registry.registry.choose("linear_faithful", call, "nunchaku")
        assert forced.implementation.backend == "nunchaku"
        assert forced.implementation.function() is nunchaku.linear_faithful
    assert registry.registry.backend_status("cuda")["nunchaku"] is None


def test_auto_does_not_even_import_it(installed) -> None:
    registry.registry.choose("linear_faithful", CALL)
    registry.registry.backend_status("cuda")
    assert "nunchaku" not in sys.modules
    assert why() is None and "nunchaku.ops.gemm" in sys.modules


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ({"device": "cpu", "capability": None}, "needs a cuda device"),
        ({"capability": None}, "capability none"),
        ({"capability": (7, 0)}, "capability 7.0"),
        ({"capability": (7, 5)}, "on Turing devices nunchaku computes in float16 only"),
        ({"capability": (7, 5), "dtype": torch.float16}, None),
        ({"capability": (8, 0)}, None),
        ({"capability": (8, 6), "dtype": torch.float16}, None),
        ({"capability": (9, 0)}, "capability 9.0, and needs 7.5, 8.0, 8.6, 8.9, 12.0, 12.1"),
        ({"capability": (10, 0)}, "lack of 4-bit tensor cores"),
        ({"capability": (10, 3)}, "capability 10.3"),
        ({"capability": (11, 0)}, "capability 11.0"),
        ({"capability": (12, 0)}, "on Blackwell devices nunchaku takes float4_e2m1fn, not int4"),
        ({"dtype": torch.float32}, "float16 or bfloat16"),
        ({"shape": (200, 512)}, "divisible by 128"),
        ({"shape": (256, 320)}, "divisible by 128"),
        ({"rank": 1040}, "rank of at most 1024"),
        ({"group": 32}, "groups of 64"),
        ({"format": "int8"}, "int4 or float4_e2m1fn codes"),
        ({"activation": None}, "how activations are rounded"),
        ({"smoothing": "multiply"}, "divided by the smoothing"),
        ({"rotated": True}, "Hadamard"),
    ],
)
def test_reasons_against_a_call(call, words, installed) -> None:
    reason = why(dataclasses.replace(CALL, **call))
    assert reason is None if words is None else words in reason, reason


def test_reasons_against_fp4(installed) -> None:
    assert why(FP4) is None and why(dataclasses.replace(FP4, capability=(12, 1))) is None
    for capability in ((7, 5), (8, 6), (8, 9)):
        reason = why(dataclasses.replace(FP4, capability=capability, dtype=torch.float16))
        assert "takes int4, not float4_e2m1fn" in reason
    static = dataclasses.replace(FP4.activation, static=True)
    assert "as in SVDQuant" in why(dataclasses.replace(FP4, activation=static))
    unsigned = dataclasses.replace(FP4.activation, format="uint4", shift=0.1)
    assert "as in SVDQuant" in why(dataclasses.replace(FP4, activation=unsigned))
    unsigned = dataclasses.replace(CALL.activation, format="uint4", shift=0.1)
    assert why(dataclasses.replace(CALL, activation=unsigned)) is None


def test_absent() -> None:
    assert nunchaku.why_unavailable("cuda") == "nunchaku is not installed"
    assert why() == "nunchaku is not installed"
    assert registry.registry.backend_status("cuda")["nunchaku"] == "nunchaku is not installed"
    assert "CUDA devices only, this is cpu" in registry.registry.backend_status("cpu")["nunchaku"]
    choice = registry.registry.choose("linear_faithful", CALL, "nunchaku")
    assert choice.implementation.backend == "reference"
    assert ("nunchaku", "nunchaku is not installed") in choice.refused


@pytest.mark.parametrize(
    "files", [{"__init__.py": ""}, {"../nunchaku.py": "", "../_C.py": ""}], ids=["package", "file"]
)
def test_the_statistics_library_of_that_name(tmp_path: Path, files) -> None:
    (tmp_path / "nunchaku").mkdir()
    write(tmp_path, files)
    if "__init__.py" not in files:
        (tmp_path / "nunchaku").rmdir()
    assert "statistics library of that name" in why()
    assert "statistics" in registry.registry.backend_status("cuda")["nunchaku"]
    assert "nunchaku" not in sys.modules


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("import a_package_that_is_not_there", "ModuleNotFoundError: No module named 'a_package"),
        ("raise ImportError('undefined symbol: _ZN3c10')", "undefined symbol: _ZN3c10"),
        ("raise OSError('libcudart.so.12: cannot open')", "OSError: libcudart.so.12"),
        ("raise RuntimeError('operator torchvision::nms')", "RuntimeError: operator"),
    ],
)
def test_a_wheel_that_cannot_be_imported(tmp_path: Path, text: str, words: str) -> None:
    nunchaku_standin.install(tmp_path)
    write(tmp_path, {"__init__.py": text})
    reason = why()
    assert "installed but cannot be imported" in reason and words in reason
    choice = registry.registry.choose("linear_faithful", CALL, "nunchaku")
    assert choice.implementation.backend == "reference" and words in choice.describe()


def test_another_version_without_the_operators(tmp_path: Path) -> None:
    nunchaku_standin.install(tmp_path)
    write(tmp_path, {"ops/gemm.py": "def other(): ..."})
    reason = why()
    assert "cannot be imported" in reason and "svdq_gemm_w4a4_cuda" in reason
