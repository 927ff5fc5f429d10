"""Router losses under expert parallelism against one process. Every micro-batch holds a fully padded row."""

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

Launch = Callable[..., subprocess.CompletedProcess[str]]

# Steps of 8 rows each. Micro scope depends on how they are cut, so there the cut is the same.
CASES = ("global", "micro", "global+checkpointing")


def results(launch: Launch, folder: Path, batch: int, accumulate: int, ranks: int, *cases: str) -> dict[str, Any]:
    launch("router_worker.py", folder, batch, accumulate, *cases, ranks=ranks)
    return dict(torch.load(folder / "router.pt"))


@pytest.fixture(scope="module")
def whole(launch: Launch, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One process, one batch a step."""
    return results(launch, tmp_path_factory.mktemp("whole"), 8, 1, 1, "global", "micro")


@pytest.fixture(scope="module")
def cut(launch: Launch, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One process, four micro-batches a step."""
    return results(launch, tmp_path_factory.mktemp("cut"), 2, 4, 1, *CASES)


@pytest.fixture(scope="module")
def parallel(launch: Launch, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two ranks, experts split, two micro-batches a step."""
    return results(launch, tmp_path_factory.mktemp("parallel"), 2, 2, 2, *CASES)


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["history"].keys() == expected["history"].keys()
    for name, values in expected["history"].items():
        assert found["history"][name] == pytest.approx(values, abs=1e-5), name
    torch.testing.assert_close(found["weights"], expected["weights"], rtol=0, atol=1e-5)
    assert found["load"] == expected["load"]


def test_global_scope_does_not_depend_on_how_the_step_is_cut(
    whole: dict[str, Any], cut: dict[str, Any], parallel: dict[str, Any]
) -> None:
    assert_same(cut["global"], whole["global"])
    assert_same(parallel["global"], whole["global"])
    assert_same(parallel["global+checkpointing"], whole["global"])


def test_global_scope_on_four_ranks_with_experts_held_twice(
    launch: Launch, whole: dict[str, Any], tmp_path: Path
) -> None:
    assert_same(results(launch, tmp_path, 2, 1, 4, "global")["global"], whole["global"])


def test_micro_scope_is_the_same_on_ranks_as_accumulated(cut: dict[str, Any], parallel: dict[str, Any]) -> None:
    assert_same(parallel["micro"], cut["micro"])


def test_micro_scope_does_depend_on_it(whole: dict[str, Any], cut: dict[str, Any]) -> None:
    ours, other = cut["micro"]["history"]["router/balance_loss"], whole["micro"]["history"]["router/balance_loss"]
    assert ours[0] > other[0] + 0.01
    assert whole["micro"]["history"] == whole["global"]["history"]


def test_what_is_logged(whole: dict[str, Any]) -> None:
    history = whole["global"]["history"]
    assert whole["global"]["stated"] == pytest.approx(sum(history["loss"]) / 5, abs=1e-5)
    assert history["router/balance_coefficient"] == pytest.approx([0.5, 0.45, 0.4, 0.35, 0.3])
    assert history["router/z_coefficient"] == pytest.approx([0.05, 0.045, 0.04, 0.035, 0.03])
    for step in range(5):
        balance, z = history["router/balance_loss"][step], history["router/z_loss"][step]
        expected = 2 * (history["router/balance_coefficient"][step] * balance)  # two layers, each with the coefficient
        expected += 2 * history["router/z_coefficient"][step] * z
        assert history["router/added_loss"][step] == pytest.approx(expected, rel=1e-5)
    assert history["router/balance_loss"][0] > 1.1
    assert history["router/balance_loss"][-1] < history["router/balance_loss"][0]
