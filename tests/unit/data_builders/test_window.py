"""Pass rates and their window, by hand."""

import pytest

from alignment.ledger import Ledger
from data_builders.window import Account, Outside, judge_rate

C, W, N, T, E = "correct", "wrong", "no_answer", "timeout", "error"


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [
        ([C, W, W, W], 0.25),  # both ends belong to the window
        ([C, C, C, W], 0.75),
        ([C, C, W, N], 0.5),  # what gives no answer did not pass
        ([C, C, C, C], Outside("too easy")),
        ([W, W, W, W], Outside("too hard")),
        ([W, N, N, N], Outside("too hard")),
        ([N, N, N, N], Outside("no rollout has an answer")),
        ([C, "bad_gold", W, W], Outside("bad gold")),
        # One of four is unknown: 2/4 to 3/4 lie inside, and of the three that are known two are correct.
        ([C, C, W, T], 2 / 3),
        ([C, W, W, E], 1 / 3),
        ([C, C, C, T], Outside("timeout")),  # 3/4 or 4/4
        ([W, W, W, E], Outside("error")),  # 0/4 or 1/4
        ([W, W, T, E], Outside("timeout")),
        ([T, T, T, T], Outside("timeout")),
        ([C, C, C, C, C, C, C, T], Outside("too easy")),  # 7/8 at least
        ([W, W, W, W, W, W, W, T], Outside("too hard")),  # 1/8 at most
    ],
)
def test_only_wrong_is_wrong(verdicts: list[str], expected: float | Outside) -> None:
    assert judge_rate(verdicts, 0.25, 0.75) == expected


def test_an_open_window_keeps_what_is_known() -> None:
    assert judge_rate([N, N], 0, 1) == 0
    assert judge_rate([C, C], 0, 1) == 1
    assert judge_rate([T, T], 0, 1) == Outside("timeout")
    assert judge_rate([C, *[W] * 9], 0.1, 0.9) == 0.1, "a rate and a limit that are written alike are equal"


def test_an_account_is_the_same_from_disk(tmp_path) -> None:
    account = Account(Ledger(rows_in=3, rows_out=2), metrics={"samples": 12})
    account.ledger.drop("too easy")
    account.rates.update(["10", "2", "2"])
    account.write(tmp_path / "account.json")
    assert Account.read(tmp_path / "account.json") == account
    found = Account.read(tmp_path / "account.json").as_metrics()
    assert found == {
        "queries": 3,
        "queries.in_window": 2,
        "queries.correct_2": 2,
        "queries.correct_10": 1,
        "rollouts.samples": 12,
    }
    assert list(found)[2:4] == ["queries.correct_2", "queries.correct_10"], "in the order of numbers"
