"""Jobs on two ranks under ZeRO 3: the models are those of other layouts, and what rank 0 does alone holds nobody up."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from alignment.rows import write_rows

ROOT = Path(__file__).parents[2]
SECONDS = 250  # a loaded machine; waiting for a rank that has gone takes longer


def launcher(folder: Path, stage: int) -> Path:
    """The launcher's config for two ranks, two expert-parallel ones, at a stage of ZeRO."""
    deepspeed = json.loads((ROOT / "configs/deepspeed/zero1-ep2.json").read_text())
    (folder / f"zero{stage}.json").write_text(json.dumps(deepspeed | {"zero_optimization": {"stage": stage}}))
    accelerate = yaml.safe_load((ROOT / "configs/accelerate/cpu-ep2.yaml").read_text())
    accelerate["deepspeed_config"]["deepspeed_config_file"] = str(folder / f"zero{stage}.json")
    (folder / f"zero{stage}.yaml").write_text(yaml.safe_dump(accelerate))
    return folder / f"zero{stage}.yaml"


def train(folder: Path, stage: int, module: str, **config: Any) -> Path:
    """Runs the job; returns its output folder."""
    output = folder / f"{module}-zero{stage}"
    path = folder / f"{module}-zero{stage}-job.yaml"
    path.write_text(yaml.safe_dump({"output_dir": str(output)} | config))
    command = [sys.executable, "-m", "alignment.launch", "--config_file", str(launcher(folder, stage))]
    finished = subprocess.run(
        [*command, "-m", module, "--config", str(path)],
        check=False, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr[-4000:]
    return output


def test_sft_trains_the_model_that_zero_1_trains(tiny_model_folder: Path, tmp_path: Path) -> None:
    said = [{"role": "user", "content": "3 shirts?"}, {"role": "assistant", "content": "\\boxed{45}"}]
    write_rows(tmp_path / "rows.jsonl", ({"messages": said} for _ in range(40)))
    config: dict[str, Any] = {
        "model": {"path": str(tiny_model_folder)},
        "sources": [{"rows": str(tmp_path / "rows.jsonl")}],
        "packing": {"capacity": 64, "bucket": 16},
        "prepare": {"cache": str(tmp_path / "cache")},
        "training": {"learning_rate": 1e-3, "log_steps": 1, "accumulation": 2},
    }
    ours, other = (
        load_file(train(tmp_path, stage, "sft.train", **config) / "model/model.safetensors") for stage in (3, 1)
    )
    assert ours.keys() == other.keys()
    assert max((ours[key] - other[key]).abs().max().item() for key in ours) < 1e-5
    base = load_file(tiny_model_folder / "model.safetensors")
    assert max((ours[key] - base[key]).abs().max().item() for key in ours) > 1e-3


def test_dpo_trains_in_bfloat16_beside_a_frozen_copy(tiny_model_folder: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "pairs.jsonl", map(pair, range(32)))
    model = {"path": str(tiny_model_folder), "dtype": "bfloat16"}
    output = train(
        tmp_path, 3, "dpo.train", model=model, reference={"kind": "live"},
        rows=str(tmp_path / "pairs.jsonl"), batch_size=4, training={"learning_rate": 1e-2, "log_steps": 1},
    )  # fmt: skip
    lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6), "policy and copy have the same weights"
    assert losses[-1] < 0.2


def test_a_reward_model_is_judged_by_rank_0_alone(tiny_model_folder: Path, tmp_path: Path) -> None:
    """Its Scorer loads the model that was just trained; transformers would partition it over ranks that have gone."""
    write_rows(tmp_path / "pairs.jsonl", map(pair, range(32)))
    write_rows(tmp_path / "eval.jsonl", map(pair, range(100, 104)))
    model = {"path": str(tiny_model_folder), "dtype": "bfloat16"}
    output = train(
        tmp_path, 3, "reward.train", model=model, rows=str(tmp_path / "pairs.jsonl"),
        eval_rows=str(tmp_path / "eval.jsonl"), prepare={"cache": str(tmp_path / "cache")}, batch_size=4,
        training={"learning_rate": 3e-3, "log_steps": 2},
    )  # fmt: skip
    metrics = json.loads((output / "metrics.json").read_text())
    assert (metrics["eval.accuracy"], metrics["train.steps"]) == (1.0, 4)


def pair(number: int) -> dict[str, Any]:
    return {
        "id": f"row-{number}",
        "prompt": [{"role": "user", "content": f"{number} shirts cost?"}],
        "chosen": [{"role": "assistant", "content": "\\boxed{37.5}"}],
        "rejected": [{"role": "assistant", "content": "no idea"}],
    }
