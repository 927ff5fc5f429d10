"""Rows of which each says something new: of those with equal or similar texts the first stays.

    python -m data_builders.deduplicate --config configs/data/deduplicate.yaml

Exact duplicates have one normalised text (data_builders.words), near-duplicates similar runs of words
(data_builders.minhash) and, with `embedding`, similar vectors (data_builders.neighbours): what says the same in other
words or, by a multilingual model, in another language. Writes rows.jsonl (the rows that stay, untouched), rejects.jsonl
(the others, each with `duplicate`: the row that stays for it, the method and the similarity), clusters.jsonl (each row
that others duplicate, and which, the largest clusters first) and ledger.json. It is deterministic, so a killed run
starts over; embeddings stay.
"""

import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from xxhash import xxh3_128_digest

from alignment import job
from alignment.ledger import Ledger
from alignment.processes import Processes
from alignment.progress import track
from alignment.rows import Row, count_rows, local_inputs, located_rows, write_rows, writing_rows
from data_builders.config import DeduplicateConfig
from data_builders.embeddings import Embedded, check_embedding, embedded, embedding_inputs
from data_builders.minhash import NearDuplicates, Signature, Similar, signatures
from data_builders.neighbours import KeptVectors
from data_builders.texts import check_texts, row_text, texts
from data_builders.words import normalised

CHUNK_ROWS = 2_000


@dataclass(frozen=True)
class Candidate:
    """A row to be kept or not."""

    row: Row
    place: str  # its file and line
    text: str
    signature: Signature | None  # None: near-duplicates stay


@dataclass(frozen=True)
class Duplicate:
    """Why a row goes."""

    of: str  # the place of the row that stays
    method: str  # exact, near or embedding
    similarity: float


def run(config: DeduplicateConfig) -> None:
    inputs = local_inputs(config.rows, *embedding_inputs(config.embedding))
    with job.Job.open("data_builders.deduplicate", config, inputs) as this:
        if this.done:
            return
        found = embeddings(config)
        ledger, seen, clusters = Ledger(), Seen(config, found), defaultdict[str, list[str]](list)
        with writing_rows(this.dir / "rows.jsonl") as keep, writing_rows(this.dir / "rejects.jsonl") as reject:
            for candidate in candidates(config):
                ledger.rows_in += 1
                duplicate = seen.add(candidate)
                if duplicate is None:
                    ledger.rows_out += 1
                    keep(candidate.row)
                    continue
                ledger.drop(duplicate.method)
                clusters[duplicate.of].append(candidate.place)
                reject(candidate.row | {"duplicate": vars(duplicate)})
        largest_first = sorted(clusters.items(), key=lambda cluster: -len(cluster[1]))
        write_rows(
            this.dir / "clusters.jsonl", ({"kept": kept, "duplicates": places} for kept, places in largest_first)
        )
        ledger.write(this.dir / "ledger.json")
        this.finish(
            {
                "rows.in": ledger.rows_in,
                "rows.out": ledger.rows_out,
                **ledger.dropped_metrics(),
                "clusters": len(clusters),
                "clusters.largest": 1 + len(largest_first[0][1]) if largest_first else 1,
                **({} if found is None else {"embedding.truncated": int(found.truncated_N.sum())}),
            }
        )


class Seen:
    """The rows that stay so far, by text, by signature and by vector."""

    def __init__(self, config: DeduplicateConfig, found: Embedded | None = None) -> None:
        """`found`: the vectors of all rows, in order."""
        self._by_text: dict[bytes, str] = {}  # the hash of a normalised text -> the place of the row that stays for it
        self._near = None if config.near is None else NearDuplicates(config.near)
        self._vectors = None
        if config.embedding is not None and found is not None:
            self._vectors = KeptVectors(found.vectors_ND, config.embedding.similarity)
        self._number = -1  # of the row that was added last
        self._places: list[str] = []

    def add(self, candidate: Candidate) -> Duplicate | None:
        """Keep the row, or say what it duplicates."""
        self._number += 1
        text = xxh3_128_digest(normalised(candidate.text).encode("utf-8", "surrogatepass"))
        if text in self._by_text:
            return Duplicate(self._by_text[text], "exact", 1.0)
        if self._near is not None and candidate.signature is not None:
            similar = self._near.similar(candidate.signature)
            if similar is not None:
                return self._duplicate(text, similar, "near")
        if self._vectors is not None:
            similar = self._vectors.similar(self._number)
            if similar is not None:
                return self._duplicate(text, similar, "embedding")
            self._vectors.keep(self._number)
        if self._near is not None and candidate.signature is not None:
            self._near.keep(len(self._places), candidate.signature)
        self._places.append(candidate.place)
        self._by_text[text] = candidate.place
        return None

    def _duplicate(self, text: bytes, similar: Similar, method: str) -> Duplicate:
        self._by_text[text] = self._places[similar.number]
        return Duplicate(self._places[similar.number], method, round(similar.similarity, 4))


def embeddings(config: DeduplicateConfig) -> Embedded | None:
    """The vectors of all rows, where the config asks for them."""
    if config.embedding is None:
        return None
    return embedded(texts(config.rows, config.column, config.turns), config.embedding)


def candidates(config: DeduplicateConfig) -> Iterator[Candidate]:
    """The rows in order, with their signatures where near-duplicates are looked for; several processes hash."""
    rows = track(located_rows(config.rows), count_rows(config.rows), "deduplicate")
    located = (
        Candidate(
            row,
            where,
            row_text(row, where, config.column, config.turns),
            None,
        )
        for where, row in rows
    )
    if config.near is None:
        yield from located
        return
    with Processes(config.workers or os.cpu_count() or 1, signatures, config.near) as processes:
        for candidate, signature in processes.map_each(located, lambda candidate: candidate.text, CHUNK_ROWS):
            yield replace(candidate, signature=signature)


def plan(config: DeduplicateConfig) -> list[str]:
    check_texts(config.rows, config.column, config.turns)
    near = "" if config.near is None else f", and those at least {config.near.similarity:g} similar"
    lines = [f"{config.rows} without exact duplicates{near}"]
    if config.embedding is not None:
        check_embedding(config.embedding)
        lines.append(f"and those of cosine {config.embedding.similarity:g} by {config.embedding.model}")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    return job.main(DeduplicateConfig, run, plan, argv)


if __name__ == "__main__":
    raise SystemExit(main())
