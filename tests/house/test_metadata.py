"""What the registry and ComfyUI read about the pack: pyproject.toml, LICENSE, .comfyignore."""

from __future__ import annotations

import fnmatch
import re
from pathlib import Path

import pytest
from comfy_config.config_parser import extract_node_configuration
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
OURS = "https://github.com/lowbit-nodes/ComfyUI-LowBit"


@pytest.fixture(scope="module")
def config():
    """pyproject.toml as ComfyUI itself reads it."""
    return extract_node_configuration(str(ROOT))


def test_identity(config):
    project = config.project
    assert project.name == "lowbit"  # the registry id: it can never change
    assert re.fullmatch(r"\d+\.\d+\.\d+", project.version)
    assert 40 < len(project.description) < 200
    assert project.requires_python == ">=3.10"
    assert project.license.file == "LICENSE"
    assert project.urls.repository == OURS


def test_no_dependency_beyond_the_host(config):
    assert config.project.dependencies == []
    assert not (ROOT / "requirements.txt").exists()
    assert not (ROOT / "install.py").exists()


def test_the_host_keeps_every_classifier(config):
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    accelerators = re.findall(r'"Environment :: (.+?)"', text)
    assert accelerators  # one that ComfyUI does not know makes it drop them all
    assert config.project.supported_accelerators == accelerators
    assert config.project.supported_os == ["OS Independent"]


def test_the_host_version_is_the_oldest_that_is_tested(config):
    assert config.project.supported_comfyui_version == ">=0.27.0"
    assert (ROOT / "tests" / "env" / "comfyui-0.27.0.txt").is_file()


def test_registry_page(config):
    comfy = config.tool_comfy
    assert comfy.display_name == "LowBit"
    assert comfy.publisher_id
    assert comfy.web is None  # WEB_DIRECTORY alone: both together load every script twice
    prefix = "https://raw.githubusercontent.com/lowbit-nodes/ComfyUI-LowBit/main/"
    assert comfy.icon.startswith(prefix)
    with Image.open(ROOT / comfy.icon.removeprefix(prefix)) as icon:
        assert icon.width == icon.height <= 400


def test_licence_is_whole():
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text and "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text and len(text) > 11000


@pytest.mark.parametrize("path", ["tests/support.py", "scripts/host.py", ".ci/run", ".gitignore"])
def test_the_archive_leaves_out_what_comfyui_does_not_need(path):
    assert ignored(path)


@pytest.mark.parametrize(
    "path", ["__init__.py", "nodes/__init__.py", "web/docs/x.md", "LICENSE", "pyproject.toml"]
)
def test_the_archive_keeps_the_pack(path):
    assert (ROOT / path).parent.exists() and not ignored(path)


def ignored(path: str) -> bool:
    lines = (ROOT / ".comfyignore").read_text(encoding="utf-8").splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    return any(path.startswith(rule) or fnmatch.fnmatch(path, rule) for rule in rules)
