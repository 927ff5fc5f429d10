"""The plan of packs against TRL's best-fit-decreasing packing, on 200,000 lengths.

    python -m benchmarks.packing

Ours returns which samples share a pack; TRL moves the tokens as well. Two things keep that from deciding: the tokens
are single bytes, and a second claim leaves out `Dataset.map`, so that what is left is TRL's search and one copy.
"""

import random
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from trl import pack_dataset
from trl.data_utils import _pack_bfd

from alignment.packing import PackingPlan, plan_epoch
from benchmarks import in_turns, report, speedup

SAMPLES, MEAN, SIGMA, CAPACITY = 200_000, 730, 0.8, 4096
TABLE_ROWS = 1000  # what `pack_dataset` packs at once: the default batch of `Dataset.map`
ROUNDS = 5


def draw_lengths() -> list[int]:
    """Log-normal lengths of mean 730 that fit a pack."""
    normal = np.random.default_rng(0).normal(np.log(MEAN) - SIGMA**2 / 2, SIGMA, SAMPLES)
    return [int(length) for length in np.exp(normal).clip(1, CAPACITY)]


def samples_of(lengths: list[int]) -> pa.Table:
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = pa.array(np.zeros(offsets[-1], dtype=np.int8))
    return pa.table({"input_ids": pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), tokens)})


def main() -> None:
    datasets.disable_progress_bars()
    lengths = draw_lengths()
    samples = datasets.Dataset(samples_of(lengths))
    tables = [samples.with_format("arrow")[i : i + TABLE_ROWS] for i in range(0, SAMPLES, TABLE_ROWS)]

    def ours() -> PackingPlan:
        return plan_epoch(lengths, CAPACITY, 1, random.Random(0))

    def theirs() -> datasets.Dataset:
        return pack_dataset(samples, CAPACITY, strategy="bfd")

    plan, packed = ours(), theirs()
    check(plan, lengths)
    settings: dict[str, Any] = {
        "samples": SAMPLES,
        "mean": round(sum(lengths) / SAMPLES),
        "sigma": SIGMA,
        "capacity": CAPACITY,
    }
    speedup("packing.speedup_trl_200k", "trl 1.16 pack_dataset", in_turns(ours, theirs, ROUNDS), ROUNDS, **settings)
    in_memory = in_turns(ours, lambda: [_pack_bfd(table, CAPACITY) for table in tables], ROUNDS)
    speedup("packing.speedup_trl_bfd_200k", "trl 1.16 _pack_bfd, in memory", in_memory, ROUNDS, **settings)
    peer_value = sum(lengths) / (len(packed) * CAPACITY)
    settings |= {"packs": len(plan.packs), "peer_packs": len(packed), "peer_value": round(peer_value, 4)}
    report("packing.utilisation_200k", plan.utilisation, "share", "trl 1.16 pack_dataset", **settings)


def check(plan: PackingPlan, lengths: list[int]) -> None:
    """Every sample is in one pack, and no pack holds more than its capacity."""
    assert sorted(index for pack in plan.packs for index in pack) == list(range(len(lengths)))
    assert max(sum(lengths[index] for index in pack) for pack in plan.packs) <= CAPACITY


if __name__ == "__main__":
    main()
