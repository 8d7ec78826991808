"""The pack's work from a terminal, from ComfyUI's folder:

    python -m custom_nodes.ComfyUI-LowBit.cli quantize sdnq MODEL OUT --weights-dtype uint4
    python -m custom_nodes.ComfyUI-LowBit.cli inspect MODEL

ComfyUI itself is not started. Exit codes: 0 done, 1 an error that is told, 2 wrong arguments,
130 interrupted; after the last three nothing is left under the final name.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .loaders.host import terminal  # noqa: F401 - before what imports ComfyUI

# isort: split
from .loaders.charts import draw
from .loaders.convert import convert
from .loaders.float_model import FileFloats
from .loaders.host.devices import device_facts
from .loaders.plan import make_plan
from .loaders.provenance import recipe_of
from .loaders.quantize_chart import quantize_chart
from .loaders.quantize_file import prepare
from .loaders.report import inspect
from .loaders.writers import CONTAINERS
from .quant.errors import LowBitError
from .quant.recipe import (
    METHODS,
    REFINEMENTS,
    Recipe,
    Setting,
    parse_overrides,
    parse_patterns,
)

__all__ = ["main"]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
NOTHING = "none"
"""How a setting is told to leave the decision to the method."""
WIDTH = 30  # of the progress bar


# ------------------------------------------------------------------------------------ arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="cli", description="Low-bit checkpoints for ComfyUI.")
    commands = parser.add_subparsers(dest="command", required=True)

    about = "quantize a file or folder, layer by layer"
    quantize = commands.add_parser("quantize", help=about, description=about)
    for name, method in _methods(quantize).items():
        method.add_argument("source", type=Path, help="a file, or a checkpoint folder")
        method.add_argument("target", type=Path, help="the file or folder to write")
        _recipe_flags(method, name)
        method.add_argument(
            "--container",
            choices=list(CONTAINERS),
            default="comfy",
            help="; ".join(f"{c.name}: {c.display}" for c in CONTAINERS.values()),
        )
        method.add_argument("--device", default=None, help="where to calculate (default: the GPU)")
        method.add_argument("--seed", type=int, default=0, help="of low-rank branches and rounding")
        method.add_argument("--float-dtype", choices=list(DTYPES), default="bf16", help="of float "
                            "tensors that are low-bit in the source")  # fmt: skip
        method.add_argument("--overwrite", action="store_true", help="replace an existing file")
        method.add_argument("--dry-run", action="store_true", help="tell sizes, write nothing")
        method.add_argument("--no-hash", action="store_true", help="do not hash the source")
        method.add_argument("--chart", type=Path, help="write the report as a picture, too (PNG)")
        method.add_argument("--json", action="store_true", help="print the report as JSON")

    about = "tell what a checkpoint is"
    tell = commands.add_parser("inspect", help=about, description=about)
    tell.add_argument("source", type=Path, help="a file, or a checkpoint folder")
    tell.add_argument("--device", default=None, help="that it would run on (default: the GPU)")
    tell.add_argument("--json", action="store_true", help="print JSON")

    about = "write a quantized checkpoint of any scheme as ComfyUI's one file, without rounding"
    turn = commands.add_parser("convert", help=about, description=about)
    turn.add_argument("source", type=Path, help="a file, or a checkpoint folder")
    turn.add_argument("target", type=Path, help="the file to write")
    turn.add_argument("--dtype", choices=list(DTYPES), default="bf16", help="to compute in")
    turn.add_argument("--overwrite", action="store_true", help="replace an existing file")

    about = "print a recipe as JSON"
    recipe = commands.add_parser("recipe", help=about, description=about)
    methods = _methods(recipe, of="the recipe that a quantized file tells of itself")
    for name, method in methods.items():
        if name == "of":
            method.add_argument("source", type=Path, help="a quantized file")
        else:
            _recipe_flags(method, name)
    return parser


def _methods(parser: argparse.ArgumentParser, of: str = "") -> dict[str, argparse.ArgumentParser]:
    """A parser for each method, for a recipe's file, and for what a file tells."""
    found = parser.add_subparsers(dest="method", required=True, metavar="METHOD")
    made = {name: found.add_parser(name, help=m.display) for name, m in METHODS.items()}
    made["recipe"] = found.add_parser("recipe", help="as a recipe's JSON file says")
    if of:
        made["of"] = found.add_parser("of", help=of)
    return made


def _recipe_flags(parser: argparse.ArgumentParser, method: str) -> None:
    if method == "recipe":
        parser.add_argument("--recipe", type=Path, required=True, help="a JSON file")
        return
    for setting in (*METHODS[method].settings.values(), *REFINEMENTS.values()):
        flag = "--" + setting.name.replace("_", "-")
        text = f"{setting.help} ({setting.expected()}; default: {_shown(setting.default)})"
        text = text.replace("%", "%%")
        if setting.kind == "switch":
            parser.add_argument(
                flag, action=argparse.BooleanOptionalAction, default=setting.default, help=text
            )
        else:
            parser.add_argument(
                flag, type=_reading(setting), default=setting.default, metavar="VALUE", help=text
            )
    parser.add_argument(
        "--keep", action="append", default=[], metavar="PATTERN", help="layers that stay as they "
        "are; !PATTERN quantizes them after all"
    )  # fmt: skip
    parser.add_argument(
        "--override", action="append", default=[], metavar="PATTERN=WHAT", help="layers that "
        'differ, such as "*.img_mod = int8" or "*.mlp.* = group_size=32, use_svd=true"'
    )  # fmt: skip


def _shown(value: Any) -> str:
    return NOTHING if value is None else str(value).lower() if value in (True, False) else value


def _reading(setting: Setting):
    """Text to a value of the setting, for argparse."""

    def read(text: str) -> Any:
        if setting.optional and text == NOTHING:
            return None
        try:
            value = {"whole": int, "number": float}.get(setting.kind, str)(text)
            return setting.check(value)
        except (LowBitError, ValueError) as error:
            raise argparse.ArgumentTypeError(f"{text!r} is not {setting.expected()}") from error

    return read


def _recipe(given: argparse.Namespace) -> Recipe:
    if given.method == "recipe":
        return Recipe.from_json(given.recipe.read_text(encoding="utf-8"))
    told = vars(given)
    return Recipe.make(
        given.method,
        {name: told[name] for name in METHODS[given.method].settings},
        keep=parse_patterns("\n".join(given.keep)),
        overrides=parse_overrides("\n".join(given.override), given.method),
        refine={name: told[name] for name in REFINEMENTS},
    )


# ------------------------------------------------------------------------------------- commands


def _quantize(given: argparse.Namespace) -> None:
    recipe = _recipe(given)
    plan = make_plan(given.source)
    try:
        job = prepare(
            FileFloats(plan),
            recipe,
            CONTAINERS[given.container],
            config=plan.config,
            dtype=DTYPES[given.float_dtype],
        )
        if given.dry_run:
            report = job.estimate()
        else:
            report = job.run(
                given.target,
                device=_device(given.device),
                seed=given.seed,
                progress=_Bar(),
                overwrite=given.overwrite,
                hash_source=not given.no_hash,
            )
    finally:
        plan.source.close()
    if given.chart is not None:
        draw(quantize_chart(report)).save(given.chart)
    print(_json(report.to_json()) if given.json else report.text)


def _inspect(given: argparse.Namespace) -> None:
    plan = make_plan(given.source)
    try:
        report = inspect(plan, device_facts(_device(given.device)))
    finally:
        plan.source.close()
    print(_json(report.to_json()) if given.json else report.text)


def _convert(given: argparse.Namespace) -> None:
    plan = make_plan(given.source)
    try:
        dtype = DTYPES[given.dtype]
        convert(plan, given.target, dtype=dtype, progress=_Bar(), overwrite=given.overwrite)
    finally:
        plan.source.close()
    print(given.target)


def _show_recipe(given: argparse.Namespace) -> None:
    if given.method != "of":
        print(_recipe(given).to_text())
        return
    plan = make_plan(given.source)
    found = recipe_of(plan.source.metadata)
    plan.source.close()
    if found is None:
        raise LowBitError(
            "The file does not tell how it was quantized.",
            file=given.source,
            expected="a file that this pack quantized",
        )
    print(found.to_text())


COMMANDS = {
    "quantize": _quantize,
    "inspect": _inspect,
    "convert": _convert,
    "recipe": _show_recipe,
}


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False)


def _device(name: str | None) -> torch.device:
    if name is not None:
        return torch.device(name)
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found or torch.device("cpu")


class _Bar:
    """Progress on the error stream: one line on a terminal, a line for each tenth elsewhere."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._tenth = -1

    def __call__(self, done: int, total: int, name: str) -> None:
        if not sys.stderr.isatty():
            if done * 10 // total > self._tenth:
                self._tenth = done * 10 // total
                print(f"{done} of {total}: {name or 'done'}", file=sys.stderr, flush=True)
            return
        filled = WIDTH * done // total
        seconds = time.monotonic() - self._began
        line = f"[{'#' * filled}{'.' * (WIDTH - filled)}] {done}/{total} {seconds:.0f} s {name}"
        print(f"\r{line[:100]:<100}", end="" if name else "\n", file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit code.

    Args:
        arguments: Without the program's name; those of the process when None.
    """
    given = _parser().parse_args(arguments)
    try:
        with torch.inference_mode():
            COMMANDS[given.command](given)
    except LowBitError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted: nothing was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
