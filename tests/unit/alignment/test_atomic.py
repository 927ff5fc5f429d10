import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from alignment import atomic
from alignment.fingerprint import path_hash, value_hash, weights_hash

SLOW_WRITER = """
import sys, time
from pathlib import Path
from alignment import atomic, job

def write():
    with atomic.replacing(Path(sys.argv[1])) as temporary:
        temporary.write_text("half of the new")
        print("writing", flush=True)
        time.sleep(60)

sys.exit(job.guarded(write))
"""


def test_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "value.json"
    atomic.write_json(path, {"b": 1, "a": "ส้ม"})
    atomic.write_json(path, {"a": "ส้ม", "b": 2})
    assert path.read_text(encoding="utf-8") == '{\n  "a": "ส้ม",\n  "b": 2\n}\n'
    assert [p.name for p in path.parent.iterdir()] == ["value.json"]


def test_error_leaves_the_old_file(tmp_path: Path) -> None:
    def half_write() -> None:
        with atomic.replacing(tmp_path / "a") as temporary:
            temporary.write_text("half")
            raise RuntimeError

    atomic.write_text(tmp_path / "a", "old")
    with pytest.raises(RuntimeError):
        half_write()
    assert (tmp_path / "a").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_signal_in_the_middle_leaves_the_old_file(tmp_path: Path, signum: signal.Signals) -> None:
    path = tmp_path / "a"
    path.write_text("old")
    command = [sys.executable, "-c", SLOW_WRITER, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        process.send_signal(signum)
        _, errors = process.communicate(timeout=20)
    assert path.read_text() == "old"
    if signum == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
        return
    assert process.returncode == 128 + signum
    assert errors == f"interrupted ({signum.name}); the same command resumes\n"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def place(path: Path, text: str) -> None:
    with atomic.placing_folder(path) as temporary:
        (temporary / "a").write_text(text)
        if text == "broken":
            raise RuntimeError


def test_the_first_of_two_processes_places_its_folder(tmp_path: Path) -> None:
    """The second, here between the first's check and its rename, leaves it alone and removes its own."""
    path = tmp_path / "new" / "folder"
    with atomic.placing_folder(path) as temporary:
        (temporary / "a").write_text("late")
        path.mkdir()
        (path / "a").write_text("first")
        atomic._rename_first(temporary, path)
    assert (path / "a").read_text() == "first"
    assert list(path.parent.iterdir()) == [path]
    place(path, "again")
    assert (path / "a").read_text() == "first"


def test_a_folder_that_was_not_placed_is_removed(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        place(tmp_path / "folder", "broken")
    assert list(tmp_path.iterdir()) == []
    killed, elsewhere = (tmp_path / f".folder.{machine}.7.tmp" for machine in (socket.gethostname(), "another"))
    for left in (killed, elsewhere):
        left.mkdir()
        (left / "a").touch()
    place(tmp_path / "folder", "whole")
    assert sorted(tmp_path.iterdir()) == [elsewhere, tmp_path / "folder"], "another machine may be at work"


def test_hash_of_a_folder_follows_names_and_bytes_but_not_hidden_files(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.safetensors").write_bytes(b"1")
    before = path_hash(tmp_path), weights_hash(tmp_path / "sub")
    (tmp_path / ".lock").touch()
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "index").write_bytes(b"x")
    assert (path_hash(tmp_path), weights_hash(tmp_path / "sub")) == before
    (tmp_path / "sub" / "a.safetensors").write_bytes(b"2")
    changed = path_hash(tmp_path), weights_hash(tmp_path / "sub")
    assert changed[0] != before[0]
    assert changed[1] != before[1]
    (tmp_path / "sub" / "a.safetensors").rename(tmp_path / "sub" / "b.safetensors")
    assert path_hash(tmp_path) != changed[0]
    assert weights_hash(tmp_path / "sub") != changed[1]


def test_hash_of_a_value_ignores_the_order_of_keys_only() -> None:
    assert value_hash({"a": 1, "b": [1, 2]}) == value_hash({"b": [1, 2], "a": 1})
    assert value_hash({"a": 1, "b": [1, 2]}) != value_hash({"a": 1, "b": [2, 1]})
