"""The plan of packs: time, utilisation and how long ranks wait, and TRL's best-fit-decreasing packing beside it.

    python -m benchmarks.packing

200 thousand, 2 and 10 million log-normal lengths at capacities of 4, 32 and 128 thousand tokens, in steps of 64 packs.
Ours returns which samples share a pack; TRL moves the tokens as well. Two things keep that from deciding: the tokens
are single bytes, and a second claim leaves out `Dataset.map`, so that what is left is TRL's search and one copy.
"""

import dataclasses
import statistics
import time
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from trl import pack_dataset
from trl.data_utils import _pack_bfd

from alignment.packing import IntArray, PackingPlan, plan_epoch
from benchmarks import in_turns, report, speedup

COUNTS = (200_000, 2_000_000, 10_000_000)
CAPACITIES = (4096, 32_768, 131_072)
MEAN, SIGMA = 730, 0.8
PACKS_PER_STEP, BUCKET = 64, 64
RANKS = (8, 64)
IMBALANCE = 0.01  # cases in which no plan can do better are left out of that claim
TABLE_ROWS = 1000  # what `pack_dataset` packs at once: the default batch of `Dataset.map`
ROUNDS = 5
PLAN_ROUNDS = 3


@dataclass(frozen=True)
class Case:
    samples: int
    capacity: int
    seconds: float
    utilisation: float  # of whole steps: the last one is short by intention, and padded to its own longest pack
    padding: float
    waiting: dict[int, tuple[float, float]]  # ranks -> the share of the epoch they wait: for tokens, for attention
    waiting_shuffled: dict[int, tuple[float, float]]  # were the same packs in random order
    floor: dict[int, float]  # what no plan can go below

    @property
    def counted(self) -> list[int]:
        return [ranks for ranks in RANKS if self.floor[ranks] <= IMBALANCE]


def draw_lengths(samples: int, capacity: int) -> IntArray:
    """Log-normal lengths of mean 730 that fit a pack."""
    normal = np.random.default_rng(0).normal(np.log(MEAN) - SIGMA**2 / 2, SIGMA, samples)
    return np.exp(normal).clip(1, capacity).astype(np.int64)


def plan(lengths: IntArray, capacity: int) -> PackingPlan:
    return plan_epoch(lengths, capacity, PACKS_PER_STEP, BUCKET, np.random.default_rng(0))


def measure(samples: int, capacity: int) -> Case:
    lengths = draw_lengths(samples, capacity)
    taken = []
    for _ in range(PLAN_ROUNDS):
        began = time.perf_counter()
        made = plan(lengths, capacity)
        taken.append(time.perf_counter() - began)
    check(made, lengths)
    whole = made.tokens[:-PACKS_PER_STEP]
    random = np.random.default_rng(0).permutation(made.packs)
    shuffled = dataclasses.replace(made, tokens=made.tokens[random], attention=made.attention[random])
    return Case(
        samples,
        capacity,
        statistics.median(taken),
        int(whole.sum()) / (len(whole) * capacity),
        made.padding_share,
        {ranks: waiting(made, ranks) for ranks in RANKS},
        {ranks: waiting(shuffled, ranks) for ranks in RANKS},
        {ranks: floor(lengths, capacity, ranks) for ranks in RANKS},
    )


def check(made: PackingPlan, lengths: IntArray) -> None:
    """Every sample is in one pack, and no pack holds more than its capacity."""
    assert (np.bincount(made.order, minlength=len(lengths)) == 1).all()
    packs = np.repeat(np.arange(made.packs), np.diff(made.starts))
    assert np.bincount(packs, lengths[made.order], made.packs).max() <= made.capacity


def waiting(made: PackingPlan, ranks: int) -> tuple[float, float]:
    found = made.imbalance(ranks)
    return found.tokens, found.attention


def floor(lengths: IntArray, capacity: int, ranks: int) -> float:
    """A bound on waiting for attention. The longest sample's square is one micro-batch's maximum at least, and its mean
    is at most that of the longest samples that fill all its packs; nothing is waited for elsewhere."""
    descending = np.sort(lengths)[::-1]
    fill = int(np.searchsorted(descending.cumsum(), ranks * capacity)) + 1
    squares = descending**2
    mean = squares[:fill].sum() / ranks
    return max(0.0, float((squares[0] - mean) / (squares.sum() / ranks)))


def samples_of(lengths: IntArray) -> pa.Table:
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = pa.array(np.zeros(offsets[-1], dtype=np.int8))
    return pa.table({"input_ids": pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), tokens)})


def trl_utilisation(capacity: int) -> float:
    lengths = draw_lengths(COUNTS[0], capacity)
    packed = pack_dataset(datasets.Dataset(samples_of(lengths)), capacity, strategy="bfd")
    return int(lengths.sum()) / (len(packed) * capacity)


def against_trl() -> None:
    samples, capacity = COUNTS[0], CAPACITIES[0]
    lengths = draw_lengths(samples, capacity)
    rows = datasets.Dataset(samples_of(lengths))
    tables = [rows.with_format("arrow")[i : i + TABLE_ROWS] for i in range(0, samples, TABLE_ROWS)]
    settings: dict[str, Any] = {"samples": samples, "capacity": capacity, "mean": round(float(lengths.mean()))}

    def ours() -> PackingPlan:
        return plan(lengths, capacity)

    whole = in_turns(ours, lambda: pack_dataset(rows, capacity, strategy="bfd"), ROUNDS)
    speedup("packing.speedup_trl_200k", "trl 1.16 pack_dataset", whole, ROUNDS, **settings)
    in_memory = in_turns(ours, lambda: [_pack_bfd(table, capacity) for table in tables], ROUNDS)
    speedup("packing.speedup_trl_bfd_200k", "trl 1.16 _pack_bfd, in memory", in_memory, ROUNDS, **settings)


def main() -> None:
    datasets.disable_progress_bars()
    against_trl()
    cases = [measure(samples, capacity) for samples in COUNTS for capacity in CAPACITIES]
    for case in cases:
        print(describe(case), flush=True)
    report_utilisation(cases)
    report_seconds(cases)
    report_imbalance(cases)


def describe(case: Case) -> str:
    waits = [
        f"{ranks} ranks wait {case.waiting[ranks][0]:.5f} {case.waiting[ranks][1]:.5f} (floor {case.floor[ranks]:.4f})"
        for ranks in RANKS
    ]
    size = f"{case.samples:>8} x {case.capacity:>6}: {case.seconds:6.3f} s, utilisation {case.utilisation:.5f}"
    return f"{size}, padding {case.padding:.5f}, {', '.join(waits)}"


def report_utilisation(cases: list[Case]) -> None:
    peer = min(trl_utilisation(capacity) for capacity in CAPACITIES)
    report(
        "packing.utilisation_min",
        min(case.utilisation for case in cases),
        "share",
        "trl 1.16 pack_dataset, 200k",
        peer_value=round(peer, 4),
        padding_max=round(max(case.padding for case in cases), 5),
        table={f"{case.samples}/{case.capacity}": round(case.utilisation, 5) for case in cases},
    )


def report_seconds(cases: list[Case]) -> None:
    few, many = ([case.seconds for case in cases if case.samples == samples] for samples in (COUNTS[0], COUNTS[-1]))
    growth = max(later / earlier for earlier, later in zip(few, many, strict=True))
    table = {f"{case.samples}/{case.capacity}": round(case.seconds, 3) for case in cases}
    report("packing.seconds_10m", max(many), "s", "the aim", "lower", peer_value=10.0, table=table)
    linear = COUNTS[-1] / COUNTS[0]
    report("packing.growth_200k_10m", growth, "times", "a linear packer", "lower", peer_value=linear)


def report_imbalance(cases: list[Case]) -> None:
    report(
        "packing.rank_imbalance_max",
        max(wait for case in cases for ranks in case.counted for wait in case.waiting[ranks]),
        "share",
        "the same packs shuffled",
        "lower",
        peer_value=max(wait for case in cases for ranks in case.counted for wait in case.waiting_shuffled[ranks]),
        left_out={
            f"{case.samples}/{case.capacity}/{ranks}": {
                "floor": round(case.floor[ranks], 4),
                "waiting": round(max(case.waiting[ranks]), 4),
            }
            for case in cases
            for ranks in RANKS
            if ranks not in case.counted
        },
        table={
            f"{case.samples}/{case.capacity}/{ranks}": [round(wait, 5) for wait in case.waiting[ranks]]
            for case in cases
            for ranks in RANKS
        },
    )


if __name__ == "__main__":
    main()
