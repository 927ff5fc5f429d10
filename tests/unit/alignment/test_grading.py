"""Verdicts beside the samples they judge."""

import json
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from alignment import grading
from alignment.errors import UserError
from alignment.grading import grade, language_of, read_graded
from alignment.rollout.samples import FinishReason
from alignment.rollout.store import Completion, SampleReader, SampleStore

PROMPTS = [
    {"id": "dong", "language": "vi", "prompt": [], "answer": "1234"},
    {"id": "open", "language": "en", "prompt": []},
    {"id": "usd", "language": "en", "prompt": [], "answer": "1234"},
]
TEXTS = {
    "dong": ["\\boxed{1.234}", "\\boxed{1,234}", "no idea"],
    "open": ["\\boxed{7}", "words", "\\boxed{8}"],
    "usd": ["\\boxed{1.234}", "\\boxed{1,234}", "\\boxed{1234}"],
}


def store(
    folder: Path, names: Sequence[str], reasons: Sequence[FinishReason] = ("stop", "stop", "stop")
) -> SampleReader:
    made = SampleStore.create(folder, {"a": 1}, names, 2, 3)
    for number, chunk in enumerate(made.chunks):
        rows = [
            Completion(name, i, 0, [5, 6, i], TEXTS[name][i], reasons[i], -float(i)) for name in chunk for i in range(3)
        ]
        made.write(number, rows)
    return SampleReader(made.folder)


def verdicts(path: Path) -> dict[str, list[str | None]]:
    return {name: [s.verdict for s in samples] for name, samples in read_graded(path)}


def test_each_sample_is_judged_in_its_own_language_against_its_own_answer(tmp_path: Path) -> None:
    """The unanswered prompt stands between the two others: a verdict given to the wrong sample would show."""
    path = tmp_path / "graded.parquet"
    grade(store(tmp_path, ["dong", "open", "usd"]), PROMPTS, path)
    assert verdicts(path) == {
        "dong": ["correct", "wrong", "no_answer"],
        "open": [None, None, None],
        "usd": ["wrong", "correct", "correct"],
    }
    samples = dict(read_graded(path))
    assert [s.extracted for s in samples["open"]] == ["7", None, "8"]
    assert samples["dong"][0].extracted == "1234"
    assert [s.correct for s in samples["usd"]] == [False, True, True]
    assert [(s.index, s.completion, s.token_ids, s.logprob) for s in samples["usd"]] == [
        (i, TEXTS["usd"][i], [5, 6, i], -float(i)) for i in range(3)
    ]


def test_a_box_that_was_cut_off_is_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TEXTS, "usd", ["so \\boxed{1,234", "so 1,234", "\\boxed{1234}"])
    path = tmp_path / "graded.parquet"
    grade(store(tmp_path, ["usd"], reasons=("length", "length", "stop")), PROMPTS, path)
    assert verdicts(path) == {"usd": ["no_answer", "no_answer", "correct"]}


def test_groups_of_prompts_join_without_a_seam(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, parts = tmp_path / "whole.parquet", tmp_path / "parts.parquet"
    samples = store(tmp_path, ["dong", "open", "usd"])
    grade(samples, PROMPTS, whole)
    monkeypatch.setattr(grading, "PROMPTS_AT_ONCE", 2)
    grade(samples, PROMPTS, parts)
    assert pq.read_table(parts).to_pylist() == pq.read_table(whole).to_pylist()
    assert pq.ParquetFile(parts).num_row_groups == 2


def test_nothing_is_left_of_a_grading_that_failed(tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        grade(store(tmp_path, ["dong", "open", "usd"]), PROMPTS[:2], tmp_path / "graded.parquet")
    assert not list(tmp_path.glob("*.parquet*")) and not list(tmp_path.glob(".*"))


def test_files_that_are_not_graded_samples_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file of graded samples"):
        list(read_graded(tmp_path / "absent.parquet"))
    pq.write_table(pa.table({"id": ["a"], "index": [0]}), tmp_path / "other.parquet")
    with pytest.raises(UserError, match="has no column 'completion'"):
        list(read_graded(tmp_path / "other.parquet"))


def test_a_row_without_language_is_read_as_english() -> None:
    assert language_of(json.loads("{}")) == "en"
