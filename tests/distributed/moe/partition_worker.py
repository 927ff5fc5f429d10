"""One rank of a test: loads models under ZeRO 3, and compares each weight with transformers' own load.

partition_worker.py OUT      writes OUT/rank{n}.json
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import torch
import transformers
from export_worker import MIB, peak_growth
from families import COMMON, ERNIE, FAMILIES
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import HfDeepSpeedConfig

from alignment import models, partition
from alignment.config import ModelConfig
from alignment.errors import UserError
from alignment.moe.trainer import ddp_backend
from alignment.training import leave
from reward.model import HEAD, load_reward_model

SHAPES = {prefix: COMMON | changes for prefix, changes, _, _ in FAMILIES.values()}
SHAPES["Llama"] = COMMON | {"tie_word_embeddings": True}
# 162 MiB, of which the largest weight, an embedding, is 8.
LARGE: dict[str, Any] = COMMON | ERNIE | {
    "vocab_size": 8192, "hidden_size": 256, "num_hidden_layers": 6, "moe_num_experts": 16, "moe_intermediate_size": 512,
    "moe_layer_start_index": 0,
}  # fmt: skip


def zero3(dtype: str) -> HfDeepSpeedConfig:
    """What the trainer's arguments make; it holds as long as the object lives."""
    return HfDeepSpeedConfig(
        {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": 3},
            "bf16": {"enabled": dtype == "bfloat16"},
        }
    )


def save(folder: Path, family: str, shape: dict[str, Any], shard: str = "20KB") -> str:
    """A model of the family, in several files; rank 0 makes it."""
    if torch.distributed.get_rank() == 0:
        torch.manual_seed(0)
        config = getattr(transformers, f"{family}Config")(**shape)
        getattr(transformers, f"{family}ForCausalLM")._from_config(config).save_pretrained(folder, max_shard_size=shard)
    torch.distributed.barrier()
    return str(folder)


def load(path: str, dtype: str) -> PreTrainedModel:
    return models.load_model(ModelConfig(path=path, dtype=dtype, kernels="torch"), None, seed=0)  # type: ignore[arg-type]


def differences(whole: PreTrainedModel, parts: PreTrainedModel, dtype: str) -> list[str]:
    """The weights and buffers that are not the same to the bit, or not partitioned."""
    ours = dict(parts.named_parameters())
    assert ours.keys() == dict(whole.named_parameters()).keys()
    found = []
    for name, weight in whole.named_parameters():
        with deepspeed.zero.GatheredParameters([ours[name]]):
            same = torch.equal(weight.to(getattr(torch, dtype)), ours[name])
        share = ours[name].ds_tensor.numel() / weight.numel()
        if not same or ours[name].requires_grad != weight.requires_grad or share > 0.5 + 1 / weight.numel():
            found.append(name)
    for (name, buffer), (other, made) in zip(whole.named_buffers(), parts.named_buffers(), strict=True):
        if name != other or buffer.dtype != made.dtype or not torch.equal(buffer, made):
            found.append(name)
    return found + [key for key in whole.state_dict() if key not in parts.state_dict()]


def compared(path: str, dtype: str, load: Callable[[str, str], PreTrainedModel]) -> list[str]:
    whole = load(path, dtype)
    config = zero3(dtype)
    assert partition.partitions()
    parts = load(path, dtype)
    del config
    assert not partition.partitions()
    assert whole.generation_config == parts.generation_config if whole.can_generate() else True
    return differences(whole, parts, dtype)


def reward(path: str, dtype: str) -> PreTrainedModel:
    tokenizer: Any = type("Tokenizer", (), {"pad_token_id": 0})()
    model = load_reward_model(ModelConfig(path=path, dtype=dtype, kernels="torch"), tokenizer, seed=7)
    assert HEAD in dict(model.named_parameters())
    return model


def damaged(path: str) -> list[str]:
    """What `differences` finds where a model in memory has one value of an expert changed, and one of a norm."""
    whole = load(path, "float32")
    with torch.no_grad():
        whole.get_parameter("model.layers.1.mlp.experts.down_proj")[3, 5, 7] += 1e-6
        whole.get_parameter("model.norm.weight")[-1] += 1e-6
    config = zero3("float32")
    parts = load(path, "float32")
    del config
    return differences(whole, parts, "float32")


def renamed(folder: Path) -> str:
    """Weights under a name that transformers reads and would not write."""
    if torch.distributed.get_rank() == 0:
        for path in folder.glob("*.safetensors"):
            tensors = load_file(path)
            save_file({key.removeprefix("model."): tensor for key, tensor in tensors.items()}, path, {"format": "pt"})
        for path in folder.glob("*.json"):
            path.write_text(path.read_text().replace('"model.', '"'))
    torch.distributed.barrier()
    config = zero3("float32")
    try:
        load(str(folder), "float32")
    except UserError as error:
        return str(error)
    finally:
        del config
    return ""


def memory(path: str) -> dict[str, float]:
    """The growth of the peak of this rank's memory, as a share of the model: whole, and in parts."""
    size = sum(p.numel() for p in load(path, "float32").parameters()) * 4 / MIB
    whole = peak_growth(lambda: load(path, "float32"))
    config = zero3("float32")
    parts = peak_growth(lambda: load(path, "float32"))
    del config
    return {"size": size, "whole": whole / size, "parts": parts / size}


def main() -> None:
    folder = Path(sys.argv[1])
    ddp_backend()
    deepspeed.init_distributed(dist_backend="gloo")
    found: dict[str, Any] = {}
    for family, shape in SHAPES.items():
        path = save(folder / family, family, shape)
        found[family] = {dtype: compared(path, dtype, load) for dtype in ("float32", "bfloat16")}
    ernie = str(folder / "Ernie4_5_Moe")
    found["reward"] = {dtype: compared(ernie, dtype, reward) for dtype in ("float32", "bfloat16")}
    found["damaged"] = damaged(ernie)
    found["memory"] = memory(save(folder / "large", "Ernie4_5_Moe", LARGE, "50MB"))
    found["renamed"] = renamed(folder / "Llama")
    (folder / f"rank{torch.distributed.get_rank()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
    leave()
