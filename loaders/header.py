"""The header of a safetensors file, checked so far that no tensor can be other than it claims.

A file is ``u64 header length | JSON header | tensor bytes``. The header maps a tensor's name to
``{"dtype", "shape", "data_offsets": [start, end]}`` (offsets count from the header's end) and
``__metadata__`` to an object of strings; the tensors fill the rest of the file without overlap and
without a gap. A file that is something else altogether is called by its name.
"""

from __future__ import annotations

import json
import math
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from ..quant.errors import LowBitError

__all__ = [
    "DOWNLOAD_AGAIN",
    "DTYPES",
    "INSTEAD_OF",
    "TensorInfo",
    "read_header",
    "read_json",
    "status",
    "unreadable",
]

# Safetensors dtype code -> (bits of an element, attribute of torch or None where it has no dtype).
DTYPES: dict[str, tuple[int, str | None]] = {
    "BOOL": (8, "bool"),
    "U8": (8, "uint8"),
    "U16": (16, "uint16"),
    "U32": (32, "uint32"),
    "U64": (64, "uint64"),
    "I8": (8, "int8"),
    "I16": (16, "int16"),
    "I32": (32, "int32"),
    "I64": (64, "int64"),
    "F4": (4, "float4_e2m1fn_x2"),
    "F6_E2M3": (6, None),
    "F6_E3M2": (6, None),
    "F8_E4M3": (8, "float8_e4m3fn"),
    "F8_E5M2": (8, "float8_e5m2"),
    "F8_E8M0": (8, "float8_e8m0fnu"),
    "F8_E4M3FNUZ": (8, "float8_e4m3fnuz"),
    "F8_E5M2FNUZ": (8, "float8_e5m2fnuz"),
    "F16": (16, "float16"),
    "BF16": (16, "bfloat16"),
    "F32": (32, "float32"),
    "F64": (64, "float64"),
    "C64": (64, "complex64"),
}

MAX_JSON = 100_000_000  # the limit of the format's reference implementation for a header
MAX_DIMS = 64  # torch's own limit
MAX_INT = 2**63 - 1

DOWNLOAD_AGAIN = "download or copy the file again and compare its size with the original's"
_LFS = "fetch the real file ('git lfs pull' in that repository, or a direct download)"
_PICKLE = (
    "pickle files can run code when they are read and are never opened here: get the "
    ".safetensors form of this model, or convert it on a machine where you trust the file"
)
_GGUF = (
    "open GGUF files with the nodes of ComfyUI-GGUF (city96), or get the .safetensors form of this "
    "model"
)
_ONNX = "ONNX holds a compiled graph, not a checkpoint: get the .safetensors form of this model"

# Suffix of a file that is never opened -> what to do instead.
INSTEAD_OF = {
    ".gguf": _GGUF,
    ".onnx": _ONNX,
    **dict.fromkeys((".bin", ".pt", ".pt2", ".pth", ".ckpt", ".pkl"), _PICKLE),
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor as its header states it.

    ``start`` and ``end`` are byte offsets in ``file``. ``dtype`` is the safetensors code; ``shape``
    counts elements also where torch packs two in a byte (``F4``: torch's last dimension is half).
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def torch_dtype(self) -> torch.dtype:
        """torch's dtype. Raises LowBitError where this torch has none for the code."""
        attribute = DTYPES[self.dtype][1]
        found = getattr(torch, attribute, None) if attribute else None
        if found is None:
            raise LowBitError(
                "this PyTorch has no dtype for the tensor",
                file=self.file,
                layer=self.name,
                found=f"{self.dtype} with PyTorch {torch.__version__}",
                expected="a dtype that it knows",
                remedy="update PyTorch"
                if attribute
                else "use a checkpoint that stores these values as raw bytes (U8)",
            )
        return found


def unreadable(path: Path, error: OSError) -> LowBitError:
    return LowBitError(
        "the file cannot be read",
        file=path,
        found=f"{type(error).__name__}: {error.strerror or error}",
        expected="something readable",
        remedy="check that it exists, that this user may read it and that its disk is well",
    )


def status(path: Path) -> os.stat_result:
    """``path.stat()``. Raises LowBitError where there is nothing, or nothing that can be read."""
    try:
        return path.stat()
    except (OSError, ValueError) as error:
        if isinstance(error, FileNotFoundError) and path.is_symlink():
            raise LowBitError(
                "the link points to nothing",
                file=path,
                found=os.readlink(path),
                expected="a link to a file that exists",
                remedy="restore the file it points to, or remove the link",
            ) from error
        if isinstance(error, (FileNotFoundError, NotADirectoryError)):
            raise LowBitError(
                "there is no such file or folder",
                file=path,
                found="nothing at this path",
                expected="a checkpoint",
                remedy="refresh the list of models and choose again",
            ) from error
        if isinstance(error, OSError):
            raise unreadable(path, error) from error
        raise LowBitError(
            "not a path",
            file=repr(path),
            found=error,
            expected="the path of a file or folder",
            remedy="choose the checkpoint from the list",
        ) from error


def _open_regular(path: Path) -> BinaryIO:
    """Open for reading, but only a regular file: a pipe would block for ever."""
    mode = status(path).st_mode
    if not stat.S_ISREG(mode):
        raise LowBitError(
            "not a regular file",
            file=path,
            found="a folder" if stat.S_ISDIR(mode) else "a pipe, socket or device",
            expected="a file on a disk",
            remedy="remove it from the model folders",
        )
    try:
        return path.open("rb")
    except OSError as error:
        raise unreadable(path, error) from error


def read_json(path: Path) -> dict:
    """A JSON file that must hold an object."""
    with _open_regular(path) as handle:
        try:
            raw = handle.read(MAX_JSON + 1)
        except OSError as error:
            raise unreadable(path, error) from error
    remedy = "restore the file from the model's origin"
    if len(raw) > MAX_JSON:
        raise LowBitError(
            "the JSON file is too large",
            file=path,
            found=f"more than {MAX_JSON} bytes",
            expected="a small text file",
            remedy=remedy,
        )
    try:
        value = json.loads(raw.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise LowBitError(
            "the JSON file is broken",
            file=path,
            found=str(error),
            expected="valid JSON in UTF-8",
            remedy=remedy,
        ) from error
    if not isinstance(value, dict):
        raise LowBitError(
            "the JSON file does not hold an object",
            file=path,
            found=type(value).__name__,
            expected="{...}",
            remedy=remedy,
        )
    return value


def _foreign(head: bytes) -> tuple[str, str] | None:
    """What a file that is no safetensors file is, by its first bytes: (description, remedy)."""
    text = head.lstrip().lower()
    if head.startswith(b"version https://git-lfs"):
        return "a git-lfs pointer: the small text that stands in for the real file", _LFS
    if text.startswith((b"<!doctype", b"<html", b"<head", b"<?xml")):
        return "a web page saved under this name", (
            "the download got a login or error page: open the address in a browser, then "
            "download the file itself"
        )
    if head.startswith(b"GGUF"):
        return "a GGUF file under a wrong name", _GGUF
    if head.startswith(b"PK\x03\x04"):
        return "a zip archive: most likely a PyTorch pickle under a wrong name", _PICKLE
    if len(head) > 1 and head[0] == 0x80 and head[1] in (2, 3, 4, 5):
        return "a Python pickle under a wrong name", _PICKLE
    if head.startswith((b"\x1f\x8b", b"7z\xbc\xaf", b"Rar!", b"\x28\xb5\x2f\xfd", b"BZh")):
        return "a compressed archive", "unpack it and use the .safetensors file inside"
    if head.startswith((b"{", b"[")):
        return "a JSON text", DOWNLOAD_AGAIN
    if not any(head):
        return "zeros: a download that was begun but never finished", DOWNLOAD_AGAIN
    return None


class _DuplicateKeyError(ValueError):
    pass


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        raise _DuplicateKeyError(next(k for k, _ in pairs if k in seen or seen.add(k)))
    return result


def _no_constant(text: str) -> object:
    raise ValueError(f"{text} is not JSON")


def read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str], int]:
    """The checked header of a safetensors file: tensors, metadata, size of the file in bytes."""
    with _open_regular(path) as handle:
        try:
            size = os.fstat(handle.fileno()).st_size
            head = handle.read(64)
            if size == 0:
                raise LowBitError(
                    "the file is empty",
                    file=path,
                    found="0 bytes",
                    expected="a safetensors file",
                    remedy=DOWNLOAD_AGAIN,
                )
            length = int.from_bytes(head[:8], "little") if len(head) >= 8 else -1
            if not 2 <= length <= min(size - 8, MAX_JSON) or head[8:9] != b"{":
                raise _not_safetensors(path, head, size, length)
            handle.seek(8)
            raw = handle.read(length)
        except OSError as error:
            raise unreadable(path, error) from error
    try:
        header = json.loads(
            raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant
        )
    except _DuplicateKeyError as error:
        raise LowBitError(
            "the header names one tensor twice",
            file=path,
            layer=str(error),
            found="a duplicate key",
            expected="every name once",
            remedy="the program that wrote this file is at fault: get another copy of the model",
        ) from error
    except (ValueError, RecursionError) as error:
        raise LowBitError(
            "the header is not valid JSON in UTF-8",
            file=path,
            found=str(error),
            expected=f"a JSON object of {length} bytes",
            remedy=DOWNLOAD_AGAIN,
        ) from error
    metadata = header.pop("__metadata__", None)
    if metadata is None:
        metadata = {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise LowBitError(
            "the header's __metadata__ is not an object of strings",
            file=path,
            layer="__metadata__",
            found=type(metadata).__name__ if not isinstance(metadata, dict) else "other values",
            expected='{"name": "text", ...}',
            remedy="write the file again with metadata values as text",
        )
    tensors = {name: _tensor(path, name, entry, 8 + length) for name, entry in header.items()}
    _check_layout(path, tensors, 8 + length, size)
    return tensors, metadata, size


def _not_safetensors(path: Path, head: bytes, size: int, length: int) -> LowBitError:
    known = _foreign(head)
    if known:
        return LowBitError(
            "not a safetensors file",
            file=path,
            found=known[0],
            expected="the bytes of a safetensors file",
            remedy=known[1],
        )
    if length < 0:
        found = f"{size} bytes in all"
    elif head[8:9] == b"{" or length > size - 8:
        found = f"a header length of {length} in a file of {size} bytes"
    else:
        found = f"the bytes {head[:16].hex(' ')} at the start"
    return LowBitError(
        "not a safetensors file, or a broken one",
        file=path,
        found=found,
        expected=f"a header length between 2 and {max(2, min(size - 8, MAX_JSON))}, then '{{'",
        remedy=DOWNLOAD_AGAIN,
    )


def _tensor(path: Path, name: str, entry: object, base: int) -> TensorInfo:
    """One checked entry of a header whose tensor bytes begin at ``base``."""

    def wrong(what: str, found: object, expected: str, remedy: str = DOWNLOAD_AGAIN) -> LowBitError:
        layer = name.encode("utf-8", "backslashreplace").decode()
        return LowBitError(
            what, file=path, layer=layer, found=found, expected=expected, remedy=remedy
        )

    if any("\ud800" <= c <= "\udfff" for c in name):
        raise wrong("a tensor's name is not valid text", "a lone surrogate", "Unicode text")
    if not isinstance(entry, dict):
        raise wrong(
            "a header entry is not an object", type(entry).__name__, "dtype, shape, offsets"
        )
    missing = [key for key in ("dtype", "shape", "data_offsets") if key not in entry]
    if missing:
        raise wrong("a header entry is incomplete", f"no {', '.join(missing)}", "all three")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise wrong(
            "the tensor's dtype is unknown",
            repr(dtype),
            f"one of {', '.join(DTYPES)}",
            "if a newer safetensors has this dtype, update this pack; else get another copy",
        )
    if not _natural(shape) or len(shape) > MAX_DIMS:
        raise wrong("the tensor's shape is wrong", f"{shape!r:.200}", "a list of integers >= 0")
    if not _natural(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise wrong(
            "the tensor's data_offsets are wrong", f"{offsets!r:.200}", "[start, end], start <= end"
        )
    bits = math.prod(shape) * DTYPES[dtype][0]
    if bits != 8 * (offsets[1] - offsets[0]):
        raise wrong(
            "the tensor's size does not fit its shape",
            f"{offsets[1] - offsets[0]} bytes",
            f"{bits // 8}{'' if bits % 8 == 0 else f' and {bits % 8}/8'} bytes for {dtype} {shape}",
        )
    return TensorInfo(name, dtype, tuple(shape), path, base + offsets[0], base + offsets[1])


def _natural(value: object) -> bool:
    return isinstance(value, list) and all(type(v) is int and 0 <= v <= MAX_INT for v in value)


def _check_layout(path: Path, tensors: dict[str, TensorInfo], base: int, size: int) -> None:
    """The tensors must fill ``[base, size)`` of the file without overlap and without a gap."""
    order = sorted(tensors.values(), key=lambda info: (info.start, info.end))
    last = max(order, key=lambda info: info.end, default=None)
    if last is not None and last.end > size:
        raise LowBitError(
            "the file is cut off, or its header is wrong",
            file=path,
            layer=last.name,
            found=f"{size} bytes",
            expected=f"{last.end} bytes, by the tensor offsets in the header",
            remedy=DOWNLOAD_AGAIN,
        )
    end, before = base, "the header"
    for info in order:
        if info.start != end:
            raise LowBitError(
                "two tensors overlap" if info.start < end else "there is a hole between tensors",
                file=path,
                layer=info.name,
                found=f"the tensor begins at byte {info.start - base} of the data",
                expected=f"byte {end - base}, where {before} ends",
                remedy=DOWNLOAD_AGAIN,
            )
        end, before = info.end, info.name
    if end != size:
        raise LowBitError(
            "bytes follow the last tensor",
            file=path,
            found=f"{size} bytes",
            expected=f"{end} bytes, by the tensor offsets in the header",
            remedy=DOWNLOAD_AGAIN,
        )
