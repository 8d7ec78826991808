"""A page with pictures for every device that has results: ``python benchmarks/page.py [FOLDER]``.

Writes ``README.md`` and ``*.png`` beside the results; needs Pillow and nothing else. Every figure
on the page comes out of the JSON files, losses as well as gains.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections import defaultdict
from pathlib import Path

from forms import FORMS
from goals import judge
from machine import RESULTS, ROOT
from shapes import MODELS

LAYERS = ("layers", "layers-fp32", "layers-few-rows", "peers")
NOISE = 0.1  # half of the spread over the median from which a ratio is marked


def charts():
    """The pack's own drawing, which needs neither ComfyUI nor torch."""
    name = "lowbit_charts"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / "loaders" / "charts.py")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def results_of(folder: Path) -> dict[str, dict]:
    """``{stage: results}``."""
    return {
        file.stem: json.loads(file.read_text("utf-8")) for file in sorted(folder.glob("*.json"))
    }


def page(results: dict[str, dict]) -> str:
    """The page's text."""
    first = next(iter(results.values()))
    lines = [f"# {first['device_name']}", ""]
    if "multiprocessors" in first:
        lines += [
            f"{first['multiprocessors']} multiprocessors, {first['l2_bytes'] >> 20} MiB of L2, "
            f"{first['device_memory_gib']} GiB; clocks and driver: {first['clocks_mhz']}.",
            "",
        ]
    known = {name: value for told in results.values() for name, value in told.items()}
    versions = ("comfyui", "torch", "triton", "comfy-kitchen", "sdnq", "torchao", "gemlite")
    told = [f"{name} {known[name]}" for name in versions if name in known]
    lines += ["Measured with " + ", ".join(told) + f", Python {first['python']}.", ""]
    busy = max(float(told.get("load_average", 0)) for told in results.values())
    if busy > first["cores"]:
        lines += [
            f"**The machine was busy** (up to {busy:.1f} processes for {first['cores']} cores): "
            "single times mean little; ratios were taken in turn, within the same round.",
            "",
        ]
    if "limits" in results:
        lines += limits_text(results["limits"]["rows"])
    rows = [row for name in LAYERS if name in results for row in results[name]["rows"]]
    if rows:
        lines += layers_text(rows)
    if first["device"] == "cuda" and rows:
        lines += goals_text(rows)
    if "blocks" in results:
        lines += blocks_text(results["blocks"]["rows"])
    if "sampling" in results:
        lines += sampling_text(results["sampling"]["rows"])
    if "verify" in results:
        lines += verify_text(results["verify"]["rows"])
    if "memory" in results:
        lines += memory_text(results["memory"]["rows"])
    return "\n".join(lines).rstrip() + "\n"


def table(heads: tuple[str, ...], rows: list[tuple]) -> list[str]:
    """A Markdown table."""
    right = ("|" + "|".join([":--"] + ["--:"] * (len(heads) - 1)) + "|",)
    return [
        f"| {' | '.join(heads)} |",
        *right,
        *(f"| {' | '.join(str(cell) for cell in row)} |" for row in rows),
        "",
    ]


def figure(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:.{digits}g}"


def limits_text(rows: list[dict]) -> list[str]:
    told = [
        (row["limit"], f"{row['value']:.4g} {row['unit']}", row["of"])
        if "value" in row
        else (row["limit"], "-", row["absent"].replace("|", "/")[:120])
        for row in rows
    ]
    return ["## What the device does at best", "", *table(("", "median", "of"), told)]


def ratio_of(row: dict) -> str:
    """A ratio with its spread; ``~`` where the spread is large, FAIL where the result is wrong."""
    if row.get("wrong"):
        return "FAIL"
    wide = (row["ratio_high"] - row["ratio_low"]) / 2 > NOISE * row["ratio"]
    mark = "~" if wide else ""
    return f"{mark}{row['ratio']:.2f} ({row['ratio_low']:.2f}-{row['ratio_high']:.2f})"


def layers_text(rows: list[dict]) -> list[str]:
    """A table for each layer and number of rows, and what was absent."""
    lines = ["## Layers", ""]
    lines += [
        "Ratios are the time of a float `F.linear` over the row's time, medians with the lowest "
        "and highest round; above 1 is faster. `~` marks a spread of more than "
        f"{NOISE:.0%}. Error: from the float64 product with the dequantized weight.",
        "",
        "![layers](layers.png)",
        "",
    ]
    groups: dict[tuple, list[dict]] = defaultdict(list)
    for row in rows:
        if "us" in row:
            key = (row["model"], row["layer"], row["m"], row["n"], row["k"], row["dtype"])
            groups[key].append(row)
    for (model, layer, m, n, k, dtype), members in groups.items():
        lines += [f"### {MODELS[model].title}: {layer}, {m} x {n} x {k}, {dtype}", ""]
        told = []
        for row in members:
            if row["side"] == "float" and row is not members[0]:
                continue
            kernel = row.get("kernel", "").split(";")[0].rpartition(" by ")[2]
            told.append(
                (
                    "F.linear" if row["side"] == "float" else FORMS[row["form"]].title,
                    "" if row["side"] == "float" else row["mode"],
                    row["side"] + (f" ({kernel})" if kernel else ""),
                    f"{row['us']:.4g}",
                    ratio_of(row),
                    figure(row.get("error"), 2),
                    f"{row['bytes'] / 1e6:.1f}",
                    f"{row['copy']:.0%}" if "copy" in row else "",
                    f"{row['compute']:.0%}" if "compute" in row else "",
                    "" if row.get("peak_bytes") is None else f"{row['peak_bytes'] / 1e6:.0f}",
                )
            )
        heads = ("", "matmul", "side", "us", "ratio", "error", "MB moved")
        lines += table((*heads, "of copy", "of product", "peak MB"), told)
    slow = [row for row in rows if row.get("side") == "no triton" and "us" in row]
    slow += [row for row in rows if row.get("side") == "eager" and "us" in row]
    if slow:
        worst = min(slow, key=lambda row: row["ratio"])
        lines += [
            f"**Without Triton** the slowest is {FORMS[worst['form']].title}, {worst['mode']}, at "
            f"{worst['m']} x {worst['n']} x {worst['k']}: {1 / worst['ratio']:.1f} times the time "
            "of the float product.",
            "",
        ]
    absent = {
        (row["side"], row["form"], row["mode"], row["absent"]) for row in rows if "absent" in row
    }
    if absent:
        lines += ["Not measured:", ""]
        lines += [f"- {side}, {form}, {mode}: {why}" for side, form, mode, why in sorted(absent)]
        lines += [""]
    return lines


def goals_text(rows: list[dict]) -> list[str]:
    told = []
    for row in judge(rows):
        verdict = {True: "met", False: "**missed**", None: "not measured"}[row["met"]]
        told.append(
            (row["goal"], row["wanted"], figure(row["found"]), figure(row["best"]), verdict)
        )
    return ["## Goals", "", *table(("", "at least", "worst", "best", ""), told)]


def blocks_text(rows: list[dict]) -> list[str]:
    told = [
        (
            f"{row['block']}, {row['form']}",
            row["mode"],
            f"{row['us'] / 1e3:.4g}",
            ratio_of(row),
            figure(row.get("from_first_mode"), 2),
            "" if row.get("peak_bytes") is None else f"{row['peak_bytes'] / 1e6:.0f}",
        )
        for row in rows
        if "us" in row
    ]
    heads = ("block of FLUX.1", "matmul", "ms", "ratio", "from dequantized", "peak MB")
    return ["## Blocks", "", "![blocks](blocks.png)", "", *table(heads, told)]


def sampling_text(rows: list[dict]) -> list[str]:
    told = []
    for row in rows:
        name = f"{row['form']}, {row['mode']}, {row['backend']}"
        if "absent" in row:
            told.append((name, "-", "", "", "", row["absent"].replace("|", "/")[:120]))
            continue
        peak = figure(row.get("peak_gb"), 4)
        told.append(
            (
                name,
                f"{row['step_s']:.4g}",
                f"{row['ratio']:.2f}",
                f"{row['weights_gb']:.2f}",
                peak,
                f"{row['best_s']:.3g}-{row['worst_s']:.3g}",
            )
        )
    heads = ("FLUX.1, random weights", "s a step", "ratio", "weights GB", "peak GB", "spread")
    return ["## Sampling in ComfyUI", "", "![sampling](sampling.png)", "", *table(heads, told)]


def verify_text(rows: list[dict]) -> list[str]:
    groups: dict[tuple, list[dict]] = defaultdict(list)
    for row in rows:
        if "operation" in row:
            groups[row["operation"], row["backend"]].append(row)
    told = []
    for (operation, backend), members in groups.items():
        ran = [row for row in members if "differs" in row]
        wrong = sum(bool(row.get("wrong")) for row in members)
        why = members[0].get("absent", "") if not ran else ""
        worst = figure(max((row["differs"] for row in ran), default=None), 2)
        told.append((f"{operation} by {backend}", len(ran), wrong, worst, why[:100]))
    heads = ("implementation", "compared", "wrong", "largest difference", "not run because")
    return ["## Every implementation against the reference", "", *table(heads, told)]


def memory_text(rows: list[dict]) -> list[str]:
    told = []
    for row in rows:
        if "check" not in row:
            continue
        verdict = row.get("equal", row.get("ok"))
        text = row.get("absent") or ("yes" if verdict else "**NO**")
        told.append((f"{row['form']}: {row['check']}", text, figure(row.get("differs"), 2)))
    return ["## The host's memory management", "", *table(("check", "holds", "differs"), told)]


# ------------------------------------------------------------------------------------- pictures


def pictures(results: dict[str, dict]) -> dict[str, object]:
    """``{file name: picture}``."""
    draw = charts()
    name = next(iter(results.values()))["device_name"]
    found = {}
    rows = [row for key in LAYERS if key in results for row in results[key]["rows"]]
    panels = [
        panel for panel in (_layer_bars(draw, key, mine) for key, mine in _many(rows)) if panel
    ]
    if panels:
        found["layers.png"] = draw.draw(draw.Chart(f"{name}: speed of layers", panels[:4]))
    if "blocks" in results:
        bars = [
            (f"{row['block']} {row['form']} {row['mode']}", ((row["mode"], row["ratio"]),))
            for row in results["blocks"]["rows"]
            if "us" in row and row["mode"] != "float"
        ]
        if bars:
            panel = draw.Bars("times the speed of the float block", "x", bars, ("float", 1.0))
            found["blocks.png"] = draw.draw(draw.Chart(f"{name}: blocks of FLUX.1", [panel]))
    if "sampling" in results:
        bars = [
            (f"{row['form']} {row['mode']} {row['backend']}", (("seconds", row["step_s"]),))
            for row in results["sampling"]["rows"]
            if "step_s" in row
        ]
        if bars:
            panel = draw.Bars("a step of FLUX.1", "s", bars)
            found["sampling.png"] = draw.draw(draw.Chart(f"{name}: sampling", [panel]))
    return found


def _many(rows: list[dict]) -> list[tuple[tuple, list[dict]]]:
    """Rows of each shape, most activations first."""
    groups: dict[tuple, list[dict]] = defaultdict(list)
    for row in rows:
        if "us" in row and row["mode"] not in ("float", "unpack"):
            groups[row["m"], row["n"], row["k"], row["dtype"]].append(row)
    return sorted(groups.items(), key=lambda item: -item[0][0] * item[0][1])


def _layer_bars(draw, key: tuple, rows: list[dict]):
    m, n, k, dtype = key
    bars = [
        (f"{row['form']} {row['mode']}, {row['side']}", ((row["side"], row["ratio"]),))
        for row in rows
        if not row.get("wrong")
    ]
    if not bars:
        return None
    title = f"{m} x {n} x {k}: times the speed of {dtype} F.linear"
    return draw.Bars(title, "x", bars, (dtype, 1.0))


def main(arguments: list[str]) -> int:
    folders = [Path(text) for text in arguments] or sorted(RESULTS.iterdir())
    for folder in folders:
        results = {
            name: told
            for name, told in results_of(folder).items()
            if "rows" in told and "device_name" in told
        }
        if not results:
            continue
        (folder / "README.md").write_text(page(results), encoding="utf-8")
        for name, picture in pictures(results).items():
            picture.save(folder / name, optimize=True)
        print(f"written: {folder.name}/README.md")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
