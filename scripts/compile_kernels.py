#!/usr/bin/env python3
"""Compiles the Triton kernels for every GPU that they claim, without one, and reads what came out.

Each entry of a module's AHEAD is compiled as its launcher would launch it. A compile error, spilled
registers or stack, more shared memory than the device has, or a product without the device's
matrix instructions is a fault; faults make the exit status 1. Needs torch and Triton; with another
Triton first on PYTHONPATH it compiles with that one.

    python scripts/compile_kernels.py                    everything, as a table
    python scripts/compile_kernels.py --covering         every kernel on every family of targets
    python scripts/compile_kernels.py --only int8 --targets sm_90 gfx942 --json out.json
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "lowbit_kernels"
WIDTHS = (34, 8, 5, 6, 6, 7, 6)


def package():
    """The pack's kernels as a package of their own: the pack itself imports ComfyUI."""
    if PACKAGE not in sys.modules:
        folder = ROOT / "kernels"
        spec = importlib.util.spec_from_file_location(
            PACKAGE, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        module = importlib.util.module_from_spec(spec)
        sys.modules[PACKAGE] = module
        spec.loader.exec_module(module)
    return sys.modules[PACKAGE]


def load(name: str):
    package()
    return importlib.import_module(f"{PACKAGE}.triton.{name}")


def modules() -> list[str]:
    """Modules that say what to compile."""
    files = sorted((ROOT / "kernels" / "triton").glob("*.py"))
    return [f.stem for f in files if re.search(r"^AHEAD\b", f.read_text("utf-8"), re.MULTILINE)]


def entries(only: list[str] | None) -> list[tuple[str, int]]:
    """``(module, number)`` of each entry."""
    names = [name for name in modules() if not only or name in only]
    return [(name, n) for name in names for n in range(len(load(name).AHEAD))]


def name_of(entry) -> str:
    """The kernel and what tells its entries apart."""
    kernel = entry.kernel.split(":")[1]
    return f"{kernel} {entry.label}".strip()


def covering(work: list[tuple[str, int, str]]) -> list[tuple[str, int, str]]:
    """Every kernel, with each product that it has, once for each family of its targets.

    The entries and targets that were met the least go first, so that as many as can be are met.
    """
    family_of = load("configs").family_of
    groups: dict[tuple[str, str, str], list[tuple[str, int, str]]] = {}
    for module, number, target in work:
        entry = load(module).AHEAD[number]
        key = (entry.kernel, entry.product, family_of(target))
        groups.setdefault(key, []).append((module, number, target))
    chosen, met = [], Counter()
    for jobs in groups.values():
        job = min(jobs, key=lambda job: (met[job[:2]], met[job[2]]))
        met.update((job[:2], job[2]))
        chosen.append(job)
    return chosen


def compile_one(job: tuple[str, int, str]) -> dict:
    """What became of one entry on one target."""
    module, number, target_name = job
    entry = load(module).AHEAD[number]
    target = load("targets").TARGETS[target_name]
    found = {
        "kernel": f"{module}:{name_of(entry)}",
        "target": target_name,
        "registers": None,
        "stack": None,
        "shared": None,
        "opcodes": {},
        "faults": [],
    }
    started = time.perf_counter()
    try:
        compiled = _compile(entry, target)
    except Exception as error:  # compilers fail in many ways
        lines = [line for line in str(error).splitlines() if line.strip(" ^")] or [""]
        told = " ... ".join(line.strip()[:200] for line in dict.fromkeys((lines[0], lines[-1])))
        found["faults"].append(f"does not compile: {type(error).__name__}: {told}")
    else:
        _inspect(entry, target, compiled, found)
    found["seconds"] = round(time.perf_counter() - started, 3)
    return found


def _compile(entry, target):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, name = entry.kernel.split(":")
    function = getattr(load(module), name)
    arguments = list(function.arg_names)
    constants = {key: _constant(value) for key, value in entry.constants.items()}
    unknown = {*entry.signature, *constants} - set(arguments)
    missing = set(arguments) - {*entry.signature, *constants}
    if unknown or missing:
        raise ValueError(f"arguments that are unknown: {unknown}, that are not given: {missing}")
    signature = {n: entry.signature.get(n, "constexpr") for n in arguments}
    aligned = [
        (number,)
        for number, argument in enumerate(arguments)
        if argument not in entry.unaligned
        and not function.params[number].do_not_specialize
        and (signature[argument].startswith("*") or signature[argument] in ("i32", "i64"))
    ]
    source = ASTSource(
        function,
        signature=signature,
        constexprs=constants,
        attrs={at: [["tt.divisibility", 16]] for at in aligned},
    )
    options = dict(entry.tile.options)
    return triton.compile(
        source, target=GPUTarget(target.backend, target.architecture, target.warp), options=options
    )


def _constant(value):
    """Constants may be Triton's dtypes, by name: "tl.bfloat16"."""
    if isinstance(value, str) and value.startswith("tl."):
        import triton.language as tl

        return getattr(tl, value[3:])
    return value


def _inspect(entry, target, compiled, found: dict) -> None:
    found["shared"] = compiled.metadata.shared
    if compiled.metadata.shared > target.shared:
        found["faults"].append(f"needs {compiled.metadata.shared} bytes of {target.shared} shared")
    if target.backend == "cuda":
        text = _sass(compiled.asm["cubin"], found)
    else:
        text = compiled.asm["amdgcn"]
        found["registers"] = _number(r"\.vgpr_count:\s+(\d+)", text)
        spilled = _number(r"\.vgpr_spill_count:\s+(\d+)", text)
        found["stack"] = _number(r"\.private_segment_fixed_size:\s+(\d+)", text)
        if spilled:
            found["faults"].append(f"spills {spilled} registers")
    if found["stack"]:
        found["faults"].append(f"uses {found['stack']} bytes of stack")
    if not entry.product:
        return
    # Whole groups of warps multiply 64 rows, of either operand.
    large = min(entry.tile.block_m, entry.tile.block_n) >= 64 and entry.tile.warps >= 4
    wanted = (large and target.group.get(entry.product)) or target.matrix.get(entry.product)
    if wanted is None:
        found["faults"].append(f"has no {entry.product} matrix instructions on {target.name}")
        return
    found["opcodes"] = dict(Counter(re.findall(wanted, text)).most_common(2))
    if not found["opcodes"]:
        found["faults"].append(f"has no instruction like {wanted}")


def _number(pattern: str, text: str) -> int | None:
    match = re.search(pattern, text)
    return int(match[1]) if match else None


def _sass(cubin: bytes, found: dict) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        text = subprocess.run(
            [str(tool), "-res-usage", "-sass", str(file)],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    found["registers"] = _number(r"REG:(\d+)", text)
    found["stack"] = _number(r"STACK:(\d+)", text)
    return text


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", help="modules of kernels/triton")
    parser.add_argument("--targets", nargs="*", help="of these targets only")
    parser.add_argument(
        "--covering", action="store_true", help="every kernel on every family of targets"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--json", help="a file for all that was found")
    options = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET is set: interpreted kernels cannot be compiled")
    work = [
        (module, number, target)
        for module, number in entries(options.only)
        for target in load(module).AHEAD[number].targets
        if not options.targets or target in options.targets
    ]
    if options.covering:
        work = covering(work)
    import triton

    print(f"Triton {triton.__version__}: {len(work)} compilations", flush=True)
    print(_line("kernel", "target", "regs", "stack", "shared", "seconds", "", "opcodes"))
    found = []
    with ProcessPoolExecutor(max(options.jobs, 1)) as pool:
        for one in pool.map(compile_one, work):
            found.append(one)
            opcodes = ", ".join(f"{count} {name}" for name, count in one["opcodes"].items())
            shared = "" if one["shared"] is None else f"{one['shared'] / 1024:.0f} KB"
            print(
                _line(
                    *(one["kernel"], one["target"], one["registers"], one["stack"], shared),
                    *(f"{one['seconds']:.1f}", "FAULT" if one["faults"] else "ok", opcodes),
                ),
                flush=True,
            )
            for fault in one["faults"]:
                print(f"    {fault}", flush=True)
    faults = sum(bool(one["faults"]) for one in found)
    seconds = sum(one["seconds"] for one in found)
    print(f"{faults} of {len(found)} faulty; {seconds:.0f} s of compiling")
    if options.json:
        told = {"triton": triton.__version__, "found": found}
        Path(options.json).write_text(json.dumps(told, indent=1), encoding="utf-8")
    return 1 if faults or not found else 0


def _line(*cells) -> str:
    *fixed, last = ("" if cell is None else str(cell) for cell in cells)
    return " ".join(f"{cell:<{w}}" for cell, w in zip(fixed, WIDTHS, strict=True)) + f" {last}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
