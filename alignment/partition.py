"""Loads a model under ZeRO 3: each rank holds its part of every weight from the start, and no rank ever the model.

transformers can make a model inside `zero.Init`, but then reads all files on every rank, stacks all experts there, and
rounds the rotary frequencies of a bfloat16 model to bfloat16. Here rank 0 reads one weight at a time; all ranks receive
it, and each keeps its part.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import deepspeed_config, is_deepspeed_zero3_enabled

from alignment.errors import UserError
from alignment.weights import on_disk, unaware_of_deepspeed, weight_files, weight_folder


def partitions() -> bool:
    """Whether this process is a rank under ZeRO 3, which is known once the trainer's arguments are made."""
    return bool(is_deepspeed_zero3_enabled()) and dist.is_initialized()


def fill(
    model: PreTrainedModel, path: str, dtype: torch.dtype, fresh: Mapping[str, torch.Tensor] = MappingProxyType({})
) -> None:
    """Give a model on the meta device the weights of a folder or hub id, partitioned over all ranks. Collective.

    Args:
        model: as transformers makes it of `path` on the meta device, where it finds weights amiss.
        path: rank 0 reads its safetensors; the others read the files' headers.
        dtype: of all weights: what DeepSpeed trains in.
        fresh: weights that the files lack, by name.

    Raises:
        UserError: on every rank, when a weight is stored as transformers would not store it.
    """
    from deepspeed import zero
    from deepspeed.accelerator import get_accelerator

    device = torch.device(get_accelerator().current_device_name())
    files = _Files(model, weight_folder(path))
    stored = [(name, weight.shape) for name, weight in model.named_parameters() if name not in fresh]
    parts = {name: files.parts(name, shape) for name, shape in stored}
    _make_buffers(model, files, device)
    convert: Any = None
    for name, parameter in model.named_parameters():
        whole = torch.empty(parameter.shape, dtype=dtype, device=device)
        if name in fresh:
            whole.copy_(fresh[name])
        elif dist.get_rank() == 0:
            _read(parts[name], whole)
        torch.utils.swap_tensors(parameter, nn.Parameter(whole, parameter.requires_grad))
        del whole  # before the next is made
        if convert is None:
            zero.Init(module=nn.ParameterList([parameter]), config_dict_or_path=deepspeed_config())
            convert = vars(parameter)["convert_to_zero_parameters"]
        else:
            convert(param_list=[parameter])


@dataclass(frozen=True)
class _Part:
    """A tensor of a file, and the rows of a weight that it holds: all dimensions but the last count as one here."""

    path: Path
    key: str
    rows: torch.Tensor


class _Files:
    """Says where the weights of a model lie in its folder."""

    def __init__(self, model: PreTrainedModel, folder: Path) -> None:
        self._model, self._folder, self._files = model, folder, weight_files(folder)

    def parts(self, name: str, shape: torch.Size) -> list[_Part]:
        """Of one weight: transformers' own conversion is given the numbers of the rows in place of their values."""
        rows = torch.arange(math.prod(shape[:-1])).reshape(shape[:-1])
        parts = {name: rows} if name in self._files else on_disk(self._model, name, rows)
        return [self._part(name, shape, key, rows.flatten()) for key, rows in parts.items()]

    def _part(self, name: str, shape: torch.Size, key: str, rows: torch.Tensor) -> _Part:
        if key not in self._files:
            raise UserError(
                f"{self._folder}: ZeRO 3 reads weights in parts, and {name} is not stored as transformers writes it\n"
                f"expected {key}; load the model and `save_pretrained` it once, or use ZeRO 1 or 2"
            )
        path = self._files[key]
        with safe_open(path, "pt") as file:
            stored = file.get_slice(key).get_shape()
        if math.prod(stored[:-1]) != len(rows) or stored[-1:] != list(shape[-1:]):
            raise UserError(f"{path}: {key} has the shape {stored}, which is no part of {list(shape)}")
        return _Part(path, key, rows)


def _read(parts: list[_Part], whole: torch.Tensor) -> None:
    rows = whole.view(math.prod(whole.shape[:-1]), -1)
    for part in parts:
        with safe_open(part.path, "pt") as file:
            stored = file.get_tensor(part.key)
        rows[part.rows.to(whole.device)] = stored.reshape(len(part.rows), -1).to(whole)


def _make_buffers(model: PreTrainedModel, files: _Files, device: torch.device) -> None:
    """Buffers are small and whole on every rank: stored ones are read, the others are what the model computes."""
    stored = model.state_dict().keys()
    with unaware_of_deepspeed(), init_empty_weights(include_buffers=False):
        computed = dict(type(model)._from_config(model.config).named_buffers())
    for name, buffer in list(model.named_buffers()):
        value = computed[name].to(buffer.dtype)
        if name in stored:
            _read(files.parts(name, buffer.shape), value)
        prefix, _, key = name.rpartition(".")
        model.get_submodule(prefix).register_buffer(key, value.to(device), persistent=name in stored)
