"""Rows without those that repeat a row of an evaluation set: as it is, reworded, with other numbers, or by meaning.

    python -m data_builders.decontaminate --config configs/data/decontaminate.yaml

Writes rows.jsonl (the rows that stay, untouched), rejects.jsonl (the others, each with `contamination`: the evaluation
row, the method that found it, the share of it and the longest run of words that both hold) and ledger.json. The method
is that of data_builders.overlap. With `embedding`, what it leaves goes where its embedding's cosine with an evaluation
row's is high enough (`share` is then the cosine): paraphrases and, by a multilingual model, translations. The job is
deterministic, so a killed run starts over; embeddings stay.
"""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from alignment import job
from alignment.ledger import Ledger
from alignment.processes import Processes
from alignment.progress import track
from alignment.rows import Row, count_rows, local_inputs, located_rows, writing_rows
from data_builders.config import DecontaminateConfig, EmbeddingNeighboursConfig, EvaluationFileConfig
from data_builders.embeddings import check_embedding, embedded, embedding_inputs
from data_builders.neighbours import nearest
from data_builders.overlap import EvaluationRow, Overlap, OverlapIndex, Shares
from data_builders.texts import check_texts, row_text, texts

CHUNK_ROWS = 2_000


def run(config: DecontaminateConfig) -> None:
    inputs = local_inputs(config.rows, *(file.rows for file in config.evaluation.values()))
    inputs += embedding_inputs(config.embedding)
    with job.Job.open("data_builders.decontaminate", config, inputs) as this:
        if this.done:
            return
        held_out = evaluation_rows(config.evaluation)
        index = OverlapIndex(held_out, Shares(config.words, config.renumbered))
        neighbours = None if config.embedding is None else Neighbours(config, config.embedding, held_out)
        ledger, found = Ledger(), Counter[str]()
        rows = track(located_rows(config.rows), count_rows(config.rows), "decontaminate")
        with writing_rows(this.dir / "rows.jsonl") as keep, writing_rows(this.dir / "rejects.jsonl") as reject:
            for number, (row, overlap) in enumerate(overlaps(rows, index, config)):
                if overlap is None and neighbours is not None:
                    overlap = neighbours.overlap(number)
                ledger.rows_in += 1
                if overlap is None:
                    ledger.rows_out += 1
                    keep(row)
                    continue
                ledger.drop(overlap.method)
                found[overlap.row.source] += 1
                reject(row | {"contamination": evidence(overlap)})
        ledger.write(this.dir / "ledger.json")
        this.finish(
            {
                "rows.in": ledger.rows_in,
                "rows.out": ledger.rows_out,
                **ledger.dropped_metrics(),
                **{f"found.{source}": found[source] for source in config.evaluation},
                **({} if neighbours is None else {"embedding.truncated": neighbours.truncated}),
            }
        )


def evaluation_rows(files: dict[str, EvaluationFileConfig]) -> list[EvaluationRow]:
    """The rows of all evaluation files; a row without an `id` has its place for one."""
    return [
        EvaluationRow(source, str(row.get("id", where.removeprefix(file.rows))), row_text(row, where, file.column))
        for source, file in files.items()
        for where, row in located_rows(file.rows)
    ]


def overlaps(
    rows: Iterable[tuple[str, Row]], index: OverlapIndex, config: DecontaminateConfig
) -> Iterator[tuple[Row, Overlap | None]]:
    """Each row with what it repeats, in order; several processes search."""

    def text(located: tuple[str, Row]) -> str:
        where, row = located
        return row_text(row, where, config.column, config.turns)

    with Processes(config.workers or os.cpu_count() or 1, OverlapIndex.search, index) as processes:
        for (_, row), overlap in processes.map_each(rows, text, CHUNK_ROWS):
            yield row, overlap


class Neighbours:
    """For each row, by its number, the evaluation row whose embedding is nearest, where it is near enough."""

    def __init__(
        self, config: DecontaminateConfig, embedding: EmbeddingNeighboursConfig, held_out: Sequence[EvaluationRow]
    ) -> None:
        self._least, self._held_out = embedding.similarity, held_out
        others = embedded([row.text for row in held_out], embedding)
        rows = embedded(texts(config.rows, config.column, config.turns), embedding)
        self._nearest = nearest(rows.vectors_ND, others.vectors_ND)
        self.truncated = int(rows.truncated_N.sum() + others.truncated_N.sum())

    def overlap(self, number: int) -> Overlap | None:
        similarity = float(self._nearest.similarity_N[number])
        if similarity < self._least:
            return None
        row = self._held_out[self._nearest.row_N[number]]
        return Overlap(row, "embedding", similarity, row.text)


def evidence(overlap: Overlap) -> Row:
    """What a rejected row says of the evaluation row that it repeats."""
    row = overlap.row
    return {
        "source": row.source,
        "id": row.id,
        "text": row.text,
        "method": overlap.method,
        "share": round(overlap.share, 4),
        "evidence": overlap.evidence,
    }


def plan(config: DecontaminateConfig) -> list[str]:
    check_texts(config.rows, config.column, config.turns)
    for file in config.evaluation.values():
        check_texts(file.rows, file.column)
    names = ", ".join(f"{name} ({file.rows})" for name, file in config.evaluation.items())
    lines = [f"{config.rows} without what repeats {names}"]
    if config.embedding is not None:
        check_embedding(config.embedding)
        lines.append(f"and what has a cosine of {config.embedding.similarity:g} with it by {config.embedding.model}")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    return job.main(DecontaminateConfig, run, plan, argv)


if __name__ == "__main__":
    raise SystemExit(main())
