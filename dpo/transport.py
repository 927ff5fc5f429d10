"""Entropic unbalanced transport between tokens of mass 1: the plan that OT-DPO takes its weights from.

The plan minimises `<G, M> + reg sum(G log G - G) + reg_m (KL(G1 | 1) + KL(G'1 | 1))` (arXiv 2505.18720). On the CPU POT
solves it pair by pair, in float64, on trimmed pairs; what POT does not solve, and batches on other devices, go to a
log-domain solver in torch.

Suffixes: B pairs, C chosen positions, R rejected positions; n, m are the tokens of one pair.
"""

import warnings
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from ot.unbalanced import sinkhorn_knopp_unbalanced
from torch import Tensor

from alignment.errors import UserError

Array = NDArray[np.float64]

TOLERANCE = 1e-12
KNOPP_ITERATIONS = 1_000
LOG_ITERATIONS = 10_000
SWEEPS_BETWEEN_CHECKS = 8  # a check waits for the device
# exp(-x) loses digits to denormals from here on
LARGEST_EXPONENT = 650.0


class Plan(NamedTuple):
    """One pair's plan G, apart from its sum, which underflows where all tokens are far apart."""

    shares: Array  # [n, m] G / sum(G)
    mass: float  # sum(G)
    fell_back: bool  # solved in the log domain, because POT did not converge


def transport_plan(cost: Array, reg: float, reg_m: float) -> Plan:
    """The plan [n, m] of one pair with these costs, by POT where it converges and else in the log domain.

    Two cases worked by an independent primal solver, for M = [[0, 1, 1], [1, 0, .5]] and reg_m = .2 (weights, tau = 2):
        reg = 1:  w_c = [.94384623, 1.05615377], w_r = [.72987668, .72358419, .54653913]
        reg = .1: w_c = [.94884587, 1.05115413], w_r = [.94745704, .88494256, .16760040]
    A constant cost k has G = exp(-(k + reg_m ln(n m)) / (reg + 2 reg_m)) everywhere.

    Raises:
        UserError: neither converges.
    """
    plan = _knopp_plan(cost, reg, reg_m)
    if plan is not None:
        mass = float(plan.sum())
        return Plan(plan / mass, mass, fell_back=False)
    log_plan_1nm, converged = log_domain_plans(torch.from_numpy(cost)[None], reg, reg_m)
    if not converged.item():
        raise UserError(not_converged(cost.shape, float(cost.max()), reg, reg_m))
    log_plan = log_plan_1nm[0]
    log_mass = log_plan.logsumexp((0, 1))
    shares: Array = (log_plan - log_mass).exp().numpy()
    return Plan(shares, float(log_mass.exp()), fell_back=True)


def not_converged(shape: tuple[int, ...], largest: float, reg: float, reg_m: float) -> str:
    return (
        f"transport of {shape[0]} x {shape[1]} tokens (largest cost {largest:.3g}) does not converge with reg={reg:g}, "
        f"reg_m={reg_m:g}: raise reg, or normalise the cost (cost_norm: max)"
    )


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
    converged = log["err"][-1] < TOLERANCE and plan.sum() > 0
    return plan if converged else None


def log_domain_plans(cost_BCR: Tensor, reg: float, reg_m: float) -> tuple[Tensor, Tensor]:
    """The logarithms of a batch of plans, by Sinkhorn on potentials f [B, C, 1] and g [B, 1, R].

    After each sweep the potentials move by the constant that is optimal for the dual (translation-invariant Sinkhorn,
    Sejourne et al., arXiv 2201.00730), without which large reg_m / reg takes thousands of sweeps. Each pair stops by
    itself, so that its result does not depend on the others.

    Args:
        cost_BCR: float64, infinite where one of the two positions holds no token; each pair has a token on either side.

    Returns:
        log G [B, C, R], -inf where there is no token, and which pairs converged [B].
    """
    log_kernel_BCR = -cost_BCR / reg
    out_BC1, out_B1R = cost_BCR.isinf().all(2, keepdim=True), cost_BCR.isinf().all(1, keepdim=True)
    log_plan_BCR = torch.full_like(cost_BCR, -torch.inf)
    converged_B = torch.zeros(len(cost_BCR), dtype=torch.bool, device=cost_BCR.device)
    left = torch.arange(len(cost_BCR), device=cost_BCR.device)  # pairs still moving: the tensors below hold these
    kernel, out_c, out_r = log_kernel_BCR, out_BC1, out_B1R
    f, g = torch.zeros_like(kernel[:, :, :1]), torch.zeros_like(kernel[:, :1])
    for sweep in range(1, LOG_ITERATIONS + 1):
        f_before, g_before = f, g
        f, g = _sweep(kernel, g, out_c, out_r, reg, reg_m)
        if sweep % SWEEPS_BETWEEN_CHECKS:
            continue
        moved = torch.maximum((f - f_before).abs().amax((1, 2)), (g - g_before).abs().amax((1, 2)))
        size = torch.maximum(f.abs().amax((1, 2)), g.abs().amax((1, 2))).clamp(min=1)
        still = moved < TOLERANCE * size
        if not still.any():
            continue
        done = left[still]
        log_plan_BCR[done] = (kernel + f + g)[still]
        converged_B[done] = True
        if len(done) == len(left):
            break
        left, kernel, out_c, out_r, f, g = (part[~still] for part in (left, kernel, out_c, out_r, f, g))
    return log_plan_BCR, converged_B


def _sweep(kernel: Tensor, g: Tensor, out_c: Tensor, out_r: Tensor, reg: float, reg_m: float) -> tuple[Tensor, Tensor]:
    """Both potentials once; 0 where there is no token."""
    shrink = reg_m / (reg_m + reg)
    f = (-shrink * (kernel + g).logsumexp(2, keepdim=True)).masked_fill(out_c, 0)
    g = (-shrink * (kernel + f).logsumexp(1, keepdim=True)).masked_fill(out_r, 0)
    mass_c = (-f * reg / reg_m).masked_fill(out_c, -torch.inf).logsumexp(1, keepdim=True)
    mass_r = (-g * reg / reg_m).masked_fill(out_r, -torch.inf).logsumexp(2, keepdim=True)
    shift = (mass_c - mass_r) * reg_m / (2 * reg)
    return (f + shift).masked_fill(out_c, 0), (g - shift).masked_fill(out_r, 0)
