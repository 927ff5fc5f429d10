"""One rank of a test: trains the tiny model with router losses, one case after the other, and records each."""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import Ernie4_5_MoeForCausalLM, Trainer, TrainingArguments
from worker import collate, rows, tiny_config

from alignment.config import RouterConfig
from alignment.moe.export import hf_weights
from alignment.moe.router_trainer import RouterLossMixin
from alignment.moe.trainer import ExpertParallelTrainerMixin, ddp_backend
from alignment.training import leave

STEPS = 5
LOGGED = ("loss", "grad_norm")


class RoutedTrainer(RouterLossMixin, ExpertParallelTrainerMixin, Trainer):
    pass


def padded(batch: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """The rows of the batch, and one that is nothing but padding."""
    inputs = collate(batch)
    width = inputs["input_ids"].shape[1]
    fill = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    return {key: torch.cat([value, torch.full((1, width), fill[key])]) for key, value in inputs.items()}


def train(case: str, batch: int, accumulate: int, folder: Path) -> dict[str, Any]:
    scope, _, checkpointing = case.partition("+")
    torch.manual_seed(0)
    model = Ernie4_5_MoeForCausalLM(tiny_config())
    with torch.no_grad():
        for layer in model.model.layers:  # they start at zero, which is an even choice
            layer.mlp.gate.weight.normal_(std=0.5)
    trainer = RoutedTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder), max_steps=STEPS, learning_rate=1e-3, adam_epsilon=1e-6, logging_steps=1,
            per_device_train_batch_size=batch, gradient_accumulation_steps=accumulate, max_grad_norm=0.1,
            lr_scheduler_type="constant", save_strategy="no", ddp_backend=ddp_backend(), report_to=[], seed=3,
            average_tokens_across_devices=True, remove_unused_columns=False, dataloader_pin_memory=False, bf16=False,
            gradient_checkpointing=bool(checkpointing), gradient_checkpointing_kwargs={"use_reentrant": False},
            disable_tqdm=True,
        ),
        train_dataset=rows(64),
        data_collator=padded,
        router=RouterConfig.model_validate({"balance": 0.5, "z": 0.05, "scope": scope, "final_share": 0.5}),
    )  # fmt: skip
    stated = trainer.train().training_loss
    history = [line for line in trainer.state.log_history if "loss" in line]
    names = [name for name in history[0] if name in LOGGED or name.startswith("router/")]
    weights = {name: tensor.clone() for name, tensor in hf_weights(model)}
    return {
        "history": {name: [float(line[name]) for line in history] for name in names},
        "weights": weights,
        "load": trainer.expert_load,
        "stated": stated,
    }


def main() -> None:
    folder, batch, accumulate = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    results = {case: train(case, batch, accumulate, folder) for case in sys.argv[4:]}
    if int(os.environ.get("RANK", "0")) == 0:  # the weights of the others are on the meta device
        torch.save(results, folder / "router.pt")


if __name__ == "__main__":
    main()
    leave()
