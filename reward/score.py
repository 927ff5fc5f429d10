"""Score answers with a reward model.

    python -m reward.score --config configs/reward/score.yaml
    torchrun --nproc_per_node 8 -m reward.score --config configs/reward/score.yaml       # one GPU for each rank

Reads rows with `prompt` and `completion` (a text) or `completions` (texts); writes the same rows with `score` or
`scores` to rows.jsonl. A row with an answer that is longer than the model reads, or whose score is no finite number,
goes to rejects.jsonl with the reason; ledger.json counts both. Rows are scored in chunks, shared out among the ranks;
a batch holds rows of one chunk only, so what is written depends neither on where a job was killed nor on the ranks.
"""

import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Protocol

import numpy as np
import torch.distributed
from transformers import PreTrainedTokenizerBase

from alignment import chat, job, models
from alignment.config import ModelConfig
from alignment.errors import UserError
from alignment.ledger import Ledger
from alignment.progress import LINE_SECONDS
from alignment.rows import Row, local_inputs, located_rows, read_rows, write_rows
from reward.completions import completions_of
from reward.config import ScoreConfig
from reward.passes import Ids
from reward.scorer import Scorer


class AnyScorer(Protocol):
    """What scores token ids: reward.scorer.Scorer, or reward.vllm_scorer.VLLMScorer."""

    @property
    def context(self) -> int: ...
    @property
    def metrics(self) -> dict[str, float | str]: ...
    def score(self, prompts: Sequence[Ids], completions: Sequence[Ids]) -> list[float]: ...


def run(config: ScoreConfig) -> None:
    with job.Job.open("reward.score", config, local_inputs(config.rows, config.model)) as this, _ranks() as wait:
        wait()  # until the main rank holds the folder
        if this.done:
            return
        total = check_rows(config.rows)
        tokenizer = models.load_tokenizer(ModelConfig(path=config.model))
        with _scorer(config) as scorer:
            chunks = _score_chunks(this, config, scorer, tokenizer, total)
        wait()
        if this.is_main:
            this.finish({**_join(chunks, this.dir), **scorer.metrics})
            shutil.rmtree(this.dir / "chunks")


def check_rows(source: str) -> int:
    """Read all rows before the first is scored: a slip in the last one would cost the work on all others.

    Raises:
        UserError: a row without a prompt or without answers; its file and line are named.
    """
    count = 0
    for where, row in located_rows(source, "prompt"):
        completions_of(row, where)
        count += 1
    return count


def score_rows(rows: Sequence[Row], scorer: AnyScorer, tokenizer: PreTrainedTokenizerBase) -> list[Row]:
    """A record for each row: `row` with its score(s) and no `reason`, or as it was and the reason why it has none.

    `tokens` are those of its answers, each with its prompt; a row that is too long counts none.
    """
    rendered = [
        (
            chat.render_prompt(tokenizer, row["prompt"], **chat.template_options(row)),
            [chat.render_completion(tokenizer, text) for text in texts],
        )
        for row, texts in ((row, completions_of(row, "row")) for row in rows)
    ]
    read = [len(prompt) + max(map(len, answers)) <= scorer.context for prompt, answers in rendered]
    pairs = [(p, answer) for (p, answers), fits in zip(rendered, read, strict=True) if fits for answer in answers]
    scores = iter(scorer.score([prompt for prompt, _ in pairs], [answer for _, answer in pairs]))
    return [
        _record(row, list(islice(scores, len(answers))), sum(len(prompt) + len(answer) for answer in answers))
        if fits
        else {"row": row, "reason": "overlong", "tokens": 0}
        for row, (prompt, answers), fits in zip(rows, rendered, read, strict=True)
    ]


def _record(row: Row, scores: list[float], tokens: int) -> Row:
    if not all(map(math.isfinite, scores)):
        return {"row": row, "reason": "score not finite", "tokens": tokens}
    own = {"scores": scores} if "completions" in row else {"score": scores[0]}
    return {"row": row | own, "reason": None, "tokens": tokens}


@contextmanager
def _scorer(config: ScoreConfig) -> Iterator[AnyScorer]:
    match config.engine:
        case "transformers":
            yield Scorer(Path(config.model), config.batch_tokens)
        case "vllm":
            from reward.vllm_scorer import VLLMScorer  # importing vLLM takes seconds and changes the process

            with VLLMScorer(Path(config.model), config.batch_tokens, config.kv_cache_gib) as scorer:
                yield scorer


def _world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def _ranks() -> Iterator[Callable[[], None]]:
    """Gives what makes each rank of a launch wait for all others, however far apart they are."""
    if _world_size() == 1:
        yield lambda: None
        return
    torch.distributed.init_process_group("gloo", timeout=timedelta(days=30))
    try:
        yield torch.distributed.barrier
    finally:
        torch.distributed.destroy_process_group()


def _score_chunks(
    this: job.Job, config: ScoreConfig, scorer: AnyScorer, tokenizer: PreTrainedTokenizerBase, total: int
) -> list[Path]:
    """Score the chunks of this rank that are not there yet. Returns the paths of all ranks' chunks, in order."""
    chunks: list[Path] = []
    rows = read_rows(config.rows, "prompt")
    pace = Pace(this, total)
    while chunk := list(islice(rows, config.chunk_rows)):
        path = this.dir / "chunks" / f"{len(chunks):06d}.jsonl"
        chunks.append(path)
        if len(chunks) % _world_size() != job.rank() or path.exists():
            pace.skipped(len(chunk))
            continue
        records = score_rows(chunk, scorer, tokenizer)
        write_rows(path, records)
        pace.scored(len(chunk), sum(record["tokens"] for record in records))
    return chunks


class Pace:
    """Says now and then how far this launch is: all ranks are taken to be as fast as this one."""

    def __init__(self, this: job.Job, total: int) -> None:
        self.job, self.total = this, total
        self.passed = self.rows = self.tokens = 0
        self.began = self.said = time.monotonic()

    def skipped(self, rows: int) -> None:
        self.passed += rows

    def scored(self, rows: int, tokens: int) -> None:
        self.passed, self.rows, self.tokens = self.passed + rows, self.rows + rows, self.tokens + tokens
        seconds = (time.monotonic() - self.began) / _world_size()
        speed, left = self.tokens / seconds, (self.total - self.passed) * seconds / self.rows
        self.job.log(rows=self.passed, tokens_per_second=round(speed), seconds_left=round(left))
        if self.job.is_main and time.monotonic() - self.said > LINE_SECONDS:
            self.said = time.monotonic()
            print(
                f"{self.passed:,} of {self.total:,} rows, {speed:,.0f} tokens/s, about {left:,.0f} s left",
                file=sys.stderr,
                flush=True,
            )


def _join(chunks: Sequence[Path], folder: Path) -> dict[str, float | int | None]:
    """Write rows.jsonl, rejects.jsonl and ledger.json from the chunks, one row in memory. Returns the metrics."""
    ledger, scores, tokens = Ledger(), Moments(), 0

    def kept() -> Iterator[Row]:
        nonlocal tokens
        for record in _records(chunks):
            ledger.rows_in += 1
            if record["reason"] is not None:
                ledger.drop(record["reason"])
                continue
            row = record["row"]
            scores.add(row["scores"] if "completions" in row else [row["score"]])
            tokens += record["tokens"]
            yield row

    ledger.rows_out = write_rows(folder / "rows.jsonl", kept())
    write_rows(
        folder / "rejects.jsonl",
        (record["row"] | {"reason": record["reason"]} for record in _records(chunks) if record["reason"] is not None),
    )
    ledger.write(folder / "ledger.json")
    counts = {"rows": ledger.rows_out, **ledger.dropped_metrics(), "completions": scores.count, "tokens": tokens}
    return {**counts, "score.mean": scores.mean, "score.std": scores.std}


def _records(chunks: Sequence[Path]) -> Iterator[Row]:
    return (record for path in chunks for record in read_rows(path))


class Moments:
    """Mean and standard deviation of numbers that come in groups, by the update of Chan, Golub and LeVeque (1983)."""

    def __init__(self) -> None:
        self.count, self._mean, self._squares = 0, 0.0, 0.0

    def add(self, values: Sequence[float]) -> None:
        mean, size = float(np.mean(values)), len(values)
        gap, whole = mean - self._mean, self.count + size
        self._squares += float(np.sum((np.array(values) - mean) ** 2)) + gap**2 * self.count * size / whole
        self._mean += gap * size / whole
        self.count = whole

    @property
    def mean(self) -> float | None:
        return self._mean if self.count else None

    @property
    def std(self) -> float | None:
        return math.sqrt(self._squares / self.count) if self.count else None


def plan(config: ScoreConfig) -> list[str]:
    models.check_model_folder(Path(config.model))
    if config.engine == "vllm" and _world_size() > 1:
        raise UserError("engine: vllm starts its own processes; run the job on one rank, or with engine: transformers")
    for where, row in islice(located_rows(config.rows, "prompt"), 20):
        completions_of(row, where)
    return [f"score {config.rows} with {config.model} ({config.engine}), {config.batch_tokens} tokens a pass"]


def main(argv: Sequence[str] | None = None) -> int:
    return job.main(ScoreConfig, run, plan, argv)


if __name__ == "__main__":
    raise SystemExit(main())
