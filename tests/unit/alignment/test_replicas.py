"""Servers of a job's own, with a server that is quick to start in vLLM's place: devices, key, faults, and their end."""

import asyncio
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from pydantic import ValidationError

from alignment import cores
from alignment.config import EngineConfig
from alignment.errors import UserError
from alignment.rollout import place, replicas
from alignment.rollout.devices import bindings
from alignment.rollout.guard import KeyEverywhere
from alignment.rollout.replicas import Replicas
from alignment.rollout.serve import arguments

KEY = "the-key-of-the-test"
# Tells what it was given, has a child of its own as vLLM's servers have, and answers /health.
SERVER = r"""
import os, subprocess, sys
from http.server import BaseHTTPRequestHandler, HTTPServer

options = dict(part.partition("=")[::2] for part in sys.argv[1:])
if "fails" in sys.argv[1]:
    print("ValueError: No memory.\nRuntimeError: Engine core initialization failed. See above.\nbye", flush=True)
    sys.exit(1)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
cores, key = os.environ.get("VLLM_CPU_OMP_THREADS_BIND"), "VLLM_API_KEY" in os.environ
print(cores, "key" * key, child.pid, *sys.argv[1:], flush=True)


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_):
        pass


HTTPServer((options["--host"], int(options["--port"])), Handler).serve_forever()
"""
JOB = """
import subprocess, sys, time
kept = [subprocess.Popen(sys.argv[1:], stdin=subprocess.PIPE, start_new_session=True) for _ in range(2)]
time.sleep(600)
"""


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    (tmp_path / "server.py").write_text(SERVER)
    kept = (sys.executable, "-m", "alignment.rollout.keeper", sys.executable, str(tmp_path / "server.py"))
    monkeypatch.setattr(replicas, "KEPT", kept)
    monkeypatch.setattr(cores.os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    monkeypatch.setattr(cores, "TOPOLOGY", tmp_path / "cpu")
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND", raising=False)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(replicas.tempfile, "tempdir", None)
    return kept


def config(**settings: Any) -> EngineConfig:
    return EngineConfig(**{"data_parallel_size": 2, **settings})


def processes(folder: Path) -> list[psutil.Process]:
    """The servers that logged into `folder`, their children and their keepers."""
    children = [psutil.Process(int(log.read_text().split()[2])) for log in folder.glob("*.log")]
    return [process for child in children for process in (child, child.parent(), child.parent().parent())]


def are_gone(processes: list[psutil.Process]) -> bool:
    _, alive = psutil.wait_procs(processes, timeout=20)
    return not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


def test_each_server_gets_its_cores_the_settings_and_a_key() -> None:
    settings = config(max_model_len=9000, max_num_seqs=7, kv_cache_gib=0.5, gpu_memory_utilization=0.8)
    with Replicas(Path("model"), settings, "bfloat16", KEY) as started:
        logs = [log.read_text().split() for log in sorted(started._folder.glob("*.log"))]
        commands = [process.cmdline() for process in processes(started._folder)]
    assert [log[:2] for log in logs] == [["0,1", "key"], ["2,3", "key"]]
    for log, address in zip(logs, started.addresses, strict=True):
        assert log[3:] == [
            "model", "--reloadable", "--host=127.0.0.1", f"--port={address.rpartition(':')[2]}", "--dtype=bfloat16",
            "--max-model-len=9000", "--max-num-seqs=7", "--max-num-batched-tokens=9000", "--tensor-parallel-size=1",
            "--gpu-memory-utilization=0.8", f"--kv-cache-memory-bytes={1 << 29}",
        ]  # fmt: skip
    assert len(commands) == 6 and not any(KEY in part for command in commands for part in command)


def test_closing_ends_all_and_leaves_nothing() -> None:
    with Replicas(Path("model"), config(), "float32", KEY) as started:
        running = processes(started._folder)
        assert len(running) == 6
    assert are_gone(running) and not started._folder.exists()
    started.close()


def test_a_server_that_dies_takes_its_children_along_and_leaves_its_log(caplog: pytest.LogCaptureFixture) -> None:
    """vLLM's engine would go on without its server."""
    with Replicas(Path("model"), config(), "float32", KEY) as started:
        children = sorted(started._folder.glob("*.log"))
        dying = processes(started._folder)[:3]
        log = next(log for log in children if log.read_text().split()[2] == str(dying[0].pid))
        dying[1].kill()
        assert are_gone(dying)
    [message] = [record.getMessage() for record in caplog.records]
    assert message.endswith(f"ended by itself; its log: {log}") and log.exists()


def test_no_server_outlives_a_job_that_is_killed(kept: tuple[str, ...]) -> None:
    command = [sys.executable, "-c", JOB, *kept, "--host=127.0.0.1", "--port=0"]
    job = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert job.stdout is not None
    assert job.stdout.readline() and job.stdout.readline()
    running = psutil.Process(job.pid).children(recursive=True)
    job.kill()
    job.wait()
    job.stdout.close()
    assert len(running) == 6 and are_gone(running)


def test_a_server_that_does_not_start_is_named_with_its_last_error(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        Replicas(Path("fails"), config(), "float32", KEY)
    said, log = str(caught.value).splitlines()
    assert said.endswith("of 2 did not start: ValueError: No memory.") and said.startswith("engine.data_parallel_size")
    assert log.startswith(f"its log: {tmp_path}") and Path(log.removeprefix("its log: ")).exists()


def test_devices_are_shared_out_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """What shares a socket or a physical core stays together: see test_cores."""
    monkeypatch.setattr(cores, "usable", lambda: [0, 2, 1, 3])
    assert bindings(config()) == [{"VLLM_CPU_OMP_THREADS_BIND": "0,2"}, {"VLLM_CPU_OMP_THREADS_BIND": "1,3"}]
    assert bindings(config(tensor_parallel_size=2))[1] == {"VLLM_CPU_OMP_THREADS_BIND": "1|3"}
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "4-7|8-9")
    assert bindings(config()) == [{"VLLM_CPU_OMP_THREADS_BIND": "4-7"}, {"VLLM_CPU_OMP_THREADS_BIND": "8-9"}]
    with pytest.raises(UserError, match=r"3 servers with 1 device\(s\) each want 3, found 2: VLLM_CPU.*=4-7\|8-9"):
        bindings(config(data_parallel_size=3))
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND")
    with pytest.raises(UserError, match="want 6, found 4"):
        bindings(config(data_parallel_size=3, tensor_parallel_size=2))


def test_gpus_that_others_were_given_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    halves = [{"CUDA_VISIBLE_DEVICES": "0,1"}, {"CUDA_VISIBLE_DEVICES": "2,3"}]
    assert bindings(config(tensor_parallel_size=2)) == halves
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,5,GPU-3,1")
    assert bindings(config())[1] == {"CUDA_VISIBLE_DEVICES": "5"}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)  # the last one does not exist
    with pytest.raises(UserError, match="want 4, found 3: CUDA_VISIBLE_DEVICES=7,5,GPU-3$"):
        bindings(config(tensor_parallel_size=2))


def test_the_plan_says_where_samples_are_drawn() -> None:
    assert place(EngineConfig()) == "in this process"
    assert place(config(tensor_parallel_size=4)) == "by 2 servers on this machine, 4 device(s) each"
    assert place(EngineConfig(ray_replicas=3)) == "by 3 Ray replicas"
    assert place(EngineConfig(endpoints=["http://a:1", "http://b:1/v1"])) == "by the servers http://a:1, http://b:1"


@pytest.mark.parametrize("other", [{"endpoints": ["http://a:1"]}, {"ray_replicas": 2}])
def test_one_place_to_sample(other: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="data_parallel_size, endpoints and ray_replicas exclude each other"):
        config(**other)
    EngineConfig(**other)


@pytest.mark.parametrize(
    ("path", "header", "status"),
    [
        ("/collective_rpc", b"", 401),
        ("/collective_rpc", b"Bearer other", 401),
        ("/reset_prefix_cache", b"Basic " + KEY.encode(), 401),
        ("/collective_rpc", b"bearer " + KEY.encode(), 200),
        ("/health", b"", 200),
    ],
)
def test_the_key_is_asked_for_where_weights_are_replaced(
    path: str, header: bytes, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def server(_scope: Any, _receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200})

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    sent: list[dict[str, Any]] = []
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    assert "--middleware=alignment.rollout.guard.KeyEverywhere" in arguments("M", [], on_cpu=True)
    scope = {"type": "http", "path": path, "headers": [(b"authorization", header)]}
    asyncio.run(KeyEverywhere(server)(scope, None, send))
    assert sent[0]["status"] == status
