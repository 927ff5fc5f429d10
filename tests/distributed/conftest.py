"""Launches the scripts of a test's folder on CPU ranks over gloo."""

import functools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SECONDS = 550  # a loaded machine takes several times what a quiet one does
Launch = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def launch(request: pytest.FixtureRequest) -> Launch:
    return functools.partial(_launch, request.path.parent)


def _launch(
    folder: Path,
    script: str,
    *arguments: object,
    ranks: int = 2,
    expert_parallel: bool = True,
    fails: bool = False,
    **environment: str,
) -> subprocess.CompletedProcess[str]:
    """Run a script on `ranks` CPU processes with expert parallelism of 2, or without any, or on one without.

    It must succeed or, with `fails`, fail.
    """
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("ACCELERATE_", "DS_"))}
    settings = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable]
    if ranks > 1 and expert_parallel:
        config = ROOT / "configs" / "accelerate" / "cpu-ep2.yaml"
        command += ["-m", "accelerate.commands.launch", "--config_file", str(config), "--num_processes", str(ranks)]
    elif ranks > 1:
        settings["ACCELERATE_USE_CPU"] = "true"
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    command += [str(folder / script), *map(str, arguments)]
    finished = subprocess.run(
        command,
        check=False,
        env=kept | settings | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert (finished.returncode != 0) == fails, finished.stderr[-4000:]
    return finished
