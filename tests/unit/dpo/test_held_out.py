"""Pairs that measure and do not train, and what a run's log comes to."""

import pytest
from datasets import Dataset

from alignment.errors import UserError
from alignment.ledger import Ledger
from dpo.held_out import figures, untrained_pairs


def pair(row: int, prompt: int, chosen: int, rejected: int = 9) -> dict[str, object]:
    return {
        "prompt_ids": [prompt], "chosen_ids": [chosen, 2], "rejected_ids": [rejected], "row": row, "pair_weight": 1.0,
    }  # fmt: skip


TRAINED = Dataset.from_list([pair(0, 1, 5), pair(1, 2, 6)])


def ledger(rows: int) -> Ledger:
    return Ledger(rows_in=rows, rows_out=rows, tokens_in=3 * rows, tokens_trained=3 * rows)


def test_a_pair_that_trains_is_dropped_and_counted_whatever_it_is_compared_with() -> None:
    counted = ledger(4)
    given = Dataset.from_list([pair(0, 1, 6), pair(1, 1, 5, rejected=8), pair(2, 2, 5), pair(3, 2, 6)])
    kept = untrained_pairs(given, counted, TRAINED)
    assert [(p["prompt_ids"], p["chosen_ids"], p["row"]) for p in kept] == [([1], [6, 2], 0), ([2], [5, 2], 1)]
    counted.check()
    assert (counted.rows_out, counted.dropped, counted.tokens_trained, counted.tokens_dropped) == (
        2, {"trained_on": 2}, 6, 6,
    )  # fmt: skip


def test_evaluation_on_training_pairs_alone_is_refused() -> None:
    with pytest.raises(UserError, match=r"evaluation: all of its 2 pairs are dropped: {'trained_on': 2}"):
        untrained_pairs(TRAINED, ledger(2), TRAINED)


def test_figures_are_of_the_last_step_and_of_the_first_and_last_evaluation() -> None:
    def line(step: int, accuracy: float, prefix: str = "") -> dict[str, float]:
        return {
            "step": step,
            f"{prefix}rewards/accuracies": accuracy,
            f"{prefix}loss": accuracy / 2,
            f"{prefix}kl": 0.1,
        }

    history = [line(0, 0.4, "eval_"), line(1, 0.5), line(2, 0.7), line(2, 0.6, "eval_")]
    assert figures(history) == {
        "alarms.both_fall": 0, "train.accuracy": 0.7, "train.kl": 0.1,
        "eval.before.accuracy": 0.4, "eval.before.loss": 0.2, "eval.before.kl": 0.1,
        "eval.after.accuracy": 0.6, "eval.after.loss": 0.3, "eval.after.kl": 0.1,
    }  # fmt: skip
    assert figures([]) == {"alarms.both_fall": 0}
