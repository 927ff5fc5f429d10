"""DPO with a weight on every token, and the likelihood term beside it. Pure functions of per-token log-probabilities.

Sources: DPO, arXiv 2305.18290, eq. 7; token weights, arXiv 2505.18720; likelihood term, Iterative Reasoning
Preference Optimization, arXiv 2404.19733 (RPO).

Suffixes: B pairs, C chosen positions, R rejected positions. Log-probabilities are finite everywhere, padding included.
"""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor


class PairLosses(NamedTuple):
    """One value a pair, [B] each. The rewards are detached."""

    losses: Tensor
    rewards_chosen: Tensor
    rewards_rejected: Tensor


def weighted_dpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    w_chosen: Tensor,
    w_rejected: Tensor,
    beta: float,
) -> PairLosses:
    """`-log sigmoid(beta * (sum w_c q_c - sum w_r q_r))` with `q = log pi - log ref`, token by token.

    Any token weights will do: 1 on the completion is DPO, 1/length on it is length-normalised DPO, `ot_token_weights`
    is OT-DPO. The gradient is `dloss/dlog pi_c,t = -beta sigmoid(-beta D) w_t`, and the opposite sign for rejected.

    Args:
        policy_chosen, reference_chosen, w_chosen: [B, C]; the weights are 0 outside the completion.
        policy_rejected, reference_rejected, w_rejected: [B, R].
        beta: strength of the pull to the reference.

    Returns:
        The loss and the implicit rewards `beta * sum w q` of each pair.
    """
    rewards_chosen = beta * (w_chosen * (policy_chosen - reference_chosen)).sum(1)
    rewards_rejected = beta * (w_rejected * (policy_rejected - reference_rejected)).sum(1)
    losses = -F.logsigmoid(rewards_chosen - rewards_rejected)
    return PairLosses(losses, rewards_chosen.detach(), rewards_rejected.detach())


def chosen_nll(policy_chosen: Tensor, mask_chosen: Tensor) -> Tensor:
    """[B] negative log-likelihood of the chosen completion per token; 0 where it is empty.

    Args:
        policy_chosen: [B, C] log-probabilities.
        mask_chosen: [B, C] true (or 1) on completion tokens.
    """
    return -(policy_chosen * mask_chosen).sum(1) / mask_chosen.sum(1).clamp(min=1)
