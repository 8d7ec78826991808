"""Quantizing files: ComfyUI's own loader opens them, sources of any format, work that ends early.

How containers look inside is tested against their packages in ``test_written_*.py``.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support import ROOT, comfy_root, oracle, pack

sys.path.append(str(ROOT / "tests" / "host"))

from citizens import CASES

#: recipe -> whether ComfyUI rounds activations with it
NATIVE = {
    "fp8": ("fp8", {}, False),
    "fp8-e5m2": ("fp8", {"dtype": "float8_e5m2"}, False),
    "nvfp4": ("nvfp4", {}, False),
    "mxfp8": ("mxfp8", {}, False),
    "int8": ("int8", {}, True),
    "int8-tensor": ("int8", {"granularity": "tensor"}, True),
}
FORMATS = {
    "fp8": "float8_e4m3fn",
    "fp8-e5m2": "float8_e5m2",
    "nvfp4": "nvfp4",
    "mxfp8": "mxfp8",
    "int8": "int8_tensorwise",
    "int8-tensor": "int8_tensorwise",
}

# ComfyUI alone: its loader, its model, one forward.
STOCK = """
import json, sys
from comfy.cli_args import args
args.cpu = True
import comfy.model_management, comfy.sd, torch
from safetensors.torch import load_file, save_file
tests, inputs, out, *files = sys.argv[1:]
sys.path.append(tests)
from comfy_models import comfy_forward, run_inputs
given = run_inputs(load_file(inputs))
done = {}
with torch.inference_mode():
    for number, file in enumerate(files):
        patcher = comfy.sd.load_diffusion_model(file, {"dtype": torch.float32})
        comfy.model_management.load_models_gpu([patcher])
        model = patcher.model.diffusion_model
        done[f"{number}.out"] = comfy_forward("flux", model, dict(given)).float().contiguous()
        formats = sorted({m.quant_format for m in model.modules() if hasattr(m, "quant_format")})
        done[f"{number}.formats"] = torch.tensor(list(json.dumps(formats).encode()))
        dtype = patcher.model.manual_cast_dtype or patcher.model.get_dtype()
        assert dtype == torch.float32, dtype
        weights = {n: p for n, p in model.named_parameters() if hasattr(p, "dequantize")}
        for name in list(weights)[:3]:
            done[f"{number}.weight.{name}"] = weights[name].dequantize().float().contiguous()
assert not any("lowbit" in name.lower() for name in sys.modules), "the pack is loaded"
save_file(done, out)
"""


@pytest.fixture(scope="module")
def made():
    """Folder with a float model and its inputs."""
    return oracle("sdnq_models.py", "flux", "256", *CASES)


@pytest.fixture(scope="module")
def source(made, tmp_path_factory):
    """A float file with ComfyUI's names, bf16 for the most part."""
    plan = pack("loaders.plan").make_plan(made / "int8")
    floats = pack("loaders.float_model").FileFloats(plan)
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for key in floats.shapes:
        tensor = floats.read(key)
        if tensor.dim() == 2:  # values that no format holds by accident
            noise = torch.randn(tensor.shape, generator=generator)
            tensor = tensor.float() + 0.01 * tensor.float().std() * noise
        tensors[key] = tensor.to(torch.bfloat16).contiguous()
    plan.source.close()
    file = tmp_path_factory.mktemp("source") / "float.safetensors"
    save_file(tensors, file)
    return file


@pytest.fixture(scope="module")
def native(source, tmp_path_factory):
    """``{case: file in one of ComfyUI's formats}``."""
    folder = tmp_path_factory.mktemp("native")
    for case, (method, settings, _) in NATIVE.items():
        quantize(source, folder / f"{case}.safetensors", method, settings)
    return {case: folder / f"{case}.safetensors" for case in NATIVE}


def job_for(source, method, settings=None, container="comfy"):
    plan = pack("loaders.plan").make_plan(source)
    floats = pack("loaders.float_model").FileFloats(plan)
    recipe = pack("quant.recipe").Recipe.make(method, settings or {})
    containers = pack("loaders.writers").CONTAINERS
    job = pack("loaders.quantize_file").prepare(floats, recipe, containers[container])
    return plan, job


def quantize(source, target, method="fp8", settings=None, container="comfy", **how):
    plan, job = job_for(source, method, settings, container)
    with plan.source:
        return job.run(target, **how)


def floats_of(file):
    plan = pack("loaders.plan").make_plan(file)
    with plan.source:
        found = pack("loaders.float_model").FileFloats(plan)
        return {key: found.read(key).float() for key in found.shapes}, found.lowbit


def forward(weights, made):
    import comfy.model_management
    import comfy.sd
    from comfy_models import comfy_forward, run_inputs

    given = run_inputs(load_file(made / "int8.run.safetensors"))
    with torch.inference_mode():
        patcher = comfy.sd.load_diffusion_model_state_dict(
            dict(weights), {"dtype": torch.float32}, disable_dynamic=True
        )
        comfy.model_management.load_models_gpu([patcher])
        return comfy_forward("flux", patcher.model.diffusion_model, given).float()


@pytest.mark.both_hosts
def test_comfyui_alone_opens_its_own_formats(made, native, tmp_path):
    """No pack in the process: the loader's formats, its dequantized weights, its forward."""
    out = tmp_path / "out.safetensors"
    env = {**os.environ, "PYTHONPATH": str(comfy_root())}
    tests = str(ROOT / "tests")
    command = [sys.executable, "-P", "-c", STOCK, tests, str(made / "int8.run.safetensors")]
    run = subprocess.run(
        [*command, str(out), *map(str, native.values())],
        env=env, cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    done = load_file(out)
    for number, (case, file) in enumerate(native.items()):
        assert json.loads(bytes(done[f"{number}.formats"].tolist())) == [FORMATS[case]]
        weights, lowbit = floats_of(file)
        assert len(lowbit) > 20
        for key, theirs in done.items():
            if key.startswith(f"{number}.weight."):
                ours = weights[key.removeprefix(f"{number}.weight.")]
                assert torch.equal(ours, theirs), (case, key)
        expected = forward(weights, made)
        error = (done[f"{number}.out"] - expected).abs().max() / expected.abs().max()
        assert error < (0.05 if NATIVE[case][2] else 1e-5), (case, error)


# ------------------------------------------------------------------- sources in ComfyUI's formats


def host_weight(layout, shape, seed, **how):
    from comfy.quant_ops import QuantizedTensor

    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return QuantizedTensor.from_float(weight, layout, **how)


@pytest.mark.parametrize("rows", [64, 70])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("told", "layout", "how"),
    [
        ({"format": "float8_e4m3fn"}, "TensorCoreFP8E4M3Layout", {}),
        ({"format": "float8_e5m2"}, "TensorCoreFP8E5M2Layout", {}),
        ({"format": "nvfp4"}, "TensorCoreNVFP4Layout", {}),
        ({"format": "mxfp8"}, "TensorCoreMXFP8Layout", {}),
        ({"format": "int8_tensorwise"}, "TensorWiseINT8Layout", {}),
        ({"format": "int8_tensorwise"}, "TensorWiseINT8Layout", {"per_channel": True}),
        (
            {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 64},
            "TensorWiseINT8Layout",
            {"per_channel": True, "convrot": True, "convrot_groupsize": 64},
        ),
        (
            {"format": "int8_tensorwise", "params": {"convrot": True, "convrot_groupsize": 256}},
            "TensorWiseINT8Layout",
            {"per_channel": True, "convrot": True},
        ),
        (
            {"format": "convrot_w4a4", "convrot_groupsize": 64},
            "TensorCoreConvRotW4A4Layout",
            {"convrot_groupsize": 64},
        ),
    ],
)
@pytest.mark.parametrize("by", ["tensors", "metadata"])
def test_weights_are_what_the_host_dequantizes(tmp_path, told, layout, how, rows, seed, by):
    weight = host_weight(layout, (rows, 256), seed, **how)
    # names end as the host's own state dicts have them
    tensors = {
        f"some.layer.{key}": value.contiguous().clone()
        for key, value in weight.state_dict("weight").items()
    }
    for key, value in tensors.items():
        if value.dtype == torch.float8_e8m0fnu:
            tensors[key] = value.view(torch.uint8)
    tensors["some.layer.bias"] = torch.zeros(rows)
    tensors["norm.weight"] = torch.ones(8)
    metadata = {}
    if by == "tensors":
        text = json.dumps(told).encode()
        tensors["some.layer.comfy_quant"] = torch.tensor(list(text), dtype=torch.uint8)
    else:
        metadata = {"_quantization_metadata": json.dumps({"layers": {"some.layer": told}})}
    file = tmp_path / "host.safetensors"
    save_file(tensors, file, metadata)
    found, lowbit = floats_of(file)
    assert lowbit == {"some.layer.weight"}
    assert set(found) == {"some.layer.weight", "some.layer.bias", "norm.weight"}
    assert torch.equal(found["some.layer.weight"], weight.dequantize())


@pytest.mark.parametrize("full", [True, False])
def test_older_scaled_fp8_files(tmp_path, full):
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(1))
    scale = torch.tensor(0.013)
    codes = (weight / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    file = tmp_path / "old.safetensors"
    tensors = {
        "some.layer.weight": codes,
        "some.layer.scale_weight": scale,
        "some.layer.scale_input": torch.tensor(1.0),
        "some.norm.weight": torch.ones(8),
        "scaled_fp8": torch.zeros(2 if full else 1, dtype=torch.float8_e4m3fn),
    }
    save_file(tensors, file)
    found, lowbit = floats_of(file)
    assert lowbit == {"some.layer.weight"} and set(found) == {
        "some.layer.weight",
        "some.norm.weight",
    }
    assert torch.equal(found["some.layer.weight"], codes.float() * scale)


def test_smoothed_layers_are_read_with_their_smoothing(source, tmp_path):
    file = tmp_path / "awq.safetensors"
    quantize(source, file, "nvfp4", {"awq": True})
    found, _ = floats_of(file)
    floats = load_file(source)
    with safe_open(file, "pt") as opened:
        smoothed = [k for k in list(opened.keys()) if k.endswith(".pre_quant_scale")]
    assert len(smoothed) > 20
    for key in smoothed:
        name = key.replace("pre_quant_scale", "weight")
        error = (found[name] - floats[name].float()).norm() / floats[name].float().norm()
        assert error < 0.12, (name, error)


@pytest.mark.parametrize("case", ["fp8", "nvfp4", "mxfp8", "int8"])
def test_a_quantized_file_is_quantized_from_its_floats(native, source, tmp_path, case):
    """The same codes as from a file of the dequantized weights."""
    weights, lowbit = floats_of(native[case])
    plain = tmp_path / "plain.safetensors"
    kept = load_file(source)
    save_file(
        {k: v.to(torch.bfloat16) if k in lowbit else kept[k] for k, v in weights.items()}, plain
    )
    for origin, name in ((native[case], "one"), (plain, "other")):
        quantize(origin, tmp_path / f"{name}.safetensors", "sdnq", {"weights_dtype": "uint4"})
    same_files(tmp_path / "one.safetensors", tmp_path / "other.safetensors")


def test_a_format_that_is_not_known_is_one_clear_error(tmp_path):
    file = tmp_path / "new.safetensors"
    mark = torch.tensor(list(json.dumps({"format": "tomorrow"}).encode()), dtype=torch.uint8)
    save_file({"a.b.weight": torch.zeros(4, 4, dtype=torch.int8), "a.b.comfy_quant": mark}, file)
    with pytest.raises(pack("quant.errors").LowBitError, match="cannot dequantize") as error:
        floats_of(file)
    assert "tomorrow" in str(error.value) and "a.b" in str(error.value)


def same_files(one, other):
    with safe_open(one, "pt") as a, safe_open(other, "pt") as b:
        assert set(a.keys()) == set(b.keys())
        for key in list(a.keys()):
            x, y = a.get_tensor(key), b.get_tensor(key)
            assert x.dtype == y.dtype and x.shape == y.shape, key
            assert torch.equal(x.reshape(-1).view(torch.uint8), y.reshape(-1).view(torch.uint8)), (
                key
            )


# ------------------------------------------------------------------------- what a file tells


def test_report_and_recipe_lie_in_and_beside_the_file(native, source):
    import hashlib

    provenance = pack("loaders.provenance")
    report = json.loads(native["fp8"].with_suffix(".report.json").read_text("utf-8"))
    with safe_open(native["fp8"], "pt") as opened:
        told = json.loads(opened.metadata()["lowbit"])
        recipe = provenance.recipe_of(opened.metadata())
    assert told["source"]["name"] == source.name
    assert told["source"]["sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()
    assert recipe.method == "fp8" and report["recipe"] == recipe.to_json()
    assert set(told["error"]) == set(report["layers"]) and report["totals"]["layers"] > 20


@pytest.mark.parametrize("case", ["fp8", "nvfp4", "mxfp8", "int8"])
def test_a_dry_run_tells_the_sizes(native, source, case):
    method, settings, _ = NATIVE[case]
    plan, job = job_for(source, method, settings)
    with plan.source:
        planned = job.estimate().to_json()
    report = json.loads(native[case].with_suffix(".report.json").read_text("utf-8"))
    assert planned["dry"] and planned["totals"]["before"] == report["totals"]["before"]
    assert planned["totals"]["after"] == report["totals"]["after"]
    assert planned["kept"] == report["kept"]


# ----------------------------------------------------------------------------- ending early


@pytest.mark.parametrize("container", ["comfy", "sdnq"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_what_raises_leaves_nothing(source, tmp_path, container, error):
    before = source.read_bytes()
    for stop in random.Random(4).sample(range(50), 5):

        def progress(done, total, name, stop=stop):
            if done >= stop:
                raise error("stopped")

        with pytest.raises(error):
            quantize(source, tmp_path / "out", "sdnq", container=container, progress=progress)
        assert list(tmp_path.iterdir()) == []
    assert source.read_bytes() == before
    quantize(source, tmp_path / "out", "sdnq", container=container)
    assert (tmp_path / "out").exists()


KILLED = """
import os, signal, sys, time
from comfy.cli_args import args
args.cpu = True
sys.path.append(sys.argv[1])
from pathlib import Path
from test_quantize_file import quantize
source, target = map(Path, sys.argv[2:4])
for point in map(int, sys.argv[4:]):
    told, tell = os.pipe()
    child = os.fork()
    if not child:
        def progress(done, total, name):
            os.write(tell, b".")
            time.sleep(0.02)
        quantize(source, target, "sdnq", progress=progress, overwrite=True)
        os._exit(0)
    for _ in range(point + 1):
        os.read(told, 1)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    print("killed", point, flush=True)
    sys.stdin.readline()
"""


def killed_at(points, source, target):
    """Quantize in processes that are killed after so many layers, one after the other."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join((str(comfy_root()), str(ROOT / "tests")))}
    command = [sys.executable, "-P", "-c", KILLED, ROOT / "tests/loaders", source, target, *points]
    process = subprocess.Popen(
        list(map(str, command)), env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    for point in points:
        assert process.stdout.readline() == f"killed {point}\n"
        yield point
        process.stdin.write("next\n")
        process.stdin.flush()
    process.communicate()
    assert process.returncode == 0


def check_killed(count, source, folder):
    target = folder / "out.safetensors"
    before = source.read_bytes()
    whole = folder / "whole.safetensors"
    quantize(source, whole, "sdnq")
    points, early = random.Random(6).sample(range(45), count), 0
    for point in killed_at(points, source, target):
        left = list(folder.glob(".*.partial"))
        early += bool(left) and not target.exists()
        if target.exists():  # the kill came late
            same_files(target, whole)
        quantize(source, target, "sdnq", overwrite=True)  # takes over what was left behind
        same_files(target, whole)
        target.unlink()
        assert not list(folder.glob(".*")), point
    assert early > count // 2, f"killed in time {early} times of {count}"
    assert source.read_bytes() == before


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL")
def test_a_killed_writer_leaves_no_file(source, tmp_path):
    check_killed(5, source, tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="SIGKILL")
def test_a_writer_killed_at_fifty_points_leaves_no_file(source, tmp_path):
    check_killed(50, source, tmp_path)


def test_an_existing_file_is_replaced_only_by_a_whole_one(source, tmp_path):
    target = tmp_path / "out.safetensors"
    quantize(source, target, "sdnq")
    before = target.read_bytes()
    error = pack("quant.errors").LowBitError
    with pytest.raises(error, match="something of this name"):
        quantize(source, target, "fp8")

    def progress(done, total, name):
        if done > 30:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(source, target, "fp8", overwrite=True, progress=progress)
    assert target.read_bytes() == before
    quantize(source, target, "fp8", overwrite=True)
    assert target.read_bytes() != before


# ----------------------------------------------------------------------------------- memory

MEASURED = """
import resource, sys
from comfy.cli_args import args
args.cpu = True
import torch
torch.set_num_threads(2)
sys.path.append(sys.argv[1])
from pathlib import Path
from test_quantize_file import job_for
plan, job = job_for(Path(sys.argv[2]), sys.argv[4], {"weights_dtype": "uint4"})
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
peaks = []
def anonymous():
    found = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(found["RssAnon"].split()[0])
start = anonymous()
job.run(Path(sys.argv[3]), progress=lambda *_: peaks.append(anonymous()))
print(base, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, start, max(peaks))
"""


def measured(source, target):
    """Peak resident memory (KiB) with what was there before the work; and without mapped files."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join((str(comfy_root()), str(ROOT / "tests")))}
    command = [sys.executable, "-P", "-c", MEASURED, str(ROOT / "tests/loaders"), source, target]
    run = subprocess.run([*map(str, command), "sdnq"], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    return list(map(int, run.stdout.split()[-4:]))


def synthetic(file, blocks, width, hidden):
    """A file of equal blocks, written layer by layer."""
    generator = torch.Generator().manual_seed(0)
    up = torch.randn(hidden, width, generator=generator).to(torch.bfloat16)
    with pack("loaders.store").TensorFile(file) as opened:
        for number in range(blocks):
            opened.add(f"blocks.{number}.up.weight", up)
            opened.add(f"blocks.{number}.down.weight", up.view(width, hidden))
        opened.finish()


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_memory_is_that_of_a_layer(tmp_path):
    """28 layers of 8 MB: what is held at a time is far less than the 224 MB of the file."""
    synthetic(tmp_path / "big.safetensors", 14, 1024, 4096)
    base, mapped, start, peak = measured(tmp_path / "big.safetensors", tmp_path / "out.safetensors")
    assert peak - start < 100 * 1024, (start, peak)
    assert mapped - base < 120 * 1024, (base, mapped)  # pages of the source are let go, too


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_twelve_gigabytes_take_less_than_three(tmp_path):
    synthetic(tmp_path / "big.safetensors", 20, 6144, 24576)
    assert (tmp_path / "big.safetensors").stat().st_size > 12 * 10**9
    began = time.monotonic()
    _, peak, _, _ = measured(tmp_path / "big.safetensors", tmp_path / "out.safetensors")
    assert peak < 3 * 2**20, f"{peak / 2**20:.2f} GiB in {time.monotonic() - began:.0f} s"
