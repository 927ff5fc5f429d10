"""May an update take the place of the adapter that is in use? Held-out losses before and after decide.

An update is accepted where it helps, and where it is shown to do no harm: the 95% interval of the change of loss lies
below 0 on the new rows, and below the limit in every group of old ones. Every group has to pass, so no correction for
their number is needed (an intersection-union test, Berger 1982). Few rows make wide intervals, and an update that is
not shown to be harmless is refused.

A row's loss is the mean of -log p over its trained tokens, in nats; exp(rise) is the factor of the perplexity.

Shapes: R rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from alignment.progress import track
from alignment.stats import Interval, mean_interval
from sft.cache import TokenizedRows
from sft.ewc import trained_logits

Losses = NDArray[np.float64]

MINIMUM_ROWS = 10  # of a group


@dataclass(frozen=True)
class Change:
    """The mean loss of a group of rows before and after, and the change, row by row, with its interval."""

    rows: int
    before: float
    after: float
    rise: Interval

    def as_dict(self) -> dict[str, Any]:
        return {"rows": self.rows, "before": self.before, "after": self.after, **self.rise.as_metrics("rise")}


@dataclass(frozen=True)
class Verdict:
    """What the gate says, and why."""

    new: Change
    old: dict[str, Change]
    refusals: list[str]

    @property
    def accepted(self) -> bool:
        return not self.refusals

    def as_dict(self) -> dict[str, Any]:
        old = {group: change.as_dict() for group, change in self.old.items()}
        return {"accepted": self.accepted, "refusals": self.refusals, "new": self.new.as_dict(), "old": old}


@torch.no_grad()
def row_losses(model: nn.Module, rows: TokenizedRows, which: Sequence[int], pad_id: int, label: str) -> Losses:
    """[R] the loss of each of these rows."""
    model.eval()
    losses = []
    for index in track(which, len(which), label):
        ids_T, trained_T = rows.take([index])
        log_probs_NV = trained_logits(model, ids_T, trained_T, pad_id).log_softmax(-1)
        labels_N1 = torch.from_numpy(ids_T[trained_T].astype(np.int64))[:, None].to(log_probs_NV.device)
        losses.append(-log_probs_NV.gather(-1, labels_N1).mean().item())
    return np.array(losses)


def judge(new: tuple[Losses, Losses], old: tuple[Losses, Losses], groups: Sequence[str], limit: float) -> Verdict:
    """
    Args:
        new: losses of the new rows before and after.
        old: the same of the old ones.
        groups: which group each old row belongs to.
        limit: largest rise of an old group's mean loss, in nats a token.
    """
    gain = _change(*new)
    of_group = np.array(groups)
    changes = {group: _change(*(losses[of_group == group] for losses in old)) for group in sorted(set(groups))}
    refusals = [
        f"{group}: the loss changes by {_shown(change.rise)}, limit {limit:g}"
        for group, change in changes.items()
        if not change.rise.high <= limit
    ]
    if not gain.rise.high < 0:
        refusals.append(f"new rows: the loss changes by {_shown(gain.rise)}, which is not below 0 for sure")
    return Verdict(gain, changes, refusals)


def _shown(rise: Interval) -> str:
    return f"{rise.value:.4f} [{rise.low:.4f}, {rise.high:.4f}]"


def _change(before_R: Losses, after_R: Losses) -> Change:
    rise = mean_interval((after_R - before_R).tolist())
    return Change(len(before_R), float(before_R.mean()), float(after_R.mean()), rise)
