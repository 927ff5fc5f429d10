"""Which prompts a round samples: all in turn, or more often those whose samples are now right and now wrong.

A pair by the math rule needs a correct and an incorrect sample, so a prompt with pass rate 0 or 1 gives none, and one
near 1/2 gives the most. `pass_rate` draws by the expected variance of a sample's verdict, E[p(1 - p)], where p is what
c correct samples of n say of the pass rate, starting from a uniform prior: p ~ Beta(c + 1, n - c + 1), so

    E[p(1 - p)] = (c + 1)(n - c + 1) / ((n + 2)(n + 3)).

It is never 0, so that no prompt is given up: at 32 samples 0.24 for c = 16 and 0.03 for c = 0 or 32. A prompt that was
not sampled yet has the prior's own mean, 1/6 (c = n = 0), and so has one without an answer, which has no pass rate.
"""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Literal

from alignment.errors import UserError
from alignment.rows import Row

Redraw = Literal["uniform", "pass_rate"]


@dataclass(frozen=True)
class Seen:
    """The verdicts on a prompt's samples in the last round that sampled it."""

    correct: int
    n: int


def draw_prompts(
    prompts: Sequence[Row], count: int, number: int, seed: int, *, redraw: Redraw, seen: Mapping[str, Seen]
) -> list[Row]:
    """`count` different prompts for round `number`, the same for the same arguments.

    `uniform`: in an order drawn once, each before any comes again. `pass_rate`: as `uniform` in the first round, later
    by weight and without replacement, from what `seen` (prompt id -> last verdicts) says.

    Raises:
        UserError: more prompts a round than there are.
    """
    if count > len(prompts):
        raise UserError(f"round.prompts: {count} wanted, but there are {len(prompts)}")
    if redraw == "uniform" or number == 1:
        order = random.Random(f"{seed}/prompts").sample(list(prompts), len(prompts))
        drawn = list(islice(cycle(order), (number - 1) * count, number * count))
        return list({row["id"]: row for row in drawn}.values())
    rng = random.Random(f"{seed}/prompts/{number}")
    keys = {row["id"]: _key(weight(seen.get(row["id"])), rng) for row in prompts}
    return sorted(prompts, key=lambda row: keys[row["id"]])[:count]


def weight(seen: Seen | None) -> float:
    """E[p(1 - p)] after the verdicts `seen`."""
    correct, n = (seen.correct, seen.n) if seen else (0, 0)
    return (correct + 1) * (n - correct + 1) / ((n + 2) * (n + 3))


def _key(weight: float, rng: random.Random) -> float:
    """An exponential of rate `weight`: the smallest keys are a draw without replacement (Efraimidis, Spirakis 2006)."""
    return -math.log(1.0 - rng.random()) / weight
