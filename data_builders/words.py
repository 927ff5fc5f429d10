"""Text as words, so that two texts can be compared whatever their spacing, case and punctuation.

All fold compatibility forms (NFKC) and case, and write `1,000` as `1000`.
"""

import unicodedata

import regex

# Written without spaces: each character is a word. Chinese, Japanese, Thai, Lao, Khmer, Burmese.
UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
WORD = regex.compile(rf"[{UNSPACED}]\p{{M}}*|\p{{N}}+(?:[.,]\p{{N}}+)*|[[\p{{L}}\p{{M}}]--[{UNSPACED}]]+", regex.V1)
NUMBER = regex.compile(r"\p{N}+(?:[.,]\p{N}+)*")
THOUSANDS = regex.compile(r"(?<=\p{N}),(?=\p{N}{3}(?!\p{N}))")
# Quotes, and what parts sentences; operators and brackets stay, since 5 + 3 is not 5 - 3, nor 5! what 5 is.
PUNCTUATION = regex.compile(r"[\"'“”‘’«»、。…]|[.,;:?]+(?!\p{N})|(?<=\p{L}{2})!+")
TOKEN = regex.compile(rf"{WORD.pattern}|\S", regex.V1)


def words(text: str) -> list[str]:
    """Runs of letters, numbers, and single characters of scripts without spaces; all else parts words."""
    return WORD.findall(_folded(text))


def tokens(text: str) -> list[str]:
    """Words, and each sign that `normalised` leaves."""
    return TOKEN.findall(normalised(text))


def normalised(text: str) -> str:
    """The text without quotes and the marks that part sentences, with single spaces.

    What is nothing but punctuation stays as it is.
    """
    folded = _folded(text)
    return " ".join(PUNCTUATION.sub(" ", folded).split()) or folded.strip()


def renumbered(whole: str) -> str:
    """A normalised text with 0 for every number."""
    return NUMBER.sub("0", whole)


def is_number(word: str) -> bool:
    """Whether a word of `words` is a number."""
    return word[0].isnumeric()


def _folded(text: str) -> str:
    return THOUSANDS.sub("", unicodedata.normalize("NFKC", text).casefold())
