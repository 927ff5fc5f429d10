"""The DeepSpeed config that `accelerate launch` names: what of it is refused under expert parallelism.

The section `expert_parallel` asks for it: {"enabled": true, "autoep_size": 2}.
"""

import json
import os
from pathlib import Path
from typing import Any

from alignment.errors import UserError, did_you_mean

# AutoEP ignores keys that it does not know. Those left out here change what a router or an expert computes: the model
# trained would not be the one exported, whose config.json says nothing of them.
SECTION_KEYS = (
    "enabled", "autoep_size", "preset_model", "moe_layer_pattern", "expert_pattern", "router_pattern",
    "use_grouped_mm", "disable_triton_grouped_mm", "async_split_plan", "combine_impl", "row_weighting_impl",
    "gate_up_impl", "comm_backend", "comm_num_sm", "comm_qp_margin", "comm_max_tokens_per_rank",
)  # fmt: skip
DROPS_TOKENS = ("data_efficiency", "curriculum_learning")


def deepspeed_launched() -> bool:
    """Whether the launcher asks for DeepSpeed."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"


def launcher_config() -> dict[str, Any]:
    """The DeepSpeed config of this launch; empty where it has none."""
    path = _launcher_config_path()
    return {} if path is None else dict(json.loads(path.read_text()))


def _launcher_config_path() -> Path | None:
    path = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    return Path(path) if path is not None and deepspeed_launched() else None


def expert_parallel_size() -> int:
    """The expert-parallel size that the launcher's DeepSpeed config asks for; 0 where it asks for none.

    With 1 AutoEP's layers are there, each rank holding all experts.
    """
    section = launcher_config().get("expert_parallel", {})
    return int(section.get("autoep_size", 1)) if section.get("enabled") else 0


def zero_stage(config: dict[str, Any]) -> int:
    return int(config.get("zero_optimization", {}).get("stage", 0))


def check_launcher_config() -> None:
    """Raise UserError where the DeepSpeed config of this launch cannot train experts in parallel as it should."""
    config, name = launcher_config(), _launcher_config_path()
    for key in config.get("expert_parallel", {}):
        if key == "load_balance_coeff":
            raise UserError(f"{name}: expert_parallel.load_balance_coeff: AutoEP 0.19.8 has no balancing of its own")
        if key not in SECTION_KEYS:
            raise UserError(
                f"{name}: expert_parallel.{key}: no such key, or one that changes what the model computes"
                f"{did_you_mean(key, SECTION_KEYS)}"
            )
    for key in DROPS_TOKENS:
        if key in config:
            raise UserError(f"{name}: {key}: it drops tokens or rows; remove it")
    if "optimizer" not in config:
        raise UserError(
            f"{name}: it has no `optimizer` block, and DeepSpeed puts experts in groups of their own only for\n"
            "an optimizer that it makes itself; take the block of configs/deepspeed/zero1-ep2.json"
        )


def check_precision(bf16: bool) -> None:
    """Raise UserError for bfloat16 at ZeRO 0, where DeepSpeed leaves the experts out of the norm it clips by."""
    if bf16 and zero_stage(launcher_config()) == 0:
        raise UserError(
            f"{_launcher_config_path()}: zero_optimization.stage: at stage 0 with bfloat16, DeepSpeed clips by a\n"
            "norm that leaves the experts out; use stage 1"
        )
