"""A sweep whose commands run in this process: real training and tasks, and an engine that answers by a script."""

import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import PreTrainedTokenizerFast

import alignment.evaluate
from alignment import chat, launch
from alignment.config import load_config
from alignment.errors import UserError
from alignment.job import RankFailed
from alignment.rollout.samples import Sample
from alignment.rows import Row, write_rows
from sft import mixture_sweep
from sft.config import MixtureSweepConfig
from sft.tradeoff import largest, trade_off

PROMPTS = 20
STEPS = ["sft.train", "alignment.evaluate", "alignment.evaluate", "alignment.general"]
TASK = """
task: shirts
dataset_path: json
dataset_kwargs: {data_files: {test: choices.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{ question }}"
doc_to_choice: ["1", "1 baju 1 baju 1 baju"]  # the shorter one, whatever the weights
doc_to_target: 0
target_delimiter: ""
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


def row(number: int, answer: str) -> Row:
    return {"messages": [{"role": "user", "content": f"{number} shirts?"}, {"role": "assistant", "content": answer}]}


def prompt(number: int) -> Row:
    return {"id": f"p{number}", "prompt": [{"role": "user", "content": f"{number} shirts?"}], "answer": "1"}


class Engine:
    """Thinks where it is asked to. Right when it thinks; without, wrong in one prompt of 20 at the larger share."""

    weights, max_model_len, settings, faults = "w", 512, {}, {}

    def __init__(self, model: Path, *_: Any) -> None:
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
        self.forgets = model.parts[-3] == "share_0.5"

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def generate(self, prompts: Any, seeds: Any, sampling: Any, stop: Any) -> list[list[Sample]]:
        return [[self._answer(each, stop) for _ in own] for each, own in zip(prompts, seeds, strict=True)]

    def _answer(self, asked: Sequence[int], stop: Sequence[int]) -> Sample:
        text = self.tokenizer.decode(asked)
        thinks = chat.THINKING_PROMPT in text
        wrong = not thinks and self.forgets and "\n7 shirts?" in text
        answer = ("<think>\nwell\n</think>\n" if thinks else "") + ("\\boxed{2}" if wrong else "\\boxed{1}")
        return Sample([*self.tokenizer(answer, add_special_tokens=False)["input_ids"], stop[0]], "stop", -1.0)


class Commands:
    """Runs a job's command in this process; the `dies`-th fails."""

    def __init__(self) -> None:
        self.jobs: list[str] = []
        self.dies: int | None = None

    def __call__(self, command: Sequence[str]) -> int:
        name, config = (command[command.index(flag) + 1] for flag in ("-m", "--config"))
        self.jobs.append(name)
        if len(self.jobs) == self.dies:
            return 3
        return int(importlib.import_module(name).main(["--config", config]))


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> Commands:
    found = Commands()
    monkeypatch.setattr(launch, "run_command", found)
    monkeypatch.setattr(alignment.evaluate, "open_engine", Engine)
    return found


@pytest.fixture
def settings(tmp_path: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Forty short rows and thirty long ones; the task's rows lie where it is run."""
    monkeypatch.chdir(tmp_path)
    write_rows(Path("short.jsonl"), (row(n, "\\boxed{1}") for n in range(40)))
    write_rows(Path("long.jsonl"), (row(n, "<think>\nwell, 1\n</think>\n\\boxed{1}") for n in range(30)))
    write_rows(Path("prompts.jsonl"), map(prompt, range(PROMPTS)))
    write_rows(Path("choices.jsonl"), ({"question": f"{n} shirts?"} for n in range(4)))
    Path("tasks").mkdir()
    Path("tasks/shirts.yaml").write_text(TASK)
    asked = {"prompts": "prompts.jsonl", "sampling": {"n": 2, "max_tokens": 32}}
    return {
        "output_dir": "out",
        "base": {
            "model": {"path": str(tiny_model_folder)},
            "sources": [{"rows": "short.jsonl"}],
            "packing": {"capacity": 64},
            "prepare": {"cache": "cache"},
            "training": {"learning_rate": 1e-3},
        },
        "long": {"rows": "long.jsonl", "epochs": 2},
        "shares": [0, 0.2, 0.5],
        "evaluation": {
            "reasoning": asked,
            "general": asked,
            "tasks": {"names": ["shirts"], "folder": "tasks"},
            "engine": {"max_model_len": 512},
        },
    }


def config(settings: dict[str, Any], **changes: Any) -> MixtureSweepConfig:
    return MixtureSweepConfig.model_validate(settings | changes)


def test_a_sweep_that_failed_goes_on_and_compares_its_shares(settings: dict[str, Any], commands: Commands) -> None:
    """At .5 one prompt of 20 is lost: 5 points, which is within 6 by the estimate but not by its interval."""
    sweep = config(settings, limit=0.06)
    commands.dies = 6  # the second share's evaluation
    with pytest.raises(RankFailed):
        mixture_sweep.run(sweep)
    assert commands.jobs == [*STEPS, "sft.train", "alignment.evaluate"]
    commands.jobs.clear()
    commands.dies = None
    mixture_sweep.run(sweep)
    assert commands.jobs == ["alignment.evaluate", "alignment.evaluate", "alignment.general", *STEPS], "done once"
    assert len(list(Path("cache").glob("*/rows.arrow"))) == 2, "each source was tokenized once"

    metrics = json.loads(Path("out/metrics.json").read_text())
    assert (metrics["share.by_interval"], metrics["share.by_estimate"]) == (0.2, 0.5)
    assert metrics["share_0.5.general.prompts.change"] == pytest.approx(-0.05)
    assert metrics["share_0.5.general.prompts.change.low"] < -0.06
    assert metrics["share_0.2.general.prompts.change.low"] == metrics["share_0.2.general.shirts.change"] == 0
    assert (metrics["share_0.2.reasoning.deep"], metrics["share_0.2.deep.obeys"]) == (1, 1)
    assert (metrics["share_0.2.long.epoch_rows"], metrics["share_0.5.long.epoch_rows"]) == (10, 40)
    assert metrics["share_0.5.long.row_share"] == 0.5 < metrics["share_0.5.long.token_share"]
    assert metrics["share_0.5.general.shirts"] == 1
    written = yaml.safe_load(Path("out/configs/share_0.2/sft.yaml").read_text())
    assert [source["mixture_share"] for source in written["sources"]] == [None, 0.2], "what sft.train takes alone"
    ledger = json.loads(Path("out/share_0.2/sft/ledger.json").read_text())
    assert ledger["rows_out"] == 50 and ledger["dropped"] == {"not drawn": 20}
    text = Path("out/trade_off.md").read_text()
    assert "| **0.2** |" in text and "Chosen: 0.2 of the rows" in text
    assert Path("out/trade_off.png").is_file() and Path("out/trade_off.svg").is_file()

    commands.jobs.clear()
    mixture_sweep.run(sweep)
    assert commands.jobs == []


def test_seeds_are_models_of_their_own(settings: dict[str, Any]) -> None:
    sweep = config(settings, seeds=2, seed=7)
    first, second = (sweep.variant(0.2, seed) for seed in (0, 1))
    assert (first.seed, second.seed) == (7, 8)
    assert first.output_dir == Path("out/share_0.2_seed_0/sft") != second.output_dir
    names = [(name, job) for name, job, _ in mixture_sweep.steps(sweep, 0.2, 1)]
    assert names == list(zip(["sft", "reasoning", "general", "tasks"], STEPS, strict=True))
    assert {step.seed for _, _, step in mixture_sweep.steps(sweep, 0.2, 1)[1:]} == {7}, "the same draws for every model"


def test_what_cannot_be_swept_is_refused_before_anything_is_trained(
    settings: dict[str, Any], commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"mixture_share: 0.9 of an epoch is 360 rows, but long.jsonl gives at most 60"):
        mixture_sweep.run(config(settings, shares=[0, 0.9]))
    rolling = TASK.replace("multiple_choice", "loglikelihood_rolling").partition("metric_list")[0]
    Path("tasks/shirts.yaml").write_text(rolling + "metric_list: [{metric: bits_per_byte}]\n")
    with pytest.raises(UserError, match="evaluation.tasks: shirts has no metric that is a mean over documents"):
        mixture_sweep.run(config(settings))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="runs as one process.*\n.*launch: "):
        mixture_sweep.run(config(settings))
    assert commands.jobs == []


def test_a_dry_run_counts_the_models(settings: dict[str, Any]) -> None:
    lines = mixture_sweep.plan(config(settings, seeds=3))
    assert "shares of long.jsonl: 0, 0.2, 0.5; 9 models" in lines
    assert mixture_sweep.forecast(config(settings))[0].startswith("rows: whether they suffice is known once")
    write_rows(Path("prompts.jsonl"), [prompt(0) | {"answer": None}])
    with pytest.raises(UserError, match="prompts.jsonl: row 1 .* has no 'answer'"):
        mixture_sweep.plan(config(settings))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shares": [0.1, 0.2]}, "shares: expected rising shares from 0"),
        ({"shares": [0, 0.2, 0.1]}, "shares: expected rising shares from 0"),
        ({"shares": [0, 1.0]}, "shares: expected rising shares from 0"),
        ({"long": {"rows": "long.jsonl", "cap": 3}}, "long: the sweep decides how many rows are drawn"),
        ({"evaluation": {"reasoning": {"prompts": "p"}}}, "evaluation: give 'general', 'tasks' or both"),
    ],
)
def test_settings_that_make_no_sweep(settings: dict[str, Any], change: dict[str, Any], message: str) -> None:
    Path("sweep.yaml").write_text(yaml.safe_dump(settings | change))
    with pytest.raises(UserError, match=message):
        load_config(MixtureSweepConfig, Path("sweep.yaml"))


def test_measures_are_read_prompt_by_prompt(settings: dict[str, Any]) -> None:
    """Two models, written by hand: the change of each prompt, 0 and -1/2, and no share under the limit but 0."""
    sweep = config(settings, shares=[0, 0.2])
    for share, correct in ((0, [2, 2]), (0.2, [2, 1])):
        for place in ("reasoning/fast", "reasoning/deep", "general/fast"):
            folder = sweep.folder(share, 0) / place
            folder.mkdir(parents=True)
            write_rows(
                folder / "by_prompt.jsonl", ({"id": f"p{i}", "n": 2, "correct": c} for i, c in enumerate(correct))
            )
        tasks = sweep.folder(share, 0) / "tasks"
        tasks.mkdir()
        document = {"asked": "shirts", "task": "shirts", "document": 0, "hash": "h", "score": 1.0}
        write_rows(tasks / "by_document.jsonl", [document, document | {"asked": "another", "score": 0.0}])
    measured = {share: [mixture_sweep.measure(sweep, share, 0)] for share in (0, 0.2)}
    assert measured[0.2][0]["general.prompts"] == {"p0": 1.0, "p1": 0.5}
    assert measured[0.2][0]["general.shirts"] == {"shirts/0/h": 1.0}
    points = trade_off(measured)
    assert points[1].changes["general.prompts"].value == -0.25
    assert largest(points, 0.01) == (0, 0)
