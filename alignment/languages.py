"""Which language a text is in, as a whole and sentence by sentence.

    detector(["en", "ms", "th"]).identify("Harga kasut ini naik lagi.")  # Identified("ms", 0.87)

The statistics are lingua's (https://github.com/pemistahl/lingua-rs: n-grams of 1 to 5 letters, of 3 in texts of 120
letters and more). What is ours: code, formulas, links and markup are taken out first; a sentence in two scripts is
taken apart; doubt, and a script that no language in question writes, are said.
"""

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import regex
from lingua import IsoCode639_1, LanguageDetector, LanguageDetectorBuilder

from alignment.errors import UserError, did_you_mean

CODES = frozenset(name.lower() for name in dir(IsoCode639_1) if name.isupper())  # ISO 639-1, those that lingua knows
OTHER = "other"  # in place of a code: none of the languages in question writes with these letters
CONFIDENCE = 0.5  # below it a language is a guess; see docs/multilingual.md
LATIN_LETTERS = 10  # a shorter text in Latin letters is as likely a name

# What says nothing of a language. A dollar sign opens a formula as in Pandoc, so that prices stay.
NOISE = regex.compile(
    r"```.*?(?:```|\Z)|~~~.*?(?:~~~|\Z)|`[^`\n]+`"  # code
    r"|\$\$.+?\$\$|\\\[.+?\\\]|\\\(.+?\\\)|(?<![\\$])\$(?=\S)[^$\n]*(?<=\S)\$(?!\d)"  # formulas
    r"|\\[a-zA-Z]+(?:\{[^{}\n]*\})?"  # commands of LaTeX
    r"|\b(?:https?://|www\.)\S+|\S+@\S+\.\S+|(?<!\w)@\w+"  # links, addresses, names of accounts
    r"|</?[a-zA-Z|][^<>\n]*>|&#?\w+;|(?<=\])\([^()\s]*\)",  # markup
    regex.DOTALL,
)
# After a sentence's marks, between lines, and at the spaces of Thai, Lao, Khmer and Burmese, which have no such marks.
UNMARKED = r"[\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]"
BREAK = regex.compile(
    rf"(?<=[.!?…]['\"”’»)\]]*)\s+|(?<=[。！？｡][”’」』）]*)(?![。！？｡”’」』）])|\s*\n\s*"
    rf"|(?<={UNMARKED}\p{{M}}*)\s+(?={UNMARKED})"
)
# A part of a sentence in one script. Up to three words in Latin letters behind another script are names and terms.
EAST_ASIAN = r"\p{Han}\p{Hiragana}\p{Katakana}"
ELSEWHERE = rf"[\p{{L}}--\p{{Latin}}--[{EAST_ASIAN}]]"
NAMES = r"(?:\p{Latin}[\p{Latin}\p{M}'’-]*[^\p{L}]*){1,3}+(?!\p{Latin})"
RUN = regex.compile(
    rf"[{EAST_ASIAN}](?:[{EAST_ASIAN}\P{{L}}]+|{NAMES})*"
    rf"|{ELSEWHERE}(?:[{ELSEWHERE}\P{{L}}]+|{NAMES})*"
    r"|(?P<latin>\p{Latin}[\p{Latin}\P{L}]*)",
    regex.V1,
)
LETTER, LATIN = regex.compile(r"\p{L}"), regex.compile(r"\p{Latin}+")


@dataclass(frozen=True)
class Identified:
    """A language, OTHER, or None where it is in doubt; and how likely the likeliest is, 0 to 1."""

    language: str | None
    confidence: float


@dataclass(frozen=True)
class Sentence:
    """A sentence, or the part of one that is in another script, and its language as in Identified."""

    text: str
    language: str | None
    confidence: float

    @property
    def letters(self) -> int:
        return letters(self.text)


class Detector:
    """Tells the languages in question from each other.

    A text in a language that is not in question gets the likeliest that is: put into question what may occur.
    """

    def __init__(self, lingua: LanguageDetector) -> None:
        self._lingua = lingua

    def identify(self, text: str) -> Identified:
        """The language of most of the text: of what is in Latin letters, or of what is not, whichever is more."""
        runs = list(_runs(text))
        latin = "".join(run for run, is_latin in runs if is_latin)
        rest = "".join(run for run, is_latin in runs if not is_latin)
        return self._of_latin(latin) if letters(latin) > letters(rest) else self._of_rest(rest)

    def sentences(self, text: str) -> list[Sentence]:
        """Each sentence that has a letter; of one in two scripts, each part."""
        found = [(run, self._of_latin(run) if is_latin else self._of_rest(run)) for run, is_latin in _runs(text)]
        return [Sentence(run.strip(), each.language, each.confidence) for run, each in found]

    def _of_latin(self, text: str) -> Identified:
        found = self._likeliest(text)
        return found if letters(text) >= LATIN_LETTERS else Identified(None, found.confidence)

    def _of_rest(self, text: str) -> Identified:
        return self._likeliest(LATIN.sub(" ", text))

    def _likeliest(self, text: str) -> Identified:
        if not letters(text):
            return Identified(None, 0.0)
        best = self._lingua.compute_language_confidence_values(text)[0]
        if best.value == 0:
            return Identified(OTHER, 1.0)
        return Identified(best.language.iso_code_639_1.name.lower() if best.value >= CONFIDENCE else None, best.value)


def detector(languages: Sequence[str]) -> Detector:
    """A detector of these languages, ISO 639-1 codes; made once in a process, about 12 MB for each language in use.

    Raises:
        UserError: fewer than two languages, one named twice, or a code that is none.
    """
    for code in languages:
        if code not in CODES:
            raise UserError(
                f"languages: {code!r} is no ISO 639-1 code that can be identified{did_you_mean(code.lower(), CODES)}"
            )
    if len(set(languages)) < max(2, len(languages)):
        raise UserError(f"languages: expected two different languages or more, found {', '.join(languages) or 'none'}")
    return _detector(frozenset(languages))


@lru_cache
def _detector(languages: frozenset[str]) -> Detector:
    codes = [IsoCode639_1.from_str(code) for code in sorted(languages)]
    return Detector(LanguageDetectorBuilder.from_iso_codes_639_1(*codes).build())


def without_noise(text: str) -> str:
    """The text with a space in place of code, formulas, links and markup."""
    return NOISE.sub(" ", unicodedata.normalize("NFC", text))


def letters(text: str) -> int:
    return len(LETTER.findall(text))


def _runs(text: str) -> Iterator[tuple[str, bool]]:
    """The sentences, those in several scripts run by run; beside each, whether it is in Latin letters."""
    for sentence in BREAK.split(without_noise(text)):
        for match in RUN.finditer(sentence):
            yield match[0], match["latin"] is not None
