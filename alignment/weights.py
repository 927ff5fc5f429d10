"""The files of a model's weights, and the names that the weights have there."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.integrations import deepspeed as hf_deepspeed


def weight_folder(path: str) -> Path:
    """Where the weights of a folder, or of a hub id that has been downloaded, lie."""
    if Path(path).is_dir():
        return Path(path)
    return Path(snapshot_download(path, allow_patterns="*.safetensors", local_files_only=True))


def weight_files(folder: Path) -> dict[str, Path]:
    """The file of each weight of a folder, by its name there.

    Raises:
        SafetensorError: a file that cannot be read; it names the file.
    """
    files: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                files |= dict.fromkeys(file.keys(), path)
        except SafetensorError as error:
            raise SafetensorError(f"{path.name} cannot be read: {error}") from None
    return files


def on_disk(model: PreTrainedModel, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """One weight under its names on disk: transformers fuses experts in memory, and stores them one by one."""
    return revert_weight_conversion(model, {name: tensor})


@contextmanager
def unaware_of_deepspeed() -> Iterator[None]:
    """Under ZeRO 3 transformers partitions whatever it makes, which takes all ranks; not so in here."""
    config = hf_deepspeed._hf_deepspeed_config_weak_ref
    hf_deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        hf_deepspeed._hf_deepspeed_config_weak_ref = config
