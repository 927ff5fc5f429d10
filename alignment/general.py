"""General ability: tasks of lm-eval (EleutherAI's evaluation harness), defined on local files or on the hub.

    python -m alignment.general --config configs/general/demo.yaml

Writes by_document.jsonl, each document's metrics, by which two models are paired, and results.json, lm-eval's own
account of the tasks: their definitions, versions, numbers of examples and documents.
"""

import logging
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import yaml
from transformers import set_seed
from transformers.utils.logging import tqdm

from alignment import atomic, job, models
from alignment.config import JobConfig, ModelConfig, TasksConfig
from alignment.errors import UserError, did_you_mean
from alignment.rows import Row, local_inputs, read_rows, write_rows
from alignment.stats import mean_interval

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

DRAWS = 1000  # of the bootstrap, which lm-eval takes for the standard error of what is no mean


class GeneralConfig(JobConfig):
    """Measure a model by tasks of lm-eval."""

    model: str
    dtype: Literal["float32", "bfloat16"] = "float32"
    tasks: TasksConfig


def run(config: GeneralConfig) -> None:
    inputs = [*local_inputs(config.model), *task_inputs(config.tasks)]
    with job.Job.open("alignment.general", config, inputs) as this:
        if this.done:
            return
        loaded = load_tasks(config.tasks, config.seed)
        results = _evaluate(config, loaded)
        write_rows(this.dir / "by_document.jsonl", by_document(loaded, results["samples"]))
        atomic.write_json(this.dir / "results.json", {k: _plain(v) for k, v in results.items() if k != "samples"})
        this.finish(summarize(results))


def task_inputs(tasks: TasksConfig) -> list[Path]:
    """The task files, and the local files that the tasks named in the config read."""
    if tasks.folder is None:
        return []
    index = _manager(tasks.folder, tuple(tasks.names)).task_index
    definitions = [index[name].cfg or {} for name in tasks.names]
    files = [(definition.get("dataset_kwargs") or {}).get("data_files") for definition in definitions]
    return [tasks.folder, *sorted({Path(name) for each in files for name in _leaves(each)})]


def _leaves(files: Any) -> Iterator[str]:
    """The names in what `datasets` takes as data_files: a name, a list, or lists and names by split. No patterns."""
    match files:
        case str():
            yield from [files] if not set("*?[") & set(files) and "://" not in files else []
        case list():
            yield from (name for each in files for name in _leaves(each))
        case dict():
            yield from (name for each in files.values() for name in _leaves(each))


@lru_cache
def _manager(folder: Path | None, names: tuple[str, ...]) -> "TaskManager":
    """lm-eval's index of task files. That of its own 14,000 tasks takes seconds, so it is left out where it can be.

    Raises:
        UserError: no such folder, a file that is no task, a name that is no task's.
    """
    from lm_eval.tasks import TaskManager

    if folder is not None:
        _check_files(folder)
        manager = TaskManager(include_path=folder, include_defaults=False)
        if all(name in manager.all_subtasks for name in names):
            return manager
    manager = TaskManager(include_path=folder)
    for name in names:
        if name not in manager.task_index:
            where = f"lm-eval and {folder} have" if folder else "lm-eval has"
            raise UserError(
                f"tasks.names: {where} no task, group or tag {name!r}{did_you_mean(name, manager.all_tasks)}"
            )
    return manager


def _check_files(folder: Path) -> None:
    """lm-eval passes over a file that it cannot read."""
    from lm_eval.tasks._yaml_loader import load_yaml

    if not folder.is_dir():
        raise UserError(f"tasks.folder: {folder}: no such folder")
    for path in sorted(folder.glob("**/*.yaml")):
        try:
            load_yaml(path, resolve_func=False)
        except (yaml.YAMLError, OSError, ValueError) as error:
            raise UserError(f"{path}: not a task file of lm-eval: {str(error).splitlines()[0]}") from None


def load_tasks(tasks: TasksConfig, seed: int = 0) -> dict[str, Any]:
    """lm-eval's tasks with their documents, as `TaskManager.load` gives them: `tasks` by name, `groups`, `group_map`.

    Raises:
        UserError: documents that are not there, or a task that cannot be built.
    """
    from datasets.exceptions import DatasetsError

    manager = _manager(tasks.folder, tuple(tasks.names))
    _quiet()
    try:
        loaded: dict[str, Any] = dict(manager.load(list(tasks.names)))
    except (OSError, ValueError, DatasetsError) as error:
        raise UserError(f"tasks.names: {', '.join(tasks.names)} cannot be loaded: {_first_line(error)}") from None
    for task in loaded["tasks"].values():
        own = task.get_config("num_fewshot")
        if own is None or (tasks.fewshot is not None and own != 0):  # 0 is a task's word that it takes none
            task.set_config(key="num_fewshot", value=tasks.fewshot or 0)
        task.set_fewshot_seed(seed=seed)
    loaded["asked"] = {name: _members(name, loaded, manager) for name in tasks.names}
    return loaded


def _members(name: str, loaded: Mapping[str, Any], manager: "TaskManager") -> list[str]:
    """The tasks of a group or tag; a task is its own."""
    if name in loaded["tasks"]:
        return [name]
    if name in loaded["groups"]:
        return [task.task_name for task in loaded["groups"][name].get_all_tasks()]
    return sorted(manager.task_index[name].tags)


def score_metric(task: Any) -> str | None:
    """The metric that stands for a task: its first that is a mean over documents and better where it is higher."""
    from lm_eval.api.metrics import mean

    better = task.higher_is_better()
    return next((name for name, how in task.aggregation().items() if how is mean and better.get(name)), None)


def _evaluate(config: GeneralConfig, loaded: Mapping[str, Any]) -> dict[str, Any]:
    from lm_eval import evaluate
    from lm_eval.models.huggingface import HFLM

    source = ModelConfig(path=config.model, dtype=config.dtype)
    tokenizer = models.load_tokenizer(source)
    if config.tasks.chat_template and tokenizer.chat_template is None:
        raise UserError(f"{config.model}: the tokenizer has no chat template; set tasks.chat_template: false")
    placed = {"device_map": "auto"} if torch.cuda.is_available() else {}
    model = models.load_model(source, tokenizer, seed=config.seed, **placed)
    set_seed(config.seed)
    return evaluate(
        HFLM(pretrained=model, tokenizer=tokenizer, batch_size=config.tasks.batch_size, enable_thinking=False),
        task_dict={key: loaded[key] for key in ("tasks", "groups", "group_map")},
        limit=config.tasks.limit,
        bootstrap_iters=DRAWS,
        apply_chat_template=config.tasks.chat_template,
        fewshot_as_multiturn=config.tasks.chat_template,
    )


def by_document(loaded: Mapping[str, Any], samples: Mapping[str, Sequence[Row]]) -> Iterator[Row]:
    """One row for each document, and each of a task's filters: the metrics that are numbers.

    `score` is the one that stands for the task (`score_metric`), of its first filter; `asked` is the config's name.
    """
    for asked, members in loaded["asked"].items():
        for name in members:
            metric = score_metric(loaded["tasks"][name])
            first = samples[name][0]["filter"]
            for sample in samples[name]:
                row = {"asked": asked, "task": name, "document": sample["doc_id"], "hash": sample["doc_hash"]}
                values = {key: float(sample[key]) for key in sample["metrics"] if isinstance(sample[key], Real)}
                score = {"score": values[metric]} if metric in values and sample["filter"] == first else {}
                yield row | {"filter": sample["filter"], "metrics": values} | score


def scores(folder: Path, asked: str) -> dict[str, float]:
    """The score of every document of a task, group or tag in a finished run's folder."""
    rows = (row for row in read_rows(folder / "by_document.jsonl") if row["asked"] == asked and "score" in row)
    return {f"{row['task']}/{row['document']}/{row['hash']}": row["score"] for row in rows}


def summarize(results: Mapping[str, Any]) -> dict[str, float | int]:
    """`TASK.METRIC` (`TASK.METRIC.FILTER` where a task has filters) with lm-eval's standard error as `.stderr`.

    Of a mean over documents also Student's 95% interval; what is no mean, as a perplexity, has none.
    """
    metrics: dict[str, float | int] = {}
    for name, found in results["results"].items():
        for key, value in found.items():
            metric, comma, filtered = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, Real):
                continue
            place = f"{name}.{metric}" + ("" if filtered == "none" else f".{filtered}")
            metrics[place] = float(value)
            error = found.get(f"{metric}_stderr,{filtered}")
            metrics |= {f"{place}.stderr": float(error)} if isinstance(error, Real) else {}
            values = [s[metric] for s in results["samples"].get(name, []) if s["filter"] == filtered and metric in s]
            if (
                values
                and all(isinstance(each, Real) for each in values)
                and math.isclose(sum(values) / len(values), value)
            ):
                interval = mean_interval(values)
                metrics |= {f"{place}.low": interval.low, f"{place}.high": interval.high}
        if name in results["n-samples"]:
            metrics[f"{name}.documents"] = int(results["n-samples"][name]["effective"])
    return metrics


def _plain(value: Any) -> Any:
    """As JSON: a task's definition holds functions, of which the name stays."""
    match value:
        case dict():
            return {str(key): _plain(each) for key, each in value.items()}
        case list() | tuple():
            return [_plain(each) for each in value]
        case str() | bool() | int() | float() | None:
            return value
        case _:
            return str(value)


def _quiet() -> None:
    """No advice on Python's use, and no progress bars where nobody watches.

    lm-eval has no switch for its own bars, so they become those of transformers, which alignment.models switches off.
    """
    import datasets
    import lm_eval.api.model
    import lm_eval.api.task
    import lm_eval.models.huggingface

    logging.getLogger("lm_eval.models.huggingface").setLevel(logging.ERROR)
    lm_eval.api.model.tqdm = lm_eval.api.task.tqdm = lm_eval.models.huggingface.tqdm = tqdm
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def plan(config: GeneralConfig) -> list[str]:
    models.check_model(ModelConfig(path=config.model))
    manager = _manager(config.tasks.folder, tuple(config.tasks.names))
    for path in task_inputs(config.tasks):
        if not path.exists():
            raise UserError(f"{path}: no such file, which a task of {config.tasks.folder} reads")
    most = f", {config.tasks.limit} documents of each at most" if config.tasks.limit else ""
    kinds = [f"{name} ({str(manager.task_index[name].kind.name).lower()})" for name in config.tasks.names]
    return [f"lm-eval: {', '.join(kinds)}{most}, from {config.model}"]


def main(argv: Sequence[str] | None = None) -> int:
    return job.main(GeneralConfig, run, plan, argv)


if __name__ == "__main__":
    raise SystemExit(main())
