"""Is a completion's answer right? Plain numbers are compared exactly; math-verify, on a leash, has the rest.

A verdict is that of the claim alone: it does not depend on what else is asked, in what order, from which thread, event
loop or forked process. No claim raises an exception.
"""

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from fractions import Fraction

from alignment import cores
from alignment.answers import as_latex, choice, extract_answer, is_percent, letters_of, machine_form, plain, to_number
from alignment.closing import Closing
from alignment.math_pool import Pool

log = logging.getLogger(__name__)

# Nearer than this, math-verify decides: it compares floats to 6 places.
NEAR = Fraction(1, 10**4)
# An answer that is longer than this, and 20 times as long as the gold answer, is not it.
LONG_CHARACTERS = 10_000
# Shares above which a verdict raises an alarm: what a sound set of answers stays below.
ALARMS = {"timeout": 0.01, "error": 0.01, "no_answer": 0.2}


class Verdict(StrEnum):
    """Only `wrong` counts as 0; the others but `correct` say that nothing was learnt, and are counted apart.

    `bad_gold`: the gold answer is empty, is no formula, or names no option. `timeout` and `error` (out of memory or
    stack, or a fault of math-verify's) may be the gold answer's doing as well as the completion's. Where the answer is
    missing, or is the gold answer letter by letter, the gold answer is not parsed.
    """

    CORRECT = "correct"
    WRONG = "wrong"
    NO_ANSWER = "no_answer"
    BAD_GOLD = "bad_gold"
    TIMEOUT = "timeout"
    ERROR = "error"


@dataclass(frozen=True)
class Claim:
    """A completion, the gold answer in machine form ("3250", "12.5", or LaTeX), and the language of the completion.

    A completion that was cut off at the token limit (`truncated`) has an answer only if it is boxed. `options` are the
    values of a multiple-choice question, A first, without their letters: then the gold answer is a letter, and an
    answer may be the letter or the value of one option.
    """

    completion: str
    gold: str
    language: str = "en"
    truncated: bool = False
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Question:
    """What only math-verify can tell: is `answer` equal to `gold`, and to none of `others`?"""

    gold: str
    answer: str
    others: tuple[str, ...] = ()


def settle(claim: Claim) -> Verdict | Question:
    """The verdict where it takes no algebra, in time linear in the completion; else the question that is left."""
    gold = plain(claim.gold)
    if not gold:
        return Verdict.BAD_GOLD
    answer = extract_answer(claim.completion, truncated=claim.truncated)
    if claim.options:
        return _settle_choice(gold, answer, claim)
    if answer is None:
        return Verdict.NO_ANSWER
    return _settle_value(gold, plain(answer), claim.language)


def _settle_choice(gold: str, answer: str | None, claim: Claim) -> Verdict | Question:
    right = choice(gold, claim.options)
    if right is None:
        return Verdict.BAD_GOLD
    if answer is None:
        return Verdict.NO_ANSWER
    chosen = choice(answer, claim.options, claim.language)
    if chosen is not None:
        return Verdict.CORRECT if chosen == right else Verdict.WRONG
    options = letters_of(claim.options)
    value = options.pop(right)
    number = to_number(answer, claim.language)
    text = plain(answer) if number is None else machine_form(number)
    return _question(value, text, tuple(options.values()))


def _settle_value(gold: str, answer: str, language: str) -> Verdict | Question:
    if answer == gold:
        return Verdict.CORRECT
    gold_number, number = to_number(gold), to_number(answer, language)
    if number is None:
        return _question(gold, answer)
    if gold_number is None:
        return _question(gold, machine_form(number))
    readings = [(gold_number, number)]
    match is_percent(gold), is_percent(answer):  # 25% is 0.25 as well as 25
        case True, False:
            readings.append((gold_number / 100, number))
        case False, True:
            readings.append((gold_number, number / 100))
    if any(a == b for a, b in readings):
        return Verdict.CORRECT
    for a, b in readings:
        if abs(a - b) <= NEAR:
            return Question(machine_form(a), machine_form(b))
    return Verdict.WRONG


def _question(gold: str, answer: str, others: tuple[str, ...] = ()) -> Verdict | Question:
    gold, answer = as_latex(gold), as_latex(answer)
    if not _balanced(gold):
        return Verdict.BAD_GOLD
    # A brace that closes more than was opened would end the box that math-verify reads, and begin another.
    if not _balanced(answer) or len(answer) > max(LONG_CHARACTERS, 20 * len(gold)):
        return Verdict.WRONG
    return Question(gold, answer, tuple(as_latex(other) for other in others if _balanced(other)))


def _balanced(text: str) -> bool:
    depth = 0
    escaped = False
    for character in text:
        if character in "{}" and not escaped:
            depth += 1 if character == "{" else -1
        if depth < 0:
            return False
        escaped = character == "\\" and not escaped
    return depth == 0


class Verifier(Closing):
    """Verdicts, from any thread or event loop. Use as a context manager, or `close()` it: it may own processes."""

    def __init__(self, workers: int | None = None, seconds: float = 5.0, memory_bytes: int = 1 << 30) -> None:
        """
        Args:
            workers: how many processes run math-verify at once, started when they are needed; default: the cores that
                this process may use, shared among the ranks of the machine.
            seconds: CPU time that math-verify may spend on one claim. It is not wall time, so that a busy machine
                does not change verdicts; a worker that is not heard of for ten times as long and half a minute is
                ended too.
            memory_bytes: what one worker may allocate beyond what it has after its start.
        """
        self._pool = Pool(workers or default_workers(), seconds, memory_bytes)

    def verify(self, claim: Claim) -> Verdict:
        return self.verify_many([claim])[0]

    def verify_many(self, claims: Sequence[Claim]) -> list[Verdict]:
        """A verdict for each claim, in order; equal claims are judged once."""
        settled = {claim: settle(claim) for claim in dict.fromkeys(claims)}
        questions = [found for found in dict.fromkeys(settled.values()) if isinstance(found, Question)]
        words = self._pool.run([(q.gold, q.answer, q.others) for q in questions])
        answers = {question: Verdict(word) for question, word in zip(questions, words, strict=True)}
        verdicts = {c: answers[found] if isinstance(found, Question) else found for c, found in settled.items()}
        return [verdicts[claim] for claim in claims]

    def close(self) -> None:
        self._pool.close()


def default_workers() -> int:
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, cores.count() // ranks)


def verdict_metrics(counts: Mapping[str, int], limits: Mapping[str, float] = ALARMS) -> dict[str, float | int]:
    """`verdict.NAME`, the count, and `share.NAME` of each verdict, and the alarms."""
    total = max(1, sum(counts.values()))
    return (
        {f"verdict.{verdict}": counts.get(verdict, 0) for verdict in Verdict}
        | {f"share.{verdict}": counts.get(verdict, 0) / total for verdict in Verdict}
        | alarms(counts, limits)
    )


def alarms(counts: Mapping[str, int], limits: Mapping[str, float] = ALARMS) -> dict[str, float | int]:
    """`alarm.NAME`: 1 where the share of the verdict NAME exceeds its limit, else 0."""
    total = sum(counts.values())
    return {f"alarm.{name}": int(counts.get(name, 0) > limit * total) for name, limit in limits.items()}


def warn_of_alarms(where: str, counts: Mapping[str, int], limits: Mapping[str, float] = ALARMS) -> None:
    """Log a warning for each alarm: the rewards of such a set say little about the answers in it."""
    raised = alarms(counts, limits)
    for name, limit in limits.items():
        if raised[f"alarm.{name}"]:
            share = counts[name] / sum(counts.values())
            log.warning("%s: %.1f%% of the verdicts are %r, more than %.1f%%", where, 100 * share, name, 100 * limit)
