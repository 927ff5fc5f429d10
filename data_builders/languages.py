"""Rows that keep to one language: those whose sentences stray into others go.

    python -m data_builders.languages --config configs/data/languages.yaml

A sentence strays where it is, by alignment.languages, in any language but the row's with a probability of `confidence`
at least; a row goes where more than `stray` of its letters do. The row's language is `language`, or its own column of
that name, or what most of its text is in. Writes rows.jsonl (the rows that stay; those without a `language` get it and
`language_confidence`), rejects.jsonl (the others, each with `stray`: the share and the longest sentence that strays),
languages.json (rows by the language given and the one identified) and ledger.json. It is deterministic, so a killed run
starts over.
"""

import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from alignment import atomic, job
from alignment.errors import UserError
from alignment.languages import Identified, Sentence, detector
from alignment.ledger import Ledger
from alignment.processes import Processes
from alignment.progress import track
from alignment.rows import Row, count_rows, local_inputs, located_rows, writing_rows
from data_builders.config import LanguagesConfig
from data_builders.texts import check_texts, row_text

CHUNK_ROWS = 500
NOT_GIVEN, IN_DOUBT = "not given", "in doubt"  # in languages.json


@dataclass(frozen=True)
class Candidate:
    """A row to be kept or not."""

    row: Row
    text: str
    given: str | None  # its language, if that is known


@dataclass(frozen=True)
class Rule:
    """What strays; see LanguagesConfig."""

    languages: tuple[str, ...]
    stray: float
    confidence: float


@dataclass(frozen=True)
class Stray:
    """Why a row goes."""

    expected: str
    share: float  # of its letters
    sentence: str
    language: str | None  # of the sentence; None: in doubt between several others
    confidence: float  # that it is not in `expected`


@dataclass(frozen=True)
class Checked:
    """What a text is in."""

    whole: Identified
    expected: str | None  # None: it cannot be checked
    stray: Stray | None


def run(config: LanguagesConfig) -> None:
    with job.Job.open("data_builders.languages", config, local_inputs(config.rows)) as this:
        if this.done:
            return
        ledger, table = Ledger(), defaultdict[str, Counter[str]](Counter)
        unchecked, kept = 0, Counter[str]()
        with writing_rows(this.dir / "rows.jsonl") as keep, writing_rows(this.dir / "rejects.jsonl") as reject:
            for candidate, checked in check_rows(config):
                ledger.rows_in += 1
                table[candidate.given or NOT_GIVEN][checked.whole.language or IN_DOUBT] += 1
                if checked.stray is not None:
                    ledger.drop("stray")
                    reject(candidate.row | {"stray": vars(checked.stray)})
                    continue
                ledger.rows_out += 1
                unchecked += checked.expected is None
                kept[candidate.given or checked.whole.language or IN_DOUBT] += 1
                keep(labelled(candidate, checked) if config.label else candidate.row)
        atomic.write_json(this.dir / "languages.json", {given: dict(table[given]) for given in sorted(table)})
        ledger.write(this.dir / "ledger.json")
        this.finish(
            {
                "rows.in": ledger.rows_in,
                "rows.out": ledger.rows_out,
                **ledger.dropped_metrics(),
                "rows.unchecked": unchecked,
                **{f"language.{name.replace(' ', '_')}": kept[name] for name in sorted(kept)},
            }
        )


def check_rows(config: LanguagesConfig) -> Iterator[tuple[Candidate, Checked]]:
    """The rows in order, with what they are in; several processes identify."""
    rows = track(located_rows(config.rows), count_rows(config.rows), "languages")
    candidates = (
        Candidate(row, row_text(row, where, config.column, config.turns), given_language(row, where, config))
        for where, row in rows
    )
    rule = Rule(tuple(config.languages), config.stray, config.confidence)
    with Processes(config.workers or os.cpu_count() or 1, check_texts_of, rule) as processes:
        yield from processes.map_each(candidates, lambda candidate: (candidate.text, candidate.given), CHUNK_ROWS)


def given_language(row: Row, where: str, config: LanguagesConfig) -> str | None:
    """
    Raises:
        UserError: the row's `language` is no text.
    """
    given = config.language or row.get("language") or None
    if given is not None and not isinstance(given, str):
        raise UserError(f"{where}: 'language' must be a code as 'en', found {given!r:.60}")
    return given


def check_texts_of(rule: Rule, texts: Sequence[tuple[str, str | None]]) -> list[Checked]:
    """Each text with the language that it should be in, where that is known."""
    return [check(text, given, rule) for text, given in texts]


def check(text: str, given: str | None, rule: Rule) -> Checked:
    """Whether a text keeps to a language; it cannot be told of one that is in doubt or not among the rule's."""
    identify = detector(rule.languages)
    whole = identify.identify(text)
    expected = given or whole.language
    if expected not in rule.languages:
        return Checked(whole, None, None)
    return Checked(whole, expected, find_stray(identify.sentences(text), expected, rule))


def find_stray(sentences: Sequence[Sentence], expected: str, rule: Rule) -> Stray | None:
    """The longest sentence that strays, where all that do hold more than the rule's share of the letters."""
    straying = [sentence for sentence in sentences if sentence.against(expected) >= rule.confidence]
    if not straying:
        return None
    share = sum(sentence.letters for sentence in straying) / sum(sentence.letters for sentence in sentences)
    if share <= rule.stray:
        return None
    longest = max(straying, key=lambda sentence: sentence.letters)
    return Stray(expected, round(share, 4), longest.text, longest.language, round(longest.against(expected), 4))


def labelled(candidate: Candidate, checked: Checked) -> Row:
    """The row with the language that was identified, if it had none."""
    if candidate.given is not None or checked.expected is None:
        return candidate.row
    label = {"language": checked.expected, "language_confidence": round(checked.whole.confidence, 4)}
    return candidate.row | label


def plan(config: LanguagesConfig) -> list[str]:
    detector(config.languages)
    check_texts(config.rows, config.column, config.turns)
    language = config.language or "one language each"
    return [f"{config.rows} without the rows of which more than {config.stray:.0%} is not in {language}"]


def main(argv: Sequence[str] | None = None) -> int:
    return job.main(LanguagesConfig, run, plan, argv)


if __name__ == "__main__":
    raise SystemExit(main())
