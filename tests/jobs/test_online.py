"""Two rounds of online preference training by the real command: vLLM, the math rule, and a dpo.train job for each."""

import json
import math
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from safetensors.torch import load_file

from alignment.fingerprint import weights_hash
from alignment.rows import Row, read_rows, write_rows

PROMPTS, HELD_OUT, SAMPLES = 8, 12, 8


def start(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, *command, "--config", "online.yaml"]
    return subprocess.run(line, cwd=folder, capture_output=True, text=True, timeout=280, check=False)


def run(folder: Path) -> str:
    finished = start(folder, "-m", "dpo.online")
    assert finished.returncode == 0, finished.stderr[-4000:]
    return finished.stdout


@pytest.fixture(scope="module")
def folder(policy: Path, question: Callable[[int], Row], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = prepared(policy, question, tmp_path_factory)
    run(folder)
    return folder


def prepared(policy: Path, question: Callable[[int], Row], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("online")
    write_rows(folder / "prompts.jsonl", map(question, range(PROMPTS)))
    write_rows(folder / "held_out.jsonl", map(question, range(50, 50 + HELD_OUT)))
    config = {
        "output_dir": "out",
        "model": str(policy),
        "prompts": "prompts.jsonl",
        "evaluation": {"prompts": "held_out.jsonl", "n": SAMPLES},
        "rounds": 2,
        "stop": {"patience": 2},
        "round": {"prompts": PROMPTS},
        "sampling": {"n": SAMPLES, "max_tokens": 16},
        "engine": {"max_model_len": 128, "max_num_seqs": 64, "kv_cache_gib": 0.25, "chunk_prompts": 6},
        "loss": {"nll_weight": 1.0},  # without it the chosen answers grow unlikely too, as DPO alone has it
        "batch_size": 4,
        "training": {"learning_rate": 3e-3, "epochs": 8, "schedule": "linear", "log_steps": 1, "save_steps": 3},
    }
    (folder / "online.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture(scope="module")
def metrics(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "out" / "metrics.json").read_text()))


def test_the_round_raises_what_it_rewards(folder: Path, metrics: dict[str, Any]) -> None:
    """From half of the held-out answers right to nearly all, by the paired interval too."""
    before = list(read_rows(folder / "out" / "baseline" / "by_prompt.jsonl"))
    after = list(read_rows(folder / "out" / "round_1" / "evaluation" / "by_prompt.jsonl"))
    assert [row["id"] for row in before] == [row["id"] for row in after] == [f"q{50 + i}" for i in range(HELD_OUT)]
    rates = [sum(row["correct"] for row in rows) / (HELD_OUT * SAMPLES) for rows in (before, after)]
    assert 0.25 < rates[0] < 0.75
    assert rates[1] > rates[0] + 0.1
    assert metrics["round_1.pass_at_1"] == pytest.approx(rates[1])
    assert metrics["round_1.change"] == pytest.approx(rates[1] - rates[0])
    assert metrics["round_1.change.low"] > 0


def test_pairs_are_right_against_wrong_answers_of_the_policy_s_own(folder: Path, metrics: dict[str, Any]) -> None:
    pairs = list(read_rows(folder / "out" / "round_1" / "pairs.jsonl", "preference"))
    graded = pq.read_table(folder / "out" / "round_1" / "graded").to_pylist()
    assert len(graded) == PROMPTS * SAMPLES
    samples = {(row["id"], row["index"]): row for row in graded}
    for pair in pairs:
        name, chosen, rejected = pair["id"].split("/")
        assert name in {f"q{i}" for i in range(PROMPTS)}, "never a held-out prompt"
        assert samples[name, int(chosen)]["completion"] == pair["chosen"][0]["content"]
        assert samples[name, int(rejected)]["completion"] == pair["rejected"][0]["content"]
        assert pair["verdicts"][0] == "correct" != pair["verdicts"][1]
    assert metrics["round_1.pairs"] == len(pairs) > PROMPTS / 2
    ledger = json.loads((folder / "out" / "round_1" / "ledger.json").read_text())
    rejects = (folder / "out" / "round_1" / "rejects.jsonl").read_text().splitlines()
    assert ledger["dropped"] == Counter(json.loads(line)["reason"] for line in rejects)
    assert ledger["rows_in"] == PROMPTS == ledger["rows_out"] + sum(ledger["dropped"].values())


def test_the_engine_served_the_trained_weights(folder: Path, policy: Path, metrics: dict[str, Any]) -> None:
    trained = load_file(folder / "out" / "round_1" / "train" / "model" / "model.safetensors")
    before = load_file(policy / "model.safetensors")
    assert trained.keys() == before.keys()
    assert max(float((trained[name] - before[name]).abs().max()) for name in before) > 1e-3
    assert 0 < metrics["round_1.logprob_gap"] < 1e-4


def test_pairs_say_which_weights_made_them_and_train_on_their_very_tokens(
    folder: Path, policy: Path, metrics: dict[str, Any]
) -> None:
    made_by = [policy, folder / "out" / "round_1" / "train" / "model"]
    for number, model in enumerate(made_by, start=1):
        place = folder / "out" / f"round_{number}"
        pairs = list(read_rows(place / "pairs.jsonl", "preference"))
        samples = {(row["id"], row["index"]): row for row in pq.read_table(place / "graded").to_pylist()}
        for pair in pairs:
            assert pair["weights"] == weights_hash(model)
            name, *indices = pair["id"].split("/")
            assert pair["token_ids"] == [samples[name, int(index)]["token_ids"] for index in indices]
        assert metrics[f"round_{number}.pairs.retokenized"] == 0
        ledger = json.loads((place / "train" / "ledger.json").read_text())
        assert ledger["tokens_trained"] == sum(len(ids) for pair in pairs for ids in pair["token_ids"])


def test_the_divergence_from_the_first_policy_is_that_of_its_answers(folder: Path, metrics: dict[str, Any]) -> None:
    """It answers with one of two numbers, each half of the time; almost surely with one of them it is log 2 away."""
    assert metrics["round_1.pass_at_1"] > 0.8
    assert metrics["round_1.kl"] == pytest.approx(math.log(2), abs=0.25)
    tokens = pq.read_table(folder / "out" / "round_1" / "evaluation" / "graded.parquet")["token_ids"].to_pylist()
    mean = sum(map(len, tokens)) / len(tokens)
    assert metrics["round_1.kl_per_token"] == pytest.approx(metrics["round_1.kl"] / mean, rel=0.05)


def test_the_best_round_s_model_is_given(folder: Path, metrics: dict[str, Any]) -> None:
    rates = [metrics[f"round_{number}.pass_at_1"] for number in (1, 2)]
    best = 1 if rates[0] >= rates[1] else 2
    assert (metrics["rounds"], metrics["stopped_by"], metrics["model.round"]) == (2, "rounds", best)
    kept = folder / "out" / f"round_{best}" / "train" / "model"
    assert (folder / "out" / "model").resolve() == kept.resolve()


@pytest.fixture(scope="module")
def killed(policy: Path, question: Callable[[int], Row], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, killed in a training and in an evaluation, with an engine gone stale between the two."""
    folder = prepared(policy, question, tmp_path_factory)
    worker = str(Path(__file__).parent / "online_worker.py")
    in_training = start(folder, worker, "file:out/round_1/train/checkpoints/checkpoint-6/WHOLE")
    assert in_training.returncode == -signal.SIGKILL, in_training.stderr[-4000:]
    assert not (folder / "out" / "round_1" / "train" / "DONE").exists()
    stale = start(folder, worker, "stale")
    assert stale.returncode == 1
    assert "the engine does not serve these weights" in stale.stderr, stale.stderr[-4000:]
    assert (folder / "out" / "round_2" / "train" / "DONE").exists(), "stale from the second round's load on"
    assert not (folder / "out" / "round_2" / "evaluation").exists(), "caught before anything was sampled"
    in_evaluation = start(folder, worker, "generate:3")  # after the gate's and the first chunk's
    assert in_evaluation.returncode == -signal.SIGKILL
    assert len(list((folder / "out" / "round_2" / "evaluation").rglob("samples/*/*.parquet"))) == 1
    run(folder)
    return folder


def test_a_stale_engine_is_caught_and_kills_leave_no_trace(folder: Path, killed: Path) -> None:
    written = ("pairs.jsonl", "rejects.jsonl", "ledger.json", "by_prompt.jsonl", "model.safetensors")
    names = [p.relative_to(folder) for p in (folder / "out").rglob("*") if p.name in written]
    names += [p.relative_to(folder) for p in (folder / "out").rglob("*.parquet")]
    assert len(names) > 20
    for name in names:
        assert (killed / name).read_bytes() == (folder / name).read_bytes(), name
    whole, after = (json.loads((path / "out" / "metrics.json").read_text()) for path in (folder, killed))
    assert after.keys() == whole.keys()
    for key in after.keys() - {"round_1.sampling_seconds", "round_2.sampling_seconds", "stopped_by"}:
        assert after[key] == pytest.approx(whole[key], abs=1e-7), key
    assert (killed / "out" / "model").resolve().relative_to(killed) == (folder / "out" / "model").resolve().relative_to(
        folder
    )


def test_the_same_command_returns_at_once(folder: Path) -> None:
    before = (folder / "out" / "DONE").read_text()
    assert "dpo.online: done already" in run(folder)
    assert (folder / "out" / "DONE").read_text() == before
