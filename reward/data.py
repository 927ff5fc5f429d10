"""Preference rows to token ids, the same ids that a policy reads and samples."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from alignment import chat, models
from alignment.config import ModelConfig
from alignment.errors import UserError
from alignment.ledger import Ledger
from alignment.rows import Row, read_rows


@dataclass(frozen=True)
class Pair:
    """One prompt with a better and a worse answer, in token ids; answers end with the stop token."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    key: str  # the prompt's text, by which prompts are told apart


@dataclass(frozen=True)
class PreferenceData:
    """Pairs to train and to judge on, and the account of every row."""

    train: list[Pair]
    eval: list[Pair]
    train_ledger: Ledger
    eval_ledger: Ledger


def prepare(rows: str, eval_rows: str | None, model: ModelConfig, max_length: int) -> PreferenceData:
    """Read and tokenize both sets.

    Raises:
        UserError: a row against the schema, prompts that are in both sets, or nothing left to train on.
    """
    tokenizer = models.load_tokenizer(model)
    train_ledger, eval_ledger = Ledger(), Ledger()
    train = tokenize(read_rows(rows, "preference"), tokenizer, max_length, train_ledger)
    held_out = read_rows(eval_rows, "preference") if eval_rows is not None else ()
    judged = tokenize(held_out, tokenizer, max_length, eval_ledger)
    for source, pairs, ledger in ((rows, train, train_ledger), (eval_rows, judged, eval_ledger)):
        if source is not None and not pairs:
            raise UserError(f"{source}: no pair is left: {dict(ledger.dropped)}; max_length is {max_length}")
    shared = {pair.key for pair in train} & {pair.key for pair in judged}
    if shared:
        raise UserError(
            f"{eval_rows}: {len(shared)} of its prompts are also in {rows}, such as {min(shared)[:80]!r}\n"
            "a reward model is not judged on prompts it was trained on"
        )
    return PreferenceData(train, judged, train_ledger, eval_ledger)


def tokenize(rows: Iterable[Row], tokenizer: PreTrainedTokenizerBase, max_length: int, ledger: Ledger) -> list[Pair]:
    """Pairs of the rows; pairs that are too long, or whose answers are the same, are dropped and counted."""
    pairs = []
    for row in rows:
        ledger.rows_in += 1
        pair = _pair(row, tokenizer, f"row {row.get('id', ledger.rows_in)}")
        tokens = 2 * len(pair.prompt) + len(pair.chosen) + len(pair.rejected)
        ledger.tokens_in += tokens
        if len(pair.prompt) + max(len(pair.chosen), len(pair.rejected)) > max_length:
            ledger.drop("overlong", tokens)
        elif pair.chosen == pair.rejected:
            ledger.drop("identical answers", tokens)
        else:
            ledger.rows_out += 1
            ledger.tokens_trained += tokens
            pairs.append(pair)
    return pairs


def _pair(row: Row, tokenizer: PreTrainedTokenizerBase, name: str) -> Pair:
    return Pair(
        prompt=chat.render_prompt(tokenizer, row["prompt"]),
        chosen=chat.render_completion(tokenizer, _answer(row, "chosen", name)),
        rejected=chat.render_completion(tokenizer, _answer(row, "rejected", name)),
        key=prompt_key(row["prompt"]),
    )


def _answer(row: Row, column: str, name: str) -> str:
    messages = row[column]
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        raise UserError(f"{name}: {column!r} must be one message of the assistant's; earlier turns belong to 'prompt'")
    return str(messages[0]["content"])


def prompt_key(messages: chat.Messages) -> str:
    """A prompt's text, by which it counts as seen whatever its case and spacing."""
    text = " ".join(f"{message['role']}: {message['content']}" for message in messages)
    return " ".join(text.casefold().split())


def to_dataset(pairs: Sequence[Pair]) -> Dataset:
    """The columns that TRL's RewardTrainer takes as tokenized, and `length`, by which batches are grouped."""
    return Dataset.from_list(
        [
            {
                "chosen_ids": pair.prompt + pair.chosen,
                "rejected_ids": pair.prompt + pair.rejected,
                "length": len(pair.prompt) + max(len(pair.chosen), len(pair.rejected)),
            }
            for pair in pairs
        ]
    )
