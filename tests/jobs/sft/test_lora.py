"""Adapters through the real job: what it writes, that it resumes to the bit, that plain peft agrees with the merge."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from alignment.config import load_config
from alignment.rows import write_rows
from sft.config import SFTConfig
from sft.train import run

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def dense_model_folder(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense_model")
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tiny_tokenizer), initializer_range=0.2, **shape)).save_pretrained(
        folder
    )
    tiny_tokenizer.save_pretrained(folder)
    return folder


def recipe(folder: Path, base: Path, lora: dict[str, Any]) -> Path:
    answers = ("\\boxed{37.5}", "so it is 45 baht", "1.234,5")
    rows = [
        {"messages": [{"role": "user", "content": f"{i} shirts?"}, {"role": "assistant", "content": answers[i % 3]}]}
        for i in range(48)
    ]
    write_rows(folder / "rows.jsonl", rows)
    config = {
        "output_dir": str(folder / "out"),
        "model": {"path": str(base)},
        "sources": [{"rows": str(folder / "rows.jsonl")}],
        "packing": {"capacity": 128},
        "prepare": {"cache": str(folder / "cache")},
        "training": {"learning_rate": 2e-2, "save_steps": 2, "log_steps": 1, "epochs": 2, "schedule": "linear"},
        "lora": lora,
    }
    (folder / "sft.yaml").write_text(yaml.safe_dump(config))
    return folder / "sft.yaml"


def config(path: Path) -> SFTConfig:
    return load_config(SFTConfig, path)


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "out" / "adapter" / "adapter_model.safetensors")


def logged(folder: Path) -> list[float]:
    lines = map(json.loads, (folder / "out" / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=torch.arange(24)[None]).logits


def check_outputs(folder: Path, base: Path) -> None:
    """The merged folder answers as base and adapter do together, and not as the base."""
    plain = AutoModelForCausalLM.from_pretrained(base)
    before = logits(plain)
    together = logits(PeftModel.from_pretrained(plain, folder / "out" / "adapter"))
    merged = logits(AutoModelForCausalLM.from_pretrained(folder / "out" / "model"))
    assert (together - before).abs().max() > 0.3
    torch.testing.assert_close(merged, together, rtol=0, atol=2e-5)
    AutoTokenizer.from_pretrained(folder / "out" / "model")


TARGETS: dict[str, list[str] | None] = {
    "dense": None,
    "ernie": None,
    "routed": ["experts.gate_up_proj", "experts.down_proj", "q_proj"],
}


@pytest.mark.parametrize("case", TARGETS)
def test_an_adapter_trains_merges_and_resumes_to_the_same_bits(
    case: str, dense_model_folder: Path, tiny_model_folder: Path, tmp_path: Path
) -> None:
    base = dense_model_folder if case == "dense" else tiny_model_folder
    path = recipe(tmp_path, base, {"rank": 4, "alpha": 8, "targets": TARGETS[case]})
    run(config(path))
    check_outputs(tmp_path, base)
    losses = logged(tmp_path)
    assert losses[-1] < losses[0] - 0.5
    whole = adapter(tmp_path)
    assert any("experts." in name and "shared" not in name for name in whole) == (case == "routed")

    last = max((tmp_path / "out" / "checkpoints").glob("checkpoint-*"), key=lambda p: int(p.name.rpartition("-")[2]))
    (last / "WHOLE").unlink()
    (tmp_path / "out" / "DONE").unlink()
    (tmp_path / "out" / "adapter" / "adapter_model.safetensors").unlink()
    run(config(path))
    torch.testing.assert_close(adapter(tmp_path), whole, rtol=0, atol=0)
    assert logged(tmp_path) == losses


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    start = ["-m", "alignment.launch", "--config_file", "configs/accelerate/cpu-ep2.yaml", "-m", "sft.train"]
    return subprocess.run(
        [sys.executable, *start, *arguments], check=False, cwd=ROOT, capture_output=True, text=True, timeout=300
    )


def test_the_command_under_expert_parallelism(tiny_model_folder: Path, tmp_path: Path) -> None:
    path = recipe(tmp_path, tiny_model_folder, {"rank": 4, "alpha": 8})
    finished = command("--config", str(path), "training.gradient_checkpointing=true")
    assert finished.returncode == 0, finished.stderr[-4000:]
    assert "merged; log-probabilities differ by" in finished.stdout
    check_outputs(tmp_path, tiny_model_folder)
    assert any("shared_experts" in name for name in adapter(tmp_path))
