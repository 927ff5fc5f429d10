"""One rank of a test: AutoEP's layer with DeepSpeed's own token exchange and with ours, on the same rows."""

import json
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from torch import nn
from transformers import Ernie4_5_MoeForCausalLM
from worker import tiny_config

from alignment.moe.autoep import autoep_layers, install_autoep
from alignment.moe.trainer import ddp_backend
from alignment.training import leave

STOCK = AutoEPMoELayer._forward


def layer(ep_size: int, dtype: torch.dtype) -> Any:
    """AutoEP's layer of a fresh tiny model."""
    torch.manual_seed(0)
    model = Ernie4_5_MoeForCausalLM._from_config(tiny_config(num_hidden_layers=1, moe_k=3), dtype=dtype)
    for parameter in model.model.layers[
        0
    ].mlp.gate.parameters():  # fresh gates are zero: all tokens to the same experts
        torch.nn.init.normal_(parameter, std=0.3)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "expert_parallel": {"enabled": True, "autoep_size": ep_size},
        "optimizer": {"type": "AdamW", "params": {"torch_adam": True}},
    }
    deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=config)
    ((_, found),) = autoep_layers(model)
    return found


def pass_through(module: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The output and every gradient."""
    module.zero_grad()
    x = x.clone().requires_grad_()
    out = module(x)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(out.dtype))
    gradients = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return {"out": out.detach(), "x": x.grad, **{name: grad.float().clone() for name, grad in gradients.items()}}


def differences(module: Any, x: torch.Tensor) -> dict[str, float]:
    """The largest difference in each tensor, and the smallest of the tensors, which must not be nothing."""
    ours = AutoEPMoELayer._forward
    found = pass_through(module, x)
    AutoEPMoELayer._forward = STOCK
    expected = pass_through(module, x)
    AutoEPMoELayer._forward = ours
    assert found.keys() == expected.keys()
    return {name: (found[name] - expected[name]).abs().max().item() for name in expected} | {
        "size": min(tensor.abs().max().item() for tensor in expected.values())
    }


def main() -> None:
    folder = Path(sys.argv[1])
    ddp_backend()
    deepspeed.init_distributed(dist_backend="gloo")
    install_autoep()
    rank = torch.distributed.get_rank()
    generator = torch.Generator().manual_seed(rank)
    results = {}
    for ep_size in (1, 2):
        for dtype in (torch.float32, torch.bfloat16):
            module = layer(ep_size, dtype)
            x = torch.randn(3, 7 + 2 * rank, 32, generator=generator).to(dtype)
            results[f"ep{ep_size} {dtype}"] = differences(module, x)
            crowded = x[:1, :1].expand(x.shape)  # the same three experts for all tokens
            results[f"ep{ep_size} {dtype} crowded"] = differences(module, crowded)
    (folder / f"dispatch{rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
    leave()
