"""LoRA adapters: which modules they are put on, and how they are merged into the model they were trained on.

An adapter's folder is peft's own: `PeftModel.from_pretrained(base, folder)` loads it. What expert parallelism needs
besides is in `alignment.moe.adapters`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from alignment import models
from alignment.atomic import replacing_folder
from alignment.config import LoRAConfig, ModelConfig
from alignment.errors import UserError, did_you_mean

# In a model with routed experts peft 0.21 takes these names for the experts' stacked weights, which once bore them, and
# adapts every expert. A projection of that name in a dense layer or shared expert has to be named by its weight.
TAKEN_FOR_EXPERTS = ("gate_proj", "up_proj", "down_proj")
WEIGHTS = "adapter_model.safetensors"
PROBE_TOKENS = 64
# Mean |log-probability gap| allowed between the model with its adapter and the merged one, which rounds its weights.
GATES = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


class AdapterError(RuntimeError):
    """An adapter or merged model that was written is not the one in memory."""


@dataclass(frozen=True)
class Gap:
    """How far the log-probabilities of two models are apart on the same tokens."""

    max: float
    mean: float


def peft_config(lora: LoRAConfig, model: PreTrainedModel) -> LoraConfig:
    """peft's config for the modules of `model` that `lora.targets` names.

    A target is the end of the name of linear layers (`q_proj`, `shared_experts.up_proj`), or of a stack of routed
    experts' weights (`experts.down_proj`). By default all projections but those of routed experts; never the router.

    Raises:
        UserError: a target that names nothing, or dropout or DoRA where peft adapts a weight instead of a module.
    """
    head = model.get_output_embeddings()
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head]
    stacks = [name for name, weight in model.named_parameters() if weight.dim() == 3 and ".experts." in name]
    modules, weights = [], []
    for target in lora.targets or _projections(linear):
        if not _named(target, linear):
            _check_named(target, stacks, linear)
            weights.append(target)
        elif stacks and target.rpartition(".")[2] in TAKEN_FOR_EXPERTS:
            weights.append(f"{target}.weight")
        else:
            modules.append(target)
    if weights and (lora.dropout or lora.dora):
        key, value, name = ("dora", "true", "DoRA") if lora.dora else ("dropout", lora.dropout, "dropout")
        raise UserError(
            f"lora.{key}: {value} found, expected {'false' if lora.dora else 0}: peft has no {name} for weights of a "
            "mixture of experts\n"
            f"or leave these out of lora.targets: {', '.join(name.removesuffix('.weight') for name in weights)}"
        )
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        use_dora=lora.dora,
        target_modules=modules,
        target_parameters=weights or None,
        task_type="CAUSAL_LM",
    )


def _projections(linear: Sequence[str]) -> list[str]:
    names = {name.rpartition(".")[2] for name in linear}
    return sorted(name for name in names if "_proj" in name)


def _named(target: str, names: Sequence[str]) -> bool:
    return any(f".{name}".endswith(f".{target}") for name in names)


def _check_named(target: str, stacks: Sequence[str], linear: Sequence[str]) -> None:
    if not _named(target, stacks):
        choices = {name.rpartition(".")[2] for name in linear} | {".".join(name.split(".")[-2:]) for name in stacks}
        raise UserError(f"lora.targets: no linear layer is named {target!r}{did_you_mean(target, choices)}")


def on_meta(lora: LoRAConfig, source: ModelConfig) -> PeftModel:
    """The model with its adapter, without memory for either: for counting and checking."""
    model = models.on_meta(models.config_of(source))
    return get_peft_model(model, peft_config(lora, model))


def merge_adapter(base: ModelConfig, adapter: Path, out: Path) -> Gap:
    """Write the model with the adapter merged into its weights to `out`, a transformers folder, and check it.

    The folder appears once its log-probabilities, loaded again, are those of the base with the adapter beside it.

    Raises:
        UserError: the adapter cannot be read or is not one of this base.
        AdapterError: the merged folder answers otherwise.
    """
    model = _with_adapter(base, adapter)
    ids_BT = torch.randint(model.config.vocab_size, (2, PROBE_TOKENS), generator=torch.Generator().manual_seed(0))
    expected_BTV = _logprobs(model, ids_BT)
    merged = model.merge_and_unload(safe_merge=True)
    with replacing_folder(out) as folder:
        merged.save_pretrained(folder)
        models.load_tokenizer(_with_tokenizer(base, adapter)).save_pretrained(folder)
        del model, merged  # two copies of a large model may not fit
        written = base.model_copy(update={"path": str(folder)})
        reloaded = models.load_pretrained(AutoModelForCausalLM, written, dtype="auto")
        gap_BTV = (_logprobs(reloaded, ids_BT) - expected_BTV).abs()
        gap = Gap(gap_BTV.max().item(), gap_BTV.mean().item())
        if not gap.mean <= GATES[reloaded.dtype]:
            raise AdapterError(f"{out}: log-probabilities differ from those of the adapter by {gap}")
    return gap


def merge_folders(base: str, adapter: Path, out: Path) -> Gap:
    """`merge_adapter` in the base's own dtype, into a folder that must not be there yet."""
    source = ModelConfig(path=base)
    models.check_model(source)
    if out.exists():
        raise UserError(f"{out}: exists already; name a folder to be written")
    narrow = models.config_of(source).dtype == torch.bfloat16
    return merge_adapter(source.model_copy(update={"dtype": "bfloat16" if narrow else "float32"}), adapter, out)


def _with_adapter(base: ModelConfig, adapter: Path) -> PeftModel:
    check_adapter_folder(adapter)
    model = models.load_pretrained(AutoModelForCausalLM, base, dtype=getattr(torch, base.dtype))
    return put_on(model, adapter, str(base.path)).eval()


def check_adapter_folder(adapter: Path) -> None:
    if not (adapter / WEIGHTS).is_file():
        raise UserError(f"{adapter}: not an adapter folder: it has no {WEIGHTS}")


def put_on(model: PreTrainedModel, adapter: Path, base: str, *, trainable: bool = False) -> PeftModel:
    """`model` with an adapter's weights on it, every one of them accounted for; `base` names it in messages.

    Raises:
        UserError: the adapter cannot be read or is not one of this model.
    """
    try:
        adapted = PeftModel.from_pretrained(model, str(adapter), is_trainable=trainable)
    except (*models.UNREADABLE, RuntimeError) as error:
        raise UserError(f"{adapter}: not an adapter of {base}: {str(error).splitlines()[0]}") from None
    expected = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    if other := expected.keys() ^ load_file(adapter / WEIGHTS).keys():
        raise UserError(f"{adapter}: not an adapter of {base}: missing or left over: {', '.join(sorted(other)[:3])}")
    return adapted


def _with_tokenizer(base: ModelConfig, adapter: Path) -> ModelConfig:
    """Where the tokenizer is: our trainers save it beside the adapter."""
    return ModelConfig(path=str(adapter)) if (adapter / "tokenizer_config.json").is_file() else base


@torch.no_grad()
def _logprobs(model: nn.Module, ids_BT: torch.Tensor) -> torch.Tensor:
    """Log-probabilities [B, T, V] in float32."""
    return model.eval()(input_ids=ids_BT).logits.float().log_softmax(-1)
