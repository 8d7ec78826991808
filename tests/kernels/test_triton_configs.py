"""Tiles: one for every shape and device, that fits, that suits, and that a search can replace."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from triton_host import kernels

configs = kernels("configs")
targets = kernels("targets")
Machine, Tile, tile_for = configs.Machine, configs.Tile, configs.tile_for

CPU = torch.device("cpu")
PROCESSORS = {"sm_75": 68, "sm_80": 108, "sm_86": 82, "sm_89": 128, "sm_90": 132, "sm_100": 148}
MACHINES = {
    name: Machine(name, PROCESSORS.get(name, 96), target.shared, 32 << 20)
    for name, target in targets.TARGETS.items()
}
MACHINES["xpu"] = Machine("xpu", 32, 64 << 10, 16 << 20)
MACHINES["sm_137"] = Machine("sm_137", 200, 99 << 10, 16 << 20)  # of the future
PRODUCTS = ("int8", "fp8", "half", "faithful")


@pytest.mark.parametrize("machine", MACHINES)
def test_every_shape_has_a_tile_that_fits(machine: str) -> None:
    on = MACHINES[machine]
    for operation in configs.TILES:
        bits = 16 if operation == "half" else 8
        for m in (0, 1, 5, 9, 17, 65, 512, 513, 4096, 4608, 75600):
            for n, k in ((3072, 3072), (21504, 3072), (3072, 15360), (64, 64), (33, 70)):
                tile = tile_for(operation, on, m, n, k, bits=bits)
                assert min(tile.block_m, tile.block_n, tile.block_k) >= 1
                assert tile.warps in (1, 2, 4, 8) and tile.options["num_stages"] == tile.stages
                if operation in PRODUCTS:
                    assert configs._shared(tile, bits, False) <= on.shared
                    sides = (tile.block_m, tile.block_n, tile.block_k)
                    assert all(side & (side - 1) == 0 and side >= 16 for side in sides)


def test_row_classes() -> None:
    rows = (0, 1, 2, 8, 9, 16, 17, 64, 65, 512, 513, 2048, 2049, 10**6)
    assert [configs.row_class(m) for m in rows] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6]


def test_few_tiles_serve_every_resolution() -> None:
    """Each tile is a compilation that a user waits for: no new one with every picture size."""
    for machine in MACHINES.values():
        tiles = {tile_for("int8", machine, m, 3072, 3072) for m in range(1, 9000, 7)}
        assert len(tiles) <= 7


def test_tiles_of_big_products_keep_all_processors_busy() -> None:
    """perf.md, wave quantisation: 4608 x 3072 on 132 processors, and wider layers."""
    hopper = MACHINES["sm_90"]
    assert tile_for("int8", hopper, 4608, 3072, 3072).block_n == 128
    assert tile_for("int8", hopper, 4608, 21504, 3072).block_n == 256
    assert tile_for("int8", hopper, 512, 12288, 3072).block_m <= 64
    small = replace(hopper, shared=64 << 10)
    assert configs._shared(tile_for("int8", small, 4608, 21504, 3072), 8, True) <= 64 << 10
    assert max(asdict(tile_for("int8", MACHINES["gfx1100"], 9000, 9000, 4096)).values()) <= 128


@pytest.mark.parametrize(
    ("architecture", "family"),
    [
        *(("sm_75", "turing"), ("sm_87", "ampere"), ("sm_86", "ada"), ("sm_90", "hopper")),
        *(("sm_103", "blackwell"), ("sm_121", "workstation"), ("gfx950", "cdna")),
        *(("gfx90a", "cdna"), ("gfx1201", "rdna"), ("xpu", "xe"), ("new", "other")),
    ],
)
def test_families(architecture: str, family: str) -> None:
    assert configs.family_of(architecture) == family


def test_the_interpreter_is_a_machine() -> None:
    assert configs.machine_of(CPU).architecture == "interpreter"
    assert tile_for("int8", CPU, 4608, 3072, 3072).block_m <= 32  # several blocks in small tests


# ------------------------------------------------------------------------------------ searching

SHAPE = ("int8", CPU, 100, 256, 128)


@pytest.fixture
def folder(tmp_path: Path):
    yield tmp_path / "tiles"
    configs._tuned.clear()
    configs._files.clear()


def timed(costs: dict[Tile, float]):
    """A measurement of whatever tile is in use."""

    def seconds() -> float:
        cost = costs[tile_for(*SHAPE)]
        if cost < 0:
            raise RuntimeError("out of resource: shared memory")
        return cost

    return seconds


def test_a_search_is_kept_and_used(folder: Path) -> None:
    first = tile_for(*SHAPE)
    found = configs.neighbours(*SHAPE)
    assert found[0] == first and len(found) == len(set(found)) == 5
    costs = {tile: 2.0 + number for number, tile in enumerate(found)}
    costs[found[3]], costs[found[4]] = 1.0, -1.0
    assert configs.use_folder(folder, CPU) == 0 and not folder.exists()
    assert configs.search(*SHAPE, timed(costs), found) == found[3] == tile_for(*SHAPE)
    # For its class of rows, and nothing else.
    assert tile_for("int8", CPU, 66, 256, 128) == found[3]
    assert tile_for("int8", CPU, 100, 256, 256) == first != found[3]
    (file,) = folder.iterdir()
    assert json.loads(file.read_text())["tiles"] == {"int8/4/256/128": asdict(found[3])}
    configs._tuned.clear()
    assert tile_for(*SHAPE) == first
    assert configs.use_folder(folder, CPU) == 1 and tile_for(*SHAPE) == found[3]
    # A second search adds to the file.
    other = ("int8", CPU, 9, 64, 64)
    configs.search(*other, lambda: 1.0, configs.neighbours(*other)[:1])
    assert configs.use_folder(folder, CPU) == 2 and len(list(folder.iterdir())) == 1


def test_a_search_without_a_result_changes_nothing(folder: Path) -> None:
    found = configs.neighbours(*SHAPE)
    first = tile_for(*SHAPE)
    with pytest.raises(RuntimeError, match=r"no tile of int8 works: Tile.*shared memory"):
        configs.search(*SHAPE, timed(dict.fromkeys(found, -1.0)), found)
    assert tile_for(*SHAPE) == first

    def full() -> float:
        raise torch.OutOfMemoryError("full")

    with pytest.raises(torch.OutOfMemoryError):
        configs.search(*SHAPE, full, found)
    assert tile_for(*SHAPE) == first


@pytest.mark.parametrize(
    ("damage", "level"),
    [
        (lambda told: told | {"kernels": "others"}, logging.INFO),
        (lambda told: told | {"triton": "1.0"}, logging.INFO),
        (lambda told: told | {"device": "another"}, logging.INFO),
        (lambda told: {"tiles": told["tiles"]}, logging.WARNING),
        (lambda told: told | {"tiles": {"a": {"block": 1}}}, logging.WARNING),
        (lambda told: told | {"tiles": [1]}, logging.WARNING),
        (lambda told: [], logging.WARNING),
        (None, logging.WARNING),
    ],
)
def test_files_of_others_are_not_used(folder: Path, damage, level, caplog) -> None:
    configs.use_folder(folder, CPU)
    configs.search(*SHAPE, lambda: 1.0, configs.neighbours(*SHAPE)[1:2])
    (file,) = folder.iterdir()
    told = json.loads(file.read_text())
    file.write_text("{" if damage is None else json.dumps(damage(told)))
    with caplog.at_level(logging.INFO):
        assert configs.use_folder(folder, CPU) == 0
    assert not configs._tuned and [r.levelno for r in caplog.records] == [level]
    assert str(file) in caplog.text


def test_an_interrupted_write_leaves_the_file_as_it_was(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs.use_folder(folder, CPU)
    configs.search(*SHAPE, lambda: 1.0, configs.neighbours(*SHAPE)[1:2])
    (file,) = folder.iterdir()
    before = file.read_bytes()
    monkeypatch.setattr(configs.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        configs.search("int8", CPU, 9, 64, 64, lambda: 1.0, configs.neighbours(*SHAPE)[:1])
    assert file.read_bytes() == before and list(folder.iterdir()) == [file]


def test_the_loader_reads_the_folder_of_the_user(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from support import pack

    devices = pack("loaders.host.devices")
    import folder_paths

    assert devices.tiles_folder().parent == Path(folder_paths.get_user_directory())
    asked = []
    monkeypatch.setattr(devices, "tiles_folder", lambda: folder)
    monkeypatch.setattr(devices, "use_folder", lambda *given: asked.append(given) or 3)
    devices.use_searched_tiles.cache_clear()
    gpu = torch.device("cuda", 0)
    assert [devices.use_searched_tiles(d) for d in (gpu, CPU, gpu)] == [3, 0, 3]
    assert asked == [(folder, gpu)]
    devices.use_searched_tiles.cache_clear()
