"""One rank of a test: every model family under AutoEP, one training step, exported and compared with its reload."""

import json
import sys
from pathlib import Path
from typing import Any, cast

import deepspeed
import torch
import transformers
from transformers import PreTrainedModel

from alignment.moe.autoep import (
    autoep_layers,
    check_model,
    check_replaced,
    freeze_correction_bias,
    install_ernie_preset,
)
from alignment.moe.export import export_model
from alignment.moe.trainer import ddp_backend

COMMON: dict[str, Any] = {
    "vocab_size": 48, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2,
}  # fmt: skip
MOE: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT: dict[str, Any] = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_shared_experts": 1, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4, "v_head_dim": 8, "head_dim": 4, "num_key_value_heads": 4,
}  # fmt: skip
ERNIE: dict[str, Any] = {
    "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16, "moe_num_shared_experts": 1,
    "moe_layer_start_index": 1, "head_dim": 8,
}  # fmt: skip
# Architecture, what it needs beyond COMMON, and the stage of ZeRO that it is trained and exported under.
FAMILIES: dict[str, tuple[str, dict[str, Any], int]] = {
    "ernie": ("Ernie4_5_Moe", ERNIE, 1),
    "ernie_zero3": ("Ernie4_5_Moe", ERNIE, 3),
    "qwen3": ("Qwen3Moe", MOE | {"norm_topk_prob": True, "head_dim": 8}, 0),
    "qwen2": ("Qwen2Moe", MOE | {"shared_expert_intermediate_size": 16}, 2),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}, 3),
    "deepseek_v2": ("DeepseekV2", LATENT | {"topk_method": "greedy"}, 3),
    "deepseek_v3": ("DeepseekV3", LATENT, 3),
}


def ds_config(bf16: bool, stage: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": bf16},
        "expert_parallel": {"enabled": True, "autoep_size": 2},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
    }


def gate_error(engine: Any, ids: torch.Tensor) -> float:
    """How far the logits of the engine's router gates are from a float32 product of what the gates hold and are given.

    Infinite where a gate answers in another dtype.
    """
    errors: list[float] = []
    gates = [cast(Any, layer).router.gate for _, layer in autoep_layers(engine.module)]
    with deepspeed.zero.GatheredParameters([gate.weight for gate in gates]):  # ZeRO 3 has parts of them
        weights = {gate: gate.weight.detach().double().T.clone() for gate in gates}

    def compare(gate: Any, inputs: tuple[torch.Tensor], logits: torch.Tensor) -> None:
        exact = inputs[0].double() @ weights[gate]
        errors.append((logits - exact).abs().max().item() if logits.dtype == torch.float32 else float("inf"))

    hooks = [gate.register_forward_hook(compare) for gate in gates]
    with torch.no_grad():
        engine(input_ids=ids)
    for hook in hooks:
        hook.remove()
    return max(errors)


def run(family: str, dtype: torch.dtype, folder: Path) -> dict[str, float]:
    """One step, the export, and how far logits of the engine are from those of the model before and after."""
    prefix, changes, stage = FAMILIES[family]
    torch.manual_seed(0)
    shape = getattr(transformers, f"{prefix}Config")(**(COMMON | changes))
    model: PreTrainedModel = getattr(transformers, f"{prefix}ForCausalLM")._from_config(shape, dtype=dtype)
    for name, tensor in model.state_dict().items():
        if name.endswith("e_score_correction_bias"):  # not zero, so that a bias lost or misshapen shows
            tensor.copy_(torch.linspace(-0.3, 0.3, 4).reshape(tensor.shape))
    rank = torch.distributed.get_rank()
    ids = torch.randint(3, 48, (2, 9), generator=torch.Generator().manual_seed(rank))
    with torch.no_grad():
        plain = model.eval()(input_ids=ids).logits
    check_model(model, 2, 2)
    freeze_correction_bias(model)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    config = ds_config(dtype == torch.bfloat16, stage)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=trainable, config=config)
    check_replaced(model)
    with torch.no_grad():
        replaced = engine(input_ids=ids).logits
    engine.train()
    engine.backward(engine(input_ids=ids, labels=ids).loss)
    engine.step()
    engine.eval()
    export_model(model, folder / family)
    reloaded = type(model).from_pretrained(folder / family, dtype="auto").eval()
    with torch.no_grad():
        trained, loaded = engine(input_ids=ids).logits, reloaded(input_ids=ids).logits
    gates = [tensor.dtype for name, tensor in reloaded.state_dict().items() if name.endswith("mlp.gate.weight")]
    return {
        "before": (plain - replaced).abs().max().item(),
        "after": (trained - loaded).abs().max().item(),
        "moved": (plain - loaded).abs().max().item(),
        "gate_error": gate_error(engine, ids),
        "fp32_gates": not family.startswith("ernie") or all(gate == torch.float32 for gate in gates),
    }


def main() -> None:
    folder = Path(sys.argv[1])
    ddp_backend()
    deepspeed.init_distributed(dist_backend="gloo")
    install_ernie_preset()
    results = {
        f"{family} {dtype}": run(family, dtype, folder)
        for family in sys.argv[2:] or FAMILIES
        for dtype in (torch.float32, torch.bfloat16)
    }
    (folder / f"families{torch.distributed.get_rank()}.json").write_text(json.dumps(results))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
