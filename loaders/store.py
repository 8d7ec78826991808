"""Safetensors files and folders written tensor by tensor, which appear when they are whole.

=====================  ==========================================================================
on disk while writing  ``.NAME.partial`` beside the target, locked by its writer
when it is whole       synced, then renamed to ``NAME``; the folder that holds it is synced too
after an error         removed, an interrupt included
after a killed writer  left behind; the next writer of the same name takes it over
=====================  ==========================================================================

The header of a safetensors file comes first and tells every size, which nobody knows before the
last layer is quantized. So room is left for it, filled with spaces at the end, as the format
allows; where the room was too small the tensors are copied behind a larger header. Tensors follow
each other without gaps, so those whose bytes would push the next one off its alignment wait for the
end of the file: readers map the file into memory and want whole elements.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import torch

from ..quant.errors import LowBitError
from .header import DTYPES, MAX_JSON

__all__ = ["TensorFile", "TensorFolder", "check_room", "partial_of"]

ALIGNMENT = 8  # of the largest elements
PAGE = 4096  # where tensors start, so that a reader can map them without a copy
ENTRY = 256  # bytes of a header that are left for a tensor
CHUNK = 64 * 2**20
LOCK_AT = 2**62  # a byte that no file has: Windows keeps readers from locked bytes
LOCK = ".lock"  # in a folder that is being written
SHARD_BYTES = 5 * 10**9

_CODES = {getattr(torch, name): code for code, (_, name) in DTYPES.items() if name}
_FULL = {errno.ENOSPC, errno.EDQUOT} if hasattr(errno, "EDQUOT") else {errno.ENOSPC}


def partial_of(target: Path) -> Path:
    """The name that a file or folder has until it is whole."""
    return target.with_name(f".{target.name}.partial")


def check_room(target: Path, nbytes: int) -> None:
    """Raise where the disk of a target cannot take this many bytes.

    Raises:
        LowBitError: It has less room, or its folder does not exist.
    """
    try:
        free = shutil.disk_usage(target.parent).free
    except OSError as error:
        raise _cannot_write(target, error) from error
    if free < nbytes:
        raise LowBitError(
            "The disk has no room for the file that would be written.",
            file=target,
            found=f"{_size(free)} free",
            expected=f"{_size(nbytes)}",
            remedy="Free some space, or write to another disk.",
        )


class TensorFile:
    """One safetensors file. Use as a context; without :meth:`finish` nothing is left behind.

    Args:
        target: Its final name.
        entries: How many tensors to leave room for in the header.
        metadata_bytes: Bytes of metadata to leave room for.
        overwrite: Replace an existing file, once this one is whole.

    Raises:
        LowBitError: The target exists or cannot be written, or another writer is at work on it.
    """

    def __init__(
        self,
        target: str | Path,
        *,
        entries: int = 1024,
        metadata_bytes: int = 65536,
        overwrite: bool = False,
    ) -> None:
        self.target = Path(target)
        self._overwrite = overwrite
        self._refuse_existing()
        self._partial = partial_of(self.target)
        self._header = _room(entries * ENTRY + metadata_bytes)
        self._tensors: dict[str, dict] = {}
        self._waiting: dict[str, torch.Tensor] = {}
        self._end = 0
        with _told(self.target):
            # Not truncated before it is locked: another writer may be at work on it.
            self._file: BinaryIO = os.fdopen(
                os.open(self._partial, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666),
                "r+b",
            )
        try:
            _lock_or_refuse(self._file, self.target)
            with _told(self.target):
                self._file.truncate(0)
                self._file.seek(8 + self._header)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.discard()

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors so far."""
        return self._end + sum(tensor.nbytes for tensor in self._waiting.values())

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tensors so far."""
        return (*self._tensors, *self._waiting)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Append a tensor.

        Args:
            name: Not used before.
            tensor: Of any shape, dtype and device; read before this returns.

        Raises:
            LowBitError: The disk is full or fails.
            ValueError: The name stands there already, or safetensors has no such dtype.
        """
        if name in self._tensors or name in self._waiting:
            raise ValueError(f"two tensors are called {name}")
        if tensor.dtype not in _CODES:
            raise ValueError(f"{name}: safetensors has no {tensor.dtype}")
        if tensor.nbytes % ALIGNMENT:
            self._waiting[name] = tensor.detach().to("cpu", copy=True)
        else:
            self._write(name, tensor)

    def finish(self, metadata: Mapping[str, str] | None = None) -> Path:
        """Write the header, sync, and give the file its name.

        Args:
            metadata: Strings for the header's ``__metadata__``.

        Returns:
            The target.

        Raises:
            LowBitError: The disk is full or fails; or the existing file cannot be replaced because
                a program holds it (Windows): then the complete new file has the name it tells.
        """
        self._refuse_existing()  # it may have appeared meanwhile
        for name, tensor in sorted(self._waiting.items(), key=lambda item: -item[1].itemsize):
            self._write(name, tensor)
        self._waiting.clear()
        header = dict(self._tensors)
        if metadata:
            header = {"__metadata__": dict(metadata), **header}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) > MAX_JSON:
            raise ValueError(f"a header of {len(text)} bytes, safetensors allows {MAX_JSON}")
        with _told(self.target):
            if len(text) > self._header:
                self._widen(len(text))
            self._file.seek(0)
            self._file.write(self._header.to_bytes(8, "little") + text.ljust(self._header))
            self._file.flush()
            os.fsync(self._file.fileno())
        self._file.close()
        _publish(self._partial, self.target)
        return self.target

    def discard(self) -> None:
        """Remove what was written, unless it was finished."""
        if not self._file.closed:
            # Removed before it is unlocked, where the system allows that.
            with contextlib.suppress(OSError):
                self._partial.unlink()
            self._file.close()
            with contextlib.suppress(OSError):
                self._partial.unlink()

    def _refuse_existing(self) -> None:
        if self.target.is_dir() or (self.target.exists() and not self._overwrite):
            raise LowBitError(
                "There is something of this name already.",
                file=self.target,
                remedy="Choose another name, or remove it.",
            )

    def _write(self, name: str, tensor: torch.Tensor) -> None:
        start = self._end
        with _told(self.target, name):
            for chunk in _chunks(tensor):
                self._file.write(chunk)
                self._end += len(chunk)
        self._tensors[name] = {
            "dtype": _CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, self._end],
        }

    def _widen(self, needed: int) -> None:
        """Move all tensors back, the last bytes first, to make room for the header."""
        wider = _room(needed)
        end = self._end
        while end > 0:
            start = max(0, end - CHUNK)
            self._file.seek(8 + self._header + start)
            data = self._file.read(end - start)
            self._file.seek(8 + wider + start)
            self._file.write(data)
            end = start
        self._header = wider


class TensorFolder:
    """A folder of shards, their index and JSON files. Use as a context, like :class:`TensorFile`.

    Args:
        target: Its final name; it must not exist, or be empty.
        stem: Of the weight files: ``STEM.safetensors``, or ``STEM-00001-of-0000N.safetensors`` with
            ``STEM.safetensors.index.json``.
        shard_bytes: Where a shard ends.
        entries, metadata_bytes: As of :class:`TensorFile`, for each shard.

    Raises:
        LowBitError: The target exists or cannot be written.
    """

    def __init__(
        self,
        target: str | Path,
        stem: str,
        *,
        shard_bytes: int = SHARD_BYTES,
        entries: int = 1024,
        metadata_bytes: int = 65536,
    ) -> None:
        self.target = Path(target)
        self._refuse_existing()
        self._partial = partial_of(self.target)
        self._stem, self._shard_bytes = stem, shard_bytes
        self._room = {"entries": entries, "metadata_bytes": metadata_bytes}
        self._shards: list[tuple[str, ...]] = []
        self._bytes = 0
        with _told(self.target):
            self._partial.mkdir(exist_ok=True)
            self._held: BinaryIO = (self._partial / LOCK).open("ab")
        try:
            _lock_or_refuse(self._held, self.target)
            with _told(self.target):
                for left in self._partial.iterdir():  # of a writer that was killed
                    if left.name != LOCK:
                        left.unlink()
            self._shard = self._open()
        except BaseException:
            self._held.close()
            raise

    def __enter__(self) -> TensorFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.discard()

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Append a tensor; see :meth:`TensorFile.add`."""
        if any(name in names for names in self._shards):
            raise ValueError(f"two tensors are called {name}")
        if self._shard.names and self._shard.nbytes + tensor.nbytes > self._shard_bytes:
            self._close(None)
            self._shard = self._open()
        self._shard.add(name, tensor)

    def add_json(self, name: str, value: object) -> None:
        """Write a JSON file into the folder."""
        with _told(self.target):
            _write_json(self._partial / name, value)

    def finish(self, metadata: Mapping[str, str] | None = None) -> Path:
        """Name the shards, write their index, and give the folder its name.

        Args:
            metadata: For the header of the last shard, as of :meth:`TensorFile.finish`.

        Raises:
            LowBitError: The disk is full or fails.
        """
        self._close(metadata)
        with _told(self.target):
            if len(self._shards) == 1:
                only = self._partial / f"{self._stem}.safetensors"
                os.replace(self._partial / self._name(1), only)
            else:
                self._index()
            self._held.close()
            (self._partial / LOCK).unlink()
            _sync(self._partial)
            if self.target.exists():
                self.target.rmdir()  # an empty one
            os.replace(self._partial, self.target)
            _sync(self.target.parent)
        return self.target

    def discard(self) -> None:
        """Remove what was written, unless it was finished."""
        self._shard.discard()
        self._held.close()
        shutil.rmtree(self._partial, ignore_errors=True)

    def _refuse_existing(self) -> None:
        if self.target.exists() and not (self.target.is_dir() and not any(self.target.iterdir())):
            raise LowBitError(
                "There is something of this name already.",
                file=self.target,
                remedy="Choose another name, or remove it.",
            )

    def _name(self, number: int, count: int | None = None) -> str:
        tail = "" if count is None else f"-of-{count:05d}"
        return f"{self._stem}-{number:05d}{tail}.safetensors"

    def _open(self) -> TensorFile:
        return TensorFile(self._partial / self._name(len(self._shards) + 1), **self._room)

    def _close(self, metadata: Mapping[str, str] | None) -> None:
        names, nbytes = self._shard.names, self._shard.nbytes
        self._shard.finish({"format": "pt", **(metadata or {})})
        self._shards.append(names)
        self._bytes += nbytes

    def _index(self) -> None:
        weight_map = {}
        for number, names in enumerate(self._shards, 1):
            final = self._name(number, len(self._shards))
            os.replace(self._partial / self._name(number), self._partial / final)
            weight_map |= dict.fromkeys(names, final)
        index = {"metadata": {"total_size": self._bytes}, "weight_map": weight_map}
        _write_json(self._partial / f"{self._stem}.safetensors.index.json", index)


# ------------------------------------------------------------------------------------- the disk


def _room(nbytes: int) -> int:
    """Length of a header with this many bytes, so that tensors start on a page."""
    return -(-(8 + nbytes) // PAGE) * PAGE - 8


def _chunks(tensor: torch.Tensor) -> Iterator[memoryview]:
    flat = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
    for start in range(0, flat.numel(), CHUNK):
        yield memoryview(flat[start : start + CHUNK].numpy())


def _write_json(path: Path, value: object) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def _publish(partial: Path, target: Path) -> None:
    try:
        os.replace(partial, target)
    except PermissionError as error:  # Windows: a program has the old file open or mapped
        kept = _unused(target)
        with _told(target):
            os.replace(partial, kept)
        raise LowBitError(
            "The file is complete, but the old one of its name is in use and cannot be replaced.",
            file=target,
            found=f"the new file is {kept}",
            remedy="Close what uses the old file (a loaded model does), then rename the new one.",
        ) from error
    except OSError as error:
        raise _cannot_write(target, error) from error
    with _told(target):
        _sync(target.parent)


def _unused(target: Path) -> Path:
    number = 1
    while (kept := target.with_name(f"{target.stem}.new{number}{target.suffix}")).exists():
        number += 1
    return kept


def _sync(folder: Path) -> None:
    """Make renames in a folder last; Windows has no such call."""
    if os.name != "nt":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _windows_lock(file: BinaryIO) -> None:
    import msvcrt

    file.seek(LOCK_AT)
    msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)


def _posix_lock(file: BinaryIO) -> None:
    import fcntl

    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


_lock: Callable[[BinaryIO], None] = _windows_lock if os.name == "nt" else _posix_lock


def _lock_or_refuse(file: BinaryIO, target: Path) -> None:
    try:
        _lock(file)
    except OSError as error:
        raise LowBitError(
            "Another program is writing this now.",
            file=target,
            found=f"{partial_of(target).name} is locked",
            remedy="Wait for it, or choose another name.",
        ) from error


@contextlib.contextmanager
def _told(target: Path, layer: str | None = None) -> Iterator[None]:
    """Errors of the system as errors of the pack."""
    try:
        yield
    except OSError as error:
        raise _cannot_write(target, error, layer) from error


def _cannot_write(target: Path, error: OSError, layer: str | None = None) -> LowBitError:
    remedy = "Check that the folder exists, can be written to and is on a healthy disk."
    if error.errno in _FULL:
        remedy = "Free some space, or write to another disk."
    elif error.errno == errno.EFBIG:
        remedy = "This file system has a limit of file size (4 GB on FAT32): use another disk."
    return LowBitError(
        "The file cannot be written. Nothing was changed.",
        file=target,
        layer=layer,
        found=error.strerror or str(error),
        remedy=remedy,
    )


def _size(nbytes: int) -> str:
    return f"{nbytes / 2**30:.2f} GiB" if nbytes >= 2**30 // 10 else f"{nbytes / 2**20:.1f} MiB"
