"""What lies at a path, read from headers alone: one weight file, its shards, or a folder.

Nothing but safetensors headers and small JSON files is read before a tensor is asked for; tensors
are views of a private memory map, so that opening a 30 GB folder costs milliseconds and reading
it costs no anonymous memory.

| at the path | weights | configs |
|---|---|---|
| ``X.safetensors`` (or ``.sft``) | that file | none, unless it has a component's file name |
| ``X-00001-of-0000N.safetensors`` | the whole set ``X`` of that folder | as above |
| a folder | the index's shards, else the plain name, else the only set there | from the folder |
| a pipeline (``model_index.json``) | its ``transformer``, else its ``unet`` | from that folder |
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import mmap
import os
import stat
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..quant.errors import LowBitError
from .folder import (
    CONFIG_NAMES,
    PIPELINE_INDEX,
    WEIGHT_SUFFIXES,
    WeightSet,
    choose,
    complete,
    is_component_file,
    is_index,
    is_shard,
    list_checkpoints,
    list_folder,
    nothing_here,
    read_index,
    resolve,
    weight_sets,
)
from .header import (
    DOWNLOAD_AGAIN,
    INSTEAD_OF,
    TensorInfo,
    read_header,
    read_json,
    status,
    unreadable,
)

__all__ = ["Source", "TensorInfo", "list_checkpoints", "open_source", "resolve"]

OPENED_OF_PIPELINE = ("transformer", "unet")  # what a pipeline opened as a whole stands for


@dataclass(eq=False)
class Source:
    """A checkpoint: the tensors of one file or of all its shards, and the configs beside it.

    Attributes:
        path: The path that was opened (for a pipeline, its component's folder).
        files: The weight files.
        tensors: Name -> TensorInfo, over all files.
        metadata: ``__metadata__`` of the headers, merged.
        config: ``config.json`` as an object; empty without one.
        quantization_config: ``quantization_config.json``, else ``config["quantization_config"]``,
            else empty.
        kind: ``component`` when a config was read, else ``shards`` or ``file``.
        configs: The JSON files that were read (configs and index).
        beside: The names of all files in the folder that was opened; empty for a lone file.
    """

    path: Path
    files: tuple[Path, ...]
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str] = field(default_factory=dict)
    config: dict = field(default_factory=dict)
    quantization_config: dict = field(default_factory=dict)
    kind: str = "file"
    configs: tuple[Path, ...] = ()
    beside: frozenset[str] = frozenset()
    _sizes: dict[Path, int] = field(default_factory=dict, repr=False)
    _maps: dict[Path, memoryview] = field(default_factory=dict, init=False, repr=False)

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors as stored."""
        return sum(info.nbytes for info in self.tensors.values())

    def get(self, name: str) -> torch.Tensor:
        """The tensor, as a view of the memory-mapped file: READ ONLY, writing to it is a crash.

        It keeps its file mapped for as long as it lives, also after :meth:`close`. A tensor that
        the file does not align to its element size is copied, because kernels may not read it.

        Raises:
            LowBitError: No such tensor, no torch dtype for it, or the file changed meanwhile.
        """
        info = self.tensors.get(name)
        if info is None:
            near = difflib.get_close_matches(name, self.tensors, n=3)
            raise LowBitError(
                "the checkpoint has no such tensor",
                file=self.path,
                layer=name,
                found=f"similar names: {', '.join(near)}" if near else "no similar name",
                expected="a tensor that this layer needs",
                remedy="the file is incomplete or of another kind of model: check its origin",
            )
        dtype, shape = info.torch_dtype, list(info.shape)
        if info.dtype == "F4":
            if not shape or shape[-1] % 2:
                raise LowBitError(
                    "a row of 4-bit elements does not fill its bytes",
                    file=info.file,
                    layer=name,
                    found=f"shape {shape}",
                    expected="an even last dimension",
                    remedy=DOWNLOAD_AGAIN,
                )
            shape[-1] //= 2
        if info.nbytes == 0:
            return torch.empty(shape, dtype=dtype)
        view = self._map(info.file)[info.start : info.end]
        if info.start % dtype.itemsize:
            view = bytearray(view)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            return torch.frombuffer(view, dtype=dtype).view(shape)

    def _map(self, file: Path) -> memoryview:
        view = self._maps.get(file)
        if view is None:
            try:
                with file.open("rb") as handle:
                    size = os.fstat(handle.fileno()).st_size
                    if size != self._sizes[file]:
                        raise LowBitError(
                            "the file changed after it was opened",
                            file=file,
                            found=f"{size} bytes",
                            expected=f"{self._sizes[file]} bytes",
                            remedy="wait until it is written completely, then load it again",
                        )
                    view = memoryview(_mapped(handle.fileno()))
            except OSError as error:
                raise unreadable(file, error) from error
            self._maps[file] = view
        return view

    def close(self) -> None:
        """Let go of the files. Tensors handed out stay valid; a later ``get`` maps again."""
        # Never mmap.close(): torch keeps only a reference to the buffer, so an explicit unmapping
        # would pull the memory from under living tensors. The last reference unmaps.
        self._maps.clear()

    def fingerprint(self) -> str:
        """A digest of name, size and modification time of every file that was read.

        Raises LowBitError when one of them is gone.
        """
        digest = hashlib.sha256()
        for file in (*self.files, *self.configs):
            found = status(file)
            digest.update(f"{file}\0{found.st_size}\0{found.st_mtime_ns}\0".encode())
        return digest.hexdigest()


def _mapped(descriptor: int) -> mmap.mmap:
    """The whole file in memory; writing into it changes private pages and never the file.

    Where such a mapping is refused (it counts against the memory limit, though nobody writes), or
    is charged for at once (Windows), it is read-only.
    """
    if os.name != "nt":
        with contextlib.suppress(OSError):
            return mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY)
    return mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)


def open_source(path: str | Path) -> Source:
    """Open what lies at ``path``: read and check headers and configs, and no tensor.

    Raises:
        LowBitError: Nothing usable lies there, or something in it is broken.
    """
    path = Path(path)
    mode = status(path).st_mode
    if stat.S_ISDIR(mode):
        return _open_folder(path)
    name = path.name
    suffix = path.suffix.lower()
    if suffix not in WEIGHT_SUFFIXES:
        remedy = INSTEAD_OF.get(suffix, "choose a .safetensors file")
        if is_index(name):
            remedy = "choose the folder that holds the index and its shards"
        raise LowBitError(
            "this kind of file is not opened",
            file=path,
            found=suffix or "a file without suffix",
            expected=".safetensors",
            remedy=remedy,
        )
    beside: set[str] = set()
    group = WeightSet(path.stem, (name,))
    if is_shard(name) and stat.S_ISREG(mode):
        beside, _ = list_folder(path.parent)
        # A shard stands for its set.
        group = next((g for g in weight_sets(beside) if name in g.files), group)
    configs = ()
    if is_component_file(name):
        configs = tuple(n for n in CONFIG_NAMES if (path.parent / n).exists())
        beside = beside or list_folder(path.parent)[0]
    return _assemble(path, path.parent, group, configs, frozenset(beside))


def _open_folder(folder: Path) -> Source:
    files, folders = list_folder(folder)
    if PIPELINE_INDEX in files:
        for name in OPENED_OF_PIPELINE:
            if name in folders:
                return _open_folder(folder / name)
        raise LowBitError(
            "the pipeline has no diffusion model",
            file=folder,
            found=f"the folders {', '.join(sorted(folders)) or '(none)'}",
            expected=" or ".join(OPENED_OF_PIPELINE),
            remedy="download the missing folder of this pipeline",
        )
    sets = weight_sets(files)
    if not sets:
        raise nothing_here(folder, files, folders)
    group = choose(sets)
    if group is None:
        names = {g.index or g.files[0] for g in sets}
        raise LowBitError(
            "the folder holds several checkpoints and nothing says which one is meant",
            file=folder,
            found=", ".join(sorted(names)),
            expected="one checkpoint, an index, or a plain name (diffusion_pytorch_model)",
            remedy="choose one of these files instead of the folder",
        )
    configs = tuple(name for name in CONFIG_NAMES if name in files)
    return _assemble(folder, folder, group, configs, frozenset(files))


def _assemble(
    path: Path,
    folder: Path,
    group: WeightSet,
    config_names: tuple[str, ...],
    beside: frozenset[str],
) -> Source:
    """Read the headers and configs of one weight set."""
    configs = {name: read_json(folder / name) for name in config_names}
    config = configs.get("config.json", {})
    quantization = configs.get("quantization_config.json")
    if quantization is None:
        quantization = config.get("quantization_config")
        if quantization is None:
            quantization = {}
        if not isinstance(quantization, dict):
            raise LowBitError(
                "quantization_config is not an object",
                file=folder / "config.json",
                found=f"{quantization!r:.80}",
                expected='{"quant_method": ...}',
                remedy="restore the file from the model's origin",
            )
    weight_map = read_index(folder / group.index) if group.index else {}
    names = sorted(set(weight_map.values())) if weight_map else complete(folder, group)
    files = tuple(folder / name for name in names)
    tensors: dict[str, TensorInfo] = {}
    metadata: dict[str, str] = {}
    sizes: dict[Path, int] = {}
    for file in files:
        if not os.path.lexists(file) and group.index:
            raise LowBitError(
                "a shard that the index names is missing",
                file=folder / group.index,
                layer=next(key for key, shard in weight_map.items() if shard == file.name),
                found=f"no file {file.name}",
                expected=", ".join(names),
                remedy="download the missing shard into the folder",
            )
        own, own_metadata, sizes[file] = read_header(file)
        for key in own:
            if key in tensors:
                raise LowBitError(
                    "a tensor stands in two shards: the checkpoint is corrupt",
                    file=folder,
                    layer=key,
                    found=f"{tensors[key].file.name} and {file.name}",
                    expected="every tensor in one shard",
                    remedy="shards of two models or versions are mixed: download all of them again",
                )
        tensors |= own
        _merge_metadata(metadata, own_metadata, file)
    if weight_map:
        _check_index(folder / group.index, weight_map, tensors)
    if not tensors:
        raise LowBitError(
            "the checkpoint holds no tensors",
            file=path,
            found="an empty header",
            expected="weights",
            remedy=DOWNLOAD_AGAIN,
        )
    kind = "component" if config_names else "shards" if group.index or group.total else "file"
    return Source(
        path=path,
        files=files,
        tensors=tensors,
        metadata=metadata,
        config=config,
        quantization_config=quantization,
        kind=kind,
        configs=tuple(
            folder / name for name in (*config_names, *([group.index] if group.index else []))
        ),
        beside=beside,
        _sizes=sizes,
    )


def _check_index(path: Path, weight_map: dict[str, str], tensors: dict[str, TensorInfo]) -> None:
    """Index and shards must name the same tensors in the same files."""
    for key, shard in weight_map.items():
        info = tensors.get(key)
        if info is None or info.file.name != shard:
            raise LowBitError(
                "the shard lacks a tensor that the index expects in it",
                file=path,
                layer=key,
                found="in no shard" if info is None else f"in {info.file.name}",
                expected=f"in {shard}",
                remedy="index and shards are of different versions: download both again",
            )
    extra = [key for key in tensors if key not in weight_map]
    if extra:
        raise LowBitError(
            "a shard holds tensors that the index does not name",
            file=path,
            layer=extra[0],
            found=f"{len(extra)} tensors without an entry, in {tensors[extra[0]].file.name}",
            expected="every tensor of the shards in the index",
            remedy="download the index again; if the shards are right, remove the index file",
        )


def _merge_metadata(merged: dict[str, str], own: dict[str, str], file: Path) -> None:
    """Add one shard's metadata; where shards differ, only what decides the meaning must agree."""
    for key, value in own.items():
        if merged.setdefault(key, value) != value and "quantization" in key:
            raise LowBitError(
                "the shards' headers contradict each other",
                file=file,
                layer=key,
                found=f"{value:.80}",
                expected=f"{merged[key]:.80}",
                remedy="shards of two models are mixed: download all of them again",
            )
