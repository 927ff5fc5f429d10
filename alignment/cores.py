"""The cores of this machine, shared among the processes of a job.

A rank that the system moves between cores keeps the others waiting wherever they exchange tokens: two expert-parallel
ranks on two cores train 1.1 times as fast when each stays on its own (benchmarks/RESULTS.md).
"""

import os
from collections.abc import Collection
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

from alignment.errors import UserError

TOPOLOGY = Path("/sys/devices/system/cpu")
OF_RANKS = "ALIGNMENT_RANK_CORES"  # a list of cores a rank, between |; empty: ranks run where the system puts them


def count() -> int:
    """How many cores this process may run on."""
    return len(_there())


def usable() -> list[int]:
    """The cores that this process may run on, those of one socket and those of one physical core side by side."""
    return sorted(_there(), key=_place)


def _there() -> Collection[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)


def shares(parts: int) -> list[str]:
    """The usable cores in `parts` lists such as "0,1"; fewer lists where there are fewer cores."""
    cores = usable()
    lists = min(parts, len(cores))
    ends = [i * len(cores) // lists for i in range(lists + 1)]
    return [",".join(map(str, cores[begin:end])) for begin, end in pairwise(ends)]


def give_to_ranks(ranks: int) -> None:
    """Say in the environment which cores each rank of this machine has, unless something is said there.

    Nothing where there are more ranks than cores, or where the system knows no such assignment.

    Raises:
        UserError: what is said there is not a list for each rank, of cores that this process may run on.
    """
    given = os.environ.get(OF_RANKS)
    if given:
        _check(given, ranks)
    elif given is None and ranks <= count() and hasattr(os, "sched_setaffinity"):
        os.environ[OF_RANKS] = "|".join(shares(ranks))


def _check(given: str, ranks: int) -> None:
    there = usable()
    try:
        whole = len(lists := _lists(given)) == ranks and set().union(*lists) <= set(there)
    except ValueError:
        whole = False
    if not whole:
        raise UserError(
            f"{OF_RANKS}={given}: expected {ranks} lists, one a rank, of the cores {','.join(map(str, there))}, "
            f"such as {'|'.join(shares(ranks))}; empty to let the system choose"
        )


def keep_to_own() -> None:
    """Keep this rank, with all its threads, to the cores that it was given; without such it stays as it is."""
    given, rank = os.environ.get(OF_RANKS), os.environ.get("LOCAL_RANK")
    if given and rank is not None:
        keep_to(_lists(given)[int(rank)])


def _lists(given: str) -> list[set[int]]:
    return [set(map(int, cores.split(","))) for cores in given.split("|")]


def keep_to(own: Collection[int]) -> None:
    """Keep every thread of this process to these cores.

    Raises:
        OSError: none of them is a core that this process may run on.
    """
    for thread in Path("/proc/self/task").iterdir():
        with suppress(ProcessLookupError):  # it has ended since
            os.sched_setaffinity(int(thread.name), own)


def _place(core: int) -> tuple[int, int, int]:
    """The numbers of the core's socket, of its physical core (the first of the logical ones on it), and its own."""
    told = TOPOLOGY / f"cpu{core}" / "topology"
    if not told.is_dir():
        return 0, core, core
    siblings = (told / "thread_siblings_list").read_text()
    return int((told / "physical_package_id").read_text()), int(siblings.replace("-", ",").split(",")[0]), core
