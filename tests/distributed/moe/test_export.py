"""The export of an expert-parallel model: every damage to the folder is noticed on every rank, and memory stays small.

Four gloo ranks with experts held twice under ZeRO-3, where every parameter is partitioned; two for the memory.
"""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

Launch = Callable[..., subprocess.CompletedProcess[str]]
EXPERT = "model.layers.1.mlp.experts"


def exported(launch: Launch, folder: Path, mode: str, ranks: int) -> list[dict[str, str | float]]:
    """What each rank found."""
    # What is freed goes back at once, as glibc does with tensors over 32 MiB: the peak is what is held, not its debris.
    launch("export_worker.py", folder, mode, ranks=ranks, MALLOC_MMAP_THRESHOLD_="65536")
    return [json.loads((folder / f"{mode}{rank}.json").read_text()) for rank in range(ranks)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("export")


@pytest.fixture(scope="module")
def faults(launch: Launch, folder: Path) -> list[dict[str, str | float]]:
    return exported(launch, folder, "faults", ranks=4)


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        ("whole", "no error"),
        ("missing", f"{EXPERT}.3.up_proj.weight is missing"),
        ("drawn anew", f"{EXPERT}.2.up_proj.weight differs from the model in memory in 512 of 512 values"),
        ("swapped", f"{EXPERT}.0.up_proj.weight differs from the model in memory in 512 of 512 values"),
        ("last bit", f"{EXPERT}.2.up_proj.weight differs from the model in memory in 1 of 512 values"),
        ("left over", f"{EXPERT}.4.up_proj.weight is left over: the model has no such weight"),
        ("truncated", "safetensors cannot be read: "),
        ("other config", "transformers loads it with missing keys: model.layers.2."),
        ("unwritable", "NotADirectoryError"),
        ("checkpoints", "it holds training checkpoints, which the export would delete"),
    ],
)
def test_every_rank_names_what_is_wrong(faults: list[dict[str, str]], damage: str, problem: str) -> None:
    for rank, found in enumerate(faults):
        assert problem in found[damage], f"rank {rank}"


def test_nothing_is_left_behind(faults: list[dict[str, str]]) -> None:
    assert faults[0]["left behind"] == ""


def test_export_under_zero_3_is_the_model_in_the_engine(folder: Path, faults: list[dict[str, str]]) -> None:
    """Shards, an index, the tied head written once; plain transformers computes what each rank's engine does."""
    index = json.loads((folder / "whole" / "model.safetensors.index.json").read_text())
    shards = {path.name: load_file(path) for path in (folder / "whole").glob("*.safetensors")}
    assert {key: name for name, tensors in shards.items() for key in tensors} == index["weight_map"]
    assert sorted(shards) == [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    assert len(shards) > 2
    sizes = [sum(tensor.nbytes for tensor in tensors.values()) for tensors in shards.values()]
    assert max(sizes) <= 20_000
    assert sum(sizes) == index["metadata"]["total_size"]
    assert "lm_head.weight" not in index["weight_map"]
    model = AutoModelForCausalLM.from_pretrained(folder / "whole").eval()
    assert model.num_parameters() == index["metadata"]["total_parameters"]
    for rank in range(len(faults)):
        ids, logits = torch.load(folder / f"logits{rank}.pt")
        with torch.no_grad():
            torch.testing.assert_close(model(input_ids=ids).logits, logits, rtol=0, atol=1e-5)


def test_rank_0_holds_about_a_shard_and_not_the_model(launch: Launch, tmp_path: Path) -> None:
    """A model of 264 MiB in shards of 24; its greatest weight has 16. Gathering all of it first takes 224."""
    rank_0, rank_1 = exported(launch, tmp_path, "memory", ranks=2)
    assert rank_0["export"] < 3 * 24
    assert rank_1["export"] < 24
    assert rank_0["whole_model"] > 200, "else the measurement sees nothing"
