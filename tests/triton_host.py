"""Triton kernels on whatever this machine has: a GPU, or else the CPU through the interpreter.

Import this before anything imports Triton (tests/conftest.py does). Without a GPU it switches this
process to Triton's interpreter, which must be known when kernels are defined; torch.compile on a
CPU has no use for Triton and is not touched, and child processes do not inherit the switch.

    from triton_host import DEVICE, kernels
    unpack = kernels("unpack")         # the pack's kernels.triton.unpack
"""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from types import ModuleType

import torch

__all__ = ["DEVICE", "INSTALLED", "INTERPRETED", "kernels", "poisoned"]

INSTALLED = find_spec("triton") is not None
INTERPRETED = not torch.cuda.is_available()
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")


def _interpret() -> None:
    assert "triton" not in sys.modules, "Triton was imported before tests/triton_host.py"
    os.environ["TRITON_INTERPRET"] = "1"  # Triton's own library is defined on import
    import triton

    triton.knobs.runtime.interpret = True
    del os.environ["TRITON_INTERPRET"]
    _let_ranges_run()
    _patch_once()


def _let_ranges_run() -> None:
    """Bounds of loops are arrays of one element there, which newer numpy makes no number of."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_and_index(tensor, scope) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_and_index


def _patch_once() -> None:
    """A function of a running kernel would go through all of Triton's library again, as called."""
    import triton.language as tl
    from triton.runtime import interpreter

    patch = interpreter._patch_lang
    done: set[int] = set()  # modules that the running kernel has had replaced

    class Outermost(interpreter._LangPatchScope):
        def restore(self) -> None:
            done.clear()
            self.scope.restore()

    def patch_once(function):
        modules = {id(v) for v in function.__globals__.values() if v is tl or v is tl.core}
        if done and modules <= done:
            return interpreter._LangPatchScope()
        first = not done
        done.update(modules)
        scope = patch(function)
        if not first:
            return scope
        whole = Outermost()
        whole.scope = scope
        return whole

    interpreter._patch_lang = patch_once


if INSTALLED and INTERPRETED:
    _interpret()


def kernels(name: str) -> ModuleType:
    """The module ``kernels.triton.<name>`` of the pack."""
    from support import pack

    return pack(f"kernels.triton.{name}")


def poisoned(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """A tensor whose every element would show if nothing were written to it."""
    value = float("nan") if dtype.is_floating_point else torch.iinfo(dtype).max
    return torch.full(shape, value, dtype=dtype, device=DEVICE)
