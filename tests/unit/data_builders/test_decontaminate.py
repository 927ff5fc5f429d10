"""The job: every row stays or goes with its evidence, whatever the processes."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alignment.errors import UserError
from alignment.rows import Row, read_rows, write_rows
from data_builders import decontaminate
from data_builders.config import DecontaminateConfig, EmbeddingConfig
from data_builders.embeddings import Embedded

THINGS = ["apples", "boats", "coins", "doors", "eggs", "flags", "gates", "hats", "irons", "jars"]


def question(number: int) -> str:
    one, two = THINGS[number % 10], THINGS[number // 10 % 10]
    return f"Merchant {number} trades {number + 2} {one} for some {two} at {one} street, then resells every {two} pair."


def asked(number: int) -> Row:
    return {"id": f"r{number}", "messages": [{"role": "user", "content": question(number)}, ANSWER], "extra": [number]}


ANSWER = {"role": "assistant", "content": "Yes."}


@pytest.fixture
def config(tmp_path: Path) -> DecontaminateConfig:
    write_rows(tmp_path / "rows.jsonl", map(asked, range(40)))
    write_rows(tmp_path / "a.jsonl", [{"question": question(7), "id": "seven"}, {"question": question(12)}])
    write_rows(tmp_path / "b.jsonl", [{"other": question(31).replace("trades", "swaps"), "id": 5}])
    files = {"a": {"rows": str(tmp_path / "a.jsonl")}, "b": {"rows": str(tmp_path / "b.jsonl"), "column": "other"}}
    return DecontaminateConfig.model_validate(
        {"output_dir": tmp_path / "out", "rows": str(tmp_path / "rows.jsonl"), "evaluation": files, "words": 0.9}
    )


def test_rows_that_repeat_go_with_their_evidence(config: DecontaminateConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decontaminate, "CHUNK_ROWS", 7)
    config = config.model_copy(update={"words": 0.8, "renumbered": 0.99, "workers": 2})
    decontaminate.run(config)
    gone = {7: ("a", "seven", "exact"), 12: ("a", ":2", "exact"), 31: ("b", "5", "words")}
    assert list(read_rows(config.output_dir / "rows.jsonl")) == [asked(i) for i in range(40) if i not in gone]
    rejects = list(read_rows(config.output_dir / "rejects.jsonl"))
    assert [{key: row[key] for key in ("id", "messages", "extra")} for row in rejects] == [asked(i) for i in gone]
    found = [row["contamination"] for row in rejects]
    assert [(f["source"], f["id"], f["method"]) for f in found] == list(gone.values())
    assert found[2]["evidence"] in question(31).lower().replace(",", "") and len(found[2]["evidence"].split()) > 5
    assert found[2]["text"].startswith("Merchant 31 swaps")
    ledger = json.loads((config.output_dir / "ledger.json").read_text())
    assert (ledger["rows_in"], ledger["rows_out"], ledger["dropped"]) == (40, 37, {"exact": 2, "words": 1})
    metrics: dict[str, Any] = json.loads((config.output_dir / "metrics.json").read_text())
    assert (metrics["found.a"], metrics["found.b"], metrics["dropped.exact"]) == (2, 1, 2)


def test_all_turns_are_searched_where_the_config_says_so(config: DecontaminateConfig, tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", [{"text": f"{question(3)} Yes."}, {"text": "Nothing of the kind is here."}])
    counts = {}
    for turns in ("user", "all"):
        out = tmp_path / turns
        decontaminate.run(
            config.model_copy(update={"turns": turns, "output_dir": out, "words": 1.0, "renumbered": 1.0})
        )
        counts[turns] = json.loads((out / "metrics.json").read_text())["found.a"]
    assert counts == {"user": 0, "all": 1}


def test_a_row_without_text_is_named(config: DecontaminateConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"b\.jsonl row 1: row has no column any of messages, .*'other'|b\.jsonl row 1"):
        decontaminate.plan(
            config.model_copy(update={"evaluation": {"b": config.evaluation["b"].model_copy(update={"column": None})}})
        )
    write_rows(tmp_path / "rows.jsonl", [asked(1), {"massages": []}])
    with pytest.raises(UserError, match=r"rows\.jsonl:2: row has no column any of messages"):
        decontaminate.run(config)
    assert not (config.output_dir / "rows.jsonl").exists()


def test_what_means_the_same_goes_with_its_cosine(
    config: DecontaminateConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By vectors in place of a model: row 3 is near evaluation row "5", row 7 is found by its words first."""
    held_out = [question(7), question(12), question(31).replace("trades", "swaps")]
    vector = {text: np.eye(8)[i] for i, text in enumerate(held_out)}
    vector[question(3)] = (0.95 * np.eye(8)[2] + np.sqrt(1 - 0.95**2) * np.eye(8)[6]).round(6)

    def embedded(texts: Iterable[str], config: EmbeddingConfig) -> Embedded:
        vectors = np.array([vector.get(text, np.eye(8)[5]) for text in texts])
        return Embedded(vectors.astype(np.float32), np.zeros(len(vectors), dtype=np.bool_))

    monkeypatch.setattr(decontaminate, "embedded", embedded)
    embedding = {"model": "org/name", "similarity": 0.94}
    config = DecontaminateConfig.model_validate(config.model_dump() | {"embedding": embedding, "renumbered": 1.0})
    decontaminate.run(config)
    rejects = {row["id"]: row["contamination"] for row in read_rows(config.output_dir / "rejects.jsonl")}
    assert {name: found["method"] for name, found in rejects.items()} == {
        "r3": "embedding", "r7": "exact", "r12": "exact"
    }  # fmt: skip
    assert rejects["r3"] == {
        "source": "b", "id": "5", "text": held_out[2], "method": "embedding", "share": 0.95, "evidence": held_out[2]
    }  # fmt: skip
    metrics = json.loads((config.output_dir / "metrics.json").read_text())
    assert (metrics["dropped.embedding"], metrics["found.b"], metrics["embedding.truncated"]) == (1, 1, 0)
