"""Falls, intervals and the choice, by hand."""

import math
from pathlib import Path
from xml.etree import ElementTree

import pytest

from alignment.stats import Interval, paired_interval
from sft.tradeoff import Measured, Point, as_metrics, conclusion, largest, table, trade_off, unsure
from sft.tradeoff_picture import draw


def measured(fast: list[float], deep: list[float], general: list[float]) -> Measured:
    rates = {"reasoning.fast": fast, "reasoning.deep": deep, "general.prompts": general}
    return {name: {f"p{i}": value for i, value in enumerate(values)} for name, values in rates.items()}


def point(share: float, **changes: tuple[float, float, float]) -> Point:
    intervals = {f"general.{name}": Interval(*ends) for name, ends in changes.items()}
    return Point(share, intervals, intervals)


REFERENCE = point(0, a=(0, 0, 0), b=(0, 0, 0))


def test_changes_are_paired_by_prompt_whatever_their_order() -> None:
    before, after = [1.0, 0.5, 0.0, 1.0], [0.5, 0.5, 0.25, 0.75]
    shuffled = measured([0] * 4, [1] * 4, after)
    shuffled = {name: dict(reversed(rates.items())) for name, rates in shuffled.items()}
    reference, other = trade_off({0.2: [shuffled], 0: [measured([0] * 4, [0] * 4, before)]})
    assert (reference.share, other.share) == (0, 0.2)
    assert reference.changes["general.prompts"] == Interval(0, 0, 0)
    assert other.changes["reasoning.deep"] == Interval(1, 1, 1)
    assert other.values["general.prompts"].value == 0.5
    expected = paired_interval(before, after)
    found = other.changes["general.prompts"]
    assert (found.value, found.low, found.high) == pytest.approx((expected.value, expected.low, expected.high))
    assert found.value == pytest.approx(-0.125)


def test_models_that_met_other_prompts_are_not_compared() -> None:
    with pytest.raises(AssertionError, match="other prompts"):
        trade_off({0: [measured([0], [0], [0])], 0.1: [measured([0], [0], [0, 1])]})


def test_the_largest_share_by_the_worse_end_and_by_the_estimate() -> None:
    """By the intervals .1: at .2 one measure's ends below -.01; at .3 one falls by the limit, which is not under it."""
    points = [
        REFERENCE,
        point(0.1, a=(-0.004, -0.009, 0.001), b=(0.01, -0.009, 0.03)),
        point(0.2, a=(-0.004, -0.009, 0.001), b=(-0.002, -0.011, 0.007)),
        point(0.3, a=(0.0, -0.002, 0.002), b=(-0.01, -0.01, -0.01)),
        point(0.4, a=(0.05, 0.04, 0.06), b=(-0.02, -0.03, -0.01)),
    ]
    assert largest(points, 0.01) == (0.1, 0.2)
    assert largest(points, 0.02) == (0.3, 0.3), "a gain elsewhere makes up for no fall"
    assert largest(points, 0.05) == (0.4, 0.4)
    assert as_metrics(points, 0.01)["share.by_interval"] == 0.1


def test_a_share_that_passes_beyond_one_that_does_not_counts() -> None:
    points = [point(0, a=(0, 0, 0)), point(0.1, a=(-0.02, -0.03, -0.01)), point(0.2, a=(0.0, -0.005, 0.005))]
    assert largest(points, 0.01) == (0.2, 0.2)
    lines = table(points, {0: {}, 0.1: {}, 0.2: {}}, 0.01).splitlines()
    assert lines[3:] == [
        "| 0.1 | -2.0% | -2.0 (-3.0 to -1.0) | no |",
        "| **0.2** | 0.0% | +0.0 (-0.5 to +0.5) | yes |",
    ]


def test_no_share_under_the_limit_leaves_zero() -> None:
    one = measured([0] * 2, [1] * 2, [1.0, 1.0])
    points = trade_off({0: [one], 0.1: [measured([0] * 2, [1] * 2, [0.5, 1.0])]})
    assert largest(points, 0.01) == (0, 0)
    first, second, *_ = conclusion(points, {0: [one]}, 0.01)
    assert first.startswith("Chosen: 0. There is no share of long answers at which no general measure falls by 1.0%")
    assert second == "By the estimates alone it is 0."


def test_a_single_prompt_has_no_interval_and_passes_nothing_by_it() -> None:
    points = trade_off({0: [measured([0], [0], [1])], 0.1: [measured([0], [0], [1])]})
    assert math.isnan(points[1].general[0].low)
    assert largest(points, 0.01) == (0, 0.1)


def test_a_measure_too_small_to_tell_says_how_many_prompts_would_do() -> None:
    """An interval of .03 to each side where .01 is the limit: nine times the prompts."""
    points = [REFERENCE, point(0.1, a=(0.0, -0.03, 0.03), b=(0.0, -0.01, 0.01))]
    assert unsure(points, 0.01) == {"general.a": pytest.approx(0.03)}
    prompts = {"general.a": dict.fromkeys("abcd", 1.0), "general.b": {}}
    expected = "general.a: its change is known to 3.0% only, the limit is 1.0%; "
    assert conclusion(points, {0: [prompts]}, 0.01)[2:] == [expected + "about 36 prompts would do."]
    assert conclusion(points, {0: [prompts] * 2}, 0.01)[2:] == [expected + "it takes more prompts or more seeds."]


def test_seeds_that_differ_widen_the_interval() -> None:
    """Two seeds that agree give the prompts' interval; where one gains what the other loses, both ends move out."""
    reference = [measured([0] * 4, [0] * 4, [0.5] * 4)] * 2
    gain, loss = (measured([0] * 4, [0] * 4, values) for values in ([0.5, 0.6, 0.7, 0.6], [0.5, 0.4, 0.3, 0.4]))
    agreed = trade_off({0: reference, 0.1: [gain, gain]})[1].general[0]
    torn = trade_off({0: reference, 0.1: [gain, loss]})[1].general[0]
    assert torn.value == pytest.approx(0) and torn.low < -0.5
    assert agreed.low == pytest.approx(paired_interval([0.5] * 4, [0.5, 0.6, 0.7, 0.6]).low, abs=1e-3)


def test_the_table_names_the_chosen_share() -> None:
    points = [
        REFERENCE,
        point(0.05, a=(-0.004, -0.009, 0.001), b=(0.01, -0.005, 0.03)),
        point(0.4, a=(-0.009, -0.02, 0.0), b=(0, 0, 0)),
    ]
    lines = table(points, {0: {"tokens": "0"}, 0.05: {"tokens": "9"}, 0.4: {"tokens": "80"}}, 0.01).splitlines()
    assert lines[0] == (
        "| long rows | tokens | general.a | general.b | general.a, change | general.b, change | fall under 1.0% |"
    )
    assert lines[2] == "| 0 | 0 | 0.0% | 0.0% |  |  | reference |"
    assert lines[3] == "| **0.05** | 9 | -0.4% | 1.0% | -0.4 (-0.9 to +0.1) | +1.0 (-0.5 to +3.0) | yes |"
    assert lines[4].endswith("| by the estimate alone |")


def test_the_picture_is_drawn_in_both_formats(tmp_path: Path) -> None:
    runs = {
        share: [measured([0.2, 0.4, 0.3], [0.2 + share, 0.5, 0.6], [0.9, 0.8, 0.9 - share])] for share in (0, 0.1, 0.4)
    }
    draw(trade_off(runs), 0.5, tmp_path / "trade_off")
    assert (tmp_path / "trade_off.png").read_bytes().startswith(b"\x89PNG")
    assert ElementTree.parse(tmp_path / "trade_off.svg").getroot().tag.endswith("svg")
