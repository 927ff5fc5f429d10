"""The routers' gates of every model family in a bfloat16 engine, against the exact product; trainers.py runs it."""

from typing import Any, cast

import deepspeed
import torch
import transformers
from families import COMMON, FAMILIES
from layouts import Layout, ds_config

from alignment.moe.autoep import autoep_layers, freeze_correction_bias


def measure() -> dict[str, float]:
    """The largest difference by family; collective. Infinite where a gate answers in another dtype than float32."""
    return {family: gate_error(*FAMILIES[family][:2]) for family in FAMILIES}


def gate_error(prefix: str, changes: dict[str, Any]) -> float:
    config = getattr(transformers, f"{prefix}Config")(**(COMMON | changes))
    model = getattr(transformers, f"{prefix}ForCausalLM")._from_config(config, dtype=torch.bfloat16)
    freeze_correction_bias(model)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=trainable, config=ds_config(Layout(2, 1, "bfloat16"))
    )
    errors: list[float] = []

    def compare(gate: Any, inputs: tuple[torch.Tensor], logits: torch.Tensor) -> None:
        exact = inputs[0].double() @ gate.weight.double().T
        errors.append((logits - exact).abs().max().item() if logits.dtype == torch.float32 else float("inf"))

    for _, layer in autoep_layers(model):
        cast(Any, layer).router.gate.register_forward_hook(compare)
    with torch.no_grad():
        engine(input_ids=torch.arange(3, 12)[None])
    engine.destroy()
    return max(errors)
