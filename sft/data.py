"""Packs as a data set: the plan of a run, and batches made from the memory-mapped rows when they are asked for.

Shapes: T tokens, S samples of a pack.
"""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

import datasets
import numpy as np
import torch
from torch import Tensor

from alignment.errors import UserError
from alignment.packing import PackingPlan, concatenate, plan_epoch
from sft.cache import TokenizedRows
from sft.config import PackingConfig
from sft.loss import IGNORED
from sft.mixture import Mixture

POLL_SECONDS = 0.2

Batch = dict[str, Tensor | int]


def plan_packs(mixture: Mixture, packing: PackingConfig, packs_per_step: int, seed: int) -> PackingPlan:
    """The packs of every epoch, one after the other; samples are numbers of rows."""
    generators = [np.random.default_rng([seed, epoch]) for epoch in range(len(mixture.epochs))]
    return plan_epochs(mixture.lengths, mixture.epochs, packing, packs_per_step, generators)


def plan_epochs(
    lengths: np.ndarray,
    epochs: Sequence[np.ndarray],
    packing: PackingConfig,
    packs_per_step: int,
    generators: Sequence[np.random.Generator],
) -> PackingPlan:
    """The packs of each epoch's rows, by its own generator, one epoch after the other.

    Args:
        lengths: of all rows.
        epochs: the numbers of the rows of each.
    """
    plans = []
    for rows, generator in zip(epochs, generators, strict=True):
        plan = plan_epoch(lengths[rows], packing.capacity, packs_per_step, packing.bucket, generator)
        plans.append(dataclasses.replace(plan, order=rows[plan.order]))
    return concatenate(plans)


def wait_for_plan(folder: Path) -> PackingPlan:
    """The plan that rank 0 stores; where it cannot, it ends, and the launcher ends this process too."""
    while not folder.is_dir():
        time.sleep(POLL_SECONDS)
    return PackingPlan.load(folder)


class PackedRows:
    """The packs of a plan in its order.

    Args:
        limit: samples give at most this many of their first tokens; None for all.
        pad_id: the token that fills a pack up to its width.

    Raises:
        UserError: the rows are not those that were planned.
    """

    def __init__(self, rows: TokenizedRows, plan: PackingPlan, limit: int | None, pad_id: int) -> None:
        self.rows = rows
        self.plan = plan
        self.limit = limit
        self.pad_id = pad_id
        if len(plan.order) and int(plan.order.max()) >= len(rows):
            raise UserError("the rows have changed since this run was planned: there are fewer of them")
        if int(self._lengths(plan.order).sum(dtype=np.int64)) != int(plan.tokens.sum()):
            raise UserError("the rows have changed since this run was planned: their lengths are others")

    def __len__(self) -> int:
        return self.plan.packs

    def __getitem__(self, number: int) -> Batch:
        samples = self.plan.pack(number)
        ids, trained = self.rows.take(samples, self.limit)
        return batch(ids, trained, self._lengths(samples).tolist(), int(self.plan.widths[number]), self.pad_id)

    def as_dataset(self) -> datasets.Dataset:
        """What TRL takes: a table of the packs' numbers, whose rows become batches when they are read."""
        numbers = datasets.Dataset.from_dict({"pack": np.arange(len(self))})
        return numbers.with_transform(lambda rows: {"batch": [self[number] for number in rows["pack"]]})

    def _lengths(self, samples: np.ndarray) -> np.ndarray:
        lengths = self.rows.lengths[samples]
        return lengths if self.limit is None else np.minimum(lengths, self.limit)


def batch(ids_T: np.ndarray, trained_T: np.ndarray, lengths_S: list[int], width: int, pad_id: int) -> Batch:
    """One row of `width` tokens; positions restart at every sample, whose ends are `cu_seq_lens_q` [S + 1].

    The padding is a sample of its own at the end, without labels, and does not count in `attention_mask`, which says
    what counts; attention itself goes by the ends.
    """
    tokens = len(ids_T)
    lengths = [*lengths_S, *([width - tokens] if tokens < width else [])]
    input_ids = torch.full((1, width), pad_id)
    input_ids[0, :tokens] = torch.from_numpy(ids_T)
    labels = torch.full((1, width), IGNORED)
    labels[0, :tokens] = torch.from_numpy(np.where(trained_T, ids_T, IGNORED))
    return {
        "input_ids": input_ids,
        "attention_mask": (torch.arange(width) < tokens).long()[None],
        "labels": labels,
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "cu_seq_lens_q": torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32),
        "max_length_q": max(lengths),
    }


def probe(samples: Sequence[Tensor]) -> Batch:
    """What training makes of these samples, each [T], without labels."""
    ids = torch.cat(list(samples)).numpy()
    made = batch(ids, np.zeros(len(ids), bool), [len(sample) for sample in samples], len(ids), pad_id=0)
    return {name: value for name, value in made.items() if name != "labels"}


def collate(rows: list[dict[str, Batch]]) -> Batch:
    """The one pack of a micro-batch."""
    if len(rows) != 1:
        raise ValueError(f"a rank trains on one pack at a time, got {len(rows)}")
    return rows[0]["batch"]
