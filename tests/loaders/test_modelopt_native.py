"""ModelOpt layers in ComfyUI's own formats: which, and that no bit of them changes.

ComfyUI's own loader and layouts read them here; its FP8 and NVFP4 products need a GPU.
"""

from __future__ import annotations

import json

import pytest
import torch
from modelopt_cases import declaration, layer, write
from support import pack
from test_modelopt_reader import read, relative


@pytest.fixture(scope="module")
def made():
    """``make(folder, kind, *layers)``: a composite and the meaning of all its rows."""

    def make(folder, kind, *layers, shared=()):
        tensors, meanings = {}, []
        for number, (shape, options) in enumerate(layers):
            parts, meaning = layer(kind, shape, number, **options)
            for name in shared:
                parts[name] = tensors.get(f"l0.{name}", parts[name]).clone()
            tensors |= {f"l{number}.{name}": value for name, value in parts.items()}
            meanings.append(meaning)
        grouped = {
            f"l{number}": {
                key.partition(".")[2]: value
                for key, value in tensors.items()
                if key.startswith(f"l{number}.")
            }
            for number in range(len(layers))
        }
        algorithm = {"fp8": "FP8", "nvfp4": "NVFP4", "fp8-rows": "FP8_PER_CHANNEL_PER_TOKEN"}[kind]
        contents = read(write(folder, grouped, declaration(algorithm)))
        entries = [contents.entries[f"{name}.weight"] for name in grouped]
        composite = pack("loaders.layouts.composite")
        named = [(entry.key, entry.read(), entry.wish) for entry in entries]
        weight = composite.build(named, torch.float32)
        return weight, [part for entry in entries for part in entry.parts], meanings

    return make


def load(tensors, shape, dtype=torch.float32):
    """What ComfyUI's own Linear makes of a layer's tensors."""
    import comfy.ops

    linear = comfy.ops.mixed_precision_ops({}, dtype).Linear(shape[1], shape[0], bias=False)
    missing, unexpected = linear.load_state_dict(
        {key.removeprefix("a."): value for key, value in tensors.items()}, strict=False
    )
    assert not unexpected and not missing
    return linear


ACTS = {"input_scale": True, "bias": False}


def test_fp8_is_the_same_bits(made, tmp_path):
    weight, parts, (meaning,) = made(tmp_path, "fp8", ((48, 80), ACTS))
    native = pack("loaders.layouts.native").native_format(parts, "auto", "auto", (8, 9))
    assert native == "float8_e4m3fn"
    tensors = pack("loaders.host.compat").NATIVE[native]("a", weight)
    assert json.loads(bytes(tensors["a.comfy_quant"].tolist())) == {"format": native}
    linear = load(tensors, (48, 80))
    assert relative(linear.weight.dequantize(), meaning) <= 1e-6
    assert torch.equal(linear.weight._qdata.view(torch.uint8).view(-1), weight._qdata)
    assert float(linear.input_scale) == float(tensors["a.input_scale"]) > 0


@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("shape", [(128, 256), (96, 176), (50, 96)])
def test_nvfp4_is_the_same_bits(made, shape, smooth, tmp_path):
    weight, parts, (meaning,) = made(tmp_path, "nvfp4", (shape, {**ACTS, "smooth": smooth}))
    native = pack("loaders.layouts.native").native_format(parts, "auto", "auto", (10, 0))
    assert native == "nvfp4"
    tensors = pack("loaders.host.compat").NATIVE[native]("a", weight)
    import comfy.quant_ops

    if smooth and "pre_quant_scale" not in comfy.quant_ops.QUANT_ALGOS["nvfp4"]["parameters"]:
        assert tensors is None
        return
    linear = load(tensors, shape)
    padded = -(-shape[0] // 16) * 16  # what the host's products ask for
    assert tuple(linear.weight._qdata.shape) == (padded, shape[1] // 2)
    got = linear.weight.dequantize().double()
    if smooth:
        got = got * linear.pre_quant_scale.double()
    assert got.shape == shape and relative(got, meaning) <= 1e-6


def test_fused_nvfp4_of_common_scales(made, tmp_path):
    """As ModelOpt exports q, k and v; parts of other scales stay side by side."""
    layers = [((64, 128), ACTS), ((32, 128), ACTS)]
    shared = ("input_scale",)
    apart, parts, _ = made(tmp_path / "apart", "nvfp4", *layers, shared=shared)
    native = pack("loaders.layouts.native").native_format(parts, "auto", "auto", (10, 0))
    assert native == "nvfp4"
    compat = pack("loaders.host.compat")
    assert compat.nvfp4("a", apart) is None
    shared = ("input_scale", "weight_scale_2")
    weight, _, _ = made(tmp_path / "one", "nvfp4", *layers, shared=shared)
    linear = load(compat.nvfp4("a", weight), (96, 128))
    assert relative(linear.weight.dequantize(), weight.dequantize().double()) <= 1e-6


def test_fused_fp8_stays_in_parts(made, tmp_path):
    weight, _, _ = made(tmp_path, "fp8", ((32, 64), ACTS), ((32, 64), ACTS))
    assert pack("loaders.host.compat").float8_e4m3fn("a", weight) is None


@pytest.mark.parametrize(
    ("kind", "options", "matmul", "backend", "capability"),
    [
        ("fp8", ACTS, "auto", "auto", None),  # no CUDA
        ("fp8", ACTS, "auto", "auto", (8, 6)),
        ("nvfp4", ACTS, "auto", "auto", (9, 0)),
        ("fp8", ACTS, "dequantize", "auto", (9, 0)),
        ("fp8", ACTS, "int8", "auto", (9, 0)),
        ("fp8", ACTS, "auto", "reference", (9, 0)),
        ("fp8", {"bias": False}, "auto", "auto", (9, 0)),  # activations in 16 bits
        ("fp8", {**ACTS, "smooth": True}, "auto", "auto", (9, 0)),
        ("nvfp4", {**ACTS, "rank": 4}, "auto", "auto", (12, 0)),
        ("nvfp4", {"bias": False}, "auto", "auto", (12, 0)),
        ("fp8-rows", {"bias": False}, "auto", "auto", (9, 0)),
    ],
)
def test_what_is_not_handed_over(made, kind, options, matmul, backend, capability, tmp_path):
    _, parts, _ = made(tmp_path, kind, ((64, 128), options))
    native = pack("loaders.layouts.native").native_format
    assert native(parts, matmul, backend, capability) is None


def test_scales_of_rows_are_not_one_scale(made, tmp_path):
    """A file may have them beside an input_scale."""
    tensors, _ = layer("fp8-rows", (32, 64), **ACTS)
    entry = read(write(tmp_path, {"a": tensors})).entries["a.weight"]
    weight = pack("loaders.layouts.composite").build(
        [("a", entry.read(), entry.wish)], torch.float32
    )
    assert pack("loaders.host.compat").float8_e4m3fn("a", weight) is None
