"""The CPU token exchange against DeepSpeed's own: the same outputs and gradients of the same layer on two ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
GRADIENTS = {"out", "x", "experts.w1", "experts.w2", "experts.w3", "router.gate.weight"}


def test_outputs_and_gradients_are_those_of_the_stock_layer(tmp_path: Path) -> None:
    """Unequal token counts, EP 1 and 2, and all tokens on the same experts; in bfloat16 ours sums in float32."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    settings = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_DEEPSPEED": "true"}
    finished = subprocess.run(
        [*command, str(HERE / "dispatch_worker.py"), str(tmp_path)],
        check=False,
        env=os.environ | settings,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    for rank in range(2):
        results = json.loads((tmp_path / f"dispatch{rank}.json").read_text())
        assert len(results) == 8
        for case, differences in results.items():
            size = differences.pop("size")
            tolerance = 0.05 if "bfloat16" in case else 1e-5
            assert max(differences.values()) < tolerance, f"rank {rank}, {case}: {differences}"
            assert differences.keys() >= GRADIENTS
            assert size > 0 or "crowded" in case, f"rank {rank}, {case}: nothing was compared"
