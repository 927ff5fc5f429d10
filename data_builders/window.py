"""Queries that the model sometimes answers: rolled out, verified, and kept where the pass rate lies in a window.

Writes queries.jsonl (each with its `pass_rate`), rejects.jsonl and, last, account.json into one folder, with samples/
and graded/, in which a killed run finds what it had.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alignment import atomic, models
from alignment.config import ModelConfig
from alignment.grading import GradedSample
from alignment.ledger import Ledger
from alignment.rollout import open_engine
from alignment.rollout.overlap import overlapped
from alignment.rollout.samples import engine_metrics
from alignment.rollout.sampling import sample
from alignment.rows import Row, writing_rows
from alignment.tally import Tally
from alignment.thinking import in_mode
from alignment.verify import Verdict, verdict_metrics, warn_of_alarms
from data_builders.config import LongCoTConfig
from data_builders.judge import judging
from data_builders.sources import draw_prompts, expected_prompts

ACCOUNT = "account.json"
UNKNOWN = (Verdict.TIMEOUT, Verdict.ERROR)  # they say nothing of the model


@dataclass(frozen=True)
class Outside:
    """Why a query is not kept."""

    reason: str


@dataclass
class Account:
    """What became of the queries, kept on disk."""

    ledger: Ledger
    rates: Counter[str] = field(default_factory=Counter)  # number of correct rollouts -> queries
    metrics: dict[str, Any] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        self.ledger.check()
        atomic.write_json(path, {"ledger": self.ledger.as_dict(), "rates": self.rates, "metrics": self.metrics})

    def judged(
        self, query: Row, samples: Sequence[GradedSample] | None, alpha: float, beta: float
    ) -> tuple[Row, str | None]:
        """The query with what is known of it now, and why it is not kept, if it is not."""
        row = {key: value for key, value in query.items() if key != "chat_template_kwargs"}
        if samples is None:
            return row, self.drop("prompt too long")
        self.rates[str(sum(sample.correct for sample in samples))] += 1
        verdicts = [str(sample.verdict) for sample in samples]
        rate = judge_rate(verdicts, alpha, beta)
        if isinstance(rate, Outside):
            return row | {"verdicts": dict(Counter(verdicts))}, self.drop(rate.reason)
        self.ledger.rows_in += 1
        self.ledger.rows_out += 1
        return row | {"pass_rate": round(rate, 4)}, None

    def drop(self, reason: str) -> str:
        self.ledger.rows_in += 1
        self.ledger.drop(reason)
        return reason

    def as_metrics(self) -> dict[str, float | int]:
        rates = sorted(self.rates.items(), key=lambda rate: int(rate[0]))
        return {
            "queries": self.ledger.rows_in,
            "queries.in_window": self.ledger.rows_out,
            **{f"queries.correct_{count}": queries for count, queries in rates},
            **{f"rollouts.{name}": value for name, value in self.metrics.items()},
        }

    @classmethod
    def read(cls, path: Path) -> "Account":
        found = json.loads(path.read_text(encoding="utf-8"))
        ledger = Ledger(**(found["ledger"] | {"dropped": Counter(found["ledger"]["dropped"])}))
        return cls(ledger, Counter(found["rates"]), found["metrics"])


def judge_rate(verdicts: Sequence[str], alpha: float, beta: float) -> float | Outside:
    """The share of the rollouts that is correct, if it lies in [alpha, beta].

    A rollout without an answer did not pass. One that could not be verified may be either: the query is kept if the
    rate lies in the window in both cases, and its rate is that of the others.
    """
    counts = Counter(verdicts)
    if counts[Verdict.BAD_GOLD]:
        return Outside("bad gold")
    n, passed, unknown = len(verdicts), counts[Verdict.CORRECT], sum(counts[verdict] for verdict in UNKNOWN)
    if (passed + unknown) / n < alpha:
        return Outside("no rollout has an answer" if counts[Verdict.NO_ANSWER] == n else "too hard")
    if passed / n > beta:
        return Outside("too easy")
    if unknown == n or passed / n < alpha or (passed + unknown) / n > beta:
        return Outside("timeout" if counts[Verdict.TIMEOUT] else "error")
    return passed / (n - unknown)


def roll_out(config: LongCoTConfig, folder: Path) -> Account:
    """Write the queries to teach, and those that are not, into `folder`; what is there already is kept."""
    if (folder / ACCOUNT).exists():
        return Account.read(folder / ACCOUNT)
    account, tally, unanswered = Account(Ledger()), Tally(), list[Row]()
    with writing_rows(folder / "queries.jsonl") as keep, writing_rows(folder / "rejects.jsonl") as reject:
        for query, samples in _rolled_out(config, folder, account, tally, unanswered):
            row, reason = account.judged(query, samples, config.alpha, config.beta)
            if reason is None:
                keep(row)
            else:
                reject(row | {"reason": reason})
        for row in unanswered:
            account.drop("no gold answer")
            reject(row | {"reason": "no gold answer"})
    warn_of_alarms(str(folder), tally.verdicts)
    account.write(folder / ACCOUNT)
    return account


def _rolled_out(
    config: LongCoTConfig, folder: Path, account: Account, tally: Tally, unanswered: list[Row]
) -> Iterator[tuple[Row, list[GradedSample] | None]]:
    """Each query with its verified rollouts; None where it is too long."""
    source = config.rollouts
    tokenizer = models.load_tokenizer(ModelConfig(path=source.model))
    with (
        open_engine(Path(source.model), source.engine, source.dtype) as engine,
        judging([], 0, tokenizer, folder / "graded") as judge,
    ):
        chunks = sample(
            engine,
            tokenizer,
            _asked(config, account.ledger, unanswered),
            folder / "samples",
            source.sampling,
            seed=config.seed,
            chunk_prompts=source.engine.chunk_prompts,
        )
        for chunk in tally.watch(overlapped(chunks, judge), expected_prompts(config.sources), "rollouts"):
            yield from zip(chunk.prompts, chunk.samples, strict=True)
        account.metrics = {
            "samples": tally.samples,
            "tokens": tally.tokens,
            "cut_off": tally.cut_off,
            "resampled": tally.resampled,
            **verdict_metrics(tally.verdicts),
            **engine_metrics(engine),
        }


def _asked(config: LongCoTConfig, ledger: Ledger, unanswered: list[Row]) -> Iterator[Row]:
    """The queries whose rollouts can be verified, as the model is asked them; the others go to `unanswered`."""
    for query in draw_prompts(config.sources, config.seed, ledger):
        if query.get("answer") is None:
            unanswered.append(query)
        else:
            yield query if config.rollouts.mode is None else in_mode(query, config.rollouts.mode)
