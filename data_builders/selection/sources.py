"""What a selection reads: the pool, the target and the training rows, with their vectors and clusters.

Rows are read one after the other and not kept: those drawn are read again when they are written. Of each row the
languages, the domain and the place in the draw stay in memory, about 100 bytes; vectors stay on disk.

Shapes: N rows, D dimensions, K clusters.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from alignment.errors import UserError
from alignment.progress import track
from alignment.rows import count_rows, located_rows
from data_builders import vectors
from data_builders.embeddings import embedded
from data_builders.selection import clusters as by_meaning
from data_builders.selection.config import SelectConfig
from data_builders.selection.drawing import counts_of, row_draw
from data_builders.texts import answer_text, row_text
from data_builders.vectors import Vectors

NO_LANGUAGE = ""


@dataclass(frozen=True)
class Rows:
    """What is kept of a source's rows."""

    languages_N: NDArray[np.str_]
    domains_N: NDArray[np.str_]
    draws_N: NDArray[np.float64]
    vectors_ND: Vectors
    answers_ND: Vectors | None
    truncated: int  # texts that the model did not read to their end

    def __len__(self) -> int:
        return len(self.languages_N)


@dataclass(frozen=True)
class Sources:
    """The pool, the target (the pool where there is none) and the training rows, and the cluster of each row."""

    pool: Rows
    target: Rows
    training: Rows | None
    clusters: by_meaning.Clusters
    pool_clusters_N: NDArray[np.int64]
    pool_similarities_N: NDArray[np.float32]
    target_K: NDArray[np.int64]
    training_K: NDArray[np.int64]
    training_outside: int


def read(config: SelectConfig) -> Sources:
    """
    Raises:
        UserError: a source without rows or texts, or vectors that do not fit rows or each other.
    """
    pool = _rows(config, "pool", config.rows)
    target = pool if config.target is None else _rows(config, "target", config.target)
    training = None if config.training is None else _rows(config, "training", config.training)
    for name, rows in {"target": target, "training": training}.items():
        if rows is not None and rows.vectors_ND.shape[1] != pool.vectors_ND.shape[1]:
            dimensions = f"{rows.vectors_ND.shape[1]} dimensions, those of the pool {pool.vectors_ND.shape[1]}"
            raise UserError(f"vectors.{name}: the vectors have {dimensions}")
    clusters = by_meaning.find(target.vectors_ND, config.cluster_candidates, config.inside, config.seed)
    number = len(clusters.centres_KD)
    labels, similarities = by_meaning.assign(pool.vectors_ND, clusters)
    of_target = by_meaning.nearest(target.vectors_ND, clusters.centres_KD)[0]
    of_training = np.empty(0, np.int64) if training is None else by_meaning.assign(training.vectors_ND, clusters)[0]
    return Sources(
        pool,
        target,
        training,
        clusters,
        labels,
        similarities,
        counts_of(of_target, number),
        counts_of(of_training, number),
        int((of_training == by_meaning.OUTSIDE).sum()),
    )


@dataclass
class _Scan:
    """The texts of a source, one after the other; what is kept of its rows gathers meanwhile."""

    config: SelectConfig
    name: str
    source: str
    languages: list[str] = field(default_factory=list)
    domains: list[str] = field(default_factory=list)
    draws: list[float] = field(default_factory=list)

    def __iter__(self) -> Iterator[str]:
        for where, row in track(located_rows(self.source), count_rows(self.source), f"read {self.name}"):
            self.languages.append(sys.intern(str(row.get("language") or NO_LANGUAGE)))
            self.domains.append(sys.intern(str(row.get(self.config.constraints.domain_column) or "")))
            if self.name == "pool":
                self.draws.append(row_draw(row, self.config.seed))
            needed = self.config.embedding is not None
            yield row_text(row, where, self.config.column, self.config.turns) if needed else ""


def _rows(config: SelectConfig, name: str, source: str) -> Rows:
    scan, truncated = _Scan(config, name, source), 0
    with_answers = config.method == "dbscan" and config.dbscan.answers and name == "pool"
    answers_ND = None
    if config.embedding is not None:
        found = embedded(scan, config.embedding)
        vectors_ND, truncated = found.vectors_ND, int(found.truncated_N.sum())
        if with_answers:
            column = config.dbscan.answer_column
            answers = (answer_text(row, where, column) for where, row in located_rows(source))
            answers_ND = embedded(answers, config.embedding).vectors_ND
    else:
        assert config.vectors is not None
        rows = sum(1 for _ in scan)
        vectors_ND = _fitting(f"vectors.{name}", vectors.load(getattr(config.vectors, name)), rows, source)
        if with_answers:
            assert config.vectors.answers is not None
            answers_ND = _fitting("vectors.answers", vectors.load(config.vectors.answers), rows, source)
    languages, domains, draws = np.array(scan.languages), np.array(scan.domains), np.array(scan.draws)
    return Rows(languages, domains, draws, vectors_ND, answers_ND, truncated)


def _fitting(key: str, found: Vectors, rows: int, source: str) -> Vectors:
    if len(found) != rows:
        raise UserError(f"{key}: {len(found)} vectors for the {rows} rows of {source}")
    return found
