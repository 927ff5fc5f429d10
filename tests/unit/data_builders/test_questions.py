"""gsm8k's format to SFT rows and prompts: every row accounted for, none in both."""

import json
from pathlib import Path

import pytest

from alignment.errors import UserError
from data_builders import questions
from data_builders.config import QuestionsConfig


def rows_file(folder: Path, *rows: dict[str, str]) -> str:
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
    row = {"id": "x-1", "kind": "math", "language": "en", "question": "Q?", "working": "Work.", "answer": "1,234"}
    assert questions.sft_row(row)["messages"][1]["content"] == "Work.\nAnswer: \\boxed{1,234}"
    assert questions.prompt_row(row)["answer"] == "1234"


def test_a_misspelt_column_names_the_row_and_the_nearest(tmp_path: Path) -> None:
    config = QuestionsConfig(output_dir=tmp_path / "out", rows=rows_file(tmp_path, {"question": "Q?", "answr": "1"}))
    with pytest.raises(UserError, match=r"rows.jsonl row 1: .*'answer'; did you mean 'answr'"):
        questions.plan(config)


def test_more_prompts_than_rows_is_refused(tmp_path: Path) -> None:
    config = QuestionsConfig(output_dir=tmp_path / "out", rows=rows_file(tmp_path, good(1)), prompts=2)
    with pytest.raises(UserError, match="prompts: 2 wanted"):
        questions.run(config)
