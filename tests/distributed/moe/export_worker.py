"""One rank of a test of the export: `faults` breaks an exported folder, `memory` measures what the export takes.

Writes what it found to OUT/{mode}{rank}.json.
"""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import torch
from families import COMMON, ERNIE
from safetensors.torch import load_file, save_file
from transformers import Ernie4_5_MoeConfig, Ernie4_5_MoeForCausalLM, PreTrainedModel
from transformers.integrations import HfDeepSpeedConfig

from alignment.moe.autoep import check_replaced, freeze_correction_bias, install_autoep
from alignment.moe.export import ExportError, check_export, export_model, hf_weights
from alignment.moe.trainer import ddp_backend
from alignment.training import leave

EXPERT = "model.layers.1.mlp.experts.{}.up_proj.weight"
MIB = 1 << 20
SHARD_MIB = 24
LARGE: dict[str, Any] = COMMON | {
    "hidden_size": 512, "num_hidden_layers": 9, "moe_num_experts": 8, "moe_intermediate_size": 512, "moe_k": 2,
    "moe_layer_start_index": 0, "moe_num_shared_experts": 1, "tie_word_embeddings": True,
}  # fmt: skip


def engine_of(make: Callable[[], PreTrainedModel], config: dict[str, Any]) -> tuple[PreTrainedModel, Any]:
    model = make()
    freeze_correction_bias(model)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    engine, *_ = deepspeed.initialize(model=model, model_parameters=trainable, config=config)
    check_replaced(model)
    return model, engine


def ds_config(stage: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        "expert_parallel": {"enabled": True, "autoep_size": 2},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
    }


def faults(folder: Path) -> dict[str, str]:
    """ZeRO-3, made under zero.Init as by a Trainer, trained for a step: what the check says of each broken folder."""
    config = ds_config(stage=3)
    alive = HfDeepSpeedConfig(config)  # transformers now partitions every model that it makes
    torch.manual_seed(0)
    shape = Ernie4_5_MoeConfig(**(COMMON | ERNIE | {"tie_word_embeddings": True}))
    model, engine = engine_of(lambda: Ernie4_5_MoeForCausalLM._from_config(shape), config)
    ids = torch.randint(3, 48, (2, 9), generator=torch.Generator().manual_seed(torch.distributed.get_rank()))
    engine.backward(engine(input_ids=ids, labels=ids).loss)
    engine.step()
    export_model(model, folder / "whole", shard_bytes=20_000)
    found = {"whole": error_of(lambda: check_export(model, folder / "whole"))}
    for name, damage in DAMAGES.items():
        if torch.distributed.get_rank() == 0:
            shutil.copytree(folder / "whole", folder / name)
            damage(folder / name)
        found[name] = error_of(lambda name=name: check_export(model, folder / name))  # type: ignore[misc]
    (folder / "file").touch()
    found["unwritable"] = error_of(lambda: export_model(model, folder / "file" / "model"))
    (folder / "run" / "checkpoint-3").mkdir(parents=True, exist_ok=True)
    found["checkpoints"] = error_of(lambda: export_model(model, folder / "run"))
    torch.distributed.barrier()
    found["left behind"] = " ".join(sorted(p.name for p in folder.iterdir() if p.name.endswith(".tmp")))
    engine.eval()
    with torch.no_grad():
        torch.save((ids, engine(input_ids=ids).logits), folder / f"logits{torch.distributed.get_rank()}.pt")
    del alive
    return found


def error_of(action: Callable[[], None]) -> str:
    try:
        action()
    except ExportError as error:
        return str(error)
    return "no error"


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], None], number: int) -> None:
    """Change the tensors of the file that holds up_proj of an expert."""
    path = file_of(folder, number)
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def file_of(folder: Path, number: int) -> Path:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return folder / index["weight_map"][EXPERT.format(number)]


def missing(folder: Path) -> None:
    edit(folder, lambda tensors: tensors.pop(EXPERT.format(3)), 3)


def drawn_anew(folder: Path) -> None:
    edit(folder, lambda tensors: tensors[EXPERT.format(2)].normal_(0, 0.2), 2)


def swapped(folder: Path) -> None:
    def swap(tensors: dict[str, torch.Tensor]) -> None:
        one, two = EXPERT.format(0), EXPERT.format(1)
        tensors[one], tensors[two] = tensors[two], tensors[one]

    assert file_of(folder, 0) == file_of(folder, 1)
    edit(folder, swap, 0)


def last_bit(folder: Path) -> None:
    def flip(tensors: dict[str, torch.Tensor]) -> None:
        tensors[EXPERT.format(2)].view(torch.int32)[5, 7] ^= 1

    edit(folder, flip, 2)


def left_over(folder: Path) -> None:
    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors[EXPERT.format(4)] = tensors[EXPERT.format(3)].clone()

    edit(folder, add, 3)


def truncated(folder: Path) -> None:
    path = file_of(folder, 3)
    path.write_bytes(path.read_bytes()[:-100])


def other_config(folder: Path) -> None:
    """The weights are right, but the folder describes a model that has others."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))


DAMAGES: dict[str, Callable[[Path], None]] = {
    "missing": missing,
    "drawn anew": drawn_anew,
    "swapped": swapped,
    "last bit": last_bit,
    "left over": left_over,
    "truncated": truncated,
    "other config": other_config,
}


def memory(folder: Path) -> dict[str, float]:
    """MiB by which the peak of resident memory grows: in our export, and in one that holds the model."""
    shape = Ernie4_5_MoeConfig(**LARGE)
    model, _ = engine_of(lambda: Ernie4_5_MoeForCausalLM(shape), ds_config(stage=1))
    return {
        "export": peak_growth(lambda: export_model(model, folder / "model", shard_bytes=SHARD_MIB * MIB)),
        "whole_model": peak_growth(lambda: whole_model(model)),
    }


def whole_model(model: PreTrainedModel) -> None:
    """What the export did before: all weights gathered, then written."""
    assert len(dict(hf_weights(model))) > 100


def peak_growth(action: Callable[[], None]) -> float:
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew at what is resident now
    before = resident("VmHWM")
    action()
    return resident("VmHWM") - before


def resident(key: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) / 1024


def main() -> None:
    folder, mode = Path(sys.argv[1]), sys.argv[2]
    ddp_backend()
    deepspeed.init_distributed(dist_backend="gloo")
    install_autoep()
    found = faults(folder) if mode == "faults" else memory(folder)
    (folder / f"{mode}{torch.distributed.get_rank()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
    leave()
