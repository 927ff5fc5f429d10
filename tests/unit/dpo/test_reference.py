"""The file of reference log-probabilities: read back as written, refused when stale."""

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import save_file

from alignment.errors import UserError
from dpo.reference import ReferenceLogps

PAIRS = Dataset.from_list(
    [
        {"prompt_ids": [1], "chosen_ids": [2, 3], "rejected_ids": [4]},
        {"prompt_ids": [1], "chosen_ids": [5], "rejected_ids": [6, 7, 8]},
    ]
)
VALUES = {
    "chosen": [torch.tensor([-1.0, -2.0]), torch.tensor([-3.0])],
    "rejected": [torch.tensor([-4.0]), torch.tensor([-5.0, -6.0, -7.0])],
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "reference_logps.train.safetensors"
    ReferenceLogps.save(file, VALUES, PAIRS, weights="w1")
    return file


def test_batch_puts_each_rows_values_at_its_tokens(path: Path) -> None:
    reference = ReferenceLogps.load(path, PAIRS, weights="w1")
    mask = torch.tensor([[0, 1, 0, 0], [0, 0, 1, 0], [0, 1, 1, 0], [0, 1, 1, 1], [0, 0, 1, 0], [0, 1, 0, 0]]).bool()
    batch = reference.batch(torch.tensor([1, -1, 0]), mask)
    assert batch.tolist() == [
        [0, -3, 0, 0], [0, 0, 0, 0], [0, -1, -2, 0],
        [0, -5, -6, -7], [0, 0, 0, 0], [0, -4, 0, 0],
    ]  # fmt: skip


def test_other_weights_or_pairs_are_refused(path: Path) -> None:
    with pytest.raises(UserError, match=r"reference_logps\.train\.safetensors: made with other weights \(w1; .* w2\)"):
        ReferenceLogps.load(path, PAIRS, weights="w2")
    with pytest.raises(UserError, match="made with other pairs"):
        ReferenceLogps.load(path, PAIRS.select([1, 0]), weights="w1")


@pytest.mark.parametrize(
    "chosen", [[torch.tensor([-3.0]), torch.tensor([-3.0])], [VALUES["chosen"][0], torch.tensor([float("nan")])]]
)
def test_sums_over_a_sequence_and_nan_are_refused(path: Path, chosen: list[torch.Tensor]) -> None:
    ReferenceLogps.save(path, VALUES | {"chosen": chosen}, PAIRS, weights="w1")
    with pytest.raises(UserError, match="'chosen' must hold one finite log-probability a token"):
        ReferenceLogps.load(path, PAIRS, weights="w1")


def test_a_torn_file_and_one_of_another_form_are_refused(path: Path) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[:-3])
    with pytest.raises(UserError, match=r"no whole file of reference log-probabilities .*; delete it"):
        ReferenceLogps.load(path, PAIRS, weights="w1")
    save_file({"ref_chosen_logps": torch.zeros(2)}, path)
    with pytest.raises(UserError, match="no whole file of reference log-probabilities"):
        ReferenceLogps.load(path, PAIRS, weights="w1")


def test_sums_are_of_whole_completions(path: Path) -> None:
    chosen, rejected = ReferenceLogps.load(path, PAIRS, weights="w1").sums(torch.tensor([1, 0]))
    assert (chosen.tolist(), rejected.tolist()) == ([-3, -3], [-18, -4])
