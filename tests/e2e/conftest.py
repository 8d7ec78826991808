"""One server for all end-to-end tests of this folder."""

from __future__ import annotations

import json
import shutil

import pytest
from live import CASE, checkpoints, server_in


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """A running server with a pipeline of two transformers and a model folder elsewhere."""
    base = tmp_path_factory.mktemp("server")
    elsewhere = base / "elsewhere"
    shutil.copytree(checkpoints() / CASE, elsewhere / "far" / "away")
    config = base / "extra_model_paths.yaml"  # JSON is YAML
    config.write_text(json.dumps({"more": {"diffusion_models": str(elsewhere)}}), encoding="utf-8")
    server = server_in(base, ["--extra-model-paths-config", str(config)])
    pipeline = base / "models" / "diffusers" / "pipeline"
    for part in ("transformer", "transformer_2"):
        shutil.copytree(checkpoints() / CASE, pipeline / part)
    index = {
        "_class_name": "WanPipeline",
        "transformer": ["diffusers", "FluxTransformer2DModel"],
        "transformer_2": ["diffusers", "FluxTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (pipeline / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    with server:
        yield server
