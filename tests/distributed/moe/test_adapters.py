"""LoRA adapters on two gloo ranks with DeepSpeed AutoEP under a real Trainer, against one process and plain peft."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Ernie4_5_MoeConfig, PreTrainedTokenizerFast, Qwen2MoeConfig

from alignment.adapters import merge_adapter
from alignment.config import ModelConfig

Launch = Callable[..., subprocess.CompletedProcess[str]]
STEPS = 5
SHAPE: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "moe_intermediate_size": 16,
    "initializer_range": 0.2, "tie_word_embeddings": True,
}  # fmt: skip
BASES = {
    "ernie": Ernie4_5_MoeConfig(**SHAPE, moe_num_experts=4, moe_k=2, moe_num_shared_experts=1, moe_layer_start_index=1),
    "qwen2": Qwen2MoeConfig(
        **SHAPE, num_experts=4, num_experts_per_tok=2, shared_expert_intermediate_size=16, decoder_sparse_step=1
    ),
}
TWO_RANKS = [
    {"name": "zero1"},
    {"name": "resumed", "resume": "zero1/checkpoints/checkpoint-3"},
    {"name": "zero0", "stage": 0},
    {"name": "zero2", "stage": 2},
    {"name": "qwen", "base": "qwen2"},
    {"name": "bf16", "dtype": "bfloat16"},
    {"name": "dora", "dora": True},
    {"name": "experts", "refused": ["experts.down_proj"]},
    {"name": "router", "refused": ["gate.weight"]},
    {"name": "zero3", "stage": 3, "refused": []},
]
ONE_PROCESS = [{"name": "one"}, {"name": "one_qwen", "base": "qwen2"}, {"name": "one_dora", "dora": True}]


@pytest.fixture(scope="module")
def runs(launch: Launch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("adapters")
    for name, config in BASES.items():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(out / name)
    for cases, ranks in ((ONE_PROCESS, 1), (TWO_RANKS, 2)):
        launch("adapter_worker.py", out, json.dumps(cases), ranks=ranks)
    return out


def record(runs: Path, case: str, rank: int = 0) -> Any:
    return torch.load(runs / case / f"rank{rank}.pt")


def adapter(runs: Path, case: str) -> dict[str, torch.Tensor]:
    return load_file(runs / case / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("case", "single"), [("zero0", "one"), ("zero1", "one"), ("zero2", "one"), ("qwen", "one_qwen")]
)
def test_two_ranks_train_an_adapter_as_one_process_does(runs: Path, case: str, single: str) -> None:
    """Names too: Qwen2's `shared_expert` is `shared_experts` inside AutoEP. Both matrices of every pair have moved."""
    one, two = record(runs, single), record(runs, case)
    assert len(one["losses"]) == STEPS
    assert two["losses"] == pytest.approx(one["losses"], abs=1e-5)
    if case != "zero0":  # where DeepSpeed clips, but reports no norm
        assert two["grad_norms"] == pytest.approx(one["grad_norms"], abs=1e-5)
    assert min(one["grad_norms"]) > 0.1, "clipping at 0.1 must have been at work"
    torch.testing.assert_close(adapter(runs, case), adapter(runs, single), rtol=0, atol=1e-5)
    names = adapter(runs, case)
    assert sum("shared_expert" in name for name in names) == (6 if case != "qwen" else 12)
    assert all(weight.abs().max() > 1e-3 for weight in names.values())


def test_dora_trains_on_two_ranks_as_in_one_process(runs: Path) -> None:
    one, two = record(runs, "one_dora"), record(runs, "dora")
    assert two["losses"] == pytest.approx(one["losses"], abs=1e-5)
    assert two["grad_norms"] == pytest.approx(one["grad_norms"], abs=1e-5)
    trained = adapter(runs, "dora")
    torch.testing.assert_close(trained, adapter(runs, "one_dora"), rtol=0, atol=1e-5)
    assert sum("lora_magnitude_vector" in name for name in trained) == 4, "two weights in each of two layers"


@pytest.mark.parametrize(
    ("case", "base"), [("zero1", "ernie"), ("qwen", "qwen2"), ("bf16", "ernie"), ("dora", "ernie")]
)
def test_plain_peft_loads_the_adapter_and_answers_as_the_engine(runs: Path, case: str, base: str) -> None:
    """In bfloat16 to the bit, if peft keeps the adapter in it as the engine did; by default it widens it."""
    engine = record(runs, case)
    dtype = torch.bfloat16 if case == "bf16" else torch.float32
    plain = AutoModelForCausalLM.from_pretrained(runs / base, dtype=dtype).eval()
    inputs = {key: engine["probe"][key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        before = plain(**inputs).logits
        loaded = PeftModel.from_pretrained(plain, runs / case / "adapter", autocast_adapter_dtype=False).eval()
        outputs = loaded(**inputs, output_router_logits=True)
    assert (before - outputs.logits).abs().max() > 0.3, "the adapter does something"
    torch.testing.assert_close(outputs.logits, engine["logits"], rtol=0, atol=1e-5)
    torch.testing.assert_close(outputs.router_logits, engine["router_logits"], rtol=0, atol=1e-5)
    torch.testing.assert_close(record(runs, case, rank=1)["logits"], engine["logits"], rtol=0, atol=1e-5)


def test_a_resumed_adapter_ends_with_the_same_bits(runs: Path) -> None:
    whole, resumed = record(runs, "zero1"), record(runs, "resumed")
    assert resumed["losses"] == whole["losses"]
    torch.testing.assert_close(adapter(runs, "resumed"), adapter(runs, "zero1"), rtol=0, atol=0)


def test_checkpoints_hold_the_adapter_alone(runs: Path) -> None:
    """No expert: DeepSpeed would write all of them, frozen as they are, into every checkpoint."""
    checkpoint = runs / "zero1" / "checkpoints" / f"checkpoint-{STEPS}"
    saved = load_file(checkpoint / "adapter_model.safetensors")
    torch.testing.assert_close(saved, adapter(runs, "zero1"), rtol=0, atol=0)
    assert not [path.name for path in checkpoint.rglob("*expert*")]
    (state,) = checkpoint.rglob("mp_rank_00_model_states.pt")
    module = torch.load(state, weights_only=False)["module"]
    assert not [name for name in module if ".experts." in name]
    assert set(saved) <= {name.replace(".default.", ".") for name in module}


def test_an_adapter_of_two_ranks_merges(runs: Path, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    tiny_tokenizer.save_pretrained(runs / "ernie")
    merge_adapter(ModelConfig(path=str(runs / "ernie")), runs / "zero1" / "adapter", tmp_path / "merged")


def test_what_autoep_would_lose_is_refused(runs: Path) -> None:
    assert "model.layers.1.mlp.experts is adapted, but under expert parallelism" in record(runs, "experts")
    assert "model.layers.1.mlp.gate is adapted, but under expert parallelism" in record(runs, "router")
    assert "DeepSpeed cannot save frozen experts under ZeRO 3" in record(runs, "zero3")
