"""The checkpoints that loaders list: ComfyUI's own model folders, extra paths included."""

from __future__ import annotations

from pathlib import Path

import folder_paths

from ..loaders.source import list_checkpoints, open_source, resolve

__all__ = ["diffusion_models", "fingerprint", "path_of"]

FOLDERS = ("diffusion_models", "diffusers")


def _roots() -> list[str]:
    known = [name for name in FOLDERS if name in folder_paths.folder_names_and_paths]
    return [path for name in known for path in folder_paths.get_folder_paths(name)]


def diffusion_models() -> list[str]:
    """Names for the combo: files and checkpoint folders, relative to the model folders."""
    return list_checkpoints(_roots())


def path_of(name: str) -> Path:
    """The file or folder behind a name of the combo.

    Raises:
        LowBitError: It is not there, or lies outside the model folders.
    """
    return resolve(name, _roots())


def fingerprint(name: str) -> str:
    """Changes when the checkpoint does."""
    with open_source(path_of(name)) as source:
        return source.fingerprint()
