"""DPO with a weight on every token, the likelihood term beside it, and AOT over sorted pairs. Pure functions.

Sources: DPO, arXiv 2305.18290, eq. 7; token weights, arXiv 2505.18720; likelihood term, Iterative Reasoning
Preference Optimization, arXiv 2404.19733 (RPO); AOT, Distributional Preference Alignment of LLMs via Optimal
Transport, arXiv 2406.05882, as TRL 1.16 has it (logistic loss, hard sorting).

Suffixes: B pairs, C chosen positions, R rejected positions. Log-probabilities are finite everywhere, padding included.
"""

from typing import NamedTuple

import torch
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


def aot_losses(chosen_B: Tensor, rejected_B: Tensor, beta: float) -> Tensor:
    """[B] `-log sigmoid(beta * (chosen_(i) - rejected_(i)))`, where `x_(i)` is the i-th smallest of x (AOT).

    The values are compared by rank, not by pair, so the loss depends on which pairs stand together. What is sorted:

        unpaired: the log-ratios log pi - log ref of chosen, and those of rejected.
        paired: the policy's log pi(chosen) - log pi(rejected), and the reference's.

    Args:
        chosen_B, rejected_B: the two samples, one value a pair.
        beta: strength of the pull to the reference.

    Returns:
        The losses by rank, not by pair; their mean is the loss of the batch.
    """
    return -F.logsigmoid(beta * (chosen_B.sort().values - rejected_B.sort().values))


class Slopes(NamedTuple):
    """The loss of a whole batch, and its gradient times the number of pairs to each pair's log-probabilities."""

    loss: Tensor  # a number: the mean over pairs
    chosen: Tensor  # [B] B dloss / dlog pi(chosen)
    rejected: Tensor  # [B] B dloss / dlog pi(rejected)


def aot_slopes(policy_2B: Tensor, reference_2B: Tensor, beta: float, *, paired: bool) -> Slopes:
    """`aot_losses` of all pairs and what backpropagation needs of it, pair by pair.

    `loss(theta)` and `mean(slope_c log pi_c + slope_r log pi_r)` have the same gradient in theta, and the second is a
    sum over pairs, which can be cut into micro-batches and ranks (as in GradCache, Gao et al. 2021, arXiv 2101.06983).

    Args:
        policy_2B: log-probabilities of the completions, [chosen, rejected], one sum over tokens each.
        reference_2B: the reference's.
        paired: whether the two differences within a pair are compared (`aot`), or the two log-ratios (`aot_unpaired`).
    """
    with torch.enable_grad():
        policy_2B = policy_2B.detach().requires_grad_()
        chosen_B, rejected_B = policy_2B.chunk(2)
        reference_c, reference_r = reference_2B.detach().chunk(2)
        if paired:
            losses = aot_losses(chosen_B - rejected_B, reference_c - reference_r, beta)
        else:
            losses = aot_losses(chosen_B - reference_c, rejected_B - reference_r, beta)
        (slopes_2B,) = torch.autograd.grad(losses.sum(), policy_2B)
    return Slopes(losses.detach().mean(), *slopes_2B.chunk(2))
