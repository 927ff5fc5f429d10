"""Rows without those that repeat a row of an evaluation set: as it is, reworded, or with other numbers.

    python -m data_builders.decontaminate --config configs/data/decontaminate.yaml

Writes rows.jsonl (the rows that stay, untouched), rejects.jsonl (the others, each with `contamination`: the evaluation
row, the method that found it, the share of it and the longest run of words that both hold) and ledger.json. The method
is that of data_builders.overlap. It is deterministic, so a killed run starts over.
"""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from alignment import job
from alignment.ledger import Ledger
from alignment.processes import Processes
from alignment.progress import track
from alignment.rows import Row, count_rows, local_inputs, located_rows, writing_rows
from data_builders.config import DecontaminateConfig, EvaluationFileConfig
from data_builders.overlap import EvaluationRow, Overlap, OverlapIndex, Shares
from data_builders.texts import check_texts, row_text

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

    def text(located: tuple[str, Row]) -> str:
        where, row = located
        return row_text(row, where, config.column, config.turns)

    with Processes(config.workers or os.cpu_count() or 1, OverlapIndex.search, index) as processes:
        for (_, row), overlap in processes.map_each(rows, text, CHUNK_ROWS):
            yield row, overlap


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
    return [f"{config.rows} without what repeats {names}"]


def main(argv: Sequence[str] | None = None) -> int:
    return job.main(DecontaminateConfig, run, plan, argv)


if __name__ == "__main__":
    raise SystemExit(main())
