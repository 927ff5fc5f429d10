import pytest

from alignment.thinking import Fault, Thought, parse
from data_builders.thinking import LOOP_TIMES, LOOP_TOKENS, check, loops

GOOD = "<think>\n3 x 15 is 45.\n</think>\n\n3 x 15 = \\boxed{45}"


def test_a_whole_answer_is_two_parts() -> None:
    assert parse(GOOD) == Thought("3 x 15 is 45.", "3 x 15 = \\boxed{45}") == check(GOOD)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("45", "no thinking"),
        ("<think>3 x 15", "thinking not closed"),
        ("<think>a</think>b<think>c", "thinking not closed"),
        ("3 x 15</think> 45", "not one block of thinking"),
        ("<think>a</think><think>b</think>c", "not one block of thinking"),
        ("<think>a<think>b</think>c</think>d", "not one block of thinking"),
        ("</think>a<think>b", "text before the thinking"),
        ("Well. <think>a</think> 45", "text before the thinking"),
        ("<think> \n</think> 45", "empty thinking"),
        ("<think>a</think> \n", "no summary"),
    ],
)
def test_what_is_not_whole_is_named(text: str, reason: str) -> None:
    assert parse(text) == Fault(reason) == check(text)


def test_the_summary_states_the_answer_itself() -> None:
    assert check("<think>\\boxed{45}</think> As I said.") == Fault("no answer in the summary")
    assert check(GOOD, cut_off=True) == Fault("cut off")
    assert check(GOOD.replace("15", "1\ufffd")) == Fault("broken characters")


def test_loops() -> None:
    line = " ".join(f"word{i}" for i in range(LOOP_TOKENS))
    assert loops(" ".join([line] * LOOP_TIMES))
    assert not loops(" ".join([line] * (LOOP_TIMES - 1)))
    assert not loops(" ".join(f"step {i}: {i} + {i} = {2 * i}" for i in range(300)))
    restated = [f"{line}, hence {'so ' * i}{i}." for i in range(20)]
    assert not loops(" ".join(restated)), "a formula that is carried along"
    cases = [f"Case {i}: {line} gives {i * i}." for i in range(20)]
    assert not loops(" ".join(cases)), "cases of one wording and one length"
    assert loops(" ".join([*restated, *[f"Wait. {line} No."] * LOOP_TIMES, "So 4."]))
    assert loops("-" * LOOP_TOKENS * LOOP_TIMES) and not loops("-" * (LOOP_TOKENS * LOOP_TIMES - 1))
    assert loops("等等，让我再想一想这个问题到底应该怎么解决才对。" * LOOP_TIMES)
    text = GOOD.replace("3 x 15 is 45.", " ".join([line] * LOOP_TIMES))
    assert check(text) == Fault("loop")
