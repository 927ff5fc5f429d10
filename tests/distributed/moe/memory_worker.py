"""One rank of a test: the bytes that a DeepSpeed engine really holds of a tiny model, for each ZeRO stage and dtype."""

import json
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
from transformers import Ernie4_5_MoeForCausalLM
from worker import tiny_config

from alignment.moe.autoep import check_replaced, freeze_correction_bias, install_autoep
from alignment.moe.memory import Sharding, count_experts, held
from alignment.moe.trainer import ddp_backend
from alignment.training import leave

RANKS = EP = 2


def distinct(tensors: list[torch.Tensor]) -> int:
    """Bytes of the storages under these tensors, each once: views of a flat buffer are no memory of their own."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def measured(stage: int, dtype: str) -> dict[str, float]:
    """Bytes of weights and of optimizer state (with the float32 copy) after a step, and what the plan says."""
    torch.manual_seed(0)
    config = tiny_config(hidden_size=128, moe_intermediate_size=64, vocab_size=256, tie_word_embeddings=False)
    model = Ernie4_5_MoeForCausalLM._from_config(config, dtype=getattr(torch, dtype))
    freeze_correction_bias(model)
    experts = count_experts(model)
    dense = sum(p.numel() for p in model.parameters()) - experts
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=[p for p in model.parameters() if p.requires_grad],
        config={
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 2,
            "bf16": {"enabled": dtype == "bfloat16"},
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            "expert_parallel": {"enabled": True, "autoep_size": EP},
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        },
    )
    check_replaced(model)
    ids = torch.arange(8)[None]
    engine.backward(engine(input_ids=ids, labels=ids).loss)
    gradients = distinct(gradient_tensors(model, engine.optimizer))  # between two micro-batches
    engine.step()
    engine.backward(engine(input_ids=ids, labels=ids).loss)
    engine.step()
    sharding = Sharding(RANKS, EP, stage, dtype)
    shares = (held(dense, sharding), held(experts, sharding, EP))
    weights = [getattr(p, "ds_tensor", p.data) for p in model.parameters()]
    return {
        "weights": distinct(weights),
        "optimizer": distinct(optimizer_tensors(engine.optimizer, distinct_from=weights)),
        "gradients": gradients,
        "planned_weights": sum(share.weights for share in shares),
        "planned_optimizer": sum(share.optimizer for share in shares),
        "planned_gradients": sum(share.gradients for share in shares),
    }


def gradient_tensors(model: torch.nn.Module, optimizer: Any) -> list[torch.Tensor]:
    """Where each stage accumulates: the parameters (0, 1), the parameters of its partition (2), one flat buffer (3)."""
    found = [g for p in model.parameters() for g in (p.grad, getattr(p, "grad_accum", None)) if g is not None]
    found += [g for partitions in getattr(optimizer, "all_grad_tensors", {}).values() for g in partitions or []]
    return found + [t for t in [getattr(optimizer, "grad_partitions_flat_buffer", None)] if t is not None]


def optimizer_tensors(optimizer: Any, distinct_from: list[torch.Tensor]) -> list[torch.Tensor]:
    """AdamW's moments, and the parameters it steps unless they are the model's own memory."""
    adam = getattr(optimizer, "optimizer", optimizer)
    own = {tensor.untyped_storage().data_ptr() for tensor in distinct_from}
    stepped = [p for group in adam.param_groups for p in group["params"]]
    stepped += getattr(optimizer, "fp32_partitioned_groups_flat", [])
    moments = [t for state in adam.state.values() for t in state.values() if torch.is_tensor(t) and t.numel() > 1]
    return moments + [p for p in stepped if p.untyped_storage().data_ptr() not in own]


def main() -> None:
    ddp_backend()
    deepspeed.init_distributed(dist_backend="gloo")
    install_autoep()
    results = {f"{stage} {dtype}": measured(stage, dtype) for stage in range(4) for dtype in ("float32", "bfloat16")}
    rank = torch.distributed.get_rank()
    (Path(sys.argv[1]) / f"memory{rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
    leave()
