"""What jobs that sample are tested with: a policy that answers every question with 1 or 2, and an engine's samples."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import Ernie4_5_MoeConfig, Ernie4_5_MoeForCausalLM, PreTrainedTokenizerFast

from alignment import chat
from alignment.rows import Row

ROLLOUT_WORKER = Path(__file__).with_name("rollout_worker.py")
WORKER_SECONDS = 400  # half a minute on two cores of its own
ANSWERS = ("1", "2")  # what the policy says, as often the one as the other; the first is right


def _question(number: int) -> Row:
    return {
        "id": f"q{number}",
        "kind": "math",
        "language": "en",
        "prompt": [{"role": "user", "content": f"{number} shirts?"}],
        "answer": ANSWERS[0],
    }


@pytest.fixture(scope="session")
def question() -> Callable[[int], Row]:
    """A prompt row by its number."""
    return _question


@pytest.fixture(scope="session")
def policy(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model taught to answer every question with 1 or 2, in the smallest shape that vLLM serves."""
    torch.manual_seed(0)
    config = Ernie4_5_MoeConfig(
        vocab_size=len(tiny_tokenizer),
        bos_token_id=None,
        eos_token_id=tiny_tokenizer.eos_token_id,
        pad_token_id=tiny_tokenizer.pad_token_id,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=1024,
        moe_intermediate_size=64,
        moe_num_experts=4,
        moe_k=2,
        moe_num_shared_experts=1,
        moe_layer_start_index=0,
        initializer_range=0.05,
        tie_word_embeddings=True,
    )
    model = Ernie4_5_MoeForCausalLM(config)
    teach(model, tiny_tokenizer)
    folder = tmp_path_factory.mktemp("policy")
    model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def teach(model: Ernie4_5_MoeForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(60):
        prompt = chat.render_prompt(tokenizer, _question(step)["prompt"])
        completions = [chat.render_completion(tokenizer, f"\\boxed{{{answer}}}") for answer in ANSWERS]
        ids = torch.tensor([prompt + completion for completion in completions])
        labels = torch.tensor([[-100] * len(prompt) + completion for completion in completions])
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture(scope="session")
def rollouts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What rollout_worker.py leaves: its models, whole.json, and the samples in `killed`, `whole` and `other`."""
    folder = tmp_path_factory.mktemp("rollout")
    assert run_worker(folder, "killed") == -signal.SIGKILL, (folder / "killed.log").read_text()[-3000:]
    assert len(list(folder.glob("killed/*/*.parquet"))) == 1
    assert run_worker(folder, "whole") == 0, (folder / "whole.log").read_text()[-3000:]
    return folder


def run_worker(folder: Path, mode: str) -> int:
    # Spinning OpenMP threads take five times as long where the cores are shared.
    quiet = {"OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(ROLLOUT_WORKER), str(folder), mode]
    with (folder / f"{mode}.log").open("w") as log:
        return subprocess.run(
            command, env={**os.environ, **quiet}, stdout=log, stderr=log, timeout=WORKER_SECONDS, check=False
        ).returncode
