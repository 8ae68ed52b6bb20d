"""Pictures as inline SVG text: no script, no font, no library. Colours are CSS variables of `page.css`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 1040


@dataclass(frozen=True)
class Cell:
    """One square of a heat map; `value` None means there is nothing to colour, and `title` says why."""

    value: float | None
    title: str


def curve(steps: Sequence[int], values: Sequence[float], *, caption: str) -> str:
    """Values by step as a line."""
    left, right, top, bottom = 96, WIDTH - 28, 14, 194
    low, high = min(values), max(values)
    ticks = nice_ticks(low, high, 4)
    floor, span = min(ticks[0], low), (max(ticks[-1], high) - min(ticks[0], low)) or 1.0
    reach = max(steps[-1] - steps[0], 1)

    def at(step: float, value: float) -> tuple[float, float]:
        return left + (right - left) * (step - steps[0]) / reach, bottom - (bottom - top) * (value - floor) / span

    parts = []
    for tick in ticks:
        y = at(steps[0], tick)[1]
        parts += [_line(left, y, right, y), _text(left - 10, y + 4, f"{tick:g}", "end")]
    drawn = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(at, steps, values))
    parts.append(f'<polyline class="curve" points="{drawn}"/>')
    parts += [_text(at(step, floor)[0], bottom + 16, str(step), "middle") for step in (steps[0], steps[-1])]
    parts.append(_text((left + right) / 2, bottom + 36, "step", "middle"))
    return _svg(bottom + 44, caption, parts)


@dataclass(frozen=True)
class Point:
    """A model in the size and quality picture: `x` bytes, `y` perplexity. `style`: "dense", "this" or "other"."""

    label: str
    x: float
    y: float
    style: str


def label_width(labels: Iterable[str]) -> float:
    """Room that the longest of some row labels takes, with its margin."""
    return 7.2 * max(map(len, labels), default=0) + 20


def heat_map(rows: Mapping[str, Mapping[int, Cell]], columns: int, *, left: float, caption: str) -> str:
    """Row label -> column -> cell, coloured on a log scale, with a colour bar. Columns are numbered from 0.

    `left` is the room for row labels; pictures that stand under each other share it.
    """
    top = 14
    step = _step(left, columns)
    height = max(min(step * 0.8, 26.0), 16.0)
    values = [cell.value for row in rows.values() for cell in row.values() if cell.value]
    low, high = (min(values), max(values)) if values else (1.0, 1.0)
    parts = []
    for line, (label, cells) in enumerate(rows.items()):
        y = top + line * height
        parts.append(_text(left - 10, y + height / 2 + 4, label, "end"))
        parts += [
            _cell(left + step * column, y, step, height, cell, low, high) for column, cell in sorted(cells.items())
        ]
    bottom = top + len(rows) * height
    every = max(1, math.ceil(26 / step))
    parts += [_text(left + step * (at + 0.5), bottom + 16, str(at), "middle") for at in range(0, columns, every)]
    parts.append(_text(left + step * columns / 2, bottom + 36, "block", "middle"))
    parts.append(_colour_bar(left, bottom + 48, low, high) if values else "")
    return _svg(bottom + 84, caption, parts)


def _step(left: float, columns: int) -> float:
    return min((WIDTH - left - 8) / max(columns, 1), 46.0)


def _cell(x: float, y: float, width: float, height: float, cell: Cell, low: float, high: float) -> str:
    gap = min(1.5, width * 0.1)
    box = f'x="{x:.1f}" y="{y:.1f}" width="{width - gap:.1f}" height="{height - gap:.1f}" rx="2"'
    title = f"<title>{escape(cell.title)}</title>"
    if cell.value is None:
        return f'<rect class="empty" {box}>{title}</rect>'
    return f'<rect style="fill:{_colour(_position(cell.value, low, high))}" {box}>{title}</rect>'


def _position(value: float, low: float, high: float) -> float:
    """Where `value` lies between `low` and `high` on a log scale, 0 to 1."""
    if value <= low or high <= low:
        return 0.0 if high > low else 0.5
    return min(math.log(value / low) / math.log(high / low), 1.0)


def _colour(position: float) -> str:
    """A colour between --low, --middle and --high."""
    first, second, share = ("low", "middle", position * 2) if position < 0.5 else ("middle", "high", position * 2 - 1)
    return f"color-mix(in oklab, var(--{first}), var(--{second}) {share:.0%})"


def _colour_bar(x: float, y: float, low: float, high: float) -> str:
    steps, width = 24, 8
    parts = [
        f'<rect x="{x + step * width}" y="{y}" width="{width + 0.5}" height="10" '
        f'style="fill:{_colour(step / (steps - 1))}"/>'
        for step in range(steps)
    ]
    for share in (0.0, 0.5, 1.0):
        value = low * (high / low) ** share
        parts.append(_text(x + steps * width * share, y + 26, f"{value:.2g}", "middle"))
    parts.append(_text(x + steps * width + 24, y + 10, "relative error, log scale; an outlined square has none"))
    return "".join(parts)


def bars(values: Sequence[float], titles: Sequence[str], *, left: float, caption: str) -> str:
    """Values by block as bars from zero."""
    top, bottom = 14, 134
    largest = max(values, default=0.0)
    ticks = nice_ticks(0.0, largest, 4)
    span = max(ticks[-1], largest) or 1.0
    step = _step(left, len(values))
    parts = []
    for tick in ticks:
        y = bottom - (bottom - top) * tick / span
        parts.append(_line(left, y, left + step * len(values), y))
        parts.append(_text(left - 10, y + 4, f"{tick:g}", "end"))
    for at, (value, title) in enumerate(zip(values, titles, strict=True)):
        size = (bottom - top) * value / span
        box = f'x="{left + step * at + 1:.1f}" y="{bottom - size:.1f}" width="{step - 2:.1f}" height="{size:.1f}"'
        parts.append(f'<rect class="bar" {box}><title>{escape(title)}</title></rect>')
    every = max(1, math.ceil(26 / step))
    parts += [_text(left + step * (at + 0.5), bottom + 16, str(at), "middle") for at in range(0, len(values), every)]
    parts.append(_text(left + step * len(values) / 2, bottom + 36, "block", "middle"))
    return _svg(bottom + 44, caption, parts)


def scatter(points: Sequence[Point], *, caption: str) -> str:
    """Size against perplexity: the lower left is better. Perplexity is on a log scale when it spans a factor of 4."""
    left, right, top, bottom = 96, WIDTH - 28, 18, 300
    largest = max(point.x for point in points)
    x_ticks = nice_ticks(0.0, largest / 1e6, 6)
    x_span = max(x_ticks[-1] * 1e6, largest)
    low, high = min(point.y for point in points), max(point.y for point in points)
    log = high > 4 * low
    y_ticks = log_ticks(low, high) if log else nice_ticks(low - 0.15 * (high - low) - 0.01, high, 5)
    scale = math.log if log else float
    floor, ceiling = scale(min(y_ticks[0], low)), scale(max(y_ticks[-1], high))

    def place(x: float, y: float) -> tuple[float, float]:
        up = (scale(y) - floor) / ((ceiling - floor) or 1.0)
        return left + (right - left) * x / x_span, bottom - (bottom - top) * up

    parts = []
    for tick in y_ticks:
        y = place(0, tick)[1]
        parts += [_line(left, y, right, y), _text(left - 10, y + 4, f"{tick:g}", "end")]
    for tick in x_ticks:
        parts.append(_text(place(tick * 1e6, low)[0], bottom + 18, f"{tick:g}", "middle"))
    parts.append(_text((left + right) / 2, bottom + 38, "size of the weights, MB", "middle"))
    turned = f"perplexity{', log scale' if log else ''}"
    parts.append(_text(24, (top + bottom) / 2, turned, "middle", f' transform="rotate(-90 24 {(top + bottom) / 2})"'))
    parts += _markers([(point, *place(point.x, point.y)) for point in points])
    return _svg(bottom + 46, caption, parts)


def _markers(placed: Sequence[tuple[Point, float, float]]) -> list[str]:
    """Dots, and labels beside them (to the left near the right edge) pushed apart where they would touch."""
    parts = []
    taken: list[tuple[float, float]] = []
    for point, x, y in sorted(placed, key=lambda entry: entry[2]):
        side, anchor = (1, "start") if x < WIDTH * 0.8 else (-1, "end")
        at = y + 4
        while any(abs(at - other) < 16 and abs(x - where) < 240 for where, other in taken):
            at += 4
        taken.append((x, at))
        if at - y > 8:
            parts.append(f'<line class="leader" x1="{x:.1f}" y1="{y:.1f}" x2="{x + 11 * side:.1f}" y2="{at - 4:.1f}"/>')
        title = f"{point.label}: {point.x / 1e6:.1f} MB, perplexity {point.y:.3f}"
        parts.append(
            f'<circle class="{point.style}" cx="{x:.1f}" cy="{y:.1f}" r="6"><title>{escape(title)}</title></circle>'
        )
        parts.append(_text(x + 13 * side, at, point.label, anchor, f' class="label {point.style}"'))
    return parts


def nice_ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers (1, 2, 5 times a power of ten) that cover `low` to `high`."""
    span = high - low
    if not span > 0:
        return [low]
    rough = span / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next((factor * power for factor in (1, 2, 5) if factor * power >= rough * (1 - 1e-9)), 10 * power)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten that cover `low` to `high`; over more than four decades, only the powers."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1,) if len(decades) > 5 else (1, 2, 5)
    ticks = [float(f"{factor}e{power}") for power in decades for factor in factors]
    below = max(index for index, tick in enumerate(ticks) if tick <= low)
    above = min((index for index, tick in enumerate(ticks) if tick >= high), default=len(ticks) - 1)
    return ticks[below : above + 1]


def _text(x: float, y: float, text: str, anchor: str = "start", extra: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{extra}>{escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="grid" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _svg(height: float, caption: str, parts: Sequence[str]) -> str:
    head = f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(caption, quote=True)}">'
    return f"<figure>{head}{''.join(parts)}</svg><figcaption>{escape(caption)}</figcaption></figure>"
