import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from alignment.errors import UserError
from alignment.rows import Kind, count_rows, first_rows, is_hub_id, local_inputs, located_rows, read_rows, write_rows

USER, ASSISTANT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}
ROW = {"id": "1", "messages": [USER, ASSISTANT]}


def write_lines(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def error_of(path: Path | str, kind: Kind = "messages") -> str:
    with pytest.raises(UserError) as caught:
        list(read_rows(path, kind))
    return str(caught.value)


def test_every_format_gives_the_same_rows(tmp_path: Path) -> None:
    rows = [{"id": str(i), "messages": [USER, {"role": "assistant", "content": f"สวัสดี {i}\u2028"}]} for i in range(30)]
    plain, packed, table = tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz", tmp_path / "c.parquet"
    assert write_rows(plain, rows) == 30
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    pq.write_table(pa.Table.from_pylist(rows), table)
    for path in (plain, packed, table):
        assert list(read_rows(path, "messages")) == rows
    assert list(read_rows(tmp_path)) == rows * 3  # a folder, in the order of names
    assert list(read_rows(str(plain), "any")) == rows


def test_blank_lines_count_as_lines_but_not_as_rows(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", [ROW, "", "  ", "{"])
    assert error_of(path).startswith(f"{path}:4: malformed JSON: ")


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_malformed_line_7(tmp_path: Path, name: str) -> None:
    path = write_lines(tmp_path / name, [ROW] * 6 + ['{"id": "7", "messages": ['] + [ROW])
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress(path.read_bytes()))
    assert error_of(path).startswith(f"{path}:7: malformed JSON: ")
    assert "\n" not in error_of(path)


def test_invalid_utf8_is_malformed(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json.dumps(ROW).encode() + b'\n{"id": "\xff"}\n')
    assert error_of(path).startswith(f"{path}:2: malformed JSON: ")


@pytest.mark.parametrize(
    ("kind", "row", "expected"),
    [
        ("messages", {"mesages": []}, "row has no 'messages', expected a list of {role, content}; did you mean"),
        ("messages", {}, "row has no 'messages', expected a list of {role, content}"),
        ("messages", {"messages": []}, "'messages' must be a non-empty list"),
        ("messages", {"messages": "hi"}, "'messages' must be a non-empty list"),
        ("messages", {"messages": [USER, "yes"]}, "messages[1] must be an object with 'role' and a text 'content'"),
        ("messages", {"messages": [{"role": "user", "content": None}]}, "messages[0] must be an object"),
        ("messages", {"messages": [{"role": "user"}]}, "messages[0] must be an object"),
        (
            "messages",
            {"messages": [USER, {"role": "assistent", "content": ""}]},
            "messages[1] has role 'assistent'; did you mean 'assistant'?",
        ),
        ("messages", [ROW], "expected a JSON object, found list"),
        ("any", 3, "expected a JSON object, found int"),
        ("prompt", ROW, "row has no 'prompt'"),
        ("preference", {"prompt": [USER], "chosen": [ASSISTANT]}, "row has no 'rejected'"),
        ("preference", {"prompt": [USER], "chosen": [ASSISTANT], "rejected": []}, "'rejected' must be a non-empty"),
    ],
)  # fmt: skip
def test_row_against_its_schema_names_the_line(tmp_path: Path, kind: Kind, row: Any, expected: str) -> None:
    good = {"messages": [USER], "prompt": [USER], "chosen": [ASSISTANT], "rejected": [ASSISTANT]}
    path = write_lines(tmp_path / "rows.jsonl", [good, row])
    assert error_of(path, kind).startswith(f"{path}:2: {expected}")


def test_parquet_row_against_its_schema_names_the_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist([ROW, {"id": "2", "messages": []}]), path)
    assert error_of(path).startswith(f"{path} row 2: 'messages' must be a non-empty list")


def test_no_rows_no_file_no_known_suffix(tmp_path: Path) -> None:
    write_lines(tmp_path / "rows.jsonl", [])
    assert error_of(tmp_path / "rows.jsonl") == f"{tmp_path}/rows.jsonl: holds no rows"
    assert error_of(tmp_path / "row.jsonl") == f"{tmp_path}/row.jsonl: no such file; did you mean 'rows.jsonl'?"
    (tmp_path / "rows.csv").touch()
    assert "unknown kind of file, expected .jsonl" in error_of(tmp_path / "rows.csv")
    (tmp_path / "empty").mkdir()
    assert "no .jsonl, .jsonl.gz, .parquet file in this folder" in error_of(tmp_path / "empty")


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("torn.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 5000, mtime=0)[:-12], "damaged gzip file after line "),
        ("not.jsonl.gz", b"plain text", "damaged gzip file after line 0: "),
        ("not.parquet", b"plain text", "damaged Parquet file after row 0: "),
        ("empty.parquet", b"", "damaged Parquet file after row 0: "),
    ],
)
def test_damaged_file_is_the_users_mistake(tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert error_of(tmp_path / name, "any").startswith(f"{tmp_path / name}: {expected}")


@pytest.mark.parametrize(("name", "rows"), [("a.jsonl", 3), ("a.jsonl.gz", 3), ("a.parquet", 3), (".", 9)])
def test_rows_are_counted_for_a_progress_bar(tmp_path: Path, name: str, rows: int) -> None:
    lines = b'{"a": 1}\n' * 3
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    pq.write_table(pa.table({"a": [1, 2, 3]}), tmp_path / "a.parquet")
    assert count_rows(tmp_path / name) == rows == len(list(located_rows(tmp_path / name)))


def test_rows_that_cannot_be_counted(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b"x", mtime=0)[:-5])
    assert (count_rows("some/set"), count_rows(tmp_path), count_rows(tmp_path / "gone.jsonl")) == (None, 0, 0)


def test_first_rows_stop_early(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", [ROW] * 5 + ["{"])
    assert first_rows(path, "messages", 3) == [ROW] * 3


def test_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", [ROW])
    with pytest.raises(TypeError):
        write_rows(path, [{"id": "new"}, {"id": object()}])
    assert list(read_rows(path)) == [ROW]
    assert [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]


def test_hub_ids_are_told_from_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    assert is_hub_id("openai/gsm8k")
    assert is_hub_id("openai/gsm8k:train")
    for path in ("data/missing", "./org/name", "/org/name", "a/b/c", "name", "org/name.jsonl"):
        assert not is_hub_id(path)
    assert local_inputs("openai/gsm8k", "data/rows.jsonl") == [Path("data/rows.jsonl")]


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
@pytest.mark.parametrize("text", ['[{"a": 1},\n {"a": 2}]', '{"a": 1}\n{"a": 2}\n'])
def test_a_json_file_holds_a_list_or_lines(tmp_path: Path, text: str, pack: Callable[[bytes], bytes]) -> None:
    path = tmp_path / ("rows.json.gz" if pack is gzip.compress else "rows.json")
    path.write_bytes(pack(text.encode()))
    assert list(read_rows(path)) == [{"a": 1}, {"a": 2}]
    assert count_rows(path) is None
    assert "no .jsonl" in error_of(tmp_path), "only where it is named: other JSON lies in folders of runs"


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("rows.json", b'[{"a": 1}, 2]', "rows.json row 2: expected a JSON object"),
        ("rows.json", b'[{"a": 1}', "rows.json: malformed JSON"),
        ("rows.json.gz", gzip.compress(b'[{"a": 1}]', mtime=0)[:-9], "rows.json.gz: damaged gzip file"),
    ],
)
def test_a_damaged_json_file_is_named(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    assert message in error_of(tmp_path / name, "any")


def calling(**function: object) -> dict[str, object]:
    return {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": function}]}


def test_a_call_needs_no_content(tmp_path: Path) -> None:
    """OpenAI's null becomes no text; arguments are an object or its JSON text, and stay as they are."""
    turns = [calling(name="price", arguments={"n": 1}), calling(name="price", arguments='{"n":1}')]
    path = write_lines(tmp_path / "rows.jsonl", [{"messages": [{"role": "user", "content": "?"}, *turns]}])
    assert next(read_rows(path, "messages"))["messages"][1:] == [turn | {"content": ""} for turn in turns]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"messages": [calling(name="price")]}, r"messages\[0\]: 'tool_calls' must be a list of {function: {name"),
        ({"messages": [calling(name="price", arguments="{")]}, r"messages\[0\]: arguments of 'price': malformed JSON"),
        ({"messages": [calling(name="p", arguments={}) | {"role": "user"}]}, r"'tool_calls', which only the assistant"),
        ({"messages": [{"role": "assistant", "content": None}]}, "must be an object with 'role' and a text 'content'"),
        ({"tools": '[{"name": "price"}]'}, "'tools' must be a list of objects"),
        ({"chat_template_kwargs": [1]}, "'chat_template_kwargs' must be an object"),
    ],
)
def test_calls_and_tools_against_the_schema(tmp_path: Path, change: dict[str, object], message: str) -> None:
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    path = write_lines(tmp_path / "rows.jsonl", [{"messages": turns} | change])
    with pytest.raises(UserError, match=f"rows.jsonl:1.*{message}"):
        list(read_rows(path, "messages"))


def test_answers_to_compare_may_not_call(tmp_path: Path) -> None:
    """They are compared as texts, in which a call would be missing."""
    turn = [{"role": "user", "content": "?"}]
    row = {"prompt": turn, "chosen": [calling(name="price", arguments={})], "rejected": turn}
    with pytest.raises(
        UserError, match="rows.jsonl:1: 'chosen' has 'tool_calls', which only 'messages' and 'prompt' may"
    ):
        list(read_rows(write_lines(tmp_path / "rows.jsonl", [row]), "preference"))
