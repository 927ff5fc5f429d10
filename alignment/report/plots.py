"""The charts of the report, each a function of its data and of the width that it has."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from markupsafe import Markup

from alignment.report.svg import Axis, Canvas, Point, apart, linear, powers_of_two, width_of
from alignment.report.tables import with_span
from alignment.stats import Interval

LABEL_GAP = 15.0  # between the baselines of two labels


@dataclass(frozen=True)
class Curve:
    """A line with its name beside its end. `band` holds the lower and upper ends of an interval around each point."""

    name: str
    points: list[Point]
    kind: str = "curve"
    tone: float = 1
    band: list[tuple[float, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Frame:
    """The area inside the margins, and the axes that span it."""

    x: Axis
    y: Axis
    left: float
    right: float
    top: float
    bottom: float

    def at(self, x: float, y: float) -> Point:
        return (
            self.left + self.x.share(x) * (self.right - self.left),
            self.bottom - self.y.share(y) * (self.bottom - self.top),
        )


def curves(
    lines: Sequence[Curve],
    width: float,
    label: str,
    height: float = 190,
    percent: bool = False,
    doublings: bool = False,
    marks: Sequence[tuple[float, str]] = (),
) -> Markup:
    """Lines over a shared x, named at their right end.

    `marks` are vertical lines with their labels; `doublings` makes x logarithmic.
    """
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points] + [y for line in lines for ends in line.band for y in ends]
    x = powers_of_two(min(xs), max(xs)) if doublings else linear(xs, count=max(3, round(width / 80)))
    if not doublings:
        x = Axis(min(xs), max(*xs, min(xs) + 1), [tick for tick in x.ticks if min(xs) <= tick <= max(xs)], x.format)
    y = linear(ys, count=max(3, round(height / 60)), percent=percent)
    named = [line for line in lines if line.name]
    left = width_of(map(y.format, y.ticks)) + 8
    right = width - (width_of(line.name for line in named) + 12 if named else 10)
    canvas = Canvas(width, height, label)
    frame = Frame(x, y, left, right, 20.0 if marks else 10.0, height - 22)
    _grid(canvas, frame)
    for position, words in marks:
        above = frame.at(position, y.high)
        canvas.line(above, frame.at(position, y.low), "divider")
        canvas.text(above[0] + 4, 12, words)
    for line in lines:
        if line.band:
            places = [place for place, _ in line.points]
            upper = [frame.at(p, high) for p, (_, high) in zip(places, line.band, strict=True)]
            lower = [frame.at(p, low) for p, (low, _) in zip(places, line.band, strict=True)]
            canvas.path([*upper, *reversed(lower)], "band", line.tone, closed=True)
    for line in lines:
        points = [frame.at(*point) for point in line.points]
        if len(points) == 1:
            canvas.dot(*points[0], 3, tone=line.tone)
        canvas.path(points, line.kind, line.tone)
    ends = [frame.at(*line.points[-1]) for line in named]
    heights = apart([end[1] for end in ends], LABEL_GAP, frame.top, frame.bottom)
    for line, end, place in zip(named, ends, heights, strict=True):
        if abs(place - end[1]) > 3:
            canvas.line((end[0] + 1, end[1]), (frame.right + 6, place), "leader", line.tone)
        kind = "name strong" if line.kind == "curve strong" else "name"
        canvas.text(frame.right + 8, place + 4, line.name, kind, tone=line.tone)
    return canvas.markup()


def _grid(canvas: Canvas, frame: Frame) -> None:
    for tick in frame.y.ticks:
        _, height = frame.at(frame.x.low, tick)
        canvas.line((frame.left, height), (frame.right, height), "grid")
        canvas.text(frame.left - 6, height + 4, frame.y.format(tick), anchor="end")
    for tick in frame.x.ticks:
        place, _ = frame.at(tick, frame.y.low)
        canvas.text(place, frame.bottom + 17, frame.x.format(tick), anchor="middle")


def steps(estimates: Sequence[tuple[str, Interval]], width: float, label: str, height: float = 250) -> Markup:
    """An estimate at each step of a run, with its interval and its value beside it, joined by a line."""
    ends = [y for _, estimate in estimates for y in _ends(estimate)]
    y = linear(ends, percent=True)
    x = Axis(-0.35, len(estimates) - 0.55, [], str)
    frame = Frame(x, y, width_of(map(y.format, y.ticks)) + 8, width - 10, 12, height - 24)
    canvas = Canvas(width, height, label)
    _grid(canvas, frame)
    places = [frame.at(i, estimate.value) for i, (_, estimate) in enumerate(estimates)]
    canvas.path(places, "curve")
    for i, (name, estimate) in enumerate(estimates):
        low, high = _ends(estimate)
        canvas.line(frame.at(i, low), frame.at(i, high), "whisker")
        canvas.dot(*places[i], 5, hint=f"{name}: {with_span(estimate)}")
        canvas.text(places[i][0] + 10, places[i][1] + 16, f"{estimate.value:.1%}", "value")
        canvas.text(places[i][0], height - 6, name, "name plain", "middle")
    return canvas.markup()


def _ends(estimate: Interval) -> tuple[float, float]:
    """The interval, kept between 0 and 1; the value itself where the bounds are not known."""
    low, high = (estimate.value if np.isnan(end) else end for end in (estimate.low, estimate.high))
    return max(0.0, float(low)), min(1.0, float(high))


def dots(groups: Sequence[tuple[str, Sequence[Interval]]], tones: Sequence[float], width: float, label: str) -> Markup:
    """One row a group, one dot and interval a series, from the first series (quiet) to the last (accent)."""
    ends = [y for _, estimates in groups for estimate in estimates for y in _ends(estimate)]
    row, head = 17.0 + 7 * len(tones), 22.0
    height = head + row * len(groups) + 4
    x = linear(ends, count=max(3, round(width / 110)), percent=True)
    changes = [f"{estimates[0].value:.0%} → {estimates[-1].value:.0%}" for _, estimates in groups]
    left = width_of(name for name, _ in groups) + 10
    frame = Frame(x, Axis(0, 1, [], str), left, width - width_of(changes) - 10, head, height - 4)
    canvas = Canvas(width, height, label)
    for tick in x.ticks:
        place, top = frame.at(tick, 1)
        canvas.line((place, top), (place, frame.bottom), "grid")
        canvas.text(place, 13, x.format(tick), anchor="middle")
    for number, (name, estimates) in enumerate(groups):
        middle = head + row * (number + 0.5)
        canvas.text(0, middle + 4, name, "name plain")
        canvas.text(width, middle + 4, changes[number], "value", "end")
        for i, (estimate, tone) in enumerate(zip(estimates, tones, strict=True)):
            y = middle + 7 * (i - (len(tones) - 1) / 2)
            low, high = _ends(estimate)
            canvas.line((frame.at(low, 0)[0], y), (frame.at(high, 0)[0], y), "whisker", tone)
            canvas.dot(frame.at(estimate.value, 0)[0], y, 4, tone=tone, hint=f"{name}: {with_span(estimate)}")
    return canvas.markup()


def histograms(parts: Sequence[tuple[Sequence[float], float]], width: float, label: str, height: float = 150) -> Markup:
    """Distributions over the same bins, each with its own tone; the area under each is the same."""
    everything = np.concatenate([np.asarray(values, dtype=np.float64) for values, _ in parts])
    x = linear([float(value) for value in np.quantile(everything, [0.0005, 0.9995])], count=max(2, round(width / 70)))
    bins = np.linspace(x.low, x.high, 37)
    shares = [np.histogram(np.clip(values, x.low, x.high), bins)[0] / max(len(values), 1) for values, _ in parts]
    y = Axis(0, float(max(share.max() for share in shares)) or 1.0, [], str)
    frame = Frame(x, y, 10, width - 10, 6, height - 22)
    canvas = Canvas(width, height, label)
    for share, (_, tone) in zip(shares, parts, strict=True):
        outline = [point for i, value in enumerate(share) for point in ((bins[i], value), (bins[i + 1], value))]
        points = [frame.at(float(a), float(b)) for a, b in [(x.low, 0.0), *outline, (x.high, 0.0)]]
        canvas.path(points, "hill", tone)
    _grid(canvas, frame)
    canvas.line((frame.left, frame.bottom), (frame.right, frame.bottom), "grid")
    return canvas.markup()


def shares(rows: Sequence[tuple[str, Sequence[float]]], names: Sequence[str], width: float, label: str) -> Markup:
    """Stacked bars, one a row, each of length 1; the first part in the accent colour, the others fading."""
    row, head = 34.0, 4.0
    left = width_of(name for name, _ in rows) + 10
    canvas = Canvas(width, head + row * len(rows), label)
    for number, (name, parts) in enumerate(rows):
        y = head + row * number
        canvas.text(0, y + 17, name, "name plain")
        bounds = [0.0, *np.cumsum(parts).tolist()]
        for i, (start, end) in enumerate(pairwise(bounds)):
            x, length = left + start * (width - left), (end - start) * (width - left)
            kind = f"part part-{min(i, 3)}"
            canvas.box(x, y, max(length - 1, 0), 24, kind, hint=f"{name}: {names[i]} {end - start:.1%}")
            if length > 40:
                canvas.text(x + length / 2, y + 16, f"{end - start:.0%}", f"inside inside-{min(i, 3)}", "middle")
    return canvas.markup()


def heat(rows: Sequence[Sequence[float]], width: float, label: str) -> Markup:
    """A cell for each layer (row) and expert (column): grey at an even share of 1, the accent colour from 2 on."""
    left, foot = width_of(["layer 00"]) + 8, 20.0
    wide = (width - left) / len(rows[0])
    high = min(22.0, max(8.0, wide))
    canvas = Canvas(width, high * len(rows) + foot, label)
    for layer, loads in enumerate(rows):
        if layer % max(1, round(16 / high)) == 0:
            canvas.text(0, high * layer + high / 2 + 4, f"layer {layer}")
        for expert, share in enumerate(loads):
            hint = f"layer {layer}, expert {expert}: {share:.2f} of an even share"
            kind, tone = ("cell", min(share / 2, 1.0)) if share else ("cell dead", 0.0)
            canvas.box(left + wide * expert, high * layer, max(wide - 1, 1), high - 1, kind, tone, hint)
    canvas.text(left, high * len(rows) + 15, "expert 0")
    canvas.text(width, high * len(rows) + 15, f"expert {len(rows[0]) - 1}", anchor="end")
    return canvas.markup()
