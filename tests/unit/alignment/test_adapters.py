"""Which modules an adapter is put on, what is refused, and that a wrong merge is caught."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import transformers
from peft import LoraConfig, LoraModel, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from pydantic import ValidationError
from transformers import Ernie4_5_MoeForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from alignment import adapters, cli
from alignment.adapters import AdapterError, merge_adapter, merge_folders, peft_config
from alignment.config import LoRAConfig, ModelConfig
from alignment.errors import UserError
from alignment.moe import adapters as moe_adapters
from alignment.moe import autoep
from sft.config import SFTConfig
from sft.train import plan

ROOT = Path(__file__).parents[3]
SIZES: dict[str, Any] = {
    "vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "moe_intermediate_size": 8,
}  # fmt: skip
ERNIE = SIZES | {"moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 1}
QWEN2 = SIZES | {"num_experts": 4, "num_experts_per_tok": 2, "shared_expert_intermediate_size": 8}
QWEN3 = SIZES | {"num_experts": 4, "num_experts_per_tok": 2}
ATTENTION = {f"self_attn.{name}_proj" for name in "qkvo"}


def model(family: str = "Ernie4_5_Moe", shape: dict[str, Any] = ERNIE) -> PreTrainedModel:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**shape)
    return cast(PreTrainedModel, getattr(transformers, f"{family}ForCausalLM")(config))


def mlp(name: str) -> set[str]:
    return {f"{name}.{projection}_proj" for projection in ("gate", "up", "down")}


def adapted(base: PreTrainedModel, lora: LoRAConfig) -> set[str]:
    found = get_peft_model(base, peft_config(lora, base))
    names = [name for name, module in found.named_modules() if isinstance(module, BaseTunerLayer)]
    return {".".join(name.split(".")[-2:]) for name in names}


# targets


@pytest.mark.parametrize(
    ("family", "shape", "expected"),
    [
        ("Llama", {key: SIZES[key] for key in SIZES if "moe" not in key}, ATTENTION | mlp("mlp")),
        ("Ernie4_5_Moe", ERNIE, ATTENTION | mlp("mlp") | mlp("shared_experts")),
        ("Qwen2Moe", QWEN2, ATTENTION | mlp("shared_expert")),
        ("Qwen3Moe", QWEN3, ATTENTION),
    ],
)
def test_by_default_all_projections_but_those_of_routed_experts(
    family: str, shape: dict[str, Any], expected: set[str]
) -> None:
    assert adapted(model(family, shape), LoRAConfig()) == expected


def test_peft_alone_would_adapt_every_routed_expert() -> None:
    """The reason for `target_parameters`; once this fails, plain names will do."""
    names = ["q_proj", "gate_proj", "up_proj", "down_proj"]
    with pytest.warns(RuntimeWarning, match="gate_up_proj"):
        found = get_peft_model(model(), LoraConfig(target_modules=names))
    assert any(name.endswith("mlp.experts") for name, m in found.named_modules() if isinstance(m, BaseTunerLayer))
    assert not any("shared_experts" in name for name in get_peft_model_state_dict(found, save_embedding_layers=False))


def test_targets_are_ends_of_names() -> None:
    assert adapted(model(), LoRAConfig(targets=["shared_experts.up_proj", "v_proj"])) == {
        "shared_experts.up_proj",
        "self_attn.v_proj",
    }
    assert adapted(model(), LoRAConfig(targets=["experts.down_proj"])) == {"mlp.experts"}


@pytest.mark.parametrize(
    ("target", "hint"),
    [("q_porj", "did you mean 'q_proj'?"), ("gate", ""), ("lm_head", ""), ("experts.down", "'experts.down_proj'")],
)
def test_a_target_that_names_nothing_is_refused(target: str, hint: str) -> None:
    """The router is no linear layer, and the head would never be trained: TRL multiplies by its weight."""
    with pytest.raises(UserError, match=rf"lora.targets: no linear layer is named '{target}'.*{hint}"):
        peft_config(LoRAConfig(targets=["k_proj", target]), model())


def test_dropout_where_peft_has_none_is_refused() -> None:
    with pytest.raises(UserError, match=r"lora.dropout: 0.1 found, expected 0.*\n.*down_proj, gate_proj, up_proj"):
        peft_config(LoRAConfig(dropout=0.1), model())
    assert peft_config(LoRAConfig(dropout=0.1, targets=["q_proj"]), model()).lora_dropout == 0.1


def test_dora_where_peft_has_none_is_refused() -> None:
    with pytest.raises(UserError, match=r"lora.dora: true found, expected false.*\n.*down_proj, gate_proj, up_proj"):
        peft_config(LoRAConfig(dora=True), model())
    assert peft_config(LoRAConfig(dora=True, targets=["q_proj"]), model()).use_dora


def test_a_preset_is_no_base_for_an_adapter() -> None:
    values = {
        "output_dir": "out",
        "model": {"preset": "compass-tiny", "tokenizer": "t"},
        "sources": [{"rows": "rows.jsonl"}],
        "training": {"learning_rate": 1e-3},
    }
    SFTConfig.model_validate(values)
    with pytest.raises(ValidationError, match=r"an adapter needs a trained base, 'model\.path'"):
        SFTConfig.model_validate(values | {"lora": {}})


# the dry run


@pytest.fixture
def sft_config(tiny_model_folder: Path, tmp_path: Path) -> SFTConfig:
    (tmp_path / "rows.jsonl").write_text('{"messages": [{"role": "user", "content": "?"}]}\n')
    return SFTConfig.model_validate(
        {
            "output_dir": str(tmp_path / "out"),
            "model": {"path": str(tiny_model_folder)},
            "sources": [{"rows": str(tmp_path / "rows.jsonl")}],
            "training": {"learning_rate": 1e-3},
            "lora": {"rank": 2, "targets": ["q_proj", "v_proj"]},
        }
    )


def test_the_plan_counts_what_is_trained(sft_config: SFTConfig) -> None:
    """Two layers, rank 2: q takes 32 to 32, v 32 to 16: 2 x (2 x (32 + 32) + 2 x (32 + 16)) = 448."""
    assert any(line.startswith("adapter: 448 of ") for line in plan(sft_config))


def test_the_plan_refuses_routed_experts_under_expert_parallelism(
    sft_config: SFTConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = sft_config.model_copy(update={"lora": LoRAConfig(targets=["experts.down_proj"])})
    plan(changed)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(ROOT / "configs" / "deepspeed" / "zero1-ep2.json"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    plan(sft_config)
    with pytest.raises(UserError, match=r"model\.layers\.0\.mlp\.experts is adapted, but under expert parallelism"):
        plan(changed)


# merging


@pytest.fixture
def adapter(tiny_model_folder: Path, tmp_path: Path) -> Path:
    base = Ernie4_5_MoeForCausalLM.from_pretrained(tiny_model_folder)
    made = get_peft_model(base, peft_config(LoRAConfig(rank=2), base))
    for name, weight in made.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.2)
    made.save_pretrained(str(tmp_path / "adapter"))
    return tmp_path / "adapter"


def test_a_merge_that_lost_the_adapter_is_caught(
    adapter: Path, tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, out = ModelConfig(path=str(tiny_model_folder)), tmp_path / "merged"
    assert merge_adapter(base, adapter, out).mean < 1e-5
    monkeypatch.setattr(LoraModel, "merge_and_unload", lambda self, **_: self.unload())
    with pytest.raises(AdapterError, match="log-probabilities differ"):
        merge_adapter(base, adapter, tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()


def test_an_adapter_of_another_base_is_refused(adapter: Path, tmp_path: Path) -> None:
    model().save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="not an adapter of"):
        merge_adapter(ModelConfig(path=str(tmp_path / "other")), adapter, tmp_path / "merged")
    LlamaForCausalLM(LlamaConfig(**{key: SIZES[key] for key in SIZES if "moe" not in key})).save_pretrained(
        tmp_path / "dense"
    )
    with pytest.raises(UserError, match="not an adapter of"):
        merge_adapter(ModelConfig(path=str(tmp_path / "dense")), adapter, tmp_path / "merged")
    with pytest.raises(UserError, match="not an adapter folder: it has no adapter_model.safetensors"):
        merge_adapter(ModelConfig(path=str(tmp_path / "other")), tmp_path / "other", tmp_path / "merged")


def test_an_adapter_with_a_layer_missing_is_refused(adapter: Path, tiny_model_folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(adapter / adapters.WEIGHTS)
    lost = min(weights)
    save_file({name: weight for name, weight in weights.items() if name != lost}, adapter / adapters.WEIGHTS)
    with pytest.raises(UserError, match=rf"not an adapter of .*{lost}"), pytest.warns(UserWarning, match="missing"):
        merge_adapter(ModelConfig(path=str(tiny_model_folder)), adapter, tmp_path / "merged")


def test_the_console_merges_and_overwrites_nothing(
    adapter: Path, tiny_model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["merge", str(tiny_model_folder), str(adapter), str(tmp_path / "merged")]
    assert cli.main(arguments) == 0
    assert "log-probabilities differ by" in capsys.readouterr().out
    assert cli.main(arguments) == 2
    with pytest.raises(UserError, match="exists already"):
        merge_folders(str(tiny_model_folder), adapter, adapter)


def test_dora_is_merged_into_a_mixture_of_experts(tiny_model_folder: Path, tmp_path: Path) -> None:
    base = Ernie4_5_MoeForCausalLM.from_pretrained(tiny_model_folder)
    made = get_peft_model(base, peft_config(LoRAConfig(rank=2, dora=True, targets=["q_proj", "v_proj"]), base))
    for name, weight in made.named_parameters():
        if "lora_" in name:
            weight.data += 0.2 * torch.randn_like(weight)
    made.save_pretrained(str(tmp_path / "adapter"))
    assert merge_adapter(ModelConfig(path=str(tiny_model_folder)), tmp_path / "adapter", tmp_path / "out").mean < 1e-5


# expert parallelism, without ranks


def peft_model(lora: LoRAConfig = LoRAConfig(rank=2)) -> PeftModel:  # noqa: B008
    base = model()
    return cast(PeftModel, get_peft_model(base, peft_config(lora, base)))


def test_an_engine_of_frozen_experts_is_one_without_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moe_adapters, "autoep_layers", lambda m: [("mlp", m.get_base_model().model.layers[1].mlp)])

    def has_moe_layers(found: Any) -> bool:
        engine = SimpleNamespace()
        configure = moe_adapters._without_frozen_experts(lambda e, _: setattr(e, "has_moe_layers", True))
        configure(engine, found)
        return bool(engine.has_moe_layers)

    trained = peft_model()
    assert not has_moe_layers(trained)
    trained.get_base_model().model.layers[1].mlp.experts.requires_grad_(True)
    assert has_moe_layers(trained)
    assert has_moe_layers(model().requires_grad_(False)), "without an adapter checkpoints would lose the experts"


def test_a_name_of_deepspeeds_that_moved_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.runtime.engine import DeepSpeedEngine

    monkeypatch.delattr(DeepSpeedEngine, "_configure_distributed_model")
    with pytest.raises(UserError, match="lacks a name that adapters need.*_configure_distributed_model"):
        moe_adapters.prepare(peft_model(), zero_stage=1)


def test_presets_match_with_and_without_an_adapter() -> None:
    from deepspeed.module_inject.auto_ep_presets.registry import PRESET_MODELS

    autoep.install_autoep()
    for _ in range(2):
        moe_adapters.prepare(peft_model(), zero_stage=1)
    pattern = re.compile(PRESET_MODELS[autoep.ERNIE].moe_layer_pattern)
    for base in (model(), peft_model()):
        assert [name for name, _ in base.named_modules() if pattern.fullmatch(name)][-1].endswith("layers.1.mlp")


def test_an_adapter_is_written_and_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = peft_model()
    assert moe_adapters._write_and_compare(written, tmp_path) is None
    PeftModel.from_pretrained(model(), tmp_path)
    dora = LoRAConfig(rank=2, dora=True, targets=["q_proj"])
    assert moe_adapters._write_and_compare(peft_model(dora), tmp_path / "dora") is None
    monkeypatch.setattr(
        moe_adapters,
        "adapter_weights",
        lambda m: [(f"x.{name}", weight) for name, weight in get_peft_model_state_dict(m).items()],
    )
    assert "names that plain peft lacks or misses: base_model" in str(
        moe_adapters._write_and_compare(written, tmp_path)
    )
