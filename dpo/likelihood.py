"""Sampled answers against transformers: does the engine serve the weights it names, and how far has the policy moved.

Engines give the sum of the log-probabilities of an answer's tokens under the model itself, whatever the temperature.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from alignment.rollout.proof import reference_logprobs
from alignment.stats import Interval, mean_interval


@dataclass(frozen=True)
class Answer:
    """Token ids of a prompt and of an answer sampled to it, and the sum of the answer's log-probabilities in nats."""

    prompt_ids: list[int]
    token_ids: list[int]
    logprob: float


@dataclass(frozen=True)
class Divergence:
    """KL(policy || initial policy), in nats an answer, with its 95% interval over answers; and in nats a token."""

    per_answer: Interval
    per_token: float

    def as_metrics(self) -> dict[str, float]:
        return self.per_answer.as_metrics("kl") | {"kl_per_token": self.per_token}


def logprobs(folder: Path, answers: Sequence[Answer], dtype: str) -> list[float]:
    """Of each answer, the sum of its tokens' log-probabilities under the model in `folder`, by transformers."""
    tokens = reference_logprobs(folder, [[*a.prompt_ids, *a.token_ids] for a in answers], dtype)
    return [sum(values[len(a.prompt_ids) - 1 :]) for values, a in zip(tokens, answers, strict=True)]


def gap_per_token(answers: Sequence[Answer], folder: Path, dtype: str) -> float:
    """How far the engine's log-probabilities of answers are from those of `folder`: mean |difference|, nats a token.

    Differences of opposite sign within one answer cancel, so it is at most the mean over single tokens.
    """
    ours = logprobs(folder, answers, dtype)
    differences = [abs(a.logprob - own) for a, own in zip(answers, ours, strict=True)]
    return sum(differences) / sum(len(a.token_ids) for a in answers)


def divergence(answers: Sequence[Answer], initial: Path, dtype: str) -> Divergence:
    """KL of the policy that sampled `answers` to the one in `initial`, estimated from them.

    Schulman's k1 (2020, "Approximating KL divergence"): the mean of log p(y) - log p_initial(y) over whole answers. It
    is unbiased for answers drawn at temperature 1 and top_p 1, and may fall below 0 by chance. His k3 exponentiates the
    difference, which over whole answers is too large for that.
    """
    before = logprobs(initial, answers, dtype)
    moved = [a.logprob - own for a, own in zip(answers, before, strict=True)]
    return Divergence(mean_interval(moved), sum(moved) / sum(len(a.token_ids) for a in answers))
