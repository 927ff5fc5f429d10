"""Our path with weights of one against TRL's DPOTrainer and its sigmoid loss, on the same batches."""

import copy
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn
from trl import DPOConfig, DPOTrainer

from dpo.data import ShuffledFillersLast
from dpo.trainer import PreferenceArguments, PreferenceTrainer

TINY = Path(__file__).parents[2] / "distributed" / "dpo" / "worker.py"
spec = importlib.util.spec_from_file_location("dpo_worker", TINY)
assert spec is not None
assert spec.loader is not None
tiny = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tiny)

PAIRS = 8


class Peer(DPOTrainer):
    """TRL's trainer on ids that are tokenized already, in our order."""

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        return dataset

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        return ShuffledFillersLast(PAIRS, PAIRS, self.args.seed, epoch=lambda: int(self.state.epoch or 0))


class RecordsGradients:
    """An optimizer step's gradients, of the first step."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.gradients: dict[str, torch.Tensor] = {}

    def __call__(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        if not self.gradients:
            self.gradients = {n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None}


def run(trainer: Any) -> tuple[list[float], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0.1)
    record = RecordsGradients(trainer.model)
    optimizer.register_step_pre_hook(record)
    trainer.optimizer = optimizer
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return losses, record.gradients, trainer.model.state_dict()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors: threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_losses_gradients_and_weights_equal_trls(tmp_path: Path) -> None:
    """Gradient accumulation included, over five epochs: ten steps of two micro-batches."""
    batches = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "num_train_epochs": 5}
    settings = tiny.settings(tmp_path, **batches)
    model, pairs, tokenizer = tiny.tiny_model(), tiny.random_pairs(PAIRS), tiny.tiny_tokenizer()
    peer = Peer(
        copy.deepcopy(model),
        copy.deepcopy(model),
        DPOConfig(**settings),
        train_dataset=pairs,
        processing_class=tokenizer,
    )
    ours = PreferenceTrainer(
        model, PreferenceArguments(**settings, loss_type=["dpo"]), train_dataset=pairs, processing_class=tokenizer
    )
    peer_losses, peer_gradients, peer_weights = run(peer)
    losses, gradients, weights = run(ours)
    assert len(losses) == 10
    assert losses == pytest.approx(peer_losses, abs=1e-5)
    assert losses[0] - losses[-1] > 0.1
    torch.testing.assert_close(gradients, peer_gradients, rtol=0, atol=1e-5)
    torch.testing.assert_close(weights, peer_weights, rtol=0, atol=1e-5)
