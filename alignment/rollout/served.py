"""Which adapters vLLM 0.31 serves beside a model. Imports no vLLM."""

import json
from pathlib import Path

from safetensors import safe_open

from alignment.adapters import WEIGHTS, check_adapter_folder
from alignment.errors import UserError

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what it makes room for


def rank_of(folder: Path) -> int:
    """The rank of an adapter that vLLM can serve.

    Raises:
        UserError: not an adapter's folder, or an adapter of another kind.
    """
    check_adapter_folder(folder)
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    if config.get("use_dora"):
        raise UserError(f"{folder}: vLLM serves no DoRA adapter beside a model; merge it: `alignment merge`")
    if experts := [name for name in config.get("target_parameters") or () if ".experts." in f".{name}"]:
        raise UserError(f"{folder}: adapts routed experts ({experts[0]}), which is not served; merge it")
    if config["r"] > RANKS[-1]:
        raise UserError(f"{folder}: rank {config['r']}, expected at most {RANKS[-1]}, which vLLM takes")
    return int(config["r"])


def targets_of(folder: Path) -> set[str]:
    """The ends of the names of the modules that an adapter adapts."""
    with safe_open(folder / WEIGHTS, "pt") as file:
        return {name.rpartition(".lora_")[0].rpartition(".")[2] for name in file.keys()}  # noqa: SIM118
