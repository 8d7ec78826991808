"""The benchmarks run, tell the truth about what is wrong or absent, and leave what they had."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch
from support import ROOT, comfy_root, pack

BENCHMARKS = ROOT / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import carry  # noqa: E402
import forms  # noqa: E402
import goals  # noqa: E402
import gpu  # noqa: E402
import layers  # noqa: E402
import page  # noqa: E402
import peers  # noqa: E402
import shapes  # noqa: E402
import timing  # noqa: E402


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# -------------------------------------------------------------------------------------- the data


@pytest.mark.parametrize("name", sorted(forms.FORMS))
def test_every_scheme_is_a_sound_weight_of_the_right_spread(name: str) -> None:
    form = forms.FORMS[name]
    for seed, (rows, columns) in enumerate(((96, 256), (33, 512))):
        weight = forms.weight_of(form, pack, rows, columns, "cpu", seed)
        branch = pack("kernels.reference").dequantize(weight.tensors, weight.spec, branch=False)
        assert branch.shape == (rows, columns) and torch.isfinite(branch).all()
        smooth = weight.tensors["smooth"].float() if form.smooth else 1.0
        assert 0.6 * forms.SPREAD < float((branch * smooth).std()) < 1.6 * forms.SPREAD
        assert abs(float(branch.mean())) < 0.3 * forms.SPREAD
        again = forms.weight_of(form, pack, rows, columns, "cpu", seed)
        other = forms.weight_of(form, pack, rows, columns, "cpu", seed + 7)
        assert torch.equal(again.dequantize(), weight.dequantize())
        assert not torch.equal(other.dequantize(), weight.dequantize())


def test_shapes_are_those_of_the_hosts_models() -> None:
    """FLUX.1's table against ComfyUI's own class."""
    import flux

    ours = {(layer.out, layer.inputs) for layer in shapes.MODELS["flux1"].layers}
    theirs = {
        shape
        for key, shape in flux.shapes_of(flux.Size(double=1, single=1)).items()
        if flux.quantized(key, shape)
    }
    assert ours == theirs
    for model in shapes.MODELS.values():
        assert all(layer.rows >= 1 and layer.count >= 1 for layer in model.layers)


# ------------------------------------------------------------------------------------- the times


class Scripted:
    """A contender whose times are given."""

    def __init__(self, *seconds: float | Exception) -> None:
        self.seconds, self.calls = list(seconds), 0

    def sample(self) -> float:
        found = self.seconds[min(self.calls, len(self.seconds) - 1)]
        self.calls += 1
        if isinstance(found, Exception):
            raise found
        return found

    def facts(self) -> dict:
        return {"calls": self.calls}


def test_ratios_are_of_the_same_round() -> None:
    """The machine gets twice as slow in the second round: the ratio does not see it."""
    found = timing.compete(
        {"float": Scripted(9, 2, 4, 2), "fast": Scripted(9, 1, 2, 1), "slow": Scripted(9, 4, 8, 5)},
        3,
        "float",
    )
    assert found["fast"]["ratio"] == found["fast"]["ratio_low"] == found["fast"]["ratio_high"] == 2
    assert (found["slow"]["ratio_low"], found["slow"]["ratio"]) == (0.4, 0.5)
    assert (found["float"]["us"], found["float"]["best_us"], found["float"]["worst_us"]) == (
        2e6,
        2e6,
        4e6,
    )
    assert found["float"]["calls"] == 4, "one round warms up"


def test_a_peer_that_fails_is_told_and_the_others_go_on() -> None:
    found = timing.compete(
        {"float": Scripted(1), "broken": Scripted(1, ValueError("no such\nkernel"))}, 2, "float"
    )
    assert found["broken"] == {"failed": "ValueError: no such"}
    assert found["float"]["ratio"] == 1
    with pytest.raises(ValueError, match="ours"):
        timing.compete({"float": Scripted(ValueError("ours"))}, 1, "float")


def test_a_local_call_is_really_timed() -> None:
    contender = timing.Local(lambda: time.sleep(0.02), "cpu")
    assert 0.02 <= contender.sample() < 0.5
    assert contender.facts()["first_s"] >= 0.02


# -------------------------------------------------------------------------- errors beside numbers


def test_a_wrong_result_is_called_wrong() -> None:
    torch.manual_seed(0)
    exact = torch.randn(40, 50).double()
    eager = (exact + 0.004 * torch.randn(40, 50)).float()
    for mode, limit in layers.WRONG.items():
        near = (eager + limit * 0.5 * torch.randn(40, 50)).float()
        far = (eager + limit * 3 * torch.randn(40, 50)).float()
        assert "wrong" not in layers.compared(near, eager, exact, mode)
        assert layers.compared(far, eager, exact, mode)["wrong"]
    poisoned = eager.clone()
    poisoned[3, 4] = float("nan")
    assert layers.compared(poisoned, eager, exact, "int8")["wrong"]
    assert layers.compared(eager.half(), eager, exact, "int8")["wrong"], "another dtype"
    # Otherwise rounded than the definition, but as near to the truth.
    noisy = (exact + 0.1 * torch.randn(40, 50)).float()
    other = (exact + 0.1 * torch.randn(40, 50)).float()
    assert layers.compared(noisy, other, exact, "int8")["differs"] > 0.1
    assert "wrong" not in layers.compared(noisy, other, exact, "int8")


def wanted(**changes) -> layers.Wanted:
    base = {
        "device": "cpu",
        "rounds": 1,
        "forms": ("int8",),
        "layers": ("img proj",),
        "rows": (40,),
        "shrink": 24,
        "sides": ("ours", "eager", "no triton"),
        "limits": {"copy": 10.0, "bf16": 0.1, "int8": 0.2},
    }
    return layers.Wanted(**base | changes)


def test_a_layer_row_tells_all() -> None:
    kept: list[int] = []
    with torch.inference_mode():
        rows = layers.measure(wanted(), pack, lambda found: kept.append(len(found)))
    assert kept == [len(rows)]
    told = {(row["side"], row["mode"]): row for row in rows}
    product = told["ours", "int8"]
    assert (product["m"], product["n"], product["k"]) == (40, 128, 128)
    assert product["us"] > 0 and product["ratio_low"] <= product["ratio"] <= product["ratio_high"]
    assert 1e-3 < product["error"] < 0.05 and "wrong" not in product
    assert "int8" in product["kernel"]
    moved = 128 * 128 + 128 * 4 + 2 * (40 * 128 + 128 + 40 * 128)
    assert product["bytes"] == moved
    assert product["copy"] == pytest.approx(moved / (product["us"] / 1e6) / 1e10)
    flops = 2 * 40 * 128 * 128
    assert product["compute"] == pytest.approx(flops / (product["us"] / 1e6) / 0.2e12)
    assert told["float", "float"]["bytes"] == 2 * (128 * 128 + 40 * 128 + 128 + 40 * 128)
    assert told["ours", "unpack"]["bytes"] == 128 * 128 + 128 * 4 + 2 * 128 * 128
    assert told["no triton", "int8"].keys() & {"us", "same_as"}


def test_no_time_left_is_said() -> None:
    rows = layers.measure(wanted(deadline=time.monotonic() - 1), pack, lambda found: None)
    assert rows == [{"stopped": "no time left before img proj, int8"}]


def test_a_side_that_is_not_there_is_a_row_with_the_reason() -> None:
    found = peers.Peers("cpu", 1)
    try:
        with pytest.raises(peers.AbsentError, match="measured on GPUs only"):
            found.contender("scaled_mm", {}, (32, 64, 64), "bf16")
        with pytest.raises(peers.AbsentError, match="nunchaku is not installed"):
            found.contender("nunchaku", {"precision": "int4", "rank": 32}, (32, 64, 64), "bf16")
    finally:
        found.close()


def test_the_packages_own_layer_is_timed_in_its_own_process() -> None:
    found = peers.Peers("cpu", 1)
    try:
        contender = found.contender("sdnq", {"weights_dtype": "int8"}, (32, 64, 64), "fp32")
        assert 0 < contender.sample() < 5
        assert contender.facts()["first_s"] > 0
        with pytest.raises(peers.AbsentError, match="Error"):
            found.contender("sdnq", {"weights_dtype": "int99"}, (32, 64, 64), "fp32")
        # Several at once, each its own; a slow one is ended, and the others say so.
        larger = found.contender("sdnq", {"weights_dtype": "int8"}, (4096, 512, 512), "fp32")
        assert larger.number == contender.number + 1
        assert contender.sample() < larger.sample()
        found.patience = 0.0
        with pytest.raises(RuntimeError, match="no answer within 0 s"):
            larger.sample()
        found.patience = 60.0
        with pytest.raises(RuntimeError, match="ended by another layer"):
            contender.sample()
    finally:
        found.close()


# ------------------------------------------------------------------------------- goals and pages


def layer_row(form: str, mode: str, m: int, us: float, side: str = "ours", **more) -> dict:
    ratio = 100 / us
    return {
        "model": "flux1",
        "layer": "img proj",
        "m": m,
        "n": 3072,
        "k": 3072,
        "dtype": "bf16",
        "form": form,
        "mode": mode,
        "side": side,
        "us": us,
        "ratio": ratio,
        "ratio_low": ratio * 0.99,
        "ratio_high": ratio * 1.01,
        "bytes": 1e6,
        **more,
    }


def test_goals_look_at_the_worst_row() -> None:
    rows = [
        layer_row("int8", "int8", 4608, 50),
        layer_row("int8", "int8", 4608, 80),
        layer_row("fp8", "fp8", 4608, 50),
        layer_row("fp8", "fp8", 4608, 49, "torchao", settings={"kind": "fp8row"}),
        layer_row("uint4", "dequantize", 16, 30),
        layer_row("uint4", "dequantize", 64, 500),
        layer_row("uint4", "unpack", 4608, 20, copy=0.81),
        layer_row("int8", "int8", 4608, 60, "sdnq"),
    ]
    told = {row["goal"]: row for row in goals.judge(rows)}
    assert told["INT8 W8A8"]["met"] is False and told["INT8 W8A8"]["found"] == 1.25
    assert told["FP8 W8A8, activations quantized"]["met"] is True
    assert told["FP8 beside the best other caller"]["found"] == 0.98
    assert told["uint4 weight-only, up to 16 rows"]["met"] is True, "64 rows are another goal's"
    assert told["unpacking uint4, of copy bandwidth"]["met"] is True
    assert told["beside the sdnq package"]["met"] is False
    assert told["uint4 in int8"]["met"] is None, "not measured is not met"


def test_the_page_shows_losses_failures_and_absence(tmp_path: Path) -> None:
    rows = [
        layer_row("int8", "float", 512, 100, "float", error=0.002),
        layer_row("int8", "int8", 512, 50, error=0.01, copy=0.4, compute=0.5),
        layer_row("uint4", "int8", 512, 40, wrong=True, error=1.0),
        layer_row("uint4", "dequantize", 512, 400, "no triton", error=0.002),
        layer_row("fp8", "fp8", 512, 90, ratio_low=0.5),
        {**layer_row("fp8", "fp8", 512, 1, "gemlite"), "absent": "gemlite is not installed"},
    ]
    del rows[-1]["us"]
    results = {
        "device": "cpu",
        "device_name": "A Processor",
        "cores": 2,
        "python": "3.11.0",
        "torch": "2.11.0",
        "load_average": 7.5,
        "rows": rows,
    }
    folder = tmp_path / "device"
    folder.mkdir()
    (folder / "layers.json").write_text(json.dumps(results))
    page.main([str(folder)])
    text = (folder / "README.md").read_text("utf-8")
    assert "| SDNQ int8 | int8 | ours | 50 | 2.00 (1.98-2.02) | 0.01 |" in text
    assert "| FAIL |" in text and "~1.11 (0.50-1.12)" in text
    assert "4.0 times the time of the float product" in text
    assert "- gemlite, fp8, fp8: gemlite is not installed" in text
    assert "The machine was busy" in text and "torch 2.11.0" in text
    from PIL import Image

    with Image.open(folder / "layers.png") as picture:
        colours = picture.convert("RGB").getcolors(1 << 20)
        assert picture.width == 1024 and len(colours) > 20


# ----------------------------------------------------------------------------- one call on a GPU


def test_the_stages_fit_the_call() -> None:
    assert sum(stage.seconds for stage in gpu.STAGES) <= 640, "limits shrink to what is left"
    names = [stage.name for stage in gpu.STAGES]
    assert len(set(names)) == len(names)
    assert set(gpu.SMOKE) <= set(names)


def test_a_stage_that_hangs_is_ended_and_its_results_are_kept(tmp_path: Path) -> None:
    stage = gpu.Stage("slow", 1.0, ("slow",))
    script = tmp_path / "run.py"
    script.write_text(
        "import json, pathlib, sys, time\n"
        "out = pathlib.Path(sys.argv[sys.argv.index('--out') + 1])\n"
        "(out / 'slow.json').write_text(json.dumps({'rows': [1]}))\n"
        "print('so far', flush=True)\ntime.sleep(60)\n"
    )
    before, gpu.HERE = gpu.HERE, tmp_path
    try:
        told = gpu.run(stage, 3.0, tmp_path, False, dict(os.environ))
    finally:
        gpu.HERE = before
    assert told["status"] == "killed at its limit" and told["seconds"] < 20
    assert told["results"] == {"rows": [1]} and "so far" in told["log"]


def test_the_archive_holds_a_host_and_leaves_out_what_is_large(tmp_path: Path) -> None:
    import zipfile

    wheel = tmp_path / "some_package-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as zipped:
        zipped.writestr("some_package/__init__.py", "there = True\n")
        zipped.writestr("some_package/backends/hip/_C.abi3.so", "x" * 1000)
        zipped.writestr("some_package/backends/cuda/_C.abi3.so", "y" * 1000)
    archive = tmp_path / "host.tar.xz"
    carry.write(archive, comfy_root(), [wheel])
    assert archive.stat().st_size < 8 << 20
    with tarfile.open(archive) as tar:
        names = set(tar.getnames())
        tar.extractall(tmp_path / "there", filter="data")
    assert "site/some_package/backends/cuda/_C.abi3.so" in names
    assert not any("backends/hip" in name or "__pycache__" in name for name in names)
    assert {"comfyui/nodes.py", "comfyui/comfy/sd.py", "comfyui/comfyui_version.py"} <= names
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    env["PYTHONPATH"] = os.pathsep.join(str(tmp_path / "there" / n) for n in ("comfyui", "site"))
    code = (
        "import sys; sys.path[:] = [p for p in sys.path if p]\n"
        "import av, some_package, comfyui_version\n"
        "from av.container import InputContainer\n"
        "from av.subtitles.stream import SubtitleStream\n"
        "from av.video.reformatter import ColorRange\n"
        "assert av.VideoFrame.__doc__ == 'Any class of PyAV.'\n"
        "assert 'there' in comfyui_version.__file__"
    )
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.slow
def test_every_stage_runs_in_one_call(tmp_path: Path) -> None:
    """What runs on a lent GPU, in its small form."""
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--smoke", "--out", str(tmp_path)]
    command += ["--seconds", "1500"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    told = json.loads((tmp_path / "gpu.json").read_text("utf-8"))["stages"]
    assert list(told) == [stage.name for stage in gpu.STAGES]
    for stage in gpu.STAGES:
        assert told[stage.name]["status"] == 0
        if stage.arguments:
            assert told[stage.name]["results"]["rows"], stage.name
            assert told[stage.name]["results"]["device"] == "cpu"


def test_limits_and_layers_run_from_the_command_line(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--smoke", "--out", str(tmp_path)]
    command += ["--only", "limits,layers"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    told = json.loads((tmp_path / "gpu.json").read_text("utf-8"))["stages"]
    limits = {row["limit"]: row for row in told["limits"]["results"]["rows"]}
    assert {"copy", "fp32", "bf16", "int8", "fp8"} <= limits.keys()
    assert all(row.get("value", 1) > 0 for row in limits.values())
    rows = told["layers"]["results"]["rows"]
    assert any(row["side"] == "ours" and "copy" in row for row in rows), "shares of the limits"
    text = json.dumps(told)
    assert str(ROOT) not in text and str(Path.home()) not in text
    assert "not measured" in run.stdout, "goals of a GPU are open"
