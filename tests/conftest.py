"""A tokenizer and a model small enough for every test."""

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
# For the processes that tests start: this checkout, installed or not.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parent.parent), os.getenv("PYTHONPATH")]))

import pytest
import torch
from transformers import Ernie4_5_MoeConfig, Ernie4_5_MoeForCausalLM, PreTrainedTokenizerFast

from alignment import tokenizer

LINES = (
    "A shirt costs 12.5 and 3 shirts cost 37.5, so the answer is \\boxed{37.5}.",
    "苹果每个 3 元,买 4 个一共 12 元。",
    "Giá của ba cái áo là 1.234,5 đồng.",
    "ส้มสามผลราคา 45 บาท",
    "Berapa harga tiga baju? <think>3 x 15 = 45</think> 45",
)


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    return tokenizer.train(iter(LINES * 20), vocab_size=400, max_length=128)


@pytest.fixture(scope="session")
def tiny_model_folder(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A causal Ernie4_5_Moe of 2 layers and 4 experts with its tokenizer; read it, do not write into it."""
    config = Ernie4_5_MoeConfig(
        vocab_size=len(tiny_tokenizer),
        bos_token_id=None,
        eos_token_id=tiny_tokenizer.eos_token_id,
        pad_token_id=tiny_tokenizer.pad_token_id,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=128,
        moe_intermediate_size=16,
        moe_num_experts=4,
        moe_k=2,
        moe_num_shared_experts=1,
        moe_layer_start_index=0,
        initializer_range=0.2,
        tie_word_embeddings=True,
    )
    folder = tmp_path_factory.mktemp("tiny_model")
    torch.manual_seed(0)
    Ernie4_5_MoeForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder
