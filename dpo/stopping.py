"""When online training ends before its last round, and which round's model it gives."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from dpo.config import StopConfig


@dataclass(frozen=True)
class Decision:
    """`kept` is the round whose model to give, 0 the starting policy; `stop` says why no round may follow."""

    stop: Literal["kl", "patience"] | None
    kept: int
    without_gain: int


def decide(pass_rates: Sequence[float], kls: Sequence[float], stop: StopConfig) -> Decision:
    """What to do after the last of the rounds so far; number 0 of both sequences is the starting policy.

    With `patience` the best held-out pass@1 is kept, the earlier of equals, else the last round; neither from beyond
    the limit on the KL divergence. A gain is a higher pass@1 than the best before: noise counts as gain, and the best
    of several rounds is flattered by having been chosen on the same prompts.
    """
    allowed = [number for number, kl in enumerate(kls) if number == 0 or stop.kl is None or kl <= stop.kl]
    best = max(allowed, key=lambda number: (pass_rates[number], -number))
    without_gain = len(pass_rates) - 1 - best
    kept = allowed[-1] if stop.patience is None else best
    if stop.kl is not None and kls[-1] > stop.kl:
        return Decision("kl", kept, without_gain)
    if stop.patience is not None and without_gain >= stop.patience:
        return Decision("patience", kept, without_gain)
    return Decision(None, kept, without_gain)
