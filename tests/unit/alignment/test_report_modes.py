"""The report's section on thinking, and the numbers of the modes, from a small evaluation of both."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from alignment import report
from alignment.evaluate import by_prompt, pass_rate, summarize
from alignment.grading import GradedSample, writing
from alignment.report import modes, sources
from alignment.report.collect import Collected, collect
from alignment.report.page import Comparison, Figure, Note, Table
from alignment.rows import Row, read_rows, write_rows
from alignment.stats import mean_interval, paired_interval

QUESTION = "<b>How much</b> is it?"
PROMPTS: list[Row] = [
    {
        "id": f"held/{i}",
        "kind": "math",
        "language": ("en", "th")[i % 2],
        "template": ("change", "stock")[i // 2 % 2],
        "prompt": [{"role": "user", "content": QUESTION}],
        "answer": "1",
    }
    for i in range(8)
]
TEXTS = {"fast": "\\boxed{1}", "deep": "<think>\n<i>1 x 1</i> = 1\n</think>\n\\boxed{1}"}
RIGHT = {"fast": 1, "deep": 3}  # of the four samples of a prompt of `stock`; all of one of `change` in deep mode


def write_stage(root: Path, name: str, config: dict[str, Any], metrics: dict[str, Any]) -> None:
    folder = root / "runs" / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "resolved_config.yaml").write_text(yaml.safe_dump({"output_dir": str(folder), **config}))
    (folder / "run.json").write_text(json.dumps({"job": "alignment.evaluate", "seconds": 2.0}))
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder / "DONE").write_text("now\n")


def write_mode(folder: Path, mode: str) -> dict[str, float | int]:
    """Four graded samples of each prompt. Returns the metrics, `obeys` of one half among them."""
    with writing(folder / "graded.parquet") as write:
        for prompt in PROMPTS:
            right = 4 if prompt["template"] == "change" and mode == "deep" else RIGHT[mode]
            verdicts = ["correct"] * right + ["wrong"] * (4 - right)
            write(
                GradedSample(str(prompt["id"]), i, TEXTS[mode], [1] * len(TEXTS[mode]), "stop", -1.0, "1", verdict)
                for i, verdict in enumerate(verdicts)
            )
    write_rows(folder / "by_prompt.jsonl", by_prompt(folder / "graded.parquet", PROMPTS))
    found = summarize(folder) | mean_interval([0.0, 1.0] * 4).as_metrics("obeys")
    return {f"{mode}.{key}": value for key, value in found.items()}


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    """An evaluation without the switch, then one of both modes."""
    held_out = tmp_path / "held_out.jsonl"
    write_rows(held_out, PROMPTS)
    (tmp_path / "runs").mkdir()
    folders = {mode: tmp_path / "runs" / "modes" / mode for mode in ("fast", "deep")}
    for folder in folders.values():
        folder.mkdir(parents=True)
    metrics = {key: value for mode, folder in folders.items() for key, value in write_mode(folder, mode).items()}
    rates = [[pass_rate(row) for row in read_rows(folder / "by_prompt.jsonl")] for folder in folders.values()]
    metrics |= paired_interval(*rates).as_metrics("thinking.change")
    write_stage(tmp_path, "evaluate", {"modes": []}, {"pass_at_1": 0.25, "pass_at_1.prompts": 8})
    write_stage(tmp_path, "modes", {"modes": ["fast", "deep"], "prompts": str(held_out)}, metrics)
    stages = []
    for name in ("evaluate", "modes"):
        config = tmp_path / f"{name}.yaml"
        config.write_text(f"output_dir: {tmp_path / 'runs' / name}\n")
        stages.append({"name": name, "job": "alignment.evaluate", "config": str(config)})
    path = tmp_path / "demo.yaml"
    path.write_text(yaml.safe_dump({"output_dir": str(tmp_path / "runs"), "stages": stages}))
    return path


def numbers_of(pipeline: Path) -> dict[str, float]:
    return sources.flat(sources.gather(collect(pipeline)))


def test_numbers_of_the_modes_by_hand(pipeline: Path) -> None:
    """Fast is right in 1 of 4; deep in 4 of 4 for half of the prompts and in 3 of 4 for the others."""
    found = numbers_of(pipeline)
    expected = {
        "modes.fast.pass_at_1": 0.25,
        "modes.deep.pass_at_1": 0.875,
        "modes.fast.obeys": 0.5,
        "modes.deep.obeys": 0.5,
        "modes.fast.tokens": len(TEXTS["fast"]),
        "modes.deep.tokens": len(TEXTS["deep"]),
        "modes.change": 0.625,
    }
    assert {key: found[key] for key in expected} == pytest.approx(expected)
    half = 2.3646242510103 * math.sqrt(8 * 0.125**2 / 7 / 8)  # Student's t of seven degrees of freedom
    assert (found["modes.change.low"], found["modes.change.high"]) == pytest.approx((0.625 - half, 0.625 + half))
    assert found["pass_at_1.sft"] == 0.25 and found["pass_at_1.prompts"] == 8, "those of the evaluation without modes"
    assert "pass_at_1.modes" not in found


def test_summary_states_them(pipeline: Path) -> None:
    rows = {row.measure: row.value for row in report.summary_rows(pipeline)}
    assert rows == {
        "pass@1 after SFT": "25.0%",
        "pass@1, thinking off": "25.0%",
        "obeys, thinking off": "50.0%",
        "pass@1, thinking on": "87.5%",
        "obeys, thinking on": "50.0%",
    }


def collected_section(collected: Collected) -> Any:
    (section,) = modes.sections(collected)
    assert section.title == "Thinking"
    return section


def test_section_shows_both_modes_by_template_and_side_by_side(pipeline: Path) -> None:
    section = collected_section(collect(pipeline))
    table = section.blocks[0]
    assert isinstance(table, Table)
    assert [[row[0], row[1][:5], row[2][:5], row[3], row[4]] for row in table.rows] == [
        ["thinking off", "25.0%", "50.0%", "9", "0"],
        ["thinking on", "87.5%", "50.0%", "43", "0"],
    ]
    assert table.caption == "Thinking changes pass@1 by +62.5 points (+51.3 to +73.7), paired by prompt."
    by_template = [block for block in section.blocks if isinstance(block, Table) and block.columns[0] == "template"]
    assert [[cell[:5] for cell in row] for row in by_template[0].rows] == [
        ["chang", "25.0%", "100.0"],
        ["stock", "25.0%", "75.0%"],
    ]
    assert sum(isinstance(block, Figure) for block in section.blocks) == 2, "by template and by language"
    comparisons = [block for block in section.blocks if isinstance(block, Comparison)]
    assert comparisons[0].prompt == QUESTION
    assert [(a.model, a.text) for a in comparisons[0].answers] == [
        ("thinking off", TEXTS["fast"]),
        ("thinking on", TEXTS["deep"]),
    ]


def test_modes_that_were_not_evaluated_yet(pipeline: Path) -> None:
    run = pipeline.parent / "runs" / "modes"
    for name in ("metrics.json", "DONE"):
        (run / name).unlink()
    (note,) = collected_section(collect(pipeline)).blocks
    assert isinstance(note, Note) and "Stage modes is unfinished" in note.text
    assert not [key for key in numbers_of(pipeline) if key.startswith("modes.")]
