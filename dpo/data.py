"""Preference rows as token ids, and batches of them.

A tokenized pair has `prompt_ids`, `chosen_ids`, `rejected_ids`, the row's `id` (its number where it has none), its
place `row` in the set, and `pair_weight`, 1.
Fillers (`row` -1, `pair_weight` 0) complete the last global batch, so that every rank runs the same number of forwards
and no pair is repeated or dropped.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

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
        prompt_ids = chat.render_prompt(tokenizer, list(row["prompt"]), **chat.template_options(row))
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
                "id": str(row.get("id", ledger.rows_in)),
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
    filler = {"id": None} | filler_pair(token_id)
    fillers = Dataset.from_list([{name: filler[name] for name in pairs.features}] * missing, features=pairs.features)
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


@dataclass
class PairCollator:
    """Pairs to sequences [all chosen; all rejected], packed in one row, or right-padded to the longest.

    Returns the rows (`packed_row`; padded, `input_ids` and `attention_mask` [2B, T]) and, either way:
    `predictors` and `targets` [n]: for every completion token, in order, the place of the token before it in the
    flattened rows, and its id; `completion_mask` [2B, S]: the completions alone, from column 0 on; `pair_weight` [B];
    `row` [B]; and `routed`, of the shape of `input_ids`: the tokens of pairs with a weight, which routers count.

    Raises:
        ValueError: a pair without a prompt, whose first completion token nothing predicts.
    """

    pad_token_id: int
    packed: bool = False

    def __call__(self, pairs: list[dict[str, Any]]) -> dict[str, Tensor | int]:
        if promptless := [pair["row"] for pair in pairs if not pair["prompt_ids"]]:
            raise ValueError(f"pairs {promptless}: no prompt token, expected at least one")
        prompts = [pair["prompt_ids"] for pair in pairs] * 2
        answers = [pair[key] for key in ("chosen_ids", "rejected_ids") for pair in pairs]
        rows = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
        lengths = torch.tensor([len(row) for row in rows])
        inputs = packed_row(rows) if self.packed else padded_rows(rows, self.pad_token_id)
        width = int(lengths.max())
        starts = lengths.cumsum(0) - lengths if self.packed else torch.arange(len(rows)) * width
        before = torch.tensor([len(prompt) - 1 for prompt in prompts])
        tokens = torch.tensor([len(answer) for answer in answers])
        column_S = torch.arange(int(tokens.max()))
        mask_NS = column_S < tokens[:, None]
        weight = torch.tensor([pair["pair_weight"] for pair in pairs])
        counts = weight.bool().repeat(2)
        mask = cast(Tensor, inputs["attention_mask"]).bool()
        return inputs | {
            "predictors": ((starts + before)[:, None] + column_S)[mask_NS],
            "targets": torch.tensor([token for answer in answers for token in answer], dtype=torch.long),
            "completion_mask": mask_NS,
            "pair_weight": weight,
            "row": torch.tensor([pair["row"] for pair in pairs]),
            "routed": counts.repeat_interleave(lengths)[None] if self.packed else mask & counts[:, None],
        }


def packed_row(sequences: list[list[int]]) -> dict[str, Tensor | int]:
    """One row of all sequences for segment attention: [1, T] each, and `cu_seq_lens_q`, their ends from 0 on."""
    lengths = [len(ids) for ids in sequences]
    ids = torch.tensor([token for ids in sequences for token in ids])[None]
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),  # all count; attention itself goes by the ends
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "cu_seq_lens_q": torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32),
        "max_length_q": max(lengths),
    }


def padded_rows(sequences: list[list[int]], pad_token_id: int) -> dict[str, Tensor | int]:
    """Sequences padded on the right to the longest, and what counts: [N, T] each."""
    width = max(map(len, sequences))
    return {
        "input_ids": torch.tensor([ids + [pad_token_id] * (width - len(ids)) for ids in sequences]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in sequences]),
    }
