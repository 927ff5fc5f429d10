"""What long answers give and what they cost, share by share, and the share that is chosen.

Rates: a prompt's (or a document's) id -> the share of its answers that are correct.
Shapes: S seeds, P prompts.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from alignment.stats import Interval, crossed_interval

Rates = Mapping[str, float]
Measured = Mapping[str, Rates]  # of one model: measure -> rates

GENERAL = "general."  # how the names of the measures begin that the limit is held against


@dataclass(frozen=True)
class Point:
    """A share of long answers: each measure's mean over prompts and seeds, and its change against share 0, paired."""

    share: float
    values: Mapping[str, Interval]
    changes: Mapping[str, Interval]

    @property
    def general(self) -> list[Interval]:
        """The changes of the general measures."""
        return [change for name, change in self.changes.items() if name.startswith(GENERAL)]

    def within(self, limit: float) -> bool:
        """Every general measure's interval ends, at the worse side, above a fall of `limit`."""
        return self.share == 0 or all(change.low > -limit for change in self.general)

    def seems_within(self, limit: float) -> bool:
        """Every general measure's estimate is above a fall of `limit`."""
        return self.share == 0 or all(change.value > -limit for change in self.general)


def trade_off(models: Mapping[float, Sequence[Measured]]) -> list[Point]:
    """The points by share, of `models`: share -> one entry a seed, share 0 among them.

    Seed by seed and prompt by prompt, as every model answers the same prompts; see `alignment.stats.crossed_interval`.
    """
    return [_point(share, runs, models[0]) for share, runs in sorted(models.items())]


def _point(share: float, runs: Sequence[Measured], reference: Sequence[Measured]) -> Point:
    values, changes = {}, {}
    for name, rates in reference[0].items():
        ids = list(rates)
        assert all(run[name].keys() == set(ids) for run in (*runs, *reference)), f"{name}: models met other prompts"
        after_SP, before_SP = (np.array([[run[name][i] for i in ids] for run in each]) for each in (runs, reference))
        values[name] = crossed_interval(after_SP)
        changes[name] = crossed_interval(after_SP - before_SP)
    return Point(share, values, changes)


def largest(points: Sequence[Point], limit: float) -> tuple[float, float]:
    """The largest share within the limit by the intervals, and by the estimates alone; 0 where no other is."""
    return (
        max(point.share for point in points if point.within(limit)),
        max(point.share for point in points if point.seems_within(limit)),
    )


def unsure(points: Sequence[Point], limit: float) -> dict[str, float]:
    """General measures whose changes are not known to within the limit: half the width of their widest interval."""
    halves = {
        name: max((point.changes[name].high - point.changes[name].low) / 2 for point in points if point.share)
        for name in points[0].changes
        if name.startswith(GENERAL)
    }
    return {name: half for name, half in halves.items() if half > limit}


def as_metrics(points: Sequence[Point], limit: float) -> dict[str, float]:
    """Flat: `share_S.MEASURE` and its `.change`, each with `.low` and `.high`, and the largest share by either rule."""
    metrics: dict[str, float] = {"limit": limit}
    metrics["share.by_interval"], metrics["share.by_estimate"] = largest(points, limit)
    for point in points:
        for name, value in point.values.items():
            metrics |= value.as_metrics(f"share_{point.share:g}.{name}")
            if point.share:
                metrics |= point.changes[name].as_metrics(f"share_{point.share:g}.{name}.change")
    return metrics


def table(points: Sequence[Point], columns: Mapping[float, Mapping[str, str]], limit: float) -> str:
    """Markdown, a line a share: further `columns` of it, means, general changes in points; the chosen share in bold."""
    chosen, _ = largest(points, limit)
    measures = list(points[0].values)
    general = [name for name in measures if name.startswith(GENERAL)]
    head = ["long rows", *columns[0], *measures, *(f"{name}, change" for name in general), f"fall under {limit:.1%}"]
    lines = [head, ["---"] * len(head)]
    for point in points:
        shown = f"{point.share:.3g}" if point.share != chosen else f"**{point.share:.3g}**"
        means = [f"{point.values[name].value:.1%}" for name in measures]
        changes = [_points(point.changes[name]) if point.share else "" for name in general]
        lines.append([shown, *columns[point.share].values(), *means, *changes, _verdict(point, limit)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _verdict(point: Point, limit: float) -> str:
    if point.share == 0:
        return "reference"
    if point.within(limit):
        return "yes"
    return "by the estimate alone" if point.seems_within(limit) else "no"


def _points(interval: Interval) -> str:
    """A change in percentage points."""
    value, low, high = (100 * part for part in (interval.value, interval.low, interval.high))
    return f"{value:+.1f}" if math.isnan(low) else f"{value:+.1f} ({low:+.1f} to {high:+.1f})"


def conclusion(points: Sequence[Point], models: Mapping[float, Sequence[Measured]], limit: float) -> list[str]:
    """In words: the largest share by either rule, and which measures are too small to tell.

    With one seed an interval narrows with the square root of the prompts' number, so the number that would do follows.
    """
    by_interval, by_estimate = largest(points, limit)
    fall = f"no general measure falls by {limit:.1%} or more, at the worse end of its 95% interval"
    lines = [
        f"Chosen: {by_interval:.3g} of the rows, the largest share at which {fall}."
        if by_interval
        else f"Chosen: 0. There is no share of long answers at which {fall}.",
        f"By the estimates alone it is {by_estimate:.3g}.",
    ]
    for name, half in unsure(points, limit).items():
        enough = math.ceil(len(models[0][0][name]) * (half / limit) ** 2)
        advice = f"about {enough:,} prompts would do" if len(models[0]) == 1 else "it takes more prompts or more seeds"
        lines.append(f"{name}: its change is known to {half:.1%} only, the limit is {limit:.1%}; {advice}.")
    return lines
