"""The memory plan against what two ranks really hold, for every ZeRO stage in float32 and bfloat16."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

Launch = Callable[..., subprocess.CompletedProcess[str]]


def test_plan_is_what_the_engine_holds(launch: Launch, tmp_path: Path) -> None:
    """To a thousandth; the correction biases, 8 numbers, are planned though frozen."""
    launch("memory_worker.py", tmp_path)
    for rank in range(2):
        results = json.loads((tmp_path / f"memory{rank}.json").read_text())
        assert len(results) == 8
        for case, found in results.items():
            for kind in ("weights", "optimizer", "gradients"):
                # Stage 2 keeps whole gradients of the parameters that its partition cuts.
                tolerance = 0.03 if kind == "gradients" and case.startswith("2 ") else 1e-3
                assert found[kind] == pytest.approx(found[f"planned_{kind}"], rel=tolerance), f"{rank}, {case}, {kind}"
