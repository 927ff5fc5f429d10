"""`alignment.launch ... --dry-run`: one process plans for the ranks of a layout that this machine does not have."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

LAUNCHER = """
compute_environment: LOCAL_MACHINE
distributed_type: DEEPSPEED
num_machines: 8
num_processes: 64
main_process_port: 29500
deepspeed_config: {deepspeed_config_file: deepspeed.json}
"""
SFT = """
output_dir: out
model: {preset: compass-v3, tokenizer: tokenizer, dtype: bfloat16}
sources: [{rows: rows.jsonl}]
training: {learning_rate: 1.0e-5, accumulation: 2}
"""
ROW = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


@pytest.fixture
def folder(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "launcher.yaml").write_text(LAUNCHER)
    (tmp_path / "job.yaml").write_text(SFT)
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROW))
    return tmp_path


def dry_run(folder: Path, expert_parallel: int) -> subprocess.CompletedProcess[str]:
    experts = {"enabled": True, "autoep_size": expert_parallel}
    config = {
        "zero_optimization": {"stage": 3},
        "expert_parallel": experts,
        "optimizer": {"type": "AdamW", "params": {}},
    }
    (folder / "deepspeed.json").write_text(json.dumps(config))
    launcher = ["-m", "alignment.launch", "--config_file", "launcher.yaml", "--machine_rank", "3"]
    command = [sys.executable, *launcher, "-m", "sft.train", "--config", "job.yaml", "--dry-run"]
    return subprocess.run(command, check=False, cwd=folder, capture_output=True, text=True, timeout=120)


def test_plan_of_64_ranks_on_this_machine(folder: Path) -> None:
    finished = dry_run(folder, expert_parallel=8)
    assert finished.returncode == 0, finished.stderr
    assert "step: 128 packs of 2048 tokens = 262144 tokens" in finished.stdout
    assert "memory of one rank: 64 ranks, expert parallelism 8, ZeRO 3, bfloat16" in finished.stdout
    assert "61.2 of 80 GB: fits, 18.8 GB left" in finished.stdout
    assert not (folder / "out").exists()


def test_layout_that_does_not_divide_is_refused(folder: Path) -> None:
    finished = dry_run(folder, expert_parallel=6)
    assert finished.returncode == 2
    assert finished.stderr.strip().endswith("6 does not divide the model's 16 experts; valid sizes: 1, 2, 4, 8, 16")
