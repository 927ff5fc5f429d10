"""Numbers as the page writes them, and tables of metrics."""

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from alignment.report.collect import StageRun, is_number
from alignment.report.page import Note, Table
from alignment.report.sources import ENDS, interval
from alignment.stats import Interval


def percent(value: float) -> str:
    return f"{value:.1%}"


def points(value: float) -> str:
    """A difference of two shares, in percentage points, with its sign."""
    return f"{100 * value:+.1f}".replace("-", "\u2212")


def span(estimate: Interval) -> str:
    """The interval of a share; nothing where it is not known."""
    return f"{100 * estimate.low:.1f} to {estimate.high:.1%}" if is_number(estimate.low) else ""


def with_span(estimate: Interval) -> str:
    """A share and, where it is known, its interval."""
    return f"{percent(estimate.value)} ({span(estimate)})" if is_number(estimate.low) else percent(estimate.value)


def point_span(change: Interval) -> str:
    """The interval of a difference of shares."""
    return f"{points(change.low)} to {points(change.high)}" if is_number(change.low) else ""


def duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"


def plain(value: object) -> str:
    """Any value: whole numbers with separators, others with four digits."""
    if not is_number(value):
        return str(value)
    if float(value).is_integer():
        return f"{value:,.0f}"
    return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def meter(share: float) -> Markup:
    """A bar in a table's cell."""
    return Markup('<span class="meter"><span style="width:{:.1f}%"></span></span>').format(100 * share)


def missing(what: str, stage: StageRun) -> Note:
    """Says that a stage has not (yet) written something, and how to run it."""
    return Note(f"No {what}. Stage {stage.name} is {stage.state}; its command:", stage.command)


def compare(runs: Sequence[tuple[str, Mapping[str, Any]]], caption: str = "", fold: str = "") -> Table:
    """The metrics of several runs, one column each; a share with an interval in one cell."""
    keys = dict.fromkeys(key for _, metrics in runs for key in metrics)
    ends = {key + end for key in keys for end in ENDS[1:]}
    rows = [[key, *(_cell(metrics, key) for _, metrics in runs)] for key in keys if key not in ends]
    return Table(["", *(name for name, _ in runs)], rows, caption, fold=fold)


def _cell(metrics: Mapping[str, Any], key: str) -> str:
    estimate = interval(metrics, key)
    if estimate is None or not is_number(estimate.low):
        return plain(metrics.get(key, ""))
    if is_nats(key):
        return f"{estimate.value:.2f} ({estimate.low:.2f} to {estimate.high:.2f})"
    return f"{points(estimate.value)} points ({point_span(estimate)})" if is_change(key) else with_span(estimate)


def is_nats(key: str) -> bool:
    return key.split(".")[-1] == "kl"


def is_change(key: str) -> bool:
    return "change" in key.split(".")
