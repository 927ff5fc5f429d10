"""Samples on disk: one Parquet shard for each chunk of prompts, in a folder named by what made them.

The folder's name is the hash of weights, tokenizer and template, engine, sampling parameters and seed; a shard's that
of its prompts' ids and tokens. So samples of other weights or prompts are never taken for these, and prompts that are
added later find the shards of the earlier ones. Shards are written whole and never changed: a killed run goes on at the
first that is missing, and several processes may write to one store.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from alignment import atomic
from alignment.errors import UserError
from alignment.fingerprint import value_hash
from alignment.rollout.samples import FinishReason

MANIFEST = "manifest.json"
FORMAT = 2
SCHEMA = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("index", pa.int32()),
        ("seed", pa.uint64()),
        ("token_ids", pa.list_(pa.int32())),
        ("text", pa.string()),
        ("finish_reason", pa.string()),
        ("logprob", pa.float64()),
    ]
)
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Completion:
    """A stored sample: the `index`-th of its prompt, drawn from `seed`; `text` is without the stop token.

    A server of chat completions gives no tokens and no log-probability (NaN); where it refuses, `text` is its reason.
    """

    prompt_id: str
    index: int
    seed: int
    token_ids: list[int]
    text: str
    finish_reason: FinishReason | Literal["refused"]
    logprob: float


class SampleStore:
    """The shards of one set of weights, parameters and seed."""

    def __init__(self, root: Path, made_from: Mapping[str, Any], n: int) -> None:
        """The store below `root` of `n` samples a prompt, new or continued; its address is the hash of `made_from`."""
        self.folder = root / value_hash({"format": FORMAT, "n": n, **made_from})[:16]
        self.n = n
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / MANIFEST).exists():
            atomic.write_json(self.folder / MANIFEST, {"made_from": made_from, "n": n})

    def shard(self, prompts: Mapping[str, Sequence[Any]]) -> Path:
        """Where the samples of these prompts (id -> tokens, or what else was asked) lie, or will."""
        return self.folder / f"{value_hash(list(prompts.items()))[:16]}.parquet"

    def read(self, prompts: Mapping[str, Sequence[Any]]) -> list[list[Completion]] | None:
        """For each prompt its samples by index; None where they are not stored.

        A shard that cannot be read is logged and removed, so that it is sampled again.
        """
        path = self.shard(prompts)
        if not path.exists():
            return None
        try:
            rows = [Completion(**row) for row in pq.read_table(path).to_pylist()]
        except (pa.ArrowInvalid, OSError) as error:
            logger.warning("%s cannot be read and is sampled again: %s", path, error)
            path.unlink()
            return None
        if [(row.prompt_id, row.index) for row in rows] != [(name, i) for name in prompts for i in range(self.n)]:
            raise RuntimeError(f"{path}: does not hold the {self.n} samples of each of its prompts in order")
        return [rows[i : i + self.n] for i in range(0, len(rows), self.n)]

    def write(self, prompts: Mapping[str, Sequence[Any]], samples: Sequence[Sequence[Completion]]) -> None:
        table = pa.Table.from_pylist([vars(sample) for of_prompt in samples for sample in of_prompt], SCHEMA)
        with atomic.replacing(self.shard(prompts)) as temporary:
            pq.write_table(table, temporary, compression="zstd")


def stores_in(folder: Path) -> list[Path]:
    """`folder`, or the stores below it.

    Raises:
        UserError: there is none.
    """
    stores = sorted(path.parent for path in folder.rglob(MANIFEST))
    if not stores:
        raise UserError(f"{folder}: not a sample store: no {MANIFEST} in it or below it")
    return stores


def stored_samples(folder: Path) -> Iterator[Completion]:
    """Every sample of the stores in or below `folder`, shard by shard."""
    for store in stores_in(folder):
        for shard in sorted(store.glob("*.parquet")):
            for batch in pq.ParquetFile(shard).iter_batches():
                yield from (Completion(**row) for row in batch.to_pylist())
