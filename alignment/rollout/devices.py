"""Which devices of this machine each of several vLLM servers gets."""

import os

import torch

from alignment import cores
from alignment.config import EngineConfig
from alignment.errors import UserError

GPUS, CORES = "CUDA_VISIBLE_DEVICES", "VLLM_CPU_OMP_THREADS_BIND"


def bindings(config: EngineConfig) -> list[dict[str, str]]:
    """For each of `data_parallel_size` servers the environment that gives it devices of its own.

    They share the GPUs that this process sees, or on a CPU its cores; or the lists of cores between `|` in
    VLLM_CPU_OMP_THREADS_BIND, which vLLM's own ranks share in the same way.

    Raises:
        UserError: fewer devices than `data_parallel_size` times `tensor_parallel_size`.
    """
    servers, each = config.data_parallel_size, config.tensor_parallel_size
    if torch.cuda.is_available():
        name, between, devices = GPUS, ",", _gpus()
    else:
        name, between, devices = CORES, "|", _lists_of_cores(servers * each)
    if len(devices) < servers * each:
        raise UserError(
            f"engine.data_parallel_size: {servers} servers with {each} device(s) each want {servers * each}, "
            f"found {len(devices)}: {name}={between.join(devices)}"
        )
    return [{name: between.join(devices[i * each : (i + 1) * each])} for i in range(servers)]


def _gpus() -> list[str]:
    count, given = torch.cuda.device_count(), os.environ.get(GPUS)
    return given.split(",")[:count] if given else list(map(str, range(count)))


def _lists_of_cores(count: int) -> list[str]:
    """`count` lists that share this process's cores; fewer where there are fewer cores."""
    given = os.environ.get(CORES, "auto")
    return cores.shares(count) if given == "auto" else given.split("|")
