"""The gate by hand: every old group within the limit for sure, and the new rows better for sure."""

import numpy as np
import pytest

from sft.gate import judge

OLD = np.full(40, 1.0)
GROUPS = ["a"] * 20 + ["b"] * 20
NOISE = np.resize([0.01, -0.01], 40)
BETTER = (np.full(20, 2.0), 1.5 + NOISE[:20])


def test_within_the_limit_is_accepted() -> None:
    found = judge(BETTER, (OLD, OLD + 0.03 + NOISE), GROUPS, 0.05)
    assert found.accepted and found.old["a"].rise.value == pytest.approx(0.03) and found.new.rise.high < -0.49


def test_one_group_beyond_the_limit_is_enough() -> None:
    """On average the loss falls by 0.1: the mean of all groups hides what the second loses."""
    change = np.array([-0.3] * 20 + [0.1] * 20)
    found = judge(BETTER, (OLD, OLD + change + NOISE), GROUPS, 0.05)
    assert [line.partition(":")[0] for line in found.refusals] == ["b"] and "limit 0.05" in found.refusals[0]


def test_what_few_rows_cannot_show_is_refused() -> None:
    """Mean 0.03 again, but spread so widely that its interval ends above the limit."""
    found = judge(BETTER, (OLD, OLD + 0.03 + 20 * NOISE), GROUPS, 0.05)
    assert len(found.refusals) == 2 and found.old["a"].rise.value == pytest.approx(0.03)
    one = judge(BETTER, (OLD[:1], OLD[:1]), ["a"], 0.05)
    assert not one.accepted, "a single row has no interval"


def test_an_update_that_does_not_help_is_refused() -> None:
    same = judge((BETTER[0], BETTER[0] + NOISE[:20]), (OLD, OLD), GROUPS, 0.05)
    assert [line.partition(":")[0] for line in same.refusals] == ["new rows"]
