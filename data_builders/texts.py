"""The text of a row of any kind: what somebody was asked, or what was answered."""

from collections.abc import Iterator, Sequence
from typing import Literal

from alignment.errors import UserError, did_you_mean
from alignment.rows import Row, first_rows, located_rows

COLUMNS = ("messages", "prompt", "question", "problem", "text")
Turns = Literal["user", "assistant", "all"]


def row_text(row: Row, where: str, column: str | None = None, turns: Turns = "user") -> str:
    """The text in `column`, or in the first of COLUMNS that the row has; of a conversation the turns of `turns`.

    Raises:
        UserError: no such column, or neither text nor a conversation in it.
    """
    name = column or next((name for name in COLUMNS if name in row), None)
    if name is None or name not in row:
        expected = repr(column) if column else f"any of {', '.join(COLUMNS)}"
        raise UserError(f"{where}: row has no column {expected}{did_you_mean(column or 'text', row)}")
    match row[name]:
        case str(text):
            return text
        case [*messages] if all(isinstance(m, dict) and isinstance(m.get("content") or "", str) for m in messages):
            return _of_turns(messages, turns)
        case other:
            raise UserError(f"{where}: {name!r} must be a text or a list of {{role, content}}, found {other!r:.60}")


def texts(source: str, column: str | None = None, turns: Turns = "user") -> Iterator[str]:
    """The texts of all rows."""
    return (row_text(row, where, column, turns) for where, row in located_rows(source))


def check_texts(source: str, column: str | None = None, turns: Turns = "user") -> None:
    """Refuse, for a dry run, a source whose first rows have no text."""
    for number, row in enumerate(first_rows(source, "any"), start=1):
        row_text(row, f"{source} row {number}", column, turns)


def _of_turns(messages: Sequence[Row], turns: Turns) -> str:
    return "\n".join(m.get("content") or "" for m in messages if turns in ("all", m.get("role")))


def answer_text(row: Row, where: str, column: str | None = None) -> str:
    """What somebody answered: the text in `column`, or the assistant's turns of `messages`.

    Raises:
        UserError: no such column, or no turn of the assistant's.
    """
    if column is not None:
        return row_text(row, where, column, "all")
    text = row_text(row, where, "messages", "assistant") if "messages" in row else ""
    if not text:
        raise UserError(f"{where}: row has no assistant's turn in 'messages'; name the column of its answer")
    return text
