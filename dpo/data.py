"""Preference rows as token ids, and batches of them.

A tokenized pair has `prompt_ids`, `chosen_ids`, `rejected_ids`, its place `row` in the set, and `pair_weight`, 1.
Fillers (`row` -1, `pair_weight` 0) complete the last global batch, so that every rank runs the same number of forwards
and no pair is repeated or dropped.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from torch import Tensor
from torch.utils.data import Sampler
from transformers import PreTrainedTokenizerBase

from alignment import chat
from alignment.errors import UserError
from alignment.ledger import Ledger

SIDES = ("chosen", "rejected")
COLUMNS = ["prompt_ids", "chosen_ids", "rejected_ids", "row", "pair_weight"]


def tokenize_pairs(
    rows: Iterable[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[Dataset, Ledger]:
    """Render and tokenize preference rows (`prompt`, `chosen`, `rejected`: lists of messages).

    A row with `token_ids` [chosen, rejected] trains on these, as they were sampled, where its `tokenizer` is this one
    (alignment.chat.tokenizer_hash); of another one's, the text is tokenized anew, and the ledger counts it under
    `retokenized`. Text is tokenized apart from its prompt, as an engine sees it when it samples, and ends with the
    end-of-turn token. A row is dropped where prompt and longer completion exceed `max_length`: cut, a completion would
    teach not to stop. The ledger counts completion tokens, of both sides.

    Raises:
        UserError: a completion that is not one assistant message, token ids that are not those of its text, or no row
            left.
    """
    ledger = Ledger()
    own = chat.tokenizer_hash(tokenizer)
    pairs: list[dict[str, Any]] = []
    for row in rows:
        ledger.rows_in += 1
        prompt_ids = chat.render_prompt(tokenizer, list(row["prompt"]))
        sides = _sampled_ids(tokenizer, row) if row.get("tokenizer") == own else None
        ledger.retokenized += sides is None and row.get("token_ids") is not None
        sides = sides or [_completion_ids(tokenizer, row, side) for side in SIDES]
        tokens = sum(map(len, sides))
        ledger.tokens_in += tokens
        if len(prompt_ids) + max(map(len, sides)) > max_length:
            ledger.drop("too_long", tokens)
            continue
        ledger.tokens_trained += tokens
        pairs.append(
            {
                "prompt_ids": prompt_ids,
                "chosen_ids": sides[0],
                "rejected_ids": sides[1],
                "row": ledger.rows_out,
                "pair_weight": 1.0,
            }
        )
        ledger.rows_out += 1
    if not pairs:
        raise UserError(f"no preference pair left of {ledger.rows_in} rows; dropped: {dict(ledger.dropped)}")
    return Dataset.from_list(pairs), ledger


def _sampled_ids(tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any]) -> list[list[int]] | None:
    """The token ids that the row brings along, which end in the stop token and have its text; None: it has none."""
    if row.get("token_ids") is None:
        return None
    sides = [[int(token) for token in ids] for ids in row["token_ids"]]
    texts = tokenizer.batch_decode([ids[:-1] for ids in sides], clean_up_tokenization_spaces=False)
    ends = [ids[-1:] for ids in sides]
    if texts != [_text(row, side) for side in SIDES] or ends != [[chat.stop_token_id(tokenizer)]] * 2:
        raise UserError(
            f"row {row.get('id', '?')}: 'token_ids' are not those of its texts; leave them out where texts were changed"
        )
    return sides


def _completion_ids(tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any], side: str) -> list[int]:
    return chat.render_completion(tokenizer, _text(row, side))


def _text(row: Mapping[str, Any], side: str) -> str:
    messages = row[side]
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        roles = [message["role"] for message in messages]
        raise UserError(f"row {row.get('id', '?')}: {side!r} must be one assistant message, its roles are {roles}")
    return str(messages[0]["content"])


def filler_pair(token_id: int) -> dict[str, Any]:
    """The smallest pair that a model can run, with weight 0."""
    ids = [token_id]
    return {"prompt_ids": ids, "chosen_ids": ids, "rejected_ids": ids, "row": -1, "pair_weight": 0.0}


def fill(pairs: Dataset, multiple: int, token_id: int) -> Dataset:
    """`pairs` with fillers behind it, up to a multiple of the global batch."""
    missing = -len(pairs) % multiple
    if missing == 0:
        return pairs
    fillers = Dataset.from_list([filler_pair(token_id)] * missing, features=pairs.features)
    return concatenate_datasets([pairs, fillers])


class ShuffledFillersLast(Sampler[int]):
    """Real pairs in an order drawn from seed and epoch, the same on every rank; then the fillers."""

    def __init__(self, real: int, total: int, seed: int, epoch: Callable[[], int]):
        self.real, self.total, self.seed, self.epoch = real, total, seed, epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch())
        yield from torch.randperm(self.real, generator=generator).tolist()
        yield from range(self.real, self.total)

    def __len__(self) -> int:
        return self.total


@dataclass(frozen=True)
class PairCollator:
    """Pairs to rows [all chosen; all rejected], right-padded to the longest.

    Returns `input_ids`, `attention_mask`, `completion_mask` [2B, T], `pair_weight` [B], `row` [B], and
    `completion_start`, the first column that holds a completion token.
    """

    pad_token_id: int

    def __call__(self, pairs: list[dict[str, Any]]) -> dict[str, Tensor | int]:
        sides = [(pair["prompt_ids"], pair[key]) for key in ("chosen_ids", "rejected_ids") for pair in pairs]
        width = max(len(prompt) + len(completion) for prompt, completion in sides)
        input_ids = torch.full((len(sides), width), self.pad_token_id)
        attention_mask = torch.zeros_like(input_ids)
        completion_mask = torch.zeros_like(input_ids, dtype=torch.bool)
        for i, (prompt, completion) in enumerate(sides):
            end = len(prompt) + len(completion)
            input_ids[i, :end] = torch.tensor([*prompt, *completion])
            attention_mask[i, :end] = 1
            completion_mask[i, len(prompt) : end] = True
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "completion_mask": completion_mask,
            "pair_weight": torch.tensor([pair["pair_weight"] for pair in pairs]),
            "row": torch.tensor([pair["row"] for pair in pairs]),
            "completion_start": min(len(prompt) for prompt, _ in sides),
        }
