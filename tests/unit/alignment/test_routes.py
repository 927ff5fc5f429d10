"""Which adapter answers a prompt, what is counted, and which adapters are refused."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file
from torch import ones
from transformers import PreTrainedTokenizerFast

from alignment.config import EngineConfig, SamplingConfig
from alignment.errors import UserError
from alignment.rollout.routes import Routes
from alignment.rollout.samples import Sample, engine_metrics
from alignment.rollout.sampling import sample
from alignment.rollout.served import rank_of, targets_of
from alignment.rows import Row

ADAPTERS = {"th": Path("th"), "id": Path("id")}


def asked(text: str, language: str | None = None) -> Row:
    row = {"id": text, "prompt": [{"role": "system", "content": "ภาษาไทย"}, {"role": "user", "content": text}]}
    return row | ({"language": language} if language else {})


def test_the_language_decides_and_is_identified_where_it_is_not_given() -> None:
    routes = Routes(EngineConfig(adapters=ADAPTERS))
    chosen = [
        routes.of(asked("45?", "th")),
        routes.of(asked("ส้มสามผลราคาเท่าไหร่ครับ")),
        routes.of(asked("ส้มสามผลราคาเท่าไหร่ครับ", "id")),
        routes.of(asked("How much are the three shirts that I ordered yesterday?")),
        routes.of(asked("45 x 3 = ?")),
        routes.of(asked("ꦥꦶꦫ", "jv")),
    ]
    assert chosen == ["th", "th", "id", None, None, None]
    assert routes.counts == {"th": 2, "id": 1, "base": 2, "unknown": 1}


def test_an_adapter_for_a_language_that_cannot_be_identified_serves_rows_that_name_it() -> None:
    routes = Routes(EngineConfig(adapters={"jv": Path("jv")}))
    assert routes.of(asked("Pira regane?", "jv")) == "jv"
    with pytest.raises(UserError, match="languages: 'xx' is no ISO 639-1 code"):
        Routes(EngineConfig(adapters=ADAPTERS, detect=["xx", "en"]))


class Fake:
    """Answers with the number of the adapter that it is asked for."""

    weights, max_model_len = "weights", 128

    def __init__(self) -> None:
        self.settings: dict[str, str | int | float] = {}
        self.faults: dict[str, int] = {}
        self.routes = Routes(EngineConfig(adapters=ADAPTERS))
        self.calls: list[list[str | None]] = []

    def generate(self, *_: Any) -> list[list[Sample]]:
        raise AssertionError("it has adapters")

    def generate_with(
        self,
        adapters: Sequence[str | None],
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[Sequence[int]],
        sampling: SamplingConfig,
        stop: Sequence[int],
    ) -> list[list[Sample]]:
        self.calls.append(list(adapters))
        answers = [10 + [None, "th", "id"].index(adapter) for adapter in adapters]
        return [[Sample([token], "length", 0.0) for _ in own] for token, own in zip(answers, seeds, strict=True)]


def test_samples_of_other_adapters_are_never_taken_for_these(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    engine = Fake()

    def drawn(rows: Sequence[Row], **budget: int) -> list[list[int]]:
        settings = SamplingConfig(n=1, max_tokens=40, **budget)
        [chunk] = sample(engine, tiny_tokenizer, rows, tmp_path, settings, seed=0)
        return [found[0].token_ids for found in chunk.samples if found]

    rows = [asked("a", "th"), asked("b", "en"), asked("c" * 400, "th"), asked("d", "id")]
    assert drawn(rows) == [[11], [10], [12]]
    assert engine.calls == [["th", None, "id"]]
    assert drawn(rows) == [[11], [10], [12]] and len(engine.calls) == 1
    assert drawn([row | {"language": "id"} for row in rows]) == [[12], [12], [12]]
    assert engine_metrics(engine) == {"routed.base": 2, "routed.id": 5, "routed.th": 2}
    with_budget = drawn(rows, thinking_budget=1)
    assert engine.calls[2:] == [["th", None, "id"]] * 2, "the same adapters go on"
    assert [ids[0] for ids in with_budget] == [11, 10, 12]


def test_adapters_that_vllm_cannot_serve_are_refused(tmp_path: Path) -> None:
    def folder(**config: Any) -> Path:
        (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4} | config))
        return tmp_path

    with pytest.raises(UserError, match="not an adapter folder"):
        rank_of(tmp_path)
    names = ["model.layers.0.self_attn.q_proj.lora_A.weight", "model.layers.0.mlp.up_proj.lora_B.weight"]
    save_file({name: ones(1) for name in names}, tmp_path / "adapter_model.safetensors")
    assert rank_of(folder(target_parameters=["shared_experts.up_proj.weight"])) == 4
    assert targets_of(tmp_path) == {"q_proj", "up_proj"}
    with pytest.raises(UserError, match="vLLM serves no DoRA adapter beside a model; merge it"):
        rank_of(folder(use_dora=True))
    with pytest.raises(UserError, match=r"adapts routed experts \(experts.down_proj\)"):
        rank_of(folder(target_parameters=["experts.down_proj"]))
    with pytest.raises(UserError, match="rank 1024, expected at most 512"):
        rank_of(folder(r=1024))
