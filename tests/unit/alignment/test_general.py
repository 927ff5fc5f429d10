"""lm-eval's tasks on local files: the scores against log-likelihoods worked out here, and mistakes in tasks."""

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import lm_eval.tasks
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from alignment import general
from alignment.config import TasksConfig
from alignment.errors import UserError
from alignment.general import GeneralConfig, by_document, scores, summarize
from alignment.rows import Row, read_rows, write_rows
from data_builders import synthesize
from data_builders.config import SynthesizeConfig

ROOT = Path(__file__).parents[3]

QUESTIONS = 24
CHOICES = ("1", "2", "4", "5")  # as long as each other, so that what stands before decides
PRICES = """
task: prices
dataset_path: json
dataset_kwargs: {data_files: {test: prices.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{ question }}"
doc_to_choice: "{{ choices }}"
doc_to_target: 0
target_delimiter: ""
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A task of a few questions, where it is run, and lm-eval without its own tasks, which take seconds to list."""
    monkeypatch.chdir(tmp_path)
    manager = partial(lm_eval.tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", lambda include_path, **_: manager(include_path=include_path))
    rows = [{"question": f"{n} shirts?", "choices": CHOICES[n % 4 :] + CHOICES[: n % 4]} for n in range(QUESTIONS)]
    write_rows(Path("prices.jsonl"), rows)
    Path("tasks").mkdir()
    Path("tasks/prices.yaml").write_text(PRICES)
    general._manager.cache_clear()
    return tmp_path


def config(model: Path, **changes: Any) -> GeneralConfig:
    tasks = {"names": ["prices"], "folder": "tasks", "batch_size": 3} | changes
    return GeneralConfig.model_validate({"output_dir": "out", "model": str(model), "tasks": tasks})


def chosen(folder: Path, tokenizer: PreTrainedTokenizerFast, rows: list[Row], **options: bool | None) -> list[float]:
    """Whether the first answer is the likeliest, answer by answer, with transformers alone; no options: no template."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    for row in rows:
        turn = [{"role": "user", "content": row["question"]}]
        text = row["question"]
        if options:
            text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True, **options)
        logps = [likelihood(model, tokenizer, text, choice) for choice in row["choices"]]
        found.append(float(logps[0] == max(logps)))
    return found


def likelihood(model: Any, tokenizer: PreTrainedTokenizerFast, text: str, choice: str) -> float:
    prompt, ids = (tokenizer(each, add_special_tokens=False)["input_ids"] for each in (text, text + choice))
    with torch.no_grad():
        logps_TV = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(float(logps_TV[at - 1, ids[at]]) for at in range(len(prompt), len(ids)))


def test_choices_are_scored_as_transformers_scores_them(
    folder: Path, tiny_model_folder: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    general.run(config(tiny_model_folder))
    rows = list(read_rows(Path("prices.jsonl")))
    expected = chosen(tiny_model_folder, tiny_tokenizer, rows, enable_thinking=False)
    assert expected != chosen(tiny_model_folder, tiny_tokenizer, rows), "the template matters here"
    assert expected != chosen(tiny_model_folder, tiny_tokenizer, rows, enable_thinking=True), "so does its switch"
    documents = list(read_rows(Path("out/by_document.jsonl")))
    assert [document["score"] for document in documents] == expected
    assert [document["metrics"] for document in documents] == [{"acc": value} for value in expected]
    assert list(scores(Path("out"), "prices").values()) == expected and scores(Path("out"), "other") == {}
    metrics = json.loads(Path("out/metrics.json").read_text())
    assert metrics["prices.acc"] == pytest.approx(sum(expected) / len(rows))
    assert metrics["prices.acc.low"] < metrics["prices.acc"] - metrics["prices.acc.stderr"] < metrics["prices.acc"]
    assert metrics["prices.documents"] == len(rows)
    assert json.loads(Path("out/results.json").read_text())["configs"]["prices"]["output_type"] == "multiple_choice"

    general.run(config(tiny_model_folder))  # done: it returns at once
    with Path("prices.jsonl").open("a") as file:
        file.write(json.dumps({"question": "?", "choices": CHOICES}) + "\n")
    with pytest.raises(UserError, match="inputs have changed since this run began: prices.jsonl"):
        general.run(config(tiny_model_folder))


def test_a_misspelt_task_is_named_with_the_nearest(folder: Path, tiny_model_folder: Path) -> None:
    with pytest.raises(UserError, match="lm-eval and tasks have no task, group or tag 'price'; did you mean 'prices'?"):
        general.plan(config(tiny_model_folder, names=["price"]))
    assert general.plan(config(tiny_model_folder, limit=5)) == [
        f"lm-eval: prices (task), 5 documents of each at most, from {tiny_model_folder}"
    ]


def test_what_keeps_a_task_from_being_loaded(folder: Path, tiny_model_folder: Path) -> None:
    Path("prices.jsonl").unlink()
    with pytest.raises(UserError, match="prices.jsonl: no such file, which a task of tasks reads"):
        general.plan(config(tiny_model_folder))
    with pytest.raises(UserError, match="tasks.names: prices cannot be loaded: .*prices.jsonl"):
        general.load_tasks(TasksConfig(names=["prices"], folder=Path("tasks")))
    Path("tasks/broken.yaml").write_text("task: [\n")
    general._manager.cache_clear()
    with pytest.raises(UserError, match="tasks/broken.yaml: not a task file of lm-eval: "):
        general.plan(config(tiny_model_folder))
    with pytest.raises(UserError, match="tasks.folder: nowhere: no such folder"):
        general.plan(config(tiny_model_folder, folder="nowhere"))


def test_examples_are_those_asked_for_unless_the_task_takes_none(folder: Path) -> None:
    """The config's number goes before the task's own; 0 in a task file stays 0."""
    for name, line in (("two", "num_fewshot: 2"), ("none", "num_fewshot: 0"), ("open", "")):
        Path(f"tasks/{name}.yaml").write_text(PRICES.replace("task: prices", f"task: {name}") + line)
    names = ["two", "none", "open"]

    def examples(**changes: int) -> list[int]:
        loaded = general.load_tasks(TasksConfig(names=names, folder=Path("tasks"), **changes))
        return [loaded["tasks"][name].get_config("num_fewshot") for name in names]

    assert (examples(), examples(fewshot=3)) == ([2, 0, 0], [3, 0, 3])


def test_the_demos_task_offers_the_right_working_and_two_wrong_ones(folder: Path) -> None:
    """Every language and template: alike but for the result's first digit, wherever the result stands."""
    counts = {"short_rows": 8, "direct_rows": 8, "long_rows": 8, "reward_prompts": 8, "prompts": 8, "held_out": 64}
    synthesize.run(SynthesizeConfig(output_dir=Path("runs/demo/data"), **counts))
    tasks = TasksConfig(names=["demo_worked"], folder=ROOT / "configs" / "general" / "tasks")
    task = general.load_tasks(tasks)["tasks"]["demo_worked"]
    worked = list(read_rows(Path("runs/demo/data/held_out_worked.jsonl")))
    asked = list(read_rows(Path("runs/demo/data/held_out.jsonl")))
    assert [row["id"] for row in worked] == [row["id"] for row in asked]
    for doc, row in zip(task.test_docs(), worked, strict=True):
        right, *wrong = task.doc_to_choice(doc)
        assert right == row["messages"][-1]["content"] and task.doc_to_target(doc) == 0
        result = re.search(r"boxed\{(.*?)\}", right)[1]
        others = [re.search(r"boxed\{(.*?)\}", choice)[1] for choice in wrong]
        assert len({result, *others}) == 3 and {other[1:] for other in others} == {result[1:]}
        assert wrong == [right.replace(result, other) for other in others]


class Task:
    """What is asked of lm-eval's tasks."""

    def __init__(self, **metrics: tuple[Any, bool]) -> None:
        self.metrics = metrics

    def aggregation(self) -> dict[str, Any]:
        return {name: how for name, (how, _) in self.metrics.items()}

    def higher_is_better(self) -> dict[str, bool]:
        return {name: better for name, (_, better) in self.metrics.items()}


def sample(document: int, filtered: str, **metrics: Any) -> dict[str, Any]:
    return {"doc_id": document, "doc_hash": f"h{document}", "filter": filtered, "metrics": list(metrics), **metrics}


def test_a_task_is_scored_by_its_first_mean_that_is_better_when_higher_and_its_first_filter() -> None:
    from lm_eval.api.metrics import bits_per_byte, bleu, mean

    task = Task(bleu=(bleu, True), wer=(mean, False), acc=(mean, True), f1=(mean, True))
    assert general.score_metric(task) == "acc"
    assert general.score_metric(Task(bits=(bits_per_byte, False))) is None
    samples = {
        "a": [sample(0, "strict", wer=1.0, acc=0.0, bleu=("a", "b")), sample(0, "loose", wer=1.0, acc=1.0)],
        "b": [sample(0, "none", acc=1.0)],
    }
    loaded = {"asked": {"both": ["a", "b"]}, "tasks": {"a": task, "b": Task(acc=(mean, True))}}
    strict, loose, other = by_document(loaded, samples)
    assert strict == {
        "asked": "both", "task": "a", "document": 0, "hash": "h0", "filter": "strict",
        "metrics": {"wer": 1.0, "acc": 0.0}, "score": 0.0,
    }  # fmt: skip
    assert "score" not in loose and other["score"] == 1.0


def test_metrics_by_hand() -> None:
    """A mean has an interval, 1/2 -+ 3.1824 sqrt(1/12); a perplexity has none; a group has lm-eval's standard error."""
    values = [0.0, 1.0, 1.0, 0.0]
    results = {
        "results": {
            "a": {"acc,strict": 0.5, "acc_stderr,strict": 0.28, "ppl,strict": 9.0, "ppl_stderr,strict": "N/A"},
            "g": {"alias": "g", "acc,none": 0.25, "acc_stderr,none": 0.1},
        },
        "samples": {"a": [sample(i, "strict", acc=value, ppl=(-1.0, 2)) for i, value in enumerate(values)]},
        "n-samples": {"a": {"original": 9, "effective": 4}},
    }
    half = 3.182446305 * (1 / 12) ** 0.5
    assert summarize(results) == pytest.approx(
        {
            "a.acc.strict": 0.5,
            "a.acc.strict.stderr": 0.28,
            "a.acc.strict.low": 0.5 - half,
            "a.acc.strict.high": 0.5 + half,
            "a.ppl.strict": 9.0,
            "a.documents": 4,
            "g.acc": 0.25,
            "g.acc.stderr": 0.1,
        },
        abs=1e-8,
    )
