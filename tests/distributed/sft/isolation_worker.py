"""One rank of a test: the isolation probe on engines of two gloo ranks, one case after the other.

Writes what each case ended with to OUT/rank{n}.json.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.parallel import DistributedDataParallel
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, PreTrainedModel

from alignment import attention
from alignment.errors import UserError
from alignment.isolation import check_isolation
from alignment.moe.autoep import check_replaced, freeze_correction_bias, install_autoep
from alignment.moe.trainer import ddp_backend
from alignment.training import leave
from sft.data import probe

VOCAB = 64
SIZES = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": 1,
    "pad_token_id": 0, "tie_word_embeddings": True,
}  # fmt: skip
ERNIE = {
    "moe_intermediate_size": 16, "moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1,
    "moe_layer_start_index": 0,
}  # fmt: skip
LFM2 = {"layer_types": ["conv", "full_attention"], "block_ff_dim": 48}


def make(family: str, options: dict[str, Any], dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **(SIZES | options))
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        config, attn_implementation=attention.SEGMENTS, dtype=dtype
    )
    return model


def expert_parallel(stage: int, dtype: torch.dtype = torch.float32) -> tuple[Any, PreTrainedModel]:
    model = make("ernie4_5_moe", ERNIE, dtype)
    freeze_correction_bias(model)
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=[p for p in model.parameters() if p.requires_grad],
        config={
            "train_micro_batch_size_per_gpu": 1,
            "bf16": {"enabled": dtype == torch.bfloat16},
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            "expert_parallel": {"enabled": True, "autoep_size": 2},
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        },
    )
    check_replaced(model)
    return engine, model


def data_parallel(family: str, options: dict[str, Any]) -> tuple[Any, PreTrainedModel]:
    model = make(family, options)
    return DistributedDataParallel(model), model


def losses(engine: Any) -> list[float]:
    """Of three steps on packed rows that differ from rank to rank."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    found = []
    for _ in range(3):
        inputs = probe([torch.randint(VOCAB, (n,), generator=generator) for n in (9, 17)])
        loss = engine(**inputs, labels=inputs["input_ids"], use_cache=False).loss
        engine.backward(loss)
        engine.step()
        found.append(float(loss.detach()))
    return found


def leaky(_module: Any, query: Any, key: Any, value: Any, _mask: Any, *, scaling: float, **_: Any) -> Any:
    out = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2), None


def probed(engine: Any, model: PreTrainedModel) -> dict[str, Any]:
    try:
        gap = check_isolation(engine, model, VOCAB, probe)
    except UserError as error:
        return {"refused": str(error)}
    return {"excess": gap.excess, "one_segment": gap.one_segment, "dtype": str(gap.dtype)}


def leaks_on_rank_1() -> dict[str, Any]:
    """Only one rank's attention is broken: both must refuse, or one would wait for the other."""
    engine, model = data_parallel("llama", {})
    if dist.get_rank() == 1:
        AttentionInterface.register(attention.SEGMENTS, leaky)
    try:
        return probed(engine, model)
    finally:
        attention.register()


def steps_after(stage: int) -> dict[str, Any]:
    """Training behind the probe, and training without it."""
    engine, model = expert_parallel(stage)
    engine.train()
    result = probed(engine, model) | {"training": engine.training and model.training, "losses": losses(engine)}
    untouched, _ = expert_parallel(stage)
    untouched.train()
    return result | {"losses_without": losses(untouched)}


CASES: dict[str, Callable[[], dict[str, Any]]] = {
    "ep2_zero1": lambda: steps_after(1),
    "ep2_zero1_bf16": lambda: probed(*expert_parallel(1, torch.bfloat16)),
    "ep2_zero3": lambda: steps_after(3),
    "ddp_dense": lambda: probed(*data_parallel("llama", {})),
    "ddp_state": lambda: probed(*data_parallel("lfm2", LFM2)),
    "ddp_leak_on_rank_1": leaks_on_rank_1,
}


def main() -> None:
    ddp_backend()
    deepspeed.init_distributed(dist_backend="gloo")
    install_autoep()
    attention.register()
    results = {name: case() for name, case in CASES.items()}
    (Path(sys.argv[1]) / f"rank{dist.get_rank()}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
    leave()
