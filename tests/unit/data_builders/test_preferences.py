"""From graded samples to pair files: nothing is lost, nothing is in two files."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from alignment.grading import SCHEMA, GradedSample
from alignment.rows import read_rows
from data_builders.preferences import BuiltPairs, build_pairs, write_pairs


def prompt(name: str) -> dict[str, Any]:
    return {"id": name, "language": "en", "prompt": [{"role": "user", "content": f"{name}?"}], "answer": "1"}


def graded(name: str, *samples: tuple[str, str]) -> list[GradedSample]:
    """Samples of a prompt, each (verdict, finish reason)."""
    return [
        GradedSample(name, i, f"{name} sample {i}", [5, 6], reason, -1.0, None, verdict)
        for i, (verdict, reason) in enumerate(samples)
    ]


def write(path: Path, samples: list[GradedSample]) -> Path:
    pq.write_table(pa.Table.from_pylist([asdict(s) for s in samples], SCHEMA), path)
    return path


RIGHT, WRONG, CUT = ("correct", "stop"), ("wrong", "stop"), ("correct", "length")


@pytest.fixture
def built(tmp_path: Path) -> BuiltPairs:
    samples = [
        *graded("two", RIGHT, RIGHT, WRONG, WRONG, WRONG),
        *graded("none", WRONG, WRONG),
        *graded("all", RIGHT, RIGHT),
        *graded("cut", CUT, CUT),
        *graded("one", CUT, RIGHT, WRONG, ("wrong", "length")),
        *graded("half", CUT, WRONG),
    ]
    prompts = [prompt(name) for name in ("two", "none", "all", "cut", "one", "half", "long")]
    return build_pairs(prompts, write(tmp_path / "graded.parquet", samples), {}, per_prompt=3, seed=0)


def test_every_prompt_gives_pairs_or_a_reason(built: BuiltPairs) -> None:
    assert {name: len(rows) for name, rows in built.pairs.items()} == {"two": 3, "one": 1}
    assert {row["id"]: row["reason"] for row in built.rejects} == {
        "none": "none correct",
        "all": "all correct",
        "cut": "every sample cut off",
        "half": "none correct",
        "long": "prompt too long",
    }
    assert (built.ledger.rows_in, built.ledger.rows_out, built.ledger.dropped.total()) == (7, 2, 5)
    built.ledger.check()


def test_samples_that_were_cut_off_are_never_used(built: BuiltPairs) -> None:
    assert [row["id"] for row in built.pairs["one"]] == ["one/1/2"]


def test_scores_choose_the_pair(tmp_path: Path) -> None:
    path = write(tmp_path / "graded.parquet", graded("a", RIGHT, RIGHT, WRONG, WRONG))
    scores = {("a", 0): 0.0, ("a", 1): 1.0, ("a", 2): 5.0, ("a", 3): 4.0}
    rows = build_pairs([prompt("a")], path, scores, per_prompt=1, seed=0).pairs["a"]
    assert [row["id"] for row in rows] == ["a/1/2"]
    assert rows[0]["scores"] == [1.0, 5.0]


@pytest.fixture
def many(tmp_path: Path) -> BuiltPairs:
    names = [f"p{i}" for i in range(400)]
    samples = [s for name in names for s in graded(name, RIGHT, RIGHT, WRONG, WRONG)]
    path = write(tmp_path / "graded.parquet", samples)
    return build_pairs([prompt(name) for name in names], path, {}, per_prompt=2, seed=0)


def test_prompts_set_aside_for_evaluation_are_not_trained_on(many: BuiltPairs, tmp_path: Path) -> None:
    counts = write_pairs(many, tmp_path, evaluation_share=0.25, seed=3)
    train, evaluation = (list(read_rows(tmp_path / f"{name}.jsonl", "preference")) for name in ("pairs", "evaluation"))
    of_train, of_evaluation = ({row["id"].split("/")[0] for row in rows} for rows in (train, evaluation))
    assert not of_train & of_evaluation
    assert len(of_train | of_evaluation) == 400
    assert len(of_evaluation) == pytest.approx(100, abs=30)
    assert len(train) + len(evaluation) == 800, "both pairs of each prompt"
    assert counts == {"prompts": 400, "pairs": len(train), "pairs.evaluation": len(evaluation)}
    write_pairs(many, tmp_path / "other", evaluation_share=0.25, seed=4)
    others = {row["id"].split("/")[0] for row in read_rows(tmp_path / "other" / "evaluation.jsonl")}
    assert others != of_evaluation, "drawn by the seed"


def test_files_and_counts_add_up(built: BuiltPairs, tmp_path: Path) -> None:
    counts = write_pairs(built, tmp_path)
    assert counts == {
        "prompts": 7,
        "pairs": 4,
        "pairs.evaluation": 0,
        "dropped.all_correct": 1,
        "dropped.every_sample_cut_off": 1,
        "dropped.none_correct": 2,
        "dropped.prompt_too_long": 1,
    }
    assert sum(value for key, value in counts.items() if key.startswith("dropped.")) == len(built.rejects)
    assert [row["id"] for row in read_rows(tmp_path / "rejects.jsonl")] == [row["id"] for row in built.rejects]
    assert not (tmp_path / "evaluation.jsonl").exists()
    ledger = json.loads((tmp_path / "ledger.json").read_text())
    assert ledger["rows_in"] == 7 == ledger["rows_out"] + sum(ledger["dropped"].values())
