"""Rows without those that repeat a row of an evaluation set: as it is, reworded, or with other numbers.

    python -m data_builders.decontaminate --config configs/data/decontaminate.yaml

Writes rows.jsonl (the rows that stay, untouched), rejects.jsonl (the others, each with `contamination`: the evaluation
row, the method that found it, the share of it and the longest run of words that both hold) and ledger.json. The method
is that of data_builders.overlap. It is deterministic, so a killed run starts over.
"""

import os
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

from alignment import job
from alignment.ledger import Ledger
from alignment.processes import Processes
from alignment.progress import track
from alignment.rows import Row, count_rows, first_rows, local_inputs, located_rows, writing_rows
from data_builders.config import DecontaminateConfig, EvaluationFileConfig
from data_builders.overlap import EvaluationRow, Overlap, OverlapIndex, Shares
from data_builders.texts import row_text

CHUNK_ROWS = 2_000


def run(config: DecontaminateConfig) -> None:
    inputs = local_inputs(config.rows, *(file.rows for file in config.evaluation.values()))
    with job.Job.open("data_builders.decontaminate", config, inputs) as this:
        if this.done:
            return
        index = OverlapIndex(evaluation_rows(config.evaluation), Shares(config.words, config.renumbered))
        ledger, found = Ledger(), Counter[str]()
        rows = track(located_rows(config.rows), count_rows(config.rows), "decontaminate")
        with writing_rows(this.dir / "rows.jsonl") as keep, writing_rows(this.dir / "rejects.jsonl") as reject:
            for row, overlap in overlaps(rows, index, config):
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
    searched: deque[list[Row]] = deque()

    def texts() -> Iterator[list[str]]:
        rest = iter(rows)
        while chunk := list(islice(rest, CHUNK_ROWS)):
            searched.append([row for _, row in chunk])
            yield [row_text(row, where, config.column, config.turns) for where, row in chunk]

    with Processes(config.workers or os.cpu_count() or 1, OverlapIndex.search, index) as processes:
        for found in processes.map(texts()):
            yield from zip(searched.popleft(), found, strict=True)


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
    for number, row in enumerate(first_rows(config.rows, "any"), start=1):
        row_text(row, f"{config.rows} row {number}", config.column, config.turns)
    for file in config.evaluation.values():
        for number, row in enumerate(first_rows(file.rows, "any"), start=1):
            row_text(row, f"{file.rows} row {number}", file.column)
    names = ", ".join(f"{name} ({file.rows})" for name, file in config.evaluation.items())
    return [f"{config.rows} without what repeats {names}"]


def main(argv: Sequence[str] | None = None) -> int:
    return job.main(DecontaminateConfig, run, plan, argv)


if __name__ == "__main__":
    raise SystemExit(main())
