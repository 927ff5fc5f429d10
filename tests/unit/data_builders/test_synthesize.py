"""The files of the demo's data: who trains on what, and what a row says."""

import json
import re
from pathlib import Path

import pytest

from alignment import chat
from alignment.errors import UserError
from alignment.rows import Row, read_rows
from data_builders import synthesize
from data_builders.config import SynthesizeConfig

COUNTS = {"sft_short": 640, "sft_direct": 96, "sft_long": 160, "reward_prompts": 128, "prompts": 192, "held_out": 128}


def config(folder: Path, **changes: object) -> SynthesizeConfig:
    rows = {
        "short_rows": 640,
        "direct_rows": 96,
        "long_rows": 160,
        "reward_prompts": 128,
        "prompts": 192,
        "held_out": 128,
    }
    return SynthesizeConfig.model_validate({"output_dir": folder, **rows, **changes})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "out"
    synthesize.run(config(folder))
    return folder


@pytest.fixture(scope="module")
def files(folder: Path) -> dict[str, list[Row]]:
    return {name: list(read_rows(folder / f"{name}.jsonl")) for name in COUNTS}


def problem(row: Row) -> str:
    """The template and numbers of a problem, whatever its language: `id-change-3-20-50-200` without `id-`."""
    return str(row["id"]).removeprefix(f"{row['language']}-")


def question(row: Row) -> str:
    turns = row["messages"][:-1] if "messages" in row else row["prompt"]
    return str(turns[-1]["content"])


def test_counts_are_those_asked_for(files: dict[str, list[Row]], folder: Path) -> None:
    assert {name: len(rows) for name, rows in files.items()} == COUNTS
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics == {f"rows.{name}": count for name, count in COUNTS.items()}


def test_no_problem_is_in_two_uses(files: dict[str, list[Row]]) -> None:
    uses = {
        "sft": files["sft_short"] + files["sft_direct"] + files["sft_long"],
        **{name: files[name] for name in ("reward_prompts", "prompts", "held_out")},
    }
    for name, rows in uses.items():
        others = [row for other, theirs in uses.items() if other != name for row in theirs]
        assert not {problem(row) for row in rows} & {problem(row) for row in others}, name
        assert not {question(row) for row in rows} & {question(row) for row in others}, name
    assert len({row["id"] for rows in uses.values() for row in rows}) == sum(COUNTS.values())


def test_use_is_a_function_of_the_problem_alone(tmp_path: Path, files: dict[str, list[Row]]) -> None:
    """Another seed, other counts: still nothing that one run trains SFT on is another's prompt."""
    synthesize.run(config(tmp_path / "out", seed=9, prompts=640))
    others = {problem(row) for row in read_rows(tmp_path / "out" / "prompts.jsonl")}
    assert not others & {problem(row) for row in files["sft_short"] + files["sft_long"] + files["held_out"]}
    assert others & {problem(row) for row in files["prompts"]}


def test_rows_are_the_schema_s(files: dict[str, list[Row]]) -> None:
    for name, rows in files.items():
        for row in rows:
            assert row["kind"] == "math"
            if name.startswith("sft"):
                roles = [message["role"] for message in row["messages"]]
                assert roles == (["system", "user", "assistant"] if name == "sft_long" else ["user", "assistant"])
            else:
                assert [message["role"] for message in row["prompt"]] == ["user"]
                assert re.fullmatch(r"-?\d+(\.\d*[1-9])?", row["answer"])


def test_the_long_rows_think_and_only_they(files: dict[str, list[Row]]) -> None:
    for row in files["sft_long"]:
        answer = row["messages"][-1]["content"]
        assert answer.startswith("<think>\n")
        thinking, _, rest = answer.partition("\n</think>\n")
        assert "\\boxed{" in rest and "\\boxed{" not in thinking
        assert row["messages"][0]["content"] == chat.THINKING_PROMPT
    assert not any("think" in row["messages"][-1]["content"] for row in files["sft_short"])


def test_the_direct_rows_give_the_result_alone(files: dict[str, list[Row]]) -> None:
    for row in files["sft_direct"]:
        answer = row["messages"][-1]["content"]
        assert re.fullmatch(r"\S.*\\boxed\{[\d.,]+\}", answer) and "=" not in answer
    assert all("=" in row["messages"][-1]["content"] for row in files["sft_short"])


def test_unknown_names_are_refused_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"languages: unknown name 'vie'; did you mean 'vi'\?"):
        synthesize.plan(config(tmp_path, languages=["en", "vie"]))
    with pytest.raises(UserError, match=r"templates: unknown name 'vouchers'; did you mean 'voucher'\?"):
        synthesize.plan(config(tmp_path, templates=["vouchers"]))
