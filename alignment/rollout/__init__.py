"""Sampling: vLLM in this process or on servers, and a store that survives a kill."""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from alignment.config import EngineConfig
from alignment.rows import local_inputs

if TYPE_CHECKING:
    from alignment.rollout.adapters import AdapterEngine
    from alignment.rollout.endpoints import EndpointEngine
    from alignment.rollout.engine import VLLMEngine
    from alignment.rollout.ray_data import RayEngine

# vLLM 0.31 warns its users of torch functions that it calls itself.
warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")


def open_engine(
    model: Path, config: EngineConfig, dtype: str
) -> "AdapterEngine | EndpointEngine | RayEngine | VLLMEngine":
    """The engine that `config` names, with the weights of `model`. Use as a context manager, or `close()` it."""
    if config.endpoints:
        from alignment.rollout.endpoints import EndpointEngine

        return EndpointEngine(model, config, dtype=dtype)
    if config.data_parallel_size > 1:
        from alignment.rollout.replicas import ReplicaEngine

        return ReplicaEngine(model, config, dtype=dtype)
    if config.ray_replicas:
        from alignment.rollout.ray_data import RayEngine

        return RayEngine(model, config, dtype=dtype)
    if config.adapters:
        from alignment.rollout.adapters import AdapterEngine

        return AdapterEngine(model, config, dtype=dtype)
    from alignment.rollout.engine import VLLMEngine

    return VLLMEngine(model, config, dtype=dtype)


def engine_inputs(model: str, config: EngineConfig) -> list[Path]:
    """The folders of this machine whose weights sample: what a job hashes as its inputs."""
    return local_inputs(model, *config.adapters.values())


def place(config: EngineConfig) -> str:
    """Where `open_engine` samples, in words."""
    if config.endpoints:
        return f"by the servers {', '.join(config.endpoints)}"
    if config.ray_replicas:
        return f"by {config.ray_replicas} Ray replicas"
    if config.data_parallel_size > 1:
        return f"by {config.data_parallel_size} servers on this machine, {config.tensor_parallel_size} device(s) each"
    if config.adapters:
        return f"in this process, by adapters for {', '.join(sorted(config.adapters))}"
    return "in this process"
