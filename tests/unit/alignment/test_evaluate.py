"""pass@1 and its groups, by hand."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerFast

from alignment import chat
from alignment.config import EngineConfig, SamplingConfig
from alignment.errors import UserError
from alignment.evaluate import by_prompt, check_room, evaluate, evaluate_modes, read_prompts, summarize
from alignment.grading import SCHEMA, GradedSample
from alignment.rollout.samples import Sample
from alignment.rows import read_rows, write_rows


def prompt(name: str, language: str, template: str | None) -> dict[str, Any]:
    head = {"id": name, "language": language, "prompt": [{"role": "user", "content": "?"}], "answer": "1"}
    return head | ({} if template is None else {"template": template})


def samples(name: str, verdicts: Sequence[str], tokens: int, cut: int = 0) -> list[GradedSample]:
    """The first `cut` samples ended at the limit."""
    return [
        GradedSample(name, i, "", [7] * tokens, "length" if i < cut else "stop", 0.0, None, verdict)
        for i, verdict in enumerate(verdicts)
    ]


PROMPTS = [prompt("a", "en", "stock"), prompt("b", "vi", "stock"), prompt("c", "vi", None)]
GRADED = [
    *samples("a", ["correct"] * 4, tokens=10),
    *samples("b", ["correct", "wrong", "wrong", "no_answer"], tokens=20, cut=1),
    *samples("c", ["no_answer", "correct", "wrong", "correct"], tokens=30, cut=2),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    pq.write_table(pa.Table.from_pylist([asdict(s) for s in GRADED], SCHEMA), tmp_path / "graded.parquet")
    write_rows(tmp_path / "by_prompt.jsonl", by_prompt(tmp_path / "graded.parquet", PROMPTS))
    return tmp_path


def test_one_line_a_prompt(folder: Path) -> None:
    assert list(by_prompt(folder / "graded.parquet", PROMPTS))[1] == {
        "id": "b",
        "language": "vi",
        "template": "stock",
        "n": 4,
        "correct": 1,
        "tokens": 80,
        "truncated": 1,
        "verdicts": {"correct": 1, "wrong": 2, "no_answer": 1},
    }


def test_metrics_by_hand(folder: Path) -> None:
    """Rates 1, 1/4 and 1/2; Student's t of two degrees of freedom is 4.3027. Groups are means over their prompts."""
    metrics = summarize(folder)
    mean = (1 + 0.25 + 0.5) / 3
    spread = (((1 - mean) ** 2 + (0.25 - mean) ** 2 + (0.5 - mean) ** 2) / 2) ** 0.5
    half = 4.302652729911275 * spread / 3**0.5
    expected = {
        "pass_at_1": mean,
        "pass_at_1.low": mean - half,
        "pass_at_1.high": mean + half,
        "pass_at_1.prompts": 3,
        "samples": 12,
        "pass_at_1.language.en": 1.0,
        "pass_at_1.language.vi": 0.375,
        "pass_at_1.template.stock": 0.625,
        "verdict.correct": 7,
        "verdict.no_answer": 2,
        "verdict.wrong": 3,
        "alarm.timeout": 0,
        "alarm.error": 0,
        "alarm.no_answer": 0,  # 2 of 12
        "tokens.mean": 20.0,
        "truncated": 3,
    }
    assert metrics == pytest.approx(expected, abs=1e-9)


class Silent:
    """Answers nothing, after some trouble with its servers."""

    weights, max_model_len, settings = "w", 128, {}
    faults: ClassVar = {"429 http://a:1": 2}

    def generate(self, prompts: Any, seeds: Any, sampling: Any, stop: Any) -> list[list[Sample]]:
        return [[Sample([stop[0]], "stop", -1.0) for _ in own] for own in seeds]


def test_faults_of_servers_and_damaged_samples_are_counted(tiny_model_folder: Path, tmp_path: Path) -> None:
    def evaluated() -> dict[str, float | int]:
        sampling, settings = SamplingConfig(n=4, max_tokens=8), EngineConfig(max_model_len=128, chunk_prompts=2)
        return evaluate(Silent(), tiny_model_folder, PROMPTS, sampling, settings, 0, tmp_path)

    whole = evaluated()
    assert whole["faults.429 http://a:1"] == 2 and whole["samples.resampled"] == 0
    damaged = min(tmp_path.glob("samples/*/*.parquet"), key=lambda shard: shard.stat().st_size)  # of the last prompt
    damaged.write_bytes(damaged.read_bytes()[:50])
    assert evaluated() == whole | {"samples.resampled": 4}


def test_a_prompt_without_an_answer_cannot_be_evaluated(tmp_path: Path) -> None:
    unknown = {key: value for key, value in PROMPTS[1].items() if key != "answer"}
    write_rows(tmp_path / "prompts.jsonl", [PROMPTS[0], unknown])
    with pytest.raises(UserError, match=r"prompts.jsonl: row 2 \(b\) has no 'answer'"):
        read_prompts(str(tmp_path / "prompts.jsonl"))
    write_rows(tmp_path / "prompts.jsonl", PROMPTS)
    assert read_prompts(str(tmp_path / "prompts.jsonl")) == PROMPTS


def test_answers_must_leave_room_for_a_prompt() -> None:
    engine = EngineConfig(max_model_len=64)
    check_room(engine, SamplingConfig(max_tokens=63))
    with pytest.raises(UserError, match=r"sampling.max_tokens: 64 leaves no room .* engine.max_model_len 64"):
        check_room(engine, SamplingConfig(max_tokens=64))


class Switched:
    """Thinks and is right where the prompt holds the system prompt that asks for it; else says 2."""

    weights, max_model_len, settings, faults = "w", 512, {}, {}

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer

    def generate(self, prompts: Any, seeds: Any, sampling: Any, stop: Any) -> list[list[Sample]]:
        return [[self._answer(prompt, stop) for _ in own] for prompt, own in zip(prompts, seeds, strict=True)]

    def _answer(self, prompt: Sequence[int], stop: Sequence[int]) -> Sample:
        asked = chat.THINKING_PROMPT in self.tokenizer.decode(prompt)
        text = "<think>\nwell\n</think>\n\\boxed{1}" if asked else "\\boxed{2}"
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return Sample([*ids, stop[0]], "stop", -1.0)


def test_both_modes_and_what_thinking_changes(
    tiny_model_folder: Path, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    engine = Switched(tiny_tokenizer)
    arguments = (SamplingConfig(n=2, max_tokens=32), EngineConfig(max_model_len=512), 0)
    metrics = evaluate_modes(engine, tiny_model_folder, PROMPTS, *arguments, tmp_path, ["fast", "deep"])
    assert (metrics["fast.pass_at_1"], metrics["deep.pass_at_1"], metrics["thinking.change"]) == (0, 1, 1)
    assert metrics["fast.obeys"] == metrics["deep.obeys"] == 1
    assert metrics["deep.tokens.mean"] > metrics["fast.tokens.mean"]
    assert [len(list(read_rows(tmp_path / mode / "by_prompt.jsonl"))) for mode in ("fast", "deep")] == [3, 3]
    alone = evaluate_modes(engine, tiny_model_folder, PROMPTS, *arguments, tmp_path / "alone", ["deep"])
    assert alone == {key: value for key, value in metrics.items() if key.startswith("deep.")}
