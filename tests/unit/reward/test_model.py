"""Loading a reward model accounts for every weight; scores depend on nothing but the sequence."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    PreTrainedTokenizerBase,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from alignment.config import ModelConfig
from alignment.errors import UserError
from alignment.kernels.experts import FUSED
from reward.model import HEADLESS, ScalarHead, load_reward_model, load_trained_reward_model, reward_class

SEQUENCES = ([7, 8, 9, 2], [11, 12, 13, 14, 15, 16, 2], [21, 2])


def padded(side: str, pad: int) -> dict[str, torch.Tensor]:
    width = max(map(len, SEQUENCES))
    ids, mask = torch.full((len(SEQUENCES), width), pad), torch.zeros(len(SEQUENCES), width, dtype=torch.long)
    for row, sequence in enumerate(SEQUENCES):
        place = slice(0, len(sequence)) if side == "right" else slice(width - len(sequence), width)
        ids[row, place], mask[row, place] = torch.tensor(sequence), 1
    return {"input_ids": ids, "attention_mask": mask}


@torch.inference_mode()
def scores(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**inputs, use_cache=False).logits[:, 0]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pad", [0, 2, 33])  # 2 is the stop token, with which every sequence ends
def test_scores_do_not_depend_on_padding(reward_folder: Path, side: str, pad: int) -> None:
    model = load_trained_reward_model(reward_folder)
    alone = torch.cat([scores(model, {"input_ids": torch.tensor([sequence])}) for sequence in SEQUENCES])
    model.config.pad_token_id = pad
    torch.testing.assert_close(scores(model, padded(side, pad)), alone, atol=1e-5, rtol=0)
    assert alone.std() > 0.05


def test_the_same_for_a_dense_model_of_transformers(tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    config = Qwen3Config(
        vocab_size=len(tiny_tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.3,
        pad_token_id=2,
        eos_token_id=2,
        bos_token_id=None,
    )
    Qwen3ForCausalLM(config).save_pretrained(tmp_path)
    model = load_reward_model(ModelConfig(path=str(tmp_path)), tiny_tokenizer, seed=0).eval()
    assert isinstance(model, ScalarHead)
    model.config.pad_token_id = 2
    alone = torch.cat([scores(model, {"input_ids": torch.tensor([sequence])}) for sequence in SEQUENCES])
    torch.testing.assert_close(scores(model, padded("right", 2)), alone, atol=1e-5, rtol=0)


def test_the_seed_decides_the_head_and_nothing_else(
    tiny_model_folder: Path, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    source = ModelConfig(path=str(tiny_model_folder))
    first, again, other = (load_reward_model(source, tiny_tokenizer, seed=seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(first["score.weight"], again["score.weight"])
    assert [name for name in first if not torch.equal(first[name], other[name])] == ["score.weight"]


def test_the_head_stays_fp32_in_a_bf16_model(tiny_model_folder: Path, tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    source = ModelConfig(path=str(tiny_model_folder), dtype="bfloat16")
    model = load_reward_model(source, tiny_tokenizer, seed=1)
    assert model.model.embed_tokens.weight.dtype is torch.bfloat16
    assert model.score.weight.dtype is torch.float32
    assert scores(model, {"input_ids": torch.tensor([SEQUENCES[0]])}).dtype is torch.float32


@pytest.mark.parametrize("deviation", [0.02, 0.5])
def test_a_head_made_without_files_is_drawn_as_the_config_says(deviation: float) -> None:
    shape = {"hidden_size": 512, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = LlamaConfig(**shape, vocab_size=8, num_labels=1, initializer_range=deviation)
    assert reward_class(LlamaConfig)(config).score.weight.std().item() == pytest.approx(deviation, rel=0.2)


def test_the_head_computes_in_fp32_where_deepspeed_holds_it_in_bf16(
    tiny_model_folder: Path, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    model = load_reward_model(ModelConfig(path=str(tiny_model_folder), dtype="bfloat16"), tiny_tokenizer, seed=1)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    found = scores(model, {"input_ids": torch.tensor([SEQUENCES[0]])})
    assert found.dtype is torch.float32 and not torch.equal(found, found.bfloat16().float())


def test_experts_run_as_fast_as_in_the_base_model(reward_folder: Path) -> None:
    """transformers silently falls back to a slower loop for classes outside its own files."""
    assert load_trained_reward_model(reward_folder).config._experts_implementation == "grouped_mm"


def test_transformers_knows_the_class(reward_folder: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(reward_folder)
    ours = load_trained_reward_model(reward_folder)
    assert torch.equal(scores(model, padded("right", 0)), scores(ours, padded("right", 0)))


def without(folder: Path, copy: Path, name: str) -> Path:
    shutil.copytree(folder, copy)
    weights = load_file(copy / "model.safetensors")
    del weights[name]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


def test_a_dropped_head_is_an_error(
    reward_folder: Path, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    broken = without(reward_folder, tmp_path / "broken", "score.weight")
    with pytest.raises(UserError, match="head was dropped.*score.weight"):
        load_trained_reward_model(broken)
    with pytest.raises(UserError, match="head was dropped.*score.weight"):
        load_reward_model(ModelConfig(path=str(broken)), tiny_tokenizer, seed=0)


def test_another_missing_weight_is_an_error(
    tiny_model_folder: Path, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    broken = without(tiny_model_folder, tmp_path / "broken", "model.norm.weight")
    with pytest.raises(UserError, match=r"missing keys: model\.norm\.weight"):
        load_reward_model(ModelConfig(path=str(broken)), tiny_tokenizer, seed=0)


def test_a_language_model_is_not_a_reward_model(tiny_model_folder: Path) -> None:
    with pytest.raises(UserError, match="not a reward model.*Ernie4_5_MoeForCausalLM"):
        load_trained_reward_model(tiny_model_folder)


def test_a_head_of_two_outputs_is_refused(reward_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(reward_folder, tmp_path / "two")
    path = tmp_path / "two" / "config.json"
    config = json.loads(path.read_text()) | {"id2label": {"0": "a", "1": "b"}, "label2id": {"a": 0, "b": 1}}
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match="2 outputs, expected 1"):
        load_trained_reward_model(tmp_path / "two")


def test_the_config_chooses_the_kernels(tiny_model_folder: Path, tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    sources = [ModelConfig(path=str(tiny_model_folder)), ModelConfig(path=str(tiny_model_folder), kernels="torch")]
    loaded = [load_reward_model(source, tiny_tokenizer, seed=0) for source in sources]
    assert [model.config._experts_implementation for model in loaded] == [FUSED, "grouped_mm"]


# Whatever of these a family's config knows.
TINY = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0,
    "num_labels": 1, "initializer_range": 0.3, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1, "kv_lora_rank": 16,
    "q_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "first_k_dense_replace": 1,
}  # fmt: skip
FAMILIES = (
    *("llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3_moe", "gemma", "gemma2", "gemma3_text", "phi3"),
    *("deepseek_v3", "olmo2", "glm4", *HEADLESS),
)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_for_other_families(family: str) -> None:
    known = AutoConfig.for_model(family)
    config = AutoConfig.for_model(family, **{key: value for key, value in TINY.items() if hasattr(known, key)})
    torch.manual_seed(0)
    model = reward_class(type(config))(config).eval()
    assert isinstance(model, ScalarHead)
    assert type(model).__name__.endswith("ForSequenceClassification")
    alone = torch.cat([scores(model, {"input_ids": torch.tensor([sequence])}) for sequence in SEQUENCES])
    for side in ("left", "right"):
        torch.testing.assert_close(scores(model, padded(side, 1)), alone, atol=1e-5, rtol=1e-5)
    assert alone.std() > 0.05


@pytest.mark.parametrize(
    ("family", "why"),
    [
        ("gpt2", "GPT2ForSequenceClassification has a head of its own kind"),
        ("opt", "OPTForSequenceClassification has a head of its own kind"),
        ("modernbert", "ModernBertForSequenceClassification has a head of its own kind"),
        ("mamba", "transformers .* has no sequence classifier for it"),
    ],
)
def test_other_architectures_are_refused_plainly(family: str, why: str) -> None:
    with pytest.raises(UserError, match=f"^{family}: no reward model can be made of this architecture: {why}\n.*Llama"):
        reward_class(type(AutoConfig.for_model(family)))


def test_a_family_without_a_classifier_loads_trains_on_and_loads_again(
    tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    config = AutoConfig.for_model("granite", **{key: value for key, value in TINY.items() if "expert" not in key})
    config.vocab_size = len(tiny_tokenizer)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    made = load_reward_model(ModelConfig(path=str(tmp_path / "base")), tiny_tokenizer, seed=0).eval()
    made.save_pretrained(tmp_path / "reward")
    again = load_trained_reward_model(tmp_path / "reward")
    assert torch.equal(scores(again, padded("right", 0)), scores(made, padded("right", 0)))
