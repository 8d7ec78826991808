"""Pictures of reports: bars and points on cards, drawn with Pillow alone.

A chart is data: a title, panels and notes. Sizes are in units of a picture 1024 wide; everything
is drawn twice as large and reduced, which smooths what Pillow leaves jagged. Colours belong to
names: a segment or series has the same colour in every panel of a chart.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache

from PIL import Image, ImageDraw, ImageFont

__all__ = ["Bars", "Chart", "Panel", "Points", "draw", "quantity"]

SMOOTH = 2
PAGE, CARD, GRID, AXIS = "#17191d", "#22252b", "#343841", "#5b6270"
INK, SOFT, ALERT = "#eceff4", "#a5adba", "#ff6b6b"
COLOURS = (
    "#5aa9e6",
    "#f2a65a",
    "#63c7a0",
    "#b893e6",
    "#ee7f9d",
    "#e3d26f",
    "#5ccfd6",
    "#9aa6b5",
    "#c98f6b",
    "#8fbf5a",
)
MARGIN, PADDING, GAP = 20, 18, 14
TITLE, HEADING, TEXT, SMALL = 26, 19, 15, 13
ROW, BAR, THIN = 24, 16, 18
#: More rows than these make a picture that nobody reads: the largest are shown.
MOST_ROWS = 24
PLOT_HEIGHT = 300
BYTES = ("bytes", "KiB", "MiB", "GiB", "TiB")


@dataclass(frozen=True)
class Bars:
    """Horizontal bars, one a row, stacked from segments.

    Attributes:
        title: Of the panel.
        unit: Of the values; "bytes" are told in KiB to TiB.
        rows: ``(label, ((segment, value), ...))``; values are not negative. A segment of no name
            is not in the legend.
        limit: A value that is marked across all rows, with or without what it is.
        log: Logarithmic axis; the segments of a row then lie below each other, because stacked
            lengths mean nothing there.
    """

    title: str
    unit: str
    rows: Sequence[tuple[str, Sequence[tuple[str, float]]]]
    limit: float | tuple[str, float] | None = None
    log: bool = False

    def names(self) -> list[str]:
        """Segments in order of appearance."""
        return list(dict.fromkeys(name for _, parts in self.rows for name, _ in parts if name))


@dataclass(frozen=True)
class Points:
    """Points in a plane.

    Attributes:
        title: Of the panel.
        x_label, y_label: What the axes are, with the unit.
        series: ``{name: ((x, y), ...)}``.
        log_x, log_y: Logarithmic axes. What they cannot show is counted beneath the plot.
    """

    title: str
    x_label: str
    y_label: str
    series: Mapping[str, Sequence[tuple[float, float]]]
    log_x: bool = False
    log_y: bool = False

    def names(self) -> list[str]:
        """Series in order."""
        return [name for name in self.series if name]


Panel = Bars | Points


@dataclass(frozen=True)
class Chart:
    """A picture of a report.

    Attributes:
        title: Of the picture.
        panels: From top to bottom.
        notes: Lines beneath them.
    """

    title: str
    panels: Sequence[Panel]
    notes: Sequence[str] = field(default=())


def draw(chart: Chart, width: int = 1024) -> Image.Image:
    """The chart as an RGB picture, as high as it needs to be.

    Args:
        chart: What to draw.
        width: In pixels, at least 512.
    """
    width = max(512, width)
    pen = _Pen()
    names = dict.fromkeys(name for panel in chart.panels for name in panel.names())
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}
    y = MARGIN
    for line in _wrap(chart.title, TITLE, width - 2 * MARGIN):
        y = pen.line(MARGIN, y, line, TITLE, INK)
    for panel in chart.panels:
        y += GAP
        top, under = y, len(pen.strokes)
        y = pen.line(
            MARGIN + PADDING,
            y + PADDING,
            _cut(panel.title, HEADING, width - 2 * (MARGIN + PADDING)),
            HEADING,
            INK,
        )
        area = (MARGIN + PADDING, width - MARGIN - PADDING)
        plot = _bars if isinstance(panel, Bars) else _points
        y = plot(pen, panel, colours, area, y + 8) + PADDING
        pen.box(MARGIN, top, width - MARGIN, y, CARD, round_by=8, at=under)
    if chart.notes:
        y += GAP
    for note in chart.notes:
        for line in _wrap(note, SMALL, width - 2 * MARGIN):
            y = pen.line(MARGIN, y, line, SMALL, SOFT)
    return pen.picture(width, math.ceil(y + MARGIN))


def quantity(value: float, unit: str) -> str:
    """A value with its unit, for people."""
    if not math.isfinite(value):
        return str(value)
    if unit == "bytes":
        step = _bytes_step(value)
        scaled = value / 1024**step
        return f"{scaled:.0f} {BYTES[step]}" if not step else f"{scaled:.2f} {BYTES[step]}"
    if value and not 1e-3 <= abs(value) < 1e7:
        text = f"{value:.2e}"
    elif float(value).is_integer() or abs(value) >= 1000:
        text = f"{value:,.0f}"
    else:
        text = f"{value:.3g}"
    return f"{text} {unit}".strip()


# ----------------------------------------------------------------------------------------- bars


def _bars(pen: _Pen, panel: Bars, colours: dict[str, str], area, y: float) -> float:
    left, right = area
    y = _legend(pen, panel.names(), colours, area, y)
    rows, rest = _largest(panel)
    if not rows:
        return pen.line(left, y, "Nothing to show.", TEXT, SOFT)
    name, limit = _limit(panel)
    values = [v for _, parts in rows for v in _shown(panel, parts)]
    label_width = min(max(_width(label, TEXT) for label, _ in rows), 0.36 * (right - left))
    begin = left + label_width + 12
    end = right - max(_width(quantity(v, panel.unit), TEXT) for v in [0.0, *values]) - 12
    scale = _Scale.over(
        [*values, *([] if limit is None else [limit])], begin, end, panel.log, panel.unit
    )
    if limit is not None:
        said = _cut(f"{name} {quantity(limit, panel.unit)}".strip(), SMALL, right - left)
        place = min(max(scale.at(limit) - _width(said, SMALL) / 2, left), right)
        pen.line(min(place, right - _width(said, SMALL)), y, said, SMALL, ALERT)
        y += _height(SMALL)
    top, under = y, len(pen.strokes)
    for label, parts in rows:
        label = _cut(label, TEXT, label_width)
        high = max(ROW, THIN * len(parts) + ROW - BAR) if panel.log else ROW
        middle = y + high / 2 - _height(TEXT) / 2
        pen.line(begin - 12 - _width(label, TEXT), middle, label, TEXT, INK)
        draw_row = _beneath if panel.log else _stacked
        draw_row(pen, panel, colours, scale, parts, y + high / 2)
        y += high
    _ticks_below(pen, scale, top, y, under)
    if limit is not None:
        pen.dashes(scale.at(limit), top - 2, y + 2, ALERT)
    y += 6 + _height(SMALL)
    if rest:
        totals = [_rank(panel, parts) for _, parts in rest]
        low, high = (quantity(pick(totals), panel.unit) for pick in (min, max))
        told = f"and {len(rest)} more, of {low} to {high} each"
        y = pen.line(left, y + 4, told, SMALL, SOFT)
    return y


def _stacked(pen: _Pen, panel: Bars, colours, scale: _Scale, parts, middle: float) -> None:
    """The segments of a row one after the other, and their sum."""
    base = 0.0
    for segment, value in parts:
        if math.isfinite(value) and value > 0:
            ends = scale.at(base), scale.at(base + value)
            pen.box(ends[0], middle - BAR / 2, ends[1], middle + BAR / 2, _of(colours, segment))
            base += value
    (total,) = _shown(panel, parts)
    _value(pen, panel, scale, total, middle, TEXT)


def _beneath(pen: _Pen, panel: Bars, colours, scale: _Scale, parts, middle: float) -> None:
    """The segments of a row below each other, each with its value."""
    each, size = (BAR, TEXT) if len(parts) < 2 else (THIN, SMALL)
    y = middle - each * len(parts) / 2
    for segment, value in parts:
        pen.box(scale.begin, y, scale.at(value), y + each - 1, _of(colours, segment))
        _value(pen, panel, scale, value, y + each / 2, size)
        y += each


def _value(pen: _Pen, panel: Bars, scale: _Scale, value: float, middle: float, size: int) -> None:
    """A number beside its bar, over the grid."""
    text, begin = quantity(value, panel.unit), scale.at(value) + 8
    top = middle - _height(size) / 2
    pen.box(begin - 3, top + 1, begin + _width(text, size) + 3, top + _height(size) - 1, CARD)
    pen.line(begin, top, text, size, INK if value else SOFT)


def _of(colours: dict[str, str], name: str) -> str:
    return colours.get(name, COLOURS[0])


def _shown(panel: Bars, parts: Sequence[tuple[str, float]]) -> list[float]:
    """Values that stand beside a row: its sum, or each where lengths do not add up."""
    values = [float(value) for _, value in parts]
    return values if panel.log else [sum(values)]


def _rank(panel: Bars, parts: Sequence[tuple[str, float]]) -> float:
    """What a row is large or small by; what is no number comes first, to be seen."""
    return max((math.inf if math.isnan(v) else v for v in _shown(panel, parts)), default=0.0)


def _largest(panel: Bars) -> tuple[list, list]:
    """Rows to draw, in their order, and those left out."""
    rows = list(panel.rows)
    if len(rows) <= MOST_ROWS:
        return rows, []
    ranked = sorted(range(len(rows)), key=lambda i: _rank(panel, rows[i][1]), reverse=True)
    kept = set(ranked[:MOST_ROWS])
    return [rows[i] for i in sorted(kept)], [rows[i] for i in ranked[MOST_ROWS:]]


def _limit(panel: Bars) -> tuple[str, float | None]:
    if isinstance(panel.limit, tuple):
        return panel.limit
    return ("limit" if panel.limit is not None else ""), panel.limit


# --------------------------------------------------------------------------------------- points


def _points(pen: _Pen, panel: Points, colours: dict[str, str], area, y: float) -> float:
    left, right = area
    y = _legend(pen, panel.names(), colours, area, y)
    shown, left_out = _drawable(panel)
    if not any(shown.values()):
        return pen.line(left, y, "Nothing to show.", TEXT, SOFT)
    xs = [x for points in shown.values() for x, _ in points]
    ys = [y for points in shown.values() for _, y in points]
    y = pen.line(left, y, _cut(panel.y_label, SMALL, right - left), SMALL, SOFT) + 6
    top, bottom = y, y + PLOT_HEIGHT
    upward = _Scale.over(ys, bottom, top, panel.log_y, "", ticks=6)
    begin = left + max(_width(text, SMALL) for _, text in upward.ticks) + 10
    across = _Scale.over(xs, begin, right - 10, panel.log_x, "")
    under = len(pen.strokes)
    for value, text in upward.ticks:
        at = upward.at(value)
        pen.stroke(begin, at, right, at, GRID)
        pen.line(begin - 8 - _width(text, SMALL), at - _height(SMALL) / 2, text, SMALL, SOFT)
    many = sum(map(len, shown.values())) > 300
    for name, points in shown.items():
        for x, value in points:
            pen.dot(across.at(x), upward.at(value), 2.5 if many else 4, _of(colours, name))
    _ticks_below(pen, across, top, bottom, under)
    y = bottom + 6 + _height(SMALL)
    label = _cut(panel.x_label, SMALL, right - begin)
    y = pen.line((begin + right - _width(label, SMALL)) / 2, y + 2, label, SMALL, SOFT)
    if left_out:
        points = "1 point" if left_out == 1 else f"{left_out} points"
        told = f"{points} beyond these axes (zero, negative or not a number)"
        y = pen.line(left, y + 4, _cut(told, SMALL, right - left), SMALL, SOFT)
    return y


def _drawable(panel: Points) -> tuple[dict[str, list[tuple[float, float]]], int]:
    """Points that the axes can show, and the number of the others."""

    def fits(value: float, log: bool) -> bool:
        return math.isfinite(value) and (value > 0 or not log)

    shown = {
        name: [(x, y) for x, y in points if fits(x, panel.log_x) and fits(y, panel.log_y)]
        for name, points in panel.series.items()
    }
    return shown, sum(map(len, panel.series.values())) - sum(map(len, shown.values()))


# --------------------------------------------------------------------------------- axes, legend


@dataclass(frozen=True)
class _Scale:
    """Values to places on an axis."""

    low: float
    high: float
    begin: float
    end: float
    log: bool
    ticks: tuple[tuple[float, str], ...]

    @classmethod
    def over(cls, values, begin, end, log, unit, ticks=8) -> _Scale:
        """An axis that holds all values, and zero where it is linear and none is negative."""
        finite = [float(v) for v in values if math.isfinite(v) and (v > 0 or not log)]
        if log:
            low, high, marks = _log_ticks(finite or [1.0], ticks)
        elif unit == "bytes":
            step = _bytes_step(max(finite, default=0.0))
            whole = [1.0] if not step else []  # no half bytes
            low, high, marks = _linear_ticks([*whole, *(v / 1024**step for v in finite)], ticks)
            marks = [mark for mark in marks if step or mark[0].is_integer()]
            marks = [(v * 1024**step, f"{v:g} {BYTES[step]}") for v, _ in marks]
            low, high = low * 1024**step, high * 1024**step
        else:
            low, high, marks = _linear_ticks(finite, ticks)
            marks = [(v, f"{text} {unit}".strip()) for v, text in marks]
        if log and unit:
            marks = [(v, quantity(v, unit)) for v, _ in marks]
        return cls(low, high, begin, end, log, tuple(marks))

    def at(self, value: float) -> float:
        """The place of a value; of one beyond the axis, its end."""
        if math.isnan(value) or (self.log and value <= 0):
            return self.begin
        if self.log:
            low, high = math.log10(self.low), math.log10(self.high)
            share = (math.log10(value) - low) / (high - low) if math.isfinite(value) else 1.0
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.begin + min(max(share, 0.0), 1.0) * (self.end - self.begin)


def _linear_ticks(values: Sequence[float], count: int):
    low, high = min([0.0, *values]), max([0.0, *values])
    if low == high:
        high = 1.0
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    marks = [(i * step, f"{i * step:,.6g}") for i in range(first, last + 1)]
    return first * step, last * step, marks


def _log_ticks(values: Sequence[float], count: int):
    """Whole decades, thinned where there are many, in steps of 1, 2, 5 where there are few."""
    first = math.floor(math.log10(min(values)) + 1e-9)
    last = math.ceil(math.log10(max(values)) - 1e-9)
    last = max(last, first + 1)
    every = math.ceil((last - first) / count)
    inner = (1, 2, 5) if last - first <= 2 else (1,)
    marks = [
        (m * 10.0**e, f"{m * 10.0**e:,.6g}" if -4 < e < 6 else f"{m}e{e}")
        for e in range(first, last + 1)
        for m in inner
        if (e - first) % every == 0 and (e < last or m == 1)
    ]
    return 10.0**first, 10.0**last, marks


def _ticks_below(pen: _Pen, scale: _Scale, top: float, bottom: float, under: int) -> None:
    """Grid lines behind the plot and numbers beneath it, only as many as have room."""
    free = -math.inf
    for value, text in scale.ticks:
        at, width = scale.at(value), _width(text, SMALL)
        begin = at - width / 2
        first = value == scale.ticks[0][0]
        pen.stroke(at, top, at, bottom, AXIS if first else GRID, at_front=under)
        if begin > free:
            pen.line(begin, bottom + 6, text, SMALL, SOFT)
            free = begin + width + 10


def _legend(pen: _Pen, names: Sequence[str], colours, area, y: float) -> float:
    left, right = area
    if not names:
        return y
    x = left
    for name in names:
        text = _cut(name, SMALL, right - left - 20)
        width = 20 + _width(text, SMALL)
        if x > left and x + width > right:
            x, y = left, y + _height(SMALL) + 4
        middle = y + _height(SMALL) / 2
        pen.box(x, middle - 6, x + 12, middle + 6, _of(colours, name), round_by=3)
        pen.line(x + 18, y, text, SMALL, SOFT)
        x += width + 16
    return y + _height(SMALL) + 8


def _bytes_step(value: float) -> int:
    """Which of BYTES tells a value best."""
    step = 0
    while abs(value) >= 1024 and step < len(BYTES) - 1:
        value, step = value / 1024, step + 1
    return step


# ---------------------------------------------------------------------------------- pen and text


class _Pen:
    """Strokes that are kept until the height of the picture is known."""

    def __init__(self) -> None:
        self.strokes: list = []

    def line(self, x: float, y: float, text: str, size: int, colour: str) -> float:
        """A line of text; returns where the next begins."""
        place = (x * SMOOTH, y * SMOOTH)
        font = _font(size)
        self.strokes.append(
            lambda to: to.text(place, _printable(text), fill=colour, font=font, anchor="la")
        )
        return y + _height(size)

    def box(self, x0, y0, x1, y1, colour: str, round_by: float = 0, at: int | None = None) -> None:
        """A filled box; ``at`` puts it under the strokes from that one on."""
        if x1 <= x0 or y1 <= y0:
            return
        # Pillow's boxes take in their last pixel; a value above zero keeps a visible sliver.
        place = [v * SMOOTH for v in (x0, y0)] + [max(v * SMOOTH - 1, 0) for v in (x1, y1)]
        place[2], place[3] = max(place[2], place[0] + 1), max(place[3], place[1] + 1)

        def stroke(to: ImageDraw.ImageDraw) -> None:
            to.rounded_rectangle(place, round_by * SMOOTH, fill=colour)

        self.strokes.insert(len(self.strokes) if at is None else at, stroke)

    def stroke(self, x0, y0, x1, y1, colour: str, at_front: int | None = None) -> None:
        """A thin straight line; ``at_front`` as ``at`` of a box."""
        place = [v * SMOOTH for v in (x0, y0, x1, y1)]

        def stroke(to: ImageDraw.ImageDraw) -> None:
            to.line(place, fill=colour, width=SMOOTH)

        self.strokes.insert(len(self.strokes) if at_front is None else at_front, stroke)

    def dashes(self, x: float, y0: float, y1: float, colour: str) -> None:
        """A dashed upright line."""
        y = y0
        while y < y1:
            self.box(x - 0.75, y, x + 0.75, min(y + 5, y1), colour)
            y += 8

    def dot(self, x: float, y: float, radius: float, colour: str) -> None:
        """A disc."""
        place = [v * SMOOTH for v in (x - radius, y - radius, x + radius, y + radius)]
        self.strokes.append(lambda to: to.ellipse(place, fill=colour))

    def picture(self, width: int, height: int) -> Image.Image:
        """All strokes on a page of this size."""
        image = Image.new("RGB", (width * SMOOTH, height * SMOOTH), PAGE)
        to = ImageDraw.Draw(image)
        for stroke in self.strokes:
            stroke(to)
        return image.reduce(SMOOTH)


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """Pillow's own font: the same on every system."""
    return ImageFont.load_default(size * SMOOTH)


@cache
def _height(size: int) -> float:
    return math.ceil(size * 1.35)


@lru_cache(maxsize=4096)
def _width(text: str, size: int) -> float:
    return _font(size).getlength(_printable(text)) / SMOOTH


@lru_cache(maxsize=4096)
def _printable(text: str) -> str:
    """The text in letters that the font has: without accents, then with question marks."""
    return "".join(c if _has(c) else _plain(c) for c in text)


def _plain(letter: str) -> str:
    bare = [c for c in unicodedata.normalize("NFKD", letter) if not unicodedata.combining(c)]
    return "".join(c if _has(c) else "?" for c in bare)


@cache
def _has(letter: str) -> bool:
    """Whether the font draws this letter otherwise than one that no font has."""
    if letter.isascii():
        return letter.isprintable()
    mask, none = (_font(SMALL).getmask(c) for c in (letter, "\U0010fffd"))
    return mask.size != none.size or bytes(mask) != bytes(none)


@lru_cache(maxsize=4096)
def _cut(text: str, size: int, width: float) -> str:
    """The text, without its middle where it is too long: names of layers differ at both ends."""
    if _width(text, size) <= width:
        return text
    kept = len(text)
    while kept > 1:
        kept -= 1
        head, tail = text[: kept - kept // 2], text[len(text) - kept // 2 :]
        if _width(f"{head}…{tail}", size) <= width:
            return f"{head}…{tail}"
    return "…"


def _wrap(text: str, size: int, width: float) -> list[str]:
    lines: list[str] = []
    for paragraph in text.splitlines() or [""]:
        words = [_cut(word, size, width) for word in paragraph.split()]
        line = ""
        for word in words:
            longer = f"{line} {word}".strip()
            if line and _width(longer, size) > width:
                lines.append(line)
                longer = word
            line = longer
        lines.append(line)
    return lines
