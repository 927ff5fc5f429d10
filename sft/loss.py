"""The loss of packed training: the sum of -log p over the labelled tokens, without the logits of a whole pack.

Only labelled positions pass through the output head. Logits exist for a chunk of tokens at a time, and their gradients
are made there and then (`torch.nn.functional.linear_cross_entropy`), so that the head costs three matrix products and
no second pass. Shapes: B rows, T tokens, N labelled tokens, D model dim, V vocabulary.
"""

import functools
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear_cross_entropy
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from trl.trainer.utils import maybe_gather_lm_head_ctx

IGNORED = -100  # the label of a token that carries no loss
CHUNK = {"cpu": 256}  # tokens whose logits exist at a time; elsewhere torch's own choice
# What a config may hold that changes logits after the head; TRL's fused head knows them, and takes such models.
TRANSFORMS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")


def summed_nll(hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor, bias_V: Tensor | None = None) -> Tensor:
    """-sum_n log softmax(W h_n + b)[target_n], a scalar; zero, with zero gradients, where N is 0."""
    chunk = CHUNK.get(hidden_ND.device.type)
    options = nn.LinearCrossEntropyOptions(batch_chunk_size=chunk, chunking_method="auto" if chunk is None else None)
    return linear_cross_entropy(
        hidden_ND,
        weight_VD,
        target_N,
        linear_bias=bias_V,
        reduction="sum",
        options=options if len(target_N) else None,
    )


def takes_summed_loss(model: PreTrainedModel) -> bool:
    """Whether `summed_nll` is right for this model: the logits are the head's own product, and the sum is not rounded.

    In bfloat16 torch's operator returns the sum in bfloat16; TRL's kernel keeps float32.
    """
    config = model.config.get_text_config()
    return model.dtype == torch.float32 and not any(getattr(config, name, None) for name in TRANSFORMS)


def add_summed_loss(model: PreTrainedModel) -> None:
    """Let `model(..., labels=labels, summed_loss=True)` return the summed loss alone; else it is called as before."""
    forward = model.forward

    @functools.wraps(type(model).forward)  # the bound one's signature would lose its first argument
    def with_summed_loss(
        self: Any, *args: Any, summed_loss: bool = False, labels: Tensor | None = None, **kwargs: Any
    ) -> Any:
        if not summed_loss:
            return forward(*args, **(kwargs if labels is None else kwargs | {"labels": labels}))
        assert labels is not None
        hidden_BTD = self.base_model(*args, **kwargs, use_cache=False).last_hidden_state
        labelled_BT = labels[:, 1:] != IGNORED
        head = self.get_output_embeddings()
        with maybe_gather_lm_head_ctx(head.weight, head.bias):  # ZeRO-3 gathers for modules that are called
            hidden_ND = hidden_BTD[:, :-1][labelled_BT].to(head.weight.dtype)
            loss = summed_nll(hidden_ND, head.weight, labels[:, 1:][labelled_BT], head.bias)
        return CausalLMOutputWithPast(loss=cast(Any, loss))

    vars(model)["forward"] = MethodType(with_summed_loss, model)
