"""gsm8k's format to SFT rows and prompts: every row accounted for, none in both."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from alignment.errors import UserError
from alignment.questions import Question
from data_builders import questions
from data_builders.config import QuestionsConfig


def rows_file(folder: Path, *rows: Mapping[str, object]) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def good(number: int) -> dict[str, str]:
    return {
        "question": f"What is {number} + 1?",
        "answer": f"It is <<{number}+1={number + 1}>>{number + 1}.\n#### {number + 1}",
    }


def read(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_rows_are_split_cleaned_and_counted(tmp_path: Path) -> None:
    bad = [{"question": "No end?", "answer": "None."}, {"question": "Words?", "answer": "So it is.\n#### many"}]
    big = {"question": "Big?", "answer": "A lot.\n#### 1,234"}
    source = rows_file(tmp_path, *map(good, range(1, 9)), *bad, big)
    questions.run(QuestionsConfig(output_dir=tmp_path / "out", rows=source, prompts=4))
    sft, prompts, rejects = (read(tmp_path / "out" / f"{name}.jsonl") for name in ("sft", "prompts", "rejects"))
    assert (len(sft), len(prompts)) == (5, 4)
    assert not {row["id"] for row in sft} & {row["id"] for row in prompts}
    assert [row["reason"] for row in rejects] == ["no final answer", "final answer is no number"]
    ledger = json.loads((tmp_path / "out" / "ledger.json").read_text())
    assert (ledger["rows_in"], ledger["rows_out"], sum(ledger["dropped"].values())) == (11, 9, 2)
    assert "<<" not in json.dumps(sft)


def test_the_final_line_becomes_the_box_and_the_gold() -> None:
    question = Question("x-1", "en", "Q?", (), "Work.", "1,234")
    assert questions.sft_row(question)["messages"][1]["content"] == "Work.\nAnswer: \\boxed{1,234}"
    assert question.prompt_row()["answer"] == "1234"


def test_aqua_and_verified_ids(tmp_path: Path) -> None:
    row = {"question": "Half of 42?", "options": ["A)20", "B)21"], "rationale": "It is 21.", "correct": "B"}
    source = rows_file(tmp_path, *[row] * 3, row | {"correct": "C"})
    (tmp_path / "ids.txt").write_text("aqua-1\naqua-3\naqua-4\n")
    config = QuestionsConfig(
        output_dir=tmp_path / "out", dataset="aqua", rows=source, prompts=1, verified_ids=tmp_path / "ids.txt"
    )
    assert "3 verified" in questions.plan(config)[0]
    questions.run(config)
    [sft], [prompt] = read(tmp_path / "out" / "sft.jsonl"), read(tmp_path / "out" / "prompts.jsonl")
    assert {sft["id"], prompt["id"]} == {"aqua-1", "aqua-3"}
    assert prompt["options"] == ["20", "21"]
    assert "\\boxed{B}" in json.dumps(sft).replace("\\\\", "\\")
    ledger = json.loads((tmp_path / "out" / "ledger.json").read_text())
    assert ledger["dropped"] == {"no option has the correct letter": 1, "not verified": 1}
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert (metrics["rows.rejected"], metrics["rows.not_verified"]) == (1, 1)


def test_a_misspelt_column_names_the_row_and_the_nearest(tmp_path: Path) -> None:
    config = QuestionsConfig(output_dir=tmp_path / "out", rows=rows_file(tmp_path, {"question": "Q?", "answr": "1"}))
    with pytest.raises(UserError, match=r"rows.jsonl row 1: .*'answer'; did you mean 'answr'"):
        questions.plan(config)


def test_more_prompts_than_rows_is_refused(tmp_path: Path) -> None:
    config = QuestionsConfig(output_dir=tmp_path / "out", rows=rows_file(tmp_path, good(1)), prompts=2)
    with pytest.raises(UserError, match="prompts: 2 wanted"):
        questions.run(config)


def test_math_has_answers_in_latex_and_need_not_be_worked(tmp_path: Path) -> None:
    """Of rows without a solution no SFT row could be made."""
    source = rows_file(
        tmp_path,
        {"problem": "Polar?", "solution": "See $r$.", "answer": "\\left( 3, \\frac{\\pi}{2} \\right)"},
        {"problem": "Miles?", "answer": 27.0},
        {"problem": "Sum?", "solution": "Add.", "answer": "1,234"},
        {"problem": "What?", "solution": "Hm.", "answer": " "},
    )
    settings = {"dataset": "math", "rows": source}
    questions.run(QuestionsConfig(output_dir=tmp_path / "some", **settings))
    assert [row["id"] for row in read(tmp_path / "some" / "sft.jsonl")] == ["math-1", "math-3"]
    assert [row["id"] for row in read(tmp_path / "some" / "prompts.jsonl")] == ["math-2"]
    assert [row["reason"] for row in read(tmp_path / "some" / "rejects.jsonl")] == ["empty answer"]
    questions.run(QuestionsConfig(output_dir=tmp_path / "all", prompts="all", **settings))
    answers = [row["answer"] for row in read(tmp_path / "all" / "prompts.jsonl")]
    assert answers == ["\\left( 3, \\frac{\\pi}{2} \\right)", "27", "1234"]
    assert not read(tmp_path / "all" / "sft.jsonl")
    rows_file(tmp_path, {"problem": "?", "answer": None})
    with pytest.raises(UserError, match="expected a text or a number 'answer'"):
        questions.run(QuestionsConfig(output_dir=tmp_path / "none", **settings))
