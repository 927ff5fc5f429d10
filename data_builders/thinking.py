"""Whether an answer that thinks is whole: one block of thinking, then a summary that states the answer.

What fails here is not trained on: a model learns from it to think without end, or to answer inside its thoughts.
"""

from collections import Counter

from alignment.answers import extract_answer
from alignment.thinking import Fault, Thought, parse
from data_builders.words import tokens

BROKEN = "\N{REPLACEMENT CHARACTER}"  # what tokens that are no whole character decode to
LOOP_TOKENS, LOOP_TIMES = 20, 4  # a run of so many words and signs that comes so often is a loop


def check(text: str, *, cut_off: bool = False) -> Thought | Fault:
    """As `alignment.thinking.parse`; besides, it ends by itself, is readable, no loop, and states its answer last."""
    if cut_off:
        return Fault("cut off")
    thought = parse(text)
    if isinstance(thought, Fault):
        return thought
    if BROKEN in text:
        return Fault("broken characters")
    if loops(thought.thinking) or loops(thought.summary):
        return Fault("loop")
    return thought if extract_answer(thought.summary) is not None else Fault("no answer in the summary")


def loops(text: str) -> bool:
    """Whether some run of LOOP_TOKENS words and signs comes LOOP_TIMES times, one behind the other.

    Runs that overlap count once, so that a line of dashes has to be as long as four runs.
    """
    found = tokens(text)
    times: Counter[tuple[str, ...]] = Counter()
    free: dict[tuple[str, ...], int] = {}  # run -> where it may come again
    for start in range(len(found) - LOOP_TOKENS + 1):
        run = tuple(found[start : start + LOOP_TOKENS])
        if free.get(run, 0) > start:
            continue
        free[run] = start + LOOP_TOKENS
        times[run] += 1
        if times[run] == LOOP_TIMES:
            return True
    return False
