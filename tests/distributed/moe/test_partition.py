"""Models loaded under ZeRO 3 by two ranks: the weights and buffers that transformers loads, and half of the memory."""

import json
import subprocess
from collections.abc import Callable
from typing import Any

import pytest

Launch = Callable[..., subprocess.CompletedProcess[str]]
MODELS = ("Ernie4_5_Moe", "Llama", "Qwen3Moe", "Qwen2Moe", "Mixtral", "DeepseekV2", "DeepseekV3", "reward")


@pytest.fixture(scope="module")
def found(launch: Launch, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("partition")
    launch("partition_worker.py", folder, expert_parallel=False, MALLOC_MMAP_THRESHOLD_="65536")
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model", MODELS)
def test_every_weight_and_buffer_is_the_same_to_the_bit(found: list[dict[str, Any]], model: str, dtype: str) -> None:
    for rank in found:
        assert rank[model][dtype] == []


def test_no_rank_holds_the_model(found: list[dict[str, Any]]) -> None:
    """Its half and, one after the other, single weights, the largest of which is 5% of the model."""
    for rank in found:
        assert rank["memory"]["parts"] < 0.65
        assert rank["memory"]["whole"] > 1


def test_other_names_are_refused_on_every_rank(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert "embed_tokens.weight is not stored as transformers writes it" in rank["renamed"]


def test_a_wrong_weight_would_show(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert rank["damaged"] == ["model.layers.1.mlp.experts.down_proj", "model.norm.weight"]
