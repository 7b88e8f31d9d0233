"""Plots as inline SVG text: steps, points with intervals, bars with bounds, lines.

Every function takes plain numbers and gives one ``<svg>`` string without scripts or outside requests; every
mark carries a ``<title>``, which browsers show on hover and screen readers read. Colours come from the
page's CSS classes. Knows nothing of run records.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

WIDTH, LEFT, RIGHT, TOP, BOTTOM = 860, 64, 20, 30, 44


@dataclass(frozen=True, slots=True)
class Point:
    """A labelled value with its interval."""

    label: str
    x: float
    y: float
    low: float | None = None
    high: float | None = None
    tone: str = "a"


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of a horizontal bar."""

    label: str
    value: float
    tone: str = "a"


@dataclass(frozen=True, slots=True)
class BarRow:
    """One horizontal bar: its parts, a text at its end, and a mark such as a bound."""

    label: str
    segments: tuple[Segment, ...]
    note: str = ""
    mark: float | None = None
    mark_label: str = ""


@dataclass(frozen=True, slots=True)
class Line:
    """A curve."""

    label: str
    points: tuple[tuple[float, float], ...]
    tone: str = "a"


def number(value: float) -> str:
    """A figure with three significant digits and no needless zeros."""
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def size(value: float) -> str:
    """Bytes in decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(value) < 1000 or unit == "GB":
            return f"{value:z.0f} B" if unit == "B" else f"{value:z.3g} {unit}"
        value /= 1000
    raise AssertionError("the last unit takes every value")


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round values that cover ``low..high``."""
    span = (high - low) or abs(high) or 1.0
    raw = span / max(count - 1, 1)
    power = 10 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= raw)
    first = math.floor(low / step)
    return [round((first + i) * step, 12) for i in range(math.ceil(high / step) - first + 1)]


def open_svg(height: int, title: str) -> str:
    """The start tag with a name for screen readers."""
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}"><title>{escape(title)}</title>'


def text(x: float, y: float, words: str, cls: str = "", anchor: str = "start") -> str:
    """A label."""
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{cls}" text-anchor="{anchor}">{escape(words)}</text>'


def y_axis(values: Sequence[float], place: Callable[[float], float], words: Callable[[float], str], name: str) -> str:
    """Grid lines with their figures and the axis name."""
    out = [text(LEFT - 52, TOP - 14, name, "axis")]
    for value in values:
        y = place(value)
        out.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
        out.append(text(LEFT - 8, y + 4, words(value), "tick", "end"))
    return "".join(out)


def spread(positions: list[float], gap: float) -> list[float]:
    """Move labels apart so that neighbours are ``gap`` or more from each other, keeping their order."""
    order = sorted(range(len(positions)), key=positions.__getitem__)
    moved = list(positions)
    for before, after in pairwise(order):
        moved[after] = max(moved[after], moved[before] + gap)
    return moved


def scatter(points: Sequence[Point], *, title: str, x_name: str, y_name: str, y_words: Callable[[float], str]) -> str:
    """Size (logarithmic) against quality, in order, with intervals and a path from point to point."""
    height = 340
    logs = [math.log10(max(p.x, 1)) for p in points]
    x_low, x_high = math.floor(min(logs) * 2 - 0.2) / 2, math.ceil(max(logs) * 2 + 0.2) / 2
    ends = [v for p in points for v in (p.y, p.low, p.high) if v is not None]
    grid = ticks(min(ends), max(ends))

    def place_x(value: float) -> float:
        share = (math.log10(max(value, 1)) - x_low) / (x_high - x_low)
        return LEFT + share * (WIDTH - LEFT - RIGHT - 130)

    def place_y(value: float) -> float:
        return height - BOTTOM - (value - grid[0]) / ((grid[-1] - grid[0]) or 1) * (height - TOP - BOTTOM)

    out = [open_svg(height, title), y_axis(grid, place_y, y_words, y_name)]
    for half in range(round(x_low * 2), round(x_high * 2) + 1):
        value = 10 ** (half / 2)
        out.append(text(place_x(value), height - BOTTOM + 18, size(value), "tick", "middle"))
    out.append(text(WIDTH - RIGHT, height - 8, x_name, "axis", "end"))
    path = " ".join(f"{place_x(p.x):.1f},{place_y(p.y):.1f}" for p in points)
    out.append(f'<polyline points="{path}" class="path"/>')
    labels = spread([place_y(p.y) - 8 for p in points], 15)
    for p, label_y in zip(points, labels, strict=True):
        x, y = place_x(p.x), place_y(p.y)
        if p.low is not None and p.high is not None:
            top, foot = place_y(p.high), place_y(p.low)
            out.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{foot:.1f}" y2="{top:.1f}" class="whisker"/>')
        tip = f"{p.label}: {size(p.x)}, {y_words(p.y)}"
        out.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5.5" class="fill-{p.tone}"><title>{escape(tip)}</title></circle>'
        )
        out.append(text(x + 10, label_y, p.label, "label"))
    return "".join(out) + "</svg>"


def bars(rows: Sequence[BarRow], *, title: str, words: Callable[[float], str] = number, label_width: int = 190) -> str:
    """Horizontal bars of stacked segments; a mark is a dashed line across its own row."""
    row_height, height = 30, 30 * len(rows) + 26
    top = max([sum(s.value for s in r.segments) for r in rows] + [r.mark or 0 for r in rows] + [1e-12])
    scale = (WIDTH - label_width - 230) / top
    out = [open_svg(height, title)]
    for i, row in enumerate(rows):
        y, x = 8 + i * row_height, float(label_width)
        out.append(text(label_width - 8, y + 15, row.label, "label", "end"))
        for segment in row.segments:
            width = segment.value * scale
            tip = f"{row.label}: {segment.label} {words(segment.value)}"
            out.append(
                f'<rect x="{x:.1f}" y="{y}" width="{max(width, 0.5):.1f}" height="20" class="fill-{segment.tone}">'
            )
            out.append(f"<title>{escape(tip)}</title></rect>")
            x += width
        if row.mark is not None:
            at = label_width + row.mark * scale
            out.append(f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{y - 4}" y2="{y + 24}" class="mark"><title>')
            out.append(f"{escape(row.mark_label)} {words(row.mark)}</title></line>")
            x = max(x, at)
        out.append(text(x + 8, y + 15, row.note, "tick"))
    return "".join(out) + "</svg>"


def differences(points: Sequence[Point], *, title: str, words: Callable[[float], str]) -> str:
    """Signed bars around zero with intervals: what each step cost (to the right) or gave back (to the left)."""
    height, label_width = 32 * len(points) + 40, 230
    ends = [abs(v) for p in points for v in (p.y, p.low, p.high) if v is not None]
    limit = max([*ends, 1e-9]) * 1.1
    middle, scale = label_width + (WIDTH - label_width - 90) / 2, (WIDTH - label_width - 90) / 2 / limit
    out = [open_svg(height, title)]
    out.append(f'<line x1="{middle:.1f}" x2="{middle:.1f}" y1="4" y2="{height - 28}" class="axis-line"/>')
    for i, p in enumerate(points):
        y, end = 8 + i * 32, middle + p.y * scale
        out.append(text(label_width - 8, y + 15, p.label, "label", "end"))
        tone = "bad" if p.y > 0 else "good"
        left, width = min(middle, end), max(abs(end - middle), 1)
        out.append(f'<rect x="{left:.1f}" y="{y}" width="{width:.1f}" height="20" class="fill-{tone}">')
        out.append(f"<title>{escape(f'{p.label}: {words(p.y)}')}</title></rect>")
        if p.low is not None and p.high is not None:
            a, b = middle + p.low * scale, middle + p.high * scale
            out.append(f'<line x1="{a:.1f}" x2="{b:.1f}" y1="{y + 10}" y2="{y + 10}" class="whisker"/>')
        out.append(text(WIDTH - 84, y + 15, words(p.y), "tick"))
    out.append(text(middle - 8, height - 8, "better", "axis", "end"))
    out.append(text(middle + 8, height - 8, "worse", "axis"))
    return "".join(out) + "</svg>"


def lines(curves: Sequence[Line], *, title: str, x_name: str, y_name: str) -> str:
    """Curves over steps on a logarithmic loss axis where all values are positive."""
    height = 300
    values = [(x, y) for c in curves for x, y in c.points if math.isfinite(y)]
    if not values:
        return ""
    positive = all(y > 0 for _, y in values)
    scale_y: Callable[[float], float] = math.log10 if positive else float
    low, high = min(scale_y(y) for _, y in values), max(scale_y(y) for _, y in values)
    x_high = max(x for x, _ in values) or 1
    span = (high - low) or 1.0

    def place(x: float, y: float) -> tuple[float, float]:
        share = (scale_y(y) - low) / span
        return LEFT + x / x_high * (WIDTH - LEFT - RIGHT - 110), height - BOTTOM - share * (height - TOP - BOTTOM)

    shown = [low + span * i / 4 for i in range(5)]
    out = [open_svg(height, title)]
    out.append(
        y_axis(
            shown,
            lambda v: height - BOTTOM - (v - low) / span * (height - TOP - BOTTOM),
            lambda v: number(10**v if positive else v),
            y_name,
        )
    )
    for value in ticks(0, x_high):
        if value <= x_high:
            out.append(text(place(value, values[0][1])[0], height - BOTTOM + 18, number(value), "tick", "middle"))
    out.append(text(WIDTH - RIGHT, height - 8, x_name, "axis", "end"))
    tails = spread([place(*c.points[-1])[1] + 4 for c in curves], 15)
    for curve, tail in zip(curves, tails, strict=True):
        path = " ".join("{:.1f},{:.1f}".format(*place(x, y)) for x, y in curve.points if math.isfinite(y))
        out.append(
            f'<polyline points="{path}" class="line line-{curve.tone}"><title>{escape(curve.label)}</title></polyline>'
        )
        out.append(text(WIDTH - RIGHT - 104, tail, curve.label, f"label text-{curve.tone}"))
    return "".join(out) + "</svg>"
