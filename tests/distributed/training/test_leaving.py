"""A rank ends with its exit code, whatever a thread of Gloo's is doing."""

import subprocess
from collections.abc import Callable
from pathlib import Path

Launch = Callable[..., subprocess.CompletedProcess[str]]


def test_a_rank_that_is_done_ends_with_success(launch: Launch, tmp_path: Path) -> None:
    finished = launch("leaving_worker.py", tmp_path, 0, expert_parallel=False)
    assert finished.stdout.count("said before the end") == 2
    assert {path.name for path in tmp_path.iterdir()} == {"rank0", "rank1"}, "what was to be done at exit"


def test_a_failure_keeps_its_code(launch: Launch, tmp_path: Path) -> None:
    finished = launch("leaving_worker.py", tmp_path, 3, expert_parallel=False, fails=True)
    assert "exitcode: 3" in finished.stderr
    assert "SIGABRT" not in finished.stderr


def test_any_other_end_is_aborted(launch: Launch, tmp_path: Path) -> None:
    """Where this fails, torch has mended pytorch/pytorch#190489, and `leave` may go."""
    finished = launch("leaving_worker.py", tmp_path, 0, "raise", expert_parallel=False, fails=True)
    assert "SIGABRT" in finished.stderr
