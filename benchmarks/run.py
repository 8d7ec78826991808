"""The benchmark: ``python benchmarks/run.py STAGE [...]`` in the host's environment.

| stage      | what is measured                                                                  |
|------------|-----------------------------------------------------------------------------------|
| limits     | copy bandwidth and matrix products of the device                                  |
| layers     | every Linear of the models in every scheme, against bf16 and other packages       |
| blocks     | a double and a single block of FLUX.1 of the real ComfyUI                         |
| sampling   | FLUX.1 at its real size with random weights, sampled by the real ComfyUI          |
| verify     | every implementation that the registry has here, against the reference            |
| memory     | Dynamic VRAM: load, sample, cap, evict, LoRA on and off, the same bits            |

Results go to ``benchmarks/results/<device>/<stage>.json`` (``--out`` elsewhere), rewritten after
every case, so that a run that is stopped leaves what it had.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import blocks
import layers
import limits
import memory
import sampling
import torch
import verify
from forms import FORMS
from machine import RESULTS, ROOT, cores, facts, load_average, slug, write_results
from shapes import MODELS

MODES = tuple(dict.fromkeys(mode for form in FORMS.values() for mode in form.modes))


def names(known: tuple[str, ...]):
    """A comma-separated list of known names."""

    def read(text: str) -> tuple[str, ...]:
        found = tuple(part for part in text.split(",") if part)
        for name in found:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(known)}")
        return found

    return read


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(",") if part)


def words(text: str) -> tuple[str, ...]:
    return tuple(part for part in text.split(",") if part)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="run.py", description=__doc__.split("\n")[0])
    made.add_argument("stage", choices=tuple(STAGE))
    made.add_argument("--device", choices=("cpu", "cuda"), help="default: what torch sees")
    made.add_argument("--dtype", choices=tuple(layers.DTYPES), default="bf16")
    made.add_argument("--rounds", type=int, default=5)
    made.add_argument("--threads", type=int, default=cores(), help="of torch; default: all cores")
    made.add_argument("--models", type=names(tuple(MODELS)), default=("flux1",))
    made.add_argument("--layers", type=words, default=(), help="names of layers, default: all")
    made.add_argument("--rows", type=numbers, default=(), help="default: the model's own")
    made.add_argument("--forms", type=names(tuple(FORMS)), default=tuple(FORMS))
    made.add_argument("--modes", type=names(MODES), default=())
    made.add_argument("--sides", type=names(layers.SIDES), default=layers.SIDES)
    made.add_argument("--steps", type=int, default=4, help="of sampling")
    made.add_argument("--limit", type=float, default=float("inf"), help="seconds, then it stops")
    made.add_argument("--out", type=Path, help="folder of the results")
    made.add_argument("--name", help="of the results' file; default: the stage")
    made.add_argument("--smoke", action="store_true", help="tiny sizes: does it run at all")
    return made


def pack_of(device: str):
    """``support.pack``: the pack as ComfyUI's own loader loads it."""
    sys.path.insert(0, str(ROOT / "tests"))
    from support import pack

    if device == "cpu":
        from comfy.cli_args import args

        args.cpu = True
    return pack


def limits_of(options: argparse.Namespace) -> dict[str, float]:
    """The limits measured on this device before, for shares of them."""
    folder = options.out or RESULTS / slug(options.device)
    file = folder / "limits.json"
    return limits.table(json.loads(file.read_text("utf-8"))["rows"]) if file.exists() else {}


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    started = time.monotonic()
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(options.threads)
    sys.argv = sys.argv[:1]  # ComfyUI reads it too
    options.no_dynamic = memory.enable_dynamic_vram() if options.stage == "memory" else None
    wanted = layers.Wanted(
        device=options.device,
        dtype=options.dtype,
        rounds=options.rounds,
        models=options.models,
        forms=options.forms,
        modes=options.modes,
        sides=options.sides,
        rows=options.rows,
        layers=options.layers,
        shrink=16 if options.smoke else 1,
        threads=options.threads,
        deadline=started + options.limit,
        limits=limits_of(options),
    )
    name = options.name or options.stage
    settings = {
        "threads": options.threads,
        "rounds": options.rounds,
        "smoke": options.smoke,
        "load_average_before": load_average(),
    }

    def keep(rows: list[dict]) -> None:
        """Write what there is."""
        told = facts(options.device) | settings
        told |= {"load_average": load_average(), "seconds": time.monotonic() - started}
        write_results(name, told | {"stage": options.stage, "rows": rows}, options.out)

    pack = pack_of(options.device)
    with torch.inference_mode():  # as the host runs every node
        rows = STAGE[options.stage](wanted, options, pack, keep)
    keep(rows)
    for row in rows:
        print(line_of(row))
    return 1 if any(row.get("wrong") or row.get("equal") is False for row in rows) else 0


def run_limits(wanted, options, pack, keep) -> list[dict]:
    return limits.measure(options.device, options.rounds, options.smoke)


def run_layers(wanted, options, pack, keep) -> list[dict]:
    return layers.measure(wanted, pack, keep)


def run_blocks(wanted, options, pack, keep) -> list[dict]:
    return blocks.measure(wanted, pack, keep, options.smoke)


def run_sampling(wanted, options, pack, keep) -> list[dict]:
    return sampling.measure(wanted, pack, keep, options.steps, options.smoke)


def run_verify(wanted, options, pack, keep) -> list[dict]:
    return verify.measure(wanted, pack, keep, options.smoke)


def run_memory(wanted, options, pack, keep) -> list[dict]:
    return memory.measure(wanted, pack, keep, options.smoke, options.no_dynamic)


STAGE = {
    "limits": run_limits,
    "layers": run_layers,
    "blocks": run_blocks,
    "sampling": run_sampling,
    "verify": run_verify,
    "memory": run_memory,
}


def line_of(row: dict) -> str:
    """A row as one line."""
    told = []
    for key, value in row.items():
        if isinstance(value, float):
            told.append(f"{key}={value:.4g}")
        elif value not in (None, "", {}):
            told.append(f"{key}={str(value)[:120]}")
    return " ".join(told)


if __name__ == "__main__":
    sys.exit(main())
