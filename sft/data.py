"""Rows to packed samples: mixture, rendering, masks, the plan of packs, and the collator."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from alignment import chat
from alignment.errors import UserError
from alignment.ledger import Ledger
from alignment.packing import PackingPlan, plan_epoch
from alignment.rows import Row, read_rows
from sft.config import PackingConfig, SourceConfig

IGNORED = -100  # the label of a token that carries no loss


@dataclass(frozen=True)
class Sample:
    """One conversation: its tokens and, beside each, its label."""

    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class PackedData:
    """Packs of all epochs in training order, and the account of every row and token."""

    dataset: Dataset
    ledger: Ledger
    utilisation: float
    steps: int


def mixture(sources: Sequence[SourceConfig], seed: int) -> Iterator[Row]:
    """Rows of every source; a source with a count is drawn without replacement, in its order, by the seed."""
    for number, source in enumerate(sources):
        rows = list(read_rows(source.rows, "messages"))
        if source.count is None:
            yield from rows
            continue
        if source.count > len(rows):
            raise UserError(f"sources[{number}].count: {source.count} rows wanted, but {source.rows} holds {len(rows)}")
        chosen = random.Random(f"{seed}/{number}").sample(range(len(rows)), source.count)
        yield from (rows[index] for index in sorted(chosen))


def tokenize(
    rows: Iterator[Row], tokenizer: PreTrainedTokenizerBase, packing: PackingConfig, ledger: Ledger
) -> list[Sample]:
    """Render rows and label what the assistant wrote. Overlong rows and rows that train nothing are counted.

    Raises:
        UserError: an overlong row where those are errors, or no row is left.
    """
    samples: list[Sample] = []
    for row in rows:
        rendered = chat.render(tokenizer, row["messages"])
        length = len(rendered.input_ids)
        ledger.rows_in += 1
        ledger.tokens_in += length
        if length > packing.capacity:
            if packing.overlong == "error":
                name = row.get("id", ledger.rows_in)
                raise UserError(f"row {name}: {length} tokens, packing.capacity is {packing.capacity}")
            ledger.drop("overlong", length)
        elif not any(rendered.assistant_mask[1:]):
            ledger.drop("nothing to train", length)
        else:
            samples.append(_label(rendered))
            ledger.rows_out += 1
            ledger.tokens_trained += sum(rendered.assistant_mask[1:])
    if not samples:
        raise UserError(f"no row is left to train on: of {ledger.rows_in}, dropped {dict(ledger.dropped)}")
    return samples


def _label(rendered: chat.Rendered) -> Sample:
    labels = [t if kept else IGNORED for t, kept in zip(rendered.input_ids, rendered.assistant_mask, strict=True)]
    labels[0] = IGNORED  # nothing precedes it: in a pack its predictor would be another sample's last token
    return Sample(rendered.input_ids, labels)


def pack_epochs(
    samples: Sequence[Sample], capacity: int, packs_per_step: int, epochs: int, seed: int, pad_id: int
) -> tuple[Dataset, float]:
    """Packs of every epoch in training order, and the utilisation of their capacity."""
    lengths = [len(sample.input_ids) for sample in samples]
    plans = [plan_epoch(lengths, capacity, packs_per_step, random.Random(f"{seed}/{epoch}")) for epoch in range(epochs)]
    packs = [_pack([samples[i] for i in pack], pad_id) for plan in plans for pack in plan.packs]
    return Dataset.from_list(packs), _utilisation(plans)


def _utilisation(plans: Sequence[PackingPlan]) -> float:
    return sum(plan.tokens for plan in plans) / sum(len(plan.packs) * plan.capacity for plan in plans)


def _pack(samples: Sequence[Sample], pad_id: int) -> dict[str, list[int]]:
    """One pack; without samples a filler: one pad token without a label."""
    members = samples or [Sample([pad_id], [IGNORED])]
    return {
        "input_ids": [token for sample in members for token in sample.input_ids],
        "labels": [label for sample in members for label in sample.labels],
        "lengths": [len(sample.input_ids) for sample in members],
    }


def collate(packs: list[dict[str, list[int]]]) -> dict[str, Any]:
    """One pack to the model's inputs: a row of tokens, positions that restart, and the ends of the samples.

    The mask says what counts as a token; attention goes by the ends. A filler's one token does not count.
    """
    if len(packs) != 1:
        raise ValueError(f"a rank trains on one pack at a time, got {len(packs)}")
    pack = packs[0]
    lengths = pack["lengths"]
    return {
        "input_ids": torch.tensor([pack["input_ids"]]),
        "attention_mask": torch.full((1, len(pack["input_ids"])), int(any(t != IGNORED for t in pack["labels"]))),
        "labels": torch.tensor([pack["labels"]]),
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "cu_seq_lens_q": torch.tensor([0, *lengths]).cumsum(0),
    }
