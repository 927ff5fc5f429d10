"""data_builders.preferences by its real command: killed, in shards, and whole, all to the same bytes."""

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

from alignment.config import ModelConfig
from alignment.questions import QuestionSet, read_questions
from alignment.rows import Row, read_rows, write_rows
from reward.model import load_reward_model

WORKER = Path(__file__).with_name("preferences_worker.py")
MATH, GENERAL, SAMPLES, CHUNK = 11, 5, 6, 4
WRITTEN = ("pairs.jsonl", "rejects.jsonl", "evaluation.jsonl", "ledger.json")
DATA = Path(os.environ.get("SHARED_DATA", Path(__file__).parents[3] / "shared" / "data"))
HAS_PUBLIC = all((DATA / name).is_dir() for name in ("gsm8k", "vicuna_multilingual", "ifeval"))
SHARDS = (("--shard", "2/2"), ("--shard", "1/2"), ())  # on two machines, and then together
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def folder(
    policy: Path,
    question: Callable[[int], Row],
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    folder = tmp_path_factory.mktemp("preferences")
    load_reward_model(ModelConfig(path=str(policy)), tiny_tokenizer, seed=1).save_pretrained(folder / "rm")
    tiny_tokenizer.save_pretrained(folder / "rm")
    write_rows(folder / "math.jsonl", map(question, range(MATH)))
    general = [{key: value for key, value in question(100 + i).items() if key != "answer"} for i in range(8)]
    write_rows(folder / "general.jsonl", general)
    config = {
        "output_dir": "whole",
        "model": str(policy),
        "reward_models": ["rm"],
        "sources": {"math": {"rows": "math.jsonl"}, "chat": {"rows": "general.jsonl", "quota": GENERAL}},
        "pairing": {"policy": "best_quantile", "per_prompt": 2},
        "evaluation_share": 0.25,
        "sampling": {"n": SAMPLES, "max_tokens": 16},
        "engine": {"max_model_len": 512, "max_num_seqs": 64, "kv_cache_gib": 0.25, "chunk_prompts": CHUNK},
    }
    (folder / "preferences.yaml").write_text(yaml.safe_dump(config))
    runs = [("preferences.yaml", "whole"), *(("preferences.yaml", "sharded", *shard) for shard in SHARDS)]
    if HAS_PUBLIC:
        write_public(folder, config)
        runs.append(("public.yaml", "public"))
    lines = [["--config", name, f"output_dir={output}", *rest] for name, output, *rest in runs]
    assert execute(folder, "each", "each", json.dumps(lines)) == 0
    return folder


def command(folder: Path, output: str, killed: tuple[str, int] = ("never", 0)) -> int:
    return execute(folder, output, killed[0], str(killed[1]), "--config", "preferences.yaml", f"output_dir={output}")


def execute(folder: Path, name: str, *arguments: str) -> int:
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    log = folder / f"{name}.log"
    with log.open("a") as stream:
        code = subprocess.run(
            [sys.executable, str(WORKER), *arguments], cwd=folder, env=environment, stdout=stream, stderr=stream,
            timeout=600, check=False,
        ).returncode  # fmt: skip
    assert code in (0, -signal.SIGKILL), log.read_text()[-3000:]
    return code


def contents(folder: Path) -> dict[str, bytes]:
    """Everything but the book of the run: samples, verdicts and scores, pairs, rejects, the account."""
    files = [*folder.rglob("*.parquet"), *(folder / name for name in WRITTEN)]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def metrics(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / "metrics.json").read_text())
    return {key: value for key, value in found.items() if not key.startswith("seconds")}


def test_every_prompt_is_a_pair_or_a_reject(folder: Path) -> None:
    pairs, evaluation, rejects = (
        list(read_rows(folder / "whole" / name)) if (folder / "whole" / name).stat().st_size else []
        for name in ("pairs.jsonl", "evaluation.jsonl", "rejects.jsonl")
    )
    given = {f"math/q{i}" for i in range(MATH)}
    paired, left = {row["id"].rsplit("/", 2)[0] for row in pairs + evaluation}, {row["id"] for row in rejects}
    assert not paired & left
    assert {name for name in paired | left if name.startswith("math/")} == given
    assert len(paired | left) == MATH + GENERAL
    ledger = json.loads((folder / "whole" / "ledger.json").read_text())
    assert ledger["rows_in"] == MATH + 8 and ledger["dropped"]["not drawn"] == 3
    assert ledger["tokens_in"] == ledger["tokens_trained"] + ledger["tokens_dropped"] > 0
    for row in pairs + evaluation:
        math = row["source"] == "math"
        assert row["policy"] == ("math_best_scored" if math else "best_quantile")
        chosen, rejected = row["verdicts"]
        assert (chosen == "correct" != rejected) if math else chosen is rejected is None
        assert math or row["scores"][0] > row["scores"][1]
    found = metrics(folder / "whole")
    assert found["samples"] == (MATH + GENERAL) * SAMPLES
    assert found["pairs"] == len(pairs) and found["pairs.evaluation"] == len(evaluation)


def test_trl_trains_on_the_pairs_as_they_are(folder: Path, policy: Path) -> None:
    pairs = Dataset.from_list(list(read_rows(folder / "whole" / "pairs.jsonl")))
    args = DPOConfig(
        output_dir=str(folder / "trl"), max_steps=1, per_device_train_batch_size=2, use_cpu=True, bf16=False,
        report_to="none", save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(policy),
        args=args,
        train_dataset=pairs,
        processing_class=AutoTokenizer.from_pretrained(policy),
    )
    assert len(trainer.train_dataset) == len(pairs)
    # Policy and reference are one, so log 2; the router loss adds a little.
    assert trainer.train().training_loss == pytest.approx(math.log(2), abs=0.01)


def test_three_kills_and_the_end_are_byte_equal(folder: Path) -> None:
    """In the second chunk's sampling, in the second's scoring, and in the middle of writing."""
    for moment in (("generate", 2), ("judge", 2), ("write", 5)):
        assert command(folder, "killed", killed=moment) == -signal.SIGKILL
        assert not (folder / "killed" / "pairs.jsonl").exists()
    assert command(folder, "killed") == 0
    assert contents(folder / "killed") == contents(folder / "whole")
    assert metrics(folder / "killed") == metrics(folder / "whole")


def test_shards_join_to_the_whole(folder: Path) -> None:
    assert contents(folder / "sharded") == contents(folder / "whole")
    ends = [done.stat().st_mtime_ns for done in (folder / "sharded" / "shards").rglob("DONE")]
    made = [path.stat().st_mtime_ns for path in (folder / "sharded").rglob("*.parquet")]
    assert len(ends) == 2
    assert max(made) < max(ends) < (folder / "sharded" / "DONE").stat().st_mtime_ns, "sampled or judged again"


def as_prompts(rows: list[Row], name: str, text: str, language: str = "en") -> list[Row]:
    return [
        {"id": f"{name}-{i}", "language": language, "prompt": [{"role": "user", "content": row[text]}]}
        for i, row in enumerate(rows)
    ]


def write_public(folder: Path, config: dict[str, Any]) -> None:
    """A config of gsm8k by the rule, vicuna in two languages and ifeval by their scores, and its rows."""
    gsm8k = read_questions(QuestionSet(rows=str(DATA / "gsm8k" / "test.jsonl.gz"))).kept[:24]
    write_rows(folder / "gsm8k.jsonl", [question.prompt_row() for question in gsm8k])
    vicuna = [
        row
        for name, language in (("Indonesian", "id"), ("Chinese", "zh"))
        for row in as_prompts(
            list(read_rows(DATA / "vicuna_multilingual" / f"questions_{name}.jsonl"))[:12], name, "text", language
        )
    ]
    write_rows(folder / "vicuna.jsonl", vicuna)
    ifeval = list(read_rows(DATA / "ifeval" / "input_data.jsonl.gz"))[:24]
    write_rows(folder / "ifeval.jsonl", as_prompts(ifeval, "ifeval", "prompt"))
    sources = {
        "math": {"rows": "gsm8k.jsonl", "kind": "math"},
        "vicuna": {"rows": "vicuna.jsonl", "kind": "general"},
        "ifeval": {"rows": "ifeval.jsonl", "kind": "general", "quota": 16},
    }
    engine = config["engine"] | {"chunk_prompts": 16}
    (folder / "public.yaml").write_text(yaml.safe_dump(config | {"sources": sources, "engine": engine}))


@pytest.mark.skipif(
    not HAS_PUBLIC,
    reason=f"no gsm8k, vicuna_multilingual and ifeval in {DATA}; SHARED_DATA names another folder",
)
def test_public_prompts(folder: Path) -> None:
    """All are paired or rejected."""
    found, ledger = metrics(folder / "public"), json.loads((folder / "public" / "ledger.json").read_text())
    assert ledger["rows_in"] == 72 == found["prompts"]
    assert ledger["rows_in"] == ledger["rows_out"] + sum(ledger["dropped"].values())
    assert ledger["dropped"]["not drawn"] == 8
    assert 0 < found["samples"] == (64 - ledger["dropped"].get("prompt too long", 0)) * SAMPLES
    assert found["verdict.correct"] + found["verdict.wrong"] + found["verdict.no_answer"] <= 24 * SAMPLES
    scored = [row for row in read_rows(folder / "public" / "pairs.jsonl") if row["kind"] == "general"]
    assert all(row["scores"][0] > row["scores"][1] for row in scored)
