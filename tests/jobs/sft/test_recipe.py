"""The real command on two ranks with split experts, on real rows: gsm8k and gpteacher, a few hundred of each.

The rows lie in the folder that SHARED_DATA names, or in ../shared/data beside the checkout.
"""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
import yaml
from transformers import Ernie4_5_MoeConfig, Ernie4_5_MoeForCausalLM

import sft.train
from alignment import tokenizer
from alignment.config import load_config
from alignment.models import load_tokenizer
from alignment.packing import PackingPlan
from alignment.rows import Row, read_rows, write_rows
from data_builders import questions
from data_builders.config import QuestionsConfig
from sft.config import SFTConfig
from sft.prepare import cached_rows

ROOT = Path(__file__).parents[3]
DATA = Path(os.environ.get("SHARED_DATA", ROOT.parent / "shared" / "data"))
SECONDS = 300.0  # a busy machine takes several times what a quiet one does
ROWS, CAPACITY = 200, 512

pytestmark = pytest.mark.skipif(
    not (DATA / "gsm8k").is_dir() or not (DATA / "gpteacher").is_dir(),
    reason=f"no gsm8k and gpteacher in {DATA}; SHARED_DATA names another folder",
)


def gpteacher() -> Iterator[Row]:
    for path in sorted((DATA / "gpteacher").glob("*.json.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as file:
            for row in islice(json.load(file), ROWS // 2):
                asked = "\n".join(filter(None, (row["instruction"], row["input"])))
                yield conversation(asked, row["response"])


def conversation(asked: str, answer: str) -> Row:
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of two sources, a tokenizer trained on them, and a small model of random weights."""
    folder = tmp_path_factory.mktemp("data")
    with gzip.open(DATA / "gsm8k" / "train.jsonl.gz", "rt", encoding="utf-8") as file:
        (folder / "questions.jsonl").write_text("".join(islice(file, ROWS)))
    questions.run(QuestionsConfig(output_dir=folder / "gsm8k", rows=str(folder / "questions.jsonl")))
    unanswered = {"id": "unanswered", "messages": [{"role": "user", "content": "And why?"}]}
    write_rows(folder / "gpteacher.jsonl", [*gpteacher(), unanswered, conversation("Count.", "1 " * CAPACITY)])
    sources = [str(folder / "gsm8k" / "sft.jsonl"), str(folder / "gpteacher.jsonl")]
    words = tokenizer.train(tokenizer.texts(sources), vocab_size=1024, max_length=CAPACITY)
    config = Ernie4_5_MoeConfig(
        vocab_size=len(words), bos_token_id=None, eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id,
        hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, max_position_embeddings=CAPACITY, moe_intermediate_size=32, moe_num_experts=4, moe_k=2,
        moe_num_shared_experts=1, moe_layer_start_index=0, initializer_range=0.05, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    Ernie4_5_MoeForCausalLM(config).save_pretrained(folder / "model")
    words.save_pretrained(folder / "model")
    recipe = {
        "output_dir": str(folder / "out"),
        "model": {"path": str(folder / "model")},
        "sources": [{"rows": source} for source in sources],
        "prepare": {"cache": str(folder / "cache")},
        "packing": {"capacity": CAPACITY},
        "training": {"learning_rate": 3e-3, "log_steps": 1, "save_steps": 20, "router": {"scope": "global"}},
    }
    (folder / "sft.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def start(data: Path, out: Path) -> subprocess.Popen[str]:
    launcher = ["-m", "alignment.launch", "--config_file", "configs/accelerate/cpu-ep2.yaml", "-m", "sft.train"]
    command = [sys.executable, *launcher, "--config", str(data / "sft.yaml"), f"output_dir={out}"]
    settings = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with (data / f"{out.name}.log").open("a") as log:
        return subprocess.Popen(command, cwd=ROOT, env=settings, stdout=log, stderr=log, text=True)


def said(data: Path, out: Path) -> str:
    return (data / f"{out.name}.log").read_text()


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def out(data: Path) -> Path:
    """A run that was left alone."""
    folder = data / "out"
    with start(data, folder) as process:
        assert process.wait(SECONDS) == 0, said(data, folder)[-3000:]
    return folder


def steps(out: Path) -> list[dict[str, Any]]:
    return [line for line in lines(out / "metrics.jsonl") if "loss" in line]


def test_the_loss_falls(out: Path) -> None:
    losses = [line["loss"] for line in steps(out)]
    assert len(losses) > 40
    assert fmean(losses[-5:]) < fmean(losses[:5]) - 1.5


def test_the_ledger_adds_up_over_both_sources(data: Path, out: Path) -> None:
    ledger, mixture = read(out / "ledger.json"), read(out / "mixture.json")
    rows = [sum(1 for _ in read_rows(source["source"])) for source in mixture]
    assert [source["rows"] for source in mixture] == rows and min(rows) > 150
    assert ledger["rows_in"] == sum(rows) == ledger["rows_out"] + sum(ledger["dropped"].values())
    assert ledger["rows_out"] == sum(source["epoch_rows"] for source in mixture)
    trained = sum(source["epoch_tokens"] for source in mixture)
    assert ledger["tokens_in"] == trained + ledger["tokens_dropped"]
    plan = PackingPlan.load(out / "plan" / "2-packs-a-step")
    assert plan.tokens.sum() == trained and len(plan.order) == len(set(plan.order.tolist())) == ledger["rows_out"]
    config = load_config(SFTConfig, data / "sft.yaml")
    tokenized = cached_rows(config, load_tokenizer(config.model))
    assert tokenized is not None
    assert int(tokenized.take(plan.order)[1].sum()) == ledger["tokens_trained"] > 0


def test_every_reject_is_listed_with_its_reason(out: Path) -> None:
    dropped, rejects = read(out / "ledger.json")["dropped"], lines(out / "rejects.jsonl")
    assert set(dropped) == {"overlong", "nothing to train"} and dropped["nothing to train"] == 1
    assert sorted(row["reason"] for row in rejects) == sorted(r for r, count in dropped.items() for _ in range(count))
    (unanswered,) = [row for row in rejects if row["reason"] == "nothing to train"]
    assert unanswered["id"] == "unanswered"
    assert unanswered["where"] == f"{unanswered['source']}:{ROWS + 1}"
    assert all(row["tokens"] > CAPACITY for row in rejects if row["reason"] == "overlong")


def test_the_log_holds_the_figures(out: Path) -> None:
    logged, metrics = steps(out), read(out / "metrics.json")
    assert [line["step"] for line in logged] == list(range(1, metrics["train.steps"] + 1))
    for line in logged:
        assert 0 < line["valid_tokens_per_second"] <= line["tokens_per_second"]
        assert line["packing/padding_share"] == pytest.approx(
            1 - line["valid_tokens_per_second"] / line["tokens_per_second"]
        )
    # Of all ranks: each step pads to its longest, so that the steps' shares average to that of the plan.
    plan = PackingPlan.load(out / "plan" / "2-packs-a-step")
    assert metrics["packing.padding_share"] == pytest.approx(plan.padding_share)
    assert metrics["packing.imbalance_attention"] == pytest.approx(plan.imbalance(2).attention)
    assert fmean(line["packing/utilisation"] for line in logged) == pytest.approx(metrics["packing.utilisation"])
    assert metrics["packing.utilisation"] > 0.9


def test_the_same_command_again_returns_at_once(data: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert sft.train.main(["--config", str(data / "sft.yaml"), f"output_dir={out}"]) == 0
    assert "sft.train: done already" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_a_run_that_was_stopped_goes_on_to_the_same_end(data: Path, out: Path) -> None:
    stopped = data / "stopped"
    with start(data, stopped) as process:
        wait_for_steps(process, stopped, 10)
        process.send_signal(signal.SIGTERM)
        assert process.wait(SECONDS) == 128 + signal.SIGTERM, said(data, stopped)[-3000:]
    done = len(steps(stopped))
    assert 10 <= done < len(steps(out)) and not (stopped / "DONE").exists()
    with start(data, stopped) as process:
        assert process.wait(SECONDS) == 0, said(data, stopped)[-3000:]
    assert f"sft.train: resumes from {stopped / 'checkpoints' / f'checkpoint-{done}'}" in said(data, stopped)
    assert same(steps(stopped), steps(out))
    assert read(stopped / "metrics.json") == pytest.approx(read(out / "metrics.json"), abs=1e-6)
    assert (stopped / "ledger.json").read_bytes() == (out / "ledger.json").read_bytes()


def wait_for_steps(process: subprocess.Popen[str], out: Path, count: int) -> None:
    deadline = time.monotonic() + SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        if (out / "metrics.jsonl").exists() and (out / "metrics.jsonl").read_text().count('"loss"') >= count:
            return
        time.sleep(0.02)
    pytest.fail(f"{count} steps were not reached")


def same(ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]]) -> bool:
    """All but the speeds."""
    speeds = ("valid_tokens_per_second", "tokens_per_second")
    plain = [[{k: v for k, v in line.items() if k not in speeds} for line in run] for run in (ours, theirs)]
    return len(ours) == len(theirs) and all(a == pytest.approx(b, abs=1e-6) for a, b in zip(*plain, strict=True))
