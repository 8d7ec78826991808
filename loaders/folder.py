"""Which checkpoints lie in a folder, told from the names of its files, as diffusers tells it.

| files | checkpoint |
|---|---|
| ``X.safetensors`` (or ``.sft``) | that file |
| ``X-00001-of-0000N.safetensors`` ... | one set of shards, ``X`` |
| ``X.safetensors.index.json`` | the shards that it names |
| ``TWO_FILES`` | Nunchaku's older form: one checkpoint |
| several of these | ``X-mixed``, else the plain name (``diffusion_pytorch_model``), or none |

Makers of NVFP4 files put ``X-mixed``, with more layers in 16 bits, beside ``X``: it is the better
one, and what other programs open in such a folder.

From this come the list of checkpoints below ComfyUI's model folders and the way back from a name
in it to a path. No weight file is opened here.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

from ..quant.errors import LowBitError
from .header import INSTEAD_OF, read_json, unreadable

__all__ = [
    "CONFIG_NAMES",
    "DESCRIPTION",
    "PIPELINE_INDEX",
    "TWO_FILES",
    "WEIGHT_SUFFIXES",
    "WeightSet",
    "choose",
    "complete",
    "is_component_file",
    "is_index",
    "is_shard",
    "list_checkpoints",
    "list_folder",
    "nothing_here",
    "read_index",
    "resolve",
    "weight_sets",
]

WEIGHT_SUFFIXES = (".safetensors", ".sft")
CONFIG_NAMES = ("config.json", "quantization_config.json")
DESCRIPTION = "quant_model_description"  # ModelSlim's config; its name may go on
PIPELINE_INDEX = "model_index.json"
PIPELINE_MODELS = ("transformer", "transformer_2", "unet")  # what a pipeline is listed as
PLAIN_STEMS = ("diffusion_pytorch_model", "model")
TWO_FILES = ("transformer_blocks.safetensors", "unquantized_layers.safetensors")

_SHARD = re.compile(
    r"(?P<stem>.+)-(?P<number>\d+)-of-(?P<total>\d+)(?P<variant>\.[^.]+)?\.(?:safetensors|sft)",
    re.IGNORECASE,
)
# diffusers writes a variant before ".index" or after it, depending on its release.
_INDEX = re.compile(
    r"(?P<stem>.+)\.safetensors(?P<a>\.[^.]+)?\.index(?P<b>\.[^.]+)?\.json", re.IGNORECASE
)
_COMPONENT_FILE = re.compile(rf"(?:{'|'.join(PLAIN_STEMS)})(?:[.-].*)?\.(?:safetensors|sft)")
_DRIVE = re.compile(r"[A-Za-z]:")


def is_shard(name: str) -> bool:
    """Whether a file is one of several by its name."""
    return name in TWO_FILES or _SHARD.fullmatch(name) is not None


def is_index(name: str) -> bool:
    return _INDEX.fullmatch(name) is not None


def is_component_file(name: str) -> bool:
    """Whether diffusers or transformers give a component's weights this name."""
    return _COMPONENT_FILE.fullmatch(name) is not None


@dataclass(frozen=True)
class WeightSet:
    """Files of one folder that are one set of weights: a lone file, or shards of one name."""

    stem: str  # without shard number and suffix, with the variant ("model.fp16")
    files: tuple[str, ...]
    total: int = 0  # number of shards by the file names; 0 for a lone file
    index: str | None = None


def weight_sets(names: Iterable[str]) -> list[WeightSet]:
    """The weight sets among a folder's file names, in order of their names."""
    names = sorted(names)
    halves = set(TWO_FILES) <= set(names)
    indexes: dict[str, str] = {}
    for name in names:
        if found := _INDEX.fullmatch(name):
            indexes[found["stem"] + (found["a"] or found["b"] or "")] = name
    members: dict[tuple[str, int], list[str]] = {}
    for name in names:
        if not name.lower().endswith(WEIGHT_SUFFIXES):
            continue
        if found := _SHARD.fullmatch(name):
            key = found["stem"] + (found["variant"] or ""), int(found["total"])
        elif halves and name in TWO_FILES:
            key = "nunchaku", len(TWO_FILES)
        else:
            key = os.path.splitext(name)[0], 0
        members.setdefault(key, []).append(name)
    sets = []
    for (stem, total), files in members.items():
        if total:
            sets.append(WeightSet(stem, tuple(files), total, indexes.get(stem)))
        else:  # two suffixes of one stem are two files
            sets += [WeightSet(stem, (file,)) for file in files]
    known = {group.stem for group in sets if group.index}
    sets += [WeightSet(s, (), index=index) for s, index in indexes.items() if s not in known]
    return sets


def is_mixed(group: WeightSet) -> bool:
    """Whether a set is called ``X-mixed``."""
    return group.stem.endswith("-mixed")


def choose(sets: Sequence[WeightSet]) -> WeightSet | None:
    """The set that a folder stands for: a mixed one, else an index or a plain name wins."""
    mixed = [group for group in sets if is_mixed(group)]
    if len(mixed) == 1:
        return mixed[0]
    for stem in PLAIN_STEMS:
        plain = [group for group in sets if group.stem == stem]
        for wanted in (
            [group for group in plain if group.index],
            [group for group in plain if not group.total],
            plain,
        ):
            if wanted:
                # One index names the shards itself, whatever else bears that stem.
                return wanted[0] if len(wanted) == 1 or wanted[0].index else None
    indexed = [group for group in sets if group.index]
    if indexed and len({group.index for group in indexed}) == 1:
        return indexed[0]
    return sets[0] if len(sets) == 1 else None


def list_folder(folder: Path) -> tuple[set[str], set[str]]:
    """Names of the files and of the folders in ``folder`` (links followed)."""

    def fail(error: OSError) -> None:
        raise unreadable(folder, error) from error

    _, folders, files = next(os.walk(folder, onerror=fail))
    return set(files), set(folders)


def nothing_here(folder: Path, files: set[str], folders: set[str]) -> LowBitError:
    """Why a folder holds no weights that can be opened."""
    suffixes = {os.path.splitext(name)[1].lower() for name in files}
    inside = sorted(
        name
        for name in folders
        if any((folder / name).glob("*.safetensors")) or any((folder / name).glob("*.sft"))
    )
    refused = sorted(suffixes & INSTEAD_OF.keys())
    if inside:
        found, remedy = "only folders", f"choose one of its folders: {', '.join(inside)}"
    elif refused:
        found, remedy = f"only {' and '.join(refused)} files", INSTEAD_OF[refused[0]]
    else:
        names = sorted(files | folders)
        found = f"{', '.join(names[:5])}{' ...' if len(names) > 5 else ''}" or "an empty folder"
        remedy = "download the model's weights into it, or choose another folder"
    return LowBitError(
        "the folder holds no weights",
        file=folder,
        found=found,
        expected="*.safetensors",
        remedy=remedy,
    )


def read_index(path: Path) -> dict[str, str]:
    """``weight_map`` of an index file: tensor name -> name of a shard in the same folder."""
    weight_map = read_json(path).get("weight_map")
    remedy = "restore the index from the model's origin, or remove it if all shards are there"
    if not isinstance(weight_map, dict) or not weight_map:
        raise LowBitError(
            "the index has no weight_map",
            file=path,
            found=f"{weight_map!r:.80}",
            expected='"weight_map": {tensor name: file name}',
            remedy=remedy,
        )
    checked: set[str] = set()
    for key, shard in weight_map.items():
        if isinstance(shard, str) and shard in checked:
            continue
        # A bare file name by the rules of every system: nothing that could lead elsewhere.
        if not isinstance(shard, str) or not (
            PurePosixPath(shard).name == PureWindowsPath(shard).name == shard
            and shard not in ("", "..")
            and "\0" not in shard
        ):
            raise LowBitError(
                "the index names a shard outside its folder",
                file=path,
                layer=key,
                found=repr(shard),
                expected="the bare name of a file beside the index",
                remedy="do not use this index: it is broken or malicious. " + remedy,
            )
        if not shard.lower().endswith(WEIGHT_SUFFIXES):
            raise LowBitError(
                "the index names a file that is no safetensors file",
                file=path,
                layer=key,
                found=repr(shard),
                expected="*.safetensors",
                remedy=INSTEAD_OF.get(os.path.splitext(shard)[1].lower(), remedy),
            )
        checked.add(shard)
    return weight_map


def complete(folder: Path, group: WeightSet) -> list[str]:
    """The files of a set without index, once the shard numbers in their names are all there."""
    if group.files == TWO_FILES:
        return list(group.files)
    numbers: dict[int, str] = {}
    for name in group.files:
        found = _SHARD.fullmatch(name)
        if found is None:
            continue
        number = int(found["number"])
        if number in numbers or not 1 <= number <= group.total:
            raise LowBitError(
                "the shards' numbers are wrong",
                file=folder / name,
                found=f"number {number} of {group.total}"
                + (f", as in {numbers[number]}" if number in numbers else ""),
                expected=f"each number from 1 to {group.total} once",
                remedy="remove the file that does not belong to this checkpoint",
            )
        numbers[number] = name
    if len(numbers) < group.total:
        missing = next(n for n in range(1, group.total + 1) if n not in numbers)
        raise LowBitError(
            "a shard is missing",
            file=folder,
            found=f"{len(numbers)} of {group.total} shards of {group.stem}; number {missing} lacks",
            expected=f"all {group.total}",
            remedy="download the missing shards into the folder",
        )
    return list(group.files)


# ------------------------------------------------------------------ names in model folders


def resolve(name: str, roots: Sequence[str]) -> Path:
    """The path of a listed name below one of ``roots``.

    Both ``/`` and ``\\`` separate folders, so that a workflow from another system still works.
    A name cannot climb out; links that a person put into a model folder are followed, as ComfyUI
    follows them (models on another drive, or in a shared cache, are linked so).

    Raises:
        LowBitError: The name is absolute, climbs, or names nothing.
    """
    if (
        not isinstance(name, str)
        or not name.strip("/\\. ")
        or "\0" in name
        or name[0] in "/\\"
        or _DRIVE.match(name)
        or ".." in re.split(r"[/\\]", name)
    ):
        raise LowBitError(
            "not the name of a checkpoint",
            found=f"{name!r:.200}",
            expected="a name from the list: a relative path inside ComfyUI's model folders",
            remedy="choose the checkpoint from the list",
        )
    for spelling in dict.fromkeys((name, name.replace("\\", "/"))):
        for root in roots:
            path = Path(root, *(part for part in spelling.split("/") if part not in ("", ".")))
            if os.path.lexists(path):
                return path
    listed = list_checkpoints(roots)
    same = [other for other in listed if _last(other) == _last(name)]
    near = difflib.get_close_matches(name, listed, n=3)
    raise LowBitError(
        "no checkpoint of this name",
        found=f"{name!r}, in none of the folders {', '.join(map(str, roots)) or '(none)'}",
        expected="a name from the list",
        remedy=f"choose {' or '.join(same[:3])}: it has the same file name"
        if same
        else f"did you mean {' or '.join(near)}?"
        if near
        else "put the checkpoint into a model folder, refresh the list and choose it",
    )


def _last(name: str) -> str:
    """What of a name stays the same on another machine: its last part, a component's last two."""
    parts = re.split(r"[/\\]", name.lower().rstrip("/\\"))
    return "/".join(parts[-2:] if parts[-1] in PIPELINE_MODELS else parts[-1:])


def is_declaration(name: str) -> bool:
    """Whether a file tells what the weights of its folder are."""
    return name in CONFIG_NAMES or (name.startswith(DESCRIPTION) and name.endswith(".json"))


def list_checkpoints(roots: Sequence[str]) -> list[str]:
    """Relative names (with ``/``) of all that :func:`resolve` and :func:`open_source` take.

    Folders that are one checkpoint (with a config, an index, or shards alone) are listed once, as
    the folder, beside a mixed one's files; pipelines as their diffusion models; all other weight
    files one by one, a set of shards as its first file. Hidden folders and dangling links are left
    out. No file is opened.
    """
    return sorted({name for root in roots for name in _walk(str(root))})


def _walk(root: str) -> Iterator[str]:
    root = os.path.abspath(root)
    chains = {root: (os.path.realpath(root),)}  # a folder -> real paths from the root down to it
    pipelines: set[str] = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        chain = chains.pop(folder)
        parent, own_name = os.path.split(folder)
        relative = os.path.relpath(folder, root).replace(os.sep, "/")
        in_pipeline = parent in pipelines and own_name in PIPELINE_MODELS
        if parent in pipelines and not in_pipeline and "config.json" in files:
            folders.clear()  # a text encoder or VAE of a pipeline is no model of its own
            continue
        kept = []
        for name in folders:
            path = os.path.join(folder, name)
            real = os.path.join(chain[-1], name)
            if _is_link(path):
                real = os.path.realpath(path)
            # A link may lead back to a folder that this one lies in.
            if name[0] != "." and name != "__pycache__" and real not in chain:
                kept.append(name)
                chains[path] = (*chain, real)
        folders[:] = sorted(kept)
        pipeline = PIPELINE_INDEX in files
        if pipeline:
            pipelines.add(folder)
        names = [
            name
            for name in files
            if not name.lower().endswith(WEIGHT_SUFFIXES)
            or os.path.exists(os.path.join(folder, name))
        ]
        sets = weight_sets(name for name in names if not name.startswith("."))
        weights = [group for group in sets if group.files]
        if not weights:
            continue
        declared = any(is_declaration(name) for name in files) or any(g.index for g in sets)
        alone = len(sets) == 1 and sets[0].total > 1
        as_folder = in_pipeline or (folder != root and not pipeline and (declared or alone))
        chosen = choose(sets) if as_folder else None
        if chosen is not None:
            yield relative
        if chosen is None or (is_mixed(chosen) and len(weights) > 1):  # each can be asked for
            prefix = "" if folder == root else relative + "/"
            yield from (prefix + group.files[0] for group in weights)


def _is_link(path: str) -> bool:
    # Windows junctions are links too, but islink() does not say so.
    return os.path.islink(path) or getattr(os.path, "isjunction", lambda _: False)(path)
