"""Known edits of a question: what a decontamination has to see through, and what it must not take for a copy.

Each edit is a function of the text and a random generator, so a case can be made again.
"""

import random
import re
from collections import Counter
from collections.abc import Callable, Sequence

Edit = Callable[[str, random.Random], str]

NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
SENTENCE = re.compile(r"(?<=[.!?])\s+")
NAME = re.compile(r"\b(?<![.!?] )(?!^)[A-Z][a-z]{2,}\b")

FRAMES = (
    ("", " Think step by step and put the final answer in a box."),
    ("Solve the following problem. ", ""),
    ("Question: ", "\nAnswer:"),
    ("You are a helpful tutor. Explain to a pupil how to solve this.\n\n", ""),
)
NEW_NAMES = ("Farah", "Minh", "Siti", "Oscar", "Ines", "Kenji", "Amara", "Tomas", "Lucia", "Bao")
SYNONYMS = {
    "how many": "what number of",
    "how much": "what amount of",
    "find": "determine",
    "compute": "calculate",
    "what is": "give",
    "what are": "state",
    "buys": "purchases",
    "bought": "purchased",
    "buy": "purchase",
    "each": "every",
    "has": "owns",
    "had": "owned",
    "makes": "produces",
    "gets": "receives",
    "got": "received",
    "gives": "hands",
    "gave": "handed",
    "costs": "is priced at",
    "cost": "price",
    "needs": "requires",
    "need": "require",
    "wants": "would like",
    "total": "overall sum",
    "in all": "altogether",
    "altogether": "in total",
    "twice": "two times",
    "half": "one half",
    "friends": "pals",
    "kids": "children",
    "children": "kids",
    "money": "cash",
    "day": "workday",
    "left": "remaining",
    "more than": "over",
    "less than": "under",
    "positive": "strictly positive",
    "integers": "whole numbers",
    "integer": "whole number",
    "smallest": "least",
    "largest": "greatest",
    "such that": "so that",
    "suppose": "assume",
    "let": "say",
    "real numbers": "reals",
}
SYNONYM = re.compile(r"\b(" + "|".join(sorted(map(re.escape, SYNONYMS), key=len, reverse=True)) + r")\b", re.IGNORECASE)
ASIDES = (
    "This happened last year.",
    "Everybody was pleased with it.",
    "Ignore taxes and other fees.",
    "Give the result as a single value.",
)


# Copies


def verbatim(text: str, _: random.Random) -> str:
    return text


def respaced(text: str, _: random.Random) -> str:
    """Other spacing, case and final punctuation."""
    return "  " + re.sub(r"\s+", " \n", text.upper()).rstrip(".?! ") + " "


def framed(text: str, draw: random.Random) -> str:
    """Inside an instruction."""
    before, after = draw.choice(FRAMES)
    return before + text + after


# The same question with other numbers


def renumbered(text: str, draw: random.Random) -> str:
    """Every number is another one of as many digits."""
    return NUMBER.sub(lambda found: _another(found.group(), draw), text)


def _another(number: str, draw: random.Random) -> str:
    drawn = "".join(draw.choice("123456789") if sign.isdigit() else sign for sign in number)
    return drawn if drawn != number else _another(number, draw)


# Rewordings


def renamed(text: str, draw: random.Random) -> str:
    """Other names of persons and places: each word that is capitalised inside a sentence."""
    names = dict.fromkeys(NAME.findall(text))
    drawn = dict(zip(names, draw.sample(NEW_NAMES, len(NEW_NAMES)), strict=False))
    return re.sub(r"[A-Z][a-z]{2,}", lambda found: drawn.get(found.group(), found.group()), text)


def synonyms(text: str, _: random.Random) -> str:
    return SYNONYM.sub(lambda found: SYNONYMS[found.group().lower()], text)


def question_first(text: str, _: random.Random) -> str:
    """The last sentence stands first."""
    sentences = SENTENCE.split(text.strip())
    return " ".join([sentences[-1], *sentences[:-1]])


def with_aside(text: str, draw: random.Random) -> str:
    """A sentence more, somewhere."""
    sentences = SENTENCE.split(text.strip())
    sentences.insert(draw.randrange(len(sentences)), draw.choice(ASIDES))
    return " ".join(sentences)


REWORDINGS: tuple[Edit, ...] = (renamed, synonyms, question_first, with_aside, framed)


def reworded(text: str, draw: random.Random) -> str:
    """Three of the rewordings."""
    for edit in draw.sample(REWORDINGS, 3):
        text = edit(text, draw)
    return text


# Free paraphrases: few runs of three words are left


FILLERS = {
    "the": "that", "a": "one", "and": "as well as", "of": "out of", "to": "in order to", "for": "in return for",
    "in": "within", "with": "along with", "is": "happens to be", "are": "happen to be", "if": "provided that",
    "at": "over at", "on": "upon", "then": "after that", "per": "for each", "his": "his own", "her": "her own",
    "they": "these people", "when": "as soon as", "but": "although", "that": "which", "by": "by way of",
}  # fmt: skip
FILLER = re.compile(r"\b(" + "|".join(FILLERS) + r")\b")


def paraphrased(text: str, draw: random.Random) -> str:
    """Other words for the small ones and for many of the others, the question first."""
    return question_first(FILLER.sub(lambda found: FILLERS[found.group()], synonyms(text, draw)), draw)


# Unrelated, with what the questions of a benchmark have in common


def boilerplate(texts: Sequence[str]) -> list[str]:
    """Sentences that three or more of the texts hold, numbers aside."""
    sentences = [sentence for text in texts for sentence in dict.fromkeys(SENTENCE.split(text.strip()))]
    counts = Counter(NUMBER.sub("0", sentence) for sentence in sentences)
    return [sentence for sentence in sentences if counts[NUMBER.sub("0", sentence)] >= 3]


def sharing_boilerplate(text: str, shared: Sequence[str], draw: random.Random) -> str:
    """`text` in a frame, with a sentence of `shared` behind it."""
    return framed(f"{text} {draw.choice(shared)}", draw)
