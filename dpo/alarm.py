"""The known failure of DPO: the chosen and the rejected completions lose likelihood together.

The loss sees only their difference, and what both lose goes to completions that nobody has looked at (Pal et al. 2024,
Smaug, arXiv 2402.13228; Razin et al. 2024, arXiv 2410.08847).
"""

from collections.abc import Mapping, Sequence

ALARM_MARGIN = 0.1  # nats a token below the reference, on the mean of either side
ALARM_STEPS = 10  # in a row
KEYS = ("logratio_per_token/chosen", "logratio_per_token/rejected")


def both_fall(history: Sequence[Mapping[str, float]]) -> int:
    """How often both sides fell below the reference by the margin, and stayed there for the steps.

    Args:
        history: log lines with `step`, in order; those without KEYS are passed over. A line is the mean over the steps
            since the one before.
    """
    alarms = last = fallen = 0
    for line in history:
        if not all(key in line for key in KEYS):
            continue
        step = int(line["step"])
        before = fallen
        fallen = fallen + step - last if max(line[key] for key in KEYS) < -ALARM_MARGIN else 0
        alarms += before < ALARM_STEPS <= fallen
        last = step
    return alarms
