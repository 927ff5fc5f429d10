"""Preference training on pairs: OT-DPO, DPO, or any loss of TRL's DPOTrainer.

    accelerate launch --config_file configs/accelerate/cpu-ep2.yaml -m dpo.train --config configs/dpo/offline.yaml

Writes `output_dir/model` (a transformers folder), `ledger.json` and, for OT-DPO, `token_weights.jsonl`: a few pairs
with the weights of their tokens under the trained policy.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from alignment import job, models, training
from alignment.errors import UserError, did_you_mean
from alignment.fingerprint import weights_hash
from alignment.moe.router_trainer import RouterLossMixin
from alignment.moe.trainer import ExpertParallelTrainerMixin
from alignment.rows import first_rows, local_inputs, read_rows
from dpo import inspect_pairs
from dpo.config import DPOConfig, LossConfig
from dpo.data import tokenize_pairs
from dpo.trainer import TRL_LOSSES, WEIGHTED_LOSSES, PreferenceArguments, PreferenceTrainer


class ExpertParallelPreferenceTrainer(RouterLossMixin, ExpertParallelTrainerMixin, PreferenceTrainer):
    """PreferenceTrainer whose experts may be split between ranks, and whose every save is whole."""

    def routed_tokens(self, inputs: dict[str, Any]) -> Tensor:
        tokens = super().routed_tokens(inputs)
        if not self.weighted:
            return tokens
        return tokens & inputs["pair_weight"].bool().repeat(2)[:, None]  # fillers train nothing


def run(config: DPOConfig) -> None:
    with job.Job.open(
        "dpo.train", config, local_inputs(config.rows, *filter(None, (config.model.path, config.model.tokenizer)))
    ) as this:
        if this.done:
            return
        tokenizer = models.load_tokenizer(config.model)
        pairs, ledger = tokenize_pairs(read_rows(config.rows, "preference"), tokenizer, config.max_length)
        model = models.load_model(config.model, tokenizer, seed=config.seed)
        trainer = ExpertParallelPreferenceTrainer(
            model=model,
            args=arguments(this, config),
            train_dataset=pairs,
            processing_class=tokenizer,
            weights_hash=_version(config),
            router=config.training.router,
        )
        metrics = training.train(trainer, this)
        if trainer.args.transport:
            examples = inspect_pairs.examples(trainer.weigh, pairs, tokenizer, config.batch_size)
            if this.is_main:
                inspect_pairs.write(this.dir, examples)
        trainer.save_model(str(this.dir / "model"))
        if this.is_main:
            ledger.write(this.dir / "ledger.json")
        this.finish(metrics | {"pairs": len(pairs)})


def arguments(this: job.Job, config: DPOConfig) -> PreferenceArguments:
    loss = config.loss
    ours = {"nll_weight": loss.nll_weight} if loss.type in WEIGHTED_LOSSES else {}
    return training.training_arguments(
        PreferenceArguments,
        this,
        config.training,
        config.model.dtype,
        loss_type=[loss.type],
        beta=loss.beta,
        ot_reg=loss.transport.reg,
        ot_reg_m=loss.transport.reg_m,
        ot_metric=loss.transport.metric,
        ot_cost_norm=loss.transport.cost_norm,
        ot_total=loss.transport.total,
        ot_mix=loss.transport.mix,
        per_device_train_batch_size=config.batch_size,
        router_aux_loss_coef=0.0,
        **ours,
    )


def _version(config: DPOConfig) -> str | None:
    """The hash of the weights that training starts from; None lets the trainer hash what it holds."""
    if config.model.path is None or not Path(config.model.path).is_dir():
        return None
    return weights_hash(Path(config.model.path))


def check_loss(loss: LossConfig) -> None:
    known = (*WEIGHTED_LOSSES, *TRL_LOSSES)
    if loss.type not in known:
        raise UserError(f"loss.type: unknown loss {loss.type!r}{did_you_mean(loss.type, known)}")
    if loss.nll_weight and loss.type not in WEIGHTED_LOSSES:
        raise UserError(
            f"loss.nll_weight: has no effect on TRL's {loss.type!r}; expected one of {WEIGHTED_LOSSES}, or 0"
        )


def plan(config: DPOConfig) -> list[str]:
    check_loss(config.loss)
    models.check_model(config.model)
    memory = training.check_parallel(config.model)
    first_rows(config.rows, "preference")
    pairs = config.batch_size * training.world_size() * config.training.accumulation
    return [
        f"model: {config.model.path}",
        f"rows: {config.rows}",
        f"step: {training.world_size()} ranks x {config.training.accumulation} x {config.batch_size} = {pairs} pairs",
        *memory,
    ]


def main(argv: Sequence[str] | None = None) -> int:
    return job.main(DPOConfig, run, plan, argv)


if __name__ == "__main__":
    raise SystemExit(main())
