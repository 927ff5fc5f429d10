"""What `kernels: auto | torch` does to a model on a CPU, and to one that is made for a GPU and called on a CPU."""

import copy
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import trl.trainer.utils
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from alignment import models
from alignment.config import ModelConfig
from alignment.kernels import choices, experts, model

SMALL: dict[str, Any] = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": None,
    "eos_token_id": 1, "tie_word_embeddings": False, "num_experts_per_tok": 2,
}  # fmt: skip
MLA: dict[str, Any] = {
    "q_lora_rank": None, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
    "num_key_value_heads": 4,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1, "moe_layer_start_index": 1},
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {"num_experts": 4, "shared_expert_intermediate_size": 24},
    "qwen3_moe": {"num_experts": 4},
    "deepseek_v2": MLA,
    "deepseek_v3": MLA,
}
IDS = torch.randint(2, 60, (2, 9), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS).index_put((torch.tensor([1, 1]), torch.tensor([0, 1])), torch.tensor(0))


def make(family: str, **changes: Any) -> Any:
    config = AutoConfig.for_model(family, **{**SMALL, **FAMILIES.get(family, {}), **changes})
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


def logits_and_gradients(of: Any) -> dict[str, Tensor]:
    logits = of(input_ids=IDS, attention_mask=MASK).logits[MASK.bool()]
    of.zero_grad()
    logits.log_softmax(-1)[:, 7].sum().backward()
    return {"logits": logits} | {name: p.grad for name, p in of.named_parameters() if p.grad is not None}


def assert_same(left: Any, right: Any) -> None:
    found, expected = logits_and_gradients(left), logits_and_gradients(right)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        largest = tensor.detach().abs().max().clamp(min=1).item()
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-5 * largest)


def patched(of: Any) -> set[str]:
    return {type(module).__name__ for module in of.modules() if "forward" in vars(module)}


@pytest.mark.parametrize("family", FAMILIES)
def test_auto_equals_torch_in_logits_and_every_gradient(monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    monkeypatch.setattr(model, "why_no_triton", lambda: "no GPU")  # on a machine with one too
    plain, fused = make(family), model.use_kernels(make(family), "auto")
    assert fused.config._experts_implementation == experts.FUSED
    assert plain.config._experts_implementation == "grouped_mm"
    assert patched(fused) == set()
    assert_same(fused, plain)


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("ernie4_5_moe", {"Ernie4_5_MoeRMSNorm", "Ernie4_5_MoeMLP", "Ernie4_5_MoeAttention"}),
        ("qwen3_moe", {"Qwen3MoeRMSNorm", "Qwen3MoeAttention"}),  # all its layers are sparse, without a shared expert
        ("mixtral", {"MixtralRMSNorm", "MixtralAttention"}),
        ("llama", {"LlamaRMSNorm", "LlamaMLP", "LlamaAttention"}),
    ],
)
def test_a_model_made_for_a_gpu_is_right_on_a_cpu(
    monkeypatch: pytest.MonkeyPatch, family: str, expected: set[str]
) -> None:
    monkeypatch.setattr(model, "why_no_triton", lambda: None)
    plain, fused = make(family), model.use_kernels(make(family), "auto")
    assert patched(fused) == expected
    assert patched(plain) == set()
    assert_same(fused, plain)


def test_a_copy_has_kernels_over_its_own_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL copies a model for its reference."""
    monkeypatch.setattr(model, "why_no_triton", lambda: None)
    fused = model.use_kernels(make("ernie4_5_moe"), "auto")
    before = fused(input_ids=IDS).logits
    copied = copy.deepcopy(fused)
    for parameter in copied.parameters():
        parameter.data.zero_()
    assert copied(input_ids=IDS).logits.abs().max() == 0
    assert torch.equal(fused(input_ids=IDS).logits, before)


def test_families_that_were_not_compared_stay_as_they_are(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(model, "why_no_triton", lambda: None)
    with caplog.at_level(logging.WARNING):
        fused = model.use_kernels(make("deepseek_v3"), "auto")
    assert patched(fused) == set()
    assert fused.config._experts_implementation == experts.FUSED
    assert "deepseek_v3 was not compared" in caplog.text


def test_other_experts_stay_as_they_are(caplog: pytest.LogCaptureFixture) -> None:
    """GPT-OSS: biases, and another activation."""
    of = make("gpt_oss", num_local_experts=4)
    with caplog.at_level(logging.WARNING):
        model.use_kernels(of, "auto")
    assert of.config._experts_implementation == "grouped_mm"
    assert "without biases" in caplog.text


def test_the_config_chooses(tiny_model_folder: Path, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    def load(**source: Any) -> Any:
        return models.load_model(ModelConfig(**source), tiny_tokenizer, seed=0)

    folder = str(tiny_model_folder)
    assert load(path=folder).config._experts_implementation == experts.FUSED
    assert load(path=folder, kernels="torch").config._experts_implementation == "grouped_mm"
    assert load(preset="compass-tiny", tokenizer=folder).config._experts_implementation == experts.FUSED

    load(path=folder).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == json.loads(
        (tiny_model_folder / "config.json").read_text()
    )


def test_choices_name_what_runs_and_why_not_the_fused_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choices, "why_no_triton", lambda: "Triton needs an NVIDIA GPU")
    found = {choice.operation: choice.detail for choice in choices.choices()}
    assert found["RMSNorm"] == "torch, not Liger: Triton needs an NVIDIA GPU"
    assert found["Expert GEMM"] == "torch grouped_mm"

    monkeypatch.setattr(choices, "why_no_triton", lambda: None)
    fused = {choice.operation: choice.detail for choice in choices.choices()}
    assert fused.keys() == found.keys()
    assert fused["RMSNorm"] == "Liger"


class LargestTensor(TorchDispatchMode):
    """The largest number of elements that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


def test_loss_over_the_chunked_head_makes_no_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL's head, which the trainers use: [18, 1000] logits are never there, and all gradients are theirs."""
    monkeypatch.setattr(trl.trainer.utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", 100)
    plain, fused = (make("qwen2", vocab_size=1000, hidden_size=16, intermediate_size=24, head_dim=4) for _ in range(2))
    trl.trainer.utils.add_fused_lm_head(fused)
    with LargestTensor() as largest:
        loss = fused(input_ids=IDS, labels=IDS, fused_lm_head=True).loss
        loss.backward()
    assert largest.numel == 1000 * 16  # the head's weight and its gradient
    expected = plain(input_ids=IDS, labels=IDS).loss
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    for found, parameter in zip(fused.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found.grad, parameter.grad, rtol=1e-5, atol=1e-5)
