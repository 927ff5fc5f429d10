"""Models: presets, folders and hub ids, and their parameter counts."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from pydantic import Field
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from alignment import partition
from alignment.config import Config, ModelConfig, load_config
from alignment.errors import UserError, did_you_mean
from alignment.kernels.model import use_kernels
from alignment.moe.autoep import freeze_correction_bias
from alignment.weights import unaware_of_deepspeed

if not sys.stderr.isatty():
    logging.disable_progress_bar()

# On every load it lists the layers that a tensor-parallel plan leaves whole, though no plan is in use.
logging.get_logger("transformers.distributed.tensor_parallel").setLevel(logging.log_levels["error"])

PRESETS = Path(__file__).parent.parent / "configs" / "models"
# What transformers raises for a config or weights that it cannot read.
UNREADABLE = (OSError, ValueError, SafetensorError, StrictDataclassError)


class Preset(Config):
    """A file of configs/models: a transformers architecture and the values of its config."""

    architecture: str
    config: dict[str, Any] = Field(default_factory=dict)


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a model; `active` are those that one token passes through."""

    total: int
    active: int


def preset_config(name: str, **changes: Any) -> PreTrainedConfig:
    """The transformers config of a preset."""
    path = PRESETS / f"{name}.yaml"
    if not path.is_file():
        raise UserError(f"preset {name!r}: no such file in {PRESETS}{did_you_mean(name, preset_names())}")
    preset = load_config(Preset, path)
    return AutoConfig.for_model(preset.architecture, **{**preset.config, **changes})


def config_of(source: ModelConfig) -> PreTrainedConfig:
    """The transformers config of a model, without its weights."""
    if source.preset is not None:
        return preset_config(source.preset)
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            str(source.path), trust_remote_code=source.trust_remote_code
        )
    except UNREADABLE as error:
        raise UserError(f"{source.path}: the model's config could not be read: {_first_line(error)}") from None
    return config


def preset_names() -> list[str]:
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def check_model(source: ModelConfig) -> None:
    """What can be checked before any weight is read.

    Raises:
        UserError: no such folder or preset, no weights, or weights that only pickle could read.
    """
    if source.preset is not None and source.preset not in preset_names():
        raise UserError(f"model.preset {source.preset!r}: no such preset{did_you_mean(source.preset, preset_names())}")
    if source.path is not None and is_local(source.path):
        check_model_folder(Path(source.path))
    if source.tokenizer is not None and is_local(source.tokenizer) and not Path(source.tokenizer).is_dir():
        raise UserError(f"{source.tokenizer}: no such tokenizer folder")


def is_local(path: str) -> bool:
    """Whether a model's path means a folder, as opposed to a hub id such as `org/name`; `org` is then no folder."""
    return path.startswith((".", "/")) or path.count("/") != 1 or Path(path).exists() or Path(path).parent.is_dir()


def check_model_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such model folder")
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: not a model folder: it has no config.json")
    if list(folder.glob("*.safetensors")):
        return
    if pickled := [p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in folder.glob(pattern)]:
        raise UserError(f"{folder}: holds pickled weights ({pickled[0]}), which are refused; convert to safetensors")
    raise UserError(f"{folder}: holds no weights, expected *.safetensors")


def load_tokenizer(source: ModelConfig) -> PreTrainedTokenizerBase:
    name = str(source.tokenizer or source.path)
    if is_local(name) and not Path(name).is_dir():
        raise UserError(f"{name}: no such tokenizer folder")
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=source.trust_remote_code)
    except UNREADABLE as error:
        raise UserError(f"{name}: no tokenizer could be loaded: {_first_line(error)}") from None


def load_model(
    source: ModelConfig, tokenizer: PreTrainedTokenizerBase, *, seed: int, **options: Any
) -> PreTrainedModel:
    """A causal language model with its kernels: the weights of `path`, or fresh ones of `preset` drawn from `seed`.

    Fresh weights take their vocabulary and stop token from the tokenizer. Under ZeRO 3 the weights of `path` are
    partitioned as they are read, which all ranks do together.
    """
    check_model(source)
    dtype = getattr(torch, source.dtype)
    if source.path is not None and partition.partitions():
        return _load_partitioned(source, dtype, **options)
    if source.path is not None:
        return use_kernels(load_pretrained(AutoModelForCausalLM, source, dtype=dtype, **options), source.kernels)
    config = preset_config(
        str(source.preset),
        vocab_size=len(tokenizer),
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(seed)
    with unaware_of_deepspeed():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype, **options)
    return use_kernels(model, source.kernels)


def _load_partitioned(source: ModelConfig, dtype: torch.dtype, **options: Any) -> PreTrainedModel:
    model = load_pretrained(AutoModelForCausalLM, source, dtype=dtype, device_map="meta", **options)
    partition.fill(use_kernels(model, source.kernels), str(source.path), dtype)
    return model


def load_pretrained(auto_class: Any, source: ModelConfig, **options: Any) -> PreTrainedModel:
    """`auto_class.from_pretrained`, from safetensors only, with every weight accounted for; whole under ZeRO 3 too.

    Raises:
        UserError: weights that are missing, left over or of another shape; transformers only warns of these.
    """
    try:
        with unaware_of_deepspeed():
            model, info = auto_class.from_pretrained(
                source.path,
                use_safetensors=True,
                trust_remote_code=source.trust_remote_code,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # only so that they are reported below
                **options,
            )
    except UNREADABLE as error:
        raise UserError(f"{source.path}: the model could not be loaded: {_first_line(error)}") from None
    faults = [
        f"{kind.replace('_', ' ')}: {', '.join(map(str, sorted(info[kind])[:3]))}"
        for kind in LOADING_FAULTS
        if info.get(kind)
    ]
    if faults:
        raise UserError(f"{source.path}: the weights do not fit {type(model).__name__}: {'; '.join(faults)}")
    freeze_correction_bias(model)
    return cast(PreTrainedModel, model)


LOADING_FAULTS = ("missing_keys", "unexpected_keys", "mismatched_keys")


def on_meta(config: PreTrainedConfig) -> PreTrainedModel:
    """The model without memory for its weights."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


def count_parameters(model: nn.Module, config: PreTrainedConfig) -> ParameterCount:
    """Total and active parameters; of routed experts (stacked in 3-D tensors) a token passes through top-k of all."""
    total = sum(p.numel() for p in model.parameters())
    stacks = [p for name, p in model.named_parameters() if ".experts." in name and p.dim() == 3]
    idle = sum(p.numel() // p.shape[0] * (p.shape[0] - config.num_experts_per_tok) for p in stacks)
    return ParameterCount(total, total - idle)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
