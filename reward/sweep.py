"""Train several reward models, one after the other, on rows that are tokenized once.

    python -m reward.sweep --config configs/reward/sweep.yaml
    python -m reward.train --config runs/reward/sweep/configs/rm_2.yaml     # one of them, here or on another machine

Each variant is a run of reward.train in `output_dir/NAME`, resumed on its own; `output_dir/configs/NAME.yaml` makes the
same model alone. A variant that is done is not trained again, wherever that was. All start from one head, drawn from
the sweep's seed, so that their weights can be averaged. With `launch`, each is trained on the ranks of that launcher
config, in processes of its own. `variants.md` compares them.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alignment import atomic, job, launch, training
from alignment.errors import UserError
from alignment.rows import local_inputs
from reward import train
from reward.config import RewardConfig, SweepConfig

Results = Mapping[str, Mapping[str, Any]]  # variant -> metric -> value

COLUMNS: tuple[str, ...] = (
    "train.steps",
    "train.loss",
    "eval.loss",
    "eval.accuracy",
    "eval.accuracy.low",
    "eval.accuracy.high",
)
COLUMNS += ("eval.margin", "eval.calibration_error", "eval.brier", "eval.score_length_correlation")


def run(config: SweepConfig) -> None:
    """Train what is not done yet.

    Raises:
        UserError: the sweep itself was launched on several ranks. RankFailed: a variant's launch failed.
    """
    _check_ranks()
    base = config.base
    inputs = local_inputs(*filter(None, (base.rows, base.eval_rows, base.model.path, base.model.tokenizer)))
    with job.Job.open("reward.sweep", config, inputs) as this:
        if this.done:
            return
        variants = {name: config.variant(name) for name in config.variants}
        paths = {name: write_variant(this.dir, name, variant) for name, variant in variants.items()}
        results = {}
        for name, variant in variants.items():
            print(f"reward.sweep: {name}", flush=True)
            _train(variant, paths[name], config.launch)
            results[name] = job.Job("reward.train", variant.output_dir, variant, {}).metrics
        text = compare(results)
        atomic.write_text(this.dir / "variants.md", text)
        print(text)
        metrics = {f"{name}.{key}": value for name, found in results.items() for key, value in found.items()}
        this.finish(metrics | {"best": best(results)})


def _check_ranks() -> None:
    if training.world_size() > 1:
        raise UserError(
            "reward.sweep runs as one process: accelerate keeps the settings of a process's first trainer for all\n"
            "give `launch: configs/accelerate/NAME.yaml`, and each variant is trained on the ranks of that config"
        )


def write_variant(folder: Path, name: str, variant: RewardConfig) -> Path:
    """The config of a variant as a file, which reward.train takes; not in the variant's folder, which is that run's."""
    path = folder / "configs" / f"{name}.yaml"
    atomic.write_text(path, variant.as_yaml())
    return path


def _train(variant: RewardConfig, path: Path, launcher: Path | None) -> None:
    if launcher is None:
        train.run(variant)
        return
    launch.run_job("reward.train", path, launcher)


def best(results: Results) -> str | None:
    """The variant of the highest pairwise accuracy, of equals that of the lowest loss; None without held-out rows."""
    judged = [name for name, found in results.items() if "eval.accuracy" in found]
    return max(judged, key=lambda n: (results[n]["eval.accuracy"], -results[n]["eval.loss"]), default=None)


def compare(results: Results) -> str:
    """A Markdown table, a line for each variant; the best by pairwise accuracy is in bold."""
    columns = [column for column in COLUMNS if all(column in found for found in results.values())]
    rows = [["variant", *columns], ["---"] * (1 + len(columns))]
    for name, found in results.items():
        shown = f"**{name}**" if name == best(results) else name
        rows.append([shown, *(f"{found[column]:.4g}" for column in columns)])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def plan(config: SweepConfig) -> list[str]:
    _check_ranks()
    if config.launch is not None and not config.launch.is_file():
        raise UserError(f"launch: {config.launch}: no such launcher config")
    return [line for name in config.variants for line in (f"{name}:", *train.plan(config.variant(name)))]


def main(argv: Sequence[str] | None = None) -> int:
    return job.main(SweepConfig, run, plan, argv)


if __name__ == "__main__":
    raise SystemExit(main())
