"""Adapters of two languages and a joint one through the real job, killed and resumed; DoRA among them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from alignment.fingerprint import weights_hash
from alignment.rows import Row, write_rows
from sft import adapters
from sft.config import AdaptersConfig

ANSWERS = {"en": ("it is 45 baht", "the answer is 37", "three shirts"), "id": ("harga 45", "berapa tiga", "baju 12")}


class Killed(BaseException):
    """In the place of a SIGKILL."""


def row(number: int, language: str) -> Row:
    question = f"{number} shirts?" if language == "en" else f"Berapa {number} baju?"
    answer = ANSWERS[language][number % 3]
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "language": language}


@pytest.fixture(scope="module")
def folder(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(tiny_tokenizer), initializer_range=0.2, **shape)
    LlamaForCausalLM(config).save_pretrained(folder / "base")
    tiny_tokenizer.save_pretrained(folder / "base")
    write_rows(folder / "rows.jsonl", (row(number, language) for number in range(60) for language in ANSWERS))
    write_rows(folder / "held.jsonl", (row(number, language) for number in range(60, 80) for language in ANSWERS))
    return folder


def config(folder: Path, out: Path) -> AdaptersConfig:
    values: dict[str, Any] = {
        "output_dir": out,
        "base": {
            "model": {"path": str(folder / "base")},
            "sources": [{"rows": str(folder / "rows.jsonl")}],
            "packing": {"capacity": 128},
            "prepare": {"cache": folder / "cache"},
            "training": {"learning_rate": 1e-2, "epochs": 2, "log_steps": 1},
            "lora": {"rank": 4, "alpha": 8, "dora": True},
        },
        "evaluation": str(folder / "held.jsonl"),
    }
    return AdaptersConfig.model_validate(values)


def test_each_adapter_learns_its_language_and_a_killed_run_ends_the_same(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapters.run(config(folder, tmp_path / "whole"))
    found = json.loads((tmp_path / "whole/metrics.json").read_text())
    assert (found["rows.in"], found["rows.out"], found["groups"]) == (120, 120, 2)
    assert found["en.rows.rows_in"] == 60 and found["joint.rows.rows_in"] == 120
    for language, other in (("en", "id"), ("id", "en")):
        assert found[f"{language}.{language}.over_base.high"] < -1
        assert found[f"{language}.{language}.loss"] < found[f"{other}.{language}.loss"] - 0.5
        assert found[f"joint.{language}.over_base.high"] < -1
    assert "| id |" in (tmp_path / "whole/interference.md").read_text()
    assert (tmp_path / "whole/interference.png").read_bytes().startswith(b"\x89PNG")

    # DoRA: saved, read by plain peft, and merged into what answers alike.
    plain = AutoModelForCausalLM.from_pretrained(folder / "base")
    read = PeftModel.from_pretrained(plain, tmp_path / "whole/en/adapter").eval()
    assert any("lora_magnitude_vector" in name for name, _ in read.named_parameters())
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "whole/en/model")
    ids = torch.arange(24)[None]
    with torch.no_grad():
        assert (read(input_ids=ids).logits - merged(input_ids=ids).logits).abs().max() < 1e-3

    train, trained = adapters._train, []

    def dies_before_the_second(*arguments: Any) -> None:
        if trained:
            raise Killed
        trained.append(arguments[1])
        train(*arguments)

    for name, patched in (
        ("_train", dies_before_the_second),
        ("_interference", lambda *_: (_ for _ in ()).throw(Killed)),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(adapters, name, patched)
            with pytest.raises(Killed):
                adapters.run(config(folder, tmp_path / "killed"))
    assert trained == ["en"]
    adapters.run(config(folder, tmp_path / "killed"))
    for name in ("en", "id", "joint"):
        assert weights_hash(tmp_path / "killed" / name / "adapter") == weights_hash(
            tmp_path / "whole" / name / "adapter"
        )
    assert json.loads((tmp_path / "killed/metrics.json").read_text())["en.id.loss"] == found["en.id.loss"]
    assert "groups: each language of the rows; and joint" in adapters.plan(config(folder, tmp_path / "killed"))
