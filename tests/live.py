"""A ComfyUI server with the models of a small FLUX.1 workflow, for tests that go through HTTP."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file
from support import ROOT, comfy_root, oracle

sys.path.append(str(ROOT / "scripts"))

from workbench import Done, Server, link_pack

__all__ = ["CASE", "Done", "Server", "checkpoints", "image_of", "latent_of", "server_in"]

CASE = "uint4_svd"  # fused layers of parts with branches of their own: the hardest common kind


def checkpoints() -> Path:
    """What ``oracles/workbench_models.py`` writes; made once and kept in the cache."""
    return oracle("workbench_models.py", "256", CASE)


def server_in(base: Path, arguments: Sequence[str] = ()) -> Server:
    """A server, not started yet, whose model folders hold the workflow's files.

    ``diffusers/tiny`` is the quantized checkpoint, ``diffusion_models/exact.safetensors`` the same
    weights in float32.
    """
    made = checkpoints()
    models = base / "models"
    for source, target in (
        ("text_encoders", "text_encoders"),
        ("vae_approx", "vae_approx"),
        (CASE, "diffusers/tiny"),
    ):
        shutil.copytree(made / source, models / target, copy_function=_copy)
    (models / "diffusion_models").mkdir()
    (models / "loras").mkdir()
    _copy(made / f"{CASE}.dequantized.safetensors", models / "diffusion_models/exact.safetensors")
    link_pack(base)
    device = [] if torch.accelerator.is_available() else ["--cpu"]
    return Server(comfy_root(), base, [*device, *arguments])


def _copy(source: str | Path, target: str | Path) -> None:
    """A big file costs nothing where both lie on one disk, and nothing here writes into it."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy(source, target)


def image_of(done: Done) -> torch.Tensor:
    """The saved picture as [H, W, 3], int32."""
    (file,) = done.files("save")
    with Image.open(file) as image:
        assert image.format == "PNG"
        data = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8)
        return data.view(image.height, image.width, 3).int()


def latent_of(done: Done) -> torch.Tensor:
    """The saved latent in float32."""
    (file,) = done.files("latent")
    return load_file(file)["latent_tensor"].float()
