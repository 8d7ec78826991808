"""Writes ``tests/goldens/`` anew: layers as older releases of sdnq store them, and what they mean.

Run by ``python scripts/host.py setup --all`` and then
``python scripts/host.py run -- python -P scripts/make_goldens.py``. Nothing is written where what a
release makes is already in the goldens, low-rank factors aside, which depend on the machine.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from sdnq_books import GOLDENS, VERSIONS, Book, differences, make_book


def main() -> None:
    GOLDENS.mkdir(exist_ok=True)
    for version in VERSIONS:
        with tempfile.TemporaryDirectory() as scratch:
            made = make_book(Path(scratch), version)
            target = GOLDENS / f"sdnq-{version}.json"
            if target.exists() and not differences(Book(target), made):
                print(f"sdnq {version}: as before, {len(made.cases)} cases")
                continue
            for suffix in (".json", ".safetensors"):
                shutil.copyfile(made.path.with_suffix(suffix), target.with_suffix(suffix))
            print(f"sdnq {version}: written, {len(made.cases)} cases")


if __name__ == "__main__":
    main()
