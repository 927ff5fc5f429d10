"""What a launch with expert parallelism is refused for before any rank computes; layouts that a run may change to."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import yaml
from torch import nn

from alignment.errors import UserError
from alignment.moe.config import check_launcher_config, check_precision
from alignment.moe.engine import check_expert_groups, refusal
from alignment.moe.resume import Layout, check_change
from alignment.moe.trainer import ExpertParallelTrainerMixin

ROOT = Path(__file__).parents[3]
GOOD: dict[str, Any] = {
    "zero_optimization": {"stage": 1},
    "expert_parallel": {"enabled": True, "autoep_size": 2},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto"}},
}


@pytest.fixture
def launched_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, Any]], None]:
    def launch(config: dict[str, Any]) -> None:
        (tmp_path / "ds.json").write_text(json.dumps(config))
        monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(tmp_path / "ds.json"))
        monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")

    return launch


@pytest.mark.parametrize(
    ("section", "reason"),
    [
        ({"autoep_sise": 2}, r"ds.json: expert_parallel.autoep_sise: .*did you mean 'autoep_size'"),
        ({"top_k": 1}, "expert_parallel.top_k: no such key, or one that changes what the model computes"),
        ({"route_norm": False}, "expert_parallel.route_norm"),
        ({"load_balance_coeff": 0.01}, "load_balance_coeff: AutoEP 0.19.8 has no balancing of its own"),
    ],
)
def test_section_that_would_train_another_model_is_refused(
    launched_with: Callable[[dict[str, Any]], None], section: dict[str, Any], reason: str
) -> None:
    launched_with(GOOD | {"expert_parallel": GOOD["expert_parallel"] | section})
    with pytest.raises(UserError, match=reason):
        check_launcher_config()


@pytest.mark.parametrize("key", ["data_efficiency", "curriculum_learning"])
def test_config_that_drops_tokens_is_refused(launched_with: Callable[[dict[str, Any]], None], key: str) -> None:
    launched_with(GOOD | {key: {"enabled": True}})
    with pytest.raises(UserError, match=f"{key}: it drops tokens"):
        check_launcher_config()


def test_config_without_an_optimizer_is_refused(launched_with: Callable[[dict[str, Any]], None]) -> None:
    launched_with({key: value for key, value in GOOD.items() if key != "optimizer"})
    with pytest.raises(UserError, match="ds.json: it has no `optimizer` block"):
        check_launcher_config()


def test_bfloat16_is_refused_at_zero_0_alone(launched_with: Callable[[dict[str, Any]], None]) -> None:
    launched_with(GOOD)
    check_precision(bf16=True)
    launched_with(GOOD | {"zero_optimization": {"stage": 0}})
    check_precision(bf16=False)
    with pytest.raises(UserError, match="leaves the experts out"):
        check_precision(bf16=True)


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "deepspeed").glob("*ep*.json")), ids=lambda path: path.stem)
def test_every_recipe_is_accepted(path: Path, launched_with: Callable[[dict[str, Any]], None]) -> None:
    launched_with(json.loads(path.read_text()))
    check_launcher_config()
    check_precision(bf16=True)


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_launch_has_processes_for_its_experts(path: Path) -> None:
    launch = yaml.safe_load(path.read_text())
    config = json.loads((ROOT / launch["deepspeed_config"]["deepspeed_config_file"]).read_text())
    experts = config.get("expert_parallel", {"autoep_size": 1})  # none for a dense model
    assert launch["num_processes"] % experts["autoep_size"] == 0
    assert launch["num_processes"] >= launch["num_machines"]


def test_optimizer_without_groups_of_experts_is_refused() -> None:
    block = nn.Module()
    block.experts, block._is_autoep_layer = nn.Linear(2, 2), cast(Any, True)
    optimizer = torch.optim.AdamW(block.parameters())
    with pytest.raises(UserError, match="no parameter group of AdamW is marked as experts"):
        check_expert_groups(block, optimizer)
    optimizer.param_groups[0]["moe"] = True
    check_expert_groups(block, optimizer)
    del optimizer.param_groups[0]["moe"]
    block.experts.requires_grad_(False)  # as with adapters on attention
    check_expert_groups(block, optimizer)


def test_reentrant_checkpointing_is_refused() -> None:
    def check(options: dict[str, Any] | None) -> None:
        args = SimpleNamespace(
            bf16=False, save_on_each_node=False, gradient_checkpointing=True, gradient_checkpointing_kwargs=options
        )
        ExpertParallelTrainerMixin._check_arguments(cast(Any, SimpleNamespace(args=args)))

    check(None)
    check({"use_reentrant": False})
    with pytest.raises(UserError, match="use_reentrant"):
        check({"use_reentrant": True})


def test_refusal_names_what_was_called() -> None:
    with pytest.raises(UserError, match=r"engine.save_16bit_model .*\ncall trainer.save_model"):
        refusal("engine.save_16bit_model")("folder", exclude_frozen_parameters=True)


# the layout of a run

TWO = Layout(world_size=2, expert_parallel_size=2, zero_stage=1, rows_per_step=8)


def test_layout_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert Layout.read(tmp_path) is None
    TWO.write(tmp_path)
    assert Layout.read(tmp_path) == TWO


@pytest.mark.parametrize(
    ("saved", "present"),
    [
        (TWO, replace(TWO, expert_parallel_size=1)),
        (TWO, replace(TWO, world_size=4, expert_parallel_size=4)),
        (replace(TWO, zero_stage=3), replace(TWO, zero_stage=3, world_size=4)),
        (Layout(1, 0, None, 8), Layout(2, 0, None, 8)),
    ],
)
def test_layouts_that_a_run_may_change_to(saved: Layout, present: Layout) -> None:
    check_change(saved, present, Path("checkpoint-2"))


@pytest.mark.parametrize(
    ("saved", "present", "reason"),
    [
        (
            TWO,
            replace(TWO, world_size=4, rows_per_step=16),
            r"a step was 8 rows .* is 16 .*\nset training.accumulation",
        ),
        (TWO, replace(TWO, zero_stage=2), "same ZeRO stage"),
        (TWO, Layout(2, 0, None, 8), "same ZeRO stage, not on 2 ranks, expert-parallel size 0, without DeepSpeed"),
        (replace(TWO, zero_stage=0), replace(TWO, zero_stage=0, world_size=4), "cannot convert what ZeRO 0 saves"),
        (TWO, replace(TWO, expert_parallel_size=0), "only between launches with expert parallelism"),
    ],
)
def test_layouts_that_a_run_may_not_change_to(saved: Layout, present: Layout, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        check_change(saved, present, Path("checkpoint-2"))
