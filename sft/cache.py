"""Tokenized rows on disk: one folder per source, addressed by what its tokens follow from, mapped into memory.

    CACHE/KEY/rows.arrow     an Arrow IPC file of sft.rendering.SCHEMA
    CACHE/KEY/source.json    what the key was made of, counts, the first rejected rows

KEY is a hash of the rows, the tokenizer with its chat template, and the format. Capacity, weights and seed are no part
of it: they are applied later, so that changing them tokenizes nothing.
"""

import json
import os
import shutil
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from transformers import PreTrainedTokenizerBase

from alignment import atomic, cores, job
from alignment.fingerprint import text_hash, value_hash
from alignment.prepared import locked, rendering_hash, rows_version
from alignment.progress import track
from alignment.rows import count_rows, located_rows
from sft import rendering
from sft.config import PrepareConfig

FORMAT = 2
REJECTED = (rendering.NOTHING_TO_TRAIN, rendering.NO_STOP, rendering.STOP_INSIDE)
REJECTS_LISTED = 100
POLL_SECONDS = 0.2

ROWS, FACTS = "rows.arrow", "source.json"


class DamagedError(Exception):
    """A cache folder that is not what was written."""


@dataclass(frozen=True)
class SourceRows:
    """The tokenized rows of one source: batches of sft.rendering.SCHEMA, most often mapped from a file."""

    name: str
    batches: Sequence[pa.RecordBatch]

    def __len__(self) -> int:
        return sum(batch.num_rows for batch in self.batches)


@dataclass(frozen=True)
class Place:
    """Where a row comes from: its source, `file:line`, and its id where it has one."""

    source: str
    where: str
    id: str | None


class TokenizedRows:
    """Rows of several sources, one after the other.

    `lengths` and `trained_tokens` are int32 [rows]; `reasons` is int8 [rows]: 0 for a row that is fine, else 1 + its
    place in REJECTED. Source s has the rows `bounds[s]` to `bounds[s + 1]`.
    """

    def __init__(self, sources: Sequence[SourceRows]) -> None:
        self.sources = [source.name for source in sources]
        self.bounds = [0, *accumulate(len(source) for source in sources)]
        self._batches = [batch for source in sources for batch in source.batches]
        self._firsts = [0, *accumulate(batch.num_rows for batch in self._batches)]
        self._tokens = [_views(batch) for batch in self._batches]
        self.lengths = self._column("length")
        self.trained_tokens = self._column("trained_tokens")
        codes = [pc.index_in(batch["reason"], pa.array(REJECTED)).fill_null(-1) for batch in self._batches]
        self.reasons = (np.concatenate([code.to_numpy() for code in codes]) + 1).astype(np.int8)

    def __len__(self) -> int:
        return self.bounds[-1]

    def take(self, indices: Sequence[int] | np.ndarray, limit: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Tokens (int32 [T]) and whether each is trained (bool [T]) of these rows, one after the other.

        Each row gives at most its first `limit` tokens.
        """
        parts = [self._row(index, limit) for index in np.asarray(indices).tolist()]
        if not parts:
            return np.empty(0, np.int32), np.empty(0, bool)
        return np.concatenate([ids for ids, _ in parts]), np.concatenate([trained for _, trained in parts])

    def place(self, index: int) -> Place:
        batch, row = self._find(index)
        source = self.sources[bisect_right(self.bounds, index) - 1]
        columns = self._batches[batch]
        return Place(source, source + columns["place"][row].as_py(), columns["id"][row].as_py())

    def _row(self, index: int, limit: int | None) -> tuple[np.ndarray, np.ndarray]:
        batch, row = self._find(index)
        offsets, ids, bits, first_bit = self._tokens[batch]
        start, end = int(offsets[row]), int(offsets[row + 1])
        if limit is not None:
            end = min(end, start + limit)
        from_bit, to_bit = start + first_bit, end + first_bit
        trained = np.unpackbits(bits[from_bit >> 3 : (to_bit + 7) >> 3], bitorder="little")
        return ids[start:end], trained[from_bit & 7 :][: end - start].view(bool)

    def _find(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        batch = bisect_right(self._firsts, index) - 1
        return batch, index - self._firsts[batch]

    def _column(self, name: str) -> np.ndarray:
        return np.concatenate([batch[name].to_numpy() for batch in self._batches])


def _views(batch: pa.RecordBatch) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """A batch's offsets, tokens, packed bits of `trained` and where among these its first lies: nothing is copied."""
    ids, trained = batch["input_ids"], batch["trained"].values
    packed = trained.buffers()[1]
    bits = np.frombuffer(packed, np.uint8) if packed is not None else np.empty(0, np.uint8)
    return ids.offsets.to_numpy(), ids.values.to_numpy(), bits, trained.offset


def prepare_source(source: str, tokenizer: PreTrainedTokenizerBase, config: PrepareConfig) -> SourceRows:
    """The tokenized rows of one source, from the cache, which this machine's first rank fills where they are missing.

    Every rank calls it before any process group exists, so that no collective waits, and times out, meanwhile.

    Raises:
        UserError: a row against the schema, or that the template refuses; a hub id without a revision.
    """
    made_of = _made_of(source, tokenizer)
    folder = config.cache / value_hash(made_of)
    if int(os.environ.get("LOCAL_RANK", "0")) > 0:
        return _wait_for(folder, source)
    rows = _read(folder, source)
    if rows is not None:
        _say(folder, source, " (cached)")
        return rows
    with locked(folder):
        rows = _read(folder, source)  # another process may have made it meanwhile
        if rows is None:
            shutil.rmtree(folder, ignore_errors=True)  # damaged
            with atomic.placing_folder(folder) as temporary:
                _write(temporary, source, made_of, tokenizer, config)
            rows = open_source(folder, source)
    _say(folder, source)
    return rows


def cached_source(source: str, tokenizer: PreTrainedTokenizerBase, config: PrepareConfig) -> SourceRows | None:
    """The tokenized rows of one source where the cache has them whole, else None."""
    return _read(config.cache / value_hash(_made_of(source, tokenizer)), source)


def open_source(folder: Path, name: str) -> SourceRows:
    """Map a source's cache folder into memory.

    Raises:
        FileNotFoundError: there is none. DamagedError: it is not what was written.
    """
    facts = read_facts(folder)
    if (folder / ROWS).stat().st_size != facts["bytes"]:
        raise DamagedError(f"{folder / ROWS}: {(folder / ROWS).stat().st_size} bytes, expected {facts['bytes']}")
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(folder / ROWS)))
        rows = SourceRows(name, [reader.get_batch(index) for index in range(reader.num_record_batches)])
    except pa.ArrowInvalid as error:
        raise DamagedError(f"{folder / ROWS}: {error}") from None
    tokens = sum(len(batch["input_ids"].values) for batch in rows.batches)
    if (len(rows), tokens) != (facts["rows"], facts["tokens_kept"]):
        raise DamagedError(f"{folder / ROWS}: {len(rows)} rows and {tokens} tokens, which {FACTS} denies")
    return rows


def read_facts(folder: Path) -> dict[str, Any]:
    """What source.json says of a cache folder."""
    try:
        return dict(json.loads((folder / FACTS).read_text(encoding="utf-8")))
    except ValueError as error:
        raise DamagedError(f"{folder / FACTS}: {error}") from None


def _made_of(source: str, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "rows": rows_version(source),
        "tokenizer": rendering_hash(tokenizer),
        "template": text_hash(str(tokenizer.chat_template)),
    }


def _write(
    folder: Path, source: str, made_of: dict[str, Any], tokenizer: PreTrainedTokenizerBase, config: PrepareConfig
) -> None:
    located = track(located_rows(source, "messages"), count_rows(source), f"sft.prepare: {source}")
    workers = config.workers or cores.count()
    counts: Counter[str] = Counter()
    rejected: Counter[str] = Counter()
    rejects: list[dict[str, Any]] = []
    with pa.OSFile(str(folder / ROWS), "wb") as file, pa.ipc.new_file(file, rendering.SCHEMA) as writer:
        for batch in rendering.render(rendering.chunks(source, located), tokenizer, workers):
            writer.write_batch(batch)
            counts += Counter(
                rows=batch.num_rows,
                tokens=pc.sum(batch["length"]).as_py(),
                tokens_kept=len(batch["input_ids"].values),
                trained_tokens=pc.sum(batch["trained_tokens"]).as_py(),
            )
            refused = batch.filter(pc.is_valid(batch["reason"])).select(["place", "id", "length", "reason"]).to_pylist()
            rejected.update(row["reason"] for row in refused)
            rejects += refused[: REJECTS_LISTED - len(rejects)]
    atomic.sync(folder / ROWS)
    names = ("rows", "tokens", "tokens_kept", "trained_tokens")
    facts = {"made_of": made_of, "source": source, "bytes": (folder / ROWS).stat().st_size}
    facts |= {name: counts[name] for name in names} | {"rejected": dict(rejected), "rejects": rejects}
    atomic.write_json(folder / FACTS, facts)


def _read(folder: Path, source: str) -> SourceRows | None:
    """The rows, or None where they are missing or damaged and have to be made again."""
    try:
        return open_source(folder, source)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except DamagedError as error:
        print(f"sft.prepare: a damaged cache is made again: {error}", flush=True)
        return None


def _wait_for(folder: Path, source: str) -> SourceRows:
    """Another rank fills the cache; where it cannot, it ends, and the launcher ends this process too."""
    while True:
        try:
            return open_source(folder, source)
        except (FileNotFoundError, DamagedError):
            time.sleep(POLL_SECONDS)


def _say(folder: Path, source: str, how: str = "") -> None:
    if job.rank() == 0:
        facts = read_facts(folder)
        print(f"sft.prepare: {source}: {facts['rows']:,} rows, {short(facts['tokens'])} tokens{how}", flush=True)


def short(number: float) -> str:
    """1234567 as 1.2M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return f"{number:,.0f}"
