"""The memory plan's arithmetic by hand; tests/distributed/moe/test_memory.py holds it against real ranks."""

import json
from pathlib import Path

import pytest

from alignment import models
from alignment.moe.memory import GB, Sharding, count_experts, held, launched_sharding, memory_plan

# 64 ranks, EP 8: dense weights lie on all 64, a rank's 1/8 of the experts on 8 ranks. bfloat16: weights and gradients 2
# bytes each, float32 copy and moments 12. All of 6,400 parameters.
DENSE = {0: (12800, 12800, 76800), 1: (12800, 12800, 1200), 2: (12800, 200, 1200), 3: (200, 200, 1200)}
EXPERTS = {0: (1600, 1600, 9600), 1: (1600, 1600, 1200), 2: (1600, 200, 1200), 3: (200, 200, 1200)}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_shares_by_hand(stage: int) -> None:
    sharding = Sharding(ranks=64, expert_parallel=8, zero_stage=stage, dtype="bfloat16")
    for share, expected in ((held(6400, sharding), DENSE), (held(6400, sharding, shards=8), EXPERTS)):
        assert (share.weights, share.gradients, share.optimizer) == expected[stage]
        assert share.total == sum(expected[stage])


@pytest.mark.parametrize(
    ("stage", "dtype", "expected"),
    [
        (None, "float32", 8),
        (None, "bfloat16", 4),
        (0, "float32", 8),
        (0, "bfloat16", 12),
        (1, "float32", 12),
        (3, "float32", 12),
    ],
)
def test_optimizer_bytes(stage: int | None, dtype: str, expected: int) -> None:
    assert Sharding(ranks=1, expert_parallel=1, zero_stage=stage, dtype=dtype).optimizer_bytes == expected


def test_compass_v3_on_64_devices() -> None:
    """ZeRO 3 spreads 16 bytes of each of 244.9B parameters over 64 ranks; under ZeRO 1 weights alone fill a device."""
    config = models.preset_config("compass-v3")
    model = models.on_meta(config)
    assert count_experts(model) == 72 * 16 * 3 * 8192 * 8192
    lines = memory_plan(model, config, Sharding(64, 8, 3, "bfloat16"))
    total = 244_907_648_128 * 16 / 64 / GB
    assert f"  {total:.1f} of 80 GB: fits, {80 - total:.1f} GB left" in lines
    assert "1.18 MB a token" in lines[-1]  # 72 layers x 8,192 x 2 bytes
    dense = 244_907_648_128 - count_experts(model)
    total = (4 * dense + 12 * dense / 64 + 4 * 231.928 * GB / 8 + 12 * 231.928 * GB / 64) / GB
    lines = memory_plan(model, config, Sharding(64, 8, 1, "bfloat16"))
    assert f"  {total:.1f} of 80 GB: does NOT fit, {total - 80:.1f} GB too many" in lines


def test_sharding_is_read_from_the_launchers_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ds.json"
    path.write_text(
        json.dumps({"zero_optimization": {"stage": 2}, "expert_parallel": {"enabled": True, "autoep_size": 4}})
    )
    for name in ("WORLD_SIZE", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_DEEPSPEED_CONFIG_FILE"):
        monkeypatch.delenv(name, raising=False)
    assert launched_sharding("float32") == Sharding(1, 1, None, "float32")
    assert launched_sharding("bfloat16") == Sharding(1, 1, None, "float32")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert launched_sharding("float32") == Sharding(8, 1, None, "float32")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(path))
    assert launched_sharding("float32") == Sharding(8, 4, 2, "float32")
    assert launched_sharding("bfloat16") == Sharding(8, 4, 2, "bfloat16")
