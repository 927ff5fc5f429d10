"""The summed loss: by hand, against cross entropy in float64, on whole models, and where a model does not take it."""

import inspect
import math
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from transformers import (
    Ernie4_5_MoeConfig,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto import AutoModelForCausalLM
from trl.trainer.utils import add_fused_lm_head

import sft.loss
from sft.loss import IGNORED, add_summed_loss, summed_nll, takes_summed_loss
from sft.trainer import PackedSFTTrainer, SummedLossTrainer

VOCAB, TOKENS = 64, 24
SHAPE = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": 1,
    "pad_token_id": 0, "initializer_range": 0.2,
}  # fmt: skip
EXPERTS = {"moe_intermediate_size": 16, "moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 0}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SHAPE, tie_word_embeddings=False),
    "llama-tied": LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "ernie": Ernie4_5_MoeConfig(**SHAPE, **EXPERTS, tie_word_embeddings=False),
    "ernie-tied": Ernie4_5_MoeConfig(**SHAPE, **EXPERTS, tie_word_embeddings=True),
}


def make(config: PreTrainedConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model


def rows() -> tuple[torch.Tensor, torch.Tensor]:
    """Two rows; about a third of the tokens is labelled, the first of a row too, which no token predicts."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(VOCAB, (2, TOKENS), generator=generator)
    labels = torch.where(torch.rand(ids.shape, generator=generator) < 0.3, ids, IGNORED)
    labels[:, 0] = ids[:, 0]
    return ids, labels


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


# the sum itself


def test_two_tokens_by_hand() -> None:
    """Logits (0, ln 3) and (ln 3, 0), both for token 1: probabilities 3/4 and 1/4, losses ln 4/3 and ln 4.

    The gradient of a token's logits is p - onehot: (1/4, -1/4) and (3/4, -3/4). With W the identity that is its hidden
    state's; W's row v gathers sum_n (p - onehot)_nv h_n.
    """
    ln3 = math.log(3)
    hidden = torch.tensor([[0.0, ln3], [ln3, 0.0]], dtype=torch.float64, requires_grad=True)
    weight = torch.eye(2, dtype=torch.float64, requires_grad=True)
    loss = summed_nll(hidden, weight, torch.tensor([1, 1]))
    loss.backward()
    assert loss.item() == pytest.approx(math.log(4 / 3) + math.log(4), abs=1e-12)
    expected = torch.tensor([[0.25, -0.25], [0.75, -0.75]], dtype=torch.float64)
    torch.testing.assert_close(hidden.grad, expected, atol=1e-12, rtol=0)
    rows_of_w = torch.tensor([[0.75 * ln3, 0.25 * ln3], [-0.75 * ln3, -0.25 * ln3]], dtype=torch.float64)
    torch.testing.assert_close(weight.grad, rows_of_w, atol=1e-12, rtol=0)


@pytest.mark.parametrize("chunk", [1, 7, 64, 700, 1000, None])
@pytest.mark.parametrize("bias", [False, True])
def test_value_and_gradients_are_those_of_cross_entropy(
    chunk: int | None, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sft.loss, "CHUNK", {} if chunk is None else {"cpu": chunk})
    torch.manual_seed(0)
    leaves = [torch.randn(700, 16, dtype=torch.float64), torch.randn(50, 16, dtype=torch.float64)]
    leaves += [torch.randn(50, dtype=torch.float64)] if bias else []
    leaves = [leaf.requires_grad_() for leaf in leaves]
    target = torch.randint(50, (700,))
    ours = summed_nll(leaves[0], leaves[1], target, *leaves[2:])
    logits = torch.nn.functional.linear(*leaves)
    theirs = torch.nn.functional.cross_entropy(logits, target, reduction="sum")
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-9)  # of about 7,000
    for mine, reference in zip(*(torch.autograd.grad(3 * loss, leaves) for loss in (ours, theirs)), strict=True):
        torch.testing.assert_close(mine, reference, atol=1e-10, rtol=0)


def test_no_label_at_all_is_no_loss_with_zero_gradients() -> None:
    hidden, weight = torch.randn(0, 16, requires_grad=True), torch.randn(50, 16, requires_grad=True)
    loss = summed_nll(hidden, weight, torch.zeros(0, dtype=torch.long))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(weight.grad, torch.zeros_like(weight)) and hidden.grad.shape == (0, 16)


# on whole models


@pytest.mark.parametrize("kind", CONFIGS)
def test_loss_and_every_gradient_are_the_model_s_own(kind: str) -> None:
    model, (ids, labels) = make(CONFIGS[kind]), rows()
    count = int((labels[:, 1:] != IGNORED).sum())
    own = model(input_ids=ids, labels=labels).loss * count  # the model's is the mean
    own.backward()
    expected = gradients(model)
    add_summed_loss(model)
    ours = model(input_ids=ids, labels=labels, summed_loss=True).loss
    ours.backward()
    assert ours.item() / count == pytest.approx(own.item() / count, abs=1e-6)
    found = gradients(model)
    assert found.keys() == expected.keys() and len(found) > 15
    for name, gradient in found.items():
        torch.testing.assert_close(gradient / count, expected[name] / count, atol=1e-6, rtol=0, msg=name)


def test_only_labelled_positions_pass_through_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (ids, labels) = make(CONFIGS["llama"]), rows()
    add_summed_loss(model)
    projected: list[int] = []
    real = sft.loss.linear_cross_entropy

    def counting(hidden: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        projected.append(len(hidden))
        return real(hidden, *rest, **options)

    monkeypatch.setattr(sft.loss, "linear_cross_entropy", counting)
    model.lm_head.register_forward_hook(lambda *_: pytest.fail("the head itself is called"))
    model(input_ids=ids, labels=labels, summed_loss=True)
    assert projected == [int((labels[:, 1:] != IGNORED).sum())]
    assert 0 < projected[0] < TOKENS


def test_a_row_without_labels_gives_zero_gradients_to_all() -> None:
    """A rank with a filler takes part in the all-reduce of every gradient."""
    model, (ids, labels) = make(CONFIGS["ernie-tied"]), rows()
    model(input_ids=ids, labels=labels).loss.backward()
    expected = gradients(model)
    add_summed_loss(model)
    loss = model(input_ids=ids, labels=torch.full_like(ids, IGNORED), summed_loss=True).loss
    loss.backward()
    found = gradients(model)
    assert loss.item() == 0
    assert found.keys() == expected.keys() and not any(gradient.any() for gradient in found.values())


def test_called_otherwise_the_model_is_as_before() -> None:
    model, (ids, labels) = make(CONFIGS["llama"]), rows()
    before = model(input_ids=ids, labels=labels)
    add_summed_loss(model)
    after = model(input_ids=ids, labels=labels)
    assert torch.equal(after.loss, before.loss) and torch.equal(after.logits, before.logits)
    torch.testing.assert_close(model(ids, logits_to_keep=1).logits, before.logits[:, -1:], atol=1e-5, rtol=0)
    assert "loss" not in model(input_ids=ids)


@pytest.mark.parametrize("fused_first", [False, True])
def test_the_signature_is_the_model_s_own(fused_first: bool) -> None:
    """transformers and RouterLossMixin ask it what the model takes; TRL's head lies under ours in training."""
    model = make(CONFIGS["ernie"])
    expected = list(inspect.signature(model.forward).parameters)
    if fused_first:
        add_fused_lm_head(model)
    add_summed_loss(model)
    assert list(inspect.signature(model.forward).parameters) == expected
    assert expected[0] == "input_ids" and "logits_to_keep" in expected


def test_router_losses_count_ahead_without_the_head_s_logits() -> None:
    """Of a model with the summed loss, RouterLossMixin asks for the last position's logits alone."""
    model, (ids, _) = make(CONFIGS["ernie"]), rows()
    add_summed_loss(model)
    widths: list[int] = []
    model.lm_head.register_forward_hook(lambda _module, inputs, _output: widths.append(inputs[0].shape[1]))
    trainer = cast(Any, SimpleNamespace(
        model_wrapped=model, accelerator=SimpleNamespace(unwrap_model=lambda wrapped: wrapped),
        _router_watch=SimpleNamespace(recording=lambda gradient: torch.no_grad()), _prepare_inputs=lambda batch: batch,
        _counts=lambda *_: torch.zeros(1), routed_tokens=lambda inputs: inputs["input_ids"] > 0,
    ))  # fmt: skip
    list(PackedSFTTrainer._counts_ahead(trainer, [{"input_ids": ids}]))
    assert widths == [1]


# models that do not take it


@pytest.mark.parametrize(
    ("config", "dtype", "takes"),
    [
        (CONFIGS["llama"], torch.float32, True),
        (CONFIGS["ernie-tied"], torch.float32, True),
        (CONFIGS["llama"], torch.bfloat16, False),
        (GraniteConfig(**SHAPE, logits_scaling=4.0), torch.float32, False),
        (Gemma2Config(**SHAPE, final_logit_softcapping=2.0), torch.float32, False),
        (Gemma2Config(**SHAPE, final_logit_softcapping=None), torch.float32, True),
    ],
)
def test_which_models_take_the_summed_loss(config: PreTrainedConfig, dtype: torch.dtype, takes: bool) -> None:
    assert takes_summed_loss(make(config, dtype)) is takes


@pytest.mark.parametrize(
    "config",
    [GraniteConfig(**SHAPE, logits_scaling=4.0), Gemma2Config(**SHAPE, final_logit_softcapping=2.0)],
    ids=["scaled", "capped"],
)
def test_others_get_the_same_loss_from_the_fused_head(config: PreTrainedConfig) -> None:
    model, (ids, labels) = make(config), rows()
    count = int((labels[:, 1:] != IGNORED).sum())
    own = model(input_ids=ids, labels=labels).loss
    own.backward()
    expected = gradients(model)
    add_fused_lm_head(model)
    trainer = cast(Any, SimpleNamespace(_sums=False, accelerator=SimpleNamespace(num_processes=1)))
    trainer._fused_nll = lambda *arguments: SummedLossTrainer._fused_nll(trainer, *arguments)
    trainer._nll = lambda *arguments: SummedLossTrainer._nll(trainer, *arguments)
    ours = SummedLossTrainer.compute_loss(trainer, model, {"input_ids": ids, "labels": labels}, False, count)
    ours.backward()
    assert ours.item() == pytest.approx(own.item(), abs=1e-5)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=0, msg=name)
    add_summed_loss(model)
    unscaled = model(input_ids=ids, labels=labels, summed_loss=True).loss / count
    assert abs(unscaled.item() - own.item()) > 0.01, "the summed loss would be wrong here"
