"""One rank of a test: trains tiny reward models on the same pairs, cut in several ways, and records each step.

    worker.py OUT CASE...      a case is MODEL-BATCH-ACCUMULATION[-resumed], such as moe-4-1 or dense-1-8

On one process or on ranks, plain or with expert parallelism: whatever the launcher asks for. A case `-resumed` goes on
from the middle of the one without, which stands before it. Rank 0 writes OUT/result.json.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import Ernie4_5_MoeConfig, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast
from trl.trainer.reward_config import RewardConfig as TRLConfig

from alignment.config import RouterConfig
from alignment.moe.trainer import ddp_backend
from alignment.training import leave
from reward.model import reward_class
from reward.rendering import SCHEMA
from reward.trainer import RewardModelTrainer

VOCAB, PAIRS, EPOCHS, STEP = 64, 21, 3, 8  # the last step of an epoch has five pairs
SHAPE = {
    "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1,
    "initializer_range": 0.2, "num_labels": 1,
}  # fmt: skip


def model(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    if kind == "dense":
        config: Any = LlamaConfig(**SHAPE, intermediate_size=64)
    else:
        config = Ernie4_5_MoeConfig(
            **SHAPE, intermediate_size=64, moe_intermediate_size=16, moe_num_experts=4, moe_k=2,
            moe_num_shared_experts=1, moe_layer_start_index=0,
        )  # fmt: skip
    made = reward_class(type(config))(config)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name.endswith("mlp.gate.weight"):  # they start at zero, which is an even choice
                parameter.normal_(std=0.5)
    return made


def tokenizer() -> PreTrainedTokenizerFast:
    """TRL asks for one; nothing here is text."""
    words = {"<pad>": 0, "<eos>": 1} | {str(number): number for number in range(2, VOCAB)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, "<pad>")), pad_token="<pad>", eos_token="<eos>"
    )


def pairs() -> Dataset:
    """Of many lengths, so that padding differs between micro-batches."""
    random = np.random.default_rng(0)
    made = []
    for number in range(PAIRS):
        prompt = random.integers(2, VOCAB, random.integers(2, 9)).tolist()
        chosen, rejected = ([*random.integers(2, VOCAB, random.integers(1, 20)).tolist(), 1] for _ in range(2))
        made.append(
            {"chosen_ids": prompt + chosen, "rejected_ids": prompt + rejected, "prompt_tokens": len(prompt),
             "length": len(prompt) + max(len(chosen), len(rejected)), "same": False, "key": str(number)}
        )  # fmt: skip
    return Dataset(pa.Table.from_pylist(made, schema=SCHEMA))


class Recorded(RewardModelTrainer):
    """Notes the pairs of every step: how many, over all ranks."""

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        batches, count = super().get_batch_samples(*args, **kwargs)
        if batches:
            self.counts.append(int(count))
        return batches, count

    counts: list[int]


def train(case: str, folder: Path) -> dict[str, Any]:
    kind, batch, accumulation, *resumed = case.split("-")
    output = folder / f"{kind}-{batch}-{accumulation}"
    steps = EPOCHS * -(-PAIRS // STEP)
    made = Recorded(
        model=model(kind),
        args=TRLConfig(
            output_dir=str(output), num_train_epochs=EPOCHS, learning_rate=2e-3, adam_epsilon=1e-6, logging_steps=1,
            per_device_train_batch_size=int(batch), gradient_accumulation_steps=int(accumulation), max_grad_norm=1.0,
            lr_scheduler_type="constant", save_strategy="steps", save_steps=steps // 2 + 1, ddp_backend=ddp_backend(),
            report_to=[], seed=3, remove_unused_columns=False, bf16=False, dataloader_pin_memory=False,
            disable_tqdm=True, max_length=None, gradient_checkpointing=False,
        ),
        train_dataset=pairs(),
        processing_class=tokenizer(),
        router=RouterConfig(balance=0.05, z=0.01, scope="global"),
    )  # fmt: skip
    made.counts = []
    made.train(resume_from_checkpoint=str(output / f"checkpoint-{steps // 2 + 1}") if resumed else None)
    lines = [line for line in made.state.log_history if "loss" in line]
    assert len(lines) == steps, lines
    names = ["loss", "grad_norm", "accuracy", "margin", "mean_reward", "num_tokens"]
    names += ["router/balance_loss", "router/z_loss"] * (kind == "moe")
    return {"figures": {name: [float(line[name]) for line in lines] for name in names}, "counts": made.counts}


def main() -> None:
    folder = Path(sys.argv[1])
    results = {case: train(case, folder) for case in sys.argv[2:]}
    if os.environ.get("RANK", "0") == "0":
        (folder / "result.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
    leave()
