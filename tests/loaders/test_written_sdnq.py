"""SDNQ folders that this pack writes, against those of the real package and in its own loader.

The package quantizes the same float model with the same settings: the files must hold the same
tensors, bit for bit where nothing is random. And the package opens ours.
"""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from support import oracle, pack, run_oracle

RANDOM = 0.01  # how far errors may lie apart where the package draws random numbers

SETTINGS = {
    "int8": {"weights_dtype": "int8"},
    "int8_rowwise": {"weights_dtype": "int8", "group_size": -1},
    "int8_mm": {"weights_dtype": "int8", "use_quantized_matmul": True},
    "uint8_mm": {"weights_dtype": "uint8", "use_quantized_matmul": True},
    "fp8_mm": {"weights_dtype": "fp8", "use_quantized_matmul": True},
    "uint4": {"weights_dtype": "uint4"},
    "uint4_g32": {"weights_dtype": "uint4", "group_size": 32},
    "uint4_mm": {"weights_dtype": "uint4", "use_quantized_matmul": True},
    "uint4_bf16": {"weights_dtype": "uint4", "dequantize_fp32": False},
    "uint4_tensor": {"weights_dtype": "uint4", "group_size": -2},
    "uint4_had": {"weights_dtype": "uint4", "use_hadamard": True},
    "uint4_cb": {"weights_dtype": "uint4", "use_codebook": True},
    "int5": {"weights_dtype": "int5"},
    "int6": {"weights_dtype": "int6"},
    "int7": {"weights_dtype": "int7"},
    "uint3": {"weights_dtype": "uint3"},
    "uint2": {"weights_dtype": "uint2"},
    "uint1": {"weights_dtype": "uint1"},
    "int12": {"weights_dtype": "int12"},
    "int16": {"weights_dtype": "int16"},
    "fp4": {"weights_dtype": "float4_e2m1fn"},
    "fp6": {"weights_dtype": "float6_e3m2fn"},
    "fp16": {"weights_dtype": "float16"},
    "dyn4": {
        "weights_dtype": "int4",
        "use_dynamic_quantization": True,
        "dynamic_loss_threshold": 8e-3,
    },
    "svd": {"weights_dtype": "uint4", "use_svd": True, "svd_rank": 16},
    "svd_mm": {
        "weights_dtype": "int8",
        "use_svd": True,
        "svd_rank": 16,
        "use_quantized_matmul": True,
    },
}
DRAWN = {"svd", "svd_mm"}


@pytest.fixture(scope="module")
def made():
    """Folder with the float model and the package's checkpoints of it."""
    return oracle("sdnq_written.py", "make", "flux", "256", json.dumps(SETTINGS, sort_keys=True))


@pytest.fixture(scope="module")
def ours(made, tmp_path_factory):
    """``ours(case)``: the folder that this pack writes."""
    target = tmp_path_factory.mktemp("written")

    def write(case: str):
        if not (target / case).exists():
            quantize(made / "float", target / case, SETTINGS[case])
        return target / case

    return write


def quantize(source, target, settings, container="sdnq", method="sdnq", **recipe):
    """Write ``source`` quantized; the report."""
    job = pack("loaders.quantize_file")
    floats = pack("loaders.float_model")
    containers = pack("loaders.writers").CONTAINERS
    plan = pack("loaders.plan").make_plan(source)
    try:
        made = pack("quant.recipe").Recipe.make(method, settings, **recipe)
        found = floats.FileFloats(plan)
        prepared = job.prepare(found, made, containers[container], config=plan.config)
        return prepared.run(target)
    finally:
        plan.source.close()


def tensors_of(folder):
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


@pytest.mark.parametrize("case", SETTINGS)
def test_files_hold_what_the_packages_hold(made, ours, case):
    theirs, found = tensors_of(made / case), tensors_of(ours(case))
    assert {k: (v.dtype, v.shape) for k, v in found.items()} == {
        k: (v.dtype, v.shape) for k, v in theirs.items()
    }
    for key, value in theirs.items():
        if case in DRAWN and key.rpartition(".")[2] != "bias":
            continue
        assert torch.equal(found[key].view(torch.uint8), value.view(torch.uint8)), key


@pytest.mark.parametrize("case", sorted(DRAWN))
def test_errors_of_low_rank_branches_are_the_packages(made, ours, case):
    make_plan = pack("loaders.plan").make_plan
    floats = pack("loaders.float_model").FileFloats
    plans = [make_plan(folder) for folder in (made / "float", made / case, ours(case))]
    source, theirs, found = map(floats, plans)
    errors = {}
    for key in found.lowbit:
        weight = source.read(key).float()
        expected = (theirs.read(key) - weight).norm() / weight.norm()
        errors[key] = (found.read(key) - weight).norm() / weight.norm(), expected
    for key, (error, expected) in errors.items():
        assert error < (1 + RANDOM) * expected, key
    ours_, theirs_ = (sum(pair[n] for pair in errors.values()) for n in (0, 1))
    assert abs(ours_ - theirs_) < RANDOM * theirs_
    for plan in plans:
        plan.source.close()


def test_the_package_opens_ours(made, ours, tmp_path):
    """Its own dequantization is ours, its other tensors are the model's."""
    folders = [str(ours(case)) for case in SETTINGS]
    run_oracle("sdnq_written.py", tmp_path, "open", "flux", *folders)
    make_plan = pack("loaders.plan").make_plan
    for case in SETTINGS:
        golden = load_file(tmp_path / f"{case}.safetensors")
        assert golden.pop("out").isfinite().all()
        plan = make_plan(ours(case))
        compared = 0
        for key, entry in plan.entries.items():
            value = entry.read()
            if isinstance(value, torch.Tensor):
                assert torch.equal(golden[key], value), (case, key)
                continue
            weight = value.dequantize()
            error = (weight - golden[key]).norm() / golden[key].norm()
            assert error < 1e-6, (case, key, error)
            compared += 1
        assert compared >= 19, case
        assert golden.keys() == plan.entries.keys()
        plan.source.close()
