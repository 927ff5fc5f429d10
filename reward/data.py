"""Preference rows as tokenized pairs, each file of them tokenized once.

    CACHE/KEY/pairs.arrow     batches of reward.rendering.SCHEMA, mapped into memory by every rank and every run

KEY is a hash of the rows, the tokenizer with its chat template, and the format, so runs and machines share the folder.
What is dropped is decided on reading: another max_length tokenizes nothing.
"""

import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from alignment import atomic, job, models
from alignment.config import ModelConfig
from alignment.errors import UserError
from alignment.fingerprint import value_hash
from alignment.ledger import Ledger
from alignment.prepared import locked, rendering_hash, rows_version
from alignment.progress import track
from alignment.rows import count_rows, located_rows
from reward.rendering import SCHEMA, render

FORMAT = 2
PAIRS = "pairs.arrow"
POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Pair:
    """One prompt with a better and a worse answer, in token ids; answers end with the stop token."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    key: str  # the prompt's text, by which prompts are told apart


@dataclass(frozen=True)
class PreferenceData:
    """Pairs to train (reward.rendering.SCHEMA) and to judge on, and the account of every row."""

    train: Dataset
    eval: list[Pair]
    train_ledger: Ledger
    eval_ledger: Ledger


def prepare(rows: str, eval_rows: str | None, model: ModelConfig, max_length: int, cache: Path) -> PreferenceData:
    """The tokenized pairs of both sets, from the cache where it has them. Every rank calls it.

    Raises:
        UserError: a row against the schema, prompts that are in both sets, or nothing left to train on.
    """
    tokenizer = models.load_tokenizer(model)
    train_ledger, eval_ledger = Ledger(), Ledger()
    train = admit(stored(rows, tokenizer, cache), rows, max_length, train_ledger)
    if eval_rows is None:
        return PreferenceData(train, [], train_ledger, eval_ledger)
    judged = admit(stored(eval_rows, tokenizer, cache), eval_rows, max_length, eval_ledger)
    shared = set(train["key"]) & set(judged["key"])
    if shared:
        raise UserError(
            f"{eval_rows}: {len(shared)} of its prompts are also in {rows}, such as {min(shared)[:80]!r}\n"
            "a reward model is not judged on prompts it was trained on"
        )
    return PreferenceData(train, pairs_of(judged), train_ledger, eval_ledger)


def read_pairs(rows: str, model: ModelConfig, max_length: int) -> list[Pair]:
    """The pairs of `rows` that are not dropped, without a cache."""
    batches = render(located_rows(rows, "preference"), models.load_tokenizer(model))
    return pairs_of(admit(Dataset(pa.Table.from_batches(batches)), rows, max_length, Ledger()))


def stored(rows: str, tokenizer: PreTrainedTokenizerBase, cache: Path) -> Dataset:
    """All pairs of a source, mapped from the cache; this machine's first rank tokenizes them where they are missing.

    Raises:
        UserError: a row against the schema, or a hub id without a revision.
    """
    made_of = {"format": FORMAT, "rows": rows_version(rows), "tokenizer": rendering_hash(tokenizer)}
    folder = cache / value_hash(made_of)
    if int(os.environ.get("LOCAL_RANK", "0")) > 0:
        _wait_for(folder)
    elif not folder.exists():
        with locked(folder), atomic.placing_folder(folder) as temporary:
            if not folder.exists():  # another process may have made it meanwhile
                _write(temporary / PAIRS, rows, tokenizer)
    return Dataset.from_file(str(folder / PAIRS))


def _write(path: Path, rows: str, tokenizer: PreTrainedTokenizerBase) -> None:
    located = track(located_rows(rows, "preference"), count_rows(rows), f"tokenize {rows}")
    began = time.monotonic()
    count = 0
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, SCHEMA) as writer:
        for batch in render(located, tokenizer):
            writer.write_batch(batch)
            count += batch.num_rows
    atomic.sync(path)
    if job.rank() == 0:
        print(f"{rows}: {count:,} pairs tokenized in {time.monotonic() - began:.1f} s", flush=True)


def _wait_for(folder: Path) -> None:
    """Another rank fills the cache; where it cannot, it ends, and the launcher ends this process too."""
    while not folder.exists():
        time.sleep(POLL_SECONDS)


def admit(pairs: Dataset, source: str, max_length: int, ledger: Ledger) -> Dataset:
    """The pairs that are neither too long nor of two answers that are the same; the others are counted.

    Raises:
        UserError: none is left.
    """
    table = pairs.data.table
    tokens = sum(pc.list_value_length(table[side]).to_numpy() for side in ("chosen_ids", "rejected_ids"))
    overlong = table["length"].to_numpy() > max_length
    same = table["same"].to_numpy() & ~overlong
    kept = ~(overlong | same)
    ledger.rows_in, ledger.rows_out = len(pairs), int(kept.sum())
    ledger.tokens_in, ledger.tokens_trained = int(tokens.sum()), int(tokens[kept].sum())
    ledger.tokens_dropped = ledger.tokens_in - ledger.tokens_trained
    for reason, dropped in (("overlong", overlong), ("identical answers", same)):
        if dropped.any():
            ledger.dropped[reason] = int(dropped.sum())
    if not kept.any():
        raise UserError(f"{source}: no pair is left: {dict(ledger.dropped)}; max_length is {max_length}")
    return pairs.select(np.flatnonzero(kept))


def pairs_of(pairs: Iterable[dict[str, Any]]) -> list[Pair]:
    return [
        Pair(
            row["chosen_ids"][: row["prompt_tokens"]],
            row["chosen_ids"][row["prompt_tokens"] :],
            row["rejected_ids"][row["prompt_tokens"] :],
            row["key"],
        )
        for row in pairs
    ]
