"""vLLM with adapters side by side, in one process of its own: each prompt by the adapter of its language."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

from alignment.adapters import peft_config
from alignment.config import EngineConfig, LoRAConfig
from alignment.fingerprint import weights_hash

pytestmark = pytest.mark.timeout(900)
WORKER = Path(__file__).with_name("adapters_worker.py")
EXPECTED = {"th": "th", "id": "id", "ms": "id", "en": "None", "th_unlabelled": "th", "en_unlabelled": "None"}


@pytest.fixture(scope="module")
def folder(policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture of experts with two random adapters, on attention and shared experts, of other ranks."""
    folder = tmp_path_factory.mktemp("adapter_engine")
    (folder / "model").symlink_to(policy)
    for number, (language, rank) in enumerate({"th": 2, "id": 4}.items()):
        base = AutoModelForCausalLM.from_pretrained(policy)
        adapter = get_peft_model(base, peft_config(LoRAConfig(rank=rank), base))
        generator = torch.Generator().manual_seed(number)
        for name, weight in adapter.named_parameters():
            if "lora_" in name:
                weight.data.normal_(0, 0.1, generator=generator)
        adapter.save_pretrained(folder / f"adapter_{language}")
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, Any]:
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    with (folder / "log").open("w") as log:
        command = [sys.executable, str(WORKER), str(folder)]
        code = subprocess.run(command, env=environment, stdout=log, stderr=log, timeout=600, check=False).returncode
    assert code == 0, (folder / "log").read_text()[-3000:]
    return dict(json.loads((folder / "found.json").read_text()))


def test_each_prompt_is_answered_by_the_adapter_of_its_language(found: dict[str, Any]) -> None:
    for name, gaps in found["gaps"].items():
        right = EXPECTED.get(name, "None")
        assert gaps[right] < 1e-3, name
        assert min(gap for adapter, gap in gaps.items() if adapter != right) > 0.05, name
    assert found["routed"] == {"routed.base": 2, "routed.id": 1, "routed.ms": 1, "routed.th": 2, "routed.unknown": 1}
    assert found["alone_as_together"] and set(found["budget"]) == {4}


def test_samples_are_stored_by_base_and_adapters(found: dict[str, Any], folder: Path) -> None:
    assert found["stored_as_drawn"] and found["relabelled_differ"]
    assert found["weights"] != weights_hash(folder / "model")
    [store] = (folder / "store").iterdir()
    assert json.loads((store / "manifest.json").read_text())["made_from"]["weights"] == found["weights"]
    assert len(list(store.glob("*.parquet"))) == 4  # two chunks, and two with other languages


def test_the_model_below_adapters_is_not_replaced(found: dict[str, Any]) -> None:
    assert "engine.adapters: they belong to the model in the engine" in found["reload"]


def test_servers_have_no_adapters_of_ours() -> None:
    with pytest.raises(ValidationError, match="adapters are served by the engine of this process"):
        EngineConfig(adapters={"th": Path("th")}, endpoints=["http://host:8000"])
