"""Supervised fine-tuning on packed rows.

    accelerate launch --config_file configs/accelerate/cpu-ep2.yaml -m sft.train --config configs/sft/demo.yaml
    python -m sft.train --config configs/sft/demo.yaml --dry-run

Writes `output_dir/model` (a transformers folder) and `ledger.json`, which accounts for every row and token. With a
section `lora` also `output_dir/adapter` (a peft folder), and `model` is the base with the adapter merged into it.
"""

from collections.abc import Sequence, Sized
from typing import Any, cast

import trl.trainer.utils
from torch.utils.data import SequentialSampler
from trl.trainer.sft_config import SFTConfig as TRLConfig
from trl.trainer.sft_trainer import SFTTrainer

from alignment import adapters, attention, job, models, training
from alignment.ledger import Ledger
from alignment.moe.adapters import check_adapter
from alignment.moe.config import expert_parallel_size
from alignment.moe.router_trainer import RouterLossMixin
from alignment.moe.trainer import ExpertParallelTrainerMixin
from alignment.rows import first_rows, local_inputs
from sft import data
from sft.config import SFTConfig

# TRL projects all positions through its fused head unless Triton runs, where it projects the labelled ones only. On a
# CPU that is right too, and saves a fifth of a small model's step: the name decides nothing else in that module.
vars(trl.trainer.utils).update(_use_triton=lambda _: True)


class PackedSFTTrainer(RouterLossMixin, ExpertParallelTrainerMixin, SFTTrainer):
    """TRL's trainer over packs in the order of their plan: rank r takes pack i * world + r."""

    def _get_train_sampler(self, *_: Any, **__: Any) -> SequentialSampler:
        return SequentialSampler(cast(Sized, self.train_dataset))


def run(config: SFTConfig) -> None:
    inputs = local_inputs(*(s.rows for s in config.sources), *filter(None, (config.model.path, config.model.tokenizer)))
    with job.Job.open("sft.train", config, inputs) as this:
        if this.done:
            return
        tokenizer = models.load_tokenizer(config.model)
        ledger = Ledger()
        samples = data.tokenize(data.mixture(config.sources, config.seed), tokenizer, config.packing, ledger)
        packs, utilisation = data.pack_epochs(
            samples,
            config.packing.capacity,
            training.world_size() * config.training.accumulation,
            config.training.epochs,
            config.seed,
            tokenizer.pad_token_id,
        )
        attention.register()
        model = models.load_model(config.model, tokenizer, seed=config.seed, attn_implementation=attention.SEGMENTS)
        trainer = PackedSFTTrainer(
            model=model,
            args=_arguments(this, config),
            train_dataset=packs,
            data_collator=data.collate,
            processing_class=tokenizer,
            router=config.training.router,
            peft_config=adapters.peft_config(config.lora, model) if config.lora else None,
        )
        metrics = training.train(trainer, this)
        _save(trainer, this, config)
        if this.is_main:
            ledger.write(this.dir / "ledger.json")
        this.finish(
            metrics
            | {"packing.utilisation": utilisation, "packing.packs": len(packs)}
            | {f"rows.{key}": value for key, value in ledger.as_dict().items() if isinstance(value, int)}
        )


def _save(trainer: PackedSFTTrainer, this: job.Job, config: SFTConfig) -> None:
    if config.lora is None:
        trainer.save_model(str(this.dir / "model"))
        return
    trainer.save_model(str(this.dir / "adapter"))
    if config.lora.merge and this.is_main:
        gap = adapters.merge_adapter(config.model, this.dir / "adapter", this.dir / "model")
        print(f"sft.train: merged; log-probabilities differ by {gap.max:.1e} at most, {gap.mean:.1e} on average")


def _arguments(this: job.Job, config: SFTConfig) -> TRLConfig:
    """The plan already holds every epoch, so the trainer walks it once."""
    once = config.training.model_copy(update={"epochs": 1})
    return training.training_arguments(
        TRLConfig,
        this,
        once,
        config.model.dtype,
        per_device_train_batch_size=1,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        router_aux_loss_coef=0.0,
    )


def plan(config: SFTConfig) -> list[str]:
    models.check_model(config.model)
    memory = training.check_parallel(config.model)
    for source in config.sources:
        first_rows(source.rows, "messages")
    packs = training.world_size() * config.training.accumulation
    return [
        f"model: {config.model.path or config.model.preset}",
        *_plan_adapter(config),
        f"rows: {', '.join(s.rows for s in config.sources)}",
        f"step: {packs} packs of {config.packing.capacity} tokens = {packs * config.packing.capacity} tokens",
        *memory,
    ]


def _plan_adapter(config: SFTConfig) -> list[str]:
    if config.lora is None:
        return []
    model = adapters.on_meta(config.lora, config.model)
    if expert_parallel_size():
        check_adapter(model)
    trained, total = model.get_nb_trainable_parameters()
    return [f"adapter: {trained:,} of {total:,} parameters are trained ({trained / total:.2%})"]


def main(argv: Sequence[str] | None = None) -> int:
    return job.main(SFTConfig, run, plan, argv)


if __name__ == "__main__":
    raise SystemExit(main())
