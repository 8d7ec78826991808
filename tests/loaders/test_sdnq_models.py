"""Whole SDNQ checkpoints of the real package, opened as MODELs by the real ComfyUI.

Two measures for every storage case: each native weight equals the package's own float32
dequantization, and the model's output equals diffusers' float run with those weights.
"""

from __future__ import annotations

import ast
import json
import shutil
from functools import cache
from pathlib import Path

import pytest
from comfy_models import comfy_forward, run_inputs
from safetensors.torch import load_file
from support import ORACLES, pack, run_oracle

WEIGHTS = 1e-6
OUTPUTS = 1e-5
WIDTH = "256"
CHUNK = 55  # cases made by one run of the oracle; their goldens take 26 MB each until compared


@cache
def case_names() -> tuple[str, ...]:
    """Names of ``CASES`` in the oracle script, which this interpreter cannot import."""
    tree = ast.parse((ORACLES / "sdnq_models.py").read_text(encoding="utf-8"))
    tables = {
        node.targets[0].id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    names = [
        f"{sign}int{bits}" for bits in range(1, 17) for sign in ("", "u") if (sign, bits) != ("", 1)
    ]
    names += ast.literal_eval(tables["FLOATS"].generators[0].iter)
    return (*names, *(ast.literal_eval(key) for key in tables["VARIANTS"].keys))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """``made(family, case)``: the folder that holds a case, made with its neighbours."""
    folders: dict[tuple[str, int], Path] = {}

    def folder(family: str, case: str) -> Path:
        number = case_names().index(case) // CHUNK
        if (family, number) not in folders:
            for old in folders.values():
                shutil.rmtree(old, ignore_errors=True)
            target = tmp_path_factory.mktemp(f"{family}-{number}")
            chunk = case_names()[number * CHUNK : (number + 1) * CHUNK]
            run_oracle("sdnq_models.py", target, family, WIDTH, *chunk)
            assert json.loads((target / "cases.json").read_text()) == list(chunk)
            folders[family, number] = target
        return folders[family, number]

    yield folder
    for old in folders.values():
        shutil.rmtree(old, ignore_errors=True)


def expected_weights(plan, golden):
    """Native tensors in float32, assembled by the family's moves from the goldens."""
    translate = pack("loaders.translate")
    for move in plan.moves:
        pieces = []
        for piece in move.pieces:
            tensor = golden.get(piece.key)
            if tensor is None:
                tensor = plan.source.get(piece.key).float()
            pieces.append(translate._float_piece(piece, tensor))
        yield move.native, translate._plain(move, pieces)


def native_tensor(model, key):
    """A parameter of the native model in float32, dequantized where it is low-bit."""
    module, _, name = key.rpartition(".")
    tensor = getattr(model.get_submodule(module), name)
    quantized = hasattr(tensor, "_layout_cls")
    return (tensor.dequantize() if quantized else tensor).float(), quantized


@pytest.mark.parametrize("case", case_names())
@pytest.mark.parametrize("family", ["flux", "flux2"])
def test_checkpoint_means_what_the_package_says(made, family, case):
    folder = made(family, case)
    api, plans = pack("loaders.host.api"), pack("loaders.plan")
    golden = load_file(folder / f"{case}.golden.safetensors")
    run = load_file(folder / f"{case}.run.safetensors")
    options = {"matmul": "dequantize", "compute_dtype": "fp32"}
    patcher = api.load_diffusion_model(str(folder / case), options)
    model = patcher.model.diffusion_model
    plan = plans.make_plan(folder / case, native_shapes=api.native_shapes)
    quantized = 0
    for key, expected in expected_weights(plan, golden):
        got, low_bit = native_tensor(model, key)
        assert got.shape == expected.shape, key
        error = (got - expected).abs().max() / expected.abs().max()
        assert error <= WEIGHTS, f"{key} differs by {error:.2e}"
        quantized += low_bit
    assert quantized >= len(golden) // 4  # three or four parts are fused into one at most
    out = comfy_forward(family, model, run_inputs(run))
    error = (out - run["out"]).abs().max() / run["out"].abs().max()
    assert error <= OUTPUTS, f"output differs by {error:.2e}"
    plan.source.close()
    (folder / f"{case}.golden.safetensors").unlink()
