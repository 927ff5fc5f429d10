"""`python -m sft.train` in one process: two sources with weights, truncated rows, dry runs, and mistakes."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

import sft.prepare
import sft.train
from alignment import chat
from alignment.packing import PackingPlan
from alignment.rows import Row, write_rows

CAPACITY = 64


def row(question: str, answer: str) -> Row:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


@pytest.fixture
def folder(tmp_path: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Forty short rows; twelve others, of which one is overlong and one asks without an answer."""
    monkeypatch.chdir(tmp_path)
    write_rows(Path("short.jsonl"), (row(f"{n} shirts?", "\\boxed{45}") for n in range(40)))
    others = [row(f"Berapa harga {n} baju?", "so 12.5") for n in range(10)]
    question = {"id": "question", "messages": [{"role": "user", "content": "3 x 15?"}]}
    write_rows(Path("others.jsonl"), [*others, row("?", "9" * 90), question])
    config = {
        "output_dir": "out",
        "model": {"path": str(tiny_model_folder)},
        "sources": [{"rows": "short.jsonl", "weight": 2, "epochs": 3}, {"rows": "others.jsonl", "weight": 1}],
        "packing": {"capacity": CAPACITY, "bucket": 16, "overlong": "truncate"},
        "prepare": {"cache": "cache"},
        "training": {"learning_rate": 1e-2, "log_steps": 1, "accumulation": 2, "epochs": 2},
    }
    Path("job.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


def train(*arguments: str) -> int:
    return sft.train.main(["--config", "job.yaml", *arguments])


def read(name: str) -> Any:
    return json.loads(Path(name).read_text())


def lines(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(name).read_text().splitlines()]


def tokens_of(tokenizer: PreTrainedTokenizerFast, name: str) -> list[int]:
    return [len(chat.render(tokenizer, each["messages"]).input_ids) for each in lines(name)]


def test_two_sources_by_weight_with_truncated_rows(folder: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """An epoch holds all 11 usable rows of the second source, and twice as many, 22, of the first."""
    assert train() == 0
    short, others = (tokens_of(tiny_tokenizer, f"{name}.jsonl") for name in ("short", "others"))
    assert others[10] > CAPACITY > max(short + others[:10] + others[11:])
    ledger, (first, second) = read("out/ledger.json"), read("out/mixture.json")
    assert (first["epoch_rows"], second["epoch_rows"], second["drawn"]) == (22, 11, 11)
    assert ledger["rows_in"] == 52 == ledger["rows_out"] + sum(ledger["dropped"].values())
    assert ledger["dropped"] == {"nothing to train": 1}, "44 draws of the 40 rows in two epochs leave none out"
    assert ledger["truncated"] == 1
    assert ledger["tokens_in"] == sum(short) + sum(others)
    assert ledger["tokens_dropped"] == others[10] - CAPACITY + others[11]
    assert second["epoch_tokens"] == sum(others[:10]) + CAPACITY
    assert lines("out/rejects.jsonl") == [
        {"source": "others.jsonl", "where": "others.jsonl:12", "id": "question", "reason": "nothing to train",
         "tokens": others[11]}
    ]  # fmt: skip

    plan = PackingPlan.load(Path("out/plan/2-packs-a-step"))
    assert len(plan.order) == 2 * (22 + 11) and plan.tokens.sum() >= 2 * second["epoch_tokens"]
    metrics = read("out/metrics.json")
    assert metrics["train.steps"] == plan.steps == metrics["packing.packs"] / 2
    assert metrics["packing.utilisation"] == pytest.approx(plan.utilisation)
    losses = [line["loss"] for line in lines("out/metrics.jsonl") if "loss" in line]
    assert len(losses) == plan.steps and losses[-1] < losses[0] - 1
    assert (Path("out") / "model" / "model.safetensors").is_file()


def test_steps_of_a_dry_run_are_known_once_the_rows_are_tokenized(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train("--dry-run") == 0
    before = capsys.readouterr().out
    assert "steps: known once the rows are tokenized, by sft.prepare with this config" in before
    assert "step: 2 packs of 64 tokens = 128 tokens" in before
    assert not Path("cache").exists() and not Path("out").exists()

    assert sft.prepare.main(["--config", "job.yaml"]) == 0
    assert train("--dry-run") == 0
    after = capsys.readouterr().out
    assert "51 of 52 rows train, 1 of them truncated; dropped: 1 nothing to train" in after
    assert not Path("out").exists()
    assert train() == 0
    steps = read("out/metrics.json")["train.steps"]
    assert f"steps: {steps}; utilisation " in after, "the steps that it foretells are those it takes"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["packing.bukket=16"], "unknown key 'packing.bukket'; did you mean 'bucket'?"),
        (["packing.overlong=cut"], "packing.overlong: input should be 'drop', 'truncate' or 'error'"),
        (["sources.0.wieght=2"], "unknown key 'sources.0.wieght'; did you mean 'weight'?"),
        (["packing.overlong=error"], "others.jsonl:11: "),
        (["sources=[{rows: question.jsonl}]"], "no row is left to train on: of 1, dropped {'nothing to train': 1}"),
        (["sources=[{rows: others.jsonl, count: 12}]"], "sources[0].count: 12 rows wanted, but others.jsonl holds 11"),
    ],
)
def test_mistakes_leave_no_run_behind(
    overrides: Sequence[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    question = {"id": "question", "messages": [{"role": "user", "content": "3 x 15?"}]}
    write_rows(Path("question.jsonl"), [question])
    assert train(*overrides) == 2
    error = capsys.readouterr().err
    assert message in error and 1 <= len(error.splitlines()) <= 3
    assert not Path("out").exists()


def test_bfloat16_without_deepspeed_changes_every_weight_and_saves_half_the_bytes(folder: Path) -> None:
    """At this learning rate AdamW's steps are lost on weights of bfloat16: 98% of them do not change in 60 steps."""
    rate = ("training.learning_rate=1e-5", "training.accumulation=1", "training.save_steps=20")
    assert train("model.dtype=bfloat16", *rate) == 0
    assert train("output_dir=whole", *rate) == 0
    first, *_, last = (load_file(f"out/checkpoints/checkpoint-{step}/model.safetensors") for step in checkpoints("out"))
    assert {weight.dtype for weight in last.values()} == {torch.float32}
    moved = [(first[name] != last[name]).float().mean().item() for name in last if "correction_bias" not in name]
    assert min(moved) > 0.95

    ours = load_file("out/model/model.safetensors")
    in_float32 = {name for name, weight in ours.items() if weight.dtype == torch.float32}
    assert in_float32 == {name for name in ours if "gate.weight" in name or "moe_statics" in name}, "as it is loaded"
    for name in ours.keys() - in_float32:
        assert torch.equal(ours[name], last[name].bfloat16())
    losses = [[line["loss"] for line in lines(f"{name}/metrics.jsonl") if "loss" in line] for name in ("out", "whole")]
    assert max(abs(a - b) for a, b in zip(*losses, strict=True)) < 0.05


def checkpoints(name: str) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in Path(name, "checkpoints").glob("checkpoint-*"))
