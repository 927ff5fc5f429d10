"""Providers of token weights for `dpo.loss.weighted_dpo_loss`, by the name of the loss.

Suffixes: N = 2B rows [chosen; rejected], S completion columns, D model dim.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dpo.config import TransportConfig
from dpo.ot import ot_token_weights

WeightedLoss = Literal["ot_dpo", "dpo", "dpo_uniform", "dpo_norm"]


class TokenWeights(NamedTuple):
    """Weights without gradient, 0 outside the completions, and what the provider says of them."""

    chosen: Tensor  # [B, S]
    rejected: Tensor  # [B, S]
    stats: dict[str, Tensor | float]  # [B] each, or a count


def token_weights(
    loss: WeightedLoss, mask_NS: Tensor, hidden_NSD: Tensor | None, transport: TransportConfig
) -> TokenWeights:
    """The weights of each token; with `n`, `m` the lengths of a pair and `tau = min(n, m)`:

    * `ot_dpo`: optimal transport between the hidden states (arXiv 2505.18720), see `ot_token_weights`
    * `dpo`: 1 (arXiv 2305.18290)
    * `dpo_uniform`: `tau / n` and `tau / m`, the totals of `ot_dpo` without transport
    * `dpo_norm`: `1 / n` and `1 / m`, length-normalised DPO (Tulu 3, arXiv 2411.15124; TRL's sigmoid_norm)

    Args:
        mask_NS: true on completion tokens.
        hidden_NSD: states that predict them, for `ot_dpo` with `mix` above 0 only.

    Raises:
        dpo.ot.PairError: a pair that has no transport weights.
    """
    ones_NS = mask_NS.float()
    lengths_N1 = ones_NS.sum(1, keepdim=True)
    match loss:
        case "ot_dpo" if transport.mix > 0:
            assert hidden_NSD is not None
            w_chosen, w_rejected, stats = ot_token_weights(
                *hidden_NSD.chunk(2), *mask_NS.chunk(2), **transport.model_dump()
            )
            return TokenWeights(w_chosen, w_rejected, vars(stats))
        case "ot_dpo" | "dpo":
            weights_NS = ones_NS
        case "dpo_uniform":
            tau_B1 = torch.minimum(*lengths_N1.chunk(2))
            weights_NS = ones_NS * tau_B1.repeat(2, 1) / lengths_N1.clamp(min=1)
        case "dpo_norm":
            weights_NS = ones_NS / lengths_N1.clamp(min=1)
    w_chosen, w_rejected = weights_NS.chunk(2)
    return TokenWeights(w_chosen, w_rejected, {})
