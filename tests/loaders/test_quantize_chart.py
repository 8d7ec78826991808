"""The picture of a report on quantizing tells the report's own figures."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from support import pack


def report_of(seed: int, layers: int, dry: bool = False):
    draws = random.Random(seed)
    error = pack("quant.engine").LayerError
    made = pack("quant.report").QuantizeReport({"method": "sdnq"}, dry=dry)
    for number in range(layers):
        before, relative = draws.randint(10**4, 10**7), draws.uniform(0.001, 0.2)
        dtype = draws.choice(["uint4", "int8", "float8_e4m3fn"])
        snr = -20 * math.log10(relative)
        after = before // draws.randint(2, 4)
        made.add(
            f"blocks.{number}.attn.qkv",
            error("sdnq", dtype, 32, before, after, relative, snr, 0.1),
        )
    made.keep("final_layer", "kept by the recipe", 12345)
    made.keep("img_in", "too small", 678)
    return made


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("layers", [1, 9, 200])
def test_sizes_and_errors_are_the_reports(seed, layers):
    report = report_of(seed, layers)
    chart = pack("loaders.quantize_chart").quantize_chart(report)
    sizes, errors, points, kept = chart.panels
    before, after = (dict(parts) for _, parts in sizes.rows)
    totals = report.totals
    assert sum(before.values()) == totals.before + totals.kept
    assert sum(after.values()) == totals.after + totals.kept
    told = {name: parts[0][1] for name, parts in errors.rows}
    assert told == {name: 100 * e.relative for name, e in report.layers.items()}
    spots = sorted(spot for series in points.series.values() for spot in series)
    assert spots == sorted((e.after, 100 * e.relative) for e in report.layers.values())
    assert dict(kept.rows) == {
        "kept by the recipe": (("", 12345),),
        "too small": (("", 678),),
    }
    assert f"{totals.ratio:.2f} times smaller" in chart.title
    assert np.asarray(pack("loaders.charts").draw(chart)).std() > 5


def test_a_plan_has_no_errors_to_show():
    chart = pack("loaders.quantize_chart").quantize_chart(report_of(1, 5, dry=True))
    assert [panel.title for panel in chart.panels] == [
        "Size of the model",
        "Kept as it was, and why",
    ]
    assert chart.title.startswith("Plan to quantize")


def test_nothing_at_all():
    empty = pack("quant.report").QuantizeReport({"method": "int8"})
    chart = pack("loaders.quantize_chart").quantize_chart(empty)
    assert [panel.title for panel in chart.panels] == ["Size of the model"]
    pack("loaders.charts").draw(chart)
