"""Checkpoints of bitsandbytes, torchao and quanto, made by these packages, opened as MODELs.

Two measures for every case: each native weight equals the package's own float32 dequantization,
and the model's output equals diffusers' float run with those weights.
"""

from __future__ import annotations

import ast
import shutil
from functools import cache

import pytest
import torch
from comfy_models import comfy_forward, run_inputs
from safetensors.torch import load_file, save_file
from support import ORACLES, oracle, pack, run_oracle
from test_sdnq_models import expected_weights, native_tensor

WEIGHTS = 1e-6
OUTPUTS = 1e-5

#: what the weights of a case are in normal form
FORMATS = {
    "bnb_nf4": "nf4_bnb",
    "bnb_nf4_double": "nf4_bnb",
    "bnb_fp4": "fp4_bnb",
    "bnb_fp4_double": "fp4_bnb",
    "bnb_nf4_bf16_storage": "nf4_bnb",
    "bnb_int8": "int8",
    "torchao_int8": "int8",
    "torchao_int8_tensor": "int8",
    "torchao_int8_group": "int8",
    "torchao_int8_dynamic": "int8",
    "torchao_fp8": "float8_e4m3fn",
    "torchao_fp8_e5m2": "float8_e5m2",
    "torchao_int4_unpacked": "int4",
    "torchao_nvfp4": "float4_e2m1fn",
    "quanto_int8": "int8",
    "quanto_fp8": "float8_e4m3fn",
    "quanto_int4": "uint4",
    "quanto_int2": "uint2",
}
SCHEMES = {"bnb": "bitsandbytes", "torchao": "torchao", "quanto": "quanto"}
WISHES = {"torchao_int8_dynamic": "int8"}
PICKLE = "torchao_int8_pickle"


@cache
def case_names() -> tuple[str, ...]:
    """Names of ``CASES`` in the oracle script, which this interpreter cannot import."""
    tree = ast.parse((ORACLES / "others_files.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "CASES":
            return tuple(ast.literal_eval(key) for key in node.value.keys)
    raise AssertionError("others_files.py has no CASES")


@pytest.fixture(scope="module", autouse=True)
def host():
    return pack()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """``made(family)``: the folder with every case of it; gone after the module, for its size."""
    folders = {}

    def folder(family: str):
        if family not in folders:
            target = tmp_path_factory.mktemp(family)
            folders[family] = run_oracle("others_files.py", target, family, "all")
        return folders[family]

    yield folder
    for target in folders.values():
        shutil.rmtree(target)


def refused(path, *told: str, scheme: str = "auto") -> str:
    """The error that opening ``path`` gives, which must hold every text."""
    error = pack("quant.errors").LowBitError
    with pytest.raises(error) as caught:
        pack("loaders.plan").make_plan(path, scheme)
    message = str(caught.value)
    for text in told:
        assert text.lower() in message.lower(), message
    return message


def test_every_case_of_the_oracle_is_told_apart():
    assert {*FORMATS, PICKLE} == set(case_names())


@pytest.mark.parametrize("family", ["flux", "wan"])
@pytest.mark.parametrize("case", FORMATS)
def test_checkpoint_means_what_the_package_says(made, family, case):
    folder = made(family)
    api, plans = pack("loaders.host.api"), pack("loaders.plan")
    golden = load_file(folder / f"{case}.golden.safetensors")
    run = load_file(folder / f"{case}.run.safetensors")
    plan = plans.make_plan(folder / case, native_shapes=api.native_shapes)
    assert plan.detection.scheme == SCHEMES[case.partition("_")[0]]
    assert plan.family.name == family
    quantized = {entry.key: entry for entry in plan.quantized()}
    assert set(quantized) == set(golden)
    for key, entry in quantized.items():
        assert entry.shape == tuple(golden[key].shape), key
        assert (entry.dtype, entry.wish) == (FORMATS[case], WISHES.get(case)), key
        entry.read().check()
    options = {"matmul": "dequantize", "compute_dtype": "fp32"}
    patcher = api.load_diffusion_model(str(folder / case), options)
    model = patcher.model.diffusion_model
    low_bits = 0
    for key, expected in expected_weights(plan, golden):
        got, low_bit = native_tensor(model, key)
        assert got.shape == expected.shape, key
        error = (got - expected).abs().max() / expected.abs().max()
        assert error <= WEIGHTS, f"{key} differs by {error:.2e}"
        low_bits += low_bit
    assert low_bits >= len(golden) // 4  # three or four parts are fused into one at most
    out = comfy_forward(family, model, run_inputs(run))
    error = (out - run["out"]).abs().max() / run["out"].abs().max()
    assert error <= OUTPUTS, f"output differs by {error:.2e}"
    plan.source.close()


def test_codes_stay_in_the_pages_of_the_file(made):
    """A checkpoint of gigabytes costs no memory of its own for what is stored as it is used."""
    plan = pack("loaders.plan").make_plan(made("flux") / "bnb_nf4")
    for entry in plan.quantized():
        stored = plan.source.get(entry.key)
        assert entry.read().tensors["codes"].data_ptr() == stored.data_ptr()
    plan.source.close()


def test_pickled_files_are_refused_with_the_reason(made):
    message = refused(made("flux") / PICKLE, "pickle")
    assert "safetensors" in message


# ----------------------------------------------------------------------------- layers by themselves


@pytest.fixture(scope="module")
def layers():
    """``layers(package)``: the file, its contents as the scheme reads it, and the golden."""
    folder = oracle("others_layers.py")
    sources = []

    def opened(package: str):
        source = pack("loaders.source").open_source(folder / f"{package}.safetensors")
        sources.append(source)
        golden = load_file(folder / f"{package}.golden.safetensors")
        shapes = {key: tuple(value.shape) for key, value in golden.items()}
        read = pack(f"loaders.schemes.{package}").read
        return source, read, shapes, golden

    yield opened
    for source in sources:
        source.close()


@pytest.mark.parametrize("package", SCHEMES.values())
def test_layers_of_every_kind_mean_what_the_package_says(layers, package):
    source, read, shapes, golden = layers(package)
    assert pack("loaders.detect").detect_scheme(source).scheme == package
    entries = read(source, shapes.get).entries
    weights = {key: entry for key, entry in entries.items() if entry.parts}
    assert set(weights) == set(golden)
    for key, expected in golden.items():
        got = weights[key].read()
        got.check()
        value = got.dequantize()
        assert value.shape == expected.shape, key
        largest = expected.abs().amax(dim=1)  # rows differ by four orders of magnitude
        if "_tensor" in key:  # and have one scale
            largest = largest.max()
        error = (value - expected).abs().amax(dim=1) / largest.clamp_min(1e-30)
        assert error.max() <= WEIGHTS, f"{key}: {error.max():.2e}"


def test_rows_of_any_weight_can_be_taken_and_joined(layers):
    """Fused layers and row ranges: also where a block or a byte belongs to two rows."""
    take_rows, concat_rows = pack("quant.weight").take_rows, pack("quant.weight").concat_rows
    for package in SCHEMES.values():
        source, read, shapes, _ = layers(package)
        for key, entry in read(source, shapes.get).entries.items():
            if not entry.parts or entry.shape[0] < 2:
                continue
            whole = entry.read()
            cut = entry.shape[0] // 2
            parts = [take_rows(whole, 0, cut), take_rows(whole, cut, entry.shape[0] - cut)]
            expected = whole.dequantize()
            assert torch.equal(parts[0].dequantize(), expected[:cut]), key
            assert torch.equal(parts[1].dequantize(), expected[cut:]), key
            joined = concat_rows(parts)
            assert joined is not None and torch.equal(joined.dequantize(), expected), key


def test_shapes_of_packed_quanto_layers_come_from_bias_or_architecture(layers):
    source, read, _, golden = layers("quanto")
    alone = read(source).entries
    for key, expected in golden.items():
        told = alone[key].shape
        assert told == (tuple(expected.shape) if "_bias" in key else None), key
    error = pack("quant.errors").LowBitError
    with pytest.raises(error, match="architecture is unknown"):
        read(source, lambda key: None)


@pytest.mark.parametrize("name", ["nf4_bnb", "fp4_bnb"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_tables_round_to_the_nearest_value_and_back(name, seed):
    weights, dtypes = pack("quant.weight"), pack("quant.dtypes")
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(12, 192, generator=generator)
    made = weights.quantize(weight, name, group_size=64)
    made.check()
    scale = weight.view(12, 3, 64).abs().amax(dim=2, keepdim=True)
    table = torch.tensor(dtypes.get_format(name).values)
    distance = (weight.view(12, 3, 64, 1) / scale.unsqueeze(-1) - table).abs().amin(dim=-1)
    got = made.dequantize()
    off = (got - weight).abs().view(12, 3, 64) / scale
    assert torch.allclose(off, distance, atol=1e-6)
    again = weights.requantize_like(got, made.spec, made.tensors)
    assert torch.equal(weights.QuantizedWeight(made.spec, again).dequantize(), got)
    # Stochastic rounding is unbiased.
    mean = torch.zeros_like(weight)
    for number in range(1, 201):
        drawn = weights.requantize_like(weight, made.spec, made.tensors, stochastic_seed=number)
        mean += weights.QuantizedWeight(made.spec, drawn).dequantize() / 200
    assert (mean - weight).abs().mean() < 0.15 * (got - weight).abs().mean()


@pytest.mark.parametrize("name", ["nf4_bnb", "fp4_bnb"])
def test_tables_are_traced_and_exact(name):
    """torch.compile, embeddings and rows that end within a byte decode the same values."""
    reference, weights = pack("kernels.reference"), pack("quant.weight")
    fmt = pack("quant.dtypes").get_format(name)
    codes = torch.arange(256, dtype=torch.uint8)
    expected = torch.stack((codes >> 4, codes & 15), dim=1).reshape(-1).long()
    values = torch.tensor(fmt.values)
    assert torch.equal(reference.decode(codes, fmt, 512), values[expected])
    torch._dynamo.reset()
    traced = torch.compile(lambda c: reference.decode(c, fmt, 511), backend="eager", fullgraph=True)
    assert torch.equal(traced(codes), values[expected][:511])
    made = weights.quantize(torch.randn(9, 5), name, group_size=-1)
    picked = torch.tensor([8, 0, 3])
    rows = reference.dequantize_rows(made.tensors, made.spec, picked)
    assert torch.equal(rows, made.dequantize()[picked])


def test_a_file_with_comfyui_names_and_more_components_opens(made, tmp_path):
    """As single files are shared: everything under model.diffusion_model."""
    api = pack("loaders.host.api")
    golden = load_file(made("flux") / "bnb_nf4.golden.safetensors")
    plan = pack("loaders.plan").make_plan(made("flux") / "bnb_nf4")
    # Only layers that ComfyUI keeps single have one name in both spellings.
    single = {m.pieces[0].key: m.native for m in plan.moves if m.axis == "single"}
    stored = plan.source.tensors
    tensors = {}
    for key, native in single.items():
        for name in stored:
            if name == key or name.startswith(f"{key}."):
                tensors[f"model.diffusion_model.{native}{name[len(key) :]}"] = plan.source.get(name)
    for move in plan.moves:
        if move.axis != "single":
            pieces = [golden.get(p.key, None) for p in move.pieces]
            pieces = [
                plan.source.get(p.key) if t is None else t
                for p, t in zip(move.pieces, pieces, strict=True)
            ]
            tensors[f"model.diffusion_model.{move.native}"] = torch.cat(pieces).contiguous()
    beside = {"vae.decoder.conv_in.weight": torch.randn(4, 4, 3, 3)}
    for name in stored:
        if name.startswith("x_embedder.weight"):  # an encoder that is quantized as well
            beside[f"text_encoders.t5xxl.{name}"] = plan.source.get(name)
    tensors |= beside
    file = tmp_path / "flux-nf4.safetensors"
    save_file({name: value.clone() for name, value in tensors.items()}, file)
    patcher = api.load_diffusion_model(str(file), {"matmul": "dequantize", "compute_dtype": "fp32"})
    model = patcher.model.diffusion_model
    low_bits = 0
    for key, native in single.items():
        if key in golden:
            got, low_bit = native_tensor(model, native)
            error = (got - golden[key]).abs().max() / golden[key].abs().max()
            assert error <= WEIGHTS, native
            low_bits += low_bit
    assert low_bits > 10
    plan.source.close()


@pytest.mark.parametrize("package", SCHEMES.values())
def test_layers_survive_comfyuis_saved_form(layers, package):
    """Marker and memory of a composite give the same weight back."""
    composite = pack("loaders.layouts.composite")
    source, read, shapes, golden = layers(package)
    for key, entry in read(source, shapes.get).entries.items():
        if not entry.parts:
            continue
        weight = entry.read()
        built = composite.build([(key, weight, entry.wish)], torch.float32)
        spec = composite.from_json(composite.to_json(built._params.spec))
        assert spec == built._params.spec
        again = composite.dequantize(composite.held_by(built), spec, torch.float32)
        assert torch.equal(again, weight.dequantize()), key
        assert again.shape == golden[key].shape
