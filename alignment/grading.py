"""Samples with the verdict of the answer rule beside each: the file that evaluation, pairs and best-of-n read."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from alignment import answers, atomic, verify
from alignment.errors import UserError
from alignment.rollout.sampling import Chunk
from alignment.rollout.store import Completion
from alignment.rows import Row

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("index", pa.int32()),
        ("completion", pa.string()),
        ("token_ids", pa.list_(pa.int32())),
        ("finish_reason", pa.string()),
        ("logprob", pa.float64()),
        ("extracted", pa.string()),
        ("verdict", pa.string()),
        ("score", pa.float64()),
    ]
)


@dataclass(frozen=True)
class GradedSample:
    """One sample: prompt `id`, its number, text, tokens, the answer found in it and the verdict on that answer.

    `verdict` is one of verify.Verdict, or None where the prompt has no known answer; `score` is of a reward model.
    """

    id: str
    index: int
    completion: str
    token_ids: list[int]
    finish_reason: str
    logprob: float
    extracted: str | None
    verdict: str | None
    score: float | None = None

    @property
    def correct(self) -> bool:
        return self.verdict == verify.Verdict.CORRECT


@dataclass(frozen=True)
class GradedChunk:
    """Prompts that were sampled together, and beside each its graded samples; None where it is too long to sample."""

    name: str
    prompts: list[Row]
    samples: list[list[GradedSample] | None]
    resampled: bool = False

    @property
    def flat(self) -> list[GradedSample]:
        return [sample for of_prompt in self.samples if of_prompt for sample in of_prompt]


def grade(chunk: Chunk, verifier: verify.Verifier) -> GradedChunk:
    """A verdict for every sample whose prompt has an `answer`."""
    pairs = [(p, s) for p, of_prompt in zip(chunk.prompts, chunk.samples, strict=True) for s in of_prompt or ()]
    claims = [claim_of(p, s.text, s.finish_reason) for p, s in pairs if p.get("answer") is not None]
    verdicts = iter(verifier.verify_many(claims))
    graded = iter([_graded(p, s, None if p.get("answer") is None else next(verdicts)) for p, s in pairs])
    samples = [None if of_prompt is None else [next(graded) for _ in of_prompt] for of_prompt in chunk.samples]
    return GradedChunk(chunk.name, chunk.prompts, samples, chunk.resampled)


def _graded(prompt: Row, sample: Completion, verdict: str | None) -> GradedSample:
    return GradedSample(
        id=sample.prompt_id,
        index=sample.index,
        completion=sample.text,
        token_ids=sample.token_ids,
        finish_reason=sample.finish_reason,
        logprob=sample.logprob,
        extracted=answer_in(prompt, sample.text, sample.finish_reason),
        verdict=verdict,
    )


@contextmanager
def writing(path: Path) -> Iterator[Callable[[Sequence[GradedSample]], None]]:
    """Inside the block the samples given to the function go to `path`, which is whole or absent after it."""
    with atomic.replacing(path) as temporary, pq.ParquetWriter(temporary, SCHEMA, compression="zstd") as writer:
        yield lambda samples: writer.write_table(pa.Table.from_pylist([asdict(s) for s in samples], SCHEMA))


def read_graded(path: Path) -> Iterator[tuple[str, list[GradedSample]]]:
    """Each prompt's id and samples, in the order of a file or of a folder's files; few prompts are in memory at once.

    Raises:
        UserError: no such file, or a column is missing.
    """
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    for file in files:
        if not file.is_file():
            raise UserError(f"{file}: no such file of graded samples")
        rows = (GradedSample(**row) for row in _rows(file))
        for name, group in groupby(rows, key=lambda row: row.id):
            yield name, list(group)


def _rows(path: Path) -> Iterator[Row]:
    names, found = [f.name for f in fields(GradedSample)], set(pq.read_schema(path).names)
    missing = set(names) - found - {"score"}
    if missing:
        raise UserError(f"{path}: not a file of graded samples: it has no column {min(missing)!r}")
    for batch in pq.ParquetFile(path).iter_batches(columns=[name for name in names if name in found]):
        yield from batch.to_pylist()


def claim_of(prompt: Row, completion: str, finish_reason: str | None) -> verify.Claim:
    """What is to be verified of an answer to a prompt that has an `answer`."""
    return verify.Claim(
        completion,
        str(prompt["answer"]),
        language_of(prompt),
        truncated=finish_reason == "length",
        options=options_of(prompt),
    )


def answer_in(prompt: Row, completion: str, finish_reason: str | None) -> str | None:
    """The answer that a completion gives, in the form that a majority vote counts as one."""
    return answers.canonical_answer(
        completion, language_of(prompt), truncated=finish_reason == "length", options=options_of(prompt)
    )


def language_of(row: dict[str, Any]) -> str:
    return str(row.get("language", "en"))


def options_of(row: dict[str, Any]) -> tuple[str, ...]:
    """The values of a multiple-choice question, A first, without their letters; none where it is not one."""
    return tuple(row.get("options") or ())
