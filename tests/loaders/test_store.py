"""Files that are written tensor by tensor: whole or not there, whatever happens."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import safetensors
import safetensors.torch
import torch
from support import ROOT, pack

store = pack("loaders.store")
LowBitError = pack("quant.errors").LowBitError
open_source = pack("loaders.source").open_source

DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.bool,
)


def tensors_of(seed: int, count: int = 40) -> dict[str, torch.Tensor]:
    """Tensors of every dtype and of odd shapes, scalars and empty ones among them."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    made = {}
    for number in range(count):
        shape = [rng.choice((0, 1, 3, 7, 16, 65)) for _ in range(rng.randrange(4))]
        dtype = DTYPES[number % len(DTYPES)]
        made[f"blocks.{number}.weight"] = (torch.randn(shape) * 10).to(dtype)
    return made


def same(path, expected: dict[str, torch.Tensor]) -> None:
    found = safetensors.torch.load_file(path)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
        assert (
            found[name]
            .reshape(-1)
            .view(torch.uint8)
            .equal(tensor.contiguous().reshape(-1).view(torch.uint8))
        ), name


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("entries", [0, 1024])
def test_the_official_reader_and_ours_read_it(tmp_path, seed, entries):
    """With room for the header, and where it grew beyond its room."""
    tensors = tensors_of(seed)
    target = tmp_path / "model.safetensors"
    with store.TensorFile(target, entries=entries, metadata_bytes=0) as file:
        for name, tensor in tensors.items():
            file.add(name, tensor)
        assert not target.exists()
        assert file.nbytes == sum(tensor.nbytes for tensor in tensors.values())
        assert set(file.names) == set(tensors)
        file.finish({"recipe": "é" * 5000})
    assert os.listdir(tmp_path) == ["model.safetensors"]
    same(target, tensors)
    with safetensors.safe_open(target, "pt") as found:
        assert found.metadata() == {"recipe": "é" * 5000}
    with open_source(target) as source:
        for name, tensor in tensors.items():
            info = source.tensors[name]
            assert info.start % tensor.itemsize == 0
            assert source.get(name).to(torch.float32).equal(tensor.to(torch.float32))


def test_a_large_file_moves_whole_behind_a_larger_header(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "CHUNK", 1000)
    tensors = {f"{n}": torch.randn(n + 1, 8) for n in range(60)}
    with store.TensorFile(tmp_path / "a.safetensors", entries=0, metadata_bytes=0) as file:
        for name, tensor in tensors.items():
            file.add(name, tensor)
        file.finish()
    same(tmp_path / "a.safetensors", tensors)


def test_non_contiguous_views_and_gradients_are_written_as_they_look(tmp_path):
    grown = torch.randn(6, 8, requires_grad=True)
    with store.TensorFile(tmp_path / "a.safetensors") as file:
        file.add("turned", grown.t())
        file.add("odd", grown[1:, ::3])
        file.finish()
    same(tmp_path / "a.safetensors", {"turned": grown.t(), "odd": grown[1:, ::3]})


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_is_left_after_an_error(tmp_path, error):
    old = tmp_path / "a.safetensors"
    safetensors.torch.save_file({"old": torch.ones(3)}, old)
    before = old.read_bytes()
    with pytest.raises(error), store.TensorFile(old, overwrite=True) as file:
        file.add("w", torch.randn(64, 64))
        raise error
    assert os.listdir(tmp_path) == ["a.safetensors"] and old.read_bytes() == before


def test_an_existing_file_is_replaced_only_if_asked(tmp_path):
    target = tmp_path / "a.safetensors"
    target.write_bytes(b"mine")
    with pytest.raises(LowBitError, match="something of this name"):
        store.TensorFile(target)
    with store.TensorFile(target, overwrite=True) as file:
        file.add("w", torch.ones(4))
        file.finish()
    same(target, {"w": torch.ones(4)})
    (tmp_path / "folder").mkdir()
    with pytest.raises(LowBitError, match="something of this name"):
        store.TensorFile(tmp_path / "folder", overwrite=True)


def test_a_file_that_appears_meanwhile_is_kept(tmp_path):
    target = tmp_path / "a.safetensors"
    with pytest.raises(LowBitError, match="something of this name"), store.TensorFile(target) as f:
        f.add("w", torch.ones(4))
        target.write_bytes(b"mine")
        f.finish()
    assert target.read_bytes() == b"mine" and os.listdir(tmp_path) == ["a.safetensors"]


def test_a_loaded_file_may_be_replaced(tmp_path):
    """Views of the old file keep its values."""
    target = tmp_path / "a.safetensors"
    safetensors.torch.save_file({"w": torch.full((1000,), 3.0)}, target)
    with open_source(target) as source:
        view = source.get("w")
        with store.TensorFile(target, overwrite=True) as file:
            file.add("w", torch.zeros(1000))
            file.finish()
        assert view.eq(3).all()
    same(target, {"w": torch.zeros(1000)})


def test_a_name_that_cannot_be_replaced_keeps_the_new_file_under_another(tmp_path, monkeypatch):
    """As on Windows, where a mapped file refuses it."""
    target = tmp_path / "a.safetensors"
    target.write_bytes(b"old")
    (tmp_path / "a.new1.safetensors").write_bytes(b"other")
    replace = os.replace

    def refusing(source, goal):
        if os.path.basename(goal) == "a.safetensors":
            raise PermissionError(13, "in use")
        replace(source, goal)

    monkeypatch.setattr(os, "replace", refusing)
    with store.TensorFile(target, overwrite=True) as file:
        file.add("w", torch.ones(4))
        with pytest.raises(LowBitError, match="complete") as caught:
            file.finish()
    assert str(tmp_path / "a.new2.safetensors") in caught.value.found
    same(tmp_path / "a.new2.safetensors", {"w": torch.ones(4)})
    assert target.read_bytes() == b"old"
    assert sorted(os.listdir(tmp_path)) == [
        "a.new1.safetensors",
        "a.new2.safetensors",
        "a.safetensors",
    ]


def test_bad_names_and_dtypes_are_refused(tmp_path):
    with store.TensorFile(tmp_path / "a.safetensors") as file:
        file.add("w", torch.ones(8))
        with pytest.raises(ValueError, match="two tensors"):
            file.add("w", torch.ones(8))
        with pytest.raises(ValueError, match="complex128"):
            file.add("c", torch.ones(8, dtype=torch.complex128))


def test_a_missing_folder_and_a_full_disk_are_told(tmp_path):
    with pytest.raises(LowBitError, match="cannot be written"):
        store.TensorFile(tmp_path / "absent" / "a.safetensors")
    with pytest.raises(LowBitError, match="cannot be written"):
        store.check_room(tmp_path / "absent" / "a.safetensors", 1)
    with pytest.raises(LowBitError, match="no room"):
        store.check_room(tmp_path / "a.safetensors", 2**60)
    store.check_room(tmp_path / "a.safetensors", 1)


CHILD = """
import os, resource, sys
sys.path.insert(0, {tests!r})
from support import pack
import torch
store = pack("loaders.store")
"""


def child(body: str, **kwargs) -> subprocess.Popen:
    tests = str(ROOT / "tests")
    return subprocess.Popen(
        [sys.executable, "-P", "-c", CHILD.format(tests=tests) + body],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **kwargs,
    )


@pytest.mark.skipif(os.name == "nt", reason="limits of file size are POSIX")
def test_a_disk_that_takes_no_more_leaves_the_old_file(tmp_path):
    target = tmp_path / "a.safetensors"
    safetensors.torch.save_file({"old": torch.ones(3)}, target)
    before = target.read_bytes()
    process = child(
        f"""
resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
try:
    with store.TensorFile({str(target)!r}, overwrite=True) as file:
        for number in range(10):
            file.add(str(number), torch.randn(2**16))
        file.finish()
except Exception as error:
    print(type(error).__name__, error)
"""
    )
    said, _ = process.communicate(timeout=120)
    assert "LowBitError" in said and "Nothing was changed" in said and "layer: 2" in said, said
    assert target.read_bytes() == before and os.listdir(tmp_path) == ["a.safetensors"]


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL is POSIX")
@pytest.mark.parametrize("folder", [False, True])
def test_a_killed_writer_leaves_no_half_file_and_the_next_succeeds(tmp_path, folder):
    target = tmp_path / ("model" if folder else "a.safetensors")
    maker = f"store.TensorFolder({str(target)!r}, 'model', shard_bytes=100000)"
    if not folder:
        maker = f"store.TensorFile({str(target)!r})"
    process = child(
        f"""
import time
file = {maker}
for number in range(10**6):
    file.add(str(number), torch.randn(5000))
    if number == 30:
        print("going", flush=True)
    time.sleep(0.001)
"""
    )
    assert "going" in process.stdout.readline()
    with pytest.raises(LowBitError, match="Another program is writing"):
        _again(target, folder)
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=60)
    process.stdout.close()
    deadline = time.monotonic() + 10
    while True:  # the system frees the lock with the process
        try:
            _again(target, folder)
            break
        except LowBitError:
            assert time.monotonic() < deadline
    same(target / "model.safetensors" if folder else target, {"w": torch.ones(8)})
    assert os.listdir(tmp_path) == [target.name]


def _again(target, folder: bool) -> None:
    maker = store.TensorFolder(target, "model") if folder else store.TensorFile(target)
    with maker as file:
        file.add("w", torch.ones(8))
        file.finish()


# -------------------------------------------------------------------------------------- folders


@pytest.mark.parametrize("shard_bytes", [2_000, 10**9])
def test_a_folder_reads_as_one_checkpoint(tmp_path, shard_bytes):
    tensors = {name: t for name, t in tensors_of(7, 60).items() if t.numel()}
    target = tmp_path / "transformer"
    with store.TensorFolder(target, "diffusion_pytorch_model", shard_bytes=shard_bytes) as folder:
        for name, tensor in tensors.items():
            folder.add(name, tensor)
        folder.add_json("config.json", {"_class_name": "X", "text": "é"})
        assert not target.exists()
        folder.finish({"recipe": "{}"})
    assert os.listdir(tmp_path) == ["transformer"]
    names = sorted(os.listdir(target))
    files = [name for name in names if name.endswith(".safetensors")]
    assert json.loads((target / "config.json").read_text("utf-8"))["text"] == "é"
    if shard_bytes > 10**6:
        assert files == ["diffusion_pytorch_model.safetensors"]
    else:
        index = json.loads((target / "diffusion_pytorch_model.safetensors.index.json").read_text())
        assert set(index["weight_map"].values()) == set(files) and len(files) > 3
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
        assert files[0] == f"diffusion_pytorch_model-00001-of-{len(files):05d}.safetensors"
    found = {}
    for name in files:
        found |= safetensors.torch.load_file(target / name)
    assert found.keys() == tensors.keys()
    with open_source(target) as source:
        for name, tensor in tensors.items():
            assert source.get(name).to(torch.float32).equal(tensor.to(torch.float32))
            assert found[name].to(torch.float32).equal(tensor.to(torch.float32))


def test_a_folder_is_whole_or_not_there(tmp_path):
    target = tmp_path / "model"
    with pytest.raises(KeyboardInterrupt), store.TensorFolder(target, "m", shard_bytes=99) as made:
        made.add("a", torch.ones(64))
        made.add("b", torch.ones(64))
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []
    target.mkdir()
    _again(target, True)  # an empty folder is as good as none
    with pytest.raises(LowBitError, match="something of this name"):
        store.TensorFolder(target, "m")
    with store.TensorFolder(tmp_path / "other", "m", shard_bytes=99) as made:
        made.add("a", torch.ones(64))
        made.add("b", torch.ones(64))
        with pytest.raises(ValueError, match="two tensors"):
            made.add("a", torch.ones(64))
