"""The update's loss is the sum of its three terms, each counted once however the step is cut."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl.trainer.sft_config import SFTConfig as TRLConfig

from alignment import attention
from alignment.packing import plan_epoch
from sft.cache import SourceRows, TokenizedRows
from sft.data import PackedRows
from sft.ewc import Anchor
from sft.rendering import SCHEMA
from sft.update_trainer import UpdateTrainer, trained_parameters

BETA, LAMBDA = 0.5, 3.0
SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}


def packs(lengths: list[int], packs_per_step: int, seed: int) -> PackedRows:
    random = np.random.default_rng(seed)
    rows = [
        {"input_ids": random.integers(2, 64, n).tolist(), "trained": [at % 3 > 0 for at in range(n)], "length": n,
         "trained_tokens": sum(at % 3 > 0 for at in range(n)), "reason": None, "place": "", "id": None}
        for n in lengths
    ]  # fmt: skip
    there = TokenizedRows([SourceRows("rows", [pa.RecordBatch.from_pylist(rows, schema=SCHEMA)])])
    return PackedRows(there, plan_epoch(there.lengths, 10, packs_per_step, 2, random), None, 0)


def mean_loss(model: Any, made: PackedRows, numbers: list[int]) -> torch.Tensor:
    """Over the trained tokens of these packs, each sample through the model by itself."""
    total, count = torch.zeros(()), 0
    for row in np.concatenate([made.plan.pack(number) for number in numbers]).tolist():
        ids, trained = made.rows.take([row])
        ids_T, labelled = torch.from_numpy(ids.astype(np.int64)), torch.from_numpy(trained)[1:]
        total = total + cross_entropy(
            model(input_ids=ids_T[None]).logits[0, :-1][labelled], ids_T[1:][labelled], reduction="sum"
        )
        count += int(labelled.sum())
    return total / count


def test_a_step_of_two_micro_batches(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """Gradient norm of the first step: of L_new over both packs, of the mean of packs 0 and 1 of the replay, and of the
    penalty once. The anchor lies beside the weights, so that the penalty is not 0 there."""
    attention.register()
    config = LlamaConfig(
        vocab_size=64, initializer_range=0.2, pad_token_id=0, eos_token_id=1, bos_token_id=None, **SHAPE
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM._from_config(copy.deepcopy(config), attn_implementation=attention.SEGMENTS)
    plain = LlamaForCausalLM(config)
    plain.load_state_dict(model.state_dict())
    new, replay = packs([6, 4, 9, 7, 3, 5, 8, 2], 2, 0), packs([5, 8, 7], 1, 1)
    generator = torch.Generator().manual_seed(1)
    weights = trained_parameters(model)
    anchor = Anchor(
        {n: w.detach() + 0.1 * torch.randn(w.shape, generator=generator) for n, w in weights.items()},
        {n: torch.rand(w.shape, generator=generator) for n, w in weights.items()},
    )
    arguments = TRLConfig(
        output_dir=str(tmp_path), learning_rate=1e-2, per_device_train_batch_size=1, gradient_accumulation_steps=2,
        logging_steps=1, save_steps=1, num_train_epochs=1, report_to=[], remove_unused_columns=False, bf16=False,
        dataloader_pin_memory=False, disable_tqdm=True, max_length=None, router_aux_loss_coef=0.0, max_grad_norm=1e9,
        dataset_kwargs={"skip_prepare_dataset": True}, gradient_checkpointing=False, lr_scheduler_type="constant",
    )  # fmt: skip
    made = UpdateTrainer(
        model=model, args=arguments, packs=new, processing_class=tiny_tokenizer, replay=replay, replay_weight=BETA,
        anchor=anchor, anchor_weight=LAMBDA,
    )  # fmt: skip
    penalty = anchor.penalty(trained_parameters(plain))
    replayed = (mean_loss(plain, replay, [0]) + mean_loss(plain, replay, [1])) / 2
    expected = mean_loss(plain, new, [0, 1]) + BETA * replayed + LAMBDA * penalty
    expected.backward()
    norm = torch.stack([p.grad.norm() for p in plain.parameters() if p.grad is not None]).norm().item()
    made.train()
    first = made.state.log_history[0]
    assert first["loss"] == pytest.approx(expected.item(), abs=1e-4)
    assert first["grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert first["replay"] == pytest.approx(replayed.item(), abs=1e-5)
    assert first["ewc"] == pytest.approx(penalty.item(), rel=1e-5)
