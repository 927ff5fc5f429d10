"""Versions of an adapter in one folder, and which of them is in use.

    SHELF/versions/001/     an adapter's folder, never changed, with version.json: its hash, its parent, its origin
    SHELF/current           a link to the version in use; vLLM and peft take it as an adapter's folder

The link is replaced in one step, so that whoever opens it finds a whole version, the old one or the new one.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignment import atomic
from alignment.adapters import check_adapter_folder
from alignment.errors import UserError
from alignment.fingerprint import weights_hash

FACTS, CURRENT = "version.json", "current"


@dataclass(frozen=True)
class Version:
    """One version; `parent` is the number of the one that it was made from."""

    number: int
    folder: Path
    hash: str
    parent: int | None
    facts: dict[str, Any]


def versions(shelf: Path) -> list[Version]:
    """All versions, oldest first."""
    return [_read(path.parent) for path in sorted((shelf / "versions").glob(f"[0-9]*/{FACTS}"))]


def version(shelf: Path, number: int) -> Version:
    """
    Raises:
        UserError: no such version, or its weights are not those that were put there.
    """
    found = next((one for one in versions(shelf) if one.number == number), None)
    if found is None:
        there = ", ".join(str(one.number) for one in versions(shelf)) or "none"
        raise UserError(f"{shelf}: no version {number}; there are: {there}")
    if weights_hash(found.folder) != found.hash:
        raise UserError(f"{found.folder}: the weights have been changed: their hash is not that of {FACTS}")
    return found


def current(shelf: Path) -> Version | None:
    """The version in use, or None where the shelf is empty."""
    link = shelf / CURRENT
    return version(shelf, int(link.readlink().name)) if link.is_symlink() else None


def add(shelf: Path, adapter: Path, parent: Version | None, facts: Mapping[str, Any]) -> Version:
    """Copy an adapter onto the shelf as its newest version. The version in use stays what it is.

    The same weights from the same parent are one version: a job that was killed here adds no second.

    Raises:
        UserError: not an adapter's folder.
    """
    check_adapter_folder(adapter)
    there = versions(shelf)
    known = {"hash": weights_hash(adapter), "parent": parent.number if parent else None}
    same = next((one for one in there if {"hash": one.hash, "parent": one.parent} == known), None)
    if same is not None:
        return same
    folder = shelf / "versions" / f"{1 + max((one.number for one in there), default=0):03d}"
    with atomic.replacing_folder(folder) as temporary:
        for path in sorted(p for p in adapter.iterdir() if p.is_file()):
            shutil.copy2(path, temporary / path.name)
            atomic.sync(temporary / path.name)
        atomic.write_json(temporary / FACTS, known | dict(facts))
    return _read(folder)


def use(shelf: Path, chosen: Version) -> None:
    """Let `current` mean this version."""
    temporary = shelf / f".{CURRENT}.{os.getpid()}.tmp"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(Path("versions") / chosen.folder.name)
    temporary.replace(shelf / CURRENT)
    atomic.sync(shelf)


def rollback(shelf: Path, to: int | None = None) -> Version:
    """Use version `to` again, or the one that the version in use was made from. Nothing is deleted.

    Raises:
        UserError: there is no such version, or the one in use is the first.
    """
    with locked(shelf):
        now = current(shelf)
        if now is None:
            raise UserError(f"{shelf}: no adapter is in use: there is no link {CURRENT!r}")
        number = now.parent if to is None else to
        if number is None:
            raise UserError(f"{shelf}: version {now.number} is the first; there is none to go back to")
        chosen = version(shelf, number)
        use(shelf, chosen)
    return chosen


@contextmanager
def locked(shelf: Path) -> Iterator[None]:
    """One process at a time adds versions and chooses among them."""
    try:
        shelf.mkdir(parents=True, exist_ok=True)
        file = (shelf / ".lock").open("w")
    except OSError as error:
        raise UserError(f"{shelf}: cannot be written: {error.strerror}") from None
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _read(folder: Path) -> Version:
    facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    return Version(int(folder.name), folder, facts["hash"], facts["parent"], facts)
