"""Answers that think first: arithmetic by its template, other verifiable answers by a teacher.

A teacher's text is taken where it is one block of thinking and a summary whose answer is right; else the row stays as
it is, without thinking.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from alignment.chat import THINKING_PROMPT
from alignment.fingerprint import text_hash
from alignment.languages import Detector
from alignment.thinking import Fault, Thought
from alignment.verify import Claim, Verdict, Verifier
from data_builders.ecommerce.config import ChainOfThoughtConfig
from data_builders.ecommerce.drafts import Draft
from data_builders.ecommerce.quality import is_foreign
from data_builders.thinking import check
from data_builders.writers import Messages, Written, write

TEACHER = "teacher"


def think(
    drafts: Sequence[Draft], config: ChainOfThoughtConfig, folder: Path, seed: int, detector: Detector
) -> tuple[list[Draft], Counter[str]]:
    """The drafts, some with thinking; and how many have it from where, or have not, and why (`kept: REASON`)."""
    chosen = {draft.id for draft in drafts if draft.answer is not None and _falls(draft, config.share, seed)}
    taught = [draft for draft in drafts if draft.id in chosen and draft.reasoning is None]
    counts: Counter[str] = Counter(asked=len(chosen))
    if config.teacher is None:
        found: dict[str, Thought | str] = {draft.id: "no teacher" for draft in taught}
    else:
        questions = {draft.id: question(draft) for draft in taught}
        written = write(config.teacher, questions, folder, seed, "teacher", counts)
        with Verifier() as verifier:
            found = dict(_judged(taught, written, verifier, detector))
    return list(_thinking(drafts, chosen, found, counts)), counts


def question(draft: Draft) -> Messages:
    return [{"role": "system", "content": THINKING_PROMPT}, {"role": "user", "content": draft.question}]


def _falls(draft: Draft, share: float, seed: int) -> bool:
    return int(text_hash(f"{seed}/think/{draft.id}")[:16], 16) < share * 2**64


def _judged(
    drafts: Sequence[Draft], written: dict[str, Written], verifier: Verifier, detector: Detector
) -> Iterator[tuple[str, Thought | str]]:
    """Of each draft the teacher's two parts, or what is wrong with them."""
    thoughts = {draft.id: _parts(written[draft.id]) for draft in drafts}
    whole = {draft.id: thought for draft in drafts if isinstance(thought := thoughts[draft.id], Thought)}
    claims = [
        Claim(whole[draft.id].summary, draft.answer or "", draft.language, options=draft.options)
        for draft in drafts
        if draft.id in whole
    ]
    verdicts = dict(zip(whole, verifier.verify_many(claims), strict=True))
    for draft in drafts:
        thought = thoughts[draft.id]
        if isinstance(thought, str):
            yield draft.id, thought
        elif verdicts[draft.id] is not Verdict.CORRECT:
            yield draft.id, f"answer {verdicts[draft.id]}"
        elif is_foreign(thought.summary, draft.language, [draft.block], detector):
            yield draft.id, "another language"
        else:
            yield draft.id, thought


def _parts(written: Written) -> Thought | str:
    if written.fault is not None:
        return written.fault
    match check(written.text):
        case Fault(reason=reason):
            return reason
        case thought:
            return thought


def _thinking(
    drafts: Sequence[Draft], chosen: set[str], found: dict[str, Thought | str], counts: Counter[str]
) -> Iterator[Draft]:
    for draft in drafts:
        if draft.id not in chosen:
            yield draft
            continue
        match found.get(draft.id):
            case None:
                counts["by template"] += 1
                yield replace(draft, think=draft.reasoning)
            case Thought(thinking=thinking, summary=summary):
                counts["by teacher"] += 1
                yield replace(draft, think=thinking, reply=summary, author=TEACHER)
            case str(reason):
                counts[f"kept: {reason}"] += 1
                yield draft
