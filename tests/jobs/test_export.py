"""The real commands: two ranks train with expert parallelism, and `alignment export` compares what vLLM serves."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from alignment.rows import Row, write_rows
from alignment.training import last_whole_checkpoint

ROOT = Path(__file__).parents[2]
SECONDS = 400
pytestmark = pytest.mark.timeout(2 * SECONDS)


def row(number: int) -> Row:
    answer = f"<think>{number} x 15 = {15 * number}</think> \\boxed{{{15 * number}}}"
    return {
        "messages": [
            {"role": "user", "content": f"A shirt costs 15. {number} shirts cost?"},
            {"role": "assistant", "content": answer},
        ]
    }


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS, check=False)


@pytest.fixture(scope="module")
def folder(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The job's folder: compass-tiny, some steps on two ranks."""
    folder = tmp_path_factory.mktemp("export")
    write_rows(folder / "rows.jsonl", map(row, range(2, 122)))
    tiny_tokenizer.save_pretrained(folder / "tokenizer")
    config = {
        "output_dir": str(folder / "sft"),
        "model": {"preset": "compass-tiny", "tokenizer": str(folder / "tokenizer")},
        "sources": [{"rows": str(folder / "rows.jsonl")}],
        "packing": {"capacity": 256},
        "training": {"epochs": 1, "learning_rate": 3e-3, "save_steps": 8},
    }
    (folder / "sft.yaml").write_text(yaml.safe_dump(config))
    launcher = "configs/accelerate/cpu-ep2.yaml"
    finished = run("alignment.launch", "--config_file", launcher, "-m", "sft.train", "--config", folder / "sft.yaml")
    assert finished.returncode == 0, finished.stderr[-4000:]
    return folder


def test_checkpoint_becomes_a_model_that_vllm_serves(folder: Path) -> None:
    """float32: the mean gap is at most 2e-5, and the folder is the model that the job itself saved at its end."""
    checkpoint, out = last_whole_checkpoint(folder / "sft" / "checkpoints"), folder / "out"
    finished = run("alignment.cli", "export", checkpoint, out, "--check-prompts", folder / "rows.jsonl", "--limit", 16)
    assert finished.returncode == 0, finished.stderr[-4000:]
    [line] = finished.stdout.splitlines()
    found = re.fullmatch(
        rf"{out}: exported from {checkpoint}; float32 log-probs of vLLM and transformers on (\d+) tokens: "
        r"max gap (\S+), mean (\S+) \(gate 2e-05\)",
        line,
    )
    assert found, line
    tokens, largest, mean = map(float, found.groups())
    assert 0 < mean <= 2e-5
    assert mean < largest < 1e-3
    tokenizer = AutoTokenizer.from_pretrained(out)
    rendered = [tokenizer.apply_chat_template(row(number)["messages"])["input_ids"] for number in range(2, 18)]
    assert tokens == sum(len(ids) - 1 for ids in rendered)
    assert not list(out.rglob("*.pt")) + list(out.glob("trainer_state.json"))
    saved, exported = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (folder / "sft/model", out))
    torch.testing.assert_close(exported, saved, rtol=0, atol=0)
