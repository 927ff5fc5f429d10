"""Which two of a prompt's samples become chosen and rejected, and why.

The rule for prompts with a known answer is the Compass report's: discard the prompt where none is correct; chosen is
the best-scored correct sample, rejected the best-scored incorrect one. Of several pairs the first is that one; the
others' rejected samples are spread evenly down to the worst-scored. Without scores all are drawn at random.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from alignment.rows import Row

CORRECT = "correct"
INCORRECT = ("wrong", "no_answer")  # other verdicts say nothing of the sample: it is neither chosen nor rejected


@dataclass(frozen=True)
class Candidate:
    """One sample of a prompt: its text, the rule's verdict (None where the prompt has no answer), the reward score."""

    index: int
    text: str
    verdict: str | None
    score: float | None


@dataclass(frozen=True)
class Pair:
    """A chosen and a rejected sample and the policy that picked them."""

    chosen: Candidate
    rejected: Candidate
    policy: str


@dataclass(frozen=True)
class Discard:
    """Why a prompt gives no pair."""

    reason: str


def choose(candidates: Sequence[Candidate], count: int, seed: str) -> list[Pair] | Discard:
    """At most `count` pairs of distinct samples, or the reason why there is none."""
    distinct = list({c.text: c for c in reversed(candidates)}.values())[::-1]
    if all(c.verdict is None for c in distinct):
        return _best_worst(distinct)
    correct = [c for c in distinct if c.verdict == CORRECT]
    incorrect = [c for c in distinct if c.verdict in INCORRECT]
    if not correct:
        return Discard("none correct" if incorrect else "none verifiable")
    if not incorrect:
        return Discard("all correct")
    scored = all(c.score is not None for c in distinct)
    policy = "math_best_scored" if scored else "math_random"
    order = _by_score if scored else _shuffled
    best, hardest = order(correct, f"{seed}/correct"), order(incorrect, f"{seed}/incorrect")
    # Of a small model's samples few are correct in a way of their own: a correct one meets several incorrect ones.
    return [Pair(best[i % len(best)], rejected, policy) for i, rejected in enumerate(_spread(hardest, count))]


def _spread(ranked: Sequence[Candidate], count: int) -> list[Candidate]:
    """At most `count`, from the first to the last at even distances."""
    count = min(count, len(ranked))
    return [ranked[i * (len(ranked) - 1) // max(count - 1, 1)] for i in range(count)]


def pair_row(prompt: Row, pair: Pair) -> Row:
    """A preference row in TRL's format, with what explains the choice."""
    return {
        "id": f"{prompt['id']}/{pair.chosen.index}/{pair.rejected.index}",
        **{key: prompt[key] for key in ("kind", "language", "template") if key in prompt},
        "prompt": prompt["prompt"],
        "chosen": [{"role": "assistant", "content": pair.chosen.text}],
        "rejected": [{"role": "assistant", "content": pair.rejected.text}],
        "policy": pair.policy,
        "scores": [pair.chosen.score, pair.rejected.score],
        "verdicts": [pair.chosen.verdict, pair.rejected.verdict],
    }


def _best_worst(candidates: Sequence[Candidate]) -> list[Pair] | Discard:
    if any(c.score is None for c in candidates):
        return Discard("no answer to verify and no reward model")
    ranked = _by_score(candidates, "")
    if len(ranked) < 2 or ranked[0].score == ranked[-1].score:
        return Discard("all scores equal")
    return [Pair(ranked[0], ranked[-1], "best_worst")]


def _by_score(candidates: Sequence[Candidate], _seed: str) -> list[Candidate]:
    return sorted(candidates, key=lambda c: (-(c.score or 0.0), c.index))


def _shuffled(candidates: Sequence[Candidate], seed: str) -> list[Candidate]:
    return random.Random(seed).sample(list(candidates), len(candidates))
