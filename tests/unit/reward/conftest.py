"""Reward models of the tiny base model."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from alignment.config import ModelConfig
from alignment.models import load_tokenizer
from reward.model import load_reward_model

Make = Callable[..., Path]


@pytest.fixture(scope="session")
def make_reward_model(tiny_model_folder: Path) -> Make:
    """Saves a reward model whose every weight is moved by noise of `seed`."""

    def make(folder: Path, *, seed: int, dtype: torch.dtype = torch.float32) -> Path:
        config = ModelConfig(path=str(tiny_model_folder))
        tokenizer = load_tokenizer(config)
        model = load_reward_model(config, tokenizer, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            parameter.data += 0.05 * torch.empty(parameter.shape).normal_(generator=generator)
        model.to(dtype=dtype).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def reward_folder(make_reward_model: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_reward_model(tmp_path_factory.mktemp("reward") / "model", seed=1)


@pytest.fixture(scope="session")
def reward_folders(make_reward_model: Make, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three reward models that differ in every weight."""
    root = tmp_path_factory.mktemp("rewards")
    return [make_reward_model(root / f"rm_{seed}", seed=seed) for seed in (1, 2, 3)]
