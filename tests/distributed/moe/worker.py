"""One rank of a test: trains a tiny Ernie4_5_Moe with a real Trainer and records what happened to OUT/rank*.pt."""

import argparse
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import Ernie4_5_MoeConfig, Ernie4_5_MoeForCausalLM, Trainer, TrainerCallback, TrainingArguments

from alignment.errors import UserError
from alignment.moe.trainer import ExpertParallelTrainerMixin, ddp_backend
from alignment.training import leave

VOCAB = 64


def tiny_config(**changes: Any) -> Ernie4_5_MoeConfig:
    return Ernie4_5_MoeConfig(
        **{
            "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
            "moe_intermediate_size": 16, "moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1,
            "moe_layer_start_index": 0, "initializer_range": 0.2, "tie_word_embeddings": True,
            "output_router_logits": False,
        } | changes
    )  # fmt: skip


def rows(count: int) -> list[dict[str, list[int]]]:
    """Rows of many lengths, the prompt masked: ranks get unequal numbers of trained tokens."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for _ in range(count):
        length = int(torch.randint(6, 24, (), generator=generator))
        prompt = int(torch.randint(1, length - 2, (), generator=generator))
        ids = torch.randint(3, VOCAB, (length,), generator=generator).tolist()
        made.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return made


trained_tokens: list[int] = []


def collate(batch: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    trained_tokens.append(sum(label != -100 for row in batch for label in row["labels"][1:]))
    width = max(len(row["input_ids"]) for row in batch)

    def padded(key: str, fill: int) -> torch.Tensor:
        return torch.tensor([row[key] + [fill] * (width - len(row[key])) for row in batch])

    mask = torch.tensor([[1] * len(r["input_ids"]) + [0] * (width - len(r["input_ids"])) for r in batch])
    return {"input_ids": padded("input_ids", 0), "labels": padded("labels", -100), "attention_mask": mask}


class TinyTrainer(ExpertParallelTrainerMixin, Trainer):
    pass


class KillAt(TrainerCallback):
    """Die without a word once the given number of steps is done."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--save-steps", type=int, default=0)
    parser.add_argument("--kill-at", type=int, default=-1)
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)
    model = Ernie4_5_MoeForCausalLM(tiny_config())
    initial = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer = TinyTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(options.out / "checkpoints"), max_steps=options.steps, learning_rate=1e-3, adam_epsilon=1e-6,
            per_device_train_batch_size=options.batch, gradient_accumulation_steps=options.accumulate,
            max_grad_norm=0.1, weight_decay=0.0, lr_scheduler_type="linear", warmup_steps=2, logging_steps=1,
            save_strategy="steps" if options.save_steps else "no", save_steps=options.save_steps or 1,
            ddp_backend=ddp_backend(), average_tokens_across_devices=True, report_to=[], seed=3, disable_tqdm=True,
            remove_unused_columns=False, dataloader_pin_memory=False, use_cpu=False, bf16=False,
        ),
        train_dataset=rows(64),
        data_collator=collate,
        callbacks=[KillAt(options.kill_at)],
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=options.resume or None)
    trainer.save_model(str(options.out / "model"))
    probe = collate(rows(5))
    trainer.model_wrapped.eval()
    with torch.no_grad():
        outputs = trainer.model_wrapped(
            input_ids=probe["input_ids"],
            attention_mask=probe["attention_mask"],
            output_hidden_states=True,
            output_router_logits=True,
        )
    torch.save(
        {
            "initial": initial,
            "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
            "grad_norms": [float(entry["grad_norm"]) for entry in trainer.state.log_history if "grad_norm" in entry],
            "probe": probe,
            "trained_tokens": trained_tokens,
            "logits": outputs.logits,
            "hidden": outputs.hidden_states[-1],
            "router_logits": outputs.router_logits,
        },
        options.out / f"rank{trainer.args.process_index}.pt",
    )


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"UserError: {error}")
    leave()
