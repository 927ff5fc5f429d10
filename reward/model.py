"""Reward models: a causal language model with a scalar head on the last token of the sequence.

The last token is found by the attention mask, so results depend neither on the side of the padding nor on its id, which
may be the stop token's. transformers looks for the last token that is not the pad token, and has no sequence classifier
for Ernie4_5_Moe at all. The head is fp32.

Shapes: B sequences, T tokens of a row, N packed sequences of one row, D hidden width.
"""

import logging
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    Ernie4_5_MoeConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.modeling_outputs import SequenceClassifierOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.models.ernie4_5_moe.modeling_ernie4_5_moe import Ernie4_5_MoePreTrainedModel

from alignment import partition
from alignment.config import ModelConfig
from alignment.errors import UserError
from alignment.kernels.model import use_kernels
from alignment.linear import Fp32Linear
from alignment.models import LOADING_FAULTS, check_model
from alignment.moe.autoep import freeze_correction_bias
from alignment.weights import unaware_of_deepspeed

HEAD = "score.weight"


class ScalarHead(GenericForSequenceClassification):
    """Put before a transformers sequence classifier: its forward, with the last token taken from the mask."""

    model: nn.Module
    num_labels: int

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.score = Fp32Linear(config.get_text_config().hidden_size, self.num_labels, bias=False)
        cast(PreTrainedModel, self)._init_weights(self.score)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        last_tokens: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutputWithPast:
        """Scores `logits`: [B, 1] of padded rows, or [N, 1] of a packed row whose sequences end at `last_tokens`."""
        if last_tokens is None:
            mask_BT = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            position_ids = (mask_BT.cumsum(-1) - 1).clamp(min=0)
            positions_T = torch.arange(input_ids.shape[1], device=input_ids.device)
            columns_B = (mask_BT * positions_T).argmax(-1)
            rows_B = torch.arange(len(input_ids), device=input_ids.device)
        else:
            columns_B, rows_B = last_tokens, torch.zeros_like(last_tokens)
        hidden_BTD = self.model(
            input_ids, attention_mask=attention_mask, position_ids=position_ids, **kwargs
        ).last_hidden_state
        return SequenceClassifierOutputWithPast(logits=self.score(hidden_BTD[rows_B, columns_B]))


class Ernie4_5_MoeForSequenceClassification(ScalarHead, Ernie4_5_MoePreTrainedModel):  # noqa: N801
    """What transformers lacks."""

    _keep_in_fp32_modules_strict = [*Ernie4_5_MoePreTrainedModel._keep_in_fp32_modules_strict, "score"]  # noqa: RUF012
    # transformers greps a class's module for marks of these, finds none in this file, and would silently run slower.
    _can_set_experts_implementation_cached_value = True
    _can_set_attn_implementation_cached_value = True


# `AutoModelForSequenceClassification.register` silently ignores config classes of transformers' own.
_CLASSIFIERS: Any = AutoModelForSequenceClassification._model_mapping
_CLASSIFIERS._extra_content[Ernie4_5_MoeConfig] = Ernie4_5_MoeForSequenceClassification


# Decoders without a classifier in transformers whose scores are tested to depend on nothing but the sequence.
HEADLESS = ("apertus", "cohere", "cohere2", "ernie4_5", "glm4_moe", "granite", "granitemoe", "minimax_m2", "olmoe")


def reward_class(config_class: type[PreTrainedConfig]) -> type[PreTrainedModel]:
    """The reward model's class for an architecture: transformers' classifier with our ScalarHead, or one made like it.

    Raises:
        UserError: an encoder, a decoder with another kind of head, or one that is not in HEADLESS and has none.
    """
    base: Any = _CLASSIFIERS.get(config_class, None)
    if base is None and config_class.model_type in HEADLESS:
        causal: Any = MODEL_FOR_CAUSAL_LM_MAPPING[config_class]
        base = next(
            c for c in causal.__mro__ if c.__name__.endswith("PreTrainedModel") and c.__base__ is PreTrainedModel
        )
    elif base is None or not issubclass(base, GenericForSequenceClassification):
        raise UserError(_refusal(config_class.model_type, base))
    if issubclass(base, ScalarHead):
        return cast(type[PreTrainedModel], base)
    name = base.__name__.replace("PreTrainedModel", "ForSequenceClassification")
    members = {
        "_keep_in_fp32_modules_strict": [*(base._keep_in_fp32_modules_strict or ()), "score"],
        "__module__": base.__module__,
    }
    return type(name, (ScalarHead, base), members)


def _refusal(kind: str, classifier: Any) -> str:
    if classifier is None:
        why = f"transformers {transformers.__version__} has no sequence classifier for it"
    else:
        why = f"{classifier.__name__} has a head of its own kind"
    return (
        f"{kind}: no reward model can be made of this architecture: {why}\n"
        "expected a decoder such as Llama, Mistral, Mixtral, Qwen2, Qwen3, Gemma, Phi3, OLMo2, GLM4, DeepSeek-V3, "
        f"Ernie4_5_Moe, or one of {', '.join(HEADLESS)}"
    )


def load_reward_model(source: ModelConfig, tokenizer: PreTrainedTokenizerBase, *, seed: int) -> PreTrainedModel:
    """The causal language model in `source.path` with a fresh head drawn from `seed`, or a reward model to train on.

    Under ZeRO 3 the weights are partitioned as they are read, which all ranks do together.

    Raises:
        UserError: any weight but the head is missing, any but the language model's head is left over, or the folder
            says that it is a reward model and has no head.
    """
    check_model(source)
    config = _config(str(source.path), trust_remote_code=source.trust_remote_code)
    has_head = _is_classifier(config)
    dtype = getattr(torch, source.dtype)
    partitioned = partition.partitions()
    model, missing = _load(
        str(source.path),
        config,
        may_lack=set() if has_head else {HEAD},
        may_have=set() if has_head else {"lm_head.weight"},
        dtype=dtype,
        **({"device_map": "meta"} if partitioned else {}),
    )
    model.config.pad_token_id = tokenizer.pad_token_id
    use_kernels(model, source.kernels)
    fresh = {HEAD: _drawn_head(model, seed)} if HEAD in missing else {}
    if partitioned:
        partition.fill(model, str(source.path), dtype, fresh)
        return model
    for name, weight in fresh.items():
        model.get_parameter(name).data.copy_(weight)
    return model


def _drawn_head(model: PreTrainedModel, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.empty(model.get_parameter(HEAD).shape).normal_(std=model.config.initializer_range, generator=generator)


def load_trained_reward_model(folder: Path, **options: Any) -> PreTrainedModel:
    """A reward model as reward.train saves it, in the dtype it was saved in unless `options` say otherwise.

    Raises:
        UserError: the folder holds no reward model, or its head or another weight is missing.
    """
    check_model(ModelConfig(path=str(folder)))
    config = _config(str(folder))
    if not _is_classifier(config):
        kind = (config.architectures or ["no architecture"])[0]
        raise UserError(f"{folder}: not a reward model: config.json says {kind}, expected ...ForSequenceClassification")
    if config.num_labels != 1:
        raise UserError(f"{folder}: not a reward model: its head has {config.num_labels} outputs, expected 1")
    model, _ = _load(str(folder), config, may_lack=set(), may_have=set(), **{"dtype": "auto"} | options)
    model.train(False)
    return model


def _is_classifier(config: PreTrainedConfig) -> bool:
    return any(name.endswith("ForSequenceClassification") for name in config.architectures or ())


def _config(path: str, **options: Any) -> PreTrainedConfig:
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(path, **options)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: its config.json could not be read: {str(error).splitlines()[0]}") from None
    if not _is_classifier(config):
        config.num_labels = 1
    return config


def _load(
    path: str, config: PreTrainedConfig, *, may_lack: set[str], may_have: set[str], **options: Any
) -> tuple[PreTrainedModel, set[str]]:
    """The model and the names of the weights that its files lack; transformers only warns of faults."""
    model_class: Any = reward_class(type(config))
    if getattr(config, "attn_logit_softcapping", None):
        options = {"attn_implementation": "eager"} | options  # the others leave out the soft cap without a word
    report = logging.getLogger("transformers.modeling_utils")
    level = report.level
    report.setLevel(logging.ERROR)  # its table of missing weights would show the new head as a fault
    try:
        with unaware_of_deepspeed():
            model, info = model_class.from_pretrained(
                path,
                config=config,
                use_safetensors=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **options,
            )
    except OSError as error:
        raise UserError(f"{path}: the model could not be loaded: {str(error).splitlines()[0]}") from None
    finally:
        report.setLevel(level)
    allowed = {"missing_keys": may_lack, "unexpected_keys": may_have}
    for kind in LOADING_FAULTS:
        names = sorted(name for name in map(_key, info[kind]) if name not in allowed.get(kind, ()))
        if names:
            lost = "its head was dropped, so it cannot score: " if HEAD in names else ""
            fault = f"{kind.replace('_', ' ')}: {', '.join(names[:3])}"
            raise UserError(f"{path}: {lost}the weights do not fit a reward model: {fault}")
    model.score.float()
    freeze_correction_bias(model)
    return model, set(map(_key, info["missing_keys"]))


def _key(entry: Any) -> str:
    return str(entry[0] if isinstance(entry, tuple) else entry)
