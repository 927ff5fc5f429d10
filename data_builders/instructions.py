"""E-commerce instructions of twelve families in several languages, from tables of products, reviews, pairs, queries.

    python -m data_builders.instructions --config configs/data/instructions.yaml

Drafts are drawn for each family and language (data_builders.ecommerce), reworded, answered and given thinking by models
where the config names some, checked, and deduplicated; the first of each cell fill its quota. Writes rows.jsonl (rows
with `messages`, and `answer` where it can be verified), rejects.jsonl (every other draft with its reason), report.md
(families by languages) and ledger.json. What models write is stored, and all else follows from the tables and the seed,
so that a killed run ends with the same rows.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from alignment import atomic, chat, job
from alignment.errors import UserError, did_you_mean
from alignment.fingerprint import text_hash
from alignment.languages import Detector, detector
from alignment.ledger import Ledger
from alignment.rows import Row, local_inputs, read_rows, write_rows
from alignment.verify import Verdict, Verifier
from data_builders import deduplicate
from data_builders.asking import teacher_inputs
from data_builders.config import DeduplicateConfig
from data_builders.ecommerce import agents, quality, reasoning, rewriting
from data_builders.ecommerce.config import InstructionsConfig, WriterConfig
from data_builders.ecommerce.drafts import Cell, Draft, draw_drafts, quotas
from data_builders.ecommerce.families import SHARES, missing, shares_of, tasks_for
from data_builders.ecommerce.report import table
from data_builders.ecommerce.tables import columns_of, read_tables
from data_builders.embeddings import check_embedding, embedding_inputs
from data_builders.synthesis.locales import LANGUAGES
from data_builders.writers import check_writer

BEYOND = "beyond the quota"


@dataclass
class Drafts:
    """The drafts, why some have been rejected so far (id -> reason), and the counts of the models' part."""

    all: list[Draft]
    rejected: dict[str, str] = field(default_factory=dict)
    counts: dict[str, Counter[str]] = field(default_factory=dict)

    @property
    def left(self) -> list[Draft]:
        return [draft for draft in self.all if draft.id not in self.rejected]


def run(config: InstructionsConfig) -> None:
    inputs = local_inputs(*sources(config), *embedding_inputs(config.embedding))
    inputs += [folder for writer in writers(config).values() for folder in teacher_inputs(writer)]
    with job.Job.open("data_builders.instructions", config, list(dict.fromkeys(inputs))) as this:
        if this.done:
            return
        wanted = cells(config)
        drafts = Drafts(drawn(config, wanted))
        identify = detector(LANGUAGES)
        ask_models(drafts, config, this.dir / "written", identify)
        check(drafts, config, identify)
        write_rows(this.dir / "passed.jsonl", map(row_of, drafts.left))
        kept, duplicates = without_duplicates(config, this.dir)
        filled = fill(kept, wanted)
        ledger = write(this.dir, drafts, filled, duplicates, config.seed)
        achieved = Counter(cell_of(row) for row in filled)
        report = table({"quota": wanted, "rows": achieved})
        atomic.write_text(this.dir / "report.md", report)
        print(report)
        this.finish(metrics(ledger, drafts, wanted, achieved))


def cells(config: InstructionsConfig) -> dict[Cell, int]:
    """How many rows each family is to have in each language."""
    families = shares_of(config.families, columns_of(config.tables), config.mixture_of_agents is not None)
    languages = {code: config.languages[code] for code in LANGUAGES if config.languages.get(code, 0) > 0}
    shares = {(family, code): families[family] * share for family in families for code, share in languages.items()}
    return quotas(config.rows, shares)


def drawn(config: InstructionsConfig, wanted: Mapping[Cell, int]) -> list[Draft]:
    tables = read_tables(config.tables)
    tasks = tasks_for(columns_of(config.tables), config.mixture_of_agents is not None)
    return [
        draft
        for cell, quota in wanted.items()
        for draft in draw_drafts(
            tables,
            tasks,
            cell,
            quota + math.ceil(quota * config.spare),
            seed=config.seed,
            cross_lingual=config.cross_lingual,
        )
    ]


def ask_models(drafts: Drafts, config: InstructionsConfig, folder: Path, identify: Detector) -> None:
    """Have models reword, answer and think, each where the config says so."""
    if config.rewrite is not None:
        drafts.all, drafts.counts["rewrite"] = rewriting.rewrite(
            drafts.all, config.rewrite, folder / "rewrite", config.seed, identify
        )
    if config.mixture_of_agents is not None:
        drafts.all, failed, drafts.counts["mixture_of_agents"] = agents.answer(
            drafts.all, config.mixture_of_agents, folder / "mixture_of_agents", config.seed
        )
        drafts.rejected |= failed
    if config.chain_of_thought is not None:
        drafts.all, drafts.counts["chain_of_thought"] = reasoning.think(
            drafts.all, config.chain_of_thought, folder / "teacher", config.seed, identify
        )


def check(drafts: Drafts, config: InstructionsConfig, identify: Detector) -> None:
    """Reject what is no good, and what does not state its answer."""
    for draft in drafts.left:
        reason = quality.reject(draft, config.longest, identify)
        if reason is not None:
            drafts.rejected[draft.id] = reason
    with Verifier() as verifier:
        left = drafts.left
        for draft, verdict in zip(left, quality.verdicts(left, verifier), strict=True):
            if verdict not in (None, Verdict.CORRECT):
                drafts.rejected[draft.id] = f"answer {verdict}"


def without_duplicates(config: InstructionsConfig, folder: Path) -> tuple[list[Row], list[Row]]:
    """Of passed.jsonl the rows that stay, and those that repeat one of them, each with `duplicate`."""
    if not (folder / "passed.jsonl").stat().st_size:
        return [], []
    found = folder / "deduplicated"
    deduplicate.run(
        DeduplicateConfig(
            output_dir=found,
            seed=config.seed,
            rows=str(folder / "passed.jsonl"),
            near=config.near,
            embedding=config.embedding,
        )
    )
    repeated = list(read_rows(found / "rejects.jsonl")) if (found / "rejects.jsonl").stat().st_size else []
    return list(read_rows(found / "rows.jsonl")), repeated


def fill(rows: Iterable[Row], wanted: Mapping[Cell, int]) -> list[Row]:
    """The first rows of each cell, as many as it is to have."""
    taken: Counter[Cell] = Counter()
    found = []
    for row in rows:
        if taken[cell_of(row)] < wanted[cell_of(row)]:
            taken[cell_of(row)] += 1
            found.append(row)
    return found


def write(folder: Path, drafts: Drafts, filled: Sequence[Row], duplicates: Sequence[Row], seed: int) -> Ledger:
    """Rows in a drawn order, rejects in the order of the drafts, and the account of both."""
    write_rows(folder / "rows.jsonl", sorted(filled, key=lambda row: text_hash(f"{seed}/order/{row['id']}")))
    repeated = {row["id"]: row["duplicate"] for row in duplicates}
    kept = {row["id"] for row in filled}
    ledger = Ledger(rows_in=len(drafts.all), rows_out=len(filled))

    def rejects() -> Iterator[Row]:
        for draft in drafts.all:
            if draft.id in kept:
                continue
            duplicate = repeated.get(draft.id)
            reason = drafts.rejected.get(draft.id) or (f"duplicate {duplicate['method']}" if duplicate else BEYOND)
            ledger.drop(reason)
            yield row_of(draft) | {"reason": reason} | ({"duplicate": duplicate} if duplicate else {})

    write_rows(folder / "rejects.jsonl", rejects())
    ledger.write(folder / "ledger.json")
    return ledger


def row_of(draft: Draft) -> Row:
    thinking = [{"role": "system", "content": chat.THINKING_PROMPT}] if draft.think else []
    thought = f"{chat.THINK_START}\n{draft.think}\n{chat.THINK_END}\n" if draft.think else ""
    question = {"role": "user", "content": draft.question}
    reply = {"role": "assistant", "content": thought + (draft.reply or "")}
    return draft.head() | {"messages": [*thinking, question, reply]}


def cell_of(row: Row) -> Cell:
    return row["family"], row["language"]


def metrics(
    ledger: Ledger, drafts: Drafts, wanted: Mapping[Cell, int], achieved: Mapping[Cell, int]
) -> dict[str, float | int]:
    by_family, by_language = defaultdict[str, int](int), defaultdict[str, int](int)
    for (family, language), count in achieved.items():
        by_family[family] += count
        by_language[language] += count
    return {
        "drafts": ledger.rows_in,
        "rows.out": ledger.rows_out,
        "rows.short": sum(quota - achieved.get(cell, 0) for cell, quota in wanted.items()),
        **ledger.dropped_metrics(),
        **{f"rows.{name}": count for name, count in by_family.items()},
        **{f"rows.{name}": count for name, count in by_language.items()},
        **{f"rows.{family}.{language}": achieved.get((family, language), 0) for family, language in wanted},
        **{
            f"{part}.{reason.replace(': ', '.').replace(' ', '_')}": count
            for part, counts in drafts.counts.items()
            for reason, count in sorted(counts.items())
        },
    }


def sources(config: InstructionsConfig) -> list[str]:
    tables = config.tables
    return [one.rows for kind in (tables.products, tables.reviews, tables.pairs, tables.queries) for one in kind]


def writers(config: InstructionsConfig) -> dict[str, WriterConfig]:
    """Every model that writes, by its key."""
    found = {}
    if config.rewrite is not None:
        found["rewrite.writer"] = config.rewrite.writer
    if config.mixture_of_agents is not None:
        proposers = config.mixture_of_agents.proposers
        found |= {f"mixture_of_agents.proposers.{number}": writer for number, writer in enumerate(proposers)}
        found["mixture_of_agents.aggregator"] = config.mixture_of_agents.aggregator
    if config.chain_of_thought is not None and config.chain_of_thought.teacher is not None:
        found["chain_of_thought.teacher"] = config.chain_of_thought.teacher
    return found


def plan(config: InstructionsConfig) -> list[str]:
    for code in config.languages:
        if code not in LANGUAGES:
            raise UserError(f"languages: {code!r} has no templates{did_you_mean(code, LANGUAGES)}")
    wanted = cells(config)
    held = columns_of(config.tables)
    written = config.mixture_of_agents is not None
    families = list(dict.fromkeys(family for family, _ in wanted))
    off = [f"left out: {family}: {missing(family, held, written)}" for family in SHARES if family not in families]
    asked = [f"{key}: {check_writer(writer)}" for key, writer in writers(config).items()]
    if config.embedding is not None:
        check_embedding(config.embedding)
    return [
        f"{config.rows} rows of {len(families)} families in {', '.join(config.languages)}",
        *(off if config.families is None else []),
        *asked,
        table({"quota": wanted}),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    return job.main(InstructionsConfig, run, plan, argv)


if __name__ == "__main__":
    raise SystemExit(main())
