"""Supervised fine-tuning on packed rows.

    accelerate launch --config_file configs/accelerate/cpu-ep2.yaml -m sft.train --config configs/sft/demo.yaml
    python -m sft.train --config configs/sft/demo.yaml --dry-run

Writes `output_dir/model` (a transformers folder), `ledger.json`, which accounts for every row and token,
`rejects.jsonl` (the rows that do not train, and why), `mixture.json` (what each source gives to an epoch) and `plan/`,
the packs in their order. With a section `lora` also `output_dir/adapter` (a peft folder), and `model` is the base with
the adapter merged into it.
"""

from collections.abc import Sequence

from trl.trainer.sft_config import SFTConfig as TRLConfig

from alignment import adapters, atomic, attention, job, models, training
from alignment.packing import PackingPlan
from alignment.rows import local_inputs
from sft import data
from sft.config import SFTConfig
from sft.mixture import Mixture, mix, write_rejects
from sft.prepare import cached_rows, check_sources, describe_mixture, prepare
from sft.trainer import PackedSFTTrainer


def run(config: SFTConfig) -> None:
    inputs = local_inputs(*(s.rows for s in config.sources), *filter(None, (config.model.path, config.model.tokenizer)))
    with job.Job.open("sft.train", config, inputs) as this:
        if this.done:
            return
        tokenizer = models.load_tokenizer(config.model)
        rows = prepare(config, tokenizer)  # no rank has a process group yet, so none runs into its timeout
        mixture = mix(config, rows) if this.is_main else None
        plan = _stored_plan(this, config, mixture)
        arguments = _arguments(this, config)  # before the model, which is partitioned as it is read under ZeRO 3
        attention.register()
        source = training.held(config.model, config.lora)
        model = models.load_model(source, tokenizer, seed=config.seed, attn_implementation=attention.SEGMENTS)
        trainer = PackedSFTTrainer(
            model=model,
            args=arguments,
            packs=data.PackedRows(rows, plan, config.packing.limit, tokenizer.pad_token_id),
            processing_class=tokenizer,
            router=config.training.router,
            peft_config=adapters.peft_config(config.lora, model) if config.lora else None,
        )
        metrics = training.train(trainer, this)
        training.save(trainer, this, config.model, config.lora)
        if mixture is not None:
            metrics |= _account(this, mixture)
        this.finish(metrics | _figures(plan))


def _stored_plan(this: job.Job, config: SFTConfig, mixture: Mixture | None) -> PackingPlan:
    """The packs of the run, planned once: rank 0 stores them, all map them into memory."""
    size = packs_per_step(config)
    folder = this.dir / "plan" / f"{size}-packs-a-step"
    if mixture is not None and not folder.exists():
        data.plan_packs(mixture, config.packing, size, config.seed).save(folder)
    return data.wait_for_plan(folder)


def packs_per_step(config: SFTConfig) -> int:
    return training.world_size() * config.training.accumulation


def _account(this: job.Job, mixture: Mixture) -> dict[str, int]:
    """Write where every row went; returns the counts."""
    mixture.ledger.write(this.dir / "ledger.json")
    atomic.write_json(this.dir / "mixture.json", mixture.sources)
    write_rejects(mixture, this.dir / "rejects.jsonl")
    return {f"rows.{key}": value for key, value in mixture.ledger.as_dict().items() if isinstance(value, int)}


def _figures(plan: PackingPlan) -> dict[str, float]:
    imbalance = plan.imbalance(training.world_size())
    return {
        "packing.utilisation": plan.utilisation,
        "packing.padding_share": plan.padding_share,
        "packing.imbalance_tokens": imbalance.tokens,
        "packing.imbalance_attention": imbalance.attention,
        "packing.packs": plan.packs,
    }


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
    size = packs_per_step(config)
    return [
        f"model: {config.model.path or config.model.preset}",
        *training.plan_adapter(config.lora, config.model),
        *check_sources(config),
        f"step: {size} packs of {config.packing.capacity} tokens = {size * config.packing.capacity} tokens",
        *memory,
    ]


def forecast(config: SFTConfig) -> list[str]:
    """What the mixture drops, and the steps: known once the rows are tokenized."""
    rows = cached_rows(config, models.load_tokenizer(config.model))
    if rows is None:
        return ["steps: known once the rows are tokenized, by sft.prepare with this config"]
    mixture = mix(config, rows)
    packs = data.plan_packs(mixture, config.packing, packs_per_step(config), config.seed)
    return [
        *describe_mixture(mixture),
        f"steps: {packs.steps:,}; utilisation {packs.utilisation:.2%}, padding {packs.padding_share:.2%}",
    ]


def main(argv: Sequence[str] | None = None) -> int:
    return job.main(SFTConfig, run, plan, argv, forecast)


if __name__ == "__main__":
    training.leave(main())
