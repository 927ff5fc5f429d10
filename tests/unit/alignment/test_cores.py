"""Which cores a rank has; the processes that are kept to theirs are real ones."""

import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from alignment import cores, launch
from alignment.errors import UserError

KEPT = """
import os, threading
from alignment import cores

wait = threading.Event()
early = threading.Thread(target=wait.wait)
early.start()
cores.keep_to_own()
print(sorted(os.sched_getaffinity(0)), sorted(os.sched_getaffinity(early.native_id)))
wait.set()
"""


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two sockets, numbered in turns, of one physical core each with two logical ones: 0 and 2, 1 and 3."""
    monkeypatch.setattr(cores.os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    monkeypatch.setattr(cores, "TOPOLOGY", tmp_path)
    for core in range(4):
        describe(tmp_path, core, socket=core % 2, siblings=("0,2", "1,3")[core % 2])
    for name in (cores.OF_RANKS, "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "")  # so that what the launcher sets is undone
        monkeypatch.delenv(name)


def describe(topology: Path, core: int, socket: int, siblings: str) -> None:
    told = topology / f"cpu{core}" / "topology"
    told.mkdir(parents=True, exist_ok=True)
    (told / "physical_package_id").write_text(f"{socket}\n")
    (told / "thread_siblings_list").write_text(f"{siblings}\n")


def kept(given: str | None, rank: str | None = "1") -> str:
    """What a rank prints: its cores and those of a thread that was there before."""
    named = {cores.OF_RANKS: given, "LOCAL_RANK": rank}
    environment = {name: value for name, value in os.environ.items() if name not in named}
    environment |= {name: value for name, value in named.items() if value is not None}
    return subprocess.run(
        [sys.executable, "-c", KEPT], env=environment, capture_output=True, text=True, check=True, timeout=60
    ).stdout.strip()


def test_sockets_come_before_cores(machine: None, tmp_path: Path) -> None:
    """Four cores without siblings, 0 and 3 on one socket."""
    for core, socket in enumerate((0, 1, 1, 0)):
        describe(tmp_path, core, socket, str(core))
    assert cores.shares(2) == ["0,3", "1,2"]


def test_cores_that_nothing_is_said_of_come_in_order(machine: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "TOPOLOGY", Path("/nowhere"))
    assert cores.shares(2) == ["0,1", "2,3"]


def test_threads_of_one_physical_core_are_not_parted(machine: None) -> None:
    assert cores.shares(2) == ["0,2", "1,3"]
    assert cores.shares(3) == ["0", "2", "1,3"]
    assert cores.shares(9) == ["0", "2", "1", "3"]


@pytest.mark.parametrize(("ranks", "lists", "threads"), [(2, "0,2|1,3", "2"), (4, "0|2|1|3", "1"), (5, None, "1")])
def test_the_launcher_shares_cores_and_threads(
    machine: None, monkeypatch: pytest.MonkeyPatch, ranks: int, lists: str | None, threads: str
) -> None:
    """Five ranks on four cores run where the system puts them."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    parsed = Namespace(main_process_port=0, num_processes=None, num_machines=None)
    launch._check(parsed, Namespace(main_process_port=0, num_processes=2 * ranks, num_machines=2))
    assert os.environ.get(cores.OF_RANKS) == lists
    assert os.environ["OMP_NUM_THREADS"] == threads


def test_what_is_said_of_cores_stands_and_gpu_ranks_get_none(machine: None, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed, config = (Namespace(main_process_port=0, num_processes=2, num_machines=1) for _ in range(2))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    launch._check(parsed, config)
    assert cores.OF_RANKS not in os.environ
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv(cores.OF_RANKS, "")
    launch._check(parsed, config)
    assert os.environ[cores.OF_RANKS] == ""


def test_a_rank_and_its_threads_keep_to_its_cores() -> None:
    everywhere = sorted(os.sched_getaffinity(0))
    own = everywhere[-1]
    assert kept(f"{everywhere[0]}|{own}") == f"[{own}] [{own}]"
    for given, rank in ((None, "1"), ("", "1"), (f"{everywhere[0]}|{own}", None)):
        assert kept(given, rank) == f"{everywhere} {everywhere}"


@pytest.mark.parametrize("given", ["0", "0|1|2", "0|one", "0|", "0|4"])
def test_what_gives_a_rank_no_cores_is_refused_before_any_starts(
    machine: None, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    monkeypatch.setenv(cores.OF_RANKS, given)
    with pytest.raises(UserError) as caught:
        cores.give_to_ranks(2)
    assert str(caught.value) == (
        f"{cores.OF_RANKS}={given}: expected 2 lists, one a rank, of the cores 0,2,1,3, such as 0,2|1,3; "
        "empty to let the system choose"
    )


def test_a_list_for_each_rank_is_taken(machine: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cores.OF_RANKS, "3|0,1")
    cores.give_to_ranks(2)
    assert os.environ[cores.OF_RANKS] == "3|0,1"
