"""The CPU token exchange against DeepSpeed's own: the same outputs and gradients of the same layer on two ranks."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

Launch = Callable[..., subprocess.CompletedProcess[str]]
GRADIENTS = {"out", "x", "experts.w1", "experts.w2", "experts.w3", "router.gate.weight"}


def test_outputs_and_gradients_are_those_of_the_stock_layer(launch: Launch, tmp_path: Path) -> None:
    """Unequal token counts, EP 1 and 2, and all tokens on the same experts; in bfloat16 ours sums in float32."""
    launch("dispatch_worker.py", tmp_path)
    for rank in range(2):
        results = json.loads((tmp_path / f"dispatch{rank}.json").read_text())
        assert len(results) == 8
        for case, differences in results.items():
            size = differences.pop("size")
            tolerance = 0.05 if "bfloat16" in case else 1e-5
            assert max(differences.values()) < tolerance, f"rank {rank}, {case}: {differences}"
            assert differences.keys() >= GRADIENTS
            assert size > 0 or "crowded" in case, f"rank {rank}, {case}: nothing was compared"
