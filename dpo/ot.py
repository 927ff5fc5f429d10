"""Token weights from unbalanced optimal transport between a chosen and a rejected completion (the OT of OT-DPO).

Source: Optimal Transport-Based Token Weighting scheme for Enhanced Preference Optimization, arXiv 2505.18720.
Solver: POT (`ot.unbalanced`), in float64, one pair at a time, on the CPU.

Suffixes: B pairs, C chosen positions, R rejected positions, D model dim; n, m are the valid tokens of one pair.
"""

import math
import warnings
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from ot.unbalanced import sinkhorn_knopp_unbalanced
from scipy.special import logsumexp
from torch import Tensor

from alignment.errors import UserError

CostNorm = Literal["max", "none"]
Array = NDArray[np.float64]

TOLERANCE = 1e-12
KNOPP_ITERATIONS = 1_000
LOG_ITERATIONS = 10_000
# exp(-x) loses digits to denormals from here on
LARGEST_EXPONENT = 650.0


@dataclass(frozen=True)
class TransportStats:
    """What the transport of one batch did."""

    mass: Tensor  # [B] sum(G) / tau: how much was worth moving. 0 where a completion is empty
    spread: Tensor  # [B] standard deviation over mean of the weights, mean of both sides. 0 where OT does nothing
    fallbacks: int  # pairs solved in the log domain because POT warned or did not converge
    empty: int  # pairs with an empty completion


@torch.no_grad()
def ot_token_weights(
    h_chosen: Tensor,
    h_rejected: Tensor,
    mask_chosen: Tensor,
    mask_rejected: Tensor,
    *,
    reg: float = 1.0,
    reg_m: float = 0.2,
    mix: float = 1.0,
    cost_norm: CostNorm = "max",
) -> tuple[Tensor, Tensor, TransportStats]:
    """Weights of each completion token: `w_c = G1 * tau / sum(G)`, `w_r = G'1 * tau / sum(G)`, `tau = min(n, m)`.

    Args:
        h_chosen: [B, C, D] last-layer hidden states of the policy that predict the chosen tokens.
        h_rejected: [B, R, D] the same for the rejected tokens.
        mask_chosen: [B, C] true (or 1) on completion tokens; what lies outside has no influence.
        mask_rejected: [B, R].
        reg: weight of the plan's entropy; large makes the weights uniform.
        reg_m: weight of the marginals' KL; small lets tokens without a near counterpart lose their mass.
        mix: share of transport in the weights; the rest is weight 1, so 0 is plain DPO.
        cost_norm: "max" divides the distances of a pair by their largest, which makes `reg` independent of the scale
            of the hidden states (the published code does so, but over padding as well); "none" is the paper's formula.

    Returns:
        w_chosen [B, C] and w_rejected [B, R] in float32, without gradient, exactly 0 outside the masks, and the stats.
        A pair with an empty completion has transport weights 0 on both sides.

    Raises:
        UserError: hidden states that are not finite, or a transport that converges by no method.
    """
    pairs = len(h_chosen)
    mask_chosen, mask_rejected = mask_chosen.bool(), mask_rejected.bool()
    w_chosen = torch.zeros(mask_chosen.shape, dtype=torch.float64, device=h_chosen.device)
    w_rejected = torch.zeros(mask_rejected.shape, dtype=torch.float64, device=h_chosen.device)
    mass = torch.zeros(pairs, dtype=torch.float64)
    fallbacks = empty = 0
    for pair in range(pairs):
        # Trimmed to valid tokens: with zero-mass padding POT >= 0.9.5 returns another plan.
        chosen_nD, rejected_mD = h_chosen[pair, mask_chosen[pair]], h_rejected[pair, mask_rejected[pair]]
        n, m = len(chosen_nD), len(rejected_mD)
        if n == 0 or m == 0:
            empty += 1
            continue
        cost = pairwise_cost(chosen_nD, rejected_mD, cost_norm)
        if not np.isfinite(cost).all():
            raise UserError(f"pair {pair} of the batch: hidden states are not finite, so it has no transport weights")
        plan, fell_back = transport_plan(cost, reg, reg_m)
        fallbacks += fell_back
        total = plan.sum()
        tau = min(n, m)
        w_chosen[pair, mask_chosen[pair]] = torch.from_numpy(plan.sum(1) * (tau / total)).to(w_chosen.device)
        w_rejected[pair, mask_rejected[pair]] = torch.from_numpy(plan.sum(0) * (tau / total)).to(w_rejected.device)
        mass[pair] = total / tau
    w_chosen = mix * w_chosen + (1 - mix) * mask_chosen
    w_rejected = mix * w_rejected + (1 - mix) * mask_rejected
    spread = (_spread(w_chosen, mask_chosen) + _spread(w_rejected, mask_rejected)) / 2
    stats = TransportStats(mass.to(spread), spread, fallbacks, empty)
    return w_chosen.float(), w_rejected.float(), stats


def pairwise_cost(chosen_nD: Tensor, rejected_mD: Tensor, cost_norm: CostNorm) -> Array:
    """[n, m] Euclidean distances in float64, normalised over these tokens only.

    Centred first: distances by matrix product lose digits where a common offset is large, up to a distance of 2.45 from
    a vector to itself in float32.
    """
    chosen_nD, rejected_mD = chosen_nD.double(), rejected_mD.double()
    centre_D = torch.cat([chosen_nD, rejected_mD]).mean(0)
    cost = torch.cdist(chosen_nD - centre_D, rejected_mD - centre_D)
    if cost_norm == "max":
        largest = cost.max()
        cost = cost / torch.where(largest > 0, largest, 1.0)  # constant hidden states: all costs stay 0
    return cost.cpu().numpy()


def transport_plan(cost: Array, reg: float, reg_m: float) -> tuple[Array, bool]:
    """The plan [n, m] that minimises `<G, M> + reg sum(G log G - G) + reg_m (KL(G1 | 1) + KL(G'1 | 1))`.

    Two cases worked by an independent primal solver, for M = [[0, 1, 1], [1, 0, .5]] and reg_m = .2 (weights, tau = 2):
        reg = 1:  w_c = [.94384623, 1.05615377], w_r = [.72987668, .72358419, .54653913]
        reg = .1: w_c = [.94884587, 1.05115413], w_r = [.94745704, .88494256, .16760040]
    A constant cost k has G = exp(-(k + reg_m ln(n m)) / (reg + 2 reg_m)) everywhere.

    Returns the plan, and whether Sinkhorn-Knopp failed and the log domain solved it.

    Raises:
        UserError: neither converges, or all mass vanishes.
    """
    plan = _knopp_plan(cost, reg, reg_m)
    fell_back = plan is None
    if plan is None:
        plan = _log_domain_plan(cost, reg, reg_m)
    if plan is None or not plan.sum() > np.finfo(np.float64).tiny:
        raise UserError(
            f"transport of a {cost.shape[0]}x{cost.shape[1]} pair (largest cost {cost.max():.3g}) does not converge "
            f"with reg={reg:g}, reg_m={reg_m:g}: raise reg, or normalise the cost (cost_norm: max)"
        )
    return plan, fell_back


def _knopp_plan(cost: Array, reg: float, reg_m: float) -> Array | None:
    """POT's Sinkhorn-Knopp; None where it warns, does not converge or would work with denormal numbers.

    Not `sinkhorn_stabilized`: wrong once its absorption fires (POT issue 711). With unit masses POT's reg_type "kl"
    is the entropy up to a constant.
    """
    nearest = max(cost.min(0).max(), cost.min(1).max())
    if nearest / reg > LARGEST_EXPONENT:
        return None
    n, m = cost.shape
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            plan, log = sinkhorn_knopp_unbalanced(
                np.ones(n),
                np.ones(m),
                cost,
                reg,
                reg_m,
                numItermax=KNOPP_ITERATIONS,
                stopThr=TOLERANCE,
                log=True,
            )
    except Warning:
        return None
    converged = log["err"][-1] < TOLERANCE and plan.sum() > np.finfo(np.float64).tiny
    return plan if converged else None


def _log_domain_plan(cost: Array, reg: float, reg_m: float) -> Array | None:
    """The same plan with potentials f [n, 1], g [1, m] in the log domain; None where it does not converge.

    After each sweep the potentials move by the constant that is optimal for the dual (translation-invariant Sinkhorn,
    Sejourne et al., arXiv 2201.00730), without which large reg_m / reg takes thousands of sweeps.
    """
    shrink = reg_m / (reg_m + reg)
    log_kernel = -cost / reg
    f, g = np.zeros((len(cost), 1)), np.zeros((1, cost.shape[1]))
    for _ in range(LOG_ITERATIONS):
        f_before, g_before = f, g
        f = -shrink * logsumexp(log_kernel + g, axis=1, keepdims=True)
        g = -shrink * logsumexp(log_kernel + f, axis=0, keepdims=True)
        shift = (logsumexp(-f * reg / reg_m) - logsumexp(-g * reg / reg_m)) * reg_m / (2 * reg)
        f, g = f + shift, g - shift
        moved = max(np.abs(f - f_before).max(), np.abs(g - g_before).max())
        if moved < TOLERANCE * max(1.0, np.abs(f).max(), np.abs(g).max()):
            plan: Array = np.exp(log_kernel + f + g)
            return plan
        if math.isnan(moved):
            return None
    return None


def _spread(weights: Tensor, mask: Tensor) -> Tensor:
    """[B] standard deviation over mean of the weights on valid tokens; 0 where there are none."""
    count = mask.sum(1).clamp(min=1)
    mean = weights.sum(1) / count
    variance = ((weights - mean[:, None]).square() * mask).sum(1) / count
    return torch.where(mean > 0, variance.sqrt() / mean.clamp(min=torch.finfo(mean.dtype).tiny), 0.0)
