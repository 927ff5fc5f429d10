"""Two gloo ranks with DeepSpeed AutoEP under a real Trainer, against one process. Each run is a subprocess."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

Launch = Callable[..., subprocess.CompletedProcess[str]]
STEPS = 6


def trained(launch: Launch, folder: Path, *arguments: object, ranks: int = 2) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    finished = launch("worker.py", folder, "--steps", STEPS, *arguments, ranks=ranks)
    assert finished.returncode == 0, finished.stderr[-4000:]
    return folder


def record(folder: Path, rank: int = 0) -> dict[str, Any]:
    return dict(torch.load(folder / f"rank{rank}.pt"))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def single(launch: Launch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process, 8 rows a step."""
    return trained(launch, tmp_path_factory.mktemp("single"), "--batch", 8, ranks=1)


@pytest.fixture(scope="module")
def parallel(launch: Launch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks of 2 rows, accumulated twice: the same 8 rows a step."""
    return trained(launch, tmp_path_factory.mktemp("parallel"), "--batch", 2, "--accumulate", 2, "--save-steps", 3)


def test_two_ranks_train_as_one_process_does(single: Path, parallel: Path) -> None:
    """Losses, gradient norms (clipped) and weights agree though the ranks' token counts differ: the mean is global."""
    one, two = record(single), record(parallel)
    assert two["trained_tokens"] != record(parallel, rank=1)["trained_tokens"]
    assert len(one["losses"]) == STEPS
    assert two["losses"] == pytest.approx(one["losses"], abs=1e-5)
    assert two["grad_norms"] == pytest.approx(one["grad_norms"], abs=1e-5)
    assert min(one["grad_norms"]) > 0.1, "clipping at 0.1 must have been at work"
    torch.testing.assert_close(weights(parallel), weights(single), rtol=0, atol=1e-5)


def test_four_ranks_train_as_one_process_does(launch: Launch, single: Path, tmp_path: Path) -> None:
    four = trained(launch, tmp_path, "--batch", 2, ranks=4)
    assert record(four)["losses"] == pytest.approx(record(single)["losses"], abs=1e-5)
    torch.testing.assert_close(weights(four), weights(single), rtol=0, atol=1e-5)


def test_exported_folder_is_the_model_in_the_engine(parallel: Path) -> None:
    engine = record(parallel)
    model = AutoModelForCausalLM.from_pretrained(parallel / "model").eval()
    with torch.no_grad():
        outputs = model(
            input_ids=engine["probe"]["input_ids"],
            attention_mask=engine["probe"]["attention_mask"],
            output_hidden_states=True,
            output_router_logits=True,
        )
    torch.testing.assert_close(outputs.logits, engine["logits"], rtol=0, atol=1e-5)
    torch.testing.assert_close(record(parallel, rank=1)["logits"], engine["logits"], rtol=0, atol=1e-5)
    torch.testing.assert_close(outputs.hidden_states[-1], engine["hidden"], rtol=0, atol=1e-5)
    torch.testing.assert_close(outputs.router_logits, engine["router_logits"], rtol=0, atol=1e-5)


def test_every_expert_in_the_exported_folder_was_trained(parallel: Path) -> None:
    initial, final = record(parallel)["initial"], AutoModelForCausalLM.from_pretrained(parallel / "model").state_dict()
    names = [name for name in final if ".experts." in name]
    assert len(names) == 4  # gate_up_proj and down_proj of two layers
    for name in names:
        change = (final[name] - initial[name]).abs().amax(dim=(1, 2))
        assert change.shape == (4,)
        assert change.min() > 1e-4, f"{name}: {change}"


def test_checkpoints_hold_whole_models(parallel: Path) -> None:
    """Not DeepSpeed's half: transformers would load that without a word and draw the missing experts anew."""
    last = load_file(parallel / "checkpoints" / f"checkpoint-{STEPS}" / "model.safetensors")
    torch.testing.assert_close(last, weights(parallel), rtol=0, atol=0)


def test_killed_run_resumes_to_the_same_bits(launch: Launch, parallel: Path, tmp_path: Path) -> None:
    arguments = ("--batch", 2, "--accumulate", 2, "--save-steps", 3)
    killed = launch("worker.py", tmp_path, "--steps", STEPS, *arguments, "--kill-at", 4)
    assert killed.returncode != 0
    assert not (tmp_path / "model").exists()
    resumed = trained(launch, tmp_path, *arguments, "--resume")
    assert record(resumed)["losses"] == record(parallel)["losses"]
    torch.testing.assert_close(weights(resumed), weights(parallel), rtol=0, atol=0)


def test_a_launch_that_lost_deepspeed_is_refused(launch: Launch, tmp_path: Path) -> None:
    """accelerate drops DeepSpeed without a word under this variable, and would train plain DDP."""
    finished = launch("worker.py", tmp_path, ACCELERATE_USE_CPU="true")
    assert finished.returncode != 0
    assert "UserError: expert parallelism was asked for, but accelerate has dropped DeepSpeed" in finished.stderr
    assert not list(tmp_path.rglob("*.safetensors"))


def test_every_model_family_trains_and_exports(launch: Launch, tmp_path: Path) -> None:
    """Logits before and after AutoEP, and of the engine and its reload, for each preset; Ernie also in bfloat16."""
    finished = launch("families.py", tmp_path)
    assert finished.returncode == 0, finished.stderr[-4000:]
    for rank in range(2):
        for family, result in json.loads((tmp_path / f"families{rank}.json").read_text()).items():
            tolerance = 0.05 if family.endswith("bf16") else 1e-5
            assert result["before"] < tolerance, f"rank {rank}, {family}: {result}"
            assert result["after"] < tolerance, f"rank {rank}, {family}: {result}"
            assert result["moved"] > 0.5, f"rank {rank}, {family} was not trained: {result}"
            assert result["fp32_gates"], f"rank {rank}, {family}: {result}"
