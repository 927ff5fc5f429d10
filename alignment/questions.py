"""Questions with known answers, as gsm8k, aqua and MATH hold them: rows of a file, a folder or the hub to prompts.

gsm8k (Cobbe et al. 2021, arXiv 2110.14168): `question`, and `answer`, a worked answer whose last line is `#### N`.
aqua (Ling et al. 2017, arXiv 1705.04146): `question`, `options` such as `A)21`, `rationale`, and `correct`, a letter.
math (Hendrycks et al. 2021, arXiv 2103.03874; also MATH-500, AIME, AMC): `problem`, `answer`, a text (LaTeX) or a
number, and `solution`, which may be absent.

A question's id is NAME-NUMBER, its row's place in the source counted from 1. It does not depend on what is kept, so
a list of verified ids chooses the same questions whatever else is rejected.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from types import UnionType
from typing import Literal

from pydantic import Field

from alignment.answers import choice, machine_form, to_number
from alignment.config import Config
from alignment.errors import UserError, did_you_mean
from alignment.ledger import Ledger
from alignment.rows import Row, local_inputs, located_rows

CALCULATOR = re.compile(r"<<[^<>]*>>")
FINAL = re.compile(r"\n?[ \t]*####[ \t]*(\S.*?)[ \t]*$")
OPTION = re.compile(r"\s*\(?([A-Z])\s*[).:]\s*(.*?)\s*", re.DOTALL)
COLUMNS = {
    "gsm8k": ("question", "answer"),
    "aqua": ("question", "options", "rationale", "correct"),
    "math": ("problem", "answer"),
}
ASK_FOR_LETTER = r"Put the letter of the right option in \boxed{}."
NOT_VERIFIED = "not verified"
MOST_IDS = 10  # that one message names


class QuestionSet(Config):
    """Where questions come from."""

    dataset: Literal["gsm8k", "aqua", "math"] = Field("gsm8k", description="the format of the rows")
    rows: str = Field(description="a file, a folder or a hub id of rows in that format")
    name: str | None = Field(
        None, pattern=r"^[A-Za-z0-9_-]+$", description="what the ids begin with; default: the format's name"
    )
    language: str = "en"
    verified_ids: Path | None = Field(None, description="ids to keep: one a line, or a JSON list")

    def inputs(self) -> list[Path]:
        """The files of this machine that are read."""
        return local_inputs(self.rows, *filter(None, [self.verified_ids]))


@dataclass(frozen=True)
class Question:
    """`options` are the values of a multiple-choice question, A first, and `answer` is then a letter.

    `working` is empty where a row has none.
    """

    id: str
    language: str
    text: str
    options: tuple[str, ...]
    working: str
    answer: str

    def prompt_row(self) -> Row:
        if self.options:
            return self.head() | {"prompt": [self.message()], "answer": self.answer, "options": list(self.options)}
        is_number = to_number(self.answer, self.language) is not None
        answer = self.answer.replace(",", "") if is_number else self.answer
        return self.head() | {"prompt": [self.message()], "answer": answer}

    def head(self) -> Row:
        return {"id": self.id, "kind": "math", "language": self.language}

    def message(self) -> dict[str, str]:
        """What the user asks; options stand below the question, one a line, and the letter is asked for."""
        if not self.options:
            return {"role": "user", "content": self.text}
        lines = [f"{letter}) {value}" for letter, value in zip(letters(self.options), self.options, strict=True)]
        return {"role": "user", "content": "\n".join([self.text, "", "Options:", *lines, "", ASK_FOR_LETTER])}


@dataclass
class Questions:
    """The questions that were kept; the rows that were not, by id, each with its `reason`; and the account of all."""

    kept: list[Question] = field(default_factory=list)
    rejected: dict[str, Row] = field(default_factory=dict)
    ledger: Ledger = field(default_factory=Ledger)


def letters(options: Sequence[str]) -> list[str]:
    return [chr(ord("A") + i) for i in range(len(options))]


def read_questions(source: QuestionSet) -> Questions:
    """Read and check every row.

    Raises:
        UserError: a row without its columns, or a verified id that no row has.
    """
    found = Questions()
    verified = read_ids(source.verified_ids) if source.verified_ids is not None else None
    for number, (where, row) in enumerate(located_rows(source.rows), start=1):
        check_columns(source.dataset, row, where)
        name = f"{source.name or source.dataset}-{number}"
        found.ledger.rows_in += 1
        question, reason = _read(row, name, source)
        if verified is not None and name not in verified:
            reason = NOT_VERIFIED
        if reason:
            found.ledger.drop(reason)
            found.rejected[name] = {"id": name, **row, "reason": reason}
        else:
            found.ledger.rows_out += 1
            found.kept.append(question)
    if verified is not None:
        _check_known(verified, found, source)
    return found


def read_ids(path: Path) -> dict[str, None]:
    """The ids of a file, in its order: one a line, or a JSON list.

    Raises:
        UserError: no such file, no ids in it, or JSON that is no list of texts.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file of verified ids")
    text = path.read_text(encoding="utf-8")
    ids = _json_ids(text, path) if text.lstrip().startswith(("[", "{")) else [line.strip() for line in text.split("\n")]
    found = dict.fromkeys(filter(None, ids))
    if not found:
        raise UserError(f"{path}: holds no ids, expected one a line, or a JSON list")
    return found


def _json_ids(text: str, path: Path) -> list[str]:
    try:
        ids = json.loads(text)
    except ValueError as error:
        raise UserError(f"{path}: malformed JSON: {error}") from None
    if not isinstance(ids, list) or not all(isinstance(name, str) for name in ids):
        raise UserError(f"{path}: expected a JSON list of ids, each a text")
    return ids


def _check_known(verified: dict[str, None], found: Questions, source: QuestionSet) -> None:
    known = {question.id for question in found.kept} | found.rejected.keys()
    unknown = [name for name in verified if name not in known]
    if unknown:
        more = f" and {len(unknown) - MOST_IDS} more" if len(unknown) > MOST_IDS else ""
        named = ", ".join(map(repr, unknown[:MOST_IDS])) + more
        raise UserError(
            f"{source.verified_ids}: {source.rows} has no question of id {named}{did_you_mean(unknown[0], known)}"
        )


def check_columns(dataset: str, row: Row, where: str) -> None:
    for column in COLUMNS[dataset]:
        kind: type | UnionType = list if column == "options" else str
        words = "a list of texts" if column == "options" else "a text"
        if (dataset, column) == ("math", "answer"):
            kind, words = str | int | float, "a text or a number"
        if not isinstance(row.get(column), kind):
            raise UserError(f"{where}: expected {words} {column!r}{did_you_mean(column, row)}")


def _read(row: Row, name: str, source: QuestionSet) -> tuple[Question, str | None]:
    match source.dataset:
        case "gsm8k":
            return _gsm8k(row, name, source)
        case "aqua":
            return _aqua(row, name, source)
        case "math":
            return _math(row, name, source)


def _gsm8k(row: Row, name: str, source: QuestionSet) -> tuple[Question, str | None]:
    final = FINAL.search(row["answer"])
    answer = final.group(1) if final else ""
    working = CALCULATOR.sub("", FINAL.sub("", row["answer"])).strip()
    question = Question(name, source.language, row["question"].strip(), (), working, answer)
    if not answer:
        return question, "no final answer"
    if to_number(answer, source.language) is None:
        return question, "final answer is no number"
    return question, _empty(question)


def _aqua(row: Row, name: str, source: QuestionSet) -> tuple[Question, str | None]:
    matches = [OPTION.fullmatch(str(option)) for option in row["options"]]
    values = tuple(match[2] if match else "" for match in matches)
    answer = row["correct"].strip()
    question = Question(name, source.language, row["question"].strip(), values, row["rationale"].strip(), answer)
    if len(values) < 2 or [match[1] if match else None for match in matches] != letters(values):
        return question, "malformed options"
    if not all(values):
        return question, "empty option"
    if answer not in letters(values):
        return question, "no option has the correct letter"
    # Each option's value must be read as that option: not as another's, nor as two, nor as another's letter.
    if [choice(value, values, source.language) for value in values] != letters(values):
        return question, "options cannot be told apart"
    return question, _empty(question)


def _math(row: Row, name: str, source: QuestionSet) -> tuple[Question, str | None]:
    answer = row["answer"] if isinstance(row["answer"], str) else machine_form(Fraction(str(row["answer"])))
    working = str(row.get("solution") or "").strip()
    question = Question(name, source.language, row["problem"].strip(), (), working, answer.strip())
    if not question.text:
        return question, "empty question"
    return question, None if question.answer else "empty answer"


def _empty(question: Question) -> str | None:
    if not question.text:
        return "empty question"
    return None if question.working else "empty working"
