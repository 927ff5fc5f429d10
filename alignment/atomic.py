"""Files and folders that are either whole or absent: write beside, flush to disk, rename."""

import errno
import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, renamed onto it when the block ends without an error, else removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path`, renamed onto it when the block ends without an error, else removed."""
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        sync(temporary)
        shutil.rmtree(path, ignore_errors=True)
        temporary.rename(path)
        sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def placing_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path`, renamed onto it when the block ends without an error, else removed.

    Unlike `replacing_folder` it leaves a folder that is there alone: the first of several processes, also of several
    machines that share the disk, places its own. What a killed process of this machine left is removed first, so
    processes of one machine take turns by a lock of the caller's.
    """
    machine = f".{path.name}.{socket.gethostname()}"
    for left in path.parent.glob(f"{machine}.*.tmp"):
        shutil.rmtree(left, ignore_errors=True)
    temporary = path.with_name(f"{machine}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        sync(temporary)
        if not path.exists():
            _rename_first(temporary, path)
        sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _rename_first(temporary: Path, path: Path) -> None:
    try:
        temporary.rename(path)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # another process was first
            raise


def sync(path: Path) -> None:
    """Flush a file or a folder's entries to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True) + "\n")
