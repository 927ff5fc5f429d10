"""LoRA adapters under expert parallelism: on attention, dense layers and shared experts, never on what is split.

An adapter freezes every expert, and DeepSpeed's engine does not know a mixture whose experts do not train: it wants
optimizer groups for them, and writes all of them into every checkpoint. Nothing of a frozen expert has to be reduced,
partitioned or saved, so here the engine takes such a model for one without experts once its layers are in place.
"""

import copy
import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from alignment.adapters import WEIGHTS, AdapterError
from alignment.errors import UserError
from alignment.moe.autoep import autoep_layers, expert_parameters, moe_blocks

ANY_DEPTH = r"(?:.*\.)?"  # peft puts `base_model.model.` before every module's name


def prepare(model: PeftModel, zero_stage: int) -> None:
    """Check that the adapted model, not yet split, can be trained under expert parallelism, and make AutoEP take it.

    Raises:
        UserError: adapters on routed experts or routers, ZeRO 3, or a name of DeepSpeed's that has moved.
    """
    check_adapter(model)
    if zero_stage == 3:
        raise UserError(
            "adapters under expert parallelism: DeepSpeed cannot save frozen experts under ZeRO 3\n"
            "set zero_optimization.stage to 0, 1 or 2 in the DeepSpeed config"
        )
    _install()


def check_adapter(model: nn.Module) -> None:
    """Raise UserError where an adapter lies on routed experts or a router: AutoEP puts layers of its own there."""
    for name, block in moe_blocks(model):
        for child, module in block.named_children():
            if not child.startswith("shared_expert") and any(isinstance(m, BaseTunerLayer) for m in module.modules()):
                raise UserError(
                    f"lora.targets: {name.removeprefix('base_model.model.')}.{child} is adapted, but under expert "
                    "parallelism AutoEP replaces routed experts and routers, and the adapter with them\n"
                    "leave them out of lora.targets, or train without expert parallelism"
                )


def _install() -> None:
    """Let AutoEP find layers inside a PeftModel, and its engine accept frozen experts; twice changes nothing."""
    try:
        from deepspeed.module_inject.auto_ep_presets.registry import PRESET_MODELS
        from deepspeed.runtime.engine import DeepSpeedEngine

        configure = DeepSpeedEngine._configure_distributed_model
    except (AttributeError, ImportError) as error:
        raise UserError(f"the deepspeed installed here lacks a name that adapters need: {error}") from error
    for name, preset in PRESET_MODELS.items():
        pattern = ANY_DEPTH + preset.moe_layer_pattern.removeprefix(ANY_DEPTH)
        PRESET_MODELS[name] = replace(preset, moe_layer_pattern=pattern)
    if not hasattr(configure, "__wrapped__"):
        DeepSpeedEngine._configure_distributed_model = _without_frozen_experts(configure)


def _without_frozen_experts(configure: Callable[[Any, nn.Module], None]) -> Callable[[Any, nn.Module], None]:
    """DeepSpeedEngine._configure_distributed_model, which sets `has_moe_layers`, with another answer for adapters."""

    @functools.wraps(configure)
    def configured(engine: Any, model: nn.Module) -> None:
        configure(engine, model)
        if not engine.has_moe_layers or not isinstance(model, PeftModel):
            return
        if not any(weight.requires_grad for weight in expert_parameters(model)):
            engine.has_moe_layers = False

    return configured


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Write the adapter as plain peft reads it: under the names of the model that AutoEP replaced. Read it back.

    Collective over all ranks; `model` is the module inside the engine, whose adapters are whole on every rank.

    Raises:
        AdapterError: on every rank, when the file is not the adapter of the model before AutoEP.
    """
    problem: list[str | None] = [_write_and_compare(model, folder) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(problem, src=0)
    if problem[0] is not None:
        raise AdapterError(f"{folder}: {problem[0]}")


def _write_and_compare(model: PeftModel, folder: Path) -> str | None:
    """Write the folder; return what is wrong with it, or None."""
    config = copy.copy(model.peft_config[model.active_adapter])
    config.inference_mode = True
    weights = dict(adapter_weights(model))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        config.save_pretrained(str(folder))
        save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
        written = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:  # the other ranks are waiting for a word
        return f"{type(error).__name__}: {error}"
    if wrong := written.keys() ^ _plain_names(model):
        return f"names that plain peft lacks or misses: {', '.join(sorted(wrong)[:3])}"
    changed = [name for name, weight in weights.items() if not torch.equal(weight.cpu(), written[name])]
    return f"{changed[0]} differs from the adapter in memory" if changed else None


def adapter_weights(model: PeftModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, tensor) of the adapter, with the names of shared experts that the model had before AutoEP."""
    from deepspeed.module_inject.auto_ep_presets.registry import get_preset

    layers = {name: get_preset(cast(Any, layer).model_family) for name, layer in autoep_layers(model)}
    for name, weight in get_peft_model_state_dict(model, save_embedding_layers=False).items():
        for layer, preset in layers.items():
            name = name.replace(f"{layer}.shared_experts.", f"{layer}.{preset.shared_experts_pattern}.")
            name = name.replace(f"{layer}.shared_experts_gate.", f"{layer}.{preset.shared_experts_gate_pattern}.")
        yield name, weight.contiguous()


def _plain_names(model: PeftModel) -> set[str]:
    """The adapter's names on the model before AutoEP, from a copy without memory."""
    base = cast(Any, model.get_base_model())
    with torch.device("meta"):
        plain = get_peft_model(type(base)._from_config(base.config), copy.copy(model.peft_config[model.active_adapter]))
    return set(get_peft_model_state_dict(plain, save_embedding_layers=False))
