"""The registry: what is chosen, and the reason against everything else."""

from __future__ import annotations

import threading

import pytest
import torch
from support import pack

registry = pack("kernels.registry")
CPU = registry.Call(
    device="cpu",
    capability=None,
    dtype=torch.bfloat16,
    shape=(256, 512),
    format="int8",
    bits=8,
    rowwise=True,
    symmetric=True,
    plain=True,
)


def changed(**values):
    from dataclasses import replace

    return replace(CPU, **values)


def test_every_operation_has_a_reference_that_applies():
    for operation in registry.MATMUL_OPERATIONS.values():
        choice = registry.registry.choose(operation, CPU)
        assert choice.implementation.backend == "reference"
        assert callable(choice.implementation.function())


def test_a_refused_kernel_gives_its_reason():
    choice = registry.registry.choose("linear_int8", CPU)
    assert dict(choice.refused) == {"comfy_kitchen": "needs a cuda device, this is cpu"}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"capability": (7, 0)}, "compute capability 7.5"),
        ({"capability": None}, "has none"),
        ({"format": "uint8"}, "int8 codes"),
        ({"rowwise": False}, "grouped"),
        ({"symmetric": False}, "zero point"),
        ({"plain": False}, "low-rank"),
    ],
)
def test_constraints_say_what_is_wrong(values, words):
    call = changed(device="cuda", **({"capability": (9, 0)} | values))
    kitchen = next(
        row
        for row in registry.registry.implementations("linear_int8")
        if row.backend == "comfy_kitchen"
    )
    assert words in kitchen.why_not(call)


@pytest.mark.parametrize("shape", [(256, 500), (16, 512), (256, 512, 3)])
def test_shapes_that_no_quantized_product_takes(shape):
    with pytest.raises(registry.NoImplementationError, match="needs"):
        registry.registry.choose("linear_int8", changed(shape=shape))
    assert registry.registry.choose("dequantize", changed(shape=shape))


def test_a_forced_backend_is_never_left_silently():
    choice = registry.registry.choose("dequantize", CPU, "comfy_kitchen")
    assert choice.implementation.backend == "reference"
    assert ("comfy_kitchen", "has no dequantize") in choice.refused
    assert "not comfy_kitchen: has no dequantize" in choice.describe()


def test_reference_can_be_forced():
    own = registry.Registry()
    for backend, priority in (("reference", 0), ("comfy_kitchen", 9)):
        own.register(registry.Implementation("x", backend, ".reference:dequantize", priority))
    assert own.choose("x", CPU, "reference").implementation.backend == "reference"


def test_unknown_operation_lists_nothing():
    with pytest.raises(registry.NoImplementationError, match="none registered"):
        registry.registry.choose("fold", CPU)


def test_backends_without_kernels_say_so():
    status = registry.registry.backend_status("cuda")
    assert status["reference"] is None
    assert "no kernels" in status["triton"] and "no kernels" in status["nunchaku"]


def test_registering_from_many_threads_loses_nothing():
    own = registry.Registry()

    def work(start: int) -> None:
        for number in range(200):
            own.register(registry.Implementation(f"op{number}", f"b{start}", "x:y", start))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(200):
        rows = own.implementations(f"op{number}")
        assert [row.priority for row in rows] == list(range(7, -1, -1))
