"""The job: of rows alike the first stays, and every other one says for which."""

import json
from pathlib import Path

import pytest

from alignment.rows import Row, read_rows, write_rows
from data_builders import deduplicate
from data_builders.config import DeduplicateConfig, NearDuplicatesConfig

LONG = "the quick brown fox jumps over the lazy dog and runs on along the river until it meets a second fox in the wood"


def row(text: str, **others: object) -> Row:
    return {"text": text, **others}


ROWS = [
    row(LONG, id="same"),
    row("What is 5+3?", id="same"),
    row(LONG.upper().replace(" ", "  ") + "!", n=1),
    row("What is 5-3?"),
    row(LONG.replace("second", "third")),
    row("what is 5+3"),
    row(LONG.replace("second", "third"), n=2),
    row("今天天气很好，我们去公园散步吧。"),
    row("今天天气很好, 我们去公园散步吧"),
]


@pytest.fixture
def config(tmp_path: Path) -> DeduplicateConfig:
    write_rows(tmp_path / "rows.jsonl", ROWS)
    near = NearDuplicatesConfig(similarity=0.7)
    return DeduplicateConfig(output_dir=tmp_path / "out", rows=str(tmp_path / "rows.jsonl"), near=near)


@pytest.mark.parametrize("chunk", [1, 2, 100])
def test_the_first_stays_and_the_others_name_it(
    config: DeduplicateConfig, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lines 3 and 7 are exact, 5 is near; 7 duplicates 5, which is gone, so it names what stays for that: 1."""
    monkeypatch.setattr(deduplicate, "CHUNK_ROWS", chunk)
    deduplicate.run(config)
    assert list(read_rows(config.output_dir / "rows.jsonl")) == [ROWS[i] for i in (0, 1, 3, 7)]
    rejects = list(read_rows(config.output_dir / "rejects.jsonl"))
    assert [{key: r[key] for key in r if key != "duplicate"} for r in rejects] == [ROWS[i] for i in (2, 4, 5, 6, 8)]
    found = [(r["duplicate"]["of"].removeprefix(config.rows), r["duplicate"]["method"]) for r in rejects]
    assert found == [(":1", "exact"), (":1", "near"), (":2", "exact"), (":1", "exact"), (":8", "exact")]
    assert 0.7 <= rejects[1]["duplicate"]["similarity"] < 1
    clusters = [(c["kept"], c["duplicates"]) for c in read_rows(config.output_dir / "clusters.jsonl")]
    places = [(of.removeprefix(config.rows), [d.removeprefix(config.rows) for d in who]) for of, who in clusters]
    assert places == [(":1", [":3", ":5", ":7"]), (":2", [":6"]), (":8", [":9"])]
    ledger = json.loads((config.output_dir / "ledger.json").read_text())
    assert (ledger["rows_in"], ledger["rows_out"], ledger["dropped"]) == (9, 4, {"exact": 4, "near": 1})
    metrics = json.loads((config.output_dir / "metrics.json").read_text())
    assert (metrics["clusters"], metrics["clusters.largest"]) == (3, 4)


def test_exact_alone(config: DeduplicateConfig) -> None:
    deduplicate.run(config.model_copy(update={"near": None}))
    assert list(read_rows(config.output_dir / "rows.jsonl")) == [ROWS[i] for i in (0, 1, 3, 4, 7)]
