"""Draws, epochs and weights by hand, and for any of them: the ledger adds up, passes are whole, the seed decides."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alignment.config import load_config
from alignment.errors import UserError
from sft.cache import REJECTED, SourceRows, TokenizedRows
from sft.config import SFTConfig
from sft.mixture import REASONS, Mixture, mix, write_rejects
from sft.rendering import SCHEMA

# A row: its length, which is also its tokens' value; how many tokens are trained, from its end; why it is rejected.
Row = tuple[int, int, str | None]
FINE: Row = (20, 5, None)


def batch(rows: Sequence[Row]) -> pa.RecordBatch:
    kept = [(0, 0) if reason else (length, trained) for length, trained, reason in rows]
    columns: dict[str, Any] = {
        "input_ids": [[length] * length for length, _ in kept],
        "trained": [[False] * (length - trained) + [True] * trained for length, trained in kept],
        "length": [length for length, _, _ in rows],
        "trained_tokens": [trained for _, trained in kept],
        "reason": [reason for _, _, reason in rows],
        "place": [f":{number}" for number in range(1, 1 + len(rows))],
        "id": [None if number % 2 else f"r{number}" for number in range(len(rows))],
    }
    return pa.RecordBatch.from_pydict(columns, schema=SCHEMA)


def tokenized(*sources: Sequence[Row]) -> TokenizedRows:
    """Each source in batches of three rows."""
    return TokenizedRows(
        [
            SourceRows(f"s{number}.jsonl", [batch(rows[i : i + 3]) for i in range(0, len(rows), 3)])
            for number, rows in enumerate(sources)
        ]
    )


def config(
    *sources: dict[str, Any], epochs: int = 1, seed: int = 0, capacity: int = 64, overlong: str = "drop"
) -> SFTConfig:
    return SFTConfig.model_validate(
        {
            "output_dir": "out",
            "seed": seed,
            "model": {"preset": "compass-tiny", "tokenizer": "tokenizer"},
            "sources": [{"rows": f"s{number}.jsonl", **source} for number, source in enumerate(sources)],
            "packing": {"capacity": capacity, "overlong": overlong},
            "training": {"learning_rate": 1e-3, "epochs": epochs},
        }
    )


def per_source(mixture: Mixture, epoch: int = 0) -> list[int]:
    return np.histogram(mixture.epochs[epoch], mixture.rows.bounds)[0].tolist()


# draws


@pytest.mark.parametrize(
    ("source", "drawn"), [({"count": 7}, 7), ({"cap": 7}, 7), ({"cap": 99}, 20), ({"share": 0.33}, 7), ({}, 20)]
)
def test_a_draw_is_of_different_usable_rows_by_the_seed(source: dict[str, Any], drawn: int) -> None:
    rows = tokenized([*[FINE] * 20, (80, 5, None), (20, 0, REJECTED[0])])
    first, again, other = (mix(config(source, epochs=3, seed=seed), rows) for seed in (0, 0, 1))
    chosen = set(first.epochs[0].tolist())
    assert len(chosen) == drawn == len(first.epochs[0]) and max(chosen) < 20
    assert all(set(epoch.tolist()) == chosen for epoch in first.epochs), "drawn once, for the whole run"
    assert [e.tolist() for e in again.epochs] == [e.tolist() for e in first.epochs]
    assert [e.tolist() for e in other.epochs] != [e.tolist() for e in first.epochs]
    assert first.ledger.dropped["not drawn"] == 20 - drawn


def test_two_sources_are_drawn_apart() -> None:
    mixture = mix(config({"count": 20}, {"count": 20}), tokenized([FINE] * 50, [FINE] * 50))
    rows = mixture.epochs[0]
    assert set((rows[rows < 50]).tolist()) != set((rows[rows >= 50] - 50).tolist())


def test_a_count_beyond_the_usable_rows_is_an_error() -> None:
    rows = tokenized([FINE], [*[FINE] * 5, (80, 5, None)])
    with pytest.raises(UserError, match=r"sources\[1\].count: 6 rows wanted, but s1.jsonl holds 5 usable rows"):
        mix(config({}, {"count": 6}), rows)


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ("[{rows: a, count: 3, share: 0.5}]", "job.yaml:1: sources.0: give at most one .* not count and share"),
        ("[{rows: a, weight: 1}, {rows: b}]", r"some have a weight and sources\[1\] has none"),
        ("[{rows: a}, {rows: b, mixture_share: 0.2, weight: 1}]", "give one of 'weight' and 'mixture_share'"),
        ("[{rows: a, mixture_share: 0.2}]", "mixture_share is a share beside sources that have none"),
        ("[{rows: a}, {rows: b, mixture_share: 0.5}, {rows: c, mixture_share: 0.5}]", "they need the rest of 1"),
        ("[{rows: a, epochs: 0}]", "sources.0.epochs: input should be greater than 0"),
        ("[{rows: a, wieght: 1}]", "unknown key 'sources.0.wieght'; did you mean 'weight'?"),
    ],
)
def test_settings_that_contradict_each_other(tmp_path: Path, sources: str, message: str) -> None:
    model = "{preset: compass-tiny, tokenizer: t}"
    text = f"sources: {sources}\noutput_dir: out\nmodel: {model}\ntraining: {{learning_rate: 1.0}}\n"
    (tmp_path / "job.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        load_config(SFTConfig, tmp_path / "job.yaml")


# epochs


def test_one_and_a_half_passes_hold_every_row_once_and_half_of_them_twice() -> None:
    mixture = mix(config({"epochs": 1.5}, epochs=2), tokenized([FINE] * 10))
    for epoch in mixture.epochs:
        assert sorted(Counter(epoch.tolist()).values()) == [1] * 5 + [2] * 5
    both = Counter(np.concatenate(mixture.epochs).tolist())
    assert set(both.values()) == {3}, "those that were seen twice first are seen once then"
    assert mixture.ledger.rows_out == 10 and mixture.ledger.tokens_trained == 50, "repeats count once"


def test_half_a_pass_goes_on_where_the_last_epoch_ended() -> None:
    mixture = mix(config({"epochs": 0.5}, epochs=3), tokenized([FINE] * 10))
    assert [len(epoch) for epoch in mixture.epochs] == [5, 5, 5]
    assert sorted(np.concatenate(mixture.epochs[:2]).tolist()) == list(range(10))


# weights


def test_the_largest_mixture_of_the_weights_is_taken() -> None:
    """Shares 3:1. 60 rows of the first would want 20 of the second: it has 30, so the first is the limit."""
    rows = tokenized([FINE] * 60, [FINE] * 30)
    assert per_source(mix(config({"weight": 3}, {"weight": 1}), rows)) == [60, 20]
    assert per_source(mix(config({"weight": 0.3}, {"weight": 0.1}), rows)) == [60, 20], "only their ratio counts"
    # Shares 1:1: the second is the limit, unless it may be passed over twice.
    assert per_source(mix(config({"weight": 1}, {"weight": 1}), rows)) == [30, 30]
    twice = mix(config({"weight": 1}, {"weight": 1, "epochs": 2}), rows)
    assert per_source(twice) == [60, 60]
    assert set(Counter(twice.epochs[0][twice.epochs[0] >= 60].tolist()).values()) == {2}
    assert [s["token_share"] for s in twice.sources] == [0.5, 0.5]


def test_a_mixture_share_is_a_share_of_the_rows_and_leaves_the_others_whole() -> None:
    """Beside 40 rows a share of 1/5 is 10: drawn from 30, or 6 that repeat. Two of 1/5 beside 36: 12 each of 60."""
    base = [FINE] * 40
    assert per_source(mix(config({}, {"mixture_share": 0.2}), tokenized(base, [FINE] * 30))) == [40, 10]
    repeated = mix(config({}, {"mixture_share": 0.2, "epochs": 2}), tokenized(base, [FINE] * 6))
    assert per_source(repeated) == [40, 10]
    assert sorted(Counter(repeated.epochs[0][repeated.epochs[0] >= 40].tolist()).values()) == [1, 1, 2, 2, 2, 2]
    two = mix(config({"mixture_share": 0.2}, {"epochs": 0.9}, {"mixture_share": 0.2}), tokenized(base, base, base))
    assert per_source(two) == [12, 36, 12]
    assert [source["row_share"] for source in two.sources] == [0.2, 0.6, 0.2]


def test_a_mixture_share_stands_beside_weights() -> None:
    """Weights 3:1 of 60 and 30 rows take 60 and 20; a half of the whole is as many again."""
    rows = tokenized([FINE] * 60, [FINE] * 30, [FINE] * 99)
    assert per_source(mix(config({"weight": 3}, {"weight": 1}, {"mixture_share": 0.5}), rows)) == [60, 20, 80]


def test_a_larger_mixture_share_holds_the_rows_of_a_smaller_one() -> None:
    rows = tokenized([FINE] * 40, [FINE] * 90)
    small, large = (mix(config({}, {"mixture_share": share}), rows).epochs[0] for share in (0.2, 0.5))
    assert set(small.tolist()) < set(large.tolist())


def test_a_mixture_share_that_the_rows_cannot_give_is_an_error() -> None:
    rows = tokenized([FINE] * 40, [*[FINE] * 3, (80, 5, None)])
    message = (
        r"sources\[1\].mixture_share: 0.2 of an epoch is 10 rows, but s1.jsonl gives at most 6: 3 usable rows, epochs 2"
    )
    with pytest.raises(UserError, match=message):
        mix(config({}, {"mixture_share": 0.2, "epochs": 2}), rows)


def test_a_weight_without_a_usable_row_is_an_error() -> None:
    with pytest.raises(UserError, match=r"sources\[1\]: s1.jsonl has a weight, but no usable row"):
        mix(config({"weight": 1}, {"weight": 1}), tokenized([FINE], [(80, 5, None)]))


# overlong rows


def test_overlong_rows_are_dropped_cut_or_refused() -> None:
    """Capacity 64. Of 80 tokens 30 are trained: 14 stay when it is cut. Of 90 tokens 10: none stays."""
    rows = tokenized([(64, 5, None), (80, 30, None), (90, 10, None), (70, 0, REJECTED[1])])
    dropped = mix(config({}), rows)
    assert dropped.epochs[0].tolist() == [0]
    assert dropped.ledger.dropped == {"overlong": 2, REJECTED[1]: 1}
    assert (dropped.ledger.tokens_in, dropped.ledger.tokens_dropped, dropped.ledger.truncated) == (304, 240, 0)

    cut = mix(config({}, overlong="truncate"), rows)
    assert sorted(cut.epochs[0].tolist()) == [0, 1]
    assert cut.lengths[:2].tolist() == [64, 64]
    assert cut.ledger.dropped == {"nothing to train": 1, REJECTED[1]: 1}
    assert (cut.ledger.tokens_trained, cut.ledger.tokens_dropped, cut.ledger.truncated) == (5 + 14, 16 + 90 + 70, 1)
    ids, trained = cut.rows.take([1, 0], 64)
    assert ids.tolist() == [80] * 64 + [64] * 64
    assert np.flatnonzero(trained).tolist() == [*range(50, 64), *range(64 + 59, 128)]

    with pytest.raises(UserError, match=r"s0.jsonl:2: 80 tokens, packing.capacity is 64"):
        mix(config({}, overlong="error"), rows)
    with pytest.raises(UserError, match=r"s0.jsonl:1 \(id r0\): 64 tokens, packing.capacity is 63"):
        mix(config({}, overlong="error", capacity=63), rows)


def test_no_row_is_left() -> None:
    with pytest.raises(UserError, match=r"no row is left to train on: of 2, dropped .*'overlong': 2"):
        mix(config({}), tokenized([(80, 5, None)] * 2))


def test_rejected_rows_are_listed(tmp_path: Path) -> None:
    mixture = mix(config({"count": 1}, {}), tokenized([FINE, FINE], [(80, 5, None), (20, 0, REJECTED[0]), FINE]))
    write_rejects(mixture, tmp_path / "rejects.jsonl")
    assert [json.loads(line) for line in (tmp_path / "rejects.jsonl").read_text().splitlines()] == [
        {"source": "s1.jsonl", "where": "s1.jsonl:1", "id": "r0", "reason": "overlong", "tokens": 80},
        {"source": "s1.jsonl", "where": "s1.jsonl:2", "id": None, "reason": "nothing to train", "tokens": 20},
    ]


# for any rows and settings


@st.composite
def any_rows(draw: st.DrawFn) -> list[Row]:
    reasons = st.sampled_from([None, None, None, *REJECTED])
    rows = draw(st.lists(st.tuples(st.integers(2, 100), st.integers(1, 99), reasons), min_size=1, max_size=30))
    return [(length, 0 if reason else min(trained, length - 1), reason) for length, trained, reason in rows]


@st.composite
def any_source(draw: st.DrawFn) -> dict[str, Any]:
    ways = [st.just({}), st.builds(lambda n: {"cap": n}, st.integers(1, 40))]
    ways.append(st.builds(lambda share: {"share": share}, st.floats(0.01, 1)))
    return {**draw(st.one_of(ways)), "epochs": draw(st.floats(0.1, 4))}


@settings(max_examples=150, deadline=None)
@given(
    data=st.data(),
    rows=st.lists(any_rows(), min_size=1, max_size=3),
    weighted=st.booleans(),
    epochs=st.integers(1, 4),
    overlong=st.sampled_from(["drop", "truncate"]),
)
def test_any_mixture(data: st.DataObject, rows: list[list[Row]], weighted: bool, epochs: int, overlong: str) -> None:
    sources = [data.draw(any_source()) for _ in rows]
    if weighted:
        sources = [{**source, "weight": data.draw(st.floats(0.1, 10))} for source in sources]
    settings_of_run = config(*sources, epochs=epochs, overlong=overlong)
    everything = tokenized(*rows)
    usable = [has_a_usable_row(source, overlong) for source in rows]
    if not (all(usable) if weighted else any(usable)):
        with pytest.raises(UserError, match="no row is left|no usable row"):
            mix(settings_of_run, everything)
        return
    mixture = mix(settings_of_run, everything)
    again = mix(settings_of_run, tokenized(*rows))
    assert all(np.array_equal(a, b) for a, b in zip(mixture.epochs, again.epochs, strict=True))
    check_ledger(mixture, [row for source in rows for row in source])
    for number, source in enumerate(mixture.sources):
        check_passes(mixture, number, source["drawn"], source["epoch_rows"], settings_of_run.sources[number].epochs)
    if weighted:
        check_weights(mixture, settings_of_run)


def has_a_usable_row(rows: list[Row], overlong: str) -> bool:
    """Whether a source has a usable row; the trained tokens stand at a row's end."""
    kept = 64 if overlong == "truncate" else 0
    return any(reason is None and (length <= 64 or length - trained < kept) for length, trained, reason in rows)


def check_ledger(mixture: Mixture, rows: list[Row]) -> None:
    """Counted again, row by row."""
    seen = set(np.concatenate(mixture.epochs).tolist())
    ledger = mixture.ledger
    kept = {index: mixture.rows.take([index], 64) for index in seen}
    assert all(0 < len(ids) <= 64 and trained[1:].any() for ids, trained in kept.values())
    assert all(mixture.lengths[index] == len(ids) for index, (ids, _) in kept.items())
    assert (ledger.rows_in, ledger.rows_out) == (len(rows), len(seen))
    assert sum(ledger.dropped.values()) == len(rows) - len(seen) and set(ledger.dropped) <= set(REASONS)
    assert ledger.tokens_in == sum(length for length, _, _ in rows)
    assert ledger.tokens_dropped == ledger.tokens_in - sum(len(ids) for ids, _ in kept.values())
    assert ledger.tokens_trained == sum(int(trained.sum()) for _, trained in kept.values())
    assert ledger.truncated == sum(rows[index][0] > 64 for index in seen)
    for reason in REJECTED[1:]:
        assert ledger.dropped[reason] == sum(row[2] == reason for row in rows)


def check_passes(mixture: Mixture, number: int, drawn: int, size: int, epochs: float) -> None:
    """A source's epochs, one after the other, are passes that each hold every drawn row once."""
    first, end = mixture.rows.bounds[number : number + 2]
    parts = [epoch[(epoch >= first) & (epoch < end)] for epoch in mixture.epochs]
    assert [len(part) for part in parts] == [size] * len(parts)
    assert size <= max(1, round(epochs * drawn))
    sequence = np.concatenate(parts).tolist()
    passes = [sequence[i : i + drawn] for i in range(0, len(sequence), max(1, drawn))]
    assert all(len(set(each)) == len(each) for each in passes)
    assert all(set(each) == set(passes[0]) and len(each) == drawn for each in passes[:-1])


def check_weights(mixture: Mixture, run: SFTConfig) -> None:
    """Each source is within a row of its share, and one of them gives all that it may."""
    weights = np.array([source.weight for source in run.sources])
    sizes = np.array([source["epoch_rows"] for source in mixture.sources])
    most = [max(1, round(s.epochs * o["drawn"])) for s, o in zip(run.sources, mixture.sources, strict=True)]
    full = int(np.argmin(np.array(most) / weights))
    assert sizes[full] == most[full]
    assert np.all(np.abs(sizes - most[full] * weights / weights[full]) <= 1)
