"""Requests to several servers: spread over them, tried again, moved where a server dies, and every fault counted.

A server that does not answer its health checks, or answers nothing but faults, takes no requests until it passes the
caller's own examination again; what was under way on it goes to the others.
"""

import asyncio
import json
import logging
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

import aiohttp
from pydantic import BaseModel, ValidationError

from alignment.config import RequestsConfig
from alignment.errors import UserError

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)

BROKEN_AFTER = 8  # faults in a row, and a server that calls itself healthy is examined anew
STRIKES = 3  # health checks that may pass without an answer; one is enough where the connection is refused
LONGEST_BACKOFF = 30.0
# Below the 5 s after which vLLM's server closes an idle connection: a request on a connection that closes is lost.
KEEP_ALIVE_SECONDS = 2.0
TRY_LATER = (408, 425, 429)
REFUSED = (400, 413, 422)
SHOWN = 200  # characters of a server's answer in a message

logger = logging.getLogger(__name__)


class Fault(Exception):
    """A request failed in a way that another try, or another server, may mend."""

    def __init__(self, kind: str, detail: str = "", retry_after: float = 0.0) -> None:
        super().__init__(f"{kind} ({detail})" if detail else kind)
        self.kind = kind
        self.retry_after = retry_after


class Refusal(UserError):
    """A server finds fault with the request itself: neither another try nor another server would help."""


@dataclass(eq=False)
class Server:
    """One address and what is known of it. `up`: takes requests. `load`: requests that chose it and are not done."""

    address: str
    slots: asyncio.Semaphore
    model: str = ""
    up: bool = False
    why_down: str = "not asked yet"
    load: int = 0
    paused_until: float = 0.0
    faults_in_a_row: int = 0
    strikes: int = 0
    suspect: asyncio.Event = field(default_factory=asyncio.Event)
    session: aiohttp.ClientSession | None = None


class Pool:
    """Servers that answer alike. Its calls block; the requests run in a thread with an event loop of its own.

    So it can be used from any thread, with a running event loop or without, and a signal that interrupts the caller
    ends what is under way.
    """

    def __init__(
        self,
        addresses: Iterable[str],
        config: RequestsConfig,
        examine: Callable[[Server], Awaitable[None]],
        key: str | None = None,
        health: str = "/health",
    ) -> None:
        """`examine` decides whether a server may be asked: it raises a Fault, or a UserError with the reason.

        `health` is what a server that is well answers a GET of.

        `key` is sent with every request; None: the one in the environment variable that `config` names, if any.
        """
        self.faults: Counter[str] = Counter()  # "kind address" -> how often
        self.servers = [Server(address, asyncio.Semaphore(config.concurrency)) for address in addresses]
        self._config, self._examine, self._health = config, examine, health
        self._key = key or os.environ.get(config.key_variable)
        self._some_up = asyncio.Event()
        self._watches: list[asyncio.Task[None]] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="endpoints", daemon=True)
        self._thread.start()

    def open(self) -> None:
        """Examine the servers and watch them from now on. One that does not answer is left out until it does.

        Raises:
            UserError: a server is refused, or none answers within `patience_seconds`. The pool is then closed.
        """
        try:
            self.run(self._start())
        except BaseException:
            self.close()
            raise

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`, run in the pool's thread."""
        done = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return done.result()
        finally:
            done.cancel()  # where the wait was interrupted

    def map(
        self,
        bodies: Iterable[Mapping[str, Any]],
        path: str,
        read: Callable[[Any], T],
        refused: Callable[[Refusal], T] | None = None,
    ) -> list[T]:
        """POST each of `bodies` to `path` of any server; what `read` makes of the answers, in the order of `bodies`.

        `read` raises a Fault where the answer is not what was asked for. `refused` gives what stands for the answer to
        a request that is refused; without it a refusal is raised.

        Raises:
            UserError: a request failed `tries` times, or no server is left; both name the addresses.
        """
        return self.run(self._map(list(bodies), path, read, refused))

    def close(self) -> None:
        """Close the connections and end the thread. Closing twice does nothing."""
        if self._loop.is_closed():
            return
        self.run(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _start(self) -> None:
        deadline = time.monotonic() + self._config.patience_seconds
        for server in self.servers:
            server.session = self._session()
        while not self._some_up.is_set():
            await asyncio.gather(*map(self._admit, self.servers))
            if self._some_up.is_set():
                break
            if time.monotonic() > deadline:
                raise self._none_up()
            await asyncio.sleep(min(1.0, self._config.health_seconds))
        for server in self.servers:
            if not server.up:
                logger.warning("%s does not answer and is left out until it does: %s", server.address, server.why_down)
            self._watches.append(asyncio.create_task(self._watch(server)))

    async def _stop(self) -> None:
        for watch in self._watches:
            watch.cancel()
        await asyncio.gather(*self._watches, return_exceptions=True)
        for server in self.servers:
            if server.session is not None:
                await server.session.close()

    def _session(self) -> aiohttp.ClientSession:
        # Without trust_env: a proxy of the environment is not for the cluster's own machines, loopback least of all.
        return aiohttp.ClientSession(
            headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_SECONDS),
            trust_env=False,
        )

    # One request

    async def get(self, server: Server, path: str) -> Any:
        """GET `path` within `health_seconds`. Raises Fault, or UserError where another try would not help."""
        return await self._ask(server, "GET", path, None, self._config.health_seconds)

    async def post(self, server: Server, path: str, body: Mapping[str, Any]) -> Any:
        """POST `body` to `path` within `timeout_seconds`. Raises as `get` does."""
        return await self._ask(server, "POST", path, body, self._config.timeout_seconds)

    async def _ask(self, server: Server, method: str, path: str, body: Mapping[str, Any] | None, seconds: float) -> Any:
        session = server.session
        assert session is not None
        try:
            # No redirects: the key is for this address.
            async with (
                asyncio.timeout(seconds),
                session.request(method, server.address + path, json=body, allow_redirects=False) as response,
            ):
                status, content = response.status, await response.read()
                retry_after = response.headers.get("Retry-After", "")
        except TimeoutError:
            raise Fault("timeout", f"no answer in {seconds:g} s") from None
        except aiohttp.ClientPayloadError:
            raise Fault("truncated", "the answer broke off") from None
        except aiohttp.ClientConnectionError as error:
            raise Fault("connection", _shown(str(error).encode())) from None
        except aiohttp.ClientError as error:
            raise Fault("garbage", _shown(str(error).encode())) from None
        except RuntimeError as error:
            if not session.closed:
                raise
            # What aiohttp says where `_take_down` came between two of its steps.
            raise Fault("connection", str(error)) from None
        if status == 200:
            return _parsed(content)
        if status >= 500 or status in TRY_LATER:
            raise Fault(str(status), _shown(content), _seconds(retry_after))
        if status in (401, 403):
            variable = self._config.key_variable
            raise UserError(f"{server.address}: {status}: set the environment variable {variable} to the server's key")
        raise (Refusal if status in REFUSED else UserError)(f"{server.address}{path}: {status}: {_shown(content)}")

    # Many requests

    async def _map(
        self,
        bodies: list[Mapping[str, Any]],
        path: str,
        read: Callable[[Any], T],
        refused: Callable[[Refusal], T] | None,
    ) -> list[T]:
        answers: dict[int, T] = {}
        waiting = iter(enumerate(bodies))
        workers = min(len(bodies), self._config.concurrency * len(self.servers))
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(workers):
                    group.create_task(self._work(waiting, path, read, refused, answers))
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return [answers[number] for number in range(len(bodies))]

    async def _work(
        self,
        waiting: Iterator[tuple[int, Mapping[str, Any]]],
        path: str,
        read: Callable[[Any], T],
        refused: Callable[[Refusal], T] | None,
        answers: dict[int, T],
    ) -> None:
        for number, body in waiting:
            try:
                answers[number] = await self._persist(body, path, read)
            except Refusal as refusal:
                if refused is None:
                    raise
                answers[number] = refused(refusal)

    async def _persist(self, body: Mapping[str, Any], path: str, read: Callable[[Any], T]) -> T:
        """Ask until there is an answer, not the same server twice in a row if there is another."""
        failed, avoid = 0, None
        while True:
            server = await self._choose(avoid)
            server.load += 1
            try:
                async with server.slots:
                    await asyncio.sleep(max(0.0, server.paused_until - time.monotonic()))
                    if not server.up:
                        continue
                    answer = read(await self.post(server, path, {**body, "model": server.model}))
                server.faults_in_a_row = 0
                return answer
            except Fault as fault:
                failed, avoid, last = failed + 1, server, fault
                await self._note(server, fault)
            finally:
                server.load -= 1
            if failed == self._config.tries:
                raise UserError(f"{server.address}: no answer to a request in {failed} tries; the last: {last}")
            await asyncio.sleep(self._backoff(failed))

    async def _choose(self, avoid: Server | None) -> Server:
        if not self._some_up.is_set():
            with suppress(TimeoutError):
                await asyncio.wait_for(self._some_up.wait(), self._config.patience_seconds)
        up = [server for server in self.servers if server.up]
        if not up:
            raise self._none_up()
        now = time.monotonic()
        others = [server for server in up if server is not avoid] or up
        return min(others, key=lambda server: (server.paused_until > now, server.load))

    def _backoff(self, failed: int) -> float:
        longest = min(LONGEST_BACKOFF, self._config.backoff_seconds * 2.0 ** (failed - 1))
        return longest * random.uniform(0.5, 1.0)  # so that requests that failed together do not come back together

    # The state of a server

    async def _note(self, server: Server, fault: Fault) -> None:
        self._count(server, fault)
        if fault.retry_after:
            pause = min(fault.retry_after, self._config.timeout_seconds)
            server.paused_until = max(server.paused_until, time.monotonic() + pause)
        if fault.kind in ("connection", "timeout", "truncated"):
            server.suspect.set()
        if fault.kind != "429":
            server.faults_in_a_row += 1
        if server.up and server.faults_in_a_row >= BROKEN_AFTER:
            await self._take_down(server, f"{BROKEN_AFTER} faults in a row, the last: {fault}")

    def _count(self, server: Server, fault: Fault) -> None:
        name = f"{fault.kind} {server.address}"
        if name not in self.faults:
            logger.warning("%s: %s; further ones are counted", server.address, fault)
        self.faults[name] += 1

    async def _watch(self, server: Server) -> None:
        """Ask the server how it is, time after time, and at once where a request was lost."""
        while True:
            with suppress(TimeoutError):
                await asyncio.wait_for(server.suspect.wait(), self._config.health_seconds)
            server.suspect.clear()
            if not server.up:
                await self._readmit(server)
                continue
            try:
                await self.get(server, self._health)
                server.strikes = 0
            except (Fault, UserError) as error:
                server.strikes += 1
                refused = isinstance(error, Fault) and error.kind == "connection"
                if refused or server.strikes >= STRIKES:
                    await self._take_down(server, f"{self._health}: {error}")

    async def _readmit(self, server: Server) -> None:
        try:
            await self._admit(server)
        except UserError as refused:
            if server.why_down != str(refused):
                logger.warning("%s stays out: %s", server.address, refused)
            server.why_down = str(refused)
        if server.up:
            logger.warning("%s answers again", server.address)

    async def _admit(self, server: Server) -> None:
        try:
            await self._examine(server)
        except Fault as fault:
            self._count(server, fault)
            server.why_down = str(fault)
            return
        server.up, server.strikes, server.faults_in_a_row = True, 0, 0
        self._some_up.set()

    async def _take_down(self, server: Server, why: str) -> None:
        if not server.up:
            return
        logger.warning("%s takes no more requests until it is well: %s", server.address, why)
        server.up, server.why_down = False, why
        if not any(other.up for other in self.servers):
            self._some_up.clear()
        assert server.session is not None
        lost, server.session = server.session, self._session()
        await lost.close()  # what is under way fails now, not at its time limit, and moves to the others

    def _none_up(self) -> UserError:
        reasons = "; ".join(f"{server.address}: {server.why_down}" for server in self.servers)
        return UserError(f"no server answers; the same command goes on when one does\n{reasons}")


def read_as(shape: type[M], answer: Any) -> M:
    """An answer in its shape. Raises Fault where it has another."""
    try:
        return shape.model_validate(answer)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise Fault("garbage", f"{place or 'answer'}: {first['msg']}") from None


def _parsed(content: bytes) -> Any:
    if not content:
        return None
    try:
        return json.loads(content)
    except ValueError:  # broken encoding is one, too
        raise Fault("garbage", f"not JSON: {_shown(content)}") from None


def _shown(content: bytes) -> str:
    return " ".join(content[:SHOWN].decode(errors="replace").split())


def _seconds(retry_after: str) -> float:
    """Of a Retry-After header; its other form, a date, counts as absent."""
    return float(retry_after) if retry_after.isdecimal() else 0.0
