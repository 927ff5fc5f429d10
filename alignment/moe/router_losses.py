"""The router losses of Compass-v2: load balance and z-loss, of every layer, padding left out.

With N experts, K experts a token and B tokens, for one layer:

    balance = N * sum_i (p_i / B) * (c_i / (B K))       p_i: sum over tokens of the router's probability of expert i
    z       = 1/B * sum_t logsumexp(logits_t)^2         c_i: number of (token, slot) pairs routed to expert i

Balance is 1 where the load is even and N where one expert takes all (K = 1); only p carries a gradient. It is the loss
of Switch Transformers (Fedus et al. 2021, eq. 4-6) with K slots; the z-loss is ST-MoE's (Zoph et al. 2022, eq. 5). As
there, each layer's loss is added with the full coefficient: the layers are summed.

`tokens` and `load_share_LE` may be those of a wider set than the logits (all ranks and accumulated micro-batches): then
the values are this part's contributions, and their sum over the parts is the loss of the whole.

Shapes: L layers, T tokens, E experts, K experts a token.
"""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from alignment.config import RouterConfig

Score = Literal["softmax", "sigmoid"]
# Families whose router scores each expert by itself (DeepSeek-V3, arXiv:2412.19437, eq. 15): p is the score's share.
SIGMOID_FAMILIES = ("deepseek_v3", "glm4_moe", "dots1")


class RouterLosses(NamedTuple):
    """Of each layer: [L], in float32. The entropy is a statistic without a gradient: 1 is an even choice of experts."""

    balance: Tensor
    z: Tensor
    entropy: Tensor


def router_losses(
    logits_LTE: Tensor, load_share_LE: Tensor, mask_T: Tensor, tokens: Tensor | float, score: Score = "softmax"
) -> RouterLosses:
    """The two losses of every layer, and the mean entropy of its router.

    Args:
        logits_LTE: router logits before the softmax; computed in float32 whatever their dtype.
        load_share_LE: c_i / (B K), each layer's sums to 1; no gradient is taken through it.
        mask_T: true for tokens, false for padding.
        tokens: B. Zero tokens give zero losses.
        score: how the router turns logits into scores.
    """
    # Experts before tokens: torch's softmax is ten times slower over a short last dimension.
    logits_LET = logits_LTE.float().transpose(1, 2).contiguous()
    experts = logits_LET.shape[1]
    per_token = mask_T.to(logits_LET.dtype) / torch.as_tensor(tokens, device=mask_T.device).clamp(min=1)
    probability_LET = _probabilities(logits_LET, score)
    with torch.no_grad():
        entropy_LT = torch.special.entr(probability_LET).sum(1) / math.log(experts)
    return RouterLosses(
        balance=experts * (probability_LET @ per_token * load_share_LE.detach().to(logits_LET.dtype)).sum(-1),
        z=logits_LET.logsumexp(1).square() @ per_token,
        entropy=entropy_LT @ per_token,
    )


def _probabilities(logits_LET: Tensor, score: Score) -> Tensor:
    """The router's scores as shares of 1."""
    if score == "softmax":
        return functional.softmax(logits_LET, dim=1)
    scores_LET = logits_LET.sigmoid()
    return scores_LET / scores_LET.sum(1, keepdim=True)


def expert_counts(selected_LTK: Tensor, mask_T: Tensor, experts: int) -> Tensor:
    """c_i of every layer: the slots that tokens, not padding, gave to each expert; [L, E] in float64."""
    layers = selected_LTK.shape[0]
    counts_LE = torch.zeros(layers, experts, dtype=torch.float64, device=selected_LTK.device)
    kept_LTK = mask_T.to(counts_LE.dtype)[None, :, None].expand(selected_LTK.shape)
    return counts_LE.scatter_add_(1, selected_LTK.reshape(layers, -1).long(), kept_LTK.reshape(layers, -1))


def load_share(counts_LE: Tensor) -> Tensor:
    """c_i / (B K): every token fills K slots, so the counts of a layer add up to B K. Without tokens, zeros."""
    return counts_LE / counts_LE.sum(-1, keepdim=True).clamp(min=1)


class Coefficients(NamedTuple):
    balance: float
    z: float


def coefficients(config: RouterConfig, progress: float) -> Coefficients:
    """The coefficients at a share of the training steps: they fall from their first values to `final_share` of them."""
    match config.decay:
        case "constant":
            left = 1.0
        case "linear":
            left = 1 - progress
        case "cosine":
            left = (1 + math.cos(math.pi * progress)) / 2
    share = config.final_share + (1 - config.final_share) * left
    return Coefficients(config.balance * share, config.z * share)
