"""A small real pipeline, SIGKILLed at three moments and run again, ends as one that was left alone."""

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest

pytestmark = pytest.mark.timeout(900)  # less than two minutes on two quiet cores
SEED = 2
SECONDS = 200.0  # until a moment, on a busy machine
ROWS = 120
FILES = {
    "pipeline.yaml": """\
output_dir: out
stages:
  - {name: data, job: data_builders.synthesize, config: data.yaml}
  - {name: tokenizer, job: alignment.tokenizer, config: tokenizer.yaml}
  - {name: sft, job: sft.train, config: sft.yaml}
  - {name: evaluate, job: alignment.evaluate, config: evaluate.yaml}
""",
    "data.yaml": f"""\
output_dir: out/data
languages: [en, id]
short_rows: {ROWS}
direct_rows: 8
long_rows: 16
reward_prompts: 16
prompts: 16
held_out: 12
""",
    "tokenizer.yaml": "output_dir: out/tokenizer\nrows: [out/data/sft_short.jsonl]\nvocab_size: 400\nmax_length: 256\n",
    "sft.yaml": """\
output_dir: out/sft
model: {preset: compass-tiny, tokenizer: out/tokenizer/tokenizer}
sources: [{rows: out/data/sft_short.jsonl, count: 100}]
packing: {capacity: 1024}
training: {epochs: 1, learning_rate: 1.0e-3, save_steps: 3, log_steps: 1}
""",
    "evaluate.yaml": """\
output_dir: out/evaluate
model: out/sft/model
prompts: out/data/held_out.jsonl
sampling: {n: 4, max_tokens: 48}
engine: {max_model_len: 256, max_num_seqs: 16, kv_cache_gib: 0.25, chunk_prompts: 3}
""",
}


def start(folder: Path) -> subprocess.Popen[bytes]:
    with (folder / "log").open("ab") as log:
        command = [sys.executable, "-m", "alignment.cli", "run", "pipeline.yaml"]
        return subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)


def finish(folder: Path) -> None:
    with start(folder) as process:
        assert process.wait() == 0, (folder / "log").read_text()[-3000:]


def make(folder: Path) -> Path:
    for name, text in FILES.items():
        (folder / name).write_text(text)
    return folder


def moments() -> Iterator[tuple[str, float]]:
    """A file whose appearance says where the run is, and how long after it the kill comes."""
    rng = random.Random(SEED)
    yield "out/tokenizer/run.json", rng.uniform(0, 0.5)
    yield "out/sft/checkpoints/checkpoint-6", rng.uniform(0, 0.5)  # torn or whole; checkpoint-3 is whole by then
    yield "out/evaluate/samples/*/*.parquet", 0.0  # the first chunk's


def kill_when(folder: Path, pattern: str, delay: float) -> None:
    with start(folder) as process:
        deadline = time.monotonic() + SECONDS
        while not list(folder.glob(pattern)) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(delay)
        process.kill()
    reached = process.returncode == -signal.SIGKILL and list(folder.glob(pattern))
    assert reached, f"{pattern} did not come: {(folder / 'log').read_text()[-3000:]}"


def processes_in(folder: Path) -> list[str]:
    found = []
    for process in psutil.process_iter():
        try:
            if Path(process.cwd()) == folder and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline()))
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def orphans_of(folder: Path) -> list[str]:
    """What still runs there after the kernel has had its time."""
    deadline = time.monotonic() + 10
    while (left := processes_in(folder)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folder of a run left alone, and of one that was killed three times."""
    whole, killed = (make(tmp_path_factory.mktemp(name)) for name in ("whole", "killed"))
    finish(whole)
    for pattern, delay in moments():
        kill_when(killed, pattern, delay)
        assert orphans_of(killed) == []
        assert not (killed / "out" / "evaluate" / "DONE").exists(), "killed after it had ended"
    finish(killed)
    assert orphans_of(killed) == []
    return whole, killed


def read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text()))


def test_metrics_of_every_stage_are_the_same(runs: tuple[Path, Path]) -> None:
    whole, killed = runs
    for stage in ("data", "tokenizer", "sft", "evaluate"):
        name = f"out/{stage}/metrics.json"
        assert read(killed / name) == pytest.approx(read(whole / name), abs=1e-12, nan_ok=True), stage


def test_every_byte_that_matters_is_the_same(runs: tuple[Path, Path]) -> None:
    whole, killed = runs
    names = [str(p.relative_to(whole)) for p in (whole / "out" / "data").glob("*.jsonl")]
    names += ["out/tokenizer/tokenizer/tokenizer.json", "out/sft/model/model.safetensors", "out/sft/ledger.json"]
    names += ["out/evaluate/by_prompt.jsonl"]
    assert len(names) == 11
    for name in names:
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name
    graded = [pq.read_table(folder / "out/evaluate/graded.parquet") for folder in (whole, killed)]
    assert graded[0].equals(graded[1])


def test_no_row_and_no_step_is_lost_or_doubled(runs: tuple[Path, Path]) -> None:
    _, killed = runs
    ledger = read(killed / "out/sft/ledger.json")
    assert (ledger["rows_in"], ledger["rows_out"], ledger["dropped"]) == (ROWS, 100, {"not drawn": ROWS - 100})
    lines = [json.loads(line) for line in (killed / "out/sft/metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if "loss" in line]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) == read(killed / "out/sft/metrics.json")["train.steps"] > 6
    graded = pq.read_table(killed / "out/evaluate/graded.parquet").select(["id", "index"]).to_pylist()
    assert len(graded) == len({(row["id"], row["index"]) for row in graded}) == 12 * 4


def test_kills_were_felt(runs: tuple[Path, Path]) -> None:
    """Each stage that was killed was tried twice, and went on rather than began again."""
    whole, killed = runs
    attempts = {stage: read(killed / f"out/{stage}/run.json")["attempts"] for stage in ("tokenizer", "sft", "evaluate")}
    assert attempts["sft"] == attempts["evaluate"] == 2 and attempts["tokenizer"] in (1, 2)
    assert "sft.train: resumes from " in (killed / "log").read_text()
    assert "resumes from" not in (whole / "log").read_text()


def test_a_run_that_has_ended_returns_at_once(runs: tuple[Path, Path]) -> None:
    _, killed = runs
    before = {p: p.stat().st_mtime_ns for p in (killed / "out").rglob("*") if p.name in ("DONE", "metrics.json")}
    begun = time.monotonic()
    finish(killed)
    assert time.monotonic() - begun < 60
    stages = {p: t for p, t in before.items() if p.parent != killed / "out"}
    assert {p: p.stat().st_mtime_ns for p in stages} == stages
