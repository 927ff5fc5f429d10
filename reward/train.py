"""Train a reward model on preference rows.

    python -m reward.train --config configs/reward/train.yaml
    accelerate launch --config_file configs/accelerate/NAME.yaml -m reward.train --config configs/reward/train.yaml

Writes `output_dir/model` (a transformers folder with a scalar head) and `ledger.json`, which accounts for every row;
with `eval_rows` also `eval_ledger.json` and the `eval.` metrics, of the model as it was saved and loaded again. The
loss is Bradley and Terry's, -log sigmoid(score of chosen - score of rejected).
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from trl.trainer.reward_config import RewardConfig as TRLConfig

from alignment import job, models, stats, training
from alignment.rows import first_rows, local_inputs
from reward import calibration, data
from reward.config import RewardConfig
from reward.data import Pair
from reward.model import load_reward_model
from reward.scorer import Scorer
from reward.trainer import RewardModelTrainer

EVAL_BATCH_TOKENS = 4096


class Scores(Protocol):
    """What evaluates: a Scorer."""

    def score(self, prompts: Sequence[list[int]], completions: Sequence[list[int]]) -> list[float]: ...


def run(config: RewardConfig) -> None:
    inputs = local_inputs(*filter(None, (config.rows, config.eval_rows, config.model.path, config.model.tokenizer)))
    with job.Job.open("reward.train", config, inputs) as this:
        if this.done:
            return
        # No rank has a process group yet, so none runs into its timeout while the first one tokenizes.
        pairs = data.prepare(config.rows, config.eval_rows, config.model, config.max_length, config.prepare.cache)
        tokenizer = models.load_tokenizer(config.model)
        arguments = _arguments(this, config)  # before the model, which is partitioned as it is read under ZeRO 3
        trainer = RewardModelTrainer(
            model=load_reward_model(training.held(config.model), tokenizer, seed=config.seed),
            args=arguments,
            train_dataset=pairs.train,
            processing_class=tokenizer,
            router=config.training.router,
        )
        metrics: dict[str, Any] = training.train(trainer, this)
        training.save(trainer, this, config.model)
        if not this.is_main:
            return
        pairs.train_ledger.write(this.dir / "ledger.json")
        if pairs.eval:
            pairs.eval_ledger.write(this.dir / "eval_ledger.json")
            metrics |= evaluate(Scorer(this.dir / "model", EVAL_BATCH_TOKENS), pairs.eval)
        this.finish(metrics | {"rows.in": pairs.train_ledger.rows_in, "rows.out": pairs.train_ledger.rows_out})


def _arguments(this: job.Job, config: RewardConfig) -> TRLConfig:
    return training.training_arguments(
        TRLConfig,
        this,
        config.training,
        config.model.dtype,
        per_device_train_batch_size=config.batch_size,
        max_length=None,
    )


def evaluate(scorer: Scores, pairs: Sequence[Pair]) -> dict[str, float]:
    """How the model ranks held-out pairs; a tie is half right. Intervals are over prompts.

    Lengths are those of the answers, in tokens; see reward.calibration for the rest.
    """
    prompts = [pair.prompt for pair in pairs] * 2
    answers = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    scores = np.array(scorer.score(prompts, answers))
    lengths = np.array([len(answer) for answer in answers])
    chosen, rejected = np.split(scores, 2)
    margins = chosen - rejected
    by_prompt = defaultdict(list)
    for pair, margin in zip(pairs, margins, strict=True):
        by_prompt[pair.key].append(0.5 + 0.5 * np.sign(margin))
    accuracy = stats.mean_interval([float(np.mean(values)) for values in by_prompt.values()])
    keys = [pair.key for pair in pairs] * 2
    return {
        "eval.loss": float(np.logaddexp(0, -margins).mean()),
        **accuracy.as_metrics("eval.accuracy"),
        "eval.margin": float(margins.mean()),
        "eval.margin_std": float(margins.std()),
        **{f"eval.margin_p{q}": float(np.percentile(margins, q)) for q in (5, 25, 50, 75, 95)},
        "eval.calibration_error": calibration.expected_error(margins),
        "eval.brier": calibration.brier(margins),
        "eval.score_length_correlation": calibration.correlation(scores, lengths),
        "eval.score_length_correlation_within_prompts": calibration.correlation_within(scores, lengths, keys),
        "eval.longer_preferred": calibration.longer_preferred(margins, np.subtract(*np.split(lengths, 2))),
        "eval.pairs": len(pairs),
    }


def plan(config: RewardConfig) -> list[str]:
    models.check_model(config.model)
    memory = training.check_parallel(config.model)
    for source in filter(None, (config.rows, config.eval_rows)):
        first_rows(source, "preference")
    ranks = training.world_size()
    pairs = ranks * config.batch_size * config.training.accumulation
    return [
        f"model: {config.model.path} with a scalar head",
        f"rows: {config.rows}; judged on {config.eval_rows or 'nothing'}",
        f"step: {ranks} ranks x {config.training.accumulation} x {config.batch_size} = {pairs} pairs",
        *memory,
    ]


def main(argv: Sequence[str] | None = None) -> int:
    return job.main(RewardConfig, run, plan, argv)


if __name__ == "__main__":
    training.leave(main())
