"""Preference training on pairs: OT-DPO, DPO, or any loss of TRL's DPOTrainer.

    accelerate launch --config_file configs/accelerate/cpu-ep2.yaml -m dpo.train --config configs/dpo/offline.yaml
    python -m dpo.train --config configs/dpo/offline.yaml --dry-run

Writes `output_dir/model` (a transformers folder) and `ledger.json`; with a section `lora` also `adapter` (a peft
folder), and `model` is the base with the adapter merged into it; with `evaluation` rows also `eval_ledger.json` and
`eval.` metrics of the model before the first step and after the last.

OT-DPO also writes `token_weights.jsonl`: a few pairs with the weights of their tokens under the trained policy.
"""

import gc
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alignment import adapters, job, models, training
from alignment.config import ModelConfig
from alignment.fingerprint import weights_hash
from alignment.ledger import Ledger
from alignment.moe.memory import frozen_bytes, launched_sharding
from alignment.moe.router_trainer import RouterLossMixin
from alignment.moe.trainer import ExpertParallelTrainerMixin
from alignment.rows import first_rows, local_inputs, read_rows
from dpo import inspect_pairs
from dpo.arguments import WEIGHTED_LOSSES, PreferenceArguments
from dpo.checks import check_adapter, check_loss, check_reference, reference_source
from dpo.config import DPOConfig
from dpo.data import tokenize_pairs
from dpo.held_out import figures, untrained_pairs
from dpo.trainer import PreferenceTrainer, reference_file

CHECKPOINTS = "checkpoints"  # alignment.training's folder of them; the stored reference lies there too


class ExpertParallelPreferenceTrainer(RouterLossMixin, ExpertParallelTrainerMixin, PreferenceTrainer):
    """PreferenceTrainer whose experts may be split between ranks, and whose every save is whole."""

    def routed_tokens(self, inputs: dict[str, Any]) -> Tensor:
        return inputs["routed"] if self.ours else super().routed_tokens(inputs)  # fillers train nothing


def run(config: DPOConfig) -> None:
    named = (config.evaluation, config.model.path, config.model.tokenizer, config.reference.model)
    with job.Job.open("dpo.train", config, local_inputs(config.rows, *filter(None, named))) as this:
        if this.done:
            return
        tokenizer = models.load_tokenizer(config.model)
        pairs, ledger = tokenize_pairs(read_rows(config.rows, "preference"), tokenizer, config.max_length)
        measured, eval_ledger = _evaluation(config, tokenizer, pairs)
        make = partial(
            ExpertParallelPreferenceTrainer, train_dataset=pairs, eval_dataset=measured, processing_class=tokenizer
        )
        reference_hash = None
        if config.reference.model and config.reference.kind == "stored":
            reference_hash = weights_hash(Path(config.reference.model))
            _store_reference(this, config, make, reference_hash)
        args = arguments(this, config)  # before the models, which are partitioned as they are read under ZeRO 3
        model = _load(config, config.model, tokenizer)
        frozen = _frozen_copy(config, tokenizer)
        trainer = make(
            model=model,
            ref_model=frozen,
            args=args,
            weights_hash=_version(config),
            reference_hash=reference_hash,
            router=config.training.router,
            peft_config=adapters.peft_config(config.lora, model) if config.lora else None,
        )
        metrics = training.train(trainer, this)
        if measured is not None:
            trainer.evaluate()
        if trainer.args.transport:
            examples = inspect_pairs.examples(trainer.weigh, pairs, tokenizer, config.batch_size)
            if this.is_main:
                inspect_pairs.write(this.dir, examples)
        training.save(trainer, this, config.model, config.lora)
        if this.is_main:
            ledger.write(this.dir / "ledger.json")
        if this.is_main and measured is not None:
            eval_ledger.write(this.dir / "eval_ledger.json")
        measured_by = figures(trainer.state.log_history) | _counts(eval_ledger)
        this.finish({**metrics, **measured_by, "pairs": len(pairs), **trainer.forward_metrics})


def _evaluation(
    config: DPOConfig, tokenizer: PreTrainedTokenizerBase, trained: Dataset
) -> tuple[Dataset | None, Ledger]:
    if config.evaluation is None:
        return None, Ledger()
    pairs, ledger = tokenize_pairs(read_rows(config.evaluation, "preference"), tokenizer, config.max_length)
    return untrained_pairs(pairs, ledger, trained), ledger


def _counts(ledger: Ledger) -> dict[str, float]:
    if not ledger.rows_in:
        return {}
    return {"eval.pairs": ledger.rows_out, **{f"eval.{key}": n for key, n in ledger.dropped_metrics().items()}}


def _load(config: DPOConfig, source: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A policy or reference, held alike; of a preset both have the weights that the seed gives."""
    return models.load_model(training.held(source, config.lora), tokenizer, seed=config.seed)


def _frozen_copy(config: DPOConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel | None:
    """What a live reference needs beside the policy; with an adapter that starts from it, nothing."""
    if config.reference.kind == "stored" or (config.lora and config.reference.model is None):
        return None
    return _load(config, reference_source(config), tokenizer)


def _store_reference(this: job.Job, config: DPOConfig, make: partial[Any], version: str) -> None:
    """Load the reference's model, write its log-probabilities, and drop it, before the policy is loaded."""
    names = ["train", "eval"] if config.evaluation else ["train"]
    if all(reference_file(this.dir / CHECKPOINTS, name).exists() for name in names):
        return  # a resumed run; the trainer checks what they are
    args = arguments(this, config)
    model = _load(config, reference_source(config), make.keywords["processing_class"])
    trainer = make(model=model, args=args, weights_hash=version)
    trainer.store_references()
    if trainer.is_deepspeed_enabled:
        trainer.model_wrapped.destroy()
    del model, trainer
    gc.collect()
    torch.cuda.empty_cache()


def arguments(this: job.Job, config: DPOConfig) -> PreferenceArguments:
    loss = config.loss
    ours = {"nll_weight": loss.nll_weight} if loss.type in WEIGHTED_LOSSES or loss.scope == "global" else {}
    smoothed = {"label_smoothing": loss.label_smoothing} if loss.label_smoothing else {}
    from_the_start = training.last_whole_checkpoint(this.dir / CHECKPOINTS) is None
    return training.training_arguments(
        PreferenceArguments,
        this,
        config.training,
        config.model.dtype,
        loss_type=[loss.type],
        loss_scope=loss.scope,
        beta=loss.beta,
        ot_reg=loss.transport.reg,
        ot_reg_m=loss.transport.reg_m,
        ot_metric=loss.transport.metric,
        ot_cost_norm=loss.transport.cost_norm,
        ot_total=loss.transport.total,
        ot_mix=loss.transport.mix,
        reference=config.reference.kind,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        eval_on_start=config.evaluation is not None and from_the_start,
        router_aux_loss_coef=0.0,
        **smoothed,
        **ours,
    )


def _version(config: DPOConfig) -> str | None:
    """The hash of the weights that training starts from; None lets the trainer hash what it holds."""
    if config.model.path is None or not Path(config.model.path).is_dir():
        return None
    return weights_hash(Path(config.model.path))


def plan(config: DPOConfig) -> list[str]:
    check_loss(config.loss)
    models.check_model(config.model)
    check_reference(config)
    check_adapter(config)
    memory = training.check_parallel(config.model)
    for source in filter(None, (config.rows, config.evaluation)):
        first_rows(source, "preference")
    return [
        f"model: {config.model.path or config.model.preset}",
        *training.plan_adapter(config.lora, config.model),
        f"rows: {config.rows}; measured on {config.evaluation or 'nothing'}",
        f"step: {training.world_size()} ranks x {config.training.accumulation} x {config.batch_size} = "
        f"{_pairs_per_step(config)} pairs",
        f"reference: {_plan_reference(config)}",
        *memory,
    ]


def _pairs_per_step(config: DPOConfig) -> int:
    return training.world_size() * config.training.accumulation * config.batch_size


def _plan_reference(config: DPOConfig) -> str:
    name = config.reference.model or "the weights that training starts from"
    if config.reference.kind == "stored":
        return f"{name}, one log-probability a token in a file; no memory of a device in training"
    if config.lora is not None and config.reference.model is None:
        return f"{name}, the policy with its adapter switched off; a forward more at each step, no memory"
    model = models.on_meta(models.config_of(reference_source(config)))
    more = frozen_bytes(model, launched_sharding(config.model.dtype)) / 1e9
    return f"{name}, a frozen copy: {more:,.1f} GB more on each rank, and a forward more at each step"


def forecast(config: DPOConfig) -> list[str]:
    """Pairs, tokens and steps: known once the rows are tokenized."""
    tokenizer = models.load_tokenizer(config.model)
    pairs, ledger = tokenize_pairs(read_rows(config.rows, "preference"), tokenizer, config.max_length)
    steps = math.ceil(len(pairs) / _pairs_per_step(config)) * config.training.epochs
    prompts = 2 * sum(map(len, pairs["prompt_ids"]))
    lines = [
        f"pairs: {len(pairs):,} of {ledger.rows_in:,} rows; dropped: {dict(ledger.dropped) or 'none'}",
        f"tokens: {ledger.tokens_trained:,} of completions, {prompts:,} of prompts before them, in each epoch",
        f"steps: {steps:,}",
    ]
    measured, eval_ledger = _evaluation(config, tokenizer, pairs)
    if measured is not None:
        lines.append(f"evaluation: {len(measured):,} pairs; dropped: {dict(eval_ledger.dropped) or 'none'}")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    return job.main(DPOConfig, run, plan, argv, forecast)


if __name__ == "__main__":
    training.leave(main())
