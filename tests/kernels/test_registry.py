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
    operations = {*registry.MATMUL_OPERATIONS.values(), "linear_weight_only"}
    assert operations == set(registry.registry.operations())
    call = changed(activation=pack("kernels.spec").ActivationSpec("int8", 0, "float32"))
    for operation in operations:
        choice = registry.registry.choose(operation, call)
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
        ({"smoothing": "divide"}, "smoothing"),
        ({"two_level": True}, "two levels"),
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
    assert "no kernels" in status["triton"] and "no kernels" not in status["nunchaku"]


INT4 = {
    "device": "cuda",
    "capability": (8, 6),
    "format": "int4",
    "bits": 4,
    "rowwise": False,
    "plain": False,
    "group": 64,
    "rank": 32,
    "smoothing": "divide",
    "activation": pack("kernels.spec").ActivationSpec("int4", 64),
}
AWQ = {
    "device": "cuda",
    "capability": (8, 6),
    "format": "uint4",
    "bits": 4,
    "rowwise": False,
    "symmetric": False,
    "group": 64,
}


@pytest.mark.parametrize(
    ("operation", "base", "values", "words"),
    [
        ("linear_faithful", INT4, {"device": "cpu"}, "needs a cuda device"),
        ("linear_faithful", INT4, {"capability": (7, 5)}, "compute capability 8.0"),
        ("linear_faithful", INT4, {"shape": (256, 576)}, "divisible by 128"),
        ("linear_faithful", INT4, {"shape": (192, 512)}, "divisible by 128"),
        ("linear_faithful", INT4, {"dtype": torch.float32}, "float16 or bfloat16 activations"),
        ("linear_faithful", INT4, {"group": 32}, "groups of 64"),
        ("linear_faithful", INT4, {"format": "float4_e2m1fn"}, "int4 codes"),
        ("linear_faithful", INT4, {"rotated": True}, "Hadamard"),
        ("linear_faithful", INT4, {"smoothing": "multiply"}, "divided by the smoothing"),
        ("linear_faithful", INT4, {"activation": None}, "how activations are rounded"),
        ("linear_weight_only", AWQ, {"device": "cpu"}, "needs a cuda device"),
        ("linear_weight_only", AWQ, {"capability": (7, 5)}, "compute capability 8.0"),
        ("linear_weight_only", AWQ, {"group": 128}, "groups of 64"),
        ("linear_weight_only", AWQ, {"format": "int4"}, "uint4 codes"),
        ("linear_weight_only", AWQ, {"plain": False}, "low-rank"),
        ("linear_weight_only", AWQ, {"smoothing": "multiply"}, "smoothing"),
        ("linear_weight_only", AWQ, {"dtype": torch.float32}, "float16 or bfloat16"),
        ("linear_weight_only", AWQ, {"shape": (256, 512, 1)}, "2-D"),
    ],
)
def test_constraints_of_4_bit_kernels(operation, base, values, words):
    (kitchen,) = (
        row
        for row in registry.registry.implementations(operation)
        if row.backend == "comfy_kitchen"
    )
    reason = kitchen.why_not(changed(**base | values))
    assert words in reason
    # Without the flaw only the machine itself can be in the way.
    reason = kitchen.why_not(changed(**base))
    assert reason is None or reason.startswith("comfy-kitchen has only its eager backend")


def test_what_rounds_no_activations_has_no_arithmetic_of_its_own():
    with pytest.raises(registry.NoImplementationError, match="how activations are rounded"):
        registry.registry.choose("linear_faithful", CPU)


def test_opt_in_backends_are_for_those_who_choose_them():
    own = registry.Registry()
    for backend, priority in (("reference", 0), ("nunchaku", 9)):
        target = ".reference:dequantize"
        own.register(registry.Implementation("x", backend, target, priority))
    choice = own.choose("x", CPU)
    assert choice.implementation.backend == "reference"
    assert choice.refused == (("nunchaku", registry.OPT_IN),)
    # A reason of the call comes first: choosing the backend would not help.
    rows = (registry.OnDevice(("cuda",)),)
    own.register(registry.Implementation("y", "nunchaku", "x:y", 9, rows))
    own.register(registry.Implementation("y", "reference", "x:y"))
    assert own.choose("y", CPU).refused == (("nunchaku", "needs a cuda device, this is cpu"),)


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)])
def test_what_a_device_emulates_is_for_those_who_choose_it(capability):
    row = registry.Implementation("x", "comfy_kitchen", "x:y", 9, emulated_from=(9, 0))
    call = changed(device="cuda", capability=capability)
    reason = row.why_not(call, forced=False)
    if capability >= (9, 0):
        assert "{}.{}".format(*capability) in reason and "emulates" in reason
    else:  # nothing but the machine itself in the way
        assert reason is None or reason.startswith("comfy-kitchen has only its eager backend")
    assert "emulates" not in (row.why_not(call) or "")
    kitchen = next(
        row
        for row in registry.registry.implementations("linear_faithful")
        if row.backend == "comfy_kitchen"
    )
    assert kitchen.emulated_from == (9, 0)


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
