"""Products of composite weights, and what the loader's ``matmul`` and ``backend`` inputs do."""

from __future__ import annotations

import citizens
import comfy.model_management as mm
import pytest
import torch
from comfy_extras.nodes_model_merging import save_checkpoint
from support import pack

FEW, MANY = 5, 48
MODES = ("int8", "uint8", "fp8", "fp16")


@pytest.fixture(autouse=True)
def as_nodes_run():
    """Inference mode from loading to running: the server runs every node so."""
    with torch.inference_mode():
        yield


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rows_apart():
    """Parts of one input width: ``[48 + 64 + 32 + 32 + 16, 96]``."""
    made = citizens.made
    return {
        "low rank": made(noise(48, 96, seed=1), "uint4", svd_rank=8),
        "int8": made(noise(64, 96, seed=2), "int8", group_size=-1),
        "fp8": made(noise(32, 96, seed=3), "float8_e4m3fn", group_size=-1),
        "rotated": made(noise(32, 96, seed=4), "int6", hadamard_group_size=32),
        "small": made(noise(16, 96, seed=5), "uint8"),
    }


def columns_apart():
    """Parts of one output width: ``[48, 96 + 160]``, a K-split."""
    made = citizens.made
    return {
        "attention": made(noise(48, 96, seed=6), "uint4", use_codebook=True),
        "mlp": made(noise(48, 160, seed=7), "int8", svd_rank=4, group_size=-1),
    }


def layer_of(parts, axis: int, matmul: str, dtype=torch.float32, wishes=None):
    """Our Linear over the composite, and its bias."""
    build = pack("loaders.layouts.composite").build
    wishes = wishes or {}
    weight = build([(name, part, wishes.get(name)) for name, part in parts.items()], dtype, axis)
    ops = pack("loaders.host.ops").make_ops(dtype, matmul)
    layer = ops.Linear(weight.shape[1], weight.shape[0])
    bias = noise(weight.shape[0], seed=8).to(dtype)
    layer.load_state_dict({"weight": weight, "bias": bias})
    return layer, bias


def by_hand(parts, axis: int, mode: str, x, bias):
    """The same product part by part with the reference kernels, joined in float32."""
    reference, kernels = pack("kernels.reference"), pack("kernels.registry")
    call_of = pack("loaders.layouts.dispatch").call_of
    outputs, start = [], 0
    for part in parts.values():
        piece = x
        if axis == 1:
            piece = x[..., start : start + part.spec.shape[1]]
            start += part.spec.shape[1]
        fits = kernels.MatmulShape().why_not(call_of(part.spec, x.device, x.dtype)) is None
        run = getattr(reference, f"linear_{mode}" if fits else "linear_dequantize")
        outputs.append(run(piece, part.tensors, part.spec, None).float())
    y = torch.cat(outputs, -1) if axis == 0 else sum(outputs)
    return y + bias.float()


CASES = pytest.mark.parametrize(
    ("make", "axis"), [(rows_apart, 0), (columns_apart, 1)], ids=["rows", "columns"]
)


@CASES
@pytest.mark.parametrize("rows", [FEW, MANY])
def test_a_composite_equals_the_float_product(make, axis, rows):
    parts = make()
    layer, bias = layer_of(parts, axis, "dequantize")
    weight = torch.cat([part.dequantize() for part in parts.values()], axis)
    x = noise(2, rows, weight.shape[1], seed=9)
    assert torch.equal(layer.weight.data.dequantize(), weight)
    wanted = torch.nn.functional.linear(x, weight, bias)
    assert citizens.error(layer(x), wanted) < 1e-6
    summed = [
        torch.nn.functional.linear(piece, part.dequantize())
        for piece, part in zip(
            x.split([p.spec.shape[1] for p in parts.values()], -1) if axis else [x] * len(parts),
            parts.values(),
            strict=True,
        )
    ]
    joined = sum(summed) if axis else torch.cat(summed, -1)
    assert citizens.error(layer(x), joined + bias) < 1e-5


@CASES
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_runs_each_part_as_its_own(make, axis, mode):
    parts = make()
    layer, bias = layer_of(parts, axis, mode)
    x = noise(2, MANY, layer.in_features, seed=10)
    found = layer(x)
    assert citizens.error(found, by_hand(parts, axis, mode, x, bias)) < 1e-6
    exact = layer_of(parts, axis, "dequantize")[0](x)
    assert 1e-6 < citizens.error(found, exact) < 0.1


@CASES
def test_half_precision_activations(make, axis):
    parts = make()
    layer, bias = layer_of(parts, axis, "int8", torch.bfloat16)
    x = noise(MANY, layer.in_features, seed=11).to(torch.bfloat16)
    found = layer(x)
    assert found.dtype == torch.bfloat16
    wanted = by_hand(parts, axis, "int8", x, bias)
    assert citizens.error(found.float(), wanted) < 0.01


#: Whether this processor has an int8 product; if not, ``auto`` dequantizes.
SUMS_INT8 = pack("kernels.registry").registry.backend_status("cpu")["torch"] is None


def test_faithful_asks_each_part_what_its_file_says():
    parts = rows_apart()
    wishes = {"int8": "int8", "fp8": "fp8"}
    layer, bias = layer_of(parts, 0, "faithful", wishes=wishes)
    x = noise(MANY, 96, seed=12)
    reference = pack("kernels.reference")
    wanted = [
        getattr(reference, f"linear_{wishes.get(name, 'dequantize')}")(x, part.tensors, part.spec)
        for name, part in parts.items()
    ]
    assert citizens.error(layer(x), torch.cat(wanted, -1) + bias) < 1e-6
    # ``auto`` does the wishes that something here is fast at, and leaves the others alone.
    automatic = layer_of(parts, 0, "auto", wishes=wishes)[0](x)
    fast = {"int8": "int8"} if SUMS_INT8 else {}
    assert torch.equal(automatic, layer_of(parts, 0, "faithful", wishes=fast)[0](x))


def test_too_small_a_part_says_why_it_dequantizes():
    decide = pack("loaders.layouts.dispatch").decide
    cpu = torch.device("cpu")
    part = rows_apart()["small"]
    decision = decide(part.spec, None, "int8", "auto", cpu, torch.float32)
    assert decision.mode == "dequantize"
    assert "16x96" in decision.reason and "32" in decision.reason
    part = rows_apart()["int8"]
    decision = decide(part.spec, "int8", "auto", "auto", cpu, torch.float32)
    assert decision.mode == ("int8" if SUMS_INT8 else "dequantize")
    told = decision.choice.describe() if SUMS_INT8 else decision.reason
    assert "comfy_kitchen" in told and "cuda" in told
    assert decide(part.spec, "int8", "faithful", "auto", cpu, torch.float32).mode == "int8"


# --------------------------------------------------------------------------------- whole models

WIDE = {"x": (1, 16, 12, 16), "context": (1, 40, 192)}


def wide(patcher) -> torch.Tensor:
    """A pass with enough rows for quantized products."""
    given = {name: noise(*shape, seed=13) for name, shape in WIDE.items()}
    return citizens.run(patcher, **given)


def test_modes_of_a_model_that_asks_for_int8():
    exact = wide(citizens.load("int8_mm", matmul="dequantize"))
    faithful = wide(citizens.load("int8_mm", matmul="faithful"))
    automatic = wide(citizens.load("int8_mm", matmul="auto"))
    assert torch.equal(automatic, faithful if SUMS_INT8 else exact)
    assert torch.equal(wide(citizens.load("int8_mm", matmul="int8")), faithful)
    errors = {"faithful": citizens.error(faithful, exact)}
    for mode in ("uint8", "fp8", "fp16"):
        errors[mode] = citizens.error(wide(citizens.load("int8_mm", matmul=mode)), exact)
    assert 1e-4 < errors["faithful"] < 0.05, errors
    assert 1e-4 < errors["uint8"] < 0.05, errors
    assert 1e-3 < errors["fp8"] < 0.2, errors
    assert 1e-7 < errors["fp16"] < 0.005, errors


def test_modes_of_a_model_that_asks_for_nothing():
    exact = wide(citizens.load("uint4", matmul="dequantize"))
    assert torch.equal(wide(citizens.load("uint4", matmul="auto")), exact)
    assert torch.equal(wide(citizens.load("uint4", matmul="faithful")), exact)
    assert 1e-4 < citizens.error(wide(citizens.load("uint4", matmul="int8")), exact) < 0.1


@pytest.mark.parametrize("case", ["uint4_had_svd", citizens.MIXED])
def test_expand_rounds_every_layer_to_dense_int8(case, tmp_path):
    ours = citizens.load(case)
    weights = citizens.floats(ours)
    expanded = citizens.load(case, matmul="expand")
    for name, module in citizens.layers(expanded).items():
        for part in module.weight._params.spec.parts:
            assert part.weight.format.name == "int8" and not part.weight.rank, name
        wanted = weights[f"{name}.weight"]
        step = wanted.abs().amax(dim=1, keepdim=True) / 127
        found = module.weight.data.dequantize()
        assert ((found - wanted).abs() <= step * 0.5001).all(), name
    assert 1e-4 < citizens.error(wide(expanded), wide(ours)) < 0.1
    # The same from a file that this pack saved, its composites of several parts included.
    save_checkpoint(ours, filename_prefix="saved", output_dir=str(tmp_path))
    mm.unload_model_and_clones(ours)
    (file,) = tmp_path.glob("*.safetensors")
    again = citizens.load(file, matmul="expand")
    for name, module in citizens.layers(again).items():
        mine = citizens.layers(expanded)[name]
        assert torch.equal(module.weight.data.dequantize(), mine.weight.data.dequantize()), name


def test_a_backend_that_is_not_there_is_an_error():
    error = pack("quant.errors").LowBitError
    status = pack("kernels.registry").registry.backend_status("cpu")
    absent = [name for name, reason in status.items() if reason]
    assert "nunchaku" in absent and "reference" not in absent
    for name in absent:
        with pytest.raises(error, match="backend") as caught:
            citizens.load("uint4", backend=name)
        assert name in caught.value.found and status[name] in caught.value.found
        assert "reference" in caught.value.expected


def test_the_reference_backend_can_be_forced():
    chosen = citizens.load("int8_mm", matmul="faithful", backend="reference")
    assert torch.equal(wide(chosen), wide(citizens.load("int8_mm", matmul="faithful")))
