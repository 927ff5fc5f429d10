"""Rows in and out: JSONL (also gzipped), Parquet, folders of them, JSON files by name, and data sets of the hub.

Schemas are TRL's conversational format. A row that breaks its schema is a UserError that names file and line.
"""

import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from alignment import atomic
from alignment.errors import UserError, did_you_mean

Row = dict[str, Any]
Kind = Literal["messages", "prompt", "preference", "any"]

BLOCK_BYTES = 1 << 22
SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
WHOLE = (".json", ".json.gz")  # read where the file itself is named: in a run's folder other JSON lies beside the rows
ROLES = ("system", "user", "assistant", "tool")
CONVERSATIONS: dict[Kind, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt": ("prompt",),
    "preference": ("prompt", "chosen", "rejected"),
    "any": (),
}
ANSWERS = ("chosen", "rejected")


def read_rows(source: Path | str, kind: Kind = "any") -> Iterator[Row]:
    """Yield the rows of `source`, checked against `kind`.

    `source` is a file, a folder of files (read in the order of their names), or a hub id `org/name` with an optional
    configuration and split, `org/name:train` or `org/name:main:train`.

    Raises:
        UserError: no such source, malformed JSON, a row against the schema (file and line named), or no rows at all.
    """
    return (row for _, row in located_rows(source, kind))


def located_rows(source: Path | str, kind: Kind = "any") -> Iterator[tuple[str, Row]]:
    """As `read_rows`, each row with its place: `file:line`, or `file row number`."""
    count = 0
    for where, row in _located_rows(source):
        check_row(row, kind, where)
        count += 1
        yield where, row
    if count == 0:
        raise UserError(f"{source}: holds no rows")


def count_rows(source: Path | str) -> int | None:
    """The rows of local files, for a progress bar: blank lines count, nothing is checked.

    None for a hub id and for a JSON file, whose rows are not lines.
    """
    if is_hub_id(source) or str(source).endswith(WHOLE):
        return None
    return sum(_count(file) for file in _files(Path(source)) if file.is_file())


def _count(path: Path) -> int:
    try:
        if path.suffix == ".parquet":
            return int(pq.read_metadata(path).num_rows)
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            return sum(block.count(b"\n") for block in iter(lambda: file.read(BLOCK_BYTES), b""))
    except (pa.ArrowInvalid, gzip.BadGzipFile, EOFError, zlib.error):
        return 0  # who reads it says where it is damaged


def first_rows(source: Path | str, kind: Kind, count: int = 20) -> list[Row]:
    """The first rows only, for `--dry-run`."""
    return [row for row, _ in zip(read_rows(source, kind), range(count), strict=False)]


def write_rows(path: Path, rows: Iterable[Row]) -> int:
    """Write JSONL, whole or not at all. Returns the number of rows."""
    count = 0
    with writing_rows(path) as write:
        for row in rows:
            write(row)
            count += 1
    return count


@contextmanager
def writing_rows(path: Path) -> Iterator[Callable[[Row], None]]:
    """Gives a function that writes one row; after the block the file is whole, after an error as it was.

    A lone surrogate is written as JSON escapes it.
    """
    with (
        atomic.replacing(path) as temporary,
        temporary.open("w", encoding="utf-8", errors="backslashreplace") as file,
    ):
        yield lambda row: print(json.dumps(row, ensure_ascii=False), file=file)


def local_inputs(*sources: Path | str) -> list[Path]:
    """The sources that are files or folders of this machine: what a job hashes as its inputs."""
    return [Path(s) for s in sources if not is_hub_id(s)]


def is_hub_id(source: Path | str) -> bool:
    """`org/name` or `org/name:split`, given as text, where neither such a file nor a folder `org` exists."""
    text = str(source)
    if text.count("/") != 1 or text.startswith((".", "/")) or _suffix(text):
        return False
    return not Path(text).exists() and not Path(text).parent.is_dir()


def check_row(row: Any, kind: Kind, where: str) -> None:
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected a JSON object, found {type(row).__name__}")
    for column in CONVERSATIONS[kind]:
        if column not in row:
            hint = did_you_mean(column, row) if row else ""
            raise UserError(f"{where}: row has no {column!r}, expected a list of {{role, content}}{hint}")
        _check_conversation(row[column], column, where)
        if column in ANSWERS and any(message.get("tool_calls") for message in row[column]):
            raise UserError(
                f"{where}: {column!r} has 'tool_calls', which only 'messages' and 'prompt' may; write it as text"
            )
    if kind != "any":
        _check_template_columns(row, where)


def _check_template_columns(row: Row, where: str) -> None:
    """What chat templates are given besides messages."""
    if not isinstance(row.get("chat_template_kwargs") or {}, dict):
        raise UserError(f"{where}: 'chat_template_kwargs' must be an object")
    tools = row.get("tools") or []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise UserError(f"{where}: 'tools' must be a list of objects, the schemas of functions")


def _check_conversation(messages: Any, column: str, where: str) -> None:
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where}: {column!r} must be a non-empty list of {{role, content}}")
    for index, message in enumerate(messages):
        place = f"{where}: {column}[{index}]"
        if isinstance(message, dict) and message.get("tool_calls"):
            _check_calls(message, place)
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise UserError(f"{place} must be an object with 'role' and a text 'content'")
        if message.get("role") not in ROLES:
            role = str(message.get("role"))
            raise UserError(f"{place} has role {role!r}{did_you_mean(role, ROLES)}")


def _check_calls(message: Row, place: str) -> None:
    """Calls as OpenAI writes them; where nothing is said besides, the content may be null, which becomes no text."""
    message["content"] = message.get("content") or ""
    if message.get("role") != "assistant":
        raise UserError(f"{place} has 'tool_calls', which only the assistant's may")
    for call in message["tool_calls"]:
        match call:
            case {"function": {"name": str(), "arguments": dict()}}:
                pass
            case {"function": {"name": str(), "arguments": str(text)}}:
                _parse(text.encode("utf-8", "surrogatepass"), f"{place}: arguments of {call['function']['name']!r}")
            case _:
                raise UserError(
                    f"{place}: 'tool_calls' must be a list of {{function: {{name, arguments}}}}, the arguments an "
                    f"object or its JSON text, found {call!r:.60}"
                )


def _suffix(name: str, among: Sequence[str] = SUFFIXES + WHOLE) -> str | None:
    return next((s for s in among if name.endswith(s)), None)


def _located_rows(source: Path | str) -> Iterator[tuple[str, Any]]:
    if is_hub_id(source):
        yield from _hub_rows(str(source))
        return
    for file in _files(Path(source)):
        yield from _file_rows(file)


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    files = sorted(p for p in path.iterdir() if _suffix(p.name, SUFFIXES))
    if not files:
        raise UserError(f"{path}: no {', '.join(SUFFIXES)} file in this folder")
    return files


def _file_rows(path: Path) -> Iterator[tuple[str, Any]]:
    if not path.is_file():
        hint = did_you_mean(path.name, [p.name for p in path.parent.iterdir()]) if path.parent.is_dir() else ""
        raise UserError(f"{path}: no such file{hint}")
    match _suffix(path.name):
        case ".parquet":
            yield from _parquet_rows(path)
        case ".jsonl" | ".jsonl.gz":
            yield from _jsonl_rows(path)
        case ".json" | ".json.gz" if _starts_with_list(path):
            yield from _list_rows(path)
        case ".json" | ".json.gz":
            yield from _jsonl_rows(path)
        case _:
            raise UserError(f"{path}: unknown kind of file, expected {', '.join(SUFFIXES)}")


def _jsonl_rows(path: Path) -> Iterator[tuple[str, Any]]:
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"{path}:{number}", _parse(line, f"{path}:{number}")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: damaged gzip file after line {number}: {error}") from None


def _starts_with_list(path: Path) -> bool:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            return file.read(64).lstrip().startswith(b"[")
    except (gzip.BadGzipFile, EOFError, zlib.error):
        return False  # read line by line, it is named as damaged


def _list_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """The rows of one JSON list, held in memory whole."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: damaged gzip file: {error}") from None
    for number, row in enumerate(_parse(data, str(path)), start=1):
        yield f"{path} row {number}", row


def _parse(line: bytes, where: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: malformed JSON: {error}") from None


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    number = 0
    try:
        for batch in pq.ParquetFile(path).iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield f"{path} row {number}", row
    except pa.ArrowInvalid as error:
        raise UserError(f"{path}: damaged Parquet file after row {number}: {error}") from None


def _hub_rows(source: str) -> Iterator[tuple[str, Any]]:
    import datasets

    name, *config, split = source.split(":") if ":" in source else (source, "train")
    try:
        rows = datasets.load_dataset(name, *config, split=split, streaming=True)
    except (datasets.exceptions.DatasetNotFoundError, ConnectionError, ValueError) as error:
        raise UserError(f"{source}: neither a local file nor a data set that the hub gives: {error}") from None
    for number, row in enumerate(rows, start=1):
        yield f"{source} row {number}", dict(row)
