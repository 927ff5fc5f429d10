"""Which two of a prompt's samples become chosen and rejected, and why.

Prompts with a known answer follow the Compass report's rule: discard the prompt where no sample is correct; chosen is
the best-scored correct sample, rejected the best-scored incorrect one. Of several pairs the first is that one; the
others' rejected samples are spread evenly down to the worst-scored. Without scores all are drawn at random.

Other prompts go by the distribution of their samples' scores: chosen is the best-scored, rejected the one whose score
is nearest to a target (`PairingConfig.policy`): the lowest score, a quantile, or mean - k standard deviations.

With `math_rule: false` prompts with a known answer go by their scores too; their verdicts are noted, not used.

Samples that were cut off are left out before, and of samples with one text the first stands for all: `eligible`.
"""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from alignment.rows import Row
from data_builders.config import PairingConfig

COPIED = ("kind", "language", "source", "template", "chat_template_kwargs", "tools")  # from the prompt's row
CORRECT = "correct"
INCORRECT = ("wrong", "no_answer")  # other verdicts say nothing of the sample: it is neither chosen nor rejected


@dataclass(frozen=True)
class Candidate:
    """One sample of a prompt: its text and tokens, the verdict (None: the prompt has no answer), the reward score."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str
    verdict: str | None
    score: float | None

    @property
    def tokens(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True)
class Origin:
    """What sampled: hash of the policy's weights (alignment.fingerprint), hash of its tokenizer (alignment.chat)."""

    weights: str
    tokenizer: str


@dataclass(frozen=True)
class Pair:
    """A chosen and a rejected sample, the policy that picked them, and its reason.

    `ranks` are their places among all eligible samples by score, 1 the best; None without scores.
    """

    chosen: Candidate
    rejected: Candidate
    policy: str
    reason: str
    ranks: tuple[int, int] | None


@dataclass(frozen=True)
class Discard:
    """Why a prompt gives no pair."""

    reason: str


def eligible(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The samples that may be paired, by index: whole ones, and of equal texts the first.

    A sample that was cut off would be trained with a stop token that the policy never gave.
    """
    whole = sorted((c for c in candidates if c.finish_reason == "stop"), key=lambda c: -c.index)
    return list({c.text: c for c in whole}.values())[::-1]


def choose(candidates: Sequence[Candidate], config: PairingConfig, seed: str) -> list[Pair] | Discard:
    """At most `config.per_prompt` pairs of one prompt's eligible samples, or the reason why there is none.

    A function of its arguments alone; the order of the candidates does not matter.
    """
    if not candidates:
        return Discard("every sample cut off")
    if any(c.score is not None and not math.isfinite(c.score) for c in candidates):
        return Discard("a score is not finite")
    ordered = sorted(candidates, key=lambda c: c.index)
    if not config.math_rule or all(c.verdict is None for c in ordered):
        return _by_distribution(ordered, config)
    return _by_verdict(ordered, config, seed)


def pair_row(prompt: Row, pair: Pair, origin: Origin) -> Row:
    """A preference row in TRL's format, with what explains the choice; each list is [of chosen, of rejected].

    `token_ids` are those that were sampled, and `weights` and `tokenizer` say of which policy.
    """
    both = (pair.chosen, pair.rejected)
    return {
        "id": f"{prompt['id']}/{pair.chosen.index}/{pair.rejected.index}",
        **{key: prompt[key] for key in COPIED if key in prompt},
        "prompt": prompt["prompt"],
        "chosen": [{"role": "assistant", "content": pair.chosen.text}],
        "rejected": [{"role": "assistant", "content": pair.rejected.text}],
        "policy": pair.policy,
        "reason": pair.reason,
        "scores": [c.score for c in both],
        "ranks": None if pair.ranks is None else list(pair.ranks),
        "verdicts": [c.verdict for c in both],
        "tokens": [c.tokens for c in both],
        "token_ids": [c.token_ids for c in both],
        "weights": origin.weights,
        "tokenizer": origin.tokenizer,
    }


def _by_verdict(candidates: Sequence[Candidate], config: PairingConfig, seed: str) -> list[Pair] | Discard:
    correct = [c for c in candidates if c.verdict == CORRECT]
    incorrect = [c for c in candidates if c.verdict in INCORRECT]
    if not correct:
        return Discard("none correct" if incorrect else "none verifiable")
    if not incorrect:
        return Discard("all correct")
    if any(c.score is None for c in candidates):
        policy, manner = "math_random", "draw"
        best, hardest = _shuffled(correct, f"{seed}/correct"), _shuffled(incorrect, f"{seed}/incorrect")
    else:
        policy, manner = "math_best_scored", "place"
        best, hardest = _by_score(correct), _by_score(incorrect)
    ranks = _ranks(candidates)
    pairs: list[Pair] = []
    for number, place in enumerate(_places(len(hardest), config.per_prompt)):
        # Of a small model's samples few are correct in a way of their own: a correct one meets several incorrect ones.
        chosen = best[number % len(best)]
        used = {pair.rejected.index for pair in pairs}
        fitting = [i for i, c in enumerate(hardest) if c.index not in used and _alike(chosen, c, config)]
        if not fitting:
            continue
        at = min(fitting, key=lambda i: (abs(i - place), i))
        first, second = f"{number % len(best) + 1} of {len(best)} correct", f"{at + 1} of {len(hardest)} incorrect"
        pairs.append(_pair(chosen, hardest[at], policy, f"{manner} {first}, {manner} {second}", ranks))
    return pairs or Discard("no incorrect sample of like length")


def _by_distribution(candidates: Sequence[Candidate], config: PairingConfig) -> list[Pair] | Discard:
    if any(c.score is None for c in candidates):
        return Discard("no answer to verify and no reward model")
    if len(candidates) < 2:
        return Discard("one sample only")
    ranked = _by_score(candidates)
    scores = np.array([c.score for c in ranked], dtype=np.float64)
    if scores[0] == scores[-1]:
        return Discard("all scores equal")
    target, wording = _target(scores, config)
    margin = max(config.minimum_margin, config.minimum_margin_sigmas * float(scores.std()))
    ranks = _ranks(candidates)
    ignored = any(c.verdict is not None for c in ranked)
    reason = f"best-scored, {wording}{'; by the reward alone, whatever the verdicts' if ignored else ''}"
    pairs: list[Pair] = []
    free = ranked
    for _ in range(config.per_prompt):
        rejected = _rejected(free, target, margin, config)
        if isinstance(rejected, Discard):
            return pairs or rejected
        pairs.append(_pair(free[0], rejected, config.policy, reason, ranks))
        free = [c for c in free[1:] if c != rejected]
    return pairs


def _rejected(free: Sequence[Candidate], target: float, margin: float, config: PairingConfig) -> Candidate | Discard:
    """Of the samples behind the first, the best-scored, the one nearest to `target` that may be rejected for it."""
    gaps = [_score(free[0]) - _score(c) for c in free]
    far = [c for c, gap in zip(free, gaps, strict=True) if gap > 0 and gap >= margin]
    if not far:
        return Discard("margin too small")
    alike = [c for c in far if _alike(free[0], c, config)]
    if not alike:
        return Discard("no sample of like length")
    return min(alike, key=lambda c: (abs(_score(c) - target), _score(c), c.index))


def _target(scores: np.ndarray, config: PairingConfig) -> tuple[float, str]:
    """The score that the rejected sample is to have, and the words for it."""
    match config.policy:
        case "best_worst":
            return float(scores.min()), "lowest-scored"
        case "best_quantile":
            target = float(np.quantile(scores, config.quantile))
            return target, f"nearest to quantile {config.quantile:g} of the scores, {target:.4g}"
        case "best_sigma":
            target = float(scores.mean() - config.sigmas * scores.std())
            return target, f"nearest to mean - {config.sigmas:g} standard deviations, {target:.4g}"


def _places(candidates: int, count: int) -> list[int]:
    """At most `count` places, from the first to the last at even distances."""
    count = min(count, candidates)
    return [i * (candidates - 1) // max(count - 1, 1) for i in range(count)]


def _alike(a: Candidate, b: Candidate, config: PairingConfig) -> bool:
    ratio = config.longest_ratio
    return ratio is None or max(a.tokens, b.tokens) <= ratio * min(a.tokens, b.tokens)


def _pair(chosen: Candidate, rejected: Candidate, policy: str, reason: str, ranks: Mapping[int, int]) -> Pair:
    return Pair(chosen, rejected, policy, reason, (ranks[chosen.index], ranks[rejected.index]) if ranks else None)


def _ranks(candidates: Sequence[Candidate]) -> dict[int, int]:
    """Index -> place by score; empty without scores."""
    if any(c.score is None for c in candidates):
        return {}
    return {c.index: place for place, c in enumerate(_by_score(candidates), start=1)}


def _score(candidate: Candidate) -> float:
    assert candidate.score is not None
    return candidate.score


def _by_score(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Best first; of equal scores the earlier sample."""
    return sorted(candidates, key=lambda c: (-_score(c), c.index))


def _shuffled(candidates: Sequence[Candidate], seed: str) -> list[Candidate]:
    return random.Random(seed).sample(list(candidates), len(candidates))
