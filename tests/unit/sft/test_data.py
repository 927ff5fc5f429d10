"""Packs as a data set: batches by hand, truncation, rows that are not those planned, epochs, and TRL's view of it."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch.utils.data import DataLoader

from alignment.errors import UserError
from alignment.packing import PackingPlan
from sft.cache import SourceRows, TokenizedRows
from sft.config import PackingConfig, SFTConfig
from sft.data import PackedRows, collate, plan_packs
from sft.loss import IGNORED
from sft.mixture import mix
from sft.rendering import SCHEMA

CAPACITY, PAD = 16, 99


def source(name: str, lengths: Sequence[int]) -> SourceRows:
    """Row r holds the tokens 10 r, 10 r + 1, ...; its first token is not trained, nor is any at an even place."""
    rows = [
        {"input_ids": [10 * row + at for at in range(length)], "trained": [at % 2 == 1 for at in range(length)],
         "length": length, "trained_tokens": length // 2, "reason": None, "place": f":{row + 1}", "id": None}
        for row, length in enumerate(lengths)
    ]  # fmt: skip
    return SourceRows(name, [pa.RecordBatch.from_pylist(rows, schema=SCHEMA)])


def tokenized(lengths: Sequence[int]) -> TokenizedRows:
    return TokenizedRows([source("rows.jsonl", lengths)])


def plan(packs: Sequence[Sequence[int]], lengths: Sequence[int], width: int, step: int = 1) -> PackingPlan:
    """Packs of these rows, all of one width."""
    held = [[lengths[row] for row in pack] for pack in packs]
    return PackingPlan(
        order=np.array([row for pack in packs for row in pack], dtype=np.int64),
        starts=np.cumsum([0, *(len(pack) for pack in packs)]),
        widths=np.full(len(packs), width),
        tokens=np.array([sum(pack) for pack in held]),
        attention=np.array([sum(length**2 for length in pack) for pack in held]),
        capacity=CAPACITY,
        packs_per_step=step,
    )


def packed(lengths: Sequence[int], packs: Sequence[Sequence[int]], width: int, limit: int | None = None) -> PackedRows:
    planned = [min(length, limit or length) for length in lengths]
    return PackedRows(tokenized(lengths), plan(packs, planned, width), limit, PAD)


def as_lists(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: value.tolist() if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


# a batch


def test_a_batch_by_hand() -> None:
    """Row 2 of four tokens, row 0 of three, and three of padding, which is a sample of its own."""
    batch = packed([3, 1, 4], [[2, 0], [1]], width=10)[0]
    assert as_lists(batch) == {
        "input_ids": [[20, 21, 22, 23, 0, 1, 2, PAD, PAD, PAD]],
        "attention_mask": [[1, 1, 1, 1, 1, 1, 1, 0, 0, 0]],
        "labels": [[IGNORED, 21, IGNORED, 23, IGNORED, 1, IGNORED, IGNORED, IGNORED, IGNORED]],
        "position_ids": [[0, 1, 2, 3, 0, 1, 2, 0, 1, 2]],
        "cu_seq_lens_q": [0, 4, 7, 10],
        "max_length_q": 4,
    }
    dtypes = {name: value.dtype for name, value in batch.items() if isinstance(value, torch.Tensor)}
    assert dtypes.pop("cu_seq_lens_q") == torch.int32, "as the kernels of variable-length attention want it"
    assert set(dtypes.values()) == {torch.int64}


def test_a_full_pack_has_no_padding() -> None:
    batch = packed([3, 4], [[0, 1]], width=7)[0]
    assert batch["cu_seq_lens_q"].tolist() == [0, 3, 7]
    assert batch["attention_mask"].tolist() == [[1] * 7]


def test_the_padding_may_be_the_longest_sample() -> None:
    assert packed([3], [[0]], width=10)[0]["max_length_q"] == 7


def test_a_filler_trains_nothing_and_counts_nothing() -> None:
    assert as_lists(packed([3], [[0], []], width=4)[1]) == {
        "input_ids": [[PAD] * 4],
        "attention_mask": [[0] * 4],
        "labels": [[IGNORED] * 4],
        "position_ids": [[0, 1, 2, 3]],
        "cu_seq_lens_q": [0, 4],
        "max_length_q": 4,
    }


def test_overlong_rows_give_their_first_tokens() -> None:
    batch = packed([7, 3], [[0, 1]], width=8, limit=5)[0]
    assert batch["input_ids"].tolist() == [[0, 1, 2, 3, 4, 10, 11, 12]]
    assert batch["labels"].tolist() == [[IGNORED, 1, IGNORED, 3, IGNORED, IGNORED, 11, IGNORED]]
    assert batch["cu_seq_lens_q"].tolist() == [0, 5, 8]


def test_what_reads_a_batch_may_write_into_it() -> None:
    """The rows are mapped read-only; a batch is a copy."""
    packs = packed([3], [[0]], width=3)
    packs[0]["input_ids"] += 1
    assert packs[0]["input_ids"].tolist() == [[0, 1, 2]]


# rows that are not those planned


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([3, 4], "the rows have changed since this run was planned: there are fewer of them"),
        ([3, 4, 6], "the rows have changed since this run was planned: their lengths are others"),
    ],
)
def test_rows_that_changed_since_the_plan(lengths: list[int], message: str) -> None:
    made = plan([[0, 1], [2]], [3, 4, 5], width=8)
    assert len(PackedRows(tokenized([3, 4, 5, 9]), made, None, PAD)) == 2, "rows behind those planned do not matter"
    with pytest.raises(UserError, match=message):
        PackedRows(tokenized(lengths), made, None, PAD)


def test_another_limit_than_the_plan_s_is_noticed() -> None:
    with pytest.raises(UserError, match="their lengths are others"):
        PackedRows(tokenized([7]), plan([[0]], [5], width=8), None, PAD)


# epochs


def epochs_of(epochs: int, seed: int = 0, sources: Sequence[dict[str, Any]] = ({},)) -> list[Counter[int]]:
    """How often each epoch holds each row; each epoch's packs fill whole steps of four."""
    made, there = planned(epochs, seed, sources)
    per_epoch = len(made.order) // epochs
    boundaries = np.searchsorted(made.starts, np.arange(1, epochs) * per_epoch)
    assert np.array_equal(made.starts[boundaries], np.arange(1, epochs) * per_epoch), "a pack crosses into an epoch"
    assert not (boundaries % 4).any(), "an epoch ends with a whole step"
    assert int(made.tokens.sum()) == int(there.lengths[made.order].sum())
    return [Counter(part.tolist()) for part in np.split(made.order, epochs)]


def planned(epochs: int, seed: int, sources: Sequence[dict[str, Any]] = ({},)) -> tuple[PackingPlan, TokenizedRows]:
    """A plan of steps of four packs; each source has 40 rows of 3 to 12 tokens."""
    lengths = np.random.default_rng(0).integers(3, 13, 40).tolist()
    there = TokenizedRows([source(f"{number}.jsonl", lengths) for number in range(len(sources))])
    run = SFTConfig.model_validate(
        {
            "output_dir": "out",
            "model": {"preset": "compass-tiny", "tokenizer": "tokenizer"},
            "sources": [{"rows": f"{number}.jsonl", **source} for number, source in enumerate(sources)],
            "packing": {"capacity": CAPACITY},
            "training": {"learning_rate": 1.0, "epochs": epochs},
            "seed": seed,
        }
    )
    return plan_packs(mix(run, there), run.packing, 4, seed), there


def test_every_epoch_holds_every_row_once() -> None:
    assert epochs_of(3) == [Counter(range(40))] * 3


def test_a_source_that_repeats_stands_in_an_epoch_that_often() -> None:
    """Rows 0 to 39 twice, and 40 to 79 once."""
    twice = Counter({row: 2 if row < 40 else 1 for row in range(80)})
    assert epochs_of(2, sources=({"epochs": 2}, {})) == [twice] * 2


def test_the_order_is_another_in_every_epoch_and_follows_the_seed() -> None:
    first, _ = planned(2, seed=0)
    again, _ = planned(2, seed=0)
    other, _ = planned(2, seed=1)
    assert np.array_equal(first.order, again.order) and np.array_equal(first.starts, again.starts)
    assert not np.array_equal(first.order, other.order)
    assert not np.array_equal(first.order[:40], first.order[40:])
    first_steps, second_steps = np.split(first.tokens, 2)
    assert sorted(first_steps) == sorted(second_steps) and first_steps.tolist() != second_steps.tolist()
    one, _ = planned(1, seed=0)
    assert np.array_equal(one.order, first.order[:40]), "an epoch does not depend on those that follow"


def test_packs_of_a_plan_hold_the_rows_of_their_mixture() -> None:
    """From the rows through mixture, plan and batch: every token comes out once, each beside its own label."""
    made, there = planned(1, seed=0)
    packs = PackedRows(there, made, PackingConfig().limit, pad_id=-1)
    tokens: Counter[int] = Counter()
    for number in range(len(packs)):
        batch = packs[number]
        ids, labels = batch["input_ids"][0], batch["labels"][0]
        assert len(ids) == made.widths[number]
        assert torch.equal(labels[labels != IGNORED], ids[labels != IGNORED])
        tokens.update(ids[batch["attention_mask"][0].bool()].tolist())
    assert tokens == Counter(there.take(range(40))[0].tolist())


# TRL's view


def test_a_loader_reads_packs_in_the_order_of_the_plan() -> None:
    packs = packed([3, 4, 2], [[2], [0, 1], []], width=8)
    table = packs.as_dataset()
    assert len(table) == 3
    batches = list(DataLoader(table, batch_size=1, collate_fn=collate))
    assert [as_lists(batch) for batch in batches] == [as_lists(packs[number]) for number in range(3)]


def test_a_rank_trains_on_one_pack_at_a_time() -> None:
    packs = packed([3, 4], [[0], [1]], width=4)
    with pytest.raises(ValueError, match="one pack at a time, got 2"):
        collate([packs.as_dataset()[0], packs.as_dataset()[1]])
