"""What one rank's device holds of a model in training: weights, gradients and AdamW's state, by arithmetic alone.

Expert parallelism leaves a rank 1/EP of the routed experts. ZeRO partitions over the ranks that hold the same
parameters, all for dense weights and ranks / EP for experts: stage 1 the optimizer's state, stage 2 the gradients
too, stage 3 the weights too (Rajbhandari et al. 2020, arXiv:1910.02054, section 5; for experts Rajbhandari et al. 2022,
arXiv:2201.05596).
"""

import os
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedConfig

from alignment.moe.autoep import expert_parameters
from alignment.moe.config import deepspeed_launched, expert_parallel_size, launcher_config, zero_stage

GB = 10**9
DEVICE_BYTES = 80 * GB
DTYPE_BYTES = {"float32": 4, "bfloat16": 2}
MOMENTS_BYTES = 8
COPY_BYTES = 4


@dataclass(frozen=True)
class Sharding:
    """How a model lies on the ranks; `zero_stage` is None without DeepSpeed."""

    ranks: int
    expert_parallel: int
    zero_stage: int | None
    dtype: str

    @property
    def optimizer_bytes(self) -> int:
        """Bytes of optimizer state for a parameter, before partitioning.

        DeepSpeed 0.19.8 keeps float32 moments and a float32 copy of the weights, under ZeRO even of float32 weights.
        Without it torch's AdamW has moments in the weights' dtype and no copy.
        """
        if self.zero_stage is None:
            return 2 * DTYPE_BYTES[self.dtype]
        copied = self.zero_stage > 0 or self.dtype == "bfloat16"
        return MOMENTS_BYTES + (COPY_BYTES if copied else 0)


@dataclass(frozen=True)
class Held:
    """Bytes on one rank: `parameters` are its share before ZeRO, which splits it over `partitions` ranks."""

    parameters: int
    partitions: int
    weights: float
    gradients: float
    optimizer: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer


def held(parameters: int, sharding: Sharding, shards: int = 1) -> Held:
    """The bytes that a rank holds of `parameters`, which expert parallelism splits into `shards`; 1 for dense ones."""
    own, size = parameters // shards, DTYPE_BYTES[sharding.dtype]
    partitions, stage = sharding.ranks // shards, sharding.zero_stage or 0
    return Held(
        parameters=own,
        partitions=partitions,
        weights=own * size / (partitions if stage == 3 else 1),
        gradients=own * size / (partitions if stage >= 2 else 1),
        optimizer=own * sharding.optimizer_bytes / (partitions if stage >= 1 else 1),
    )


def launched_sharding(dtype: str) -> Sharding:
    """What the launcher's environment asks for; without DeepSpeed weights are float32 (`training.held`)."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if not deepspeed_launched():
        return Sharding(ranks, 1, None, "float32")
    config = launcher_config()
    if not config:
        return Sharding(ranks, 1, int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")), dtype)
    return Sharding(ranks, max(1, expert_parallel_size()), zero_stage(config), dtype)


def count_experts(model: nn.Module) -> int:
    """Parameters of the routed experts, which expert parallelism splits; all others are dense."""
    return sum(parameter.numel() for parameter in expert_parameters(model))


def frozen_bytes(model: nn.Module, sharding: Sharding) -> float:
    """What a rank holds of a model that only answers: weights, its experts split as those that train."""
    experts = count_experts(model)
    dense = sum(p.numel() for p in model.parameters()) - experts
    return held(dense, sharding).weights + held(experts, sharding, sharding.expert_parallel).weights


def memory_plan(model: nn.Module, config: PreTrainedConfig, sharding: Sharding) -> list[str]:
    """Lines that say what one rank holds of the model (which may lie on the meta device), and whether 80 GB suffice."""
    experts = count_experts(model)
    shares = {"dense": held(sum(p.numel() for p in model.parameters()) - experts, sharding)}
    if experts:
        shares["experts"] = held(experts, sharding, sharding.expert_parallel)
    total = sum(share.total for share in shares.values())
    activations = config.num_hidden_layers * config.hidden_size * DTYPE_BYTES[sharding.dtype]
    left = (DEVICE_BYTES - total) / GB
    verdict = f"fits, {left:,.1f} GB left" if left > 0 else f"does NOT fit, {-left:,.1f} GB too many"
    stage = "no DeepSpeed" if sharding.zero_stage is None else f"ZeRO {sharding.zero_stage}"
    return [
        f"memory of one rank: {sharding.ranks} ranks, expert parallelism {sharding.expert_parallel}, {stage}, "
        f"{sharding.dtype}, in GB of 10^9 bytes",
        f"  {'':8}{'parameters':>12}{'weights':>10}{'gradients':>11}{'optimizer':>11}{'sum':>9}",
        *(_row(name, share, sharding) for name, share in shares.items()),
        f"  {total / GB:,.1f} of {DEVICE_BYTES // GB} GB: {verdict}",
        "  not counted: buffers for communication and weights that ZeRO 3 gathers for use; and activations, of which",
        f"  gradient checkpointing keeps layers x hidden x {DTYPE_BYTES[sharding.dtype]} bytes = "
        f"{activations / 1e6:,.2f} MB a token between layers",
    ]


def _row(name: str, share: Held, sharding: Sharding) -> str:
    parts = [part / GB for part in (share.weights, share.gradients, share.optimizer, share.total)]
    stage = sharding.zero_stage or 0
    split = ("", "optimizer", "gradients and optimizer", "all")[stage]
    note = f"  {split} split over {share.partitions} ranks" if stage and share.partitions > 1 else ""
    return (
        f"  {name:8}{share.parameters / 1e9:>11,.2f}B{parts[0]:>10,.1f}{parts[1]:>11,.1f}{parts[2]:>11,.1f}"
        f"{parts[3]:>9,.1f}{note}"
    )
