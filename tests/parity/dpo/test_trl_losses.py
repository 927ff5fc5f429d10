"""Every loss of TRL's through our trainer, against TRL's own trainer with a model for its reference.

Ours reads a reference that was stored one log-probability a token; with an adapter it is switched off, or stored too.
"""

import copy
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import PreTrainedModel
from trl import DPOConfig, DPOTrainer

from dpo.arguments import TRL_LOSSES, PreferenceArguments
from dpo.trainer import PreferenceTrainer

TINY = Path(__file__).parents[2] / "distributed" / "dpo" / "worker.py"
spec = importlib.util.spec_from_file_location("dpo_worker", TINY)
assert spec is not None
assert spec.loader is not None
tiny = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tiny)

PAIRS, STEPS = 4, 2
Result = tuple[list[float], dict[str, torch.Tensor]]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors: threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Peer(DPOTrainer):
    """TRL's trainer on ids that are tokenized already."""

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        return dataset


def reference_model() -> PreTrainedModel:
    model: PreTrainedModel = tiny.tiny_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.05)
    return model


def settings(folder: Path, loss: str) -> dict[str, Any]:
    smoothing = {"label_smoothing": 0.1} if loss in ("exo_pair", "robust") else {}
    return tiny.settings(
        folder, loss_type=[loss], per_device_train_batch_size=PAIRS, num_train_epochs=STEPS, learning_rate=0.01,
        router_aux_loss_coef=0.0, **smoothing,
    )  # fmt: skip


def result(trainer: Any) -> Result:
    """The losses of the steps, and the weights that train after them."""
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return losses, {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}


def of_trl(folder: Path, loss: str, lora: LoraConfig | None = None) -> Result:
    return result(
        Peer(
            tiny.tiny_model(),
            None if lora else reference_model(),
            DPOConfig(**settings(folder, loss)),
            train_dataset=tiny.random_pairs(PAIRS),
            processing_class=tiny.tiny_tokenizer(),
            peft_config=copy.deepcopy(lora),
        )
    )


def of_ours(folder: Path, loss: str, **options: Any) -> Result:
    trainer_options = {key: options.pop(key) for key in ("reference_hash", "peft_config") if key in options}
    return result(
        PreferenceTrainer(
            tiny.tiny_model(),
            PreferenceArguments(**settings(folder, loss), **options),
            train_dataset=tiny.random_pairs(PAIRS),
            processing_class=tiny.tiny_tokenizer(),
            **trainer_options,
        )
    )


def assert_equal(ours: Result, theirs: Result, moved: float = 1e-4) -> None:
    assert len(ours[0]) == STEPS
    assert ours[0] == pytest.approx(theirs[0], abs=1e-5, rel=1e-5)
    torch.testing.assert_close(ours[1], theirs[1], rtol=0, atol=1e-5)
    assert abs(ours[0][0] - ours[0][1]) > moved, "the training did not move"


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the reference of other weights than the policy's."""
    folder = tmp_path_factory.mktemp("stored")
    scoring = PreferenceTrainer(
        reference_model(),
        PreferenceArguments(**settings(folder, "sigmoid")),
        train_dataset=tiny.random_pairs(PAIRS),
        processing_class=tiny.tiny_tokenizer(),
        weights_hash="reference",
    )
    scoring.store_references()
    return folder


@pytest.mark.parametrize("loss", TRL_LOSSES)
def test_a_loss_of_trls_is_trls(loss: str, stored: Path, tmp_path: Path) -> None:
    assert_equal(of_ours(stored, loss, reference_hash="reference"), of_trl(tmp_path, loss))


@pytest.mark.parametrize("loss", ["aot", "aot_unpaired"])
def test_aot_over_a_step_of_one_batch_is_trls(loss: str, stored: Path, tmp_path: Path) -> None:
    ours = of_ours(stored, loss, reference_hash="reference", loss_scope="global")
    assert_equal(ours, of_trl(tmp_path, loss))


@pytest.mark.parametrize("reference", ["stored", "live"])
def test_a_loss_of_trls_trains_an_adapter(reference: str, tmp_path: Path) -> None:
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    ours = of_ours(tmp_path / "ours", "ipo", reference=reference, peft_config=copy.deepcopy(lora))
    assert_equal(ours, of_trl(tmp_path / "trl", "ipo", lora))
