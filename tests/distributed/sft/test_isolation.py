"""The isolation probe on two gloo ranks: expert parallelism under ZeRO 1 and 3, and plain data parallelism."""

import json
import subprocess
from collections.abc import Callable
from typing import Any

import pytest

Launch = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def ranks(launch: Launch, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What every case ended with, of each rank."""
    folder = tmp_path_factory.mktemp("isolation")
    launch("isolation_worker.py", folder, expert_parallel=False)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("case", ["ep2_zero1", "ep2_zero1_bf16", "ep2_zero3", "ddp_dense"])
def test_engines_pass_with_one_verdict(ranks: list[dict[str, Any]], case: str) -> None:
    ours, theirs = (rank[case] for rank in ranks)
    assert ours["excess"] == theirs["excess"] < 0.5
    assert ours["one_segment"] > 0.05
    assert ours["dtype"] == ("torch.bfloat16" if case.endswith("bf16") else "torch.float32")


@pytest.mark.parametrize("case", ["ep2_zero1", "ep2_zero3"])
def test_training_behind_the_probe_is_training_without_it(ranks: list[dict[str, Any]], case: str) -> None:
    for rank in ranks:
        assert rank[case]["training"]
        assert rank[case]["losses"] == pytest.approx(rank[case]["losses_without"], abs=1e-6)
        assert len(set(rank[case]["losses"])) == 3


@pytest.mark.parametrize("case", ["ddp_state", "ddp_leak_on_rank_1"])
def test_all_ranks_refuse_alike(ranks: list[dict[str, Any]], case: str) -> None:
    assert "packed samples are not kept apart" in ranks[0][case]["refused"]
    assert ranks[0][case]["refused"] == ranks[1][case]["refused"]
