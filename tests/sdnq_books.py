"""Books of single layers, as ``tests/oracles/sdnq_layers.py`` writes them, opened by the pack.

``tests/goldens/`` holds a book of each older release, written by ``scripts/make_goldens.py``.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from support import CACHE, ROOT, pack, run_oracle

__all__ = [
    "GOLDENS",
    "VERSIONS",
    "Book",
    "differences",
    "errors_of",
    "make_book",
    "open_layers",
]

GOLDENS = ROOT / "tests" / "goldens"
VERSIONS = ("0.1.3", "0.1.9", "0.2.1")


class Book:
    """One book: cases with their stored tensors, config, logical shapes and goldens."""

    def __init__(self, path: Path) -> None:
        told = json.loads(path.read_text(encoding="utf-8"))
        self.path = path
        self.version: str = told["version"]
        self.failed: dict[str, str] = told["failed"]
        self.cases: dict[str, dict] = told["cases"]
        self._common = told["common"]

    def config(self, case: str) -> dict:
        """The case's ``quantization_config``."""
        return self._common | self.cases[case]["quantization_config"]

    def shapes(self, case: str) -> dict[str, tuple[int, ...]]:
        """What the architecture would tell of the quantized weights."""
        return {key: tuple(shape) for key, shape in self.cases[case]["shapes"].items()}

    def tensors(self, part: str, case: str) -> dict[str, torch.Tensor]:
        """``stored`` or ``golden`` tensors of a case."""
        prefix = f"{part}/{case}/"
        with safe_open(self.path.with_suffix(".safetensors"), "pt") as file:
            names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118
            return {name.removeprefix(prefix): file.get_tensor(name) for name in names}

    def component(self, case: str, folder: Path, config: dict | None) -> Path:
        """A component folder of the case; without any config file where ``config`` is None."""
        folder.mkdir(parents=True)
        stored = self.tensors("stored", case)
        save_file(stored, folder / "diffusion_pytorch_model.safetensors", {"format": "pt"})
        if config is not None:
            text = json.dumps({"_class_name": "Layers", "quantization_config": config})
            (folder / "config.json").write_text(text, encoding="utf-8")
        return folder


def make_book(folder: Path, version: str) -> Book:
    """The book of an older release, made in the oracle interpreter."""
    package = CACHE / f"oracle-sdnq-{version}"
    assert package.is_dir(), f"{package} is missing: run scripts/host.py setup --all"
    run_oracle("sdnq_layers.py", folder, str(package), "all")
    book = Book(folder / "book.json")
    assert book.version == version
    return book


def _settled(value):
    """A config without the order of its lists, which come out of sets."""
    if isinstance(value, dict):
        return {key: _settled(inner) for key, inner in value.items()}
    return sorted(map(str, value)) if isinstance(value, list) else value


def differences(old: Book, new: Book) -> list[str]:
    """Cases that are not the same bits in both books.

    Low-rank factors come from a randomised algorithm over the machine's linear algebra: where a
    case has them, only names, dtypes and shapes are compared.
    """
    found = [f"{old.version} became {new.version}"] if old.version != new.version else []
    found += sorted(set(old.cases) ^ set(new.cases)) + sorted(set(old.failed) ^ set(new.failed))
    for case in sorted(set(old.cases) & set(new.cases)):
        same = _settled(old.config(case)) == _settled(new.config(case))
        same &= old.cases[case]["shapes"] == new.cases[case]["shapes"]
        for part in ("stored", "golden"):
            before, after = old.tensors(part, case), new.tensors(part, case)
            kinds = [{k: (t.dtype, t.shape) for k, t in ts.items()} for ts in (before, after)]
            same &= kinds[0] == kinds[1]
            if same and not any(key.endswith("svd_up") for key in old.tensors("stored", case)):
                same = all(torch.equal(_bits(t), _bits(after[key])) for key, t in before.items())
        if not same:
            found.append(case)
    return found


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def open_layers(folder: Path, shapes: dict[str, tuple[int, ...]] | None = None):
    """The plan of a component folder; ``shapes`` is what the architecture would tell."""

    def native_shapes(wanted):
        return {key: shapes.get(key, shape) for key, shape in wanted.items()}

    return pack("loaders.plan").make_plan(
        folder, native_shapes=native_shapes if shapes is not None else None
    )


def errors_of(entries, golden: dict[str, torch.Tensor]) -> dict[str, float]:
    """Largest difference of each quantized weight from its golden, relative to the largest."""
    reference = pack("kernels.reference")
    assert {key for key, entry in entries.items() if entry.spec is not None} == set(golden)
    errors = {}
    for key, expected in golden.items():
        assert entries[key].shape == tuple(expected.shape), key
        weight = entries[key].read()
        got = reference.dequantize(weight.tensors, weight.spec)
        assert got.shape == expected.shape, key
        errors[key] = float((got - expected).abs().max() / expected.abs().max())
    return errors
