"""The samples of a run on disk: one Parquet shard for each chunk of prompts, below a folder named by what made them.

Shards are whole or absent, so a killed run goes on at the first chunk that is missing. Samples of other weights,
prompts, parameters or seeds have another address, so none of them can be taken for these.
"""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from alignment import atomic
from alignment.errors import UserError
from alignment.fingerprint import value_hash
from alignment.rollout.samples import FinishReason

MANIFEST = "manifest.json"
FORMAT = 1
SCHEMA = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("index", pa.int32()),
        ("seed", pa.uint32()),
        ("token_ids", pa.list_(pa.int32())),
        ("text", pa.string()),
        ("finish_reason", pa.string()),
        ("logprob", pa.float64()),
    ]
)
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Completion:
    """A stored sample: the `index`-th of its prompt. `seed` is that of its chunk; `text` is without the stop token."""

    prompt_id: str
    index: int
    seed: int
    token_ids: list[int]
    text: str
    finish_reason: FinishReason
    logprob: float


class SampleStore:
    """Shards of `n` samples a prompt for a fixed list of prompts, cut into chunks."""

    def __init__(self, folder: Path, chunks: Sequence[Sequence[str]], n: int) -> None:
        """`chunks` holds the prompt ids of each shard, in order."""
        self.folder, self.chunks, self.n = folder, chunks, n

    @classmethod
    def create(
        cls,
        root: Path,
        made_from: Mapping[str, Any],
        prompt_ids: Sequence[str],
        chunk_prompts: int,
        n: int,
        too_long: Sequence[str] = (),
    ) -> "SampleStore":
        """The store below `root` whose address is the hash of `made_from`, new or continued."""
        folder = root / value_hash({"format": FORMAT, **made_from})[:16]
        chunks = [list(prompt_ids[i : i + chunk_prompts]) for i in range(0, len(prompt_ids), chunk_prompts)]
        folder.mkdir(parents=True, exist_ok=True)
        for torn in folder.glob(".*.tmp"):
            torn.unlink()
        if not (folder / MANIFEST).exists():
            manifest = {"made_from": made_from, "chunks": chunks, "n": n, "too_long": list(too_long)}
            atomic.write_json(folder / MANIFEST, manifest)
        return cls(folder, chunks, n)

    def shard(self, chunk: int) -> Path:
        return self.folder / f"shard-{chunk:05d}.parquet"

    def has(self, chunk: int) -> bool:
        """Whether a chunk is stored. A shard that cannot be read is removed, so that it is sampled again."""
        path = self.shard(chunk)
        if not path.exists():
            return False
        try:
            rows = pq.read_metadata(path).num_rows
        except (pa.ArrowInvalid, OSError) as error:
            logger.warning("%s cannot be read and is sampled again: %s", path, error)
            path.unlink()
            return False
        if rows != len(self.chunks[chunk]) * self.n:
            raise RuntimeError(f"{path}: holds {rows} samples, expected {len(self.chunks[chunk]) * self.n}")
        return True

    def write(self, chunk: int, completions: Sequence[Completion]) -> None:
        table = pa.Table.from_pylist([vars(completion) for completion in completions], SCHEMA)
        with atomic.replacing(self.shard(chunk)) as temporary:
            pq.write_table(table, temporary, compression="zstd")


class SampleReader:
    """The samples of a finished store, prompt by prompt; one shard is in memory at a time."""

    def __init__(self, folder: Path) -> None:
        """
        Raises:
            UserError: no store in `folder`, or one that lacks shards.
        """
        if not (folder / MANIFEST).is_file():
            raise UserError(f"{folder}: not a sample store: it has no {MANIFEST}")
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        self._store = SampleStore(folder, manifest["chunks"], manifest["n"])
        self.folder = folder
        self.n: int = manifest["n"]
        self.too_long: list[str] = manifest["too_long"]
        missing = sum(not self._store.shard(i).exists() for i in range(len(self._store.chunks)))
        if missing:
            raise UserError(f"{folder}: {missing} of {len(self._store.chunks)} shards are missing: its job did not end")

    def __len__(self) -> int:
        """Prompts that were sampled."""
        return sum(len(chunk) for chunk in self._store.chunks)

    def __iter__(self) -> Iterator[list[Completion]]:
        """For each prompt, in the order of the prompts, its `n` samples in the order of their index."""
        for chunk, prompt_ids in enumerate(self._store.chunks):
            rows = [Completion(**row) for row in pq.read_table(self._store.shard(chunk)).to_pylist()]
            for position, prompt_id in enumerate(prompt_ids):
                samples = rows[position * self.n : (position + 1) * self.n]
                if [(s.prompt_id, s.index) for s in samples] != [(prompt_id, i) for i in range(self.n)]:
                    raise RuntimeError(
                        f"{self._store.shard(chunk)}: does not hold the samples of {prompt_id!r} in order"
                    )
                yield samples
