"""What the SFT trainer changes of TRL's."""

import pytest
import torch
import trl.trainer.utils
from transformers import LlamaConfig, LlamaForCausalLM

import sft.train
from sft.data import IGNORED

KERNEL = trl.trainer.utils._ChunkedLogProbFunction


def test_only_labelled_positions_pass_through_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sft.train.PackedSFTTrainer, "importing the module changes TRL's head"
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **shape))
    ids = torch.randint(64, (1, 12))
    labels = torch.where(torch.arange(12) % 3 == 0, ids, IGNORED)
    expected = model(ids, labels=labels).loss
    expected.backward()
    gradient = model.lm_head.weight.grad.clone()
    model.zero_grad()

    projected: list[int] = []
    apply = KERNEL.apply
    monkeypatch.setattr(KERNEL, "apply", lambda hidden, *rest: projected.append(len(hidden)) or apply(hidden, *rest))
    trl.trainer.utils.add_fused_lm_head(model)
    loss = model(ids, labels=labels, fused_lm_head=True).loss
    loss.backward()
    assert projected == [3]  # positions 3, 6 and 9; nothing predicts position 0
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(model.lm_head.weight.grad, gradient, atol=1e-6, rtol=0)
