"""Rows of a better and one or more worse answers: read, checked and counted."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from alignment import chat
from alignment.errors import UserError, did_you_mean
from alignment.ledger import Ledger
from alignment.rows import Row, check_row, located_rows
from reward.config import PairwiseConfig
from reward.rendering import prompt_key

WITHOUT_CATEGORY = "all"


@dataclass(frozen=True)
class Comparison:
    """One prompt with the answer to prefer and those not to; `row` is as it was read, and `where` names its place."""

    where: str
    prompt: chat.Messages
    chosen: str
    rejected: list[str]
    category: str
    subset: str
    row: Row

    @property
    def key(self) -> str:
        """The prompt's text: rows of one prompt are not independent."""
        return prompt_key(self.prompt)


def read_comparisons(config: PairwiseConfig, ledger: Ledger) -> list[Comparison]:
    """Prompts and answers are conversations, or texts. What cannot be judged is counted in `ledger`.

    Raises:
        UserError: a row against this, or a subset that `categories` does not name.
    """
    category_of = {subset: category for category, subsets in config.categories.items() for subset in subsets}
    found = []
    for where, row in located_rows(config.rows):
        ledger.rows_in += 1
        comparison, reason = comparison_of(row, where, category_of)
        if reason is None:
            ledger.rows_out += 1
            found.append(comparison)
        else:
            ledger.drop(reason)
    return found


def comparison_of(row: Row, where: str, category_of: dict[str, str]) -> tuple[Comparison, str | None]:
    """A row's comparison, and why it cannot be judged, if so."""
    prompt = [{"role": "user", "content": row["prompt"]}] if isinstance(row.get("prompt"), str) else row.get("prompt")
    check_row(row if prompt is None else row | {"prompt": prompt}, "prompt", where)
    assert prompt is not None
    chosen, rejected = _answers(row, "chosen", where), _answers(row, "rejected", where)
    subset = str(row.get("subset") or "")
    category = str(row.get("category") or WITHOUT_CATEGORY)
    if category_of:
        if subset not in category_of:
            raise UserError(f"{where}: categories names no subset {subset!r}{did_you_mean(subset, category_of)}")
        category = category_of[subset]
    comparison = Comparison(where, prompt, chosen[0], rejected, category, subset, row)
    if len(chosen) > 1:
        return comparison, "several chosen answers"
    return comparison, "identical answers" if chosen[0] in rejected else None


def _answers(row: Row, column: str, where: str) -> list[str]:
    """One answer, a text or a conversation's last turn, or a list of such."""
    value = row.get(column)
    several = value if isinstance(value, list) and not all(isinstance(part, dict) for part in value) else [value]
    if value is None or value == []:
        raise UserError(f"{where}: expected an answer, or a list of them, in {column!r}{did_you_mean(column, row)}")
    return [_text(answer, column, where) for answer in several]


def _text(answer: Any, column: str, where: str) -> str:
    match answer:
        case str():
            return answer
        case [{"role": "assistant", "content": str(text), **others}] if not others.get("tool_calls"):
            return text
    raise UserError(
        f"{where}: {column!r} must be a text or one message of the assistant's (earlier turns belong to 'prompt'), "
        "or a list of such answers"
    )


def credit(chosen: float, rejected: Sequence[float]) -> float:
    """1 where the chosen answer scores highest, 0 where a rejected one does, and its share where they tie.

    A tie is half right with one rejected answer, a third with two: what a pick among the equal ones at random gives.
    RewardBench counts a tie as wrong; how many there are is in the metrics.
    """
    if max(rejected) > chosen:
        return 0.0
    return 1 / (1 + sum(score == chosen for score in rejected))
