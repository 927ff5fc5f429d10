"""A job's own two vLLM servers, then asked by others: the samples of the engine in one process, and what deaths change.

The servers are started once, by endpoint_worker.py, for all tests; the later ones end them.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from alignment.config import EngineConfig
from alignment.errors import UserError
from alignment.rollout import open_engine
from alignment.rollout.store import stored_samples

WORKER = Path(__file__).with_name("endpoint_worker.py")
START_SECONDS = 400  # 25 on two cores of their own
QUIET = {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
ENGINE = {"max_model_len": 128, "max_num_seqs": 24, "kv_cache_gib": 0.25, "chunk_prompts": 4}
QUICK = {"concurrency": 4, "backoff_seconds": 0.1, "health_seconds": 2, "patience_seconds": 1}
pytestmark = pytest.mark.timeout(3 * START_SECONDS)


class Line:
    """An address in front of a server: what goes there dies, as with the server, when it is cut."""

    def __init__(self, address: str) -> None:
        self._target = ("127.0.0.1", int(address.rpartition(":")[2]))
        self._open: list[socket.socket] = []
        self._port = 0
        self.mend()
        self.address = f"http://127.0.0.1:{self._port}"

    def mend(self) -> None:
        self._listening = socket.create_server(("127.0.0.1", self._port), backlog=64)
        self._port = self._listening.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        for each in (self._listening, *self._open):
            with suppress(OSError):  # it has gone
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        self._open.clear()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listening.accept()
            except OSError:
                return
            far = socket.create_connection(self._target)
            self._open += [near, far]
            for ends in ((near, far), (far, near)):
                threading.Thread(target=self._carry, args=ends, daemon=True).start()

    @staticmethod
    def _carry(source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):  # cut
            while part := source.recv(1 << 16):
                target.sendall(part)
            target.shutdown(socket.SHUT_WR)


@pytest.fixture(scope="module")
def job_with_servers(rollouts: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator["subprocess.Popen[bytes]"]:
    log = tmp_path_factory.mktemp("endpoints") / "replicas.log"
    command = [sys.executable, str(WORKER), "replicas", str(rollouts)]
    with log.open("w") as stream:
        process = subprocess.Popen(command, env={**os.environ, **QUIET}, stdout=stream, stderr=stream)
    deadline = time.monotonic() + START_SECONDS
    try:
        while not (rollouts / "replicas.json").exists():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.2)
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def found(rollouts: Path, job_with_servers: "subprocess.Popen[bytes]") -> dict[str, Any]:
    """What the job with two servers drew; `dead` is the address of the one that it lost, `alive` the other's."""
    found = json.loads((rollouts / "replicas.json").read_text())
    found["alive"], found["dead"] = found["addresses"]
    return found


@pytest.fixture(scope="module")
def here(rollouts: Path) -> list[dict[str, Any]]:
    """The samples of the engine in one process."""
    return in_order(map(vars, stored_samples(rollouts / "whole")))


def in_order(samples: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(samples, key=lambda s: (s["prompt_id"], s["index"]))


def without_logprob(samples: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in s.items() if name != "logprob"} for s in samples]


def logprobs(samples: list[dict[str, Any]]) -> list[float]:
    return [s["logprob"] for s in samples]


def endpoints(*addresses: str) -> dict[str, Any]:
    return {**ENGINE, "endpoints": list(addresses), "requests": QUICK}


def test_servers_draw_what_the_engine_draws(found, here):
    served = in_order(found["served"])
    assert len(served) == 80 and found["faults"] == {}
    assert without_logprob(served) == without_logprob(here)
    assert logprobs(served) == pytest.approx(logprobs(here), abs=1e-4)
    assert {s["finish_reason"] for s in served} == {"stop", "length"}


def test_weights_are_replaced_without_a_restart_and_proven(rollouts, found):
    assert found["proof"]["gap"] < 1e-4 < 0.1 < found["proof"]["before"]
    assert without_logprob(found["loaded"]) != without_logprob(found["served"])
    assert without_logprob(found["again"]) == without_logprob(found["served"])
    assert len(list((rollouts / "served").iterdir())) == 2  # a store for each set of weights


def test_a_server_killed_in_the_middle_loses_and_changes_nothing(found, here):
    assert without_logprob(in_order(found["moved"])) == without_logprob(here)
    assert found["faults of the dead"][f"connection {found['dead']}"] > 0


def test_a_key_that_no_log_holds_is_asked_for(found, rollouts, monkeypatch):
    assert len(found["key"]) > 30 and "safetensors" in found["logs"] and found["key"] not in found["logs"]
    for path in ("/v1/models", "/collective_rpc", "/reset_prefix_cache"):
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(urllib.request.Request(found["alive"] + path, data=b"{}"), timeout=30)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(UserError, match=f"{found['alive']}: 401: set the environment variable OPENAI_API_KEY"):
        open_engine(rollouts / "model-1", EngineConfig(**endpoints(found["alive"])), "float32")


def test_servers_of_other_weights_are_refused_by_address(found, rollouts, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", found["key"])
    with pytest.raises(UserError, match=found["alive"]) as caught:
        open_engine(rollouts / "model-2", EngineConfig(**endpoints(found["alive"])), "float32")
    assert "model-2: log-probabilities of vLLM and transformers differ" in str(caught.value)


def test_all_dead_stops_with_code_2_and_the_same_command_goes_on(found, here, rollouts):
    """One server is dead already; the other is cut off once the job has stored a chunk."""
    line = Line(found["alive"])
    addresses = [line.address, found["dead"]]
    settings = {"output_dir": str(rollouts / "job"), "seed": 7, "model": str(rollouts / "model-1")}
    config = rollouts / "job.yaml"
    config.write_text(yaml.safe_dump({**settings, "engine": endpoints(*addresses)}))
    command = [sys.executable, str(WORKER), "--config", str(config)]
    environment = {**os.environ, **QUIET, "OPENAI_API_KEY": found["key"]}

    job = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    while not (stored := list((rollouts / "job").glob("samples/*/*.parquet"))):
        assert job.poll() is None, job.stderr.read()
        time.sleep(0.01)
    line.cut()
    _, said = job.communicate(timeout=START_SECONDS)
    assert job.returncode == 2, said
    assert all(address in said.split("error: ")[1] for address in addresses) and "Traceback" not in said
    before = {path: path.read_bytes() for path in stored}
    assert len(before) < 3

    line.mend()
    again = subprocess.run(
        command, env=environment, stderr=subprocess.PIPE, text=True, timeout=START_SECONDS, check=False
    )
    assert again.returncode == 0, again.stderr
    assert {path: path.read_bytes() for path in stored} == before
    assert without_logprob(in_order(map(vars, stored_samples(rollouts / "job")))) == without_logprob(here)


def test_no_server_survives_a_job_that_is_killed(found, job_with_servers):
    """The last test: it kills the job that started the servers."""
    running = psutil.Process(job_with_servers.pid).children(recursive=True)
    assert sum(map(is_running, running)) >= 3
    job_with_servers.kill()
    assert gone(running)
    shutil.rmtree(found["logs of"])  # nobody is left to do it


def gone(processes: list[psutil.Process], seconds: float = 60) -> bool:
    deadline = time.monotonic() + seconds
    while any(map(is_running, processes)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not any(map(is_running, processes))


def is_running(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
