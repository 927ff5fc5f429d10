"""Rows that think before they answer, made from queries with known answers.

    python -m data_builders.long_cot --config configs/data/long_cot.yaml

1. The model that is to learn answers every query several times; queries whose pass rate lies in [alpha, beta] are
   kept (data_builders.window).
2. A teacher answers those, thinking first; an answer is good if it is whole, its summary states the right answer and
   is in the query's language (data_builders.teacher).
3. Good answers become rows, with a system prompt that asks for thinking.

Writes rows.jsonl (rows with `messages`), rejects.jsonl (each query without a row, with the reason, and the reason of
each of the teacher's samples), ledger.json, rollouts/ and teacher/ (all samples). A killed run goes on where it was.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from alignment import chat, job, models
from alignment.config import ModelConfig
from alignment.errors import UserError
from alignment.evaluate import check_room
from alignment.fingerprint import text_hash
from alignment.languages import detector
from alignment.ledger import Ledger
from alignment.progress import track
from alignment.rollout import engine_inputs, place
from alignment.rollout.overlap import overlapped
from alignment.rollout.samples import engine_metrics
from alignment.rollout.sampling import Chunk
from alignment.rows import Row, first_rows, local_inputs, read_rows, writing_rows
from alignment.thinking import check_switch
from alignment.verify import Verifier
from data_builders.asking import asking, check_teacher, teacher_inputs
from data_builders.config import LongCoTConfig, TeacherConfig
from data_builders.teacher import Answers, Judge, Judged, choose, opens
from data_builders.window import roll_out

logger = logging.getLogger(__name__)

NO_LESSON = "no good answer by the teacher"


def run(config: LongCoTConfig) -> None:
    inputs = local_inputs(*(source.rows for source in config.sources.values()))
    inputs += engine_inputs(config.rollouts.model, config.rollouts.engine) + teacher_inputs(config.teacher)
    with job.Job.open("data_builders.long_cot", config, list(dict.fromkeys(inputs))) as this:
        if this.done:
            return
        account = roll_out(config, this.dir / "rollouts")
        with writing_rows(this.dir / "rows.jsonl") as keep, writing_rows(this.dir / "rejects.jsonl") as reject:
            writer = Writer(config, account.ledger, keep, reject)
            writer.add_rejects(this.dir / "rollouts" / "rejects.jsonl")
            numbers = teach(config, this.dir, account.ledger.rows_out, writer)
        writer.ledger.write(this.dir / "ledger.json")
        this.finish(account.as_metrics() | writer.as_metrics() | {f"teacher.{key}": n for key, n in numbers.items()})


def teach(config: LongCoTConfig, folder: Path, queries: int, writer: "Writer") -> dict[str, int]:
    """Have the kept queries answered, and give what is judged to `writer`. Returns counts of the samples."""
    if queries == 0:
        logger.warning("no query has a pass rate in [%g, %g]: nothing to teach", config.alpha, config.beta)
        return {}
    student = models.load_tokenizer(ModelConfig(path=config.rollouts.model))
    prompts = (asked(row, config.teacher) for row in read_rows(folder / "rollouts" / "queries.jsonl", "prompt"))
    counts: Counter[str] = Counter()
    with Verifier() as verifier:
        judge = Judge(verifier, detector(config.languages), config.languages, student, opened=opened(config.teacher))
        chunks = overlapped(answered(config, prompts, folder / "teacher", counts), judge)
        for judged in track(chunks, queries, "teacher", len):
            for answers in judged:
                writer.add(answers)
    return {**judge.counts, **counts}


def asked(query: Row, teacher: TeacherConfig) -> Row:
    """The prompt that the teacher gets, with its `query`."""
    switch = {} if teacher.enable_thinking is None else {"enable_thinking": teacher.enable_thinking}
    return {
        "id": query["id"],
        "prompt": in_system_turn(query["prompt"], teacher.system_prompt or ""),
        "chat_template_kwargs": switch,
        "query": query,
    }


def opened(teacher: TeacherConfig) -> bool:
    """Whether answers may begin inside the thinking: as the template has it; of servers it is not known."""
    if teacher.endpoints:
        return True
    prompt = asked({"id": "", "prompt": [{"role": "user", "content": "1 + 1?"}]}, teacher)
    return opens(models.load_tokenizer(ModelConfig(path=teacher.model)), prompt)


def answered(config: LongCoTConfig, prompts: Iterator[Row], folder: Path, counts: Counter[str]) -> Iterator[Chunk]:
    """The teacher's samples, and how often which server failed and which adapter was asked."""
    with asking(config.teacher, prompts, folder, config.seed) as (teacher, chunks):
        yield from chunks
        counts.update(engine_metrics(teacher))


class Writer:
    """Rows and rejects, and the account of every query and of every token that the teacher wrote."""

    def __init__(
        self, config: LongCoTConfig, ledger: Ledger, keep: Callable[[Row], None], reject: Callable[[Row], None]
    ) -> None:
        """`ledger` is of the queries so far; those that are to be taught are neither kept nor dropped yet."""
        self._config, self._keep, self._reject = config, keep, reject
        self.ledger = Ledger(rows_in=ledger.rows_in, dropped=Counter(ledger.dropped))
        self._by_language: Counter[str] = Counter()
        self._samples: Counter[str] = Counter()
        self._lessons: list[Judged] = []

    def add_rejects(self, file: Path) -> None:
        """Queries that are not taught; they are in the ledger."""
        for row in read_rows(file) if file.stat().st_size else ():
            self._count(row.get("language"), f"dropped.{row['reason']}")
            self._reject(row)

    def add(self, answers: Answers) -> None:
        samples = answers.samples or []
        lessons = choose(samples, self._config.keep)
        tokens, trained = (sum(sample.tokens for sample in part) for part in (samples, lessons))
        self._samples.update(sample.reason or "good" for sample in samples)
        self.ledger.tokens_in += tokens
        self.ledger.tokens_trained += trained
        if not lessons:
            self._drop(answers, "prompt too long for the teacher" if answers.samples is None else NO_LESSON, tokens)
            return
        self.ledger.rows_out += 1
        self.ledger.tokens_dropped += tokens - trained
        self._lessons += lessons
        for lesson in lessons:
            self._count(answers.language, "rows")
            self._keep(training_row(answers, lesson, self._config))

    def as_metrics(self) -> dict[str, float | int]:
        thinking, summary = (
            [getattr(one, f"{part}_tokens") for one in self._lessons] for part in ("thinking", "summary")
        )
        return {
            "rows": len(self._lessons),
            "queries.kept": self.ledger.rows_out,
            **self.ledger.dropped_metrics(),
            **{f"teacher.samples.{_key(reason)}": count for reason, count in sorted(self._samples.items())},
            **lengths("thinking", thinking),
            **lengths("summary", summary),
            **{f"language.{name}": count for name, count in sorted(self._by_language.items())},
        }

    def _drop(self, answers: Answers, reason: str, tokens: int) -> None:
        self.ledger.drop(reason, tokens)
        self._count(answers.language, f"dropped.{reason}")
        reasons = [sample.reason for sample in answers.samples or ()]
        self._reject(answers.query | {"reason": reason, "samples": reasons})

    def _count(self, language: str | None, what: str) -> None:
        self._by_language[f"{language or 'unknown'}.{_key(what)}"] += 1


def training_row(answers: Answers, lesson: Judged, config: LongCoTConfig) -> Row:
    """A row with `messages`; it keeps what the query says of itself but its prompt."""
    query = answers.query
    name = f"{query['id']}/{lesson.index}" if config.keep == "all" else query["id"]
    system = drawn_prompt(name, config)
    kept = {key: value for key, value in query.items() if key != "prompt"}
    return {
        **kept,
        "id": name,
        **({"language": answers.language} if answers.language else {}),
        "messages": [
            *in_system_turn(query["prompt"], system),
            {"role": "assistant", "content": lesson.text},
        ],
        "teacher": config.teacher.model,
        "sample": lesson.index,
        "kept": config.keep,
        "thinking_tokens": lesson.thinking_tokens,
        "summary_tokens": lesson.summary_tokens,
    }


def drawn_prompt(name: str, config: LongCoTConfig) -> str:
    """The system prompt of a row, by the seed and its id."""
    prompts = system_prompts(config)
    return prompts[int(text_hash(f"{config.seed}/{name}")[:8], 16) % len(prompts)]


def system_prompts(config: LongCoTConfig) -> list[str]:
    return config.system_prompts or [chat.THINKING_PROMPT]


def in_system_turn(messages: Sequence[Row], text: str) -> list[Row]:
    """The conversation with `text` in its system turn, at the end of what stands there."""
    first = messages[0]
    if not text or (first["role"] == "system" and text in first["content"]):
        return list(messages)
    if first["role"] == "system":
        return [first | {"content": f"{first['content']}\n\n{text}"}, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]


def lengths(name: str, tokens: Sequence[int]) -> dict[str, float | int]:
    """Mean, median, 95th percentile and maximum of the tokens of a part; nothing where there is no row."""
    if not tokens:
        return {}
    p50, p95 = np.percentile(tokens, [50, 95])
    return {
        f"{name}.tokens.mean": round(float(np.mean(tokens)), 2),
        f"{name}.tokens.p50": round(float(p50), 2),
        f"{name}.tokens.p95": round(float(p95), 2),
        f"{name}.tokens.max": max(tokens),
    }


def _key(words: str) -> str:
    return words.replace(" ", "_")


def plan(config: LongCoTConfig) -> list[str]:
    rollouts, teacher = config.rollouts, config.teacher
    models.check_model(ModelConfig(path=rollouts.model))
    check_room(rollouts.engine, rollouts.sampling)
    where = check_teacher(teacher)
    for name, source in config.sources.items():
        if all(row.get("answer") is None for row in first_rows(source.rows, "prompt")):
            raise UserError(f"sources.{name}: {source.rows}: the first rows have no 'answer' to verify samples against")
    detector(config.languages)
    student = models.load_tokenizer(ModelConfig(path=rollouts.model))
    if rollouts.mode is not None:
        check_switch(student)
    agreeing = [number for number, text in enumerate(system_prompts(config), start=1) if agrees(student, text)]
    if not agreeing:
        logger.warning("system_prompts: none is what the chat template of %s makes of enable_thinking", rollouts.model)
    return [
        f"{rollouts.sampling.n} rollouts a query of {rollouts.model}, drawn {place(rollouts.engine)}; pass rates in "
        f"[{config.alpha:g}, {config.beta:g}] are kept",
        f"{teacher.sampling.n} answers a query of {teacher.model}, drawn {where}; kept: {config.keep}",
        f"system prompts: {len(system_prompts(config))}; the same as enable_thinking: {agreeing or 'none'}",
    ]


def agrees(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    """Whether a row with this system prompt reads as its prompt does with the template's switch `enable_thinking`."""
    prompt = [{"role": "user", "content": "1 + 1?"}]
    switched = chat.render_prompt(tokenizer, prompt, enable_thinking=True)
    return chat.render_prompt(tokenizer, in_system_turn(prompt, text)) == switched


def main(argv: Sequence[str] | None = None) -> int:
    return job.main(LongCoTConfig, run, plan, argv)


if __name__ == "__main__":
    raise SystemExit(main())
