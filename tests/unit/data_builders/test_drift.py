"""The job: windows by rows and by time, what it writes, which rows come out, and that every other one says why."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from alignment.errors import UserError
from alignment.rows import Row, read_rows, write_rows
from data_builders import drift, usage
from data_builders.config import DriftConfig

RARE = 4  # the topic that grows


def source(folder: Path, name: str, parts: list[tuple[int, list[float], float]], seed: int) -> list[Row]:
    """Rows of each part: their number, the topics' weights, and how often the rare topic is answered right."""
    rng = np.random.default_rng(seed)
    rows, vectors = [], []
    for count, weights, right in parts:
        for topic in rng.choice(5, count, p=weights).tolist():
            number = len(rows)
            time = f"2026-03-{1 + number // 100:02d}T{number % 24:02d}:00:00"
            correct = bool(rng.random() < (right if topic == RARE else 0.9))
            rows.append(
                {"id": f"{name}{number}", "text": f"topic {topic}", "time": time, "correct": correct, "n": topic}
            )
            vectors.append(4 * np.eye(8)[topic] + rng.normal(size=8))
    write_rows(folder / f"{name}.jsonl", rows)
    np.save(folder / f"{name}.npy", np.array(vectors, np.float32))
    return rows


USUAL = [0.3, 0.3, 0.2, 0.15, 0.05]
MORE = [0.2, 0.2, 0.15, 0.1, 0.35]


@pytest.fixture
def rows(tmp_path: Path) -> list[Row]:
    """Four windows of 100 rows, of which the last two hold more of the rare topic, and 30 rows besides."""
    source(tmp_path, "reference", [(400, USUAL, 0.4)], 0)
    return source(tmp_path, "stream", [(200, USUAL, 0.4), (200, MORE, 0.4), (30, MORE, 0.4)], 1)


def config(folder: Path, **changes: Any) -> DriftConfig:
    values: dict[str, Any] = {
        "output_dir": folder / "out",
        "reference": {"rows": str(folder / "reference.jsonl"), "vectors": folder / "reference.npy"},
        "stream": {"rows": str(folder / "stream.jsonl"), "vectors": folder / "stream.npy"},
        "window": 100,
        "minimum_rows": 50,
        "clusters": 8,
        "permutations": 499,
        "performance": {"column": "correct"},
        "trigger": {"by": "both"},
        "rows_to_add": 40,
    }
    return DriftConfig.model_validate(values | changes)


def read(folder: Path, name: str) -> Any:
    return json.loads((folder / "out" / name).read_text())


def test_rows_of_what_grew_come_out_and_all_others_say_why(rows: list[Row], tmp_path: Path) -> None:
    drift.run(config(tmp_path))
    report, metrics, ledger = (read(tmp_path, f"{name}.json") for name in ("drift", "metrics", "ledger"))
    assert [window["alarm"] for window in report["windows"]] == [False, False, True, True]
    assert [window["first_row"] for window in report["windows"]] == [1, 101, 201, 301]
    assert (metrics["windows"], metrics["alarms"], metrics["alarms.first"]) == (4, 2, 3)
    assert metrics["windows.fell"] == 2 and metrics["shift.largest"] > 0.1

    largest = report["clusters"][0]
    assert largest["share_after"] > 0.2 > 0.1 > largest["share_before"]
    assert largest["typical"] == ["topic 4"] * 5 and largest["windows"] == [3, 4]

    drawn = list(read_rows(tmp_path / "out" / "rows.jsonl"))
    by_id = {row["id"]: row for row in rows}
    assert [{key: row[key] for key in by_id[row["id"]]} for row in drawn] == [by_id[row["id"]] for row in drawn]
    assert len({row["id"] for row in drawn}) == len(drawn) == 40
    assert {row["window"] for row in drawn} == {3, 4}
    assert sum(row["n"] == RARE for row in drawn) >= 36, "clusters are not quite the topics"
    grew = {one["cluster"] for one in report["clusters"] if one["share_after"] > one["share_before"]}
    assert {row["cluster"] for row in drawn} <= grew

    rejects = list(read_rows(tmp_path / "out" / "rejects.jsonl"))
    reasons = Counter(row["reason"] for row in rejects)
    assert reasons == ledger["dropped"] and ledger["rows_in"] == 430 == ledger["rows_out"] + len(rejects)
    assert reasons["no alarm"] == 200 and reasons["window too small"] == 30
    assert {row["id"] for row in rejects} | {row["id"] for row in drawn} == set(by_id)
    reference = list(read_rows(tmp_path / "out" / "reference.jsonl"))
    assert len(reference) == 400 and len({row["cluster"] for row in reference if row["n"] == RARE}) <= 2
    with Image.open(tmp_path / "out" / "drift.png") as picture:
        assert picture.size[0] > 1000


def test_harmless_drift_is_no_alarm_where_performance_has_to_fall(tmp_path: Path) -> None:
    source(tmp_path, "reference", [(400, USUAL, 0.9)], 0)
    source(tmp_path, "stream", [(100, USUAL, 0.9), (100, MORE, 0.9)], 1)
    drift.run(config(tmp_path))
    metrics = read(tmp_path, "metrics.json")
    assert (metrics["windows.drifted"], metrics["windows.fell"], metrics["alarms"]) == (1, 0, 0)
    assert (metrics["rows.out"], metrics["dropped.no_alarm"]) == (0, 200)
    assert (tmp_path / "out" / "rows.jsonl").read_text() == ""


def test_a_fall_without_drift_gives_rows_of_all_its_clusters(tmp_path: Path) -> None:
    """By loss: lower is better, and is reported as it is."""
    source(tmp_path, "reference", [(400, USUAL, 0.9)], 0)
    given = source(tmp_path, "stream", [(100, USUAL, 0.9), (100, USUAL, 0.9)], 1)
    write_rows(tmp_path / "reference.jsonl", (r | {"loss": 1.0 + 0.01 * (i % 7)} for i, r in enumerate(
        list(read_rows(tmp_path / "reference.jsonl")))))  # fmt: skip
    losses = (row | {"loss": 1.0 + 0.01 * (i % 7) + (i >= 100)} for i, row in enumerate(given))
    write_rows(tmp_path / "stream.jsonl", losses)
    drift.run(config(tmp_path, performance={"column": "loss", "better": "lower"}, trigger={"by": "performance"}))
    metrics, report = read(tmp_path, "metrics.json"), read(tmp_path, "drift.json")
    assert (metrics["windows.drifted"], metrics["windows.fell"], metrics["alarms"]) == (0, 1, 1)
    after = report["windows"][1]["performance"]
    assert after["before"] == pytest.approx(1.03, abs=0.005) and after["after"] == pytest.approx(2.03, abs=0.01)
    assert metrics["performance.worst"] == after["after"]
    drawn = list(read_rows(tmp_path / "out" / "rows.jsonl"))
    shares, found = Counter(row["n"] for row in given[100:]), Counter(row["n"] for row in drawn)
    assert all(abs(found[topic] - 0.4 * shares[topic]) <= 2 for topic in range(5)), "in proportion"


def test_windows_of_days_in_the_order_of_time(rows: list[Row], tmp_path: Path) -> None:
    """Rows in any order; the 30 of the fifth day are too few."""
    order = np.random.default_rng(0).permutation(len(rows))
    write_rows(tmp_path / "stream.jsonl", (rows[row] for row in order))
    np.save(tmp_path / "stream.npy", np.load(tmp_path / "stream.npy")[order])
    drift.run(config(tmp_path, window="1d", time="time"))
    windows = read(tmp_path, "drift.json")["windows"]
    assert [(window["rows"], window["alarm"]) for window in windows] == [
        (100, False),
        (100, False),
        (100, True),
        (100, True),
    ]
    assert windows[2]["from"] == "2026-03-03T00:00:00+00:00" and windows[2]["to"] == "2026-03-03T23:00:00+00:00"
    drawn = list(read_rows(tmp_path / "out" / "rows.jsonl"))
    assert {row["time"][:10] for row in drawn} == {"2026-03-03", "2026-03-04"}


def test_a_killed_run_ends_with_the_same_rows(rows: list[Row], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drift.run(config(tmp_path))
    names = ("rows.jsonl", "rejects.jsonl", "reference.jsonl", "drift.json", "ledger.json", "metrics.json")
    whole = [(tmp_path / "out" / name).read_bytes() for name in names]
    again = config(tmp_path, output_dir=tmp_path / "again")
    with monkeypatch.context() as patch:
        patch.setattr(drift, "_write_reference", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            drift.run(again)
    assert (tmp_path / "again" / "rows.jsonl").exists() and not (tmp_path / "again" / "DONE").exists()
    drift.run(again)
    assert [(tmp_path / "again" / name).read_bytes() for name in names] == whole


def test_texts_without_vectors_are_embedded(rows: list[Row], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def embed(texts: list[str], embedding: Any) -> np.ndarray:
        asked.extend(texts)
        return np.array([4 * np.eye(8)[int(text[-1])] + 0.1 * np.sin(i + np.arange(8)) for i, text in enumerate(texts)])

    monkeypatch.setattr(usage, "embed", embed)
    settings = config(tmp_path, embedding={"model": "org/some"}, **{
        name: {"rows": str(tmp_path / f"{name}.jsonl")} for name in ("reference", "stream")
    })  # fmt: skip
    drift.run(settings)
    assert asked[-1] == rows[-1]["text"] and len(asked) == 830
    assert read(tmp_path, "metrics.json")["alarms"] == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"performance": {"column": "corect"}}, "reference.jsonl:1: row has no 'corect'; did you mean 'correct'"),
        ({"performance": {"column": "text"}}, "'text' is 'topic .', expected a number, true or false"),
        ({"time": "text", "window": "1d"}, "'text' is 'topic .', expected an ISO 8601 time"),
        ({"clusters": 300}, "clusters: 300 wanted, but half of the reference is 200 rows"),
        ({"minimum_rows": 200}, "no window holds 200 rows"),
        ({"permutations": 99}, "permutations: 99 can raise no alarm"),
    ],
)
def test_refusals(changes: dict[str, Any], message: str, rows: list[Row], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        drift.run(config(tmp_path, **changes))
    assert not (tmp_path / "out").exists()


def test_vectors_of_other_rows_are_refused(rows: list[Row], tmp_path: Path) -> None:
    vectors = np.load(tmp_path / "stream.npy")
    np.save(tmp_path / "stream.npy", vectors[:-1])
    with pytest.raises(UserError, match="stream.npy: 429 vectors, but .*stream.jsonl holds 430 rows"):
        drift.run(config(tmp_path))
    np.save(tmp_path / "stream.npy", vectors[:, :5])
    with pytest.raises(UserError, match="stream.npy: 5 dimensions, but the reference's vectors have 8"):
        drift.run(config(tmp_path))
    vectors[7, 2] = np.nan
    np.save(tmp_path / "stream.npy", vectors)
    with pytest.raises(UserError, match="stream.npy row 8: the vector is not finite"):
        drift.run(config(tmp_path))
    (tmp_path / "stream.npy").write_text("no array")
    with pytest.raises(UserError, match="stream.npy: not a .npy file of vectors"):
        drift.plan(config(tmp_path))


def test_configs_that_cannot_be(tmp_path: Path) -> None:
    for changes, message in [
        ({"performance": None}, "trigger.by: both needs 'performance'"),
        ({"window": "1d"}, "window: 1d needs 'time'"),
        ({"window": "1 day"}, "expected a number of rows or a span"),
        ({"stream": {"rows": "x"}}, "give 'embedding', or 'vectors'"),
    ]:
        with pytest.raises(ValidationError, match=message):
            config(tmp_path, **changes)


def test_plan_says_what_is_tested(rows: list[Row], tmp_path: Path) -> None:
    lines = "\n".join(drift.plan(config(tmp_path)))
    assert "5 windows of 100 rows; an alarm by both, level 0.05" in lines and "mmd, classifier" in lines
