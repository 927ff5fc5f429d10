"""Work on items in several processes, results in the items' order, a bounded number of them ahead.

    with Processes(count, function, state) as processes:
        for result in processes.map(items): ...

Each process gets `function` and `state` once and then calls `function(state, item)` for one item after another. It
imports the function's module and what that imports, no more. It ends when its pipe to the parent closes, however the
parent ends.
"""

import os
import queue
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from alignment.errors import UserError

State = TypeVar("State")
Item = TypeVar("Item")
Result = TypeVar("Result")
Whole = TypeVar("Whole")
Part = TypeVar("Part")
Answer = TypeVar("Answer")  # to a part

AHEAD = 2  # items under way for each process


@dataclass
class _Process:
    popen: subprocess.Popen[bytes]
    connection: "Connection[Any, Any]"  # this end of its pipe
    ready: bool = False  # has the function and the state


class Processes(Generic[State, Item, Result]):
    """Up to `count` processes, no more than there are items; a thread of this one waits for each.

    Args:
        count: processes at most.
        function: a function of a module, named by import.
        state: what it works with; pickled once for each process.
    """

    def __init__(self, count: int, function: Callable[[State, Item], Result], state: State) -> None:
        assert function.__module__ != "__main__", "a function of the command's own module cannot be found elsewhere"
        self._count, self._function, self._state = count, function, state
        self._all: list[_Process] = []
        self._free: queue.SimpleQueue[_Process] = queue.SimpleQueue()
        self._threads = ThreadPoolExecutor(count)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for process in self._all:
            process.popen.kill()
            process.popen.wait()
        self._threads.shutdown(cancel_futures=True)
        for process in self._all:
            process.connection.close()

    def map(self, items: Iterable[Item]) -> Iterator[Result]:
        """`function(state, item)` of each item.

        Raises:
            UserError: one that the function raised.
            RuntimeError: a process ended.
        """
        under_way: deque[Future[Result]] = deque()
        for item in items:
            if len(self._all) < self._count:
                self._start()
            under_way.append(self._threads.submit(self._ask, item))
            if len(under_way) == AHEAD * self._count:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()

    def map_each(
        self: "Processes[State, Sequence[Part], list[Answer]]",
        items: Iterable[Whole],
        part: Callable[[Whole], Part],
        size: int,
    ) -> Iterator[tuple[Whole, Answer]]:
        """Each item beside its result, where the function takes lists: `size` items go out together, a part of each."""
        sent: deque[list[Whole]] = deque()

        def parts() -> Iterator[list[Part]]:
            rest = iter(items)
            while chunk := list(islice(rest, size)):
                sent.append(chunk)
                yield [part(item) for item in chunk]

        for results in self.map(parts()):
            yield from zip(sent.popleft(), results, strict=True)

    def _start(self) -> None:
        ours, theirs = Pipe()
        with theirs:
            popen = subprocess.Popen(
                [sys.executable, "-m", "alignment.processes", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=os.environ | {"TOKENIZERS_PARALLELISM": "false"},  # tokenizers would start a thread for every core
            )
        self._all.append(_Process(popen, ours))
        self._free.put(self._all[-1])

    def _ask(self, item: Item) -> Result:
        process = self._free.get()
        try:
            if not process.ready:
                process.connection.send((self._function, self._state))
                process.ready = True
            process.connection.send(item)
            reply = process.connection.recv()
        except (EOFError, OSError):
            raise RuntimeError(f"a process of {self._name} ended with exit code {process.popen.wait()}") from None
        finally:
            self._free.put(process)
        if isinstance(reply, UserError):
            raise reply
        result: Result = reply
        return result

    @property
    def _name(self) -> str:
        return f"{self._function.__module__}.{self._function.__qualname__}"


def _serve(connection: "Connection[Any, Any]") -> None:
    function, state = connection.recv()
    while True:
        item = connection.recv()
        try:
            connection.send(function(state, item))
        except UserError as error:
            connection.send(error)


def main(argv: Sequence[str]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, whose end closes the pipe
    try:
        _serve(Connection(int(argv[1])))
    except (EOFError, ConnectionError):
        return


if __name__ == "__main__":
    main(sys.argv)
