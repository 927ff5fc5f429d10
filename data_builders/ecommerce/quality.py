"""What a row has to be before it is trained on."""

import re
from collections.abc import Iterable, Iterator, Sequence

from alignment.languages import Detector
from alignment.verify import Claim, Verdict, Verifier
from data_builders.ecommerce.drafts import Draft
from data_builders.thinking import loops
from data_builders.words import NUMBER, normalised, tokens

ALIKE = {"id", "ms"}  # a sentence or two of shopping may be both: not told apart
SLOT = re.compile(r"\{[a-z_]+\}")
LISTING_MARK = re.compile(r"^\s*\d+[.)]\s", re.MULTILINE)  # 1. and 2. before the points of a list
# How models begin when they will not: in any of the eight languages.
REFUSALS = re.compile(
    r"\bas an ai\b|\bi(?:'|’)?m sorry\b|\bi am sorry\b|\bi can(?:no|')t (?:help|assist|provide|do)\b|\bi cannot\b|"
    r"作为(?:一个|一名)?(?:ai|人工智能)|很抱歉|我无法|我不能|"
    r"\bmaaf,|\bsebagai (?:model|ai)\b|\bsaya tidak (?:dapat|bisa|boleh)\b|"
    r"ขออภัย|ขอโทษ|ในฐานะ(?:ที่เป็น)?\s?ai|"
    r"xin lỗi|tôi không thể|là một (?:mô hình|ai)\b|"
    r"\bpaumanhin\b|\bpasensya\b|\bhindi ko (?:kaya|magagawa)\b|"
    r"\bdesculpe\b|\bcomo uma? (?:ia|modelo)\b|\bnão posso\b",
    re.IGNORECASE,
)


def reject(draft: Draft, longest: int, detector: Detector) -> str | None:
    """Why a draft is no good; None: it is. Answers in machine form are verified apart, by `verdicts`."""
    reply = draft.reply or ""
    if not reply.strip():
        return "empty reply"
    if any(len(tokens(text)) > longest for text in (draft.question, reply, draft.think or "")):
        return "too long"
    # What the tables say may hold anything; the words around it are ours, or a model's.
    if slot_left(draft.ask) or (draft.author != "table" and slot_left(reply)):
        return "slot left"
    if draft.author == "table":
        return None
    if is_refusal(reply):
        return "refusal"
    if loops(reply):
        return "loop"
    if set(numbers(LISTING_MARK.sub("", reply))) - set(numbers(draft.question)):
        return "numbers of its own"
    return "another language" if is_foreign(reply, draft.language, [draft.block], detector) else None


def verdicts(drafts: Sequence[Draft], verifier: Verifier) -> Iterator[Verdict | None]:
    """Of each draft whether its reply states its answer; None where it has none to state."""
    claims = {
        draft.id: Claim(draft.reply or "", draft.answer, draft.language, options=draft.options)
        for draft in drafts
        if draft.answer is not None
    }
    found = dict(zip(claims, verifier.verify_many(list(claims.values())), strict=True))
    return (found.get(draft.id) for draft in drafts)


def is_foreign(text: str, language: str, names: Iterable[str], detector: Detector) -> bool:
    """Whether the text is in another language; lines and names of the data do not count, and doubt is none."""
    for name in names:
        for line in name.splitlines():
            text = text.replace(line.partition(": ")[2] or line, " ")
    found = detector.identify(text).language
    return found is not None and found != language and {found, language} != ALIKE


def is_refusal(text: str) -> bool:
    return REFUSALS.search(text) is not None


def slot_left(text: str) -> bool:
    return SLOT.search(text) is not None


def numbers(text: str) -> list[str]:
    """The numbers of a text, without their separators of thousands."""
    return NUMBER.findall(normalised(text))
