"""Rows to tokens: chunks of rows rendered in order, in this process or in several.

A chunk goes out to a process and comes back as one Arrow batch. The processes import what this module imports: not TRL
and DeepSpeed, as the job that starts them.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate, chain, islice

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from alignment import chat
from alignment.errors import UserError
from alignment.processes import Processes
from alignment.rows import Row

SCHEMA = pa.schema(
    [
        ("input_ids", pa.large_list(pa.int32())),
        ("trained", pa.large_list(pa.bool_())),  # beside each token
        ("length", pa.int32()),  # also of a rejected row, which holds no tokens
        ("trained_tokens", pa.int32()),
        ("reason", pa.string()),  # null: the row is fine
        ("place", pa.string()),  # of the row, behind the name of its source
        ("id", pa.string()),
    ]
)

NOTHING_TO_TRAIN = "nothing to train"
NO_STOP = "no stop token after a trained turn"
STOP_INSIDE = "a stop token inside a trained turn"

CHUNK_ROWS = 512
CHUNK_CHARACTERS = 1 << 20  # a chunk of long rows is shorter, so that memory stays bounded
# Where a source is smaller, processes cost more than they save: each imports transformers first, for some seconds.
ROWS_FOR_PROCESSES = 8192


@dataclass(frozen=True)
class Chunk:
    """Consecutive rows of a source: each its place behind the source's name, id, messages, template's options."""

    source: str
    rows: list[tuple[str, str | None, chat.Messages, chat.Options]]


def chunks(source: str, rows: Iterable[tuple[str, Row]]) -> Iterator[Chunk]:
    """`rows` with their places, as of `alignment.rows.located_rows`, in chunks."""
    taken: list[tuple[str, str | None, chat.Messages, chat.Options]] = []
    characters = 0
    for where, row in rows:
        name = row.get("id")
        name = None if name is None else str(name)
        taken.append((where.removeprefix(source), name, row["messages"], chat.template_options(row)))
        characters += sum(len(message["content"]) for message in row["messages"])
        if len(taken) == CHUNK_ROWS or characters > CHUNK_CHARACTERS:
            yield Chunk(source, taken)
            taken, characters = [], 0
    if taken:
        yield Chunk(source, taken)


def render(pending: Iterator[Chunk], tokenizer: PreTrainedTokenizerBase, workers: int) -> Iterator[pa.RecordBatch]:
    """Render chunks in their order: few of them in this process, more in `workers` processes.

    Raises:
        UserError: a row that the chat template refuses, its file and line named.
    """
    head: list[Chunk] = []
    while sum(len(chunk.rows) for chunk in head) < ROWS_FOR_PROCESSES and (chunk := next(pending, None)):
        head.append(chunk)
    everything = chain(head, pending)
    if workers == 1 or sum(len(chunk.rows) for chunk in head) < ROWS_FOR_PROCESSES:
        yield from (render_chunk(tokenizer, chunk) for chunk in everything)
        return
    del head
    with Processes(workers, render_chunk, tokenizer) as processes:
        yield from processes.map(everything)


def render_chunk(tokenizer: PreTrainedTokenizerBase, chunk: Chunk) -> pa.RecordBatch:
    """The rows of a chunk, tokenized, with the reasons of those that are rejected."""
    try:
        rendered = chat.render_all(tokenizer, [row[2] for row in chunk.rows], [row[3] for row in chunk.rows])
    except UserError:
        rendered = [
            _render_one(chunk.source + place, tokenizer, messages, options)
            for place, _, messages, options in chunk.rows
        ]
    kept: list[tuple[np.ndarray, np.ndarray]] = []
    facts: list[tuple[int, int, str | None]] = []
    for row in rendered:
        ids, trained = np.array(row.input_ids, dtype=np.int32), np.array(row.assistant_mask, dtype=bool)
        reason = reject(ids, trained, tokenizer)
        trained[:1] = False  # in a pack its predictor would be another sample's last token
        facts.append((len(ids), int(trained.sum()) if reason is None else 0, reason))
        kept.append((ids, trained) if reason is None else (ids[:0], trained[:0]))
    offsets = pa.array([0, *accumulate(len(ids) for ids, _ in kept)], pa.int64())
    lengths, trained_tokens, reasons = zip(*facts, strict=True)
    places, names, _, _ = zip(*chunk.rows, strict=True)
    columns = [
        pa.LargeListArray.from_arrays(offsets, pa.array(np.concatenate([ids for ids, _ in kept]))),
        pa.LargeListArray.from_arrays(offsets, pa.array(np.concatenate([trained for _, trained in kept]))),
    ]
    others = (lengths, trained_tokens, reasons, places, names)
    columns += [pa.array(values, field.type) for values, field in zip(others, islice(SCHEMA, 2, None), strict=True)]
    return pa.RecordBatch.from_arrays(columns, schema=SCHEMA)


def reject(ids: np.ndarray, trained: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Why a row is not trained on, or None: each run of trained tokens ends with its one stop token.

    Whitespace may follow the stop token within the run, as some templates have it.
    """
    if not trained[1:].any():
        return NOTHING_TO_TRAIN
    stop = chat.stop_token_id(tokenizer)
    padded = np.zeros(len(trained) + 2, dtype=bool)
    padded[1:-1] = trained
    edges = np.flatnonzero(padded[1:] != padded[:-1])
    for start, end in edges.reshape(-1, 2).tolist():
        stops = start + np.flatnonzero(ids[start:end] == stop)
        if len(stops) == 0:
            return NO_STOP
        behind = ids[stops[0] + 1 : end].tolist()
        if behind and not all(str(tokenizer.decode([token])).isspace() for token in behind):
            return STOP_INSIDE
    return None


def _render_one(
    where: str, tokenizer: PreTrainedTokenizerBase, messages: chat.Messages, options: chat.Options
) -> chat.Rendered:
    try:
        return chat.render(tokenizer, messages, **options)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
