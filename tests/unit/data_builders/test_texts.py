import pytest

from alignment.errors import UserError
from data_builders.texts import row_text

TURNS = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "three"},
]


def test_the_first_known_column_or_the_one_that_is_named() -> None:
    assert row_text({"problem": "p", "question": "q"}, "f:1") == "q"
    assert row_text({"problem": "p", "question": "q"}, "f:1", "problem") == "p"
    assert row_text({"prompt": TURNS[1:2], "text": "t"}, "f:1") == "one"


def test_of_a_conversation_the_turns_that_are_asked_for() -> None:
    assert row_text({"messages": TURNS}, "f:1") == "one\nthree"
    assert row_text({"messages": TURNS}, "f:1", turns="all") == "s\none\ntwo\nthree"
    called = {"role": "assistant", "content": None, "tool_calls": []}
    assert row_text({"messages": [*TURNS, called]}, "f:1", turns="assistant") == "two\n"


@pytest.mark.parametrize(
    ("row", "column", "message"),
    [
        ({"txt": "a"}, None, "f:1: row has no column any of messages, prompt, .* did you mean 'txt'"),
        ({"quest": "a"}, "question", "f:1: row has no column 'question'"),
        ({"text": 5}, None, "f:1: 'text' must be a text or a list of {role, content}, found 5"),
        ({"messages": ["a"]}, None, "f:1: 'messages' must be a text or a list of"),
    ],
)
def test_what_has_no_text_is_named(row: dict[str, object], column: str | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        row_text(row, "f:1", column)
