"""Rows of usage as arrays: vectors, times and how well the model did; and a stream of them cut into windows.

Shapes: N rows, D dimensions.
"""

import math
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alignment.errors import UserError, did_you_mean
from alignment.progress import track
from alignment.rows import Row, count_rows, first_rows, located_rows
from data_builders import vectors
from data_builders.config import DriftConfig, UsageConfig
from data_builders.embeddings import check_embedding, embed
from data_builders.texts import check_texts, row_text

Numbers = NDArray[np.int64]
CHECKED_AT_ONCE = 65_536  # vectors
SECONDS = {"h": 3_600, "d": 86_400, "w": 604_800}


@dataclass(frozen=True)
class Rows:
    """The rows of a source, in their order."""

    vectors_ND: NDArray[np.floating[Any]]
    times_N: NDArray[np.float64] | None  # seconds since 1970
    performance_N: NDArray[np.float64] | None  # higher is better
    pairs_N: list[str] | None  # what names the same question in reference and stream

    def __len__(self) -> int:
        return len(self.vectors_ND)


def read(config: DriftConfig, source: UsageConfig, timed: bool) -> Rows:
    """The rows of a source; their times are read where `timed`.

    Raises:
        UserError: a row without text, time or performance, or vectors that are not one for each row.
    """
    texts, times, performance, pairs = [], [], [], []
    for where, row in track(located_rows(source.rows), count_rows(source.rows), f"drift: {source.rows}"):
        texts.append(row_text(row, where, config.column, config.turns) if source.vectors is None else "")
        if timed and config.time is not None:
            times.append(_time(row, config.time, where))
        if config.performance is not None:
            performance.append(sign(config) * _number(row, config.performance.column, where))
            if config.performance.pair is not None:
                pairs.append(str(_value(row, config.performance.pair, where)))
    return Rows(
        _vectors(config, source, texts),
        np.array(times) if times else None,
        np.array(performance) if performance else None,
        pairs or None,
    )


def check(config: DriftConfig) -> None:
    """Refuse, for a dry run, first rows that `read` would refuse, and vectors that cannot be read."""
    if config.embedding is not None:
        check_embedding(config.embedding)
    for source, timed in ((config.reference, False), (config.stream, True)):
        if source.vectors is None:
            check_texts(source.rows, config.column, config.turns)
        else:
            vectors.load(source.vectors)
        for number, row in enumerate(first_rows(source.rows, "any"), start=1):
            where = f"{source.rows} row {number}"
            if timed and config.time is not None:
                _time(row, config.time, where)
            if config.performance is not None:
                _number(row, config.performance.column, where)
                if config.performance.pair is not None:
                    _value(row, config.performance.pair, where)


def sign(config: DriftConfig) -> int:
    """What a performance is multiplied by, so that higher is better."""
    return -1 if config.performance is not None and config.performance.better == "lower" else 1


def cut(stream: Rows, config: DriftConfig) -> list[Numbers]:
    """The rows of each window, by time where there is one, else in their order; spans without a row are left out."""
    order = np.arange(len(stream)) if stream.times_N is None else np.argsort(stream.times_N, kind="stable")
    if isinstance(config.window, int):
        return np.split(order, range(config.window, len(order), config.window))
    assert stream.times_N is not None, "the config asks for a column of times"
    times = stream.times_N[order]
    number = (times - times[0]) // (int(config.window[:-1]) * SECONDS[config.window[-1]])
    return np.split(order, np.flatnonzero(np.diff(number)) + 1)


def _vectors(config: DriftConfig, source: UsageConfig, texts: list[str]) -> NDArray[np.floating[Any]]:
    if source.vectors is None:
        assert config.embedding is not None, "the config asks for it"
        return embed(texts, config.embedding)
    vectors_ND = vectors.load(source.vectors)
    if len(vectors_ND) != len(texts):
        raise UserError(f"{source.vectors}: {len(vectors_ND)} vectors, but {source.rows} holds {len(texts)} rows")
    for start in range(0, len(vectors_ND), CHECKED_AT_ONCE):
        finite = np.isfinite(vectors_ND[start : start + CHECKED_AT_ONCE]).all(1)
        if not finite.all():
            raise UserError(f"{source.vectors} row {start + int(finite.argmin()) + 1}: the vector is not finite")
    return vectors_ND


def _value(row: Row, column: str, where: str) -> Any:
    if row.get(column) is None:
        raise UserError(f"{where}: row has no {column!r}{did_you_mean(column, row)}")
    return row[column]


def _number(row: Row, column: str, where: str) -> float:
    value = _value(row, column, where)
    if not isinstance(value, bool | int | float) or not math.isfinite(value):
        raise UserError(f"{where}: {column!r} is {value!r}, expected a number, true or false")
    return float(value)


def _time(row: Row, column: str, where: str) -> float:
    value = _value(row, column, where)
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    try:
        time = value if isinstance(value, datetime) else datetime.fromisoformat(value)
    except (TypeError, ValueError):
        raise UserError(f"{where}: {column!r} is {value!r}, expected an ISO 8601 time or seconds since 1970") from None
    return (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()


def iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
