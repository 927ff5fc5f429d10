"""One Ray Data replica on this machine draws what the engine in this process draws."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from alignment.rollout.store import stored_samples

WORKER = Path(__file__).with_name("endpoint_worker.py")
SECONDS = 500
pytestmark = [
    pytest.mark.timeout(3 * SECONDS),
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not among the locked packages"),
]


def test_a_replica_draws_what_the_engine_draws(rollouts):
    quiet = {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
    command = [sys.executable, str(WORKER), "ray", str(rollouts)]
    done = subprocess.run(
        command, env={**os.environ, **quiet}, capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    here, ray = (
        sorted(samples, key=lambda s: (s["prompt_id"], s["index"]))
        for samples in (map(vars, stored_samples(rollouts / "whole")), json.loads((rollouts / "ray.json").read_text()))
    )
    assert len(ray) == 80
    assert [(s["token_ids"], s["finish_reason"]) for s in ray] == [(s["token_ids"], s["finish_reason"]) for s in here]
    assert [s["logprob"] for s in ray] == pytest.approx([s["logprob"] for s in here], abs=1e-4)
