"""Progress bars on a terminal, a line now and then elsewhere."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

T = TypeVar("T")
LINE_SECONDS = 15.0


def track(items: Iterable[T], total: int | None, label: str) -> Iterator[T]:
    """Yield `items`, showing how many of `total` (None: unknown) are done and the time that remains."""
    if sys.stderr.isatty():
        yield from _bar(items, total, label)
    else:
        yield from _lines(items, total, label)


def _bar(items: Iterable[T], total: int | None, label: str) -> Iterator[T]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        yield from progress.track(items, total=total, description=label)


def _lines(items: Iterable[T], total: int | None, label: str) -> Iterator[T]:
    last = time.monotonic()
    for count, item in enumerate(items, start=1):
        yield item
        if time.monotonic() - last > LINE_SECONDS:
            last = time.monotonic()
            print(f"{label}: {count}{f'/{total}' if total else ''}", file=sys.stderr, flush=True)
