"""The run in a sentence, in headline numbers, and in the table that the console prints."""

from typing import NamedTuple

from alignment.report.collect import Collected, is_number
from alignment.report.page import Tile
from alignment.report.sources import best_of, interval, is_average, is_single, rounds
from alignment.report.tables import duration, percent, point_span, points, span
from alignment.stats import Interval

SWITCH = {"fast": "off", "deep": "on"}
WORDS = {1: "One round", 2: "Two rounds", 3: "Three rounds", 4: "Four rounds"}


class Row(NamedTuple):
    """A line of the summary table."""

    measure: str
    value: str
    interval: str


def rows(values: dict[str, float]) -> list[Row]:
    """The main results; times are left out, so that two runs with the same seed give the same table."""
    found = [_share("pass@1 after SFT", values, "pass_at_1.sft")]
    for name in rounds(values):
        words = name.replace("_", " ")
        found.append(_share(f"pass@1 after {words}", values, f"pass_at_1.{name}"))
        found.append(_change(f"change after {words}", values, f"change.{name}"))
    for mode, switch in SWITCH.items():
        found.append(_share(f"pass@1, thinking {switch}", values, f"modes.{mode}.pass_at_1"))
        found.append(_share(f"obeys, thinking {switch}", values, f"modes.{mode}.obeys"))
    n, names = best_of(values)
    found += [_share(f"best of {n} by {name}", values, f"best_of_{n}.{name}") for name in names]
    found.append(_share("packing utilisation", values, "packing.utilisation"))
    return [row for row in found if row is not None]


def sentence(values: dict[str, float]) -> str:
    """The run in one sentence."""
    start, evaluated = interval(values, "pass_at_1.sft"), rounds(values)
    last = interval(values, f"pass_at_1.{evaluated[-1]}") if evaluated else None
    count = values.get("pass_at_1.prompts")
    prompts = f" on {count:,.0f} held\u2011out prompts" if count else ""
    if start is None:
        return "No model has been evaluated yet."
    if last is None:
        return f"After SFT, pass@1{prompts} is {start.value:.1%}."
    change = interval(values, f"change.{evaluated[-1]}")
    many = WORDS.get(len(evaluated), f"{len(evaluated)} rounds")
    movement = f"from {start.value:.1%} to {last.value:.1%}"
    return f"{many} of online preference training {_verb(change)} pass@1 {movement}{prompts}."


def deck(values: dict[str, float], collected: Collected) -> str:
    """The sentences below the headline."""
    sentences = []
    evaluated = rounds(values)
    change = interval(values, f"change.{evaluated[-1]}") if evaluated else None
    if change is not None:
        ends = f" (95% interval {point_span(change)}, paired by prompt)" if is_number(change.low) else ""
        sentences.append(f"The change is {points(change.value)} points{ends}.")
    n, names = best_of(values)
    average = next((name for name in names if is_average(name)), None)
    if average is not None:
        best = values[f"best_of_{n}.{average}"]
        sentences.append(f"The best of {n} samples by the averaged reward model is right {best:.1%} of the time.")
    total = f" in {duration(values['seconds.total'])}" if "seconds.total" in values else ""
    sentences.append(f"{collected.finished}{total}.")
    return " ".join(sentences)


def tiles(values: dict[str, float]) -> list[Tile]:
    found = []
    evaluated = rounds(values)
    for name in ["sft", *evaluated]:
        estimate = interval(values, f"pass_at_1.{name}")
        if estimate is not None:
            words = "SFT" if name == "sft" else name.replace("_", " ")
            strong = name in evaluated[-1:]
            found.append(Tile(f"pass@1 after {words}", percent(estimate.value), _noted(span(estimate)), strong))
    change = interval(values, f"change.{evaluated[-1]}") if evaluated else None
    if change is not None:
        found.append(Tile("change, in points", points(change.value), _noted(point_span(change))))
    return found + _best_of_tiles(values) + _cost_tiles(values)


def _best_of_tiles(values: dict[str, float]) -> list[Tile]:
    n, names = best_of(values)
    average = next((name for name in names if is_average(name)), None)
    if average is None:
        return []
    singles = [values[f"best_of_{n}.{name}"] for name in names if is_single(name)]
    alone = f"single models {100 * min(singles):.1f} to {max(singles):.1%}" if singles else ""
    found = [Tile(f"best of {n}, averaged model", percent(values[f"best_of_{n}.{average}"]), alone)]
    oracle = values.get(f"best_of_{n}.oracle")
    if oracle is not None:
        found.append(Tile(f"best of {n}, oracle", percent(oracle), "what choosing could reach"))
    return found


def _cost_tiles(values: dict[str, float]) -> list[Tile]:
    found = []
    if "packing.utilisation" in values:
        found.append(Tile("packing utilisation", percent(values["packing.utilisation"]), "of all packs' capacity"))
    if "seconds.total" in values:
        found.append(Tile("total time", duration(values["seconds.total"]), "all stages"))
    return found


def _verb(change: Interval | None) -> str:
    if change is None or not is_number(change.low):
        return "moved"
    if change.low > 0:
        return "raised"
    return "lowered" if change.high < 0 else "moved, but not measurably,"


def _noted(words: str) -> str:
    """An interval, called by its name."""
    return f"95%: {words}" if words else "interval not known"


def _share(measure: str, values: dict[str, float], key: str) -> Row | None:
    estimate = interval(values, key)
    if estimate is None:
        return None
    return Row(measure, percent(estimate.value), span(estimate))


def _change(measure: str, values: dict[str, float], key: str) -> Row | None:
    change = interval(values, key)
    if change is None:
        return None
    return Row(measure, f"{points(change.value)} points", point_span(change))
