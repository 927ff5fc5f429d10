"""Train a few shares of long answers, measure what they give to reasoning and cost elsewhere, and choose one.

    python -m sft.mixture_sweep --config configs/sft/mixture_sweep.yaml
    python -m sft.train --config runs/sft_mixture/configs/share_0.2/sft.yaml   # one of them, here or elsewhere

Every step is a job of its own in `output_dir/share_S`: `sft` (sft.train), `reasoning` in both modes and `general` in
the fast one (alignment.evaluate), `tasks` (alignment.general). It is resumed on its own, and not run again once it is
done, wherever that was. The rows are tokenized once, for all. `trade_off.md` and `trade_off.png` compare the shares.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from alignment import atomic, general, job, launch, models, training
from alignment.config import JobConfig
from alignment.errors import UserError
from alignment.evaluate import EvaluateConfig, check_room, pass_rate, read_prompts
from alignment.general import GeneralConfig
from alignment.rollout import place
from alignment.rows import first_rows, local_inputs, read_rows
from sft import train
from sft.config import MixtureSweepConfig, PromptsConfig
from sft.mixture import mix
from sft.prepare import cached_rows, prepare
from sft.tradeoff import Measured, as_metrics, conclusion, table, trade_off
from sft.tradeoff_picture import draw

Step = tuple[str, str, JobConfig]  # name, job, its config


def run(config: MixtureSweepConfig) -> None:
    """Train and measure what is not done yet.

    Raises:
        UserError: the sweep itself was launched on several ranks, or the rows do not suffice for a share.
        RankFailed: a step failed; its message stands above.
    """
    training.check_one_process("sft.mixture_sweep")
    with job.Job.open("sft.mixture_sweep", config, _inputs(config)) as this:
        if this.done:
            return
        _check_tasks(config)
        rows = prepare(config.variant(config.shares[-1], 0), models.load_tokenizer(config.base.model))
        mix(config.variant(config.shares[-1], 0), rows)  # refuses a share that the rows cannot give
        for share, seed in _runs(config):
            for step in steps(config, share, seed):
                _do(this.dir, step, config.launch)
        measured = {share: [measure(config, share, seed) for seed in range(config.seeds)] for share in config.shares}
        points = trade_off(measured)
        figures = {share: _figures(config, share) for share in config.shares}
        columns = {share: _columns(found) for share, found in figures.items()}
        text = "\n".join([table(points, columns, config.limit), *conclusion(points, measured, config.limit), ""])
        atomic.write_text(this.dir / "trade_off.md", text)
        draw(points, config.limit, this.dir / "trade_off")
        print(text)
        flat = {f"share_{share:g}.{key}": value for share, found in figures.items() for key, value in found.items()}
        this.finish(as_metrics(points, config.limit) | flat)


def _inputs(config: MixtureSweepConfig) -> list[Path]:
    base, evaluation = config.base, config.evaluation
    sources = [*(source.rows for source in base.sources), config.long.rows, evaluation.reasoning.prompts]
    optional = [base.model.path, base.model.tokenizer, evaluation.general.prompts if evaluation.general else None]
    tasks = general.task_inputs(evaluation.tasks) if evaluation.tasks is not None else []
    return [*local_inputs(*sources, *filter(None, optional)), *tasks]


def _check_tasks(config: MixtureSweepConfig) -> None:
    """A task that has no score of each document cannot be compared."""
    if config.evaluation.tasks is None:
        return
    for name, task in general.load_tasks(config.evaluation.tasks)["tasks"].items():
        if general.score_metric(task) is None:
            raise UserError(
                f"evaluation.tasks: {name} has no metric that is a mean over documents and better where higher"
            )


def _runs(config: MixtureSweepConfig) -> Iterator[tuple[float, int]]:
    """Share by share, so that a sweep that is cut short has whole models to compare."""
    return ((share, seed) for share in config.shares for seed in range(config.seeds))


def steps(config: MixtureSweepConfig, share: float, seed: int) -> list[Step]:
    """What is run for a model, in its order."""
    trained, folder, evaluation = config.variant(share, seed), config.folder(share, seed), config.evaluation
    common: dict[str, Any] = {"model": str(trained.output_dir / "model"), "dtype": trained.model.dtype}

    def evaluated(name: str, asked: PromptsConfig, modes: list[str]) -> Step:
        own = {"output_dir": folder / name, "seed": config.seed, "modes": modes, "engine": evaluation.engine}
        given = {"prompts": asked.prompts, "sampling": asked.sampling}
        return name, "alignment.evaluate", EvaluateConfig.model_validate(common | own | given)

    found: list[Step] = [("sft", "sft.train", trained), evaluated("reasoning", evaluation.reasoning, ["fast", "deep"])]
    if evaluation.general is not None:
        found.append(evaluated("general", evaluation.general, ["fast"]))
    if evaluation.tasks is not None:
        own = {"output_dir": folder / "tasks", "seed": config.seed, "tasks": evaluation.tasks}
        found.append(("tasks", "alignment.general", GeneralConfig.model_validate(common | own)))
    return found


def _do(folder: Path, step: Step, launcher: Path | None) -> None:
    """Run a step's job as a command, with its config as a file beside the runs."""
    name, module, config = step
    if (config.output_dir / "DONE").exists():
        return
    model = config.output_dir.parent.name
    path = folder / "configs" / model / f"{name}.yaml"
    atomic.write_text(path, config.as_yaml())
    print(f"sft.mixture_sweep: {model}, {module}", flush=True)
    launch.run_job(module, path, launcher if module == "sft.train" else None)


def measure(config: MixtureSweepConfig, share: float, seed: int) -> Measured:
    """What the steps of a model found, prompt by prompt."""
    folder, evaluation = config.folder(share, seed), config.evaluation
    found = {f"reasoning.{mode}": _rates(folder / "reasoning" / mode) for mode in ("fast", "deep")}
    if evaluation.general is not None:
        found["general.prompts"] = _rates(folder / "general" / "fast")
    for name in evaluation.tasks.names if evaluation.tasks is not None else []:
        found[f"general.{name}"] = general.scores(folder / "tasks", name)
    return found


def _rates(folder: Path) -> dict[str, float]:
    return {row["id"]: pass_rate(row) for row in read_rows(folder / "by_prompt.jsonl")}


def _figures(config: MixtureSweepConfig, share: float) -> dict[str, float]:
    """The share's rows and tokens, whether the modes obey, and the tokens they spend: means over seeds."""
    found = [_run_figures(config, share, seed) for seed in range(config.seeds)]
    return {key: sum(each[key] for each in found) / len(found) for key in found[0]}


def _run_figures(config: MixtureSweepConfig, share: float, seed: int) -> dict[str, float]:
    folder = config.folder(share, seed)
    sources = json.loads((folder / "sft" / "mixture.json").read_text(encoding="utf-8"))
    evaluated = json.loads((folder / "reasoning" / "metrics.json").read_text(encoding="utf-8"))
    drawn = sources[-1] if share else {}
    long = {f"long.{key}": drawn.get(key, 0) for key in ("epoch_rows", "row_share", "token_share")}
    asked = [f"{mode}.{key}" for key in ("obeys", "tokens.mean") for mode in ("fast", "deep")]
    return long | {key: evaluated[key] for key in asked}


def _columns(figures: Mapping[str, float]) -> dict[str, str]:
    """What the table shows of a share besides its measures."""
    return {
        "of the tokens": f"{figures['long.token_share']:.1%}",
        "obeys, fast": f"{figures['fast.obeys']:.1%}",
        "obeys, deep": f"{figures['deep.obeys']:.1%}",
        "tokens, fast": f"{figures['fast.tokens.mean']:.0f}",
        "tokens, deep": f"{figures['deep.tokens.mean']:.0f}",
    }


def plan(config: MixtureSweepConfig) -> list[str]:
    training.check_one_process("sft.mixture_sweep")
    evaluation = config.evaluation
    with launch.planned_ranks(config.launch):
        lines = train.plan(config.variant(config.shares[-1], 0))
    for asked in filter(None, (evaluation.reasoning, evaluation.general)):
        read_prompts(asked.prompts)
        check_room(evaluation.engine, asked.sampling)
    first_rows(config.long.rows, "messages")
    for path in _inputs(config):
        if not path.exists():
            raise UserError(f"{path}: no such file or folder")
    count = len(config.shares) * config.seeds
    shares = ", ".join(f"{share:g}" for share in config.shares)
    return [*lines, f"shares of {config.long.rows}: {shares}; {count} models", f"samples: {place(evaluation.engine)}"]


def forecast(config: MixtureSweepConfig) -> list[str]:
    """What the largest share takes, known once the rows are tokenized; whether every task can be compared."""
    _check_tasks(config)
    largest = config.variant(config.shares[-1], 0)
    rows = cached_rows(largest, models.load_tokenizer(largest.model))
    if rows is None:
        return ["rows: whether they suffice is known once they are tokenized, by sft.prepare with their sources"]
    with launch.planned_ranks(config.launch):
        return train.forecast(largest)


def main(argv: Sequence[str] | None = None) -> int:
    return job.main(MixtureSweepConfig, run, plan, argv, forecast)


if __name__ == "__main__":
    raise SystemExit(main())
