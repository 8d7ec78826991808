"""The picture of a report on quantizing: sizes, errors layer by layer, and what was kept."""

from __future__ import annotations

from collections import Counter, defaultdict

from ..quant.report import QuantizeReport
from .charts import Bars, Chart, Panel, Points

__all__ = ["quantize_chart"]


def quantize_chart(report: QuantizeReport) -> Chart:
    """Sizes before and after; errors too, where they are known."""
    totals = report.totals
    after: Counter[str] = Counter()
    for error in report.layers.values():
        after[error.dtype] += error.after
    kept = [("kept as it was", totals.kept)] if totals.kept else []
    rows = [("before", [("quantized layers before", totals.before), *kept])]
    rows.append(("after", [*after.most_common(), *kept]))
    panels: list[Panel] = [Bars("Size of the model", "bytes", rows)]
    if report.layers and not report.dry:
        panels += _errors(report)
    if report.kept:
        reasons: Counter[str] = Counter()
        for layer in report.kept.values():
            reasons[layer.reason] += layer.nbytes
        kept_rows = [(reason, (("", nbytes),)) for reason, nbytes in reasons.most_common()]
        panels.append(Bars("Kept as it was, and why", "bytes", kept_rows))
    method = report.recipe.get("method", "")
    title = f"Quantized by {method}: {totals.ratio:.2f} times smaller"
    return Chart(title.replace("Quantized", "Plan to quantize") if report.dry else title, panels)


def _errors(report: QuantizeReport) -> list[Panel]:
    """Relative errors: of each layer in the model's order, and against its size."""
    rows = [(name, ((e.dtype, 100 * e.relative),)) for name, e in report.layers.items()]
    series = defaultdict(list)
    for error in report.layers.values():
        series[error.dtype].append((error.after, 100 * error.relative))
    return [
        Bars("Relative error of the weights, by layer", "%", rows),
        Points(
            "Error against size",
            "bytes of a layer, quantized",
            "relative error, %",
            dict(series),
            log_x=True,
            log_y=True,
        ),
    ]
