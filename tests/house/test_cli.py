"""The pack's work from a terminal, as a user starts it: from ComfyUI's folder, by its name."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support import ROOT, comfy_root, pack

NAME = "custom_nodes.comfyui-lowbit.cli"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with custom_nodes in it, in which ComfyUI is importable."""
    base = tmp_path_factory.mktemp("comfy")
    (base / "custom_nodes").mkdir()
    (base / "custom_nodes" / "comfyui-lowbit").symlink_to(ROOT, target_is_directory=True)
    return base


@pytest.fixture(scope="module")
def model(folder):
    """A small file whose names are of no known family."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"blocks.{number}.{name}.weight": torch.randn(shape, generator=generator)
        for number in range(3)
        for name, shape in (("up", (512, 256)), ("down", (256, 512)))
    }
    tensors["norm.weight"] = torch.ones(256)
    file = folder / "model.safetensors"
    save_file({k: v.to(torch.bfloat16) for k, v in tensors.items()}, file)
    return file


def command(*arguments):
    return [sys.executable, "-m", NAME, *map(str, arguments)]


def started(folder, *arguments, **how):
    env = {**os.environ, "PYTHONPATH": str(comfy_root())}
    return subprocess.Popen(
        command(*arguments), cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, **how,
    )  # fmt: skip


def ran(folder, *arguments):
    process = started(folder, *arguments)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def here(capsys, *arguments):
    """The same in this process: exit code, output, errors."""
    try:
        code = pack("cli").main(list(map(str, arguments)))
    except SystemExit as end:
        code = end.code
    told = capsys.readouterr()
    return code, told.out, told.err


def test_a_file_is_quantized_from_comfyuis_folder(folder, model, tmp_path):
    target = tmp_path / "out.safetensors"
    code, out, err = ran(
        folder, "quantize", "sdnq", model, target, "--weights-dtype", "uint4", "--keep",
        "blocks.0.up", "--chart", tmp_path / "chart.png",
    )  # fmt: skip
    assert code == 0, err
    assert "5 layers" in out and "1 kept" in out
    assert "0 of 7" in err and "7 of 7: done" in err  # progress, without a terminal
    assert (tmp_path / "chart.png").stat().st_size > 1000
    with safe_open(target, "pt") as opened:
        assert {"blocks.0.up.weight", "blocks.1.up.comfy_quant"} <= set(opened.keys())
    assert "comfyui" not in err.lower()


def test_every_setting_is_a_flag(capsys):
    """And its JSON is the recipe's."""
    recipe = pack("quant.recipe")
    for method, about in recipe.METHODS.items():
        code, out, _ = here(capsys, "recipe", method, "--help")
        assert code == 0
        for name in (*about.settings, *recipe.REFINEMENTS):
            assert f"--{name.replace('_', '-')}" in out, (method, name)
        code, out, _ = here(capsys, "recipe", method)
        assert code == 0
        assert recipe.Recipe.from_json(out) == recipe.Recipe.make(method)
    code, out, _ = here(
        capsys, "recipe", "sdnq", "--weights-dtype", "int5", "--group-size", "-1", "--use-svd",
        "--no-dequantize-fp32", "--dynamic-loss-threshold", "0.01", "--scale-dtype", "none",
        "--scale-search", "5", "--keep", "a.*", "--keep", "!b", "--override", "c.* = fp8",
    )  # fmt: skip
    assert code == 0
    assert recipe.Recipe.from_json(out) == recipe.Recipe.make(
        "sdnq",
        {
            "weights_dtype": "int5",
            "group_size": -1,
            "use_svd": True,
            "dequantize_fp32": False,
            "dynamic_loss_threshold": 0.01,
        },
        keep=("a.*", "!b"),
        overrides=recipe.parse_overrides("c.* = fp8", "sdnq"),
        refine={"scale_search": 5},
    )


def test_recipes_come_from_files_and_of_quantized_ones(capsys, model, tmp_path):
    _, text, _ = here(capsys, "recipe", "int4", "--group-size", "64")
    (tmp_path / "recipe.json").write_text(text, encoding="utf-8")
    target = tmp_path / "out.safetensors"
    code, _, err = here(
        capsys, "quantize", "recipe", model, target, "--recipe", tmp_path / "recipe.json"
    )
    assert code == 0, err
    assert here(capsys, "recipe", "of", target)[:2] == (0, text)
    code, out, err = here(capsys, "recipe", "of", model)
    assert (code, out) == (1, "") and "does not tell" in err


def test_a_dry_run_writes_nothing(capsys, model, tmp_path):
    code, out, _ = here(capsys, "quantize", "fp8", model, tmp_path / "out", "--dry-run", "--json")
    assert code == 0 and json.loads(out)["dry"] and json.loads(out)["totals"]["layers"] == 6
    assert list(tmp_path.iterdir()) == []


def test_convert_keeps_every_bit(capsys, model, tmp_path):
    """From another scheme's names and forms; here from a folder that this pack wrote."""
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    settings = ["--weights-dtype", "uint4", "--use-svd"]
    assert here(capsys, "quantize", "sdnq", model, first, *settings)[0] == 0
    code, out, err = here(capsys, "convert", first, second)
    assert (code, out) == (0, f"{second}\n"), err
    one, other = load_file(first), load_file(second)
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert torch.equal(value.view(torch.uint8), other[key].view(torch.uint8)), key
    assert here(capsys, "recipe", "of", second)[0] == 0


def test_inspect_tells_what_a_file_is(capsys, model, tmp_path):
    target = tmp_path / "out.safetensors"
    assert here(capsys, "quantize", "sdnq", model, target)[0] == 0
    code, out, _ = here(capsys, "inspect", target)
    assert code == 0 and "scheme: lowbit" in out and "int8" in out
    code, out, _ = here(capsys, "inspect", target, "--json")
    assert code == 0 and json.loads(out)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("quantize", "sdnq", "nowhere.safetensors", "out"), 1, "nowhere.safetensors"),
        (("quantize", "fp8", "{model}", "{model}"), 1, "something of this name"),
        (("quantize", "svdquant", "{model}", "out", "--container", "sdnq"), 1, ""),
        (("quantize", "fp8", "{model}", "out", "--granularity", "cell"), 2, "one of tensor, row"),
        (("quantize", "sdnq", "{model}", "out", "--weights-dtype", "int99"), 2, "number format"),
        (("quantize", "best", "{model}", "out"), 2, "invalid choice"),
        (("recipe", "sdnq", "--override", "nonsense"), 1, "An override is no pattern"),
        ((), 2, "required"),
    ],
)
def test_errors_are_told_and_end_with_a_code(
    capsys, model, tmp_path, monkeypatch, arguments, code, said
):
    monkeypatch.chdir(tmp_path)
    found, out, err = here(capsys, *(a.replace("{model}", str(model)) for a in arguments))
    assert (found, out) == (code, "") and said in err and "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT")
def test_ctrl_c_leaves_nothing(folder, model, tmp_path):
    process = started(
        folder, "quantize", "sdnq", model, tmp_path / "out.safetensors", "--weights-dtype",
        "uint4", "--use-svd", "--svd-steps", "100", "--scale-search", "200", "--use-codebook",
        "--codebook-steps", "1000",
    )  # fmt: skip
    line = process.stderr.readline()
    while "of 7" not in line:
        assert line, "it ended by itself"
        line = process.stderr.readline()
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted" in err and "Traceback" not in err
    assert list(tmp_path.iterdir()) == []
