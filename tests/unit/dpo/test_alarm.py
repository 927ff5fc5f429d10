"""When chosen and rejected completions lose likelihood together."""

import pytest

from dpo.alarm import ALARM_MARGIN, ALARM_STEPS, both_fall

DEEP, SHALLOW = -2 * ALARM_MARGIN, -ALARM_MARGIN / 2


def lines(*spans: tuple[int, float, float]) -> list[dict[str, float]]:
    """Log lines of spans (steps, chosen, rejected), every step, with an evaluation between each two."""
    found: list[dict[str, float]] = []
    for steps, chosen, rejected in spans:
        for _ in range(steps):
            step = len(found) // 2 + 1
            found.append({"step": step, "logratio_per_token/chosen": chosen, "logratio_per_token/rejected": rejected})
            found.append({"step": step, "eval_logratio_per_token/chosen": 1.0})
    return found


@pytest.mark.parametrize(
    ("spans", "alarms"),
    [
        ([(ALARM_STEPS, DEEP, DEEP)], 1),
        ([(ALARM_STEPS - 1, DEEP, DEEP)], 0),
        ([(3 * ALARM_STEPS, DEEP, DEEP)], 1),
        ([(ALARM_STEPS, DEEP, SHALLOW), (ALARM_STEPS, SHALLOW, DEEP)], 0),
        ([(ALARM_STEPS - 1, DEEP, DEEP), (1, SHALLOW, DEEP), (ALARM_STEPS - 1, DEEP, DEEP)], 0),
        ([(ALARM_STEPS, DEEP, DEEP), (1, SHALLOW, DEEP), (ALARM_STEPS, DEEP, DEEP)], 2),
        ([], 0),
    ],
)
def test_alarms_are_counted_by_stretches(spans: list[tuple[int, float, float]], alarms: int) -> None:
    assert both_fall(lines(*spans)) == alarms


def test_a_line_stands_for_the_steps_since_the_one_before() -> None:
    every_fifth = [line for line in lines((ALARM_STEPS, DEEP, DEEP)) if line["step"] % 5 == 0]
    assert len(every_fifth) < ALARM_STEPS
    assert both_fall(every_fifth) == 1
    assert both_fall(every_fifth[:-2]) == 0
