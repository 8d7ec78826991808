"""What kernels share: rounding that is right on devices and in the interpreter, torch operators."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton_host import DEVICE, INTERPRETED, kernels, poisoned

library = kernels("library")
narrow, widen, round_even, operation = (
    library.narrow,
    library.widen,
    library.round_even,
    library.operation,
)


def test_kernels_run_where_the_harness_says() -> None:
    assert bool(library.INTERPRETED) == INTERPRETED
    assert DEVICE.type == ("cpu" if INTERPRETED else "cuda")


# ----------------------------------------------------------------------------------- rounding


@triton.jit
def narrow_kernel(source, target, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(source + at, mask=at < n)
    tl.store(target + at, narrow(widen(value).to(tl.float32), target.dtype.element_ty), mask=at < n)


@triton.jit
def round_kernel(source, target, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + at, round_even(tl.load(source + at, mask=at < n)), mask=at < n)


@triton.jit
def matmul_kernel(a, b, c, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    both = at[:, None] * BLOCK + at[None, :]
    x, y = tl.load(a + both), tl.load(b + both)
    tl.store(c + both, narrow(tl.dot(widen(x), widen(y)), c.dtype.element_ty))


def run(kernel, source: Tensor, dtype: torch.dtype) -> Tensor:
    target = poisoned(source.numel(), dtype=dtype)
    kernel[(triton.cdiv(source.numel(), 1024),)](source, target, source.numel(), BLOCK=1024)
    return target


def bits(x: Tensor) -> Tensor:
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.element_size()])


def every_float(seed: int) -> Tensor:
    """Random float32 of every exponent that 16-bit floats have, ties, and what is special."""
    noise = torch.Generator().manual_seed(seed)
    wide = torch.randn(3000, generator=noise) * torch.exp2(
        torch.randint(-30, 16, (3000,), generator=noise).float()
    )
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(torch.float8_e4m3fn).float()
    codes = codes[codes.isfinite()].sort().values
    ties = (codes[1:] + codes[:-1]) / 2
    halves = wide.bfloat16().float()
    ties_16 = torch.nextafter(halves.bfloat16(), torch.tensor(torch.inf).bfloat16()).float()
    inf = float("inf")
    special = torch.tensor([0.0, -0.0, inf, -inf, 448.0, 464.0, -480.0, 1e9, 2**-10, 2**-9, 1e-30])
    parts = (wide, codes, ties, ties * (1 + 2**-20), (halves + ties_16) / 2, special)
    return torch.cat(parts).to(DEVICE)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_narrow_rounds_as_torch_does(dtype: torch.dtype, seed: int) -> None:
    x = every_float(seed)
    found = run(narrow_kernel, x, dtype)
    wanted = x.clamp(-448, 448).to(dtype) if dtype.itemsize == 1 else x.to(dtype)
    assert torch.equal(bits(found), bits(wanted))
    nan = run(narrow_kernel, torch.full((5,), float("nan"), device=DEVICE), dtype)
    assert nan.float().isnan().all()


def test_widen_reads_bfloat16() -> None:
    x = every_float(5).bfloat16()
    assert torch.equal(run(narrow_kernel, x, torch.float32), x.float())
    assert torch.equal(bits(run(narrow_kernel, x, torch.bfloat16)), bits(x))


def test_round_even() -> None:
    x = torch.cat([torch.arange(-300, 300) / 2, torch.randn(999) * 1000]).to(DEVICE)
    assert torch.equal(run(round_kernel, x, torch.float32), x.round())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_products_of_widened_operands(dtype: torch.dtype) -> None:
    a, b = (torch.randint(-8, 9, (32, 32), device=DEVICE).to(dtype) for _ in range(2))
    c = poisoned(32, 32, dtype=dtype)
    matmul_kernel[(1,)](a, b, c, BLOCK=32)
    assert torch.equal(c, (a.double() @ b.double()).to(dtype))  # small integers: exact


# ---------------------------------------------------------------------------------- operators

LAUNCHED: list[bool] = []


def fake_scaled(x: Tensor, scale: Tensor | None, factor: float, dtype: torch.dtype) -> Tensor:
    return x.new_empty((x.shape[0], 2 * x.shape[1]), dtype=dtype)


@operation("test_scaled", fake=fake_scaled)
def scaled(x: Tensor, scale: Tensor | None, factor: float, dtype: torch.dtype) -> Tensor:
    """Twice beside itself, by a kernel."""
    LAUNCHED.append(torch.compiler.is_compiling())
    y = x * factor if scale is None else x * scale
    return torch.cat([run(narrow_kernel, y.reshape(-1), dtype).view(y.shape)] * 2, dim=1)


def fake_pair(x: Tensor, sizes: list[int]) -> tuple[Tensor, Tensor]:
    return x.new_empty(sizes), x.new_empty(sizes[::-1])


@operation("test_pair", fake=fake_pair)
def pair(x: Tensor, sizes: list[int]) -> tuple[Tensor, Tensor]:
    return x.reshape(sizes).clone(), x.reshape(sizes[::-1]) * 2


def fake_wrong(x: Tensor) -> Tensor:
    return x.new_empty((1, *x.shape))


@operation("test_wrong", fake=fake_wrong)
def wrong(x: Tensor) -> Tensor:
    return x + 1


@pytest.mark.parametrize("scale", [True, False])
def test_an_operation_is_a_correct_torch_operator(scale: bool) -> None:
    x = torch.randn(5, 7, device=DEVICE)
    arguments = (x, x.abs() if scale else None, 3.0, torch.bfloat16)
    torch.library.opcheck(scaled.operator, arguments)
    torch.library.opcheck(pair.operator, (x, [35, 1]))
    with pytest.raises(Exception, match="Shapes"):
        torch.library.opcheck(wrong.operator, (x,))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_an_operation_stands_in_a_graph_whole(backend: str) -> None:
    """One graph, the operator in it, no look into its launcher, also when the shape changes."""
    graphs = []

    def layer(x: Tensor) -> Tensor:
        first, second = pair(scaled(x, None, 2.0, torch.float16), [x.numel() * 2, 1])
        return first.float().sum() + second

    def keep(graph, example):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        from torch._dynamo.backends.registry import lookup_backend

        return lookup_backend(backend)(graph, example)

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=keep)
    LAUNCHED.clear()
    for rows in (4, 9, 33):
        x = torch.randn(rows, 6, device=DEVICE)
        assert torch.equal(compiled(x), layer(x))
    assert all("lowbit.test_scaled.default" in graph for graph in graphs) and len(graphs) <= 2
    assert LAUNCHED and not any(LAUNCHED)


@operation("test_where", fake=fake_wrong)
def where(x: Tensor) -> Tensor:
    LAUNCHED.append(torch.cuda.current_device())
    return x


def test_kernels_are_launched_on_the_device_of_the_tensors(monkeypatch) -> None:
    """Triton takes the current device, which need not be where a model was loaded."""
    current = [0]

    class Within:
        def __init__(self, device: torch.device) -> None:
            self.index = device.index

        def __enter__(self) -> None:
            self.before, current[0] = current[0], self.index

        def __exit__(self, *_) -> None:
            current[0] = self.before

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", Within)
    LAUNCHED.clear()
    with torch._subclasses.FakeTensorMode():
        for index in (1, 0, 2):
            where(torch.empty(3, device=f"cuda:{index}"))
    where(torch.empty(3))
    assert LAUNCHED == [1, 0, 2, 0] and current == [0]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_kernel_on_the_second_device() -> None:
    x = torch.randn(5, 7, device="cuda:1")
    assert torch.equal(scaled(x, None, 3.0, torch.float32)[:, :7], x * 3)


def test_an_operation_is_the_launcher_itself_in_eager_calls() -> None:
    """No dispatcher in between: it would take longer than a small kernel."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Seen(TorchDispatchMode):
        names: list[str] = []  # noqa: RUF012

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.names.append(str(func))
            return func(*args, **(kwargs or {}))

    with Seen():
        wrong(torch.ones(3, device=DEVICE))
    assert Seen.names and not any("lowbit" in name for name in Seen.names)
    assert scaled.__doc__.startswith("Twice") and str(wrong.operator) == "lowbit.test_wrong.default"
