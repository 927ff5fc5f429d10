"""Writes a model under expert parallelism to an ordinary Hugging Face folder, and proves it against the memory.

DeepSpeed's own ways to save AutoEP layers write one rank's experts and say it worked, so every save goes through here.
Weights are gathered one at a time, to rank 0 only: it holds a shard and a few copies of one weight, never the model.
Shapes: E experts of the model, L = E / EP of them on a rank, X, Y the two dimensions of an expert's matrix.
"""

import copy
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import chain
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

from alignment import atomic
from alignment.models import LOADING_FAULTS
from alignment.moe.autoep import autoep_layers
from alignment.weights import on_disk, unaware_of_deepspeed, weight_files

logger = logging.getLogger(__name__)

SHARD_BYTES = 5 * 10**9
INDEX = "model.safetensors.index.json"

Weights = Iterator[tuple[str, torch.Tensor]]
Gather = Callable[[], torch.Tensor | None]  # collective; the whole tensor on rank 0, None elsewhere


class ExportError(RuntimeError):
    """The folder does not hold the model in memory."""


def export_model(
    model: PreTrainedModel, folder: Path, processing_class: Any = None, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write the whole model to `folder`, check it (`check_export`), and only then put it in its place.

    Collective over all ranks; `model` is the module inside the engine, under any stage of ZeRO, with or without expert
    parallelism, or the model of a single process. The folder is written beside `folder` and takes its place as a whole.
    `processing_class` (a tokenizer) is saved with it; a shard holds `shard_bytes`, or one tensor that is larger.

    Raises:
        ExportError: on every rank, when it could not be written, or what was written differs from what is in memory.
    """
    skeleton = _skeleton(model)
    to_write, to_compare = _weights(model, skeleton), _weights(model, skeleton)

    def write_and_compare() -> None:
        if any(folder.glob("checkpoint-*")):
            raise ExportError("it holds training checkpoints, which the export would delete; choose another folder")
        with atomic.replacing_folder(folder) as temporary:
            _write_config(model, temporary)
            if processing_class is not None:
                processing_class.save_pretrained(temporary)
            _write_weights(to_write, skeleton, temporary, shard_bytes)
            _compare(to_compare, skeleton, temporary)

    _on_rank_0(write_and_compare, folder, to_write, to_compare)


def check_export(model: PreTrainedModel, folder: Path) -> None:
    """Compare the model in memory with `folder`, weight by weight and bit by bit; the folder must also load.

    Collective over all ranks. Names, shapes and dtypes are those of the files; transformers then loads the folder on
    the meta device, which shows that the files' names map back to every weight of the model.

    Raises:
        ExportError: on every rank; it names the first weight that differs, and how.
    """
    skeleton = _skeleton(model)
    weights = _weights(model, skeleton)
    _on_rank_0(lambda: _compare(weights, skeleton, folder), folder, weights)


def hf_weights(model: PreTrainedModel) -> Weights:
    """Yield (name, tensor) of the Hugging Face model that `model` was before AutoEP, experts of all ranks together.

    Collective: every rank must run through it to the end. Rank 0 gets the tensors, in host memory; the other ranks get
    tensors of the same shapes on the meta device.

    Raises:
        ExportError: on every rank, before anything is gathered, when the engine's weights are not those of the model.
    """
    return _weights(model, _skeleton(model))


def round_weights(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Hold the weights as transformers loads them in `dtype`: some stay in float32, such as routers and our head."""
    kept = [rf"(^|\.){module}($|\.)" for module in model._keep_in_fp32_modules_strict or ()]
    for name, parameter in model.named_parameters():
        if not any(re.search(pattern, name) for pattern in kept):
            parameter.data = parameter.data.to(dtype)


def _weights(model: PreTrainedModel, skeleton: PreTrainedModel) -> Weights:
    expected = skeleton.state_dict()
    sources = _sources(model, expected)
    if odd := sorted(expected.keys() ^ sources.keys()):
        raise ExportError(f"{odd[0]}: only one of the engine and {type(model).__name__} has such a weight")
    return ((name, _widened(sources[name](), like)) for name, like in expected.items())


def _widened(tensor: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    """In the dtype of `like` if that loses nothing: `from_pretrained` keeps routers in float32, a bf16 engine not."""
    return like if tensor is None else tensor.to(torch.promote_types(tensor.dtype, like.dtype))


def _sources(model: PreTrainedModel, skeleton: dict[str, torch.Tensor]) -> dict[str, Gather]:
    """How to gather each weight of the model, by its name in the skeleton."""
    layers = dict(autoep_layers(model))
    sources = {
        name: _whole(tensor)
        for name, tensor in model.state_dict(keep_vars=True).items()
        if not any(name.startswith(f"{prefix}.") for prefix in layers)
    }
    for prefix, layer in layers.items():
        sources |= dict(_layer_sources(cast(Any, layer), prefix, skeleton))
    return sources


def _layer_sources(layer: Any, prefix: str, skeleton: dict[str, torch.Tensor]) -> Iterator[tuple[str, Gather]]:
    """One block's weights under the names that its model family's preset gives them."""
    from deepspeed.module_inject.auto_ep_presets.registry import get_preset

    preset = get_preset(layer.model_family)
    experts, router = f"{prefix}.{preset.experts_pattern}", layer.router
    yield f"{experts}.{preset.expert_w1}", _fused(layer.experts.w1, layer.experts.w3, layer.ep_group)
    yield f"{experts}.{preset.expert_w2}", lambda: _gather_experts(layer.experts.w2, layer.ep_group)
    yield f"{prefix}.{preset.router_pattern}.weight", _whole(router.gate.weight)
    if router.e_score_correction_bias is not None:
        name = _bias_name(prefix, skeleton)
        yield name, _whole(router.e_score_correction_bias, skeleton[name].shape)
    for child, pattern in (
        (layer.shared_experts, preset.shared_experts_pattern),
        (layer.shared_experts_gate, preset.shared_experts_gate_pattern),
    ):
        if child is not None:
            for key, tensor in child.state_dict(keep_vars=True).items():
                yield f"{prefix}.{pattern}.{key}", _whole(tensor)


def _bias_name(prefix: str, skeleton: dict[str, torch.Tensor]) -> str:
    """The model's name for a block's correction bias, which sits at a different depth in each family."""
    names = [key for key in skeleton if key.startswith(f"{prefix}.") and key.endswith(".e_score_correction_bias")]
    if len(names) != 1:
        raise ExportError(f"{prefix}: the model without expert parallelism has {len(names)} correction biases here")
    return names[0]


def _whole(tensor: torch.Tensor, shape: torch.Size | None = None) -> Gather:
    """A weight that every rank holds or, under ZeRO-3, holds a part of."""

    def gather() -> torch.Tensor | None:
        with _unpartitioned(tensor):
            return tensor.detach().cpu().reshape(shape or tensor.shape) if _rank() == 0 else None

    return gather


def _fused(w1: torch.Tensor, w3: torch.Tensor, group: dist.ProcessGroup) -> Gather:
    """AutoEP holds gate and up apart; the model has [E, gate + up, Y]."""

    def gather() -> torch.Tensor | None:
        gate_EXY, up_EXY = _gather_experts(w1, group), _gather_experts(w3, group)
        return None if gate_EXY is None or up_EXY is None else torch.cat([gate_EXY, up_EXY], dim=1)

    return gather


def _gather_experts(local_LXY: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor | None:
    """The experts of all ranks of the group, in order: [L, X, Y] -> [E, X, Y] on rank 0."""
    with _unpartitioned(local_LXY):
        if 0 not in dist.get_process_group_ranks(group):  # it holds copies of the same experts
            return None
        part_LXY = local_LXY.detach().contiguous()
    if dist.get_rank() != 0:
        dist.gather(part_LXY, dst=0, group=group)
        return None
    size = dist.get_world_size(group)
    whole_EXY = part_LXY.new_empty((size * len(part_LXY), *part_LXY.shape[1:]))
    dist.gather(part_LXY, list(whole_EXY.chunk(size)), dst=0, group=group)
    return whole_EXY.cpu()


def _unpartitioned(tensor: torch.Tensor) -> Any:
    """Under ZeRO-3, the whole of one parameter on every rank of its group; otherwise nothing is done."""
    if not hasattr(tensor, "ds_id"):
        return nullcontext()
    from deepspeed.runtime.zero import GatheredParameters

    return GatheredParameters([tensor])


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _skeleton(model: PreTrainedModel) -> PreTrainedModel:
    """The model without expert parallelism and without memory, for its names, shapes and dtypes."""
    with unaware_of_deepspeed(), torch.device("meta"):
        return cast(PreTrainedModel, cast(Any, type(model))._from_config(model.config, dtype=model.dtype))


def _on_rank_0(work: Callable[[], None], folder: Path, *gathered: Weights) -> None:
    """Run `work`, which consumes what is gathered, on rank 0; where it fails, every rank raises."""
    problem: list[str | None] = [None]
    if _rank() == 0:
        try:
            work()
        except ExportError as error:
            problem = [str(error)]
        except (OSError, RuntimeError, ValueError, SafetensorError) as error:  # the other ranks are waiting for a word
            logger.exception("the export failed")
            problem = [f"{type(error).__name__}: {error}"]
    for _ in chain(*gathered):  # gathering is collective: what rank 0 left is run through on all
        pass
    if dist.is_initialized():
        dist.broadcast_object_list(problem, src=0)
    if problem[0] is not None:
        raise ExportError(f"{folder}: {problem[0]}")


def _write_config(model: PreTrainedModel, folder: Path) -> None:
    config = copy.deepcopy(model.config)
    config.dtype = str(model.dtype).removeprefix("torch.")
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    if model.can_generate():
        cast(Any, model).generation_config.save_pretrained(folder)


def _write_weights(weights: Weights, skeleton: PreTrainedModel, folder: Path, shard_bytes: int) -> None:
    """Write shards as they fill, under the names that transformers uses on disk; tied weights once."""
    tied = skeleton.all_tied_weights_keys
    shards: list[list[str]] = []
    pending: dict[str, torch.Tensor] = {}
    pending_bytes = total_bytes = 0
    for name, tensor in weights:
        if name in tied:
            continue
        for key, part in on_disk(skeleton, name, tensor).items():
            if pending and pending_bytes + part.nbytes > shard_bytes:
                _write_shard(pending, folder, shards)
                pending, pending_bytes = {}, 0
            pending[key] = part.contiguous()
            pending_bytes += part.nbytes
            total_bytes += part.nbytes
        del tensor, part  # before the next is gathered
    _write_shard(pending, folder, shards)
    _name_shards(shards, folder, {"total_parameters": skeleton.num_parameters(), "total_size": total_bytes})
    for path in folder.iterdir():
        atomic.sync(path)


def _write_shard(tensors: dict[str, torch.Tensor], folder: Path, shards: list[list[str]]) -> None:
    save_file(tensors, folder / f"{len(shards)}.part", metadata={"format": "pt"})
    shards.append(list(tensors))


def _name_shards(shards: list[list[str]], folder: Path, metadata: dict[str, int]) -> None:
    """Give the files their names, which hold the number of all, and write the index."""
    if len(shards) == 1:
        (folder / "0.part").rename(folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, keys in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"{number}.part").rename(folder / file)
        weight_map |= dict.fromkeys(keys, file)
    atomic.write_json(folder / INDEX, {"metadata": metadata, "weight_map": weight_map})


def _compare(weights: Weights, skeleton: PreTrainedModel, folder: Path) -> None:
    """Raise ExportError at the first weight of the folder that is not that of the memory."""
    tied = skeleton.all_tied_weights_keys
    try:
        files = weight_files(folder)
    except SafetensorError as error:
        raise ExportError(str(error)) from None
    left = set(files)
    for name, tensor in weights:
        for key, part in on_disk(skeleton, tied.get(name, name), tensor).items():
            if key not in files:
                raise ExportError(f"{key} is missing")
            with safe_open(files[key], "pt") as file:
                compare_weight(key, part, file.get_tensor(key))
            left.discard(key)
        del tensor, part  # before the next is gathered
    if left:
        raise ExportError(f"{min(left)} is left over: the model has no such weight")
    _check_loads(type(skeleton), folder)


def compare_weight(name: str, memory: torch.Tensor, disk: torch.Tensor) -> None:
    """Raise ExportError unless the two have the same dtype, shape and bits: -0.0 is not 0.0, and a NaN is itself."""
    if (disk.dtype, disk.shape) != (memory.dtype, memory.shape):
        raise ExportError(
            f"{name} is {disk.dtype} of shape {list(disk.shape)}, expected {memory.dtype} of {list(memory.shape)}"
        )
    differs = _bits(memory) != _bits(disk)
    if differs.any():
        count = int(differs.reshape(memory.numel(), -1).any(dim=1).sum())
        raise ExportError(f"{name} differs from the model in memory in {count} of {memory.numel()} values")


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def _check_loads(model_class: Any, folder: Path) -> None:
    """Raise ExportError unless transformers loads the folder with every weight accounted for."""
    with unaware_of_deepspeed():
        _, info = model_class.from_pretrained(
            folder, dtype="auto", device_map="meta", use_safetensors=True, output_loading_info=True
        )
    for kind in LOADING_FAULTS:
        if info[kind]:
            raise ExportError(f"transformers loads it with {kind.replace('_', ' ')}: {min(map(str, info[kind]))}")
