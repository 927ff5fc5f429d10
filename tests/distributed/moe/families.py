"""One rank of a test: every model family under AutoEP, one training step, exported and compared with its reload."""

import json
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
import transformers
from transformers import PreTrainedModel

from alignment.moe.autoep import check_model, check_replaced, freeze_correction_bias, install_autoep
from alignment.moe.export import export_model
from alignment.moe.trainer import ddp_backend
from alignment.training import leave

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
# Architecture, what it needs beyond COMMON, dtype, and the stage of ZeRO that it is trained and exported under.
FAMILIES: dict[str, tuple[str, dict[str, Any], torch.dtype, int]] = {
    "ernie": ("Ernie4_5_Moe", ERNIE, torch.float32, 1),
    "ernie_bf16": ("Ernie4_5_Moe", ERNIE, torch.bfloat16, 2),
    "ernie_zero3": ("Ernie4_5_Moe", ERNIE, torch.float32, 3),
    "qwen3": ("Qwen3Moe", MOE | {"norm_topk_prob": True, "head_dim": 8}, torch.float32, 0),
    "qwen2": ("Qwen2Moe", MOE | {"shared_expert_intermediate_size": 16}, torch.float32, 2),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}, torch.float32, 3),
    "deepseek_v2": ("DeepseekV2", LATENT | {"topk_method": "greedy"}, torch.float32, 3),
    "deepseek_v3": ("DeepseekV3", LATENT, torch.float32, 3),
}


def ds_config(bf16: bool, stage: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": bf16},
        "expert_parallel": {"enabled": True, "autoep_size": 2},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
    }


def run(family: str, folder: Path) -> dict[str, float]:
    """One step, the export, and how far logits of the engine are from those of the model before and after."""
    prefix, changes, dtype, stage = FAMILIES[family]
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
        "fp32_gates": all(gate == torch.float32 for gate in gates),
    }


def main() -> None:
    folder = Path(sys.argv[1])
    ddp_backend()
    deepspeed.init_distributed(dist_backend="gloo")
    install_autoep()
    results = {family: run(family, folder) for family in sys.argv[2:] or FAMILIES}
    (folder / f"families{torch.distributed.get_rank()}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
    leave()
