"""Copies of a model on this machine's devices: a vLLM server for each, that lives as long as the job.

vLLM wants a process for each data-parallel rank. They are the servers of alignment.rollout.serve on loopback, with a
key that nobody else has, and are asked as any other servers are (alignment.rollout.endpoints).
"""

import logging
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from alignment.closing import Closing
from alignment.config import EngineConfig
from alignment.errors import UserError
from alignment.models import check_model_folder
from alignment.rollout.devices import bindings
from alignment.rollout.endpoints import EndpointEngine

LOOPBACK = "127.0.0.1"
GIB = 1 << 30
STEP_TOKENS = 8192  # of one scheduler step, as in the engine of this process
HEALTH_SECONDS, POLL_SECONDS = 5.0, 0.2
CLOSE_SECONDS = 15.0  # more than the keeper's
# An error in a server's log that is not only the sequel of another one.
CAUSE = re.compile(r"\b\w*Error: (?!Engine core init|1 validation).*|\bValue error, .*")
SHOWN = 300
SERVER = (sys.executable, "-m", "alignment.rollout.serve")
KEPT = (sys.executable, "-m", "alignment.rollout.keeper", *SERVER)

logger = logging.getLogger(__name__)


class ReplicaEngine(EndpointEngine):
    """Samples of a model folder from `config.data_parallel_size` servers of this machine.

    Use as a context manager, or `close()` it. A server that dies is left out; its work moves to the others.
    """

    def __init__(self, model: Path, config: EngineConfig, *, dtype: str = "float32") -> None:
        """Start the servers and wait until all are healthy.

        Raises:
            UserError: fewer devices than the servers need, no such model, or a server that does not start.
        """
        check_model_folder(model)
        key = secrets.token_urlsafe()
        self._replicas = Replicas(model, config, dtype, key)
        # As many requests on each as it samples at once.
        requests = config.requests.model_copy(update={"concurrency": config.max_num_seqs})
        asked = config.model_copy(update={"endpoints": self._replicas.addresses, "requests": requests})
        try:
            super().__init__(model, asked, dtype=dtype, key=key)
        except BaseException:
            self._replicas.close()
            raise

    def close(self) -> None:
        """Close the connections and end the servers. Closing twice does nothing."""
        try:
            super().close()
        finally:
            self._replicas.close()


class Replicas(Closing):
    """The servers' processes. None of them outlives this process, however it ends (alignment.rollout.keeper)."""

    def __init__(self, model: Path, config: EngineConfig, dtype: str, key: str) -> None:
        bound = bindings(config)
        ports = _free_ports(len(bound))
        self.addresses = [f"http://{LOOPBACK}:{port}" for port in ports]
        self._processes: list[subprocess.Popen[bytes]] = []
        self._folder = Path(tempfile.mkdtemp(prefix="vllm-"))
        logger.info("%d vLLM servers start; their logs: %s", len(ports), self._folder)
        try:
            for port, devices in zip(ports, bound, strict=True):
                # vLLM leaves its sockets behind where VLLM_RPC_BASE_PATH says.
                own = {**devices, "VLLM_API_KEY": key, "VLLM_RPC_BASE_PATH": str(self._folder)}
                self._start([str(model), *_options(config, dtype, port)], own)
            self._wait()
        except BaseException:
            self._end()
            raise

    def close(self) -> None:
        """End the servers. Closing twice does nothing."""
        for number in self._end():
            logger.warning("%s ended by itself; its log: %s", self.addresses[number], self._log(number))

    def _end(self) -> list[int]:
        """End the servers. Returns which had ended by themselves; where there are such, the logs stay."""
        dead = [number for number, process in enumerate(self._processes) if process.poll() is not None]
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.close()  # what the keeper waits for
        for process in self._processes:
            _await(process)
        self._processes = []
        if not dead:
            shutil.rmtree(self._folder, ignore_errors=True)
        return dead

    def _start(self, arguments: Sequence[str], environment: Mapping[str, str]) -> None:
        with self._log(len(self._processes)).open("wb") as log:
            process = subprocess.Popen(
                [*KEPT, *arguments],
                env={**os.environ, **environment},
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,  # a terminal's Ctrl-C is for the job, which ends them
            )
        self._processes.append(process)

    def _wait(self) -> None:
        """Until all are healthy; vLLM itself gives up after VLLM_ENGINE_READY_TIMEOUT_S.

        Raises:
            UserError: a server has ended.
        """
        waiting = set(range(len(self._processes)))
        while waiting:
            for number in waiting:
                if self._processes[number].poll() is not None:
                    log = self._log(number)
                    raise UserError(
                        f"engine.data_parallel_size: server {number + 1} of {len(self._processes)} did not start: "
                        f"{_what_it_said(log)}\nits log: {log}"
                    )
            waiting = {number for number in waiting if not _is_healthy(self.addresses[number])}
            time.sleep(POLL_SECONDS)

    def _log(self, number: int) -> Path:
        return self._folder / f"server-{number + 1}.log"


def _options(config: EngineConfig, dtype: str, port: int) -> list[str]:
    """The same settings as the engine of this process has."""
    options: dict[str, str | int | float] = {
        "host": LOOPBACK,
        "port": port,
        "dtype": dtype,
        "max-model-len": config.max_model_len,
        "max-num-seqs": config.max_num_seqs,
        "max-num-batched-tokens": max(STEP_TOKENS, config.max_model_len, config.max_num_seqs),
        "tensor-parallel-size": config.tensor_parallel_size,
        "gpu-memory-utilization": config.gpu_memory_utilization,
    }
    if not torch.cuda.is_available():
        options["kv-cache-memory-bytes"] = int(config.kv_cache_gib * GIB)
    return ["--reloadable", *(f"--{name}={value}" for name, value in options.items())]


def _free_ports(count: int) -> list[int]:
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind((LOOPBACK, 0))
        return [each.getsockname()[1] for each in sockets]


def _is_healthy(address: str) -> bool:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(f"{address}/health", timeout=HEALTH_SECONDS) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def _what_it_said(log: Path) -> str:
    """The last error that a log names, or else its last line."""
    text = log.read_text(errors="replace").rstrip()
    causes = CAUSE.findall(text)
    return (causes[-1] if causes else text.rpartition("\n")[2] or "it said nothing")[:SHOWN]


def _await(process: "subprocess.Popen[bytes]") -> None:
    try:
        process.wait(CLOSE_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
