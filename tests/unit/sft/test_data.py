"""Rows to packs: mixture, labels, the ledger, and what becomes of rows that do not fit."""

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from alignment.errors import UserError
from alignment.ledger import Ledger
from alignment.rows import Row, write_rows
from sft.config import PackingConfig, SourceConfig
from sft.data import IGNORED, Sample, collate, mixture, pack_epochs, tokenize


def row(name: str, question: str, answer: str) -> Row:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"id": name, "messages": messages}


def source(folder: Path, name: str, rows: int, count: int | None = None) -> SourceConfig:
    write_rows(folder / f"{name}.jsonl", (row(f"{name}{i}", "?", "!") for i in range(rows)))
    return SourceConfig(rows=str(folder / f"{name}.jsonl"), count=count)


# mixture


def test_a_count_draws_that_many_different_rows_by_the_seed(tmp_path: Path) -> None:
    sources = [source(tmp_path, "a", 3), source(tmp_path, "b", 50, count=20)]
    names = [r["id"] for r in mixture(sources, seed=0)]
    assert names[:3] == ["a0", "a1", "a2"]
    drawn = [int(name.removeprefix("b")) for name in names[3:]]
    assert len(set(drawn)) == 20 and drawn == sorted(drawn)
    assert [r["id"] for r in mixture(sources, seed=0)] == names
    assert [r["id"] for r in mixture(sources, seed=1)] != names


def test_two_sources_with_counts_are_drawn_apart(tmp_path: Path) -> None:
    sources = [source(tmp_path, "a", 50, count=20), source(tmp_path, "b", 50, count=20)]
    names = [r["id"] for r in mixture(sources, seed=0)]
    assert [n[1:] for n in names[:20]] != [n[1:] for n in names[20:]]


def test_more_rows_than_a_source_holds(tmp_path: Path) -> None:
    sources = [source(tmp_path, "a", 3), source(tmp_path, "b", 5, count=6)]
    with pytest.raises(UserError, match=r"sources\[1\].count: 6 rows wanted, but .*b.jsonl holds 5"):
        list(mixture(sources, seed=0))


# labels and the ledger


def test_only_what_the_assistant_wrote_is_trained(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [
        {"role": "user", "content": "3 x 15?"},
        {"role": "assistant", "content": "45"},
        {"role": "user", "content": "12.5?"},
        {"role": "assistant", "content": "so 12.5"},
    ]
    (sample,) = tokenize(iter([{"messages": messages}]), tiny_tokenizer, PackingConfig(), Ledger())
    trained = [token for token in sample.labels if token != IGNORED]
    assert tiny_tokenizer.decode(trained) == "45<|im_end|>so 12.5<|im_end|>"
    assert all(label in (IGNORED, token) for token, label in zip(sample.input_ids, sample.labels, strict=True))
    assert tiny_tokenizer.decode(sample.input_ids).startswith("<|im_start|>user\n3 x 15?<|im_end|>")


def test_ledger_accounts_for_every_row_and_token(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [
        row("kept", "3 shirts?", "45"),
        row("long", "3 shirts? " * 40, "45"),
        {"id": "question only", "messages": [{"role": "user", "content": "3 shirts?"}]},
        row("kept too", "a", "b"),
    ]
    ledger = Ledger()
    samples = tokenize(iter(rows), tiny_tokenizer, PackingConfig(capacity=64), ledger)
    assert (ledger.rows_in, ledger.rows_out) == (4, 2) == (4, len(samples))
    assert ledger.dropped == Counter({"overlong": 1, "nothing to train": 1})
    kept = sum(len(sample.input_ids) for sample in samples)
    assert ledger.tokens_in == kept + ledger.tokens_dropped
    assert ledger.tokens_trained == sum(label != IGNORED for sample in samples for label in sample.labels)
    ledger.check()


def test_the_longest_row_that_fits_is_kept(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [row("a", "3 shirts cost how much?", "45 or so, all in all")]
    (sample,) = tokenize(iter(rows), tiny_tokenizer, PackingConfig(), Ledger())
    length = len(sample.input_ids)
    assert length > 16, "the smallest capacity"
    assert len(tokenize(iter(rows), tiny_tokenizer, PackingConfig(capacity=length), Ledger())) == 1
    with pytest.raises(UserError, match=r"no row is left to train on: of 1, dropped \{'overlong': 1\}"):
        tokenize(iter(rows), tiny_tokenizer, PackingConfig(capacity=length - 1), Ledger())
    strict = PackingConfig(capacity=length - 1, overlong="error")
    with pytest.raises(UserError, match=rf"row a: {length} tokens, packing.capacity is {length - 1}"):
        tokenize(iter(rows), tiny_tokenizer, strict, Ledger())


# packs


@pytest.fixture
def samples() -> list[Sample]:
    """Tokens of sample i are all i + 1, and its first is not trained."""
    rng = random.Random(0)
    lengths = [rng.randint(2, 20) for _ in range(100)]
    return [Sample([i + 1] * n, [IGNORED, *[i + 1] * (n - 1)]) for i, n in enumerate(lengths)]


def segments(pack: dict[str, Any]) -> list[tuple[int, ...]]:
    ends = torch.tensor(pack["lengths"]).cumsum(0).tolist()
    return [tuple(pack["input_ids"][end - n : end]) for end, n in zip(ends, pack["lengths"], strict=True)]


def test_every_epoch_holds_every_sample_once_in_another_order(samples: list[Sample]) -> None:
    packs, utilisation = pack_epochs(samples, 32, packs_per_step=4, epochs=2, seed=0, pad_id=0)
    assert len(packs) % 8 == 0, "each epoch ends with a whole step"
    half = len(packs) // 2
    epochs = [[s for pack in part for s in segments(pack)] for part in (packs.to_list()[:half], packs.to_list()[half:])]
    expected = Counter(tuple(sample.input_ids) for sample in samples)
    for epoch in epochs:
        assert Counter(s for s in epoch if s != (0,)) == expected
    assert epochs[0] != epochs[1]
    assert all(len(pack["input_ids"]) <= 32 for pack in packs)
    tokens = 2 * sum(len(sample.input_ids) for sample in samples)
    assert utilisation == pytest.approx(tokens / (len(packs) * 32))


def test_packs_follow_the_seed(samples: list[Sample]) -> None:
    first, again, other = (pack_epochs(samples, 32, 1, 1, seed, 0)[0].to_list() for seed in (0, 0, 1))
    assert first == again != other


def test_fillers_train_nothing(samples: list[Sample]) -> None:
    packs, _ = pack_epochs(samples[:1], 32, packs_per_step=4, epochs=1, seed=0, pad_id=9)
    assert packs.to_list()[1:] == [{"input_ids": [9], "labels": [IGNORED], "lengths": [1]}] * 3


def test_a_batch_says_where_samples_begin() -> None:
    batch = collate([{"input_ids": [5, 6, 7, 8, 9], "labels": [IGNORED, 6, IGNORED, 8, 9], "lengths": [2, 3]}])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9]]
    assert batch["labels"].tolist() == [[IGNORED, 6, IGNORED, 8, 9]]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1, 2]]
    assert batch["cu_seq_lens_q"].tolist() == [0, 2, 5]
    with pytest.raises(ValueError, match="one pack at a time"):
        collate([{}, {}])
