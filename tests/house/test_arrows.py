"""The house keeps its arrows: who may import whom, what shipped code may never call, and names.

Read off the syntax trees of the shipped files, with rules as tables, so that a finding names its
file and line. Every rule is also shown a sentence that it must object to.
"""

from __future__ import annotations

import ast
import fnmatch
import re
import sys
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOT_SHIPPED = ("tests", "scripts", "benchmarks", "assets", ".ci", ".git")

# Arrows go down only. The key is a top-level part of the pack ("" is its __init__.py).
MAY_IMPORT = {
    "": {"nodes"},
    "nodes": {"nodes", "loaders", "quant", "kernels"},
    "cli": {"cli", "loaders", "quant", "kernels"},
    "loaders": {"loaders", "quant", "kernels"},
    "quant": {"quant", "kernels"},
    "kernels": {"kernels"},
}

# Packages that come with ComfyUI, by who may use them: paths of the pack, as glob patterns.
EVERYWHERE = ("*",)
MAY_USE = {
    "torch": EVERYWHERE,
    "numpy": EVERYWHERE,
    "safetensors": ("loaders/*", "cli.py"),
    "PIL": ("loaders/charts.py",),
    "psutil": ("loaders/host/*",),
    "comfy_kitchen": ("loaders/layouts/*", "loaders/host/*", "kernels/kitchen.py"),
    "comfy_aimdo": ("loaders/host/*",),
    "triton": ("kernels/*",),
    "nunchaku": ("kernels/nunchaku.py",),
}
HOST_SIDE = ("nodes/*", "loaders/host/*")
MAY_USE |= dict.fromkeys(
    (
        *("comfy", "comfy_api", "comfy_extras", "comfy_execution", "comfyui_version"),
        *("folder_paths", "nodes", "server", "execution", "node_helpers", "latent_preview"),
    ),
    HOST_SIDE,
)

# What the registry's standards and our own promises forbid at run time.
BANNED_MODULES = {
    *("subprocess", "multiprocessing", "pty", "ctypes", "pickle", "cPickle", "dill", "shelve"),
    *("marshal", "socket", "ftplib", "smtplib", "telnetlib", "http", "requests", "httpx"),
    *("aiohttp", "urllib3", "urllib.request", "huggingface_hub", "pip", "ensurepip", "imp"),
    *("torch.hub", "torch.utils.cpp_extension"),
}
BANNED_CALLS = {
    *("eval", "exec", "compile", "__import__", "breakpoint", "input", "print"),
    *("os.system", "os.popen", "os.startfile", "os.fork", "os.putenv", "os.unsetenv"),
    *("os.exec*", "os.spawn*", "os.posix_spawn*", "os.environ.*", "torch.load", "torch.hub.*"),
    *("torch.jit.load", "numpy.fromfile", "logging.basicConfig"),
}
ALLOWED_CALLS = {"os.environ.get"}
SPEAKS_TO_A_TERMINAL = "cli.py"  # the one file that may print


def shipped(suffix: str) -> list[str]:
    """Shipped files of that kind, as paths relative to the repository."""
    found = []
    for path in sorted(ROOT.rglob(f"*{suffix}")):
        name = path.relative_to(ROOT)
        if name.parts[0] not in NOT_SHIPPED and not name.parts[0].startswith("."):
            found.append(name.as_posix())
    return found


def findings(path: str, source: str) -> list[str]:
    """What a shipped Python file does that it must not, each as ``path:line: what``."""
    tree = ast.parse(source)
    aliases: dict[str, str] = {}  # local name -> what it stands for, dotted
    found: list[tuple[int, str]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                found += [(node.lineno, what) for what in absolute(path, name.name)]
                local = name.asname or name.name.split(".")[0]
                aliases[local] = name.name if name.asname else local
        elif isinstance(node, ast.ImportFrom) and node.level:
            found += [(node.lineno, what) for what in relative(path, node)]
        elif isinstance(node, ast.ImportFrom):
            for name in node.names:
                found += [(node.lineno, what) for what in absolute(path, node.module, name.name)]
                aliases[name.asname or name.name] = f"{node.module}.{name.name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = dotted(node.func, aliases)
            if is_banned(called) and not (called == "print" and path == SPEAKS_TO_A_TERMINAL):
                found.append((node.lineno, f"calls {called}"))
        targets = {ast.Assign: "targets", ast.Delete: "targets"}.get(type(node))
        for target in getattr(node, targets) if targets else ():
            if isinstance(target, ast.Subscript) and dotted(target.value, aliases) == "os.environ":
                found.append((node.lineno, "changes os.environ"))
    return [f"{path}:{line}: {what}" for line, what in sorted(set(found))]


def absolute(path: str, module: str, name: str = "") -> list[str]:
    top = module.split(".")[0]
    full = f"{module}.{name}" if name else module
    for banned in BANNED_MODULES:
        if f"{full}.".startswith(f"{banned}."):
            return [f"imports {banned}, which is banned"]
    if top in sys.stdlib_module_names:
        return []
    if top not in MAY_USE:
        return [f"imports {top}: neither ComfyUI brings it, nor may the pack be imported by name"]
    if not any(fnmatch.fnmatch(path, pattern) for pattern in MAY_USE[top]):
        return [f"imports {top}, which only {', '.join(MAY_USE[top])} may"]
    return []


def relative(path: str, node: ast.ImportFrom) -> list[str]:
    """Resolve ``from ..x import y`` against the pack and hold it against the arrows."""
    package = PurePosixPath(path).parent.parts
    up = node.level - 1
    if up > len(package):
        return ["imports from above the pack"]
    base = (*package[: len(package) - up], *(node.module.split(".") if node.module else ()))
    own = PurePosixPath(path).parts[0].removesuffix(".py").replace("__init__", "")
    targets = {base[0]} if base else {name.name for name in node.names}
    return [
        f"imports {target}: {own or '__init__'} may import {', '.join(sorted(MAY_IMPORT[own]))}"
        for target in sorted(targets)
        if target not in MAY_IMPORT[own]
    ]


def dotted(node: ast.AST, aliases: dict[str, str]) -> str:
    """``t.load`` after ``import torch as t`` is ``torch.load``; "" for anything computed."""
    if isinstance(node, ast.Name):
        return aliases.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        value = dotted(node.value, aliases)
        return f"{value}.{node.attr}" if value else ""
    return ""


def is_banned(called: str) -> bool:
    if called in ALLOWED_CALLS:
        return False
    return any(fnmatch.fnmatchcase(called, pattern) for pattern in BANNED_CALLS)


def node_schemas(source: str) -> list[ast.Call]:
    """Every ``io.Schema(...)`` of a nodes file."""
    return [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and dotted(node.func, {}).split(".")[-1] == "Schema"
    ]


def keywords(call: ast.Call) -> dict[str | None, ast.AST]:
    return {keyword.arg: keyword.value for keyword in call.keywords}


def node_ids() -> list[str]:
    """Ids of all nodes; an id that is not written out as a string is an error."""
    ids = []
    for path in shipped(".py"):
        if path.startswith("nodes/"):
            for call in node_schemas((ROOT / path).read_text(encoding="utf-8")):
                value = keywords(call).get("node_id")
                assert isinstance(value, ast.Constant), f"{path}:{call.lineno}: node_id not literal"
                ids.append(value.value)
    return ids


# ------------------------------------------------------------------------------- the shipped files


def test_the_pack_is_where_it_is_looked_for():
    files = shipped(".py")
    assert "__init__.py" in files
    assert {PurePosixPath(f).parts[0].removesuffix(".py") for f in files} - {"__init__"} <= set(
        MAY_IMPORT
    )
    assert not any(part in name for name in files for part in ("tests/", "scripts/"))


@pytest.mark.parametrize("path", shipped(".py"))
def test_shipped_python_keeps_the_rules(path):
    source = (ROOT / path).read_text(encoding="utf-8")
    assert findings(path, source) == []
    if source.strip():
        assert ast.get_docstring(ast.parse(source)), f"{path} does not say what it is"


# The registry's scan takes these for attacks, whatever object they are called on.
SUSPICIOUS_SCRIPT = re.compile(r"\.(?:exec|connect|bind)\(|\beval\(|new Function\(")


def test_shipped_scripts_pass_the_registry_scan():
    for path in shipped(".js"):
        assert SUSPICIOUS_SCRIPT.findall((ROOT / path).read_text(encoding="utf-8")) == [], path
    assert SUSPICIOUS_SCRIPT.findall("/a/.exec(text); node.connect(0, other)")


def test_nodes_are_named_and_explained():
    ids = node_ids()
    assert ids and len(ids) == len(set(ids))
    for node_id in ids:
        assert node_id.startswith("LowBit"), node_id
        page = ROOT / "web" / "docs" / f"{node_id}.md"
        assert page.is_file(), f"{node_id} has no help page {page.relative_to(ROOT)}"
        assert len(page.read_text(encoding="utf-8").split()) > 40, f"{page.name} explains nothing"


def test_every_help_page_has_its_node():
    pages = {page.stem for page in (ROOT / "web" / "docs").glob("*.md")}
    assert pages == set(node_ids())


def test_every_input_has_a_tooltip():
    for path in shipped(".py"):
        if not path.startswith("nodes/"):
            continue
        source = (ROOT / path).read_text(encoding="utf-8")
        for call in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)):
            name = dotted(call.func, {})
            given = keywords(call)
            if name.startswith("io.") and name.endswith(".Input") and None not in given:
                assert "tooltip" in given, f"{path}:{call.lineno}: an input without a tooltip"


# ------------------------------------------------------------------------------ the rules see


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("kernels/a.py", "from ..quant import packing"),
        ("kernels/triton/a.py", "from ...quant.packing import pack"),
        ("kernels/a.py", "from .. import loaders"),
        ("quant/a.py", "from ..loaders.source import open_source"),
        ("quant/a.py", "from .. import nodes"),
        ("loaders/schemes/a.py", "from ...nodes.load import x"),
        ("nodes/a.py", "from ..cli import main"),
        ("cli.py", "from .nodes import x"),
        ("__init__.py", "from .loaders import source"),
        ("quant/a.py", "from ...elsewhere import x"),
        ("quant/a.py", "import kernels.reference"),
        ("quant/a.py", "import comfy.utils"),
        ("quant/a.py", "import safetensors"),
        ("loaders/schemes/a.py", "from comfy.quant_ops import QuantizedTensor"),
        ("loaders/layouts/a.py", "import comfy.ops"),
        ("loaders/source.py", "import folder_paths"),
        ("loaders/schemes/a.py", "import comfy_kitchen as ck"),
        ("kernels/reference.py", "import comfy_kitchen"),
        ("loaders/a.py", "import triton"),
        ("loaders/a.py", "import diffusers"),
        ("nodes/a.py", "import subprocess"),
        ("nodes/a.py", "import urllib.request"),
        ("nodes/a.py", "from urllib import request"),
        ("nodes/a.py", "from requests import get"),
        ("nodes/a.py", "def f():\n    import pickle"),
        ("nodes/a.py", "import os\nos.system('x')"),
        ("nodes/a.py", "from os import system as s\ns('x')"),
        ("nodes/a.py", "import os as o\no.execv('x', [])"),
        ("nodes/a.py", "import torch as t\nt.load('x')"),
        ("nodes/a.py", "from torch import load\nload('x')"),
        ("nodes/a.py", "from torch.hub import load_state_dict_from_url"),
        ("nodes/a.py", "eval('1')"),
        ("nodes/a.py", "exec('1')"),
        ("nodes/a.py", "print('debug')"),
        ("nodes/a.py", "import os\nos.environ['A'] = 'b'"),
        ("nodes/a.py", "import os\nos.environ.update(A='b')"),
    ],
)
def test_a_breach_is_seen(path, source):
    assert len(findings(path, source)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("kernels/a.py", "import torch\nfrom .spec import WeightSpec"),
        ("kernels/kitchen.py", "import comfy_kitchen"),
        ("quant/a.py", "from ..kernels.spec import WeightSpec\nfrom .errors import LowBitError"),
        ("loaders/host/a.py", "import comfy.ops\nfrom ...quant.errors import LowBitError"),
        ("nodes/a.py", "from comfy_api.latest import io\nfrom ..loaders import source"),
        ("nodes/a.py", "import torch\nmodel = object()\nmodel.eval()\ntorch.compile(model)"),
        ("nodes/a.py", "import os\nos.environ.get('A')"),
        ("cli.py", "print('a table')"),
    ],
)
def test_honest_code_passes(path, source):
    assert findings(path, source) == []
