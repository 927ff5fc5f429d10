"""SFT rows and prompts, from questions with answers in the formats of gsm8k, aqua and MATH (alignment/questions.py).

    python -m data_builders.questions --config configs/data/gsm8k-train.yaml

Writes sft.jsonl (rows with `messages`; the final answer is boxed, gsm8k's calculator marks <<...>> are taken out),
prompts.jsonl (rows with `prompt`, `answer` and, for aqua, `options`; none of them in sft.jsonl; questions without a
worked answer are all here), rejects.jsonl (each row with its reason) and ledger.json.
"""

import random
from collections.abc import Sequence

from alignment import job
from alignment.errors import UserError
from alignment.questions import NOT_VERIFIED, Question, check_columns, read_ids, read_questions
from alignment.rows import Row, first_rows, write_rows
from data_builders.config import QuestionsConfig


def run(config: QuestionsConfig) -> None:
    with job.Job.open("data_builders.questions", config, config.inputs()) as this:
        if this.done:
            return
        found = read_questions(config)
        without_working = {number for number, question in enumerate(found.kept) if not question.working}
        aside = set_aside(len(found.kept), config) | without_working
        write_rows(this.dir / "sft.jsonl", (sft_row(q) for i, q in enumerate(found.kept) if i not in aside))
        write_rows(this.dir / "prompts.jsonl", (q.prompt_row() for i, q in enumerate(found.kept) if i in aside))
        write_rows(this.dir / "rejects.jsonl", found.rejected.values())
        found.ledger.write(this.dir / "ledger.json")
        unverified = found.ledger.dropped[NOT_VERIFIED]
        this.finish(
            {
                "rows.in": found.ledger.rows_in,
                "rows.sft": len(found.kept) - len(aside),
                "rows.prompts": len(aside),
                "rows.not_verified": unverified,
                "rows.rejected": len(found.rejected) - unverified,
            }
        )


def set_aside(count: int, config: QuestionsConfig) -> set[int]:
    """Which of the kept rows become prompts."""
    if config.prompts == "all":
        return set(range(count))
    if config.prompts > count:
        raise UserError(f"prompts: {config.prompts} wanted, but {config.rows} gives {count} rows")
    return set(random.Random(config.seed).sample(range(count), config.prompts))


def sft_row(question: Question) -> Row:
    answer = f"{question.working}\nAnswer: \\boxed{{{question.answer}}}"
    return question.head() | {"messages": [question.message(), {"role": "assistant", "content": answer}]}


def plan(config: QuestionsConfig) -> list[str]:
    for number, row in enumerate(first_rows(config.rows, "any"), start=1):
        check_columns(config.dataset, row, f"{config.rows} row {number}")
    chosen = "" if config.verified_ids is None else f", {len(read_ids(config.verified_ids))} verified"
    return [f"{config.rows}: {config.prompts} prompts, the rest SFT rows{chosen}"]


def main(argv: Sequence[str] | None = None) -> int:
    return job.main(QuestionsConfig, run, plan, argv)


if __name__ == "__main__":
    raise SystemExit(main())
