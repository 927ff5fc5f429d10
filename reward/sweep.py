"""Train several reward models, one after the other, on rows that are tokenized once.

    python -m reward.sweep --config configs/reward/sweep.yaml

Each variant is a run of reward.train in `output_dir/NAME`, resumed on its own. All start from one head, drawn from the
sweep's seed, so that their weights can be averaged.
"""

from collections.abc import Sequence
from functools import cache

from alignment import job
from alignment.rows import local_inputs
from reward import data, train
from reward.config import SweepConfig


def run(config: SweepConfig) -> None:
    base = config.base
    inputs = local_inputs(*filter(None, (base.rows, base.eval_rows, base.model.path, base.model.tokenizer)))
    with job.Job.open("reward.sweep", config, inputs) as this:
        if this.done:
            return
        prepare = cache(data.prepare)
        metrics: dict[str, float] = {}
        for name in config.variants:
            variant = config.variant(name)
            if this.is_main:
                print(f"reward.sweep: {name}", flush=True)
            train.run(variant, prepare)
            if this.is_main:
                found = job.Job("reward.train", variant.output_dir, variant, {}).metrics
                metrics |= {f"{name}.{key}": value for key, value in found.items()}
        this.finish(metrics)


def plan(config: SweepConfig) -> list[str]:
    return [line for name in config.variants for line in (f"{name}:", *train.plan(config.variant(name)))]


def main(argv: Sequence[str] | None = None) -> int:
    return job.main(SweepConfig, run, plan, argv)


if __name__ == "__main__":
    raise SystemExit(main())
