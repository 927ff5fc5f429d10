"""Whether an answer that thinks is whole: one block of thinking, then a summary that states the answer.

What fails here is not trained on: a model learns from it to think without end, or to answer inside its thoughts.
"""

from collections.abc import Sequence
from itertools import pairwise

from alignment.answers import extract_answer
from alignment.thinking import Fault, Thought, parse
from data_builders.words import tokens

BROKEN = "\N{REPLACEMENT CHARACTER}"  # what tokens that are no whole character decode to
LOOP_TOKENS, LOOP_TIMES = 20, 4  # so many words and signs, so often, one behind the other, are a loop


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
    """Whether the text repeats itself LOOP_TIMES without a change, some LOOP_TOKENS words and signs or more each time.

    A formula or a phrase that comes again between other words is no loop, whatever its length. Short repetitions count
    by their sum: a line of dashes has to be as long as four runs.
    """
    found = tokens(text)
    places: dict[tuple[str, ...], list[int]] = {}
    for start in range(len(found) - LOOP_TOKENS + 1):
        before = places.setdefault(tuple(found[start : start + LOOP_TOKENS]), [])
        if before and start < before[-1] + LOOP_TOKENS:
            continue  # it overlaps the one before
        before.append(start)
        if len(before) >= LOOP_TIMES and _equal_parts(found, before[-LOOP_TIMES:]):
            return True
    return False


def _equal_parts(found: Sequence[str], places: Sequence[int]) -> bool:
    """Whether what stands between each two neighbours of `places` is the same."""
    parts = [found[start:end] for start, end in pairwise(places)]
    return all(part == parts[0] for part in parts)
