"""Pictures of reports: what is drawn, read back from the pixels."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from support import pack


@pytest.fixture(scope="module")
def charts():
    return pack("loaders.charts")


def colour(text):
    return np.array([int(text[i : i + 2], 16) for i in (1, 3, 5)], dtype=np.int16)


def pixels(charts, *panels, width=1024, **more):
    image = charts.draw(charts.Chart("A title", panels, **more), width)
    assert image.mode == "RGB" and image.width == width
    return np.asarray(image).astype(np.int16)


def runs(picture, wanted):
    """``{row: (first, last)}`` of a colour's pixels."""
    hit = (np.abs(picture - colour(wanted)).max(-1) <= 2) & True
    return {y: np.flatnonzero(line)[[0, -1]] for y, line in enumerate(hit) if line.sum() > 14}


def bars_of(picture, wanted):
    """Lengths of a colour's bars from top to bottom; the square in the legend is shorter."""
    found, before = [], -2
    for y, (first, last) in runs(picture, wanted).items():
        if y != before + 1:
            found.append(last - first + 1)
        before = y
    return found


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("unit", ["bytes", "%"])
def test_lengths_are_values(charts, seed, unit):
    draws = random.Random(seed)
    values = [draws.uniform(0.2, 1) * 10 ** draws.choice([2, 9]) for _ in range(1)] * 5
    values = [value * draws.uniform(0.2, 1) for value in values]
    rows = tuple((f"layer {i}", (("", value),)) for i, value in enumerate(values))
    lengths = bars_of(pixels(charts, charts.Bars("Bars", unit, rows)), charts.COLOURS[0])
    assert len(lengths) == len(values)
    scale = max(lengths) / max(values)
    for length, value in zip(lengths, values, strict=True):
        assert abs(length - value * scale) <= 3


def test_stacked_segments_touch_and_keep_their_colours(charts):
    names = ("weights", "low-rank", "activations")
    rows = tuple(
        (f"row {i}", tuple((name, 10.0 + 7 * i * k) for k, name in enumerate(names)))
        for i in range(3)
    )
    panel = charts.Bars("Stacked", "MB", rows)
    other = charts.Points("Points", "x", "y", {names[2]: [(1, 1)]})
    picture = pixels(charts, panel, other)
    by_name = [runs(picture, charts.COLOURS[i]) for i in range(3)]
    for y, (_, last) in by_name[0].items():
        assert by_name[1][y][0] - last in (1, 2)
        assert by_name[2][y][0] - by_name[1][y][1] in (1, 2)
    # the same name in another panel is the same colour
    low = max(by_name[2]) + 20
    assert (np.abs(picture[low:] - colour(charts.COLOURS[2])).max(-1) <= 2).any()


def test_limit_lies_where_its_value_does(charts):
    rows = (("a", (("", 80.0),)), ("b", (("", 100.0),)))
    picture = pixels(charts, charts.Bars("Limited", "GB", rows, limit=("usable", 50.0)))
    bar = max(runs(picture, charts.COLOURS[0]).values(), key=lambda run: run[1] - run[0])
    # between the bars, where only the dashes are
    first, last = (f(runs(picture, charts.COLOURS[0])) for f in (min, max))
    reds = np.abs(picture[first:last] - colour(charts.ALERT)).max(-1) <= 40
    column = np.flatnonzero(reds.any(0))
    assert len(column) and np.ptp(column) <= 3
    assert abs(column.mean() - (bar[0] + bar[1] + 1) / 2) <= 2


def test_log_bars_lie_below_each_other(charts):
    rows = (("m", (("float", 1000.0), ("ours", 10.0))), ("n", (("float", 100.0), ("ours", 0))))
    picture = pixels(charts, charts.Bars("Times", "ms", rows, log=True))
    long, middle = bars_of(picture, charts.COLOURS[0])
    assert bars_of(picture, charts.COLOURS[1]) == []  # the smallest decade begins at 10: no length
    assert abs(long - 2 * middle) <= 3
    assert not set(runs(picture, charts.COLOURS[0])) & set(runs(picture, charts.COLOURS[1]))


def test_points_lie_where_their_values_do(charts):
    given = {"one": [(1.0, 10.0), (100.0, 1000.0)], "two": [(10.0, 100.0), (0.0, 5.0)]}
    picture = pixels(
        charts, charts.Points("Points", "size", "error", given, log_x=True, log_y=True)
    )
    centres = []
    for name in charts.COLOURS[:2]:
        ys, xs = np.nonzero(np.abs(picture - colour(name)).max(-1) <= 2)
        below = ys > 140  # beneath the legend
        centres.append((ys[below], xs[below]))
    (one_y, one_x), (two_y, two_x) = centres
    assert abs(two_x.mean() - (one_x.min() + one_x.max()) / 2) <= 1.5
    assert abs(two_y.mean() - (one_y.min() + one_y.max()) / 2) <= 1.5
    assert np.ptp(two_x) < 12  # the point at zero is not drawn, and is told


def texts(charts, monkeypatch, *panels, width=1024, **more):
    """Every line of text with the box it takes."""
    found = []
    real = charts._Pen.line

    def line(pen, x, y, text, size, ink):
        found.append((text, x, y, x + charts._width(text, size), y + charts._height(size)))
        return real(pen, x, y, text, size, ink)

    monkeypatch.setattr(charts._Pen, "line", line)
    picture = pixels(charts, *panels, width=width, **more)
    return found, picture.shape[0]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("width", [512, 768, 1024])
def test_no_text_overlaps_or_leaves_the_picture(charts, monkeypatch, seed, width):
    draws = random.Random(seed)

    def name():
        return ".".join(
            "".join(draws.choices("abcdefghijk_0123", k=draws.randint(1, 14)))
            for _ in range(draws.randint(1, 7))
        )

    def value():
        return 10 ** draws.uniform(-6, 13) * draws.choice([0, 1, 1, 1])

    segments = [name() for _ in range(draws.randint(1, 6))]
    count = draws.choice([0, 1, 5, 60])
    rows = [(name(), [(s, value()) for s in segments]) for _ in range(count)]
    cloud = {name(): [(value(), value()) for _ in range(40)] for _ in range(draws.randint(0, 4))}
    panels = [
        charts.Bars(name(), draws.choice(["bytes", "%", "ms", ""]), rows, (name(), value()), log)
        for log in (False, True)
    ] + [charts.Points(name(), name(), name(), cloud, x, y) for x in (0, 1) for y in (0, 1)]
    boxes, height = texts(charts, monkeypatch, *panels, width=width, notes=(name() * 9, name()))
    for text, x0, y0, x1, y1 in boxes:
        assert x0 >= 0 and y0 >= 0 and x1 <= width and y1 <= height, text
    for i, (text, x0, y0, x1, y1) in enumerate(boxes):
        for other, a0, b0, a1, b1 in boxes[i + 1 :]:
            apart = x1 <= a0 + 1 or a1 <= x0 + 1 or y1 <= b0 + 5 or b1 <= y0 + 5
            assert apart, (text, other)


def test_many_rows_show_the_largest_and_tell_of_the_rest(charts, monkeypatch):
    draws = random.Random(4)
    values = [draws.uniform(1, 9) for _ in range(60)]
    values[7] = math.nan  # what went wrong is never left out
    rows = [(f"layer{i:02}", [("", value)]) for i, value in enumerate(values)]
    boxes, _ = texts(charts, monkeypatch, charts.Bars("Many", "%", rows))
    shown = [text for text, *_ in boxes if text.startswith("layer")]
    order = sorted(range(60), key=lambda i: math.inf if i == 7 else values[i], reverse=True)
    assert shown == [f"layer{i:02}" for i in sorted(order[: charts.MOST_ROWS])]
    rest = [values[i] for i in order[charts.MOST_ROWS :]]
    told = f"and {len(rest)} more, of {min(rest):.3g} % to {max(rest):.3g} % each"
    assert told in [text for text, *_ in boxes]


def test_long_names_keep_both_ends(charts, monkeypatch):
    long = "double_blocks.17." + "middle_of_a_name." * 9 + "qkv.weight"
    boxes, _ = texts(charts, monkeypatch, charts.Bars("Names", "", [(long, [("", 1)])]))
    (label,) = [text for text, *_ in boxes if "…" in text]
    assert label.startswith("double_blocks.17.") and label.endswith("qkv.weight")


def test_nothing_to_show_is_said(charts, monkeypatch):
    panels = (
        charts.Bars("Bars", "bytes", ()),
        charts.Points("Points", "x", "y", {"a": [(0.0, 1.0)]}, log_x=True),
    )
    boxes, _ = texts(charts, monkeypatch, *panels)
    assert [text for text, *_ in boxes].count("Nothing to show.") == 2


def test_letters_the_font_lacks(charts):
    assert charts._printable("café 模 – Ⅳ") == "cafe ? ? IV"


@pytest.mark.parametrize(
    "value, unit, text",
    [
        (0, "bytes", "0 bytes"),
        (1023, "bytes", "1023 bytes"),
        (1536, "bytes", "1.50 KiB"),
        (11.9 * 2**30, "bytes", "11.90 GiB"),
        (3.14159, "%", "3.14 %"),
        (1234.5, "ms", "1,234 ms"),
        (0.00001234, "", "1.23e-05"),
        (math.inf, "ms", "inf"),
    ],
)
def test_quantities(charts, value, unit, text):
    assert charts.quantity(value, unit) == text


def test_image_of_a_chart(charts):
    chart = charts.Chart("Image", (charts.Bars("B", "", (("a", (("", 1),)),)),))
    image = pack("nodes.images").image_of(chart)
    drawn = np.asarray(charts.draw(chart))
    assert image.dtype == torch.float32 and image.shape == (1, *drawn.shape)
    assert torch.equal((image[0] * 255).round().to(torch.uint8), torch.from_numpy(drawn.copy()))
