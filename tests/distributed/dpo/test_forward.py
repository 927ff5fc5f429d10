"""The packed forward through DeepSpeed, experts split between two ranks: every step is that of one process."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Launch = Callable[..., subprocess.CompletedProcess[str]]
LIMIT = 1e-5


def found(launch: Launch, folder: Path, *arguments: object, **options: Any) -> dict[str, Any]:
    launch("forward_worker.py", folder, *arguments, **options)
    return dict(json.loads((folder / "result.json").read_text()))


@pytest.fixture(scope="module")
def alone(launch: Launch, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One process, four pairs in each of two micro-batches."""
    return dict(found(launch, tmp_path_factory.mktemp("alone"), 4, 0, ranks=1)["0"])


@pytest.fixture(scope="module")
def expert_parallel(launch: Launch, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return found(launch, tmp_path_factory.mktemp("experts"), 2, 1, 3)


def check_same(case: dict[str, Any], reference: dict[str, Any]) -> None:
    assert case["packed"] and reference["packed"]
    for name, values in reference["figures"].items():
        assert len(values) == 4
        assert case["figures"][name] == pytest.approx(values, abs=LIMIT, rel=LIMIT * (name == "grad_norm")), name


def test_what_is_compared_trains(alone: dict[str, Any]) -> None:
    losses = alone["figures"]["loss"]
    assert losses[0] - losses[2] > 0.02


@pytest.mark.parametrize("stage", ["1", "3"])
def test_experts_split_between_two_ranks(stage: str, expert_parallel: dict[str, Any], alone: dict[str, Any]) -> None:
    """ZeRO 3 gathers the head's weight around its call, which is where the log-probabilities are made."""
    assert expert_parallel[stage]["engine"] == "DeepSpeedEngine"
    check_same(expert_parallel[stage], alone)
