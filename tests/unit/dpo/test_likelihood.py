"""Answers against transformers, each log-probability worked out once more here."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from dpo.likelihood import Answer, divergence, gap_per_token, logprobs

LENGTHS = ((3, 5), (9, 1), (1, 4))  # of prompt and answer


@pytest.fixture(scope="module")
def answers() -> list[Answer]:
    rng = random.Random(0)
    return [Answer(*([rng.randrange(300) for _ in range(n)] for n in lengths), 0.0) for lengths in LENGTHS]


@torch.no_grad()
def by_hand(folder: Path, answer: Answer) -> float:
    """Token by token, each from a forward of its own over what stands before it."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    total = 0.0
    for place, token in enumerate(answer.token_ids):
        before = torch.tensor([[*answer.prompt_ids, *answer.token_ids[:place]]])
        total += float(model(before).logits[0, -1].log_softmax(-1)[token])
    return total


def test_log_probabilities_are_of_the_answer_s_tokens_alone(tiny_model_folder: Path, answers: list[Answer]) -> None:
    expected = [by_hand(tiny_model_folder, answer) for answer in answers]
    assert logprobs(tiny_model_folder, answers, "float32") == pytest.approx(expected, abs=1e-4)


def test_gap_is_a_mean_over_tokens(tiny_model_folder: Path, answers: list[Answer]) -> None:
    true = logprobs(tiny_model_folder, answers, "float32")
    right = [replace(a, logprob=value) for a, value in zip(answers, true, strict=True)]
    assert gap_per_token(right, tiny_model_folder, "float32") == 0
    off = [replace(a, logprob=a.logprob + change) for a, change in zip(right, (1.0, -3.0, 0.5), strict=True)]
    assert gap_per_token(off, tiny_model_folder, "float32") == pytest.approx(4.5 / 10, abs=1e-5)


def test_divergence_of_a_policy_from_itself_is_0_and_else_the_mean_difference(
    tiny_model_folder: Path, answers: list[Answer]
) -> None:
    true = logprobs(tiny_model_folder, answers, "float32")
    same = [replace(a, logprob=value) for a, value in zip(answers, true, strict=True)]
    assert divergence(same, tiny_model_folder, "float32").as_metrics() == dict.fromkeys(
        ("kl", "kl.low", "kl.high", "kl_per_token"), 0.0
    )
    moved = [replace(a, logprob=a.logprob + change) for a, change in zip(same, (3.0, 1.0, -1.0), strict=True)]
    found = divergence(moved, tiny_model_folder, "float32")
    assert found.per_answer.value == pytest.approx(1.0, abs=1e-5)  # (3 + 1 - 1) / 3
    assert found.per_answer.high - 1 == pytest.approx(4.302653 * 2 / 3**0.5, abs=1e-4)  # Student, 2 degrees of freedom
    assert found.per_token == pytest.approx(0.3, abs=1e-5)  # 3 nats over 10 tokens
