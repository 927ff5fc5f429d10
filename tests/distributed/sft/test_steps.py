"""However the samples of a step are packed, shared out and accumulated, it is the same step: 20 of them, to 1e-5.

What all are compared with: one process, eight packs a step.
"""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

Launch = Callable[..., subprocess.CompletedProcess[str]]
Found = list[dict[str, Any]]  # of each rank: case -> what it ended with
TOLERANCE = 1e-5  # float32
STEPS, PACKS = 20, 8
KINDS = ("dense", "moe")


def found(folder: Path, ranks: int) -> Found:
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(ranks)]


@pytest.fixture(scope="module")
def alone(launch: Launch, tmp_path_factory: pytest.TempPathFactory) -> Found:
    folder = tmp_path_factory.mktemp("alone")
    cases = [f"{kind}-{case}" for kind in KINDS for case in ("packed", "packed-resumed", "single", "joined")]
    launch("steps_worker.py", folder, *cases, ranks=1)
    return found(folder, 1)


@pytest.fixture(scope="module")
def on_two(launch: Launch, tmp_path_factory: pytest.TempPathFactory) -> Found:
    folder = tmp_path_factory.mktemp("two")
    launch("steps_worker.py", folder, *[f"{kind}-packed" for kind in KINDS], expert_parallel=False)
    return found(folder, 2)


@pytest.fixture(scope="module")
def on_four(launch: Launch, tmp_path_factory: pytest.TempPathFactory) -> Found:
    folder = tmp_path_factory.mktemp("four")
    launch("steps_worker.py", folder, *[f"{kind}-packed" for kind in KINDS], ranks=4, expert_parallel=False)
    return found(folder, 4)


@pytest.fixture(scope="module")
def expert_parallel(launch: Launch, tmp_path_factory: pytest.TempPathFactory) -> Found:
    folder = tmp_path_factory.mktemp("experts")
    launch("steps_worker.py", folder, "moe-packed", "moe-packed-resumed")
    return found(folder, 2)


def check_same(case: str, ranks: Found, alone: Found) -> None:
    """Every figure of every step, and the mean loss over the steps."""
    kind = case.partition("-")[0]
    ours, reference = ranks[0][case]["figures"], alone[0][f"{kind}-packed"]["figures"]
    assert ours.keys() == reference.keys() >= {"loss", "grad_norm"}
    for name, values in reference.items():
        assert len(values) == STEPS and len(set(values)) == STEPS, f"{name} stands still"
        assert ours[name] == pytest.approx(values, abs=TOLERANCE, rel=0), name
    assert fmean(ours["loss"]) == pytest.approx(fmean(reference["loss"]), abs=TOLERANCE, rel=0)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_compared_trains_and_holds_the_router_losses(alone: Found, kind: str) -> None:
    figures = alone[0][f"{kind}-packed"]["figures"]
    assert fmean(figures["loss"][-5:]) < fmean(figures["loss"][:5]) - 0.05
    assert ("router/balance_loss" in figures) == (kind == "moe")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("packing", ["single", "joined"])
def test_one_sample_at_a_time_and_all_of_a_step_in_one_pack(alone: Found, kind: str, packing: str) -> None:
    """Packed or not, and eight packs accumulated against one pack of all they hold."""
    case = alone[0][f"{kind}-{packing}"]
    assert case["packs_per_step"] == 1 if packing == "joined" else case["packs_per_step"] > PACKS
    check_same(f"{kind}-{packing}", alone, alone)


@pytest.mark.parametrize("kind", KINDS)
def test_two_and_four_ranks(alone: Found, on_two: Found, on_four: Found, kind: str) -> None:
    for ranks in (on_two, on_four):
        check_same(f"{kind}-packed", ranks, alone)


def test_split_experts(alone: Found, expert_parallel: Found) -> None:
    """Expert parallelism of 2 under ZeRO 1."""
    check_same("moe-packed", expert_parallel, alone)


@pytest.mark.parametrize("kind", KINDS)
def test_resumed_is_uninterrupted(alone: Found, kind: str) -> None:
    assert alone[0][f"{kind}-packed-resumed"]["figures"] == alone[0][f"{kind}-packed"]["figures"], "to the bit"
    check_read(alone[0][f"{kind}-packed-resumed"], range(PACKS * STEPS // 2, PACKS * STEPS))


def test_split_experts_resume(expert_parallel: Found) -> None:
    for number, rank in enumerate(expert_parallel):
        whole, resumed = rank["moe-packed"], rank["moe-packed-resumed"]
        for name, values in whole["figures"].items():
            assert resumed["figures"][name] == pytest.approx(values, abs=1e-7, rel=0), name
        check_read(resumed, range(PACKS * STEPS // 2 + number, PACKS * STEPS, 2))


def test_rank_r_reads_pack_i_times_ranks_plus_r(alone: Found, on_two: Found, on_four: Found) -> None:
    for ranks in (alone, on_two, on_four):
        for number, rank in enumerate(ranks):
            for kind in KINDS:
                check_read(rank[f"{kind}-packed"], range(number, PACKS * STEPS, len(ranks)))


def check_read(case: dict[str, Any], packs: range) -> None:
    """These packs in this order; the loader reads one ahead."""
    assert case["read"][: len(packs)] == list(packs)
    assert len(case["read"]) <= len(packs) + 1
