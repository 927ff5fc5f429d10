"""What cannot be trained, refused before any weight is read."""

from pathlib import Path

from alignment import models
from alignment.config import ModelConfig
from alignment.errors import UserError, did_you_mean
from dpo.arguments import SORTED_LOSSES, TRL_LOSSES, WEIGHTED_LOSSES
from dpo.config import DPOConfig, LossConfig

SMOOTHED_LOSSES = ("exo_pair", "robust", *SORTED_LOSSES)  # those of TRL that read label_smoothing


def check_loss(loss: LossConfig) -> None:
    known = (*WEIGHTED_LOSSES, *TRL_LOSSES)
    if loss.type not in known:
        raise UserError(f"loss.type: unknown loss {loss.type!r}{did_you_mean(loss.type, known)}")
    if loss.scope == "global" and loss.type not in SORTED_LOSSES:
        raise UserError(
            f"loss.scope: 'global' has no effect on {loss.type!r}, which compares no pair with another; expected micro"
        )
    if loss.nll_weight and loss.type not in WEIGHTED_LOSSES and loss.scope == "micro":
        raise UserError(
            f"loss.nll_weight: has no effect on TRL's {loss.type!r}; expected one of {WEIGHTED_LOSSES}, or 0"
        )
    if loss.label_smoothing and (loss.type not in SMOOTHED_LOSSES or loss.scope == "global"):
        raise UserError(f"loss.label_smoothing: has no effect on {loss.type!r} in scope {loss.scope!r}; expected 0")
    if loss.type == "exo_pair" and not loss.label_smoothing:
        raise UserError("loss.label_smoothing: 'exo_pair' needs one above 0; its paper has 1.0e-3")


def check_reference(config: DPOConfig) -> None:
    """Refuse a reference of other words than the policy's, before any weight is read."""
    if config.reference.model is None:
        return
    source = reference_source(config)
    if not Path(config.reference.model).is_dir():
        raise UserError(f"reference.model: {config.reference.model}: no such model folder")
    models.check_model(source)
    sizes = [models.config_of(model).get_text_config().vocab_size for model in (source, config.model)]
    if config.model.path is not None and sizes[0] != sizes[1]:
        raise UserError(
            f"reference.model: {config.reference.model} has a vocabulary of {sizes[0]}, the policy one of {sizes[1]}"
        )
    if not (Path(config.reference.model) / "tokenizer_config.json").is_file():
        return  # weights alone: the policy's tokens are all there is
    if models.load_tokenizer(source).get_vocab() != models.load_tokenizer(config.model).get_vocab():
        raise UserError(
            f"reference.model: {config.reference.model} has another tokenizer than the policy: its log-probabilities "
            "would be of other words"
        )


def check_adapter(config: DPOConfig) -> None:
    if config.lora is not None and config.lora.dropout:
        raise UserError(
            f"lora.dropout: {config.lora.dropout} found, expected 0: TRL trains preferences without dropout, so that "
            "policy and reference differ by the weights alone"
        )


def reference_source(config: DPOConfig) -> ModelConfig:
    """Where the reference comes from."""
    if config.reference.model is None:
        return config.model
    return ModelConfig(path=config.reference.model, dtype=config.model.dtype, kernels=config.model.kernels)
