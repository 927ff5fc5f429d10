"""Expert parallelism without ranks: what is refused, the router's precision, and the comparison after an export."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file
from transformers import Ernie4_5_MoeConfig, Ernie4_5_MoeForCausalLM, LlamaConfig, LlamaForCausalLM

from alignment.errors import UserError
from alignment.linear import Fp32Linear
from alignment.moe import export
from alignment.moe.autoep import (
    check_model,
    check_replaced,
    check_sizes,
    freeze_correction_bias,
    install_autoep,
)
from alignment.moe.config import expert_parallel_size
from alignment.moe.export import ExportError, check_export, compare_weight, export_model
from alignment.moe.trainer import ExpertParallelTrainerMixin

SIZES: dict[str, Any] = {
    "vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1,
}  # fmt: skip


def ernie(experts: int) -> Ernie4_5_MoeForCausalLM:
    config = Ernie4_5_MoeConfig(
        **SIZES, moe_intermediate_size=8, moe_num_experts=experts, moe_k=2, moe_layer_start_index=1
    )
    return Ernie4_5_MoeForCausalLM(config)


def test_experts_that_do_not_divide_are_refused_with_the_sizes_that_do() -> None:
    with pytest.raises(UserError, match=r"4 does not divide the model's 6 experts; valid sizes: 1, 2, 3, 6"):
        check_model(ernie(6), ep_size=4, world_size=4)
    check_model(ernie(6), ep_size=3, world_size=6)


def test_processes_that_do_not_divide_are_refused() -> None:
    with pytest.raises(UserError, match="2 does not divide the 3 processes"):
        check_sizes(num_experts=8, ep_size=2, world_size=3)


def test_dense_model_is_refused() -> None:
    with pytest.raises(UserError, match="LlamaForCausalLM has no mixture-of-experts layer"):
        check_model(LlamaForCausalLM(LlamaConfig(**SIZES)), ep_size=2, world_size=2)


def test_model_that_autoep_left_alone_is_refused() -> None:
    with pytest.raises(UserError, match=r"replaced 0 of 1 MoE layers .*model\.layers\.1\.mlp"):
        check_replaced(ernie(4))


def test_other_deepspeed_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import deepspeed

    monkeypatch.setattr(deepspeed, "__version__", "0.20.0")
    with pytest.raises(UserError, match=r"written for deepspeed 0\.19\.8, found 0\.20\.0"):
        install_autoep()


def test_private_name_that_moved_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.module_inject.auto_ep_presets import registry

    monkeypatch.delattr(registry, "_PRESET_ADAPTERS")
    with pytest.raises(UserError, match="_PRESET_ADAPTERS"):
        install_autoep()


def test_expert_parallel_size_is_read_from_the_launchers_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"expert_parallel": {"enabled": True, "autoep_size": 4}}))
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(path))
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert expert_parallel_size() == 4
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "false")
    assert expert_parallel_size() == 0


def test_ranks_that_take_themselves_for_alone_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    trainer = cast(Any, SimpleNamespace(args=SimpleNamespace(world_size=1)))
    with pytest.raises(UserError, match="2 processes were launched, but the trainer sees 1"):
        ExpertParallelTrainerMixin._check_world_size(trainer)


def test_correction_bias_alone_is_frozen() -> None:
    model = ernie(4)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    freeze_correction_bias(model)
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert frozen == ["model.layers.1.mlp.gate.moe_statics.e_score_correction_bias"]


def test_gate_of_a_bfloat16_model_computes_in_float32() -> None:
    """1 + 2^-9 is 1 in bfloat16, so a bfloat16 product could not tell the two experts apart."""
    gate = Fp32Linear(2, 2, bias=False, dtype=torch.bfloat16)
    with torch.no_grad():
        gate.weight.copy_(torch.tensor([[1.0, 2**-9], [1.0, 0.0]]))
    logits = gate(torch.ones(1, 2, dtype=torch.bfloat16))
    assert logits.tolist() == [[1 + 2**-9, 1.0]]
    assert logits.dtype == torch.float32


@pytest.mark.parametrize(
    ("disk", "problem"),
    [
        (torch.ones(2, dtype=torch.bfloat16), r"w is torch.bfloat16 of shape \[2\], expected torch.float32 of \[2\]"),
        (torch.ones(2, 1), r"w is torch.float32 of shape \[2, 1\], expected torch.float32 of \[2\]"),
        (torch.tensor([torch.nan, 1.0 + 2**-20]), "w differs from the model in memory in 1 of 2 values"),
        (torch.tensor([-0.0, 2.0]), "w differs from the model in memory in 2 of 2 values"),
    ],
)
def test_weight_that_differs_is_named(disk: torch.Tensor, problem: str) -> None:
    with pytest.raises(ExportError, match=problem):
        compare_weight("w", torch.tensor([torch.nan, 1.0]), disk)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -0.0])
def test_weight_with_the_same_bits_is_the_same(value: float) -> None:
    compare_weight("w", torch.tensor([[value, 1.0]]), torch.tensor([[value, 1.0]]))
    compare_weight("scalar", torch.tensor(value, dtype=torch.bfloat16), torch.tensor(value, dtype=torch.bfloat16))


@pytest.mark.parametrize("shard_bytes", [10**9, 2_000])
def test_one_process_writes_what_transformers_would(shard_bytes: int, tmp_path: Path) -> None:
    """The same weights under the same names, and the same configs; but written aside, and compared."""
    model = Ernie4_5_MoeForCausalLM._from_config(ernie(4).config, dtype=torch.bfloat16)  # its routers stay in float32
    model.generation_config.temperature, model.generation_config.do_sample = 0.5, True
    export_model(model, tmp_path / "ours", shard_bytes=shard_bytes)
    model.save_pretrained(tmp_path / "theirs", max_shard_size=shard_bytes)
    ours, theirs = (
        {key: tensor for path in folder.glob("*.safetensors") for key, tensor in load_file(path).items()}
        for folder in (tmp_path / "ours", tmp_path / "theirs")
    )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "ours" / name).read_text() == (tmp_path / "theirs" / name).read_text()
    assert (tmp_path / "ours" / "model.safetensors.index.json").exists() == (shard_bytes == 2_000)
    check_export(model, tmp_path / "ours")


def test_weight_that_the_folder_could_not_hold_is_refused(tmp_path: Path) -> None:
    model = ernie(4)
    model.model.register_parameter("extra", torch.nn.Parameter(torch.ones(1)))
    with pytest.raises(ExportError, match="model.extra: only one of the engine and Ernie4_5_MoeForCausalLM has"):
        export_model(model, tmp_path / "model")


def test_failed_export_leaves_the_former_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ernie(4)
    export_model(model, tmp_path / "model")
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    with pytest.raises(
        ExportError, match=r"model.embed_tokens.weight differs from the model in memory in 128 of 128 values"
    ):
        check_export(model, tmp_path / "model")
    before = (tmp_path / "model" / "model.safetensors").read_bytes()
    monkeypatch.setattr(export, "save_file", lambda *_, **__: (_ for _ in ()).throw(OSError("No space left on device")))
    with pytest.raises(ExportError, match="OSError: No space left on device"):
        export_model(model, tmp_path / "model")
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
