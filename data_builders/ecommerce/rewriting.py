"""Instructions in other words: a model rewrites the question, never the data below it or the reply.

What is asked has to stay the same: a rewriting keeps the names and numbers of the question letter by letter and brings
no number of its own, is in the question's language, and is neither empty nor a refusal. Else the original stays.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from alignment.fingerprint import text_hash
from alignment.languages import Detector
from data_builders.ecommerce.config import RewriteConfig
from data_builders.ecommerce.drafts import Draft
from data_builders.ecommerce.quality import is_foreign, is_refusal, numbers, slot_left
from data_builders.writers import Messages, Written, write

NAMES = {
    "en": "English",
    "zh": "Chinese",
    "id": "Indonesian",
    "ms": "Malay",
    "th": "Thai",
    "vi": "Vietnamese",
    "tl": "Tagalog",
    "pt": "Portuguese",
}
PROMPT = """\
Rewrite the instruction below {manner}. Write in {language}, as a native speaker would. Keep its meaning, and keep \
every number, brand and product name letter by letter. Do not answer it. Give the rewritten instruction alone.

{ask}"""
LONGEST = 4  # times the letters of the original, and a line more
LINE = 80


def rewrite(
    drafts: Sequence[Draft], config: RewriteConfig, folder: Path, seed: int, detector: Detector
) -> tuple[list[Draft], Counter[str]]:
    """The drafts, some in other words; and how many were, were not, and why not (`kept: REASON`)."""
    styles = {draft.id: style_of(draft, config, seed) for draft in drafts}
    questions = {
        draft.id: question(draft, config.styles[style]) for draft in drafts if (style := styles[draft.id]) is not None
    }
    counts: Counter[str] = Counter(asked=len(questions))
    found = write(config.writer, questions, folder, seed, "rewrite", counts)
    return list(_rewritten(drafts, styles, found, detector, counts)), counts


def style_of(draft: Draft, config: RewriteConfig, seed: int) -> str | None:
    """The style that a draft is to have; None: it stays as it is."""
    drawn = int(text_hash(f"{seed}/rewrite/{draft.id}")[:16], 16)
    if drawn >= config.share * 2**64:
        return None
    names = sorted(config.styles)
    return names[int(text_hash(f"{seed}/style/{draft.id}")[:8], 16) % len(names)]


def question(draft: Draft, manner: str) -> Messages:
    text = PROMPT.format(manner=manner, language=NAMES[draft.language], ask=draft.ask)
    return [{"role": "user", "content": text}]


def spoilt(draft: Draft, text: str, detector: Detector) -> str | None:
    """Why `text` does not ask what the draft asks; None: it may."""
    missing = [name for name in draft.kept if name not in text]
    if missing:
        return "a name or number is missing"
    if Counter(numbers(text)) != Counter(numbers(draft.ask)):
        return "other numbers"
    if slot_left(text):
        return "slot left"
    if is_refusal(text):
        return "refusal"
    if len(text) > LONGEST * len(draft.ask) + LINE:
        return "too long"
    return "another language" if is_foreign(text, draft.language, draft.kept, detector) else None


def _rewritten(
    drafts: Sequence[Draft],
    styles: dict[str, str | None],
    found: dict[str, Written],
    detector: Detector,
    counts: Counter[str],
) -> Iterator[Draft]:
    for draft in drafts:
        written = found.get(draft.id)
        if written is None:
            yield draft
            continue
        spoken = written.spoken
        reason = spoken.fault or spoilt(draft, spoken.text, detector)
        counts["rewritten" if reason is None else f"kept: {reason}"] += 1
        yield replace(draft, ask=spoken.text, style=styles[draft.id]) if reason is None else draft
