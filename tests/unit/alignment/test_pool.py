"""Servers that answer late, wrongly, or never: every request is answered once, or the job stops with the address."""

import asyncio
import importlib.util
import logging
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from alignment.config import RequestsConfig
from alignment.errors import UserError
from alignment.rollout.pool import BROKEN_AFTER, Fault, Pool, Server

spec = importlib.util.spec_from_file_location("scripted_server", Path(__file__).with_name("scripted_server.py"))
scripted = sys.modules.setdefault("scripted_server", importlib.util.module_from_spec(spec))
spec.loader.exec_module(scripted)
ScriptedServer = scripted.ScriptedServer

QUICK = {
    "concurrency": 4, "timeout_seconds": 0.5, "tries": 4, "backoff_seconds": 0.01, "health_seconds": 0.2,
    "patience_seconds": 0.5,
}  # fmt: skip
SECRET = "sk-not-for-logs"


def echo(_path: str, body: Any) -> Any:
    return {"number": body["number"]}


def read(answer: Any) -> int:
    if not isinstance(answer, dict) or "number" not in answer:
        raise Fault("garbage", "no number")
    return answer["number"]


class Cluster:
    """Scripted servers and pools, closed at the end of a test."""

    def __init__(self) -> None:
        self.opened: list[Any] = []

    def server(self, answer: Callable[[str, Any], Any] = echo, port: int = 0) -> ScriptedServer:
        self.opened.append(ScriptedServer(answer, port))
        return self.opened[-1]

    def pool(self, *servers: ScriptedServer, examine: Any = None, **changes: Any) -> Pool:
        async def healthy(server: Server) -> None:
            await pool.get(server, "/health")
            if examine is not None:
                examine(server)

        pool = Pool([s.address for s in servers], RequestsConfig(**{**QUICK, **changes}), healthy)
        self.opened.append(pool)
        pool.open()
        return pool


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    cluster = Cluster()
    yield cluster
    for thing in reversed(cluster.opened):
        thing.close()


def ask(pool: Pool, count: int = 12) -> list[int]:
    return pool.map([{"number": i} for i in range(count)], "/v1/completions", read)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "never came about"
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("word", "kind"),
    [("429", "429"), ("500", "500"), ("503:1", "503"), ("garbage", "garbage"), ("empty", "garbage"),
     ("truncated", "truncated"), ("reset", "connection"), ("hang", "timeout")],
)  # fmt: skip
def test_a_fault_is_counted_by_kind_and_address_and_the_request_is_answered(cluster, word, kind):
    server = cluster.server()
    pool = cluster.pool(server)
    server.script.extend([word, word])
    assert ask(pool) == list(range(12))
    assert pool.faults == {f"{kind} {server.address}": 2}
    assert len(server.posts) == 14


@pytest.mark.parametrize("word", ["429", "500", "garbage", "truncated", "reset", "hang"])
def test_a_fault_for_ever_ends_with_the_address_after_a_bounded_number_of_tries(cluster, word):
    server = cluster.server()
    pool = cluster.pool(server)
    server.for_ever = word
    with pytest.raises(UserError, match=server.address):
        ask(pool)
    assert 0 < sum(pool.faults.values()) <= len(server.posts) + 8  # and health checks
    assert len(server.posts) <= QUICK["tries"] * QUICK["concurrency"]


def test_a_server_that_only_fails_is_left_out_and_the_other_does_the_work(cluster):
    broken, sound = cluster.server(), cluster.server()
    refuse = threading.Event()

    def examine(server: Server) -> None:
        if refuse.is_set() and server.address == broken.address:
            raise Fault("500", "still broken")

    pool = cluster.pool(broken, sound, examine=examine)
    broken.for_ever = "500"
    refuse.set()
    assert ask(pool, 60) == list(range(60))
    assert not pool.servers[0].up and pool.servers[1].up
    assert BROKEN_AFTER <= len(broken.posts) < 60 <= len(sound.posts)
    refuse.clear()
    until(lambda: pool.servers[0].up)
    broken.for_ever = ""
    ask(pool, 20)
    assert pool.servers[0].up


def test_retry_after_is_respected_and_the_other_server_is_asked_meanwhile(cluster):
    busy, idle = cluster.server(), cluster.server()
    busy.for_ever = "429:2"
    pool = cluster.pool(busy, idle, timeout_seconds=5)
    ask(pool, 40)
    assert 0 < len(busy.posts) <= QUICK["concurrency"]  # those under way when the first 429 came
    assert len(idle.posts) == 40

    alone = cluster.server()
    alone.script.append("429:1")
    ask(cluster.pool(alone, concurrency=1, timeout_seconds=5), 3)
    first, second, *_ = [at for at, _ in alone.posts]
    assert second - first >= 1


def test_a_session_that_closes_between_two_steps_is_a_lost_connection(cluster, monkeypatch):
    server = cluster.server()
    pool = cluster.pool(server)
    read, closed = aiohttp.ClientResponse.read, []

    async def late(response):
        if not closed:
            closed.append(await pool.servers[0].session.close())
            raise RuntimeError("Connection closed.")
        return await read(response)

    monkeypatch.setattr(aiohttp.ClientResponse, "read", late)
    assert ask(pool, 4) == list(range(4))
    assert pool.faults[f"connection {server.address}"] > 0


def test_no_more_requests_at_once_than_allowed(cluster):
    def slow(server: ScriptedServer) -> ScriptedServer:
        """Its first answers wait until as many requests have come as may, on however busy a machine."""

        def answer(path: str, body: Any) -> Any:
            until = time.monotonic() + 0.2
            while server.most_at_once < 4 and time.monotonic() < until:
                time.sleep(0.005)
            time.sleep(0.05)
            return echo(path, body)

        server.answer = answer
        return server

    servers = [slow(cluster.server()), slow(cluster.server())]
    assert ask(cluster.pool(*servers), 40) == list(range(40))
    assert [server.most_at_once for server in servers] == [4, 4]
    dead, alone = cluster.server(), slow(cluster.server())
    pool = cluster.pool(dead, alone)
    dead.die()
    ask(pool, 40)
    assert alone.most_at_once == 4  # though the other's share of the work is waiting


def test_the_work_of_a_server_that_dies_moves_and_it_is_asked_again_when_it_is_back(cluster):
    dying, living = cluster.server(), cluster.server()
    pool = cluster.pool(dying, living)

    def answer(path: str, body: Any) -> Any:
        if len(dying.posts) == 6:
            threading.Thread(target=dying.die).start()
        time.sleep(0.1)
        return echo(path, body)

    dying.answer = answer
    assert ask(pool, 60) == list(range(60))
    until(lambda: not pool.servers[0].up)
    assert pool.faults[f"connection {dying.address}"] > 0

    back = cluster.server(port=dying.port)
    until(lambda: pool.servers[0].up)
    ask(pool, 20)
    assert back.posts


def test_a_server_that_hangs_is_found_by_its_health_and_its_requests_move(cluster):
    hanging, living = cluster.server(), cluster.server()
    pool = cluster.pool(hanging, living, timeout_seconds=600)
    hanging.health = hanging.for_ever = "hang"
    assert ask(pool) == list(range(12))
    assert not pool.servers[0].up


def test_all_dead_stops_with_the_addresses_and_goes_on_when_one_is_back(cluster):
    servers = [cluster.server(), cluster.server()]
    pool = cluster.pool(*servers)
    for server in servers:
        server.die()
    with pytest.raises(UserError) as caught:
        ask(pool)
    assert all(server.address in str(caught.value) for server in servers)

    with pytest.raises(UserError, match=servers[0].address):
        cluster.pool(*servers)
    cluster.server(port=servers[0].port)
    until(lambda: pool.servers[0].up)
    assert ask(pool) == list(range(12))


def test_a_server_that_comes_back_as_another_stays_out(cluster):
    changing, other = cluster.server(), cluster.server()
    strange = threading.Event()

    def examine(server: Server) -> None:
        if strange.is_set() and server.address == changing.address:
            raise UserError(f"{server.address}: other weights")

    pool = cluster.pool(changing, other, examine=examine)
    strange.set()
    changing.die()
    ask(pool)
    back = cluster.server(port=changing.port)
    until(lambda: pool.servers[0].why_down.endswith("other weights"))
    ask(pool)
    assert not back.posts


def test_a_mistake_is_not_tried_again(cluster):
    server = cluster.server()
    pool = cluster.pool(server)
    for word in ("400", "404", "302"):
        server.posts.clear()
        server.for_ever = word
        with pytest.raises(UserError, match=f"{server.address}/v1/completions: {word}"):
            ask(pool, 1)
        assert len(server.posts) == 1


def test_the_key_is_sent_and_shown_nowhere(cluster, monkeypatch, caplog):
    monkeypatch.setenv("CLUSTER_KEY", SECRET)
    caplog.set_level(logging.DEBUG)
    server = cluster.server()
    pool = cluster.pool(server, key_variable="CLUSTER_KEY")
    server.script.extend(["500", "garbage", "reset"])
    ask(pool)
    server.for_ever = "401"
    with pytest.raises(UserError, match="environment variable CLUSTER_KEY") as caught:
        ask(pool)
    assert server.authorization == {f"Bearer {SECRET}"}
    assert SECRET not in caplog.text + str(caught.value)


def test_proxies_of_the_environment_are_not_for_the_cluster(cluster, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert ask(cluster.pool(cluster.server())) == list(range(12))


def test_works_in_a_running_loop_and_in_a_thread(cluster):
    pool = cluster.pool(cluster.server())

    async def inside() -> list[int]:
        return ask(pool)

    found = []
    thread = threading.Thread(target=lambda: found.append(ask(pool)))
    thread.start()
    thread.join()
    assert asyncio.run(inside()) == found[0] == list(range(12))


def test_a_signal_ends_the_wait_and_what_is_under_way(cluster):
    class Stop(BaseException):
        pass

    def handle(*_: Any) -> None:
        raise Stop

    server = cluster.server()
    pool = cluster.pool(server, timeout_seconds=600)
    server.for_ever = "hang"
    former = signal.signal(signal.SIGALRM, handle)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        with pytest.raises(Stop):
            ask(pool)
    finally:
        signal.signal(signal.SIGALRM, former)
    until(lambda: pool.servers[0].load == 0)
    server.for_ever = ""
    assert ask(pool) == list(range(12))
