"""Writes a model under expert parallelism to an ordinary Hugging Face folder (safetensors), and reads it back to check.

DeepSpeed's own ways to save AutoEP layers write one rank's experts and say it worked, so every save goes through here.
Shapes: E experts of the model, L = E / EP of them on a rank, D model dim, F expert width.
"""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel

from alignment.moe.autoep import autoep_layers

logger = logging.getLogger(__name__)


class ExportError(RuntimeError):
    """The folder written does not hold the model in memory."""


def hf_weights(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, tensor) of the Hugging Face model that `model` was before AutoEP, experts of all ranks together.

    Collective: every rank must run through it to the end. Nothing is copied but the experts, one tensor at a time.
    """
    layers = dict(autoep_layers(model))
    skeleton = _skeleton(model).state_dict()
    for name, tensor in model.state_dict().items():
        if not any(name.startswith(f"{prefix}.") for prefix in layers):
            yield name, _widened(tensor, skeleton[name].dtype)
    for prefix, layer in layers.items():
        for name, tensor in _layer_weights(layer):
            full_name = _full_name(f"{prefix}.{name}", skeleton)
            like = skeleton[full_name]
            yield full_name, _widened(tensor.reshape(like.shape), like.dtype)


def _widened(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The tensor in `dtype` if that loses nothing: `from_pretrained` keeps routers in float32, a bf16 engine not."""
    return tensor.to(torch.promote_types(tensor.dtype, dtype))


def _layer_weights(layer: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """One block's weights under the names that its model family's preset gives them."""
    from deepspeed.module_inject.auto_ep_presets.registry import get_preset

    autoep = cast(Any, layer)
    preset = get_preset(autoep.model_family)
    experts = autoep.experts
    gate_ELFD = torch.cat([_gather(experts.w1, autoep.ep_group), _gather(experts.w3, autoep.ep_group)], dim=1)
    yield f"{preset.experts_pattern}.{preset.expert_w1}", gate_ELFD
    yield f"{preset.experts_pattern}.{preset.expert_w2}", _gather(experts.w2, autoep.ep_group)
    yield f"{preset.router_pattern}.weight", autoep.router.gate.weight.detach()
    if autoep.router.e_score_correction_bias is not None:
        yield "e_score_correction_bias", autoep.router.e_score_correction_bias.detach()
    for child, name in (
        (autoep.shared_experts, preset.shared_experts_pattern),
        (autoep.shared_experts_gate, preset.shared_experts_gate_pattern),
    ):
        if child is not None:
            yield from ((f"{name}.{key}", tensor) for key, tensor in child.state_dict().items())


def _gather(local_LXY: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The experts of all ranks of the group, in order: [L, X, Y] -> [E, X, Y]."""
    local_LXY = local_LXY.detach().contiguous()
    parts = [torch.empty_like(local_LXY) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, local_LXY, group=group)
    return torch.cat(parts)


def _full_name(name: str, skeleton: dict[str, torch.Tensor]) -> str:
    """The model's name for a weight of a block; the correction bias sits at a different depth in each family."""
    if name in skeleton:
        return name
    prefix, _, leaf = name.rpartition(".")
    matches = [key for key in skeleton if key.startswith(f"{prefix}.") and key.endswith(f".{leaf}")]
    if len(matches) != 1:
        raise ExportError(f"{name}: the model without expert parallelism has no such weight")
    return matches[0]


def _skeleton(model: PreTrainedModel) -> PreTrainedModel:
    """The model without expert parallelism and without memory, for its names, shapes and dtypes."""
    with torch.device("meta"):
        return cast(PreTrainedModel, cast(Any, type(model))._from_config(model.config, dtype=model.dtype))


def export_model(model: PreTrainedModel, folder: Path) -> None:
    """Write the whole model to `folder`, load it again with `from_pretrained` and compare every weight bit by bit.

    Collective over all ranks; `model` is the module inside the engine. Rank 0 holds one full copy in host memory, two
    while it compares.

    Raises:
        ExportError: on every rank, when what was written differs from what is in memory.
    """
    rank = dist.get_rank()
    weights = {name: tensor.cpu() for name, tensor in hf_weights(model) if rank == 0}
    problem: list[str | None] = [None]
    if rank == 0:
        problem = [_write_and_compare(model, weights, folder)]
    dist.broadcast_object_list(problem, src=0)
    if problem[0] is not None:
        raise ExportError(f"{folder}: {problem[0]}")


def _write_and_compare(model: PreTrainedModel, weights: dict[str, torch.Tensor], folder: Path) -> str | None:
    """Write the folder; return what is wrong with it, or None."""
    try:
        _skeleton(model).save_pretrained(folder, state_dict=dict(weights))  # it drops tied weights
        reloaded = type(model).from_pretrained(folder, dtype="auto").state_dict()
    except (OSError, RuntimeError, ValueError) as error:  # the other ranks are waiting for a word
        logger.exception("the export failed")
        return f"{type(error).__name__}: {error}"
    return difference(weights, reloaded)


def difference(expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> str | None:
    """Say how two state dicts differ in names, dtypes or values; None where they are bit-equal."""
    if expected.keys() != found.keys():
        return f"weights missing or unexpected: {', '.join(sorted(expected.keys() ^ found.keys())[:3])}"
    for name, tensor in expected.items():
        if tensor.dtype != found[name].dtype:
            return f"{name} is {found[name].dtype}, expected {tensor.dtype}"
        if not torch.equal(tensor, found[name]):
            return f"{name} differs from the model in memory"
    return None
