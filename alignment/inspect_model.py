"""Look at a model without its weights: shape, parameters and memory.

    alignment inspect model compass-v2

`inspect_model` returns data, `table` renders it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from transformers import AutoConfig, PreTrainedConfig

from alignment import models
from alignment.errors import UserError, did_you_mean
from alignment.moe.autoep import moe_blocks

GIB, MIB, KIB = 1 << 30, 1 << 20, 1 << 10
# Bytes a parameter takes: weights + gradients + AdamW's two moments (+ float32 master weights).
TRAINING_BYTES = {
    "float32, AdamW": 4 + 4 + 8,
    "bfloat16, AdamW and master weights in float32": 2 + 2 + 8 + 4,
    "bfloat16, AdamW too": 2 + 2 + 4,
}
SERVING_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Model:
    """A model's shape and size. `shape` holds what its architecture has, in reading order."""

    name: str
    architecture: str
    shape: dict[str, str]
    parameters: models.ParameterCount
    cache_values: int
    """Numbers that the key-value cache holds for one token."""


def inspect_model(name: str) -> Model:
    """A preset, a model folder or a hub id, on the meta device: no weight is read or made.

    Raises:
        UserError: no such preset, folder or architecture.
    """
    config = _config(name)
    try:
        model = models.on_meta(config)
    except ValueError as error:
        raise UserError(f"{name}: not a causal language model: {str(error).splitlines()[0]}") from None
    return Model(
        name=name,
        architecture=type(model).__name__,
        shape=_shape(config, expert_layers=len(list(moe_blocks(model)))),
        parameters=models.count_parameters(model, config),
        cache_values=config.num_hidden_layers * _cached_in_a_layer(config),
    )


def _config(name: str) -> PreTrainedConfig:
    if name in models.preset_names():
        return models.preset_config(name)
    if models.is_local(name) and not (Path(name) / "config.json").is_file():
        hint = did_you_mean(name, models.preset_names())
        raise UserError(f"{name}: neither a preset nor a folder with a config.json{hint}")
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(name)
    except models.UNREADABLE as error:
        raise UserError(f"{name}: the config could not be read: {str(error).splitlines()[0]}") from None
    return config


def _shape(config: PreTrainedConfig, expert_layers: int) -> dict[str, str]:
    shape = {
        "layers": f"{config.num_hidden_layers}",
        "hidden size": f"{config.hidden_size:,}",
        **_attention(config),
        "vocabulary": f"{config.vocab_size:,}" + (" (tied)" if config.tie_word_embeddings else ""),
        "context": f"{config.max_position_embeddings:,}",
    }
    dense_layers = config.num_hidden_layers - expert_layers
    if not expert_layers:
        return shape | {"feed-forward width": f"{config.intermediate_size:,}"}
    if dense_layers:
        shape["dense layers"] = f"{dense_layers}, of width {config.intermediate_size:,}"
    routed = _first(config, "num_experts", "num_local_experts", "n_routed_experts")
    return shape | {
        "experts": f"{_shared(config)}{routed} routed, top-{config.num_experts_per_tok}",
        "expert width": f"{_first(config, 'moe_intermediate_size', 'intermediate_size'):,}",
    }


def _attention(config: PreTrainedConfig) -> dict[str, str]:
    """Grouped queries, or the latent attention of DeepSeek-V2/V3 (arXiv:2405.04434, section 2.1)."""
    if _first(config, "kv_lora_rank") is None:
        return {
            "attention heads": f"{config.num_attention_heads} query, {_kv_heads(config)} key-value",
            "head dimension": f"{_head_dim(config)}",
        }
    keys = f"keys {config.qk_nope_head_dim} + {config.qk_rope_head_dim} rotary, values {config.v_head_dim}"
    return {
        "attention heads": f"{config.num_attention_heads}, latent of rank {config.kv_lora_rank}",
        "head dimension": keys,
    }


def _shared(config: PreTrainedConfig) -> str:
    """The shared experts, which have the routed ones' width except in Qwen2-MoE."""
    if width := _first(config, "shared_expert_intermediate_size"):
        return f"1 shared of width {width:,} + "
    count = _first(config, "moe_num_shared_experts", "n_shared_experts")
    return f"{count} shared + " if count else ""


def _cached_in_a_layer(config: PreTrainedConfig) -> int:
    """Numbers cached for a token: keys and values, or the latent and the rotary key, as vLLM keeps them."""
    if rank := _first(config, "kv_lora_rank"):
        return int(rank + config.qk_rope_head_dim)
    return 2 * _kv_heads(config) * _head_dim(config)


def _first(config: PreTrainedConfig, *names: str) -> Any:
    """The first of these attributes that the config has; architectures name them differently."""
    return next((getattr(config, name) for name in names if getattr(config, name, None) is not None), None)


def _kv_heads(config: PreTrainedConfig) -> int:
    return int(_first(config, "num_key_value_heads", "num_attention_heads"))


def _head_dim(config: PreTrainedConfig) -> int:
    return int(_first(config, "head_dim") or config.hidden_size // config.num_attention_heads)


def table(model: Model) -> Table:
    title = f"{model.name}  ({model.architecture})"
    rows = Table(title=title, title_justify="left", caption_justify="left", show_header=False, box=None)
    for key, value in model.shape.items():
        rows.add_row(key, value)
    total, active = model.parameters.total, model.parameters.active
    rows.add_row("parameters", f"{_short(total)} total, {_short(active)} active ({total:,}, {active:,})", style="bold")
    for kind, size in TRAINING_BYTES.items():
        rows.add_row("to train", f"{_gib(total * size)}  {kind} ({size} bytes a parameter)")
    for kind, size in SERVING_BYTES.items():
        cache = model.cache_values * size / KIB
        rows.add_row("to serve", f"{_gib(total * size)}  {kind}, and {cache:,.0f} KiB of cache a token")
    rows.caption = "Training: weights, gradients and optimizer over all ranks; activations come on top."
    return rows


def _short(count: int) -> str:
    scale, unit = next((s for s in ((1e9, "B"), (1e6, "M"), (1e3, "K")) if count >= s[0]), (1.0, ""))
    return f"{count / scale:.1f}{unit}"


def _gib(size: int) -> str:
    return f"{size / GIB:,.1f} GiB" if size >= GIB / 10 else f"{size / MIB:,.1f} MiB"
