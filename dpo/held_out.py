"""Preference training measured on pairs that it does not see, before the first step and after the last."""

from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset

from alignment.errors import UserError
from alignment.ledger import Ledger
from dpo.alarm import both_fall

# What metrics.json calls each logged figure.
FIGURES = {
    "loss": "loss",
    "accuracy": "rewards/accuracies",
    "margin": "rewards/margins",
    "kl": "kl",
    "logratio_chosen": "logratio_per_token/chosen",
    "logratio_rejected": "logratio_per_token/rejected",
}
TRAINED_ON = "trained_on"  # why the ledger drops a pair


def untrained_pairs(pairs: Dataset, ledger: Ledger, trained: Dataset) -> Dataset:
    """`pairs` without those whose prompt and chosen completion are also in `trained`; the ledger counts these.

    Raises:
        UserError: none is left.
    """
    known = {_key(pair) for pair in trained}
    kept: list[dict[str, Any]] = []
    for pair in pairs.to_list():
        if _key(pair) not in known:
            kept.append(pair | {"row": len(kept)})
            continue
        tokens = len(pair["chosen_ids"]) + len(pair["rejected_ids"])
        ledger.rows_out -= 1
        ledger.tokens_trained -= tokens
        ledger.drop(TRAINED_ON, tokens)
    if not kept:
        raise UserError(f"evaluation: all of its {ledger.rows_in} pairs are dropped: {dict(ledger.dropped)}")
    return Dataset.from_list(kept, features=pairs.features)


def _key(pair: Mapping[str, Any]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tuple(pair["prompt_ids"]), tuple(pair["chosen_ids"])


def figures(history: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """What a run's log says at its end: `train.` of the last line, `eval.before.` and `eval.after.`, and the alarms."""
    trained = [line for line in history if "rewards/accuracies" in line]
    evaluated = [line for line in history if "eval_rewards/accuracies" in line]
    found: dict[str, float] = {"alarms.both_fall": both_fall(history)}
    if trained:
        found |= _named("train", trained[-1], "", skip=("loss",))  # train.loss is the mean over the run
    if evaluated:
        found |= _named("eval.before", evaluated[0], "eval_") | _named("eval.after", evaluated[-1], "eval_")
    return found


def _named(part: str, line: Mapping[str, float], prefix: str, skip: Sequence[str] = ()) -> dict[str, float]:
    return {
        f"{part}.{name}": line[prefix + key]
        for name, key in FIGURES.items()
        if name not in skip and prefix + key in line
    }
