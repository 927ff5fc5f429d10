"""The ablation's table from runs made by hand."""

import json
from pathlib import Path

import pytest
import yaml

from alignment.errors import UserError
from alignment.rows import write_rows
from dpo.ablation import table

START = {"a": 0, "b": 1, "c": 2, "d": 1}  # correct of 4: pass@1 is 1/4
RUNS = {
    "dpo_1": {"a": 1, "b": 2, "c": 3, "d": 2},  # every prompt +1/4
    "dpo_2": {"a": 1, "b": 2, "c": 3, "d": 2},
    "ot_1": {"a": 2, "b": 3, "c": 4, "d": 3},  # +1/2
    "ot_2": {"a": 0, "b": 1, "c": 2, "d": 1},  # nothing
}


def evaluation(folder: Path, correct: dict[str, int]) -> None:
    write_rows(folder / "by_prompt.jsonl", [{"id": name, "n": 4, "correct": c} for name, c in correct.items()])


@pytest.fixture
def pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    evaluation(Path("start"), START)
    stages = []
    for name, correct in RUNS.items():
        evaluation(Path(name, "round_2", "evaluation"), dict(reversed(correct.items())))
        Path(name, "DONE").touch()
        Path(name, "metrics.json").write_text(json.dumps({"model.round": 2, "round_2.kl": 1.0 + ("ot" in name)}))
        Path(name, "resolved_config.yaml").write_text("evaluation: {baseline: start}")
        stages.append({"name": name, "job": "dpo.online", "config": "c.yaml", "set": {"output_dir": name}})
    Path("c.yaml").touch()
    Path("p.yaml").write_text(yaml.safe_dump({"output_dir": "out", "stages": stages}))
    return Path("p.yaml")


def test_rows_by_hand(pipeline: Path) -> None:
    """ot's seeds gained 50 and 0 points: by prompt +25 each; over the two seeds 25 +- 12.706 * 35.36 / sqrt(2)."""
    assert table(pipeline, "dpo") == [
        "| arm | seeds | pass@1 | - start, by prompt | - start, over seeds | - dpo, by prompt | KL |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| start |  | 25.0% |  |  |  |  |",
        "| dpo | 2 | 50.0% | +25.0 (+25.0 to +25.0) | +25.0 (+25.0 to +25.0) |  | 1.00 |",
        "| ot | 2 | 50.0% | +25.0 (+25.0 to +25.0) | +25.0 (-292.7 to +342.7) | +0.0 (+0.0 to +0.0) | 2.00 |",
    ]


def test_what_is_not_done_is_named_and_a_kept_start_counts_as_such(pipeline: Path) -> None:
    Path("ot_2", "DONE").unlink()
    Path("dpo_2", "metrics.json").write_text(json.dumps({"model.round": 0}))
    lines = table(pipeline, "ot")
    assert lines[3].startswith("| dpo | 2 | 37.5% | +12.5")
    assert lines[4].startswith("| ot | 1 | 75.0% | +50.0 (+50.0 to +50.0) | +50.0 |  |"), "one seed has no interval"
    assert lines[-1] == "\nNot done: ot_2."


def test_mistakes(pipeline: Path) -> None:
    with pytest.raises(UserError, match=r"--against otp: no such arm that is done; did you mean 'ot'"):
        table(pipeline, "otp")
    evaluation(Path("ot_1", "round_2", "evaluation"), {"z": 1})
    with pytest.raises(UserError, match="ot was evaluated on other prompts than the baseline"):
        table(pipeline, "dpo")
    for name in RUNS:
        Path(name, "DONE").unlink()
    with pytest.raises(UserError, match="none of its runs is done"):
        table(pipeline, "dpo")
