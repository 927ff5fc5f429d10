"""One script a claim, each measured beside its peer in one process; `python -m benchmarks` runs all. See RESULTS.md."""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

DATA = Path(os.environ.get("SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))


def data_at_hand() -> bool:
    """Whether the folder of real data is there; says so where it is not."""
    if not DATA.is_dir():
        print(f"skipped: {DATA} is absent", file=sys.stderr)
    return DATA.is_dir()


def in_turns(
    ours: Callable[[], object],
    peer: Callable[[], object],
    rounds: int,
    warm_up: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[float, float]:
    """Median seconds of each, run one after the other `rounds` times, after `warm_up` rounds that do not count.

    By `time.process_time`, small differences show on a machine that does other things too; on one thread only.
    """
    seconds: tuple[list[float], list[float]] = ([], [])
    for number in range(warm_up + rounds):
        for call, taken in zip((ours, peer), seconds, strict=True):
            began = clock()
            call()
            if number >= warm_up:
                taken.append(clock() - began)
    return statistics.median(seconds[0]), statistics.median(seconds[1])


def speedup(claim: str, peer: str, seconds: tuple[float, float], rounds: int, **settings: Any) -> None:
    """Print the claim that ours takes a fraction of the peer's time."""
    ours, theirs = seconds
    measured: dict[str, Any] = {"seconds": round(ours, 4), "peer_seconds": round(theirs, 4), "rounds": rounds}
    report(claim, theirs / ours, "x", peer, **measured, **settings)


def report(claim: str, value: float, unit: str, peer: str, better: str = "higher", **settings: Any) -> None:
    """Print one claim as a JSON line; `better` is "higher" or "lower"."""
    line = {"claim": claim, "value": float(f"{value:.4g}"), "unit": unit, "better": better, "peer": peer}
    print(json.dumps(line | {"settings": settings}), flush=True)
