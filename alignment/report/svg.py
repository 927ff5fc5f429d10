"""SVG drawn by hand: scales, ticks, and a canvas whose colours come from the page's style sheet.

A mark has a kind, which is its CSS class, and a tone: 0 is the quiet grey, 1 the accent colour. So the same drawing
suits a light and a dark page.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

Point = tuple[float, float]
Format = Callable[[float], str]

LETTER = 6.7  # mean width of a letter at the size of the labels, in px


@dataclass(frozen=True)
class Axis:
    """A range of values with its ticks."""

    low: float
    high: float
    ticks: list[float]
    format: Format
    log: bool = False

    def share(self, value: float) -> float:
        """Where `value` lies between `low` (0) and `high` (1)."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def linear(values: Iterable[float], count: int = 4, percent: bool = False) -> Axis:
    """An axis of round numbers around `values`, with about `count` steps."""
    known = list(values)
    low, high = min(known), max(known)
    if high - low < 1e-9 * max(abs(low), abs(high), 1e-3):
        spare = abs(high) / 2 or 1.0
        low, high = low - spare, high + spare
    step = _round_step((high - low) / count)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = [step * i for i in range(first, last + 1)]
    if percent:
        ticks = [tick for tick in ticks if -1e-9 <= tick <= 1 + 1e-9]
    return Axis(ticks[0], ticks[-1], ticks, percentage(step) if percent else decimal(step))


def powers_of_two(low: float, high: float) -> Axis:
    ticks = [2.0**i for i in range(math.ceil(math.log2(low)), math.floor(math.log2(high)) + 1)]
    return Axis(low, max(high, 2 * low), ticks, decimal(1), log=True)


def decimal(step: float) -> Format:
    places = max(0, -math.floor(math.log10(step) + 1e-9))
    if places and step * 10**places % 1 > 1e-6:
        places += 1
    return lambda value: f"{value:,.{places}f}".replace("-", "\u2212")


def percentage(step: float) -> Format:
    places = 0 if step > 0.0099 else 1
    return lambda value: f"{value:.{places}%}"


def _round_step(step: float) -> float:
    """1, 2 or 5 times a power of ten: the one nearest to `step` in ratio."""
    unit = 10.0 ** math.floor(math.log10(step))
    return min((unit * factor for factor in (1, 2, 5, 10)), key=lambda nice: abs(math.log(nice / step)))


def apart(positions: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """The positions moved as little as it takes to lie `gap` apart, between `low` and `high` where there is room."""
    order = sorted(range(len(positions)), key=lambda i: positions[i])
    clusters: list[tuple[list[int], float]] = []  # members, and the top of the first
    for i in order:
        members, top = [i], positions[i]
        while clusters and top < clusters[-1][1] + gap * len(clusters[-1][0]):
            members = clusters.pop()[0] + members
            top = sum(positions[m] - gap * place for place, m in enumerate(members)) / len(members)
        clusters.append((members, top))
    placed = [0.0] * len(positions)
    floor = low
    for members, top in clusters:
        start = max(floor, min(top, high - gap * (len(members) - 1)))
        for place, member in enumerate(members):
            placed[member] = start + gap * place
        floor = start + gap * len(members)
    return placed


class Canvas:
    """Marks in pixels, y downwards. The drawing is `width` pixels wide wherever there is room for it."""

    def __init__(self, width: float, height: float, label: str) -> None:
        self.width, self.height, self.label = width, height, label
        self.marks: list[Markup] = []

    def text(self, x: float, y: float, words: str, kind: str = "tick", anchor: str = "start", tone: float = 1) -> None:
        self._add('<text class="{}" x="{}" y="{}" text-anchor="{}"{}>{}</text>', kind, x, y, anchor, _tone(tone), words)

    def line(self, start: Point, end: Point, kind: str, tone: float = 1) -> None:
        self.path([start, end], kind, tone)

    def path(self, points: Sequence[Point], kind: str, tone: float = 1, closed: bool = False) -> None:
        steps = "L".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self._add('<path class="{}" d="M{}{}"{}/>', kind, steps, "Z" if closed else "", _tone(tone))

    def dot(self, x: float, y: float, radius: float, kind: str = "dot", tone: float = 1, hint: str = "") -> None:
        title = Markup("<title>{}</title>").format(hint) if hint else ""
        self._add('<circle class="{}" cx="{}" cy="{}" r="{}"{}>{}</circle>', kind, x, y, radius, _tone(tone), title)

    def box(self, x: float, y: float, width: float, height: float, kind: str, tone: float = 1, hint: str = "") -> None:
        title = Markup("<title>{}</title>").format(hint) if hint else ""
        self._add(
            '<rect class="{}" x="{}" y="{}" width="{}" height="{}"{}>{}</rect>',
            kind,
            x,
            y,
            width,
            height,
            _tone(tone),
            title,
        )

    def markup(self) -> Markup:
        head = '<svg role="img" aria-label="{0}" width="{1:.0f}" height="{2:.0f}" viewBox="0 0 {1:.0f} {2:.0f}">'
        return Markup(head).format(self.label, self.width, self.height) + Markup("").join(self.marks) + Markup("</svg>")

    def _add(self, form: str, *values: object) -> None:
        short = [round(value, 1) if isinstance(value, float) else value for value in values]
        self.marks.append(Markup(form).format(*map(escape, short)))


def width_of(labels: Iterable[str]) -> float:
    """Pixels that the longest of the labels takes, about."""
    return max((len(label) for label in labels), default=0) * LETTER


def _tone(tone: float) -> Markup:
    return Markup("") if tone == 1 else Markup(' style="--tone:{:.0f}%"').format(100 * tone)
