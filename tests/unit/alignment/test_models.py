import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, Ernie4_5_MoeForCausalLM, PreTrainedTokenizerFast

from alignment import models
from alignment.config import ModelConfig
from alignment.errors import UserError


def test_compass_v2_by_hand() -> None:
    """The sum over Compass-v2's shape: 30 layers, hidden 3072, 2 shared + 48 routed experts of width 2048, top-4."""
    hidden, head = 3072, 128
    attention = hidden * head * (24 + 6 + 6) + 24 * head * hidden
    expert = 3 * hidden * 2048
    router = 48 * hidden + 48  # and its correction bias
    layer = attention + 2 * expert + router + 2 * hidden
    rest = 2 * 128_000 * hidden + hidden
    config = models.preset_config("compass-v2")
    count = models.count_parameters(models.on_meta(config), config)
    assert count.total == 30 * (layer + 48 * expert) + rest == 29_810_385_312
    assert count.active == 30 * (layer + 4 * expert) + rest == 4_896_219_552


def test_dense_model_is_all_active() -> None:
    config = AutoConfig.for_model(
        "qwen2", hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=64, vocab_size=100,
    )  # fmt: skip
    count = models.count_parameters(models.on_meta(config), config)
    assert count.total == count.active > 0


def test_other_moe_families_are_counted() -> None:
    """Mixtral: 2 of 4 experts are idle, each three matrices of 32 x 64, in each of 2 layers."""
    config = AutoConfig.for_model(
        "mixtral", hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=64, num_local_experts=4, num_experts_per_tok=2, vocab_size=100,
    )  # fmt: skip
    count = models.count_parameters(models.on_meta(config), config)
    assert count.total - count.active == 2 * 2 * 3 * 32 * 64


def test_unknown_preset_names_the_nearest() -> None:
    for call in (lambda: models.preset_config("compas-v2"), lambda: models.check_model(preset("compas-v2"))):
        with pytest.raises(UserError, match="did you mean 'compass-v2'"):
            call()


def preset(name: str) -> ModelConfig:
    return ModelConfig(preset=name, tokenizer="org/name")


def test_fresh_model_fits_the_tokenizer_and_follows_the_seed(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    def weights(seed: int) -> dict[str, torch.Tensor]:
        model = models.load_model(preset("compass-tiny"), tiny_tokenizer, seed=seed)
        assert model.config.vocab_size == len(tiny_tokenizer)
        assert model.config.eos_token_id == tiny_tokenizer.eos_token_id
        return dict(model.state_dict())

    first, again, other = weights(0), weights(0), weights(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


def test_folder_is_loaded_bit_by_bit_with_its_bias_frozen(
    tiny_model_folder: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    model = models.load_model(ModelConfig(path=str(tiny_model_folder)), tiny_tokenizer, seed=0)
    torch.manual_seed(0)
    saved = Ernie4_5_MoeForCausalLM(AutoConfig.from_pretrained(tiny_model_folder))  # as the fixture made it
    for (name, parameter), original in zip(model.named_parameters(), saved.parameters(), strict=True):
        assert parameter.requires_grad != name.endswith("e_score_correction_bias")
        assert torch.equal(parameter, original)


def edit_config(**changes: object) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def rename_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.wait"] = weights.pop("model.norm.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda f: (f / "model.safetensors").unlink(), "holds no weights, expected *.safetensors"),
        (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "holds pickled weights (pytorch"),
        (lambda f: (f / "config.json").unlink(), "not a model folder: it has no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "the model could not be loaded: It looks like the config file"),
        (lambda f: (f / "model.safetensors").write_bytes(b"x" * 99), "the model could not be loaded: Error"),
        (edit_config(model_type="unheard_of"), "the model could not be loaded: The checkpoint you are trying to load"),
        (edit_config(hidden_size="32"), "the model could not be loaded: Validation error for field 'hidden_size'"),
        (edit_config(num_hidden_layers=3, moe_layer_end_index=2), "missing keys: model.layers.2.input_layer"),
        (edit_config(num_hidden_layers=1), "unexpected keys: model.layers.1."),
        (edit_config(vocab_size=17), "mismatched keys: ('model.embed_tokens.weight'"),
        (rename_weight, "missing keys: model.norm.weight; unexpected keys: model.norm.wait"),
    ],
)  # fmt: skip
def test_model_folder_that_cannot_be_used(
    tiny_model_folder: Path,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    damage: Callable[[Path], object],
    expected: str,
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_folder, folder)
    damage(folder)
    with pytest.raises(UserError) as caught:
        models.load_model(ModelConfig(path=str(folder)), tiny_tokenizer, seed=0)
    message = str(caught.value)
    assert message.startswith(f"{folder}: ")
    assert expected in message
    assert len(message.splitlines()) == 1


def test_missing_folders_are_told_without_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert not models.is_local("baidu/ERNIE-4.5-21B-A3B-PT")
    for path in ("runs/missing", "./a/b", "missing", "a/b/c"):
        assert models.is_local(path)
        with pytest.raises(UserError, match=f"{Path(path)}: no such model folder"):
            models.check_model(ModelConfig(path=path))
        with pytest.raises(UserError, match=f"{path}: no such tokenizer folder"):
            models.check_model(ModelConfig(preset="compass-tiny", tokenizer=path))
        with pytest.raises(UserError, match=f"{path}: no such tokenizer folder"):
            models.load_tokenizer(ModelConfig(path=path))
