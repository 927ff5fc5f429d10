"""Training: what is dropped, what is refused, what is measured, and sweeps."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from alignment import chat
from alignment.config import ModelConfig, TrainingConfig, load_config
from alignment.errors import UserError
from alignment.ledger import Ledger
from alignment.rows import write_rows
from reward import data, sweep, train
from reward.config import RewardConfig, SweepConfig
from reward.data import Pair
from reward.model import load_trained_reward_model


def row(number: int, chosen: str = "\\boxed{37.5}", rejected: str = "no idea") -> dict[str, Any]:
    return {
        "id": f"r{number}",
        "prompt": [{"role": "user", "content": f"{number} shirts cost?"}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
    }


def settings(folder: Path, model: Path, **changes: Any) -> dict[str, Any]:
    write_rows(folder / "train.jsonl", [row(i) for i in range(24)])
    write_rows(folder / "eval.jsonl", [row(100 + i) for i in range(6)])
    return {
        "model": ModelConfig(path=str(model)),
        "rows": str(folder / "train.jsonl"),
        "eval_rows": str(folder / "eval.jsonl"),
        "training": TrainingConfig(learning_rate=3e-3, epochs=2),
        "max_length": 128,
        "batch_size": 4,
    } | changes


def test_pairs_are_what_the_policy_reads_and_samples(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    (pair,) = data.tokenize([row(3)], tiny_tokenizer, 128, Ledger())
    assert pair.prompt == chat.render_prompt(tiny_tokenizer, row(3)["prompt"])
    assert pair.chosen == chat.render_completion(tiny_tokenizer, "\\boxed{37.5}")
    assert pair.rejected[-1] == tiny_tokenizer.eos_token_id


def test_drops_are_counted(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    ledger = Ledger()
    rows = [row(1), row(2, "same", "same"), row(3, "long " * 100)]
    pairs = data.tokenize(rows, tiny_tokenizer, 64, ledger)
    ledger.check()
    assert len(pairs) == ledger.rows_out == 1
    assert ledger.dropped == {"identical answers": 1, "overlong": 1}
    assert ledger.tokens_in == ledger.tokens_trained + ledger.tokens_dropped


def test_an_answer_of_two_turns_is_refused(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    bad = row(1) | {"chosen": [{"role": "user", "content": "and?"}, {"role": "assistant", "content": "37.5"}]}
    with pytest.raises(UserError, match="row r1: 'chosen' must be one message"):
        data.tokenize([bad], tiny_tokenizer, 64, Ledger())


def test_prompts_in_both_sets_are_refused(tiny_model_folder: Path, tmp_path: Path) -> None:
    """Case and spacing do not hide a prompt."""
    own = settings(tmp_path, tiny_model_folder)
    seen = row(5) | {"prompt": [{"role": "user", "content": "5  SHIRTS cost?\n"}]}
    write_rows(tmp_path / "eval.jsonl", [row(100), seen])
    with pytest.raises(UserError, match="1 of its prompts are also in .*train.jsonl.*5 shirts cost"):
        train.run(RewardConfig(output_dir=tmp_path / "out", **own))
    assert not (tmp_path / "out").exists()


class FakeScorer:
    """Scores an answer by its last token."""

    def score(self, prompts: list[list[int]], answers: list[list[int]]) -> list[float]:
        return [float(answer[-1]) for answer in answers]


def test_evaluation_by_hand() -> None:
    """Margins 2, 0, -1 and, of a second prompt, 1: accuracies (1 + 1/2 + 0) / 3 = 1/2 and 1, so 3/4. Loss: the mean of
    log(1 + exp(-margin)) = (0.1269 + 0.6931 + 1.3133 + 0.3133) / 4. Longer answers score lower: correlation < 0."""
    pairs = [
        Pair([1], [3], [9, 1], "a"),
        Pair([1], [2], [2], "a"),
        Pair([1], [9, 1], [2], "a"),
        Pair([2], [3], [2], "b"),
    ]
    metrics = train.evaluate(FakeScorer(), pairs)  # type: ignore[arg-type]
    assert metrics["eval.accuracy"] == pytest.approx(0.75)
    assert metrics["eval.loss"] == pytest.approx(2.4466 / 4, abs=1e-4)
    assert metrics["eval.margin"] == pytest.approx(0.5)
    assert metrics["eval.score_length_correlation"] < -0.5


def test_a_sweep_trains_its_variants_and_tokenizes_once(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    prepare = data.prepare
    monkeypatch.setattr(data, "prepare", lambda *args: calls.append(args) or prepare(*args))
    config = SweepConfig(
        output_dir=tmp_path / "out",
        seed=3,
        base=settings(tmp_path, tiny_model_folder),
        variants={"short": {"training": {"epochs": 1}}, "long": {"training": {"schedule": "linear"}}},
    )
    sweep.run(config)
    assert len(calls) == 1
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert (metrics["short.train.steps"], metrics["long.train.steps"]) == (6, 12)
    assert metrics["long.eval.accuracy"] == 1.0
    assert metrics["long.eval.loss"] < metrics["short.eval.loss"] < 0.69
    models = [load_trained_reward_model(tmp_path / "out" / name / "model").state_dict() for name in config.variants]
    assert not torch.equal(models[0]["score.weight"], models[1]["score.weight"])
    alone = config.variant("long").model_copy(update={"output_dir": tmp_path / "alone"})
    train.run(alone)
    again = load_trained_reward_model(tmp_path / "alone" / "model").state_dict()
    assert all(torch.equal(models[1][name], again[name]) for name in again)


SWEEP = """
output_dir: out
base:
  model: {path: m}
  rows: train.jsonl
  training: {learning_rate: 1.0e-4}
variants:
  one: VARIANT
"""


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        ("{training: {epoch: 2}}", "variants.one.training.epoch: Extra inputs"),
        ("{training: {epochs: zero}}", "variants.one.training.epochs: Input should be a valid integer"),
        ("{model: {path: null, preset: compass-tiny, tokenizer: t}}", "give model.path, not model.preset"),
    ],
)
def test_variants_are_checked_before_anything_runs(tmp_path: Path, variant: str, message: str) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(SWEEP.replace("VARIANT", variant))
    with pytest.raises(UserError, match=message):
        load_config(SweepConfig, path)


def test_a_variant_keeps_what_it_does_not_change(tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(SWEEP.replace("VARIANT", "{training: {epochs: 2}, batch_size: 2}"))
    config = load_config(SweepConfig, path, ["seed=7"])
    variant = config.variant("one")
    assert (variant.training.epochs, variant.training.learning_rate, variant.batch_size) == (2, 1e-4, 2)
    assert (variant.seed, variant.output_dir) == (7, Path("out/one"))
