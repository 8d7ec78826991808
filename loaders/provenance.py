"""Where a written file comes from: the pack's version, the recipe, and its source's hash.

The header's ``__metadata__`` has it under ``lowbit`` as JSON:

============  ==================================================================================
``version``   of this pack
``recipe``    JSON form of the recipe, see :mod:`..quant.recipe`
``source``    ``name`` and ``sha256``; of a folder, the hash of its files' hashes in name order
``error``     relative error of each layer
============  ==================================================================================
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from threading import Event, Thread

from ..quant.errors import LowBitError
from ..quant.recipe import Recipe

__all__ = ["KEY", "Hashing", "provenance", "recipe_of", "version"]

KEY = "lowbit"
BLOCK = 16 * 2**20


@lru_cache
def version() -> str:
    """The pack's version, as its pyproject.toml has it."""
    text = (Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8")
    found = re.search(r'^version = "([^"]+)"', text, re.MULTILINE)
    return found[1] if found else "unknown"


def provenance(
    recipe: Recipe, source: str, sha256: str | None, errors: Mapping[str, float]
) -> dict[str, str]:
    """Metadata for a header."""
    told = {
        "version": version(),
        "recipe": recipe.to_json(),
        "source": {"name": source, "sha256": sha256},
        "error": {name: float(f"{error:.4g}") for name, error in errors.items()},
    }
    return {KEY: json.dumps(told, separators=(",", ":"))}


def recipe_of(metadata: Mapping[str, str]) -> Recipe | None:
    """The recipe that a header tells; None where it tells none.

    Raises:
        LowBitError: It is damaged, or newer than this pack.
    """
    text = metadata.get(KEY)
    if text is None:
        return None
    try:
        told = json.loads(text)["recipe"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise LowBitError(
            "The file's note on how it was quantized is damaged.",
            found=repr(error),
            expected=f"JSON with a recipe under {KEY}",
        ) from None
    return Recipe.from_json(told)


class Hashing:
    """Hashes files while other work goes on. Use as a context: leaving it early stops the work.

    Args:
        files: In any order.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = sorted(files, key=lambda path: path.name)
        self._stop = Event()
        self._found: list[str] = []
        self._error: OSError | None = None
        self._thread = Thread(target=self._run, name="lowbit-hash", daemon=True)

    def __enter__(self) -> Hashing:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def result(self) -> str | None:
        """The hash, waited for; None where a file could not be read again."""
        self._thread.join()
        if self._error is not None or len(self._found) != len(self._files):
            return None
        if len(self._found) == 1:
            return self._found[0]
        return hashlib.sha256("".join(self._found).encode()).hexdigest()

    def _run(self) -> None:
        try:
            for path in self._files:
                digest = hashlib.sha256()
                with path.open("rb") as file:
                    while block := file.read(BLOCK):
                        if self._stop.is_set():
                            return
                        digest.update(block)
                self._found.append(digest.hexdigest())
        except OSError as error:
            self._error = error
