"""Packs what a machine without a network needs to run these benchmarks: ``build/gpu/host.tar.xz``.

``python scripts/host.py run -- python benchmarks/carry.py [--python 3.12]``: ComfyUI's code without
tokenizers, and wheels of the packages that such a machine does not have, unpacked, for its Python.
It has torch, triton, numpy, transformers and pytest of its own. ``gpu.py`` unpacks the archive.

Left out: comfy-kitchen's HIP kernels (no AMD card there), and PyAV, which is as large as everything
else together; a stand-in takes its place, because ComfyUI imports it for video files alone.
"""

from __future__ import annotations

import argparse
import io
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

from machine import ORACLE, ROOT, versions

FOLDER = ROOT / "build" / "gpu"
ARCHIVE = "host.tar.xz"
LIMIT = 64 << 20
"""Bytes of the archive and the repository together."""
COMFYUI = (
    "comfy",
    "comfy_api",
    "comfy_config",
    "comfy_execution",
    "comfyui_version.py",
    "folder_paths.py",
    "latent_preview.py",
    "node_helpers.py",
    "nodes.py",
    "protocol.py",
)
LARGE_TEXT = 300_000  # tokenizers' vocabularies
HOST_PACKAGES = (
    "comfy-kitchen",
    "comfy-aimdo",
    "torchsde",
    "trampoline",
    "pydantic",
    "pydantic-core",
    "pydantic-settings",
    "annotated-types",
    "python-dotenv",
    "typing-inspection",
)
ORACLE_PACKAGES = ("sdnq", "diffusers", "torchao")
PLATFORMS = ("2_28", "2_27", "2_24", "2_17", "2_12", "2_5")
STAND_IN = '''"""Stands in for PyAV: nothing that is measured here reads a video."""


class Missing:
    """Any class of PyAV."""


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return Missing
'''


def left_out(name: str) -> bool:
    """Whether a file of a wheel stays behind."""
    return "backends/hip/" in name and name.endswith(".so")


def pins() -> list[str]:
    """``name==version`` of what is carried, as installed here."""
    import importlib.metadata as metadata

    found = [f"{name}=={metadata.version(name)}" for name in HOST_PACKAGES]
    known = versions(ORACLE) if ORACLE else {}
    if ORACLE:
        further = Path(ORACLE).parent.parent
        others = further.with_name(f"{further.name}-others") / Path(ORACLE).relative_to(further)
        if others.exists():
            known = versions(str(others)) | known
    return found + [f"{name}=={known[name]}" for name in ORACLE_PACKAGES if name in known]


def download(folder: Path, python: str) -> list[Path]:
    """Wheels of :func:`pins` for another Python on x86-64 Linux."""
    platforms = [f"--platform=manylinux_{version}_x86_64" for version in PLATFORMS]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--disable-pip-version-check", "--only-binary=:all:", "--implementation=cp"]
    command += [f"--python-version={python}", *platforms, "--platform=manylinux2014_x86_64"]
    subprocess.run([*command, "--dest", str(folder), *pins()], check=True)
    return sorted(folder.glob("*.whl"))


def write(archive: Path, comfyui: Path, wheels: list[Path]) -> None:
    """The archive: ``comfyui/`` and ``site/``."""
    with tarfile.open(archive, "w:xz", preset=6) as tar:
        for name in COMFYUI:
            source = comfyui / name
            files = sorted(source.rglob("*")) if source.is_dir() else [source]
            for file in files:
                large = file.is_file() and file.stat().st_size > LARGE_TEXT
                if file.is_dir() or "__pycache__" in file.parts or (large and file.suffix != ".py"):
                    continue
                tar.add(file, f"comfyui/{file.relative_to(comfyui).as_posix()}")
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as zipped:
                for entry in zipped.infolist():
                    if not entry.is_dir() and not left_out(entry.filename):
                        _add(tar, f"site/{entry.filename}", zipped.read(entry))
        for name in ("", "container/", "subtitles/", "subtitles/stream/", "video/"):
            _add(tar, f"site/av/{name}__init__.py", STAND_IN.encode())
        _add(tar, "site/av/video/reformatter.py", STAND_IN.encode())


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def repository_bytes() -> int:
    """Bytes of what travels beside the archive: tracked and untracked files, ignored ones not."""
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        capture_output=True,
        check=True,
    ).stdout.split(b"\0")
    files = (ROOT / name.decode() for name in listed if name)
    return sum(file.stat().st_size for file in files if file.is_file())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--python", default="3.12", help="of the other machine")
    options = parser.parse_args()
    import comfyui_version

    FOLDER.mkdir(parents=True, exist_ok=True)
    archive = FOLDER / ARCHIVE
    with tempfile.TemporaryDirectory() as scratch:
        wheels = download(Path(scratch), options.python)
        write(archive, Path(comfyui_version.__file__).parent, wheels)
    carried, beside = archive.stat().st_size, repository_bytes()
    print(f"{archive.relative_to(ROOT)}: {carried / 2**20:.1f} MiB, {len(wheels)} packages")
    print(f"with the repository: {(carried + beside) / 2**20:.1f} of {LIMIT / 2**20:.0f} MiB")
    if carried + beside > LIMIT:
        print("too large to be carried", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
