"""One forward over pairs: packed, padded on either side and whole softmax agree, and pairs do not see each other."""

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    Ernie4_5_MoeConfig,
    Gemma2Config,
    GptOssConfig,
    GraniteConfig,
    Lfm2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)
from transformers.models.auto import AutoModelForCausalLM

import dpo.logps
from dpo.data import PairCollator
from dpo.forward import Completions, Way, causal_model, choose_way, completions
from dpo.loss import weighted_dpo_loss
from dpo.ot import ot_token_weights

VOCAB, LIMIT = 64, 1e-5
SHAPE = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": 1,
    "pad_token_id": 0, "initializer_range": 0.2,
}  # fmt: skip
EXPERTS = {"moe_intermediate_size": 16, "moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 0}
PACKED: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SHAPE, tie_word_embeddings=False),
    "qwen3-tied": Qwen3Config(**SHAPE, tie_word_embeddings=True),
    "mistral-window": MistralConfig(**SHAPE, sliding_window=5),
    "ernie": Ernie4_5_MoeConfig(**SHAPE, **EXPERTS, tie_word_embeddings=True),
}
FALLBACKS: dict[str, tuple[PreTrainedConfig, str, str]] = {
    "granite": (GraniteConfig(**SHAPE, logits_scaling=3.0), "", "changes its logits behind the head"),
    "gemma2": (Gemma2Config(**SHAPE), "softcap=50.0", "changes its logits behind the head"),
    "gpt_oss": (GptOssConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2), "s_aux", ""),
    "lfm2": (Lfm2Config(**SHAPE, layer_types=["conv", "full_attention"]), "not kept apart", ""),
}


def make(config: PreTrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(copy.deepcopy(config))  # which it would share
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("mlp.gate.weight"):  # they start at zero, which is an even choice
                parameter.normal_(std=0.5)
    return model


def draw_pairs(count: int = 4, seed: int = 0) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)

    def ids(most: int) -> list[int]:
        length = int(torch.randint(1, most, (), generator=generator))
        return torch.randint(2, VOCAB, (length,), generator=generator).tolist()

    return [
        {"prompt_ids": ids(8), "chosen_ids": ids(9), "rejected_ids": ids(20), "row": row, "pair_weight": 1.0}
        for row in range(count)
    ]


def padded_left(pairs: list[dict[str, Any]]) -> dict[str, Any]:
    """The padded batch with its padding in front, and the places that go with it."""
    batch: dict[str, Any] = PairCollator(0)(pairs)
    width = batch["input_ids"].shape[1]
    shifts = width - batch["attention_mask"].sum(1)
    for name in ("input_ids", "attention_mask"):
        rows = zip(batch[name], shifts.tolist(), strict=True)
        batch[name] = torch.stack([row.roll(shift) for row, shift in rows])
    batch["predictors"] = batch["predictors"] + shifts[batch["predictors"] // width]
    return batch


LAYOUTS: dict[str, Callable[[list[dict[str, Any]]], dict[str, Any]]] = {
    "packed": PairCollator(0, packed=True),
    "right": PairCollator(0),
    "left": padded_left,
}


def one_by_one(model: Any, pairs: list[dict[str, Any]]) -> Completions:
    """Every sequence alone, by whole logits and all hidden states."""
    batch: dict[str, Any] = PairCollator(0)(pairs)
    mask = batch["completion_mask"]
    logps, hidden = torch.zeros(mask.shape), torch.zeros(*mask.shape, SHAPE["hidden_size"])
    sides = [(pair["prompt_ids"], pair[key]) for key in ("chosen_ids", "rejected_ids") for pair in pairs]
    for row, (prompt, answer) in enumerate(sides):
        outputs = model(torch.tensor([prompt + answer]), output_hidden_states=True)
        before = slice(len(prompt) - 1, len(prompt) + len(answer) - 1)
        predicted = outputs.logits[0, before].float().log_softmax(-1)
        logps[row, : len(answer)] = predicted.gather(-1, torch.tensor(answer)[:, None])[:, 0]
        hidden[row, : len(answer)] = outputs.hidden_states[-1][0, before].detach()
    return Completions(logps, mask, hidden)


def loss_of(found: Completions) -> Tensor:
    """OT-DPO against a reference that is noise."""
    assert found.hidden is not None
    reference = torch.randn(found.mask.shape, generator=torch.Generator().manual_seed(3)) * found.mask - 3
    w_c, w_r, _ = ot_token_weights(*found.hidden.chunk(2), *found.mask.chunk(2), reg=0.1)
    sides = zip(found.logps.chunk(2), reference.chunk(2), strict=True)
    (policy_c, reference_c), (policy_r, reference_r) = sides
    return weighted_dpo_loss(policy_c, policy_r, reference_c, reference_r, w_c, w_r, 0.3).losses.mean()


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def forward(model: nn.Module, batch: dict[str, Any], way: Way) -> Completions:
    return completions(model, causal_model(model), batch, way, hidden=True)


def check(
    model: PreTrainedModel, way: Way, batch: dict[str, Any], alone: Completions, grads: dict[str, Tensor]
) -> None:
    found = forward(model, batch, way)
    assert found.hidden is not None and not found.hidden.requires_grad
    torch.testing.assert_close(found, alone, atol=LIMIT, rtol=0)
    assert not found.logps[~found.mask].any()
    loss = loss_of(found)
    assert loss.item() == pytest.approx(loss_of(alone).item(), abs=LIMIT)
    ours = gradients(model, loss)
    assert ours.keys() == grads.keys() and len(ours) > 15
    torch.testing.assert_close(ours, grads, atol=LIMIT, rtol=0)


@pytest.mark.parametrize("family", PACKED)
def test_losses_and_gradients_are_those_of_each_sequence_alone(family: str) -> None:
    model, pairs = make(PACKED[family]), draw_pairs()
    alone = one_by_one(model, pairs)
    grads = gradients(model, loss_of(alone))
    for layout in ("right", "left"):  # before the model's attention becomes that of segments
        check(model, Way(padded="asked for"), LAYOUTS[layout](pairs), alone, grads)
    way = choose_way(model, model)
    assert way == Way() and way.metrics == {"forward.padded": 0, "forward.whole_logits": 0}
    check(model, way, LAYOUTS["packed"](pairs), alone, grads)
    check(model, Way(whole_logits="asked for"), LAYOUTS["packed"](pairs), alone, grads)


@pytest.mark.parametrize("family", FALLBACKS)
def test_models_that_cannot_take_the_fast_way_are_right_all_the_same(
    family: str, caplog: pytest.LogCaptureFixture
) -> None:
    config, padded, whole_logits = FALLBACKS[family]
    model, pairs = make(config), draw_pairs()
    alone = one_by_one(model, pairs)
    grads = gradients(model, loss_of(alone))
    with caplog.at_level(logging.WARNING, "dpo.forward"):
        way = choose_way(model, model)
    for said, reason in ((padded, way.padded), (whole_logits, way.whole_logits)):
        assert said in reason and bool(said) == bool(reason)
        assert reason in caplog.text
    assert (way.metrics["forward.padded"], way.metrics["forward.whole_logits"]) == (bool(padded), bool(whole_logits))
    assert model.training
    check(model, way, LAYOUTS["right" if padded else "packed"](pairs), alone, grads)


def test_a_changed_completion_moves_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    model, pairs = make(PACKED["llama"]), draw_pairs()
    way = choose_way(model, model)
    before = forward(model, LAYOUTS["packed"](pairs), way)
    pairs[1]["chosen_ids"] = [5 if token != 5 else 6 for token in pairs[1]["chosen_ids"]]
    after = forward(model, LAYOUTS["packed"](pairs), way)
    moved = (after.logps - before.logps).abs().amax(1)
    assert moved[1] > 0.1
    assert moved[[0, *range(2, 8)]].max() < 1e-6


def test_a_pair_is_the_same_in_any_batch() -> None:
    model, pairs = make(PACKED["ernie"]), draw_pairs()
    way = choose_way(model, model)
    together = forward(model, LAYOUTS["packed"](pairs), way)
    turned = forward(model, LAYOUTS["packed"](pairs[::-1]), way)
    back = [3, 2, 1, 0, 7, 6, 5, 4]
    torch.testing.assert_close(turned.logps[back], together.logps, atol=LIMIT, rtol=0)
    for number, pair in enumerate(pairs):
        alone = forward(model, LAYOUTS["packed"]([pair]), way)
        width = alone.logps.shape[1]
        torch.testing.assert_close(together.logps[[number, number + 4], :width], alone.logps, atol=LIMIT, rtol=0)
        torch.testing.assert_close(together.hidden[[number, number + 4], :width], alone.hidden, atol=LIMIT, rtol=0)


def test_adapters_and_a_frozen_copy() -> None:
    """The adapter's model goes through peft; a copy that no probe has seen gets the attention of the policy."""
    base, pairs = make(PACKED["llama"]), draw_pairs()
    frozen = make(PACKED["llama"])
    expected = one_by_one(frozen, pairs)
    torch.manual_seed(1)
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    way = choose_way(adapted, causal_model(adapted))
    assert way == Way()
    found = forward(adapted, LAYOUTS["packed"](pairs), way)
    with adapted.disable_adapter():
        torch.testing.assert_close(forward(adapted, LAYOUTS["packed"](pairs), way), expected, atol=LIMIT, rtol=0)
    of_copy = forward(frozen, LAYOUTS["packed"](pairs), way)
    torch.testing.assert_close(of_copy, expected, atol=LIMIT, rtol=0)
    assert (of_copy.logps - found.logps).abs().max() > 0.1
    base.set_attn_implementation("sdpa")
    alone = one_by_one(adapted, pairs)
    torch.testing.assert_close(found, alone, atol=LIMIT, rtol=0)
    grads = gradients(adapted, loss_of(alone))
    torch.testing.assert_close(gradients(adapted, loss_of(found)), grads, atol=LIMIT, rtol=0)


def test_an_adapter_on_the_head_keeps_whole_logits() -> None:
    base, pairs = make(PACKED["llama"]), draw_pairs()
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False))
    way = choose_way(adapted, base)
    assert "not a linear layer" in way.whole_logits and not way.padded
    found = forward(adapted, LAYOUTS["packed"](pairs), way)
    base.set_attn_implementation("sdpa")
    torch.testing.assert_close(found.logps, one_by_one(adapted, pairs).logps, atol=LIMIT, rtol=0)


def test_the_head_is_left_as_it_was() -> None:
    """The head's own forward is back after every call, also after one that failed."""
    model, pairs = make(PACKED["llama"]), draw_pairs()
    batch: Any = LAYOUTS["right"](pairs)
    with pytest.raises(IndexError):
        completions(model, model, batch | {"predictors": batch["predictors"] + 10_000}, Way(padded="asked for"))
    assert "forward" not in vars(model.lm_head)
    assert not model.lm_head._forward_pre_hooks
    assert model(batch["input_ids"]).logits.shape[-1] == VOCAB


def test_empty_completions() -> None:
    model, (pair, *_) = make(PACKED["llama"]), draw_pairs()
    way = choose_way(model, model)
    full = forward(model, LAYOUTS["packed"]([pair]), way)
    half = forward(model, LAYOUTS["packed"]([pair | {"rejected_ids": []}]), way)
    width = len(pair["chosen_ids"])
    torch.testing.assert_close(half.logps[0], full.logps[0, :width], atol=LIMIT, rtol=0)
    assert not half.mask[1].any() and not half.logps[1].any()
    none = forward(model, LAYOUTS["packed"]([pair | {"rejected_ids": [], "chosen_ids": []}]), way)
    assert none.logps.shape == (2, 0)
    none.logps.sum().backward()
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)


def test_only_completion_tokens_pass_through_the_head_a_chunk_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dpo.logps, "CHUNK", {"cpu": 7})
    sizes: list[int] = []
    product = torch.mm

    def counting(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
        sizes.append(len(left))
        return product(left, right, out=out)

    model, pairs = make(PACKED["llama"]), draw_pairs()
    way = choose_way(model, model)
    monkeypatch.setattr(dpo.logps.torch, "mm", counting)
    forward(model, LAYOUTS["packed"](pairs), way)
    tokens = sum(len(pair["chosen_ids"]) + len(pair["rejected_ids"]) for pair in pairs)
    assert sum(sizes) == tokens and max(sizes) == 7
