"""A tokenizer of words and tiny models, made on the spot."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    Ernie4_5_MoeConfig,
    Ernie4_5_MoeForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from alignment.chat import CHATML, PAD, TURN_END, TURN_START

WORDS = [
    "system",
    "user",
    "assistant",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "plus",
    "is",
]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors: threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    special = [PAD, TURN_START, TURN_END, "<unk>"]
    vocabulary = {word: i for i, word in enumerate([*special, "\n", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=PAD, eos_token=TURN_END, additional_special_tokens=[TURN_START]
    )
    made.chat_template = CHATML
    return made


def preference(i: int, prompt: str, chosen: str, rejected: str) -> dict[str, Any]:
    return {
        "id": f"row-{i}",
        "prompt": [{"role": "user", "content": prompt}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
    }


@pytest.fixture(scope="session")
def rows() -> list[dict[str, Any]]:
    return [
        preference(0, "one plus two", "three", "four is five six"),
        preference(1, "two plus two", "is four", "five"),
        preference(2, "one plus one", "two", "three three"),
        preference(3, "four plus three", "seven is seven", "nine is one two three"),
        preference(4, "four plus four", "eight", "nine"),
        preference(5, "three plus one is", "four", "two two two"),
        preference(6, "five plus one", "is six", "is nine two"),
    ]


@pytest.fixture
def ernie(tokenizer: PreTrainedTokenizerFast) -> Ernie4_5_MoeForCausalLM:
    config = Ernie4_5_MoeConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, moe_intermediate_size=16, moe_num_experts=4,
        moe_k=2, moe_num_shared_experts=1, moe_layer_start_index=0, initializer_range=0.2, router_aux_loss_coef=0.0,
        bos_token_id=None, pad_token_id=0, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    return Ernie4_5_MoeForCausalLM(config)


@pytest.fixture
def dense(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, initializer_range=0.2, tie_word_embeddings=True,
        bos_token_id=None, pad_token_id=0, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    return Qwen3ForCausalLM(config)
