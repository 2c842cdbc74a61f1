"""Loss curves as the numbers that an SVG needs: axes with round ticks, and a path per model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from fusekit.report import text

WIDTH, HEIGHT = 560, 300
LEFT, RIGHT, TOP, BOTTOM = 56, 26, 14, 44
MOST_POINTS = 240  # of a curve; more cannot be told apart at this width

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Tick:
    """A mark on an axis: where, in pixels, and what it says."""

    at: float
    says: str


@dataclass(frozen=True)
class Curve:
    """A model's line. colour: its class. path: of an SVG. last: its last value, and where that is."""

    name: str
    colour: str
    path: str
    last: str
    end: tuple[float, float]


@dataclass(frozen=True)
class Chart:
    """A chart of curves over steps. x, y: ticks. values: per curve its first, least and last value, for a table."""

    title: str
    x: list[Tick]
    y: list[Tick]
    curves: list[Curve]
    values: list[tuple[str, str, str, str]]
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM


def chart(title: str, series: Sequence[tuple[str, str, Points]]) -> Chart | None:
    """Lay out curves: name, class of their colour, and points. None where no curve has two points."""
    series = [(name, colour, thinned(points)) for name, colour, points in series if len(points) > 1]
    if not series:
        return None
    every = [point for _, _, points in series for point in points]
    x_ticks = ticks(min(x for x, _ in every), max(x for x, _ in every), 6)
    y_ticks = ticks(min(y for _, y in every), max(y for _, y in every), 5)
    x_low, x_high = min(x_ticks[0], *(x for x, _ in every)), max(x for x, _ in every)
    y_low, y_high = y_ticks[0], y_ticks[-1]

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / (x_high - x_low or 1) * (WIDTH - LEFT - RIGHT) + LEFT
        down = HEIGHT - BOTTOM - (y - y_low) / (y_high - y_low or 1) * (HEIGHT - TOP - BOTTOM)
        return round(across, 1), round(down, 1)

    curves, values = [], []
    for name, colour, points in series:
        at = [place(x, y) for x, y in points]
        path = "M" + "L".join(f"{x:g} {y:g}" for x, y in at)
        heights = [y for _, y in points]
        curves.append(Curve(name, colour, path, text.fixed(heights[-1], 2), at[-1]))
        first, least, last = (text.fixed(value) for value in (heights[0], min(heights), heights[-1]))
        values.append((name, first, least, last))
    return Chart(
        title,
        [Tick(place(x, y_low)[0], says) for x, says in zip(x_ticks, labels(x_ticks), strict=True) if x <= x_high],
        [Tick(place(x_low, y)[1], says) for y, says in zip(y_ticks, labels(y_ticks), strict=True)],
        curves,
        values,
    )


def ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers that enclose ``low`` and ``high``, about so many: multiples of 1, 2 or 5 times a power of ten."""
    if not high > low:
        low, high = low - 0.5, high + 0.5
    rough = (high - low) / max(about - 1, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    distance = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.floor(low / distance + 1e-9), math.ceil(high / distance - 1e-9)
    return [round(number * distance, 12) for number in range(first, last + 1)]


def labels(values: Sequence[float]) -> list[str]:
    """Of ticks: as many digits as tell all of them apart, and no more."""
    digits = next((n for n in range(10) if all(abs(round(v, n) - v) < 1e-9 for v in values)), 10)
    return [text.fixed(value, digits) for value in values]


def thinned(points: Points) -> list[tuple[float, float]]:
    """At most :data:`MOST_POINTS`, each the mean of its neighbours; the first and the last stay as they are."""
    inner = list(points[1:-1])
    if len(inner) <= MOST_POINTS:
        return list(points)
    edges = [round(i * len(inner) / MOST_POINTS) for i in range(MOST_POINTS + 1)]
    parts = [inner[start:stop] for start, stop in pairwise(edges) if stop > start]
    means = [(math.fsum(x for x, _ in p) / len(p), math.fsum(y for _, y in p) / len(p)) for p in parts]
    return [points[0], *means, points[-1]]
