"""Token weights in training: length-normalised DPO against TRL's, uniform weights against transport's limit."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from dpo.arguments import PreferenceArguments
from dpo.trainer import PreferenceTrainer

TINY = Path(__file__).parents[2] / "distributed" / "dpo" / "worker.py"
spec = importlib.util.spec_from_file_location("dpo_worker", TINY)
assert spec is not None
assert spec.loader is not None
tiny = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tiny)

PAIRS = 6


def trained(out: Path, loss: str, **options: Any) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Logged losses and final weights of five steps on one batch."""
    batches = {"per_device_train_batch_size": PAIRS, "num_train_epochs": 5, "learning_rate": 0.02}
    settings = tiny.settings(out, loss_type=[loss], **batches, **options)
    trainer = PreferenceTrainer(
        tiny.tiny_model(),
        PreferenceArguments(**settings),
        train_dataset=tiny.random_pairs(PAIRS),
        processing_class=tiny.tiny_tokenizer(),
    )
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line], trainer.model.state_dict()


def test_dpo_norm_is_trls_sigmoid_norm(tmp_path: Path) -> None:
    losses, weights = trained(tmp_path / "ours", "dpo_norm", beta=2.0)
    peer_losses, peer_weights = trained(tmp_path / "trl", "sigmoid_norm", beta=2.0)
    assert losses == pytest.approx(peer_losses, abs=1e-5)
    assert losses[0] - losses[-1] > 0.01
    torch.testing.assert_close(weights, peer_weights, rtol=0, atol=1e-5)


def test_uniform_weights_are_transport_with_much_entropy(tmp_path: Path) -> None:
    losses, weights = trained(tmp_path / "uniform", "dpo_uniform", beta=0.1)
    ot_losses, ot_weights = trained(tmp_path / "ot", "ot_dpo", beta=0.1, ot_reg=1e7)
    assert losses == pytest.approx(ot_losses, abs=1e-5)
    torch.testing.assert_close(weights, ot_weights, rtol=0, atol=1e-5)
    assert trained(tmp_path / "dpo", "dpo", beta=0.1)[0][-1] != pytest.approx(losses[-1], abs=1e-3)
