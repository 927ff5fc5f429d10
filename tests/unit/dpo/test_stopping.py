"""When rounds end, and which one is kept; number 0 is the starting policy."""

import pytest

from dpo.config import StopConfig
from dpo.stopping import Decision, decide


@pytest.mark.parametrize(
    ("pass_rates", "expected"),
    [
        ([0.2, 0.3], Decision(None, 1, 0)),
        ([0.2, 0.3, 0.3], Decision(None, 1, 1)),  # no gain: equals go to the earlier
        ([0.2, 0.3, 0.1, 0.29], Decision("patience", 1, 2)),
        ([0.2, 0.1], Decision(None, 0, 1)),
        ([0.2, 0.1, 0.15], Decision("patience", 0, 2)),  # every round was worse: the starting policy is kept
        ([0.2, 0.3, 0.1, 0.31], Decision(None, 3, 0)),
    ],
)
def test_patience(pass_rates: list[float], expected: Decision) -> None:
    assert decide(pass_rates, [0.0] * len(pass_rates), StopConfig(patience=2)) == expected


def test_without_a_rule_nothing_stops_and_the_last_round_is_kept() -> None:
    assert decide([0.5, 0.1, 0.2], [0.0, 99.0, 99.0], StopConfig()) == Decision(None, 2, 2)


def test_a_round_beyond_the_limit_on_kl_stops_and_is_not_kept() -> None:
    limit = StopConfig(kl=3.0)
    assert decide([0.2, 0.3], [0.0, 3.0], limit) == Decision(None, 1, 0)
    assert decide([0.2, 0.3, 0.9], [0.0, 1.0, 3.1], limit) == Decision("kl", 1, 1)
    assert decide([0.2, 0.9], [0.0, 3.1], limit) == Decision("kl", 0, 1)
    assert decide([0.2, 0.3, 0.9], [0.0, -0.1, 2.0], StopConfig(kl=3.0, patience=1)) == Decision(None, 2, 0)
    assert decide([0.2, 0.3, 0.9], [0.0, 1.0, 3.1], StopConfig(kl=3.0, patience=1)) == Decision("kl", 1, 1)
