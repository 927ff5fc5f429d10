"""One rank of a test: trains tiny models on the same samples, packed and cut in several ways, and records each step.

    steps_worker.py OUT CASE...      a case is MODEL-PACKING[-resumed], such as moe-packed or dense-single

On one process or on ranks, plain or with expert parallelism: whatever the launcher asks for. A case `-resumed` goes on
from the middle of the one without, which stands before it. Each rank writes OUT/rank{n}.json.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import Ernie4_5_MoeConfig, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.auto import AutoModelForCausalLM
from trl.trainer.sft_config import SFTConfig as TRLConfig

from alignment import attention
from alignment.config import RouterConfig
from alignment.moe.trainer import ddp_backend
from alignment.packing import PackingPlan, plan_epoch
from alignment.training import leave
from sft.cache import SourceRows, TokenizedRows
from sft.data import Batch, PackedRows
from sft.rendering import SCHEMA
from sft.trainer import PackedSFTTrainer

STEPS, PACKS, CAPACITY, VOCAB = 20, 8, 32, 64
SAMPLES = 480
SHAPE = {
    "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1,
    "initializer_range": 0.2,
}  # fmt: skip


def model(kind: str) -> PreTrainedModel:
    attention.register()
    torch.manual_seed(0)
    if kind == "dense":
        config: Any = LlamaConfig(**SHAPE, intermediate_size=64, tie_word_embeddings=False)
    else:
        config = Ernie4_5_MoeConfig(
            **SHAPE, intermediate_size=64, moe_intermediate_size=16, moe_num_experts=4, moe_k=2,
            moe_num_shared_experts=1, moe_layer_start_index=0, tie_word_embeddings=True,
        )  # fmt: skip
    made: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation=attention.SEGMENTS)
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


def rows() -> TokenizedRows:
    """Samples of 2 to 32 tokens; about half of each is trained, never the first token."""
    random = np.random.default_rng(0)
    made = []
    for number in range(SAMPLES):
        length = int(np.clip(random.lognormal(2.2, 0.7), 2, 32))
        trained = random.random(length) < 0.5
        trained[0], trained[-1] = False, True
        ids = random.integers(2, VOCAB, length).tolist()
        made.append(
            {"input_ids": ids, "trained": trained.tolist(), "length": length, "trained_tokens": int(trained.sum()),
             "reason": None, "place": f":{number + 1}", "id": None}
        )  # fmt: skip
    return TokenizedRows([SourceRows("made", [pa.RecordBatch.from_pylist(made, schema=SCHEMA)])])


def packed(lengths: np.ndarray) -> PackingPlan:
    return plan_epoch(lengths, CAPACITY, PACKS, 8, np.random.default_rng(0))


def cut(lengths: np.ndarray, packs_of: Callable[[int], list[int]]) -> PackingPlan:
    """The steps of `packed` in other packs: `packs_of` says how many samples each holds, of a step with so many."""
    plan = packed(lengths)
    sizes = [packs_of(len(samples)) for samples in np.split(plan.order, plan.starts[PACKS:-1:PACKS])]
    most = -(-max(map(len, sizes)) // PACKS) * PACKS if len(sizes[0]) > 1 else 1
    filled = np.concatenate([[*of_step, *[0] * (most - len(of_step))] for of_step in sizes])
    starts = np.concatenate([[0], filled.cumsum()])
    before = np.concatenate([[0], lengths[plan.order].cumsum()])
    squares = np.concatenate([[0], (lengths[plan.order].astype(np.int64) ** 2).cumsum()])
    tokens = np.diff(before[starts])
    return dataclasses.replace(
        plan,
        starts=starts,
        tokens=tokens,
        widths=np.repeat(tokens.reshape(-1, most).max(1), most),
        attention=np.diff(squares[starts]),
        capacity=CAPACITY * PACKS,
        packs_per_step=most,
    )


PLANS: dict[str, Callable[[np.ndarray], PackingPlan]] = {
    "packed": packed,  # 8 packs a step
    "single": lambda lengths: cut(lengths, lambda samples: [1] * samples),  # one sample a pack, some fillers
    "joined": lambda lengths: cut(lengths, lambda samples: [samples]),  # one pack a step
}


class Recorded(PackedRows):
    """Notes which packs this rank reads."""

    read: list[int]

    def __getitem__(self, number: int) -> Batch:
        self.read.append(number)
        return super().__getitem__(number)


def train(case: str, folder: Path) -> dict[str, Any]:
    kind, packing, *resumed = case.split("-")
    there = rows()
    plan = PLANS[packing](there.lengths)
    assert plan.steps >= STEPS, plan.steps
    packs = Recorded(there, plan, None, pad_id=0)
    packs.read = []
    output = folder / f"{kind}-{packing}-on-{world_size()}"

    made = PackedSFTTrainer(
        model=model(kind),
        args=TRLConfig(
            output_dir=str(output), max_steps=STEPS, learning_rate=2e-3, adam_epsilon=1e-6, logging_steps=1,
            per_device_train_batch_size=1, gradient_accumulation_steps=plan.packs_per_step // world_size(),
            max_grad_norm=1.0, lr_scheduler_type="constant", save_strategy="steps", save_steps=STEPS // 2,
            ddp_backend=ddp_backend(), report_to=[], seed=3, remove_unused_columns=False, bf16=False,
            dataloader_pin_memory=False, disable_tqdm=True, max_length=None, router_aux_loss_coef=0.0,
            dataset_kwargs={"skip_prepare_dataset": True}, gradient_checkpointing=False,
        ),
        packs=packs,
        processing_class=tokenizer(),
        router=RouterConfig(balance=0.05, z=0.01, scope="global"),
    )  # fmt: skip
    packs.read.clear()  # TRL looks at the first row when it is made
    made.train(resume_from_checkpoint=str(output / f"checkpoint-{STEPS // 2}") if resumed else None)
    lines = [line for line in made.state.log_history if "loss" in line]
    assert len(lines) == STEPS, lines
    names = ["loss", "grad_norm"] + ["router/balance_loss", "router/z_loss"] * (kind == "moe")
    figures = {name: [float(line[name]) for line in lines] for name in names}
    return {"figures": figures, "read": packs.read, "packs_per_step": plan.packs_per_step}


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def main() -> None:
    folder = Path(sys.argv[1])
    results = {case: train(case, folder) for case in sys.argv[2:]}
    (folder / f"rank{os.environ.get('RANK', '0')}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
    leave()
