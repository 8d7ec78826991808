"""Broken checkpoints, as a table: what is wrong, how to make it, what the error must say.

``BROKEN`` holds paths to open, ``BROKEN_NAMES`` names to resolve below a folder of models. A maker
gets an empty folder and returns the path (or the name). The error must hold every expected text,
whatever the letter case.
"""

from __future__ import annotations

import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np


class Broken(NamedTuple):
    id: str
    make: Callable[[Path], Path]
    expected: tuple[str, ...]


class BrokenName(NamedTuple):
    id: str
    make: Callable[[Path], str]  # given the model folder
    expected: tuple[str, ...]


# ----------------------------------------------------------------------------- writing checkpoints

Tensor = tuple[str, list[int], bytes]  # dtype code, shape, bytes
WEIGHT: Tensor = ("F32", [2, 2], bytes(16))


def header_bytes(tensors: dict[str, Tensor], metadata: dict | None = None) -> bytes:
    """The JSON of a right header for tensors that follow each other."""
    header: dict = {} if metadata is None else {"__metadata__": metadata}
    start = 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, start + len(data)]}
        start += len(data)
    return json.dumps(header).encode()


def write(path: Path, tensors: dict[str, Tensor], metadata: dict | None = None) -> Path:
    """A right safetensors file."""
    data = b"".join(tensor[2] for tensor in tensors.values())
    return write_raw(path, header_bytes(tensors, metadata), data)


def write_raw(
    path: Path, header: bytes | dict, data: bytes = b"", length: int | None = None
) -> Path:
    """Any header, any data, and a header length that may lie."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def weights(*names: str) -> dict[str, Tensor]:
    return dict.fromkeys(names, WEIGHT)


def write_index(path: Path, weight_map: object) -> Path:
    path.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")
    return path


def sdnq_layer(name: str, rows: int = 4, columns: int = 8) -> dict[str, Tensor]:
    """A row-wise int8 layer as sdnq stores it."""
    return {
        f"{name}.weight": ("I8", [rows, columns], bytes(rows * columns)),
        f"{name}.scale": ("F32", [rows, 1], np.ones(rows, np.float32).tobytes()),
    }


def marker(entry: object) -> Tensor:
    """A comfy_quant tensor."""
    raw = entry if isinstance(entry, bytes) else json.dumps(entry).encode()
    return ("U8", [len(raw)], raw)


# --------------------------------------------------------------------------------------- the makers


def _entry(**changes: object) -> dict:
    return {"w": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]} | changes}


def _header(header: bytes | dict, data: bytes = bytes(16), length: int | None = None):
    return lambda tmp: write_raw(tmp / "m.safetensors", header, data, length)


def _bytes(data: bytes, name: str = "m.safetensors"):
    def make(tmp: Path) -> Path:
        (tmp / name).write_bytes(data)
        return tmp / name

    return make


def _tensors(tensors: dict[str, Tensor], metadata: dict | None = None, name: str = "m.safetensors"):
    return lambda tmp: write(tmp / name, tensors, metadata)


def _component(config: object = None, tensors: dict[str, Tensor] | None = None, **texts: str):
    """A component folder; ``texts`` are further files, ``__`` in their names standing for a dot."""

    def make(tmp: Path) -> Path:
        write(tmp / "diffusion_pytorch_model.safetensors", tensors or weights("a.weight"))
        if config is not None:
            text = config if isinstance(config, str) else json.dumps(config)
            (tmp / "config.json").write_text(text, encoding="utf-8")
        for name, text in texts.items():
            (tmp / name.replace("__", ".")).write_text(text, encoding="utf-8")
        return tmp

    return make


def _truncated(tmp: Path) -> Path:
    path = write(tmp / "m.safetensors", weights("a.weight", "b.weight"))
    os.truncate(path, path.stat().st_size - 10)
    return path


def _duplicate(tmp: Path) -> Path:
    one = json.dumps(_entry())[1:-1]
    return write_raw(tmp / "m.safetensors", f"{{{one},{one}}}".encode(), bytes(16))


def _two(first: list[int], second: list[int], size: int):
    entry = {"dtype": "U8", "shape": [16]}
    header = {"a": {**entry, "data_offsets": first}, "b": {**entry, "data_offsets": second}}
    return _header(header, bytes(size))


def _pickle_zip(tmp: Path) -> Path:
    with zipfile.ZipFile(tmp / "m.safetensors", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}))
    return tmp / "m.safetensors"


def _folder(*names: str):
    def make(tmp: Path) -> Path:
        for name in names:
            (tmp / name).write_bytes(b"x")
        return tmp

    return make


def _named_folder(tmp: Path) -> Path:
    (tmp / "x.safetensors").mkdir()
    return tmp / "x.safetensors"


def _fifo(tmp: Path) -> Path:
    os.mkfifo(tmp / "m.safetensors")
    return tmp / "m.safetensors"


def _fifo_in_folder(tmp: Path) -> Path:
    os.mkfifo(tmp / "diffusion_pytorch_model.safetensors")
    return tmp


def _fifo_config(tmp: Path) -> Path:
    os.mkfifo(_component()(tmp) / "config.json")
    return tmp


def _dangling(tmp: Path) -> Path:
    (tmp / "m.safetensors").symlink_to(tmp / "gone.safetensors")
    return tmp / "m.safetensors"


def _link_loop(tmp: Path) -> Path:
    (tmp / "m.safetensors").symlink_to(tmp / "m.safetensors")
    return tmp / "m.safetensors"


def _shards(count: int = 2, *, present: int | None = None) -> Callable[[Path], Path]:
    def make(tmp: Path) -> Path:
        for i in range(1, (present or count) + 1):
            write(tmp / shard(i, count), weights(f"l{i}.weight"))
        return tmp

    return make


def shard(number: int, total: int = 2) -> str:
    return f"diffusion_pytorch_model-{number:05}-of-{total:05}.safetensors"


INDEX = "diffusion_pytorch_model.safetensors.index.json"


def _index(weight_map: object):
    def make(tmp: Path) -> Path:
        _shards()(tmp)
        write_index(tmp / INDEX, weight_map)
        return tmp

    return make


RIGHT_MAP = {"l1.weight": shard(1), "l2.weight": shard(2)}


def _broken_index(tmp: Path) -> Path:
    (_shards()(tmp) / INDEX).write_text("{", encoding="utf-8")
    return tmp


def _key_twice(tmp: Path) -> Path:
    write(tmp / shard(1), weights("l1.weight", "same.weight"))
    write(tmp / shard(2), weights("same.weight", "l2.weight"))
    return tmp


def _shard_numbers(tmp: Path) -> Path:
    return _shards(2, present=3)(tmp)


def _metadata_differs(tmp: Path) -> Path:
    for i in (1, 2):
        write(tmp / shard(i), weights(f"l{i}.weight"), {"quantization_config": f'{{"rank": {i}}}'})
    return tmp


def _several(tmp: Path) -> Path:
    for name in ("fp8.safetensors", "bf16.safetensors"):
        write(tmp / name, weights("a.weight"))
    return tmp


def _pipeline_without_model(tmp: Path) -> Path:
    (tmp / "model_index.json").write_text("{}", encoding="utf-8")
    (tmp / "vae").mkdir()
    return tmp


def _only_folders(tmp: Path) -> Path:
    write(tmp / "transformer" / "diffusion_pytorch_model.safetensors", weights("a.weight"))
    return tmp


def _index_picked(tmp: Path) -> Path:
    return _index(RIGHT_MAP)(tmp) / INDEX


U8, F32 = ("U8", [2, 2], bytes(4)), ("F32", [2], bytes(8))

BROKEN: tuple[Broken, ...] = (
    # --- a file that is not what its name says
    Broken("no_such_file", lambda tmp: tmp / "m.safetensors", ("no such file",)),
    Broken("nul_in_path", lambda tmp: tmp / "m\0.safetensors", ("not a path",)),
    Broken("endless_path", lambda tmp: tmp / ("x" * 5000), ("cannot be read",)),
    Broken("empty_file", _bytes(b""), ("empty", "0 bytes")),
    Broken("four_bytes", _bytes(b"\x01\0\0\0"), ("not a safetensors", "4 bytes in all")),
    Broken("pickle_suffix", _bytes(b"x", "m.ckpt"), (".ckpt", "pickle files can run code")),
    Broken("gguf_suffix", _bytes(b"GGUF", "m.gguf"), (".gguf", "ComfyUI-GGUF")),
    Broken("onnx_suffix", _bytes(b"x", "m.onnx"), (".onnx", "compiled graph")),
    Broken("text_suffix", _bytes(b"x", "m.txt"), (".txt", ".safetensors")),
    Broken("no_suffix", _bytes(b"x", "m"), ("a file without suffix",)),
    Broken("gguf_renamed", _bytes(b"GGUF\x03\0\0\0" + bytes(64)), ("a GGUF file",)),
    Broken("pickle_zip_renamed", _pickle_zip, ("zip archive", "pickle")),
    Broken("pickle_renamed", _bytes(pickle.dumps({"a": 1}, 2) + bytes(64)), ("Python pickle",)),
    Broken("html_page", _bytes(b"\n<!DOCTYPE html><html>404</html>"), ("web page", "login")),
    Broken(
        "git_lfs_pointer",
        _bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n"),
        ("git-lfs pointer", "git lfs pull"),
    ),
    Broken("json_error_page", _bytes(b'{"error": "gated repository"}'), ("a JSON text",)),
    Broken("gzip_renamed", _bytes(b"\x1f\x8b\x08" + bytes(32)), ("compressed archive",)),
    Broken("download_of_zeros", _bytes(bytes(4096)), ("zeros", "never finished")),
    Broken("fifo", _fifo, ("not a regular file", "pipe")),
    Broken("fifo_in_folder", _fifo_in_folder, ("not a regular file", "pipe")),
    Broken("fifo_as_config", _fifo_config, ("not a regular file", "config.json")),
    Broken("dangling_link", _dangling, ("link points to nothing", "gone.safetensors")),
    Broken("link_to_itself", _link_loop, ("cannot be read",)),
    # --- the header
    Broken("truncated", _truncated, ("cut off", "b.weight", "bytes")),
    Broken("header_length_too_long", _header(_entry(), length=500), ("header length of 500",)),
    Broken("header_length_huge", _header(_entry(), length=2**62), ("header length of", str(2**62))),
    Broken("header_length_minus_one", _header(_entry(), length=2**64 - 1), ("header length",)),
    Broken("header_length_zero", _header(_entry(), length=0), ("header length of 0",)),
    Broken("header_length_too_short", _header(_entry(), length=20), ("not valid JSON",)),
    Broken("header_not_json", _header(b"{tensors here}"), ("not valid JSON", "line 1")),
    Broken("header_not_an_object", _header(b'["w"]           '), ("not a safetensors file",)),
    Broken("header_not_utf8", _header(b'{"\xff\xfe": 1}'), ("UTF-8", "0xff")),
    Broken("header_nested_endlessly", _header(b'{"w":' + b"[" * 200000), ("not valid JSON",)),
    Broken("header_nan", _header(b'{"w": NaN}'), ("NaN is not JSON",)),
    Broken("header_without_tensors", _header({}, b""), ("no tensors",)),
    Broken("metadata_not_strings", _header({"__metadata__": {"a": 1}}, b""), ("__metadata__",)),
    Broken("metadata_not_an_object", _header({"__metadata__": []}, b""), ("__metadata__", "list")),
    Broken("duplicate_tensor", _duplicate, ("twice", "layer: w", "duplicate key")),
    Broken("entry_not_an_object", _header({"w": 3}), ("layer: w", "int")),
    Broken("entry_without_shape", _header({"w": {"dtype": "U8"}}), ("no shape, data_offsets",)),
    Broken("name_not_text", _header(b'{"\\ud800": {}}'), ("not valid text", "surrogate")),
    Broken("dtype_unknown", _header(_entry(dtype="Q4_K")), ("dtype", "'Q4_K'", "BF16")),
    Broken("dtype_not_text", _header(_entry(dtype=["F32"])), ("dtype", "['F32']")),
    Broken("shape_negative", _header(_entry(shape=[-2, -2])), ("shape", "[-2, -2]")),
    Broken("shape_not_integers", _header(_entry(shape=[2.0, 2])), ("shape", "2.0")),
    Broken("shape_booleans", _header(_entry(shape=[True, 4])), ("shape", "True")),
    Broken("shape_overflows", _header(_entry(shape=[0, 2**64])), ("shape", str(2**64))),
    Broken("shape_of_many_dimensions", _header(_entry(shape=[1] * 65)), ("shape is wrong",)),
    Broken("size_mismatch", _header(_entry(shape=[2, 3])), ("16 bytes", "24 bytes")),
    Broken("offsets_reversed", _header(_entry(data_offsets=[16, 0])), ("data_offsets", "[16, 0]")),
    Broken("offsets_negative", _header(_entry(data_offsets=[-16, 0])), ("data_offsets", "-16")),
    Broken("offsets_incomplete", _header(_entry(data_offsets=[0])), ("data_offsets", "[0]")),
    Broken("offsets_out_of_range", _two([0, 16], [1016, 1032], 32), ("cut off", "layer: b")),
    Broken("offsets_overlap", _two([0, 16], [8, 24], 24), ("overlap", "byte 8", "byte 16")),
    Broken("offsets_same", _two([0, 16], [0, 16], 16), ("overlap", "layer: b")),
    Broken("hole", _two([0, 16], [20, 36], 36), ("hole", "byte 20", "byte 16", "where a ends")),
    Broken("hole_at_start", _two([4, 20], [20, 36], 36), ("hole", "where the header ends")),
    Broken("bytes_at_the_end", _two([0, 16], [16, 32], 40), ("follow the last tensor",)),
    # --- folders
    Broken("empty_folder", lambda tmp: tmp, ("holds no weights", "an empty folder")),
    Broken("folder_without_weights", _folder("README.md"), ("no weights", "README.md")),
    Broken("folder_of_pickles", _folder("model.bin"), ("only .bin files", "run code")),
    Broken("folder_of_gguf", _folder("m.gguf"), ("only .gguf files", "ComfyUI-GGUF")),
    Broken("folder_named_as_file", _named_folder, ("holds no weights", "x.safetensors")),
    Broken("folder_of_folders", _only_folders, ("choose one of its folders: transformer",)),
    Broken("several_checkpoints", _several, ("several", "bf16.safetensors, fp8.safetensors")),
    Broken("pipeline_without_model", _pipeline_without_model, ("no diffusion model", "vae")),
    Broken("shard_missing", _shards(3, present=2), ("shard is missing", "2 of 3", "number 3")),
    Broken("shard_numbers_wrong", _shard_numbers, ("numbers are wrong", "number 3 of 2")),
    Broken("key_in_two_shards", _key_twice, ("two shards", "same.weight", shard(1), shard(2))),
    Broken("shards_contradict", _metadata_differs, ("contradict", "quantization_config")),
    Broken("index_opened", _index_picked, ("index", "choose the folder")),
    Broken("index_not_json", _broken_index, ("JSON file is broken", INDEX)),
    Broken("index_without_map", _index(None), ("no weight_map", INDEX)),
    Broken(
        "index_names_missing_shard",
        _index({**RIGHT_MAP, "l3.weight": shard(3)}),
        ("shard that the index names is missing", "l3.weight", shard(3)),
    ),
    Broken("index_climbs", _index({"l1.weight": "../x.safetensors"}), ("outside", "'../x.")),
    Broken("index_absolute", _index({"l1.weight": "/etc/passwd"}), ("outside", "/etc/passwd")),
    Broken("index_backslash", _index({"l1.weight": "..\\x.safetensors"}), ("outside",)),
    Broken("index_drive", _index({"l1.weight": "C:x.safetensors"}), ("outside", "C:x")),
    Broken("index_shard_not_text", _index({"l1.weight": 1}), ("outside", "layer: l1.weight")),
    Broken("index_of_pickles", _index({"l1.weight": "m.bin"}), ("'m.bin'", "run code")),
    Broken(
        "index_expects_more",
        _index({**RIGHT_MAP, "l9.weight": shard(2)}),
        ("lacks a tensor", "l9.weight", "in no shard"),
    ),
    Broken(
        "index_swaps_shards",
        _index({"l1.weight": shard(2), "l2.weight": shard(1)}),
        ("lacks a tensor", f"in {shard(1)}", f"in {shard(2)}"),
    ),
    Broken(
        "index_expects_less",
        lambda tmp: (
            write(tmp / shard(1, 1), weights("l1.weight", "l2.weight"))
            and write_index(tmp / INDEX, {"l1.weight": shard(1, 1)}).parent
        ),
        ("the index does not name", "l2.weight"),
    ),
    # --- configs
    Broken("config_not_json", _component("{"), ("JSON file is broken", "config.json")),
    Broken("config_not_an_object", _component("[1]"), ("not hold an object", "list")),
    Broken(
        "config_quantization_not_an_object",
        _component({"quantization_config": "sdnq"}),
        ("quantization_config is not an object", "'sdnq'"),
    ),
    Broken(
        "quantization_config_not_an_object",
        _component({}, quantization_config__json="7"),
        ("not hold an object", "quantization_config.json", "int"),
    ),
    Broken(
        "quant_method_unknown",
        _component({"quantization_config": {"quant_method": "magic"}}),
        ("unknown method", "'magic'", "sdnq"),
    ),
    Broken(
        "quant_method_missing",
        _component({"quantization_config": {"bits": 4}}),
        ("no quant_method", "config.json"),
    ),
    Broken(
        "quant_method_not_text",
        _component({"quantization_config": {"quant_method": 4}}),
        ("unknown method", "4"),
    ),
    Broken(
        "config_of_another_model",
        _component({"quantization_config": {"quant_method": "bitsandbytes"}}, sdnq_layer("a")),
        ("contradicts itself", "bitsandbytes", "sdnq", "set scheme to sdnq"),
    ),
    # --- schemes that are recognised and not read
    Broken("gptq", _tensors({"a.qweight": U8, "a.qzeros": U8, "a.scales": F32}), ("GPTQ / AWQ",)),
    Broken("compressed_tensors", _tensors({"a.weight_packed": U8}), ("compressed-tensors",)),
    Broken(
        "hqqsvd",
        _tensors({"a.weight": U8, "a.scale": F32, "a.svd_up": F32, "a.nbits": U8}),
        ("hqqsvd", "kanttouchthis"),
    ),
    # --- markers
    Broken("codes_without_scale", _tensors({"a.weight": U8}), ("a.weight", "U8 [2, 2]")),
    Broken("scaled_fp8_marker_lost", _tensors({"a.scale_weight": F32}), ("scaled_fp8", "layer: a")),
    Broken("marker_not_json", _tensors({"a.comfy_quant": marker(b"{")}), ("broken", "layer: a")),
    Broken("marker_not_text", _tensors({"a.comfy_quant": F32}), ("not a text", "F32 [2]")),
    Broken("marker_without_format", _tensors({"a.comfy_quant": marker({})}), ("which format",)),
    Broken(
        "marker_and_unmarked_scale",
        _tensors(
            {
                "a.weight": U8,
                "a.comfy_quant": marker({"format": "float8_e4m3fn"}),
                "b.weight": U8,
                "b.weight_scale": F32,
            }
        ),
        ("contradicts itself", "such as b"),
    ),
    Broken(
        "metadata_not_json",
        _tensors(weights("a"), {"_quantization_metadata": "{"}),
        ("metadata is broken", "_quantization_metadata"),
    ),
    Broken(
        "metadata_layer_without_format",
        _tensors(weights("a"), {"_quantization_metadata": '{"layers": {"a": 1}}'}),
        ("which format", "layer: a"),
    ),
)


def _outside(models: Path, name: str) -> Path:
    """A right checkpoint beside the model folder."""
    return write(models.parent / "elsewhere" / name, weights("a.weight"))


def _climb(name: str):
    def make(models: Path) -> str:
        _outside(models, "m.safetensors")
        return name

    return make


def _absolute(models: Path) -> str:
    return str(write(models / "m.safetensors", weights("a.weight")))


_NAME = "not the name of a checkpoint"
BROKEN_NAMES: tuple[BrokenName, ...] = (
    BrokenName("empty", lambda models: "", (_NAME,)),
    BrokenName("the_folder_itself", lambda models: ".", (_NAME,)),
    BrokenName("nul", lambda models: "m\0.safetensors", (_NAME, "\\x00")),
    BrokenName("absolute", _absolute, (_NAME, "relative path")),
    BrokenName("climbs", _climb("../elsewhere/m.safetensors"), (_NAME, "..")),
    BrokenName("climbs_inside", _climb("a/../../elsewhere/m.safetensors"), (_NAME,)),
    BrokenName("climbs_by_backslash", _climb("..\\elsewhere\\m.safetensors"), (_NAME,)),
    BrokenName("drive", lambda models: "C:\\m.safetensors", (_NAME, "C:")),
    BrokenName("drive_relative", lambda models: "C:m.safetensors", (_NAME,)),
    BrokenName("network_share", lambda models: "\\\\host\\share\\m.safetensors", (_NAME,)),
    BrokenName("unknown", lambda models: "nothing.safetensors", ("no checkpoint of this name",)),
)
