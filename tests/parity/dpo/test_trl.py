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

from dpo.arguments import PreferenceArguments
from dpo.data import ShuffledFillersLast
from dpo.trainer import PreferenceTrainer

TINY = Path(__file__).parents[2] / "distributed" / "dpo" / "worker.py"
spec = importlib.util.spec_from_file_location("dpo_worker", TINY)
assert spec is not None
assert spec.loader is not None
tiny = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tiny)

PAIRS = 8
BATCHES = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "num_train_epochs": 5, "beta": 0.1}
LIMIT = 1e-6


class Peer(DPOTrainer):
    """TRL's trainer on ids that are tokenized already, in our order."""

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        return dataset

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        return ShuffledFillersLast(PAIRS, PAIRS, self.args.seed, epoch=lambda: int(self.state.epoch or 0))


class RecordsGradients:
    """The gradients of every optimizer step."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.steps: list[dict[str, torch.Tensor]] = []

    def __call__(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self.steps.append({n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None})


def run(trainer: Any) -> tuple[list[float], list[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0.1)
    record = RecordsGradients(trainer.model)
    optimizer.register_step_pre_hook(record)
    trainer.optimizer = optimizer
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return losses, record.steps, trainer.model.state_dict()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors: threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def peers(tmp_path_factory: pytest.TempPathFactory) -> Any:
    model = tiny.tiny_model()
    trainer = Peer(
        model,
        copy.deepcopy(model),
        DPOConfig(**tiny.settings(tmp_path_factory.mktemp("peer"), **BATCHES)),
        train_dataset=tiny.random_pairs(PAIRS),
        processing_class=tiny.tiny_tokenizer(),
    )
    return run(trainer)


@pytest.mark.parametrize("ours", [{"loss_type": ["dpo"]}, {"loss_type": ["ot_dpo"], "ot_mix": 0.0}])
def test_losses_gradients_and_weights_equal_trls(ours: dict[str, Any], peers: Any, tmp_path: Path) -> None:
    """Gradient accumulation included, over five epochs: ten steps of two micro-batches; TRL pads, we pack."""
    trainer = PreferenceTrainer(
        tiny.tiny_model(),
        PreferenceArguments(**tiny.settings(tmp_path, **BATCHES), **ours),
        train_dataset=tiny.random_pairs(PAIRS),
        processing_class=tiny.tiny_tokenizer(),
    )
    peer_losses, peer_gradients, peer_weights = peers
    losses, gradients, weights = run(trainer)
    assert trainer.data_collator.packed
    assert len(losses) == len(gradients) == 10
    assert losses == pytest.approx(peer_losses, abs=LIMIT)
    assert losses[0] - losses[-1] > 0.1
    torch.testing.assert_close(gradients, peer_gradients, rtol=0, atol=LIMIT)
    torch.testing.assert_close(weights, peer_weights, rtol=0, atol=LIMIT)
