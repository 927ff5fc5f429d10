"""`alignment inspect pairs` and the few pairs that dpo.train leaves with their weights."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alignment.config import ModelConfig, TrainingConfig
from alignment.errors import UserError
from alignment.heat import WeighedPair
from alignment.rows import write_rows
from dpo import inspect_pairs, train
from dpo.config import DPOConfig, LossConfig, TransportConfig


@pytest.fixture
def folder(dense: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> Path:
    dense.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def file(rows: list[dict[str, Any]], tmp_path: Path) -> Path:
    write_rows(tmp_path / "pairs.jsonl", rows)
    return tmp_path / "pairs.jsonl"


def test_training_leaves_the_weights_that_inspection_finds_in_its_model(
    folder: Path, file: Path, tmp_path: Path
) -> None:
    config = DPOConfig(
        output_dir=tmp_path / "run", model=ModelConfig(path=str(folder)), rows=str(file), batch_size=4,
        loss=LossConfig(transport=TransportConfig(reg=0.1)), training=TrainingConfig(learning_rate=1e-3, epochs=1),
    )  # fmt: skip
    train.run(config)
    lines = (tmp_path / "run" / inspect_pairs.FILE).read_text().splitlines()
    left = [WeighedPair.from_row(json.loads(line)) for line in lines]
    found = inspect_pairs.inspect_pairs(
        str(file), ModelConfig(path=str(tmp_path / "run" / "model")), config.loss.transport, 6, 100
    )
    before = inspect_pairs.inspect_pairs(str(file), ModelConfig(path=str(folder)), config.loss.transport, 6, 100)
    assert [pair.id for pair in left] == [f"row-{i}" for i in range(6)]
    for ours, theirs in zip(left, found, strict=True):
        assert ours.chosen.texts == theirs.chosen.texts
        assert ours.chosen.weights == pytest.approx(theirs.chosen.weights, abs=2e-4)
        assert ours.rejected.weights == pytest.approx(theirs.rejected.weights, abs=2e-4)
        assert ours.stats == pytest.approx(theirs.stats, abs=2e-3)
    assert any(
        a.rejected.weights != pytest.approx(b.rejected.weights, abs=1e-3) for a, b in zip(left, before, strict=True)
    )


def test_a_pair_by_hand(folder: Path, file: Path) -> None:
    """Row 0: "three" and the stop token against "four is five six" and the stop token."""
    [pair] = inspect_pairs.inspect_pairs(str(file), ModelConfig(path=str(folder)), TransportConfig(), 1, 100)
    assert pair.chosen.texts == ["three", " <|im_end|>"]
    assert pair.chosen.sizes == [1, 1]
    assert len(pair.rejected.texts) == 5
    assert pair.stats["tau"] == 2
    assert pair.chosen.total == pytest.approx(2, abs=1e-3)
    assert pair.rejected.total == pytest.approx(2, abs=1e-3)
    assert "plus two" in pair.prompt


def test_states_that_are_not_finite_name_the_row(dense: PreTrainedModel, folder: Path, file: Path) -> None:
    with torch.no_grad():
        dense.get_input_embeddings().weight[:] = torch.nan
    dense.save_pretrained(folder)
    with pytest.raises(UserError, match="row row-0: its hidden states are not finite"):
        inspect_pairs.inspect_pairs(str(file), ModelConfig(path=str(folder)), TransportConfig(), 1, 100)


def test_the_command_shows_weights_without_colour(
    folder: Path, file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    assert (
        inspect_pairs.main([str(file), "--model", str(folder), "--count", "2", "--reg", "0.1", "--total", "own"]) == 0
    )
    shown = capsys.readouterr().out
    assert "-- row-0" in shown
    assert "-- row-1" in shown
    assert "-- row-2" not in shown
    assert "chosen: 2 tokens, weights" in shown
    assert "rejected: 5 tokens, weights" in shown
    assert ", sum 5.00" in shown  # its own length
    assert "heaviest" in shown
    assert "\x1b[48" not in shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--reg", "0"], "error: --reg: Input should be greater than 0"),
        (["--cost-norm", "reference", "--metric", "cosine"], "cost_norm: reference is defined for metric euclidean"),
    ],
)
def test_users_mistakes(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect_pairs.main(["pairs.jsonl", "--model", "model", *options]) == 2
    assert message in capsys.readouterr().err
