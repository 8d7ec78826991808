"""Linear layers of the models people run, and how many rows reach them, as plain data.

Rows are tokens: of the image at 1024 x 1024 (Wan 2.2: 832 x 480, 81 frames) and of the text.
Every layer of a model's blocks is here once; ``count`` says how often a step runs it.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["MODELS", "ROWS", "Layer", "Model"]

ROWS = (1, 16, 64, 512, 1024, 4096, 4608, 8192, 16384)
"""Rows of a sweep, beside those that a model itself has."""


@dataclass(frozen=True)
class Layer:
    """A Linear: ``out`` x ``in``, rows of a step, and how many such layers a step runs."""

    name: str
    out: int
    inputs: int
    rows: int
    count: int


@dataclass(frozen=True)
class Model:
    """A diffusion transformer."""

    title: str
    layers: tuple[Layer, ...]


MODELS = {
    "flux1": Model(
        "FLUX.1 12B, 1024 x 1024",
        (
            Layer("single linear1", 21504, 3072, 4608, 38),
            Layer("single linear2", 3072, 15360, 4608, 38),
            Layer("img qkv", 9216, 3072, 4096, 19),
            Layer("img proj", 3072, 3072, 4096, 19),
            Layer("img mlp up", 12288, 3072, 4096, 19),
            Layer("img mlp down", 3072, 12288, 4096, 19),
            Layer("txt qkv", 9216, 3072, 512, 19),
            Layer("txt proj", 3072, 3072, 512, 19),
            Layer("txt mlp up", 12288, 3072, 512, 19),
            Layer("txt mlp down", 3072, 12288, 512, 19),
            Layer("double modulation", 18432, 3072, 1, 38),
            Layer("single modulation", 9216, 3072, 1, 38),
        ),
    ),
    "klein4b": Model(
        "FLUX.2 Klein 4B, 1024 x 1024",
        (
            Layer("single linear1", 27648, 3072, 4608, 20),
            Layer("single linear2", 3072, 12288, 4608, 20),
            Layer("img qkv", 9216, 3072, 4096, 5),
            Layer("img proj", 3072, 3072, 4096, 5),
            Layer("img mlp up", 18432, 3072, 4096, 5),
            Layer("img mlp down", 3072, 9216, 4096, 5),
            Layer("txt mlp up", 18432, 3072, 512, 5),
        ),
    ),
    "klein9b": Model(
        "FLUX.2 Klein 9B, 1024 x 1024",
        (
            Layer("single linear1", 36864, 4096, 4608, 24),
            Layer("single linear2", 4096, 16384, 4608, 24),
            Layer("img qkv", 12288, 4096, 4096, 8),
            Layer("img proj", 4096, 4096, 4096, 8),
            Layer("img mlp up", 24576, 4096, 4096, 8),
            Layer("img mlp down", 4096, 12288, 4096, 8),
            Layer("txt mlp up", 24576, 4096, 512, 8),
        ),
    ),
    "qwen": Model(
        "Qwen-Image 20B, 1024 x 1024",
        (
            Layer("img q, k, v, out", 3072, 3072, 4096, 240),
            Layer("img mlp up", 12288, 3072, 4096, 60),
            Layer("img mlp down", 3072, 12288, 4096, 60),
            Layer("txt q, k, v, out", 3072, 3072, 128, 240),
            Layer("txt mlp up", 12288, 3072, 128, 60),
            Layer("txt mlp down", 3072, 12288, 128, 60),
            Layer("modulation", 18432, 3072, 1, 120),
        ),
    ),
    "zimage": Model(
        "Z-Image 6B, 1024 x 1024",
        (
            Layer("qkv", 11520, 3840, 4160, 30),
            Layer("out", 3840, 3840, 4160, 30),
            Layer("w1, w3", 10240, 3840, 4160, 60),
            Layer("w2", 3840, 10240, 4160, 30),
            Layer("modulation", 15360, 256, 1, 32),
        ),
    ),
    "wan14b": Model(
        "Wan 2.2 14B, 832 x 480, 81 frames",
        (
            Layer("q, k, v, o", 5120, 5120, 32760, 240),
            Layer("ffn up", 13824, 5120, 32760, 40),
            Layer("ffn down", 5120, 13824, 32760, 40),
            Layer("cross k, v", 5120, 5120, 512, 80),
        ),
    ),
    "wan5b": Model(
        "Wan 2.2 5B, 832 x 480, 81 frames",
        (
            Layer("q, k, v, o", 3072, 3072, 8190, 180),
            Layer("ffn up", 14336, 3072, 8190, 30),
            Layer("ffn down", 3072, 14336, 8190, 30),
        ),
    ),
}
