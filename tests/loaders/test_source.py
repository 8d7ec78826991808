"""What lies at a path: sources, their tensors, the list of checkpoints, and every broken input."""

from __future__ import annotations

import gc
import json
import math
import os
import random
import struct
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from broken_inputs import (
    BROKEN,
    BROKEN_NAMES,
    INDEX,
    RIGHT_MAP,
    Broken,
    BrokenName,
    shard,
    weights,
    write,
    write_index,
    write_raw,
)
from safetensors import safe_open
from safetensors.torch import save_file
from support import pack

source = pack("loaders.source")
detect = pack("loaders.detect")
LowBitError = pack("quant.errors").LowBitError


def check_error(error: Exception, expected: tuple[str, ...]) -> None:
    text = str(error)
    for part in expected:
        assert part.lower() in text.lower(), f"{part!r} is not in:\n{text}"
    assert error.found and error.expected and error.remedy, f"a part is missing:\n{text}"


def test_broken_inputs_are_many_and_distinct():
    ids = [case.id for case in BROKEN] + [case.id for case in BROKEN_NAMES]
    assert len(set(ids)) == len(ids) >= 40


@pytest.mark.timeout(20)
@pytest.mark.parametrize("case", BROKEN, ids=lambda case: case.id)
def test_broken_input_is_one_clear_error(case: Broken, tmp_path: Path):
    path = case.make(tmp_path)
    with pytest.raises(LowBitError) as caught:
        detect.detect_scheme(source.open_source(path))
    check_error(caught.value, case.expected)
    assert str(tmp_path) in caught.value.file
    # The listing meets the same files and must neither fail nor hang.
    source.list_checkpoints([str(tmp_path)])


@pytest.mark.timeout(20)
@pytest.mark.parametrize("case", BROKEN_NAMES, ids=lambda case: case.id)
def test_broken_name_is_refused(case: BrokenName, tmp_path: Path):
    models = tmp_path / "models"
    models.mkdir()
    name = case.make(models)
    with pytest.raises(LowBitError) as caught:
        source.open_source(source.resolve(name, [str(models)]))
    check_error(caught.value, case.expected)


# ------------------------------------------------------------------------------------- tensors


def every_dtype() -> dict[str, torch.Tensor]:
    raw = torch.arange(64, dtype=torch.uint8)
    dtypes = [getattr(torch, name) for _, name in pack("loaders.header").DTYPES.values() if name]
    tensors = {
        str(dtype): (raw % 2 if dtype is torch.bool else raw.clone()).view(dtype).view(2, -1)
        for dtype in dtypes
    }
    return tensors | {"scalar": torch.tensor(2.5), "nothing": torch.empty(0, 3)}


def test_every_dtype_is_read_as_the_safetensors_package_wrote_it(tmp_path: Path):
    written = every_dtype()
    save_file(written, tmp_path / "m.safetensors", metadata={"format": "pt", "who": "ü"})
    opened = source.open_source(tmp_path / "m.safetensors")
    assert opened.kind == "file" and opened.metadata == {"format": "pt", "who": "ü"}
    assert opened.tensors.keys() == written.keys()
    for name, tensor in written.items():
        read = opened.get(name)
        assert read.dtype == tensor.dtype and read.shape == tensor.shape, name
        assert read.view(-1).view(torch.uint8).equal(tensor.view(-1).view(torch.uint8)), name
        assert opened.tensors[name].nbytes == tensor.nbytes
    assert opened.total_bytes == sum(tensor.nbytes for tensor in written.values())
    assert opened.tensors["torch.float4_e2m1fn_x2"].shape == (2, 64)  # elements, not bytes


def test_a_dtype_that_torch_lacks_is_an_error_when_it_is_asked_for(tmp_path: Path):
    tensors = {"six": ("F6_E2M3", [4], bytes(3)), "four": ("F4", [2, 3], bytes(3))}
    opened = source.open_source(write(tmp_path / "m.safetensors", tensors))
    with pytest.raises(LowBitError, match="no dtype") as caught:
        opened.get("six")
    check_error(caught.value, ("F6_E2M3", "layer: six"))
    with pytest.raises(LowBitError, match="does not fill its bytes"):
        opened.get("four")


def test_a_tensor_that_is_not_aligned_is_copied_and_right(tmp_path: Path):
    values = np.arange(6, dtype=np.float32)
    tensors = {"odd": ("U8", [3], b"abc"), "w": ("F32", [2, 3], values.tobytes())}
    opened = source.open_source(write(tmp_path / "m.safetensors", tensors))
    read = opened.get("w")
    assert opened.tensors["w"].start % 4 and read.data_ptr() % 4 == 0
    assert read.equal(torch.from_numpy(values).view(2, 3))


def test_an_unknown_tensor_names_similar_ones(tmp_path: Path):
    opened = source.open_source(write(tmp_path / "m.safetensors", weights("block.0.weight")))
    with pytest.raises(LowBitError) as caught:
        opened.get("block.1.weight")
    check_error(caught.value, ("no such tensor", "layer: block.1.weight", "block.0.weight"))


def resident() -> dict[str, int]:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return {line[:7]: int(line.split()[1]) * 1024 for line in lines if line.startswith("Rss")}


def test_reading_costs_no_anonymous_memory(tmp_path: Path):
    size, count = 16 * 2**20, 8
    data = {f"t{i}": torch.full((size // 4,), i, dtype=torch.float32) for i in range(count)}
    save_file(data, tmp_path / "m.safetensors")
    del data
    opened = source.open_source(tmp_path / "m.safetensors")
    opened.get("t0").sum()
    gc.collect()
    before = resident()
    tensors = [opened.get(f"t{i}") for i in range(count)]
    assert [tensor[-1].item() for tensor in tensors] == list(range(count))
    assert all(tensor.max() == i for i, tensor in enumerate(tensors))
    grown = resident()["RssAnon"] - before["RssAnon"]
    assert grown < size / 2, f"{grown} bytes of anonymous memory for {size * count} read"
    # The tensors outlive the source and its mapping; without them the file's pages go.
    opened.close()
    del opened
    gc.collect()
    assert all(tensor.min() == i for i, tensor in enumerate(tensors))
    mapped = str(tmp_path / "m.safetensors")
    assert mapped in Path("/proc/self/maps").read_text(encoding="utf-8")
    del tensors
    gc.collect()
    assert mapped not in Path("/proc/self/maps").read_text(encoding="utf-8")


def test_reading_after_close_and_a_file_that_changed(tmp_path: Path):
    path = write(tmp_path / "m.safetensors", weights("a"))
    with source.open_source(path) as opened:
        assert opened.get("a").shape == (2, 2)
    assert opened.get("a").shape == (2, 2)
    opened.close()
    write(path, weights("a", "b"))
    with pytest.raises(LowBitError) as caught:
        opened.get("a")
    check_error(caught.value, ("changed after it was opened", str(path)))


def test_opening_reads_no_tensor(tmp_path: Path):
    """A sparse file of 30 GB opens at once, from its header."""
    size = 30 * 2**30
    header = {"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}
    path = write_raw(tmp_path / "m.safetensors", header)
    os.truncate(path, path.stat().st_size + size)
    began, before = time.perf_counter(), resident()
    opened = source.open_source(path)
    assert opened.total_bytes == size
    assert opened.get("w")[-1] == 0
    assert time.perf_counter() - began < 2
    assert sum(resident().values()) - sum(before.values()) < 64 * 2**20


def test_fingerprint_follows_every_file(tmp_path: Path):
    write(tmp_path / "model.safetensors", weights("a"))
    config = tmp_path / "config.json"
    config.write_text("{}", encoding="utf-8")
    opened = source.open_source(tmp_path)
    first = opened.fingerprint()
    assert first == source.open_source(tmp_path).fingerprint()
    config.write_text('{"a": 1}', encoding="utf-8")
    second = opened.fingerprint()
    assert second != first
    os.utime(tmp_path / "model.safetensors", ns=(0, 0))
    assert opened.fingerprint() != second
    config.unlink()
    with pytest.raises(LowBitError, match="no such file"):
        opened.fingerprint()


# --------------------------------------------------------------------------------------- kinds


def test_shards_with_and_without_index(tmp_path: Path):
    for i in (1, 2):
        write(tmp_path / shard(i), weights(f"l{i}.weight"), {"format": "pt", "part": str(i)})
    for opened in (source.open_source(tmp_path), source.open_source(tmp_path / shard(2))):
        assert opened.kind == "shards"
        assert [file.name for file in opened.files] == [shard(1), shard(2)]
        assert opened.tensors["l2.weight"].file.name == shard(2)
        assert opened.metadata == {"format": "pt", "part": "1"}
        assert opened.get("l2.weight").shape == (2, 2)
    write_index(tmp_path / INDEX, RIGHT_MAP)
    opened = source.open_source(tmp_path)
    assert [file.name for file in opened.configs] == [INDEX]
    assert opened.tensors.keys() == RIGHT_MAP.keys()


def test_an_index_may_name_files_as_it_likes(tmp_path: Path):
    write(tmp_path / "one.safetensors", weights("l1.weight"))
    write(tmp_path / "two.safetensors", weights("l2.weight"))
    index = {"l1.weight": "one.safetensors", "l2.weight": "two.safetensors"}
    write_index(tmp_path / "any.safetensors.index.json", index)
    assert source.open_source(tmp_path).tensors.keys() == RIGHT_MAP.keys()


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["x.safetensors"], ["x.safetensors"]),
        (["x.sft"], ["x.sft"]),
        (["model.fp16.safetensors"], ["model.fp16.safetensors"]),
        (["model.fp16.safetensors", "model.safetensors"], ["model.safetensors"]),
        (["model.safetensors", "lora.safetensors"], ["model.safetensors"]),
        (["model.safetensors", shard(1, 1)], [shard(1, 1)]),
        ([shard(1), shard(2), "other.safetensors"], [shard(1), shard(2)]),
        (
            ["diffusion_pytorch_model.safetensors", shard(1), shard(2)],
            ["diffusion_pytorch_model.safetensors"],
        ),
        (["model.fp8.safetensors", "model.bf16.safetensors"], None),
        (["model.safetensors", "model.sft"], None),
        ([shard(1, 1), shard(1, 2), shard(2, 2)], None),
        (
            ["x-1-of-2.safetensors", "x-2-of-2.safetensors"],
            ["x-1-of-2.safetensors", "x-2-of-2.safetensors"],
        ),
    ],
)
def test_which_of_several_files_a_folder_stands_for(names, chosen, tmp_path: Path):
    for name in names:
        write(tmp_path / name, weights(f"{name}.weight"))
    if chosen is None:
        with pytest.raises(LowBitError, match="several checkpoints"):
            source.open_source(tmp_path)
    else:
        assert [file.name for file in source.open_source(tmp_path).files] == chosen


def test_an_index_wins_over_a_lone_file(tmp_path: Path):
    for i in (1, 2):
        write(tmp_path / shard(i), weights(f"l{i}.weight"))
    write(tmp_path / "diffusion_pytorch_model.safetensors", weights("merged.weight"))
    write_index(tmp_path / INDEX, RIGHT_MAP)
    assert source.open_source(tmp_path).tensors.keys() == RIGHT_MAP.keys()


@pytest.mark.parametrize(
    "index",
    [
        "diffusion_pytorch_model.safetensors.index.fp16.json",
        "diffusion_pytorch_model.safetensors.fp16.index.json",
    ],
)
def test_a_variant_with_its_own_index(index, tmp_path: Path):
    names = [f"diffusion_pytorch_model.fp16-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for name in names:
        write(tmp_path / name, weights(f"{name}.weight"))
    write_index(tmp_path / index, {f"{name}.weight": name for name in names})
    assert [file.name for file in source.open_source(tmp_path).files] == names


def make_component(folder: Path, config: dict | None = None, quantization: dict | None = None):
    write(folder / "diffusion_pytorch_model.safetensors", weights("a.weight"))
    for name, content in (("config.json", config), ("quantization_config.json", quantization)):
        if content is not None:
            (folder / name).write_text(json.dumps(content), encoding="utf-8")
    return folder


def test_configs_of_a_component(tmp_path: Path):
    inner = {"quant_method": "sdnq", "group_size": 1}
    config = {"_class_name": "T", "quantization_config": inner}
    opened = source.open_source(make_component(tmp_path / "a", config))
    assert opened.kind == "component" and opened.config == config
    assert opened.quantization_config == inner
    outer = {"quant_method": "sdnq", "group_size": 2}
    opened = source.open_source(make_component(tmp_path / "b", config, outer))
    assert opened.quantization_config == outer
    opened = source.open_source(make_component(tmp_path / "c", None, outer))
    assert opened.kind == "component" and opened.config == {}
    assert opened.quantization_config == outer
    opened = source.open_source(make_component(tmp_path / "d", {"quantization_config": None}))
    assert opened.quantization_config == {}
    # The file of a component takes its configs along; another file beside a config does not.
    file = tmp_path / "b" / "diffusion_pytorch_model.safetensors"
    assert source.open_source(file).quantization_config == outer
    other = write(tmp_path / "b" / "flux.safetensors", weights("a.weight"))
    opened = source.open_source(other)
    assert opened.kind == "file" and opened.config == {} and opened.configs == ()


def make_pipeline(folder: Path, *models: str) -> Path:
    for name in (*models, "text_encoder", "vae"):
        make_component(folder / name, {"_class_name": name})
    (folder / "model_index.json").write_text("{}", encoding="utf-8")
    return folder


def test_a_pipeline_stands_for_its_diffusion_model(tmp_path: Path):
    wan = make_pipeline(tmp_path / "wan", "transformer", "transformer_2")
    assert source.open_source(wan).path == wan / "transformer"
    assert source.open_source(wan / "transformer_2").config == {"_class_name": "transformer_2"}
    sdxl = make_pipeline(tmp_path / "sdxl", "unet")
    assert source.open_source(sdxl).config == {"_class_name": "unet"}


# ------------------------------------------------------------------------------- list and names


def make_library(root: Path) -> list[str]:
    """A folder of models of every kind; the names that must be listed."""
    make_pipeline(root / "wan", "transformer", "transformer_2")
    write(root / "wan" / "all-in-one.safetensors", weights("a"))
    make_pipeline(root / "deep" / "sdxl", "unet")
    make_component(root / "flux-sdnq", {})
    make_component(root / "only-quant", None, {})
    for i in (1, 2):
        write(root / "sharded" / shard(i), weights(f"l{i}.weight"))
        write(root / "indexed" / f"part{i}.safetensors", weights(f"l{i}.weight"))
        write(root / f"big-0000{i}-of-00002.safetensors", weights(f"l{i}.weight"))
        write(root / "mixed" / f"big-0000{i}-of-00002.safetensors", weights(f"l{i}.weight"))
    write_index(root / "indexed" / "m.safetensors.index.json", {})
    write(root / "mixed" / "small.safetensors", weights("a"))
    make_component(root / "ambiguous", {})
    (root / "ambiguous" / "diffusion_pytorch_model.safetensors").unlink()
    for name in ("a.safetensors", "b.safetensors"):
        write(root / "ambiguous" / name, weights("a"))
    write(root / "plain.safetensors", weights("a"))
    write(root / "old.sft", weights("a"))
    write(root / "sub" / "UPPER.SAFETENSORS", weights("a"))
    write(root / ".cache" / "x.safetensors", weights("a"))
    write(root / "sub" / ".hidden.safetensors", weights("a"))
    (root / "model.gguf").write_bytes(b"GGUF")
    (root / "empty").mkdir()
    return [
        "ambiguous/a.safetensors",
        "ambiguous/b.safetensors",
        "big-00001-of-00002.safetensors",
        "deep/sdxl/unet",
        "flux-sdnq",
        "indexed",
        "mixed/big-00001-of-00002.safetensors",
        "mixed/small.safetensors",
        "old.sft",
        "only-quant",
        "plain.safetensors",
        "sharded",
        "sub/UPPER.SAFETENSORS",
        "wan/all-in-one.safetensors",
        "wan/transformer",
        "wan/transformer_2",
    ]


def test_the_list_of_checkpoints(tmp_path: Path):
    listed = make_library(tmp_path / "one")
    write(tmp_path / "two" / "plain.safetensors", weights("a"))
    write(tmp_path / "two" / "more.safetensors", weights("a"))
    roots = [str(tmp_path / "one") + os.sep, str(tmp_path / "two"), str(tmp_path / "missing")]
    names = source.list_checkpoints(roots)
    assert names == sorted([*listed, "more.safetensors"])
    for name in names:
        path = source.resolve(name, roots)
        assert path.exists()
        if name != "indexed":  # its index is only a name here
            assert source.open_source(path).tensors
    assert source.resolve("plain.safetensors", roots).parent.name == "one"
    assert source.list_checkpoints([]) == []


def test_a_root_that_is_itself_a_pipeline_or_component(tmp_path: Path):
    make_pipeline(tmp_path / "a", "transformer")
    assert source.list_checkpoints([str(tmp_path / "a") + os.sep]) == ["transformer"]
    make_component(tmp_path / "b", {})
    listed = source.list_checkpoints([str(tmp_path / "b")])
    assert listed == ["diffusion_pytorch_model.safetensors"]


@pytest.mark.timeout(20)
def test_links_are_followed_as_comfyui_does_and_never_in_circles(tmp_path: Path):
    models, elsewhere = tmp_path / "models", tmp_path / "elsewhere"
    write(models / "a" / "m.safetensors", weights("a"))
    write(elsewhere / "out.safetensors", weights("a"))
    (models / "b").mkdir()
    (models / "a" / "up").symlink_to(models)
    (models / "a" / "to_b").symlink_to(models / "b")
    (models / "b" / "to_a").symlink_to(models / "a")
    (models / "linked.safetensors").symlink_to(models / "a" / "m.safetensors")
    (models / "gone.safetensors").symlink_to(models / "nothing")
    (models / "folder_out").symlink_to(elsewhere)
    (models / "file_out.safetensors").symlink_to(elsewhere / "out.safetensors")
    names = [
        "a/m.safetensors",
        "b/to_a/m.safetensors",
        "file_out.safetensors",
        "folder_out/out.safetensors",
        "linked.safetensors",
    ]
    assert source.list_checkpoints([str(models)]) == names
    # A root may itself be a link.
    (tmp_path / "alias").symlink_to(models)
    alias = [str(tmp_path / "alias")]
    assert source.list_checkpoints(alias) == names
    for name in names:
        assert source.open_source(source.resolve(name, alias)).tensors


def test_names_from_other_systems(tmp_path: Path):
    roots = [str(tmp_path)]
    file = write(tmp_path / "flux" / "dev" / "m.safetensors", weights("a"))
    assert source.resolve("flux\\dev\\m.safetensors", roots) == file
    assert source.resolve("flux/./dev//m.safetensors", roots) == file
    assert source.resolve("flux/dev", roots) == file.parent
    odd = write(tmp_path / "back\\slash.safetensors", weights("a"))
    assert source.resolve("back\\slash.safetensors", roots) == odd
    make_pipeline(tmp_path / "here" / "wan", "transformer")
    for name, remedy in (
        ("other/M.safetensors", "choose flux/dev/m.safetensors"),
        ("D_drive\\m.safetensors", "choose flux/dev/m.safetensors"),
        ("wan/transformer", "choose here/wan/transformer"),
        ("flux/dev/n.safetensors", "did you mean flux/dev/m.safetensors"),
        ("quite different", "put the checkpoint into a model folder"),
    ):
        with pytest.raises(LowBitError, match="no checkpoint of this name") as caught:
            source.resolve(name, roots)
        assert remedy in caught.value.remedy


def test_listing_a_large_library_is_fast(tmp_path: Path):
    for i in range(150):
        folder = tmp_path / f"f{i % 15}" / f"m{i}"
        folder.mkdir(parents=True)
        for j in range(10):
            (folder / f"w{j}.safetensors").touch()
    began = time.perf_counter()
    assert len(source.list_checkpoints([str(tmp_path)])) == 1500
    assert time.perf_counter() - began < 2


# ------------------------------------------------------------------------------ against safetensors


def damaged(rng: random.Random) -> bytes:
    """A small safetensors file with none to two random faults."""
    header: dict = {"__metadata__": {"format": "pt"}} if rng.random() < 0.3 else {}
    end = 0
    for name in rng.sample("abc", rng.randint(1, 3)):
        dtype, width = rng.choice([("F32", 4), ("U8", 1), ("BF16", 2), ("F8_E4M3", 1)])
        shape = [rng.randint(0, 3) for _ in range(rng.randint(0, 3))]
        size = math.prod(shape) * width
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    values = [0, 1, 2, 4, 8, -1, 2.0, "x", None, True, [], {}, "F32", "U8", "F4", "F6_E2M3"]
    for _ in range(rng.randint(0, 2)):
        name = rng.choice(list(header))
        entry = header[name]
        if not isinstance(entry, dict) or not entry:
            continue
        key = rng.choice(list(entry))
        if isinstance(entry[key], list) and entry[key] and rng.random() < 0.8:
            entry[key][rng.randrange(len(entry[key]))] = rng.choice(values)
        elif rng.random() < 0.2:
            del entry[key]
        else:
            entry[key] = rng.choice(values)
    raw = bytearray(json.dumps(header).encode() + b" " * rng.randint(0, 2))
    length = len(raw) if rng.random() < 0.9 else rng.choice([0, 1, len(raw) - 1, len(raw) + 1])
    if rng.random() < 0.1:
        raw[rng.randrange(len(raw))] = rng.randrange(256)
    file = struct.pack("<Q", length) + raw + bytes(end)
    cut = rng.randrange(len(file)) if rng.random() < 0.1 else len(file)
    return file[:cut] + bytes(rng.choice([0] * 20 + [3]))


def test_damaged_files_are_judged_as_the_safetensors_package_judges_them(tmp_path: Path):
    rng = random.Random(7)
    path = tmp_path / "m.safetensors"
    accepted = 0
    for _ in range(2000):
        path.write_bytes(damaged(rng))
        try:
            with safe_open(path, "pt") as reference:
                expected = sorted(reference.keys()) or None
        except Exception:  # its errors are of several types, its verdict is what counts
            expected = None
        try:
            found = sorted(source.open_source(path).tensors)
        except LowBitError:
            found = None
        assert found == expected, path.read_bytes()
        accepted += found is not None
    assert 400 < accepted < 1600
