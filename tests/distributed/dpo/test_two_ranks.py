"""Two gloo ranks train as one process with the same global batch does, the incomplete last batch included."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

WORKER = Path(__file__).with_name("worker.py")
ROOT = Path(__file__).parents[3]


def two_ranks(out: Path, **options: int) -> Any:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(  # noqa: PLW1510
        [sys.executable, *launcher, str(WORKER), str(out), *(f"--{key}={value}" for key, value in options.items())],
        env={"PATH": "", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out / "result.pt")


def one_process(out: Path, **options: int) -> Any:
    spec = importlib.util.spec_from_file_location("dpo_worker", WORKER)
    assert spec is not None
    assert spec.loader is not None
    worker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(worker)
    return worker.train(out, "ot_dpo", **options)


def test_two_ranks_are_one_process(tmp_path: Path) -> None:
    """11 pairs in global batches of 8: one rank of the second gets a pair and a filler, the other two fillers."""
    (tmp_path / "two").mkdir()
    two = two_ranks(tmp_path / "two", pairs=11, batch=2, accumulation=2)
    one = one_process(tmp_path / "one", pairs=11, batch=4, accumulation=2)
    assert (two["ranks"], one["ranks"]) == (2, 1)
    torch.testing.assert_close(two["weights"], one["weights"], rtol=0, atol=1e-5)
    steps = [[line for line in result["log"] if "pairs" in line] for result in (two, one)]
    assert [line["pairs"] for line in steps[0]] == [8, 3, 8, 3]
    for ours, theirs in zip(*steps, strict=True):
        assert ours.keys() == theirs.keys()
        # at the first step all margins are 0 up to rounding, and accuracy is a coin toss
        for key in ours.keys() - {"grad_norm", "rewards/accuracies"}:
            assert ours[key] == pytest.approx(theirs[key], abs=1e-5), key
    evaluations = [next(line for line in result["log"] if "eval_loss" in line) for result in (two, one)]
    for key in ("eval_loss", "eval_rewards/margins", "eval_pairs"):
        assert evaluations[0][key] == pytest.approx(evaluations[1][key], abs=1e-5), key
    assert steps[0][0]["loss"] - steps[0][2]["loss"] > 0.01, "the training did not move"
