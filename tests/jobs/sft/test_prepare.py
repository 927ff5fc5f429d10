"""`python -m sft.prepare`: fills the cache once, opens no run, and what it prints is what training will find."""

import subprocess
import sys
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from alignment.rows import Row, write_rows
from sft.cache import read_facts
from sft.prepare import main

SFT = """
output_dir: out
model: {preset: compass-tiny, tokenizer: tokenizer}
sources: [{rows: rows.jsonl}]
packing: {capacity: 64}
prepare: {cache: cache, workers: 2}
training: {learning_rate: 1.0e-3}
"""


def row(question: str, answer: str) -> Row:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


@pytest.fixture
def folder(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> Path:
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "job.yaml").write_text(SFT)
    question = {"messages": [{"role": "user", "content": "3 x 15?"}]}
    write_rows(
        tmp_path / "rows.jsonl", [*[row(f"{n} shirts?", "45 baht") for n in range(30)], row("?", "9" * 90), question]
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_command_fills_the_cache_and_finds_it_filled(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, "-m", "sft.prepare", "--config", "job.yaml"]
    finished = subprocess.run(command, check=False, cwd=folder, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr
    (made,) = (folder / "cache").glob("[!.]*")
    facts = read_facts(made)
    lines = finished.stdout.splitlines()
    assert lines[0] == f"sft.prepare: rows.jsonl: 32 rows, {facts['tokens']} tokens"
    assert "rejected: 1 nothing to train" in lines[1]
    assert lines[-1] == "30 of 32 rows train, 0 of them truncated; dropped: 1 nothing to train, 1 overlong"
    assert not (folder / "out").exists()

    # Another capacity, mixture and seed tokenize nothing.
    assert main(["--config", "job.yaml", "packing.capacity=128", "sources.0.share=0.5", "seed=1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("tokens (cached)")
    assert lines[-1] == "16 of 32 rows train, 0 of them truncated; dropped: 15 not drawn, 1 nothing to train"
    assert [path.name for path in (folder / "cache").glob("[!.]*")] == [made.name]


def test_dry_run_makes_nothing_and_a_mistake_names_its_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config", "job.yaml", "--dry-run"]) == 0
    assert "rows: rows.jsonl\ncache: cache" in capsys.readouterr().out
    with (folder / "rows.jsonl").open("a") as file:
        file.write('{"messages": []}\n')
    assert main(["--config", "job.yaml"]) == 2
    assert capsys.readouterr().err.startswith("error: rows.jsonl:33: 'messages' must be a non-empty list")
    assert list((folder / "cache").glob("[!.]*")) == []
    assert main(["--config", "job.yaml", "packing.overlong=error", "sources.0.rows=row.jsonl"]) == 2
    assert "row.jsonl: no such file; did you mean 'rows.jsonl'?" in capsys.readouterr().err
