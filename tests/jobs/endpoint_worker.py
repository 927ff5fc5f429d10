"""For test_endpoints.py and test_ray_data.py: samples of the models that rollout_worker.py makes, by other engines.

python endpoint_worker.py replicas FOLDER    two servers of its own: writes replicas.json, and then waits to be killed
python endpoint_worker.py ray FOLDER         writes ray.json
python endpoint_worker.py --config FILE      a job: samples of the prompts into output_dir/samples
"""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from rollout_worker import PROMPTS, SAMPLING, make_tokenizer

from alignment import atomic, job
from alignment.config import EngineConfig, JobConfig
from alignment.rollout import open_engine
from alignment.rollout.replicas import ReplicaEngine
from alignment.rollout.sampling import sample

CHUNK = 4
ENGINE = {"max_model_len": 128, "max_num_seqs": 24, "kv_cache_gib": 0.25, "chunk_prompts": CHUNK}
QUICK = {"backoff_seconds": 0.1, "health_seconds": 2, "patience_seconds": 1}


class SampleConfig(JobConfig):
    """Sample the prompts."""

    model: str
    engine: EngineConfig


def run(config: SampleConfig) -> None:
    with job.Job.open("endpoint_worker", config, {}) as this:
        if this.done:
            return
        with open_engine(Path(config.model), config.engine, "float32") as engine:
            chunks = list(samples_of(engine, this.dir / "samples", config.seed))
        this.finish({"chunks": len(chunks)})


def samples_of(engine: Any, store: Path, seed: int = 7, chunk_prompts: int = CHUNK) -> Any:
    return sample(engine, make_tokenizer(), PROMPTS, store, SAMPLING, seed=seed, chunk_prompts=chunk_prompts)


def rows(chunks: Any) -> list[dict[str, Any]]:
    return [vars(s) for chunk in chunks for of_prompt in chunk.samples for s in of_prompt]


def replicas(folder: Path) -> None:
    """What two servers draw: at first, with other weights, with the first ones again, and while one is killed."""
    config = EngineConfig(**ENGINE, data_parallel_size=2, requests=QUICK)
    engine = open_engine(folder / "model-1", config, "float32")
    assert isinstance(engine, ReplicaEngine)
    servers = [process.pid for process in engine._replicas._processes]
    found: dict[str, Any] = {"addresses": engine._replicas.addresses, "servers": servers, "key": engine._pool._key}
    found["served"] = rows(samples_of(engine, folder / "served"))
    found["faults"] = dict(engine.faults)
    found["proof"] = vars(engine.load_weights(folder / "model-2"))
    found["loaded"] = rows(samples_of(engine, folder / "served"))
    engine.load_weights(folder / "model-1")
    found["again"] = rows(samples_of(engine, folder / "again"))

    chunks = samples_of(engine, folder / "moved")
    first = next(chunks)
    threading.Thread(target=kill_when_asked, args=(engine, 1)).start()
    found["moved"] = rows([first, *chunks])
    found["faults of the dead"] = dict(engine.faults)
    found["logs of"] = str(engine._replicas._folder)
    found["logs"] = "".join(log.read_text() for log in engine._replicas._folder.glob("*.log"))
    atomic.write_json(folder / "replicas.json", found)
    time.sleep(3600)


def kill_when_asked(engine: ReplicaEngine, number: int) -> None:
    """SIGKILL to a server and all that it started, once requests are under way on it."""
    while engine._pool.servers[number].load < 3:
        time.sleep(0.005)
    os.killpg(engine._replicas._processes[number].pid, signal.SIGKILL)


def ray(folder: Path) -> None:
    with open_engine(folder / "model-1", EngineConfig(**ENGINE, ray_replicas=1), "float32") as engine:
        found = rows(samples_of(engine, folder / "ray", chunk_prompts=len(PROMPTS)))  # each chunk starts them anew
    (folder / "ray.json").write_text(json.dumps(found))


if __name__ == "__main__":
    match sys.argv[1]:
        case "replicas":
            replicas(Path(sys.argv[2]))
        case "ray":
            ray(Path(sys.argv[2]))
        case _:
            raise SystemExit(job.main(SampleConfig, run, lambda config: []))
