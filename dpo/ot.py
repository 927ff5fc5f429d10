"""Token weights from unbalanced optimal transport between a chosen and a rejected completion (the OT of OT-DPO).

Source: Optimal Transport-Based Token Weighting scheme for Enhanced Preference Optimization, arXiv 2505.18720.

Suffixes: B pairs, C chosen positions, R rejected positions, D model dim; n, m are the valid tokens of one pair.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from alignment.errors import UserError
from dpo.transport import log_domain_plans, not_converged, transport_plan

Metric = Literal["euclidean", "sqeuclidean", "cosine"]
CostNorm = Literal["max", "none", "reference"]
Total = Literal["min", "own", "none"]

BATCH_CELLS = 2**24  # token pairs that are in memory at once on a GPU, of 8 bytes each
ROUNDING = (
    1e-12  # of costs between equal states, in relation to the states: to be 0, not to be divided by their largest
)
LITTLE = 0.05  # relative change of any weight up to which transport counts as having changed nothing


class PairError(UserError):
    """A pair that has no transport weights."""

    def __init__(self, pair: int, reason: str):
        super().__init__(f"pair {pair} of the batch: {reason}")
        self.pair = pair
        self.reason = reason


@dataclass(frozen=True)
class TransportStats:
    """What the transport of one batch did."""

    mass: Tensor  # [B] sum(G) / tau: how much was worth moving. 0 where a completion is empty
    spread: Tensor  # [B] standard deviation over mean of the weights, mean of both sides. 0 where OT does nothing
    unchanged: Tensor  # [B] 1 where no weight differs from its side's mean by more than 5%. 0 where one is empty
    fallbacks: int  # pairs that POT did not solve in float64, and the log domain did
    empty: int  # pairs with an empty completion


class _Shares(NamedTuple):
    """Marginals of the plans in float64, 0 outside the masks and in pairs with an empty completion."""

    chosen: Tensor  # [B, C] G1 / sum(G)
    rejected: Tensor  # [B, R] G'1 / sum(G)
    mass: Tensor  # [B] sum(G)


@torch.no_grad()
def ot_token_weights(
    h_chosen: Tensor,
    h_rejected: Tensor,
    mask_chosen: Tensor,
    mask_rejected: Tensor,
    *,
    reg: float = 1.0,
    reg_m: float = 0.2,
    metric: Metric = "euclidean",
    cost_norm: CostNorm = "max",
    total: Total = "min",
    mix: float = 1.0,
) -> tuple[Tensor, Tensor, TransportStats]:
    """Weights of each completion token: `w_c = G1 * tau / sum(G)`, `w_r = G'1 * tau / sum(G)`, `tau = min(n, m)`.

    On the CPU each pair is trimmed and solved by POT; on a GPU the batch is solved at once, in the log domain.

    Args:
        h_chosen: [B, C, D] last-layer hidden states of the policy that predict the chosen tokens.
        h_rejected: [B, R, D] the same for the rejected tokens.
        mask_chosen: [B, C] true (or 1) on completion tokens; what lies outside has no influence.
        mask_rejected: [B, R].
        reg: weight of the plan's entropy; large makes the weights uniform.
        reg_m: weight of the marginals' KL; small lets tokens without a near counterpart lose their mass.
        metric: of the cost between two states; "euclidean" is the paper's.
        cost_norm: "max" divides the costs of a pair by their largest, which makes `reg` independent of the scale of the
            hidden states; "none" is the paper's formula; "reference" is what the published code does (see
            `pairwise_cost`).
        total: what each side's weights add up to. "min" is tau on both, the paper's; "own" is n and m, which are DPO's
            totals, so that a uniform plan is DPO; "none" is sum(G), the plan as it is (the paper's ablation).
        mix: share of transport in the weights; the rest is weight 1, so 0 is plain DPO.

    Returns:
        w_chosen [B, C] and w_rejected [B, R] without gradient, exactly 0 outside the masks, and the stats. They are
        float64 for float64 states and float32 for others. A pair with an empty completion has transport weights 0 on
        both sides.

    Raises:
        PairError: hidden states that are not finite, or a transport that converges by no method.
    """
    mask_chosen, mask_rejected = mask_chosen.bool(), mask_rejected.bool()
    n, m = mask_chosen.sum(1), mask_rejected.sum(1)
    empty = (n == 0) | (m == 0)
    solve = _one_by_one if h_chosen.device.type == "cpu" else batched_shares
    shares, fallbacks = solve(h_chosen, h_rejected, mask_chosen, mask_rejected, reg, reg_m, metric, cost_norm)
    tau = torch.minimum(n, m)
    match total:
        case "min":
            totals = tau, tau
        case "own":
            totals = n, m
        case "none":
            totals = shares.mass, shares.mass
    w_chosen = mix * shares.chosen * totals[0][:, None] + (1 - mix) * mask_chosen
    w_rejected = mix * shares.rejected * totals[1][:, None] + (1 - mix) * mask_rejected
    change_c, change_r = _relative_change(w_chosen, mask_chosen), _relative_change(w_rejected, mask_rejected)
    unchanged = torch.maximum(change_c.abs().amax(1), change_r.abs().amax(1)) < LITTLE
    stats = TransportStats(
        mass=shares.mass / tau.clamp(min=1),
        spread=(_root_mean_square(change_c, n) + _root_mean_square(change_r, m)) / 2,
        unchanged=(unchanged & ~empty).to(shares.mass),
        fallbacks=fallbacks,
        empty=int(empty.sum()),
    )
    dtype = torch.float64 if h_chosen.dtype == torch.float64 else torch.float32
    return w_chosen.to(dtype), w_rejected.to(dtype), stats


def _one_by_one(
    h_BCD: Tensor,
    h_BRD: Tensor,
    mask_BC: Tensor,
    mask_BR: Tensor,
    reg: float,
    reg_m: float,
    metric: Metric,
    cost_norm: CostNorm,
) -> tuple[_Shares, int]:
    shares = _no_shares(mask_BC, mask_BR)
    fallbacks = 0
    for pair in range(len(h_BCD)):
        # Trimmed to valid tokens: with zero-mass padding POT >= 0.9.5 returns another plan.
        chosen_nD, rejected_mD = h_BCD[pair, mask_BC[pair]], h_BRD[pair, mask_BR[pair]]
        if len(chosen_nD) == 0 or len(rejected_mD) == 0:
            continue
        cost = pairwise_cost(chosen_nD, rejected_mD, metric, cost_norm)
        if not cost.isfinite().all():
            raise PairError(pair, "its hidden states are not finite, so it has no transport weights")
        try:
            plan = transport_plan(cost.numpy(), reg, reg_m)
        except UserError as error:
            raise PairError(pair, str(error)) from None
        shares.chosen[pair, mask_BC[pair]] = torch.from_numpy(plan.shares.sum(1))
        shares.rejected[pair, mask_BR[pair]] = torch.from_numpy(plan.shares.sum(0))
        shares.mass[pair] = plan.mass
        fallbacks += plan.fell_back
    return shares, fallbacks


def batched_shares(
    h_BCD: Tensor,
    h_BRD: Tensor,
    mask_BC: Tensor,
    mask_BR: Tensor,
    reg: float,
    reg_m: float,
    metric: Metric,
    cost_norm: CostNorm,
) -> tuple[_Shares, int]:
    """The shares of a batch by one solver on its own device, with no loop over pairs; for GPUs. Falls back on nothing.

    Raises:
        PairError: as `ot_token_weights`.
    """
    shares = _no_shares(mask_BC, mask_BR)
    pairs = (mask_BC.any(1) & mask_BR.any(1)).nonzero().flatten()
    for some in pairs.split(max(1, BATCH_CELLS // max(1, mask_BC.shape[1] * mask_BR.shape[1]))):
        cells = mask_BC[some, :, None] & mask_BR[some, None, :]
        # A token outside the mask may hold anything, NaN included.
        chosen = h_BCD[some].masked_fill(~mask_BC[some, :, None], 0)
        rejected = h_BRD[some].masked_fill(~mask_BR[some, :, None], 0)
        cost = pairwise_cost(chosen, rejected, metric, cost_norm, cells)
        wrong = ~cost.isfinite().logical_or(~cells).all(2).all(1)
        if wrong.any():
            pair = int(some[wrong][0])
            raise PairError(pair, "its hidden states are not finite, so it has no transport weights")
        log_plan, converged = log_domain_plans(cost.masked_fill(~cells, torch.inf), reg, reg_m)
        if not converged.all():
            [first, *_] = (~converged).nonzero().flatten().tolist()
            shape = int(mask_BC[some[first]].sum()), int(mask_BR[some[first]].sum())
            raise PairError(int(some[first]), not_converged(shape, float(cost[first].max()), reg, reg_m))
        log_mass = log_plan.logsumexp((1, 2), keepdim=True)
        plan_shares = (log_plan - log_mass).exp()
        shares.chosen[some], shares.rejected[some] = plan_shares.sum(2), plan_shares.sum(1)
        shares.mass[some] = log_mass.exp().flatten()
    return shares, 0


def pairwise_cost(
    chosen: Tensor, rejected: Tensor, metric: Metric, cost_norm: CostNorm, cells: Tensor | None = None
) -> Tensor:
    """[..., C, R] costs in float64 between states [..., C, D] and [..., R, D], normalised over the valid ones.

    Centred first: distances by matrix product lose digits where a common offset is large, up to a distance of 2.45 from
    a vector to itself in float32. Cosine distances are of the states as they are: a shift changes them.

    `cost_norm="reference"` is the published code's, which pads with zero rows, always on both sides, because the prompt
    is among them: it adds 1e-6 and divides by the largest entry, where that is above 1. So the scale is the largest of
    the distances and of the states' norms.

    Args:
        cells: [..., C, R] true where both hold a token; None where all do. States outside must be 0.
    """
    chosen, rejected = chosen.double(), rejected.double()
    cost = _cosine(chosen, rejected) if metric == "cosine" else _square_distances(chosen, rejected, cells)
    if metric == "euclidean":
        cost = cost.sqrt_()
    largest = (cost if cells is None else cost.where(cells, 0)).amax((-2, -1), keepdim=True)
    match cost_norm:
        case "none":
            return cost
        case "max":
            return cost / torch.where(largest > 0, largest, 1.0)  # constant hidden states: all costs stay 0
        case "reference":
            norms = [states.norm(dim=-1).amax(-1)[..., None, None] for states in (chosen, rejected)]
            scale = torch.maximum(largest, torch.maximum(*norms)) + 1e-6
            return (cost + 1e-6) / scale.clamp(min=1)


def _square_distances(chosen: Tensor, rejected: Tensor, cells: Tensor | None) -> Tensor:
    if cells is None:
        centre = torch.cat([chosen, rejected], -2).mean(-2, keepdim=True)
    else:
        tokens = cells.any(-1).sum(-1, keepdim=True) + cells.any(-2).sum(-1, keepdim=True)
        centre = ((chosen.sum(-2) + rejected.sum(-2)) / tokens)[..., None, :]
    chosen, rejected = chosen - centre, rejected - centre
    squares_c, squares_r = chosen.square().sum(-1)[..., None], rejected.square().sum(-1)[..., None, :]
    squares = (chosen @ rejected.mT).mul_(-2).add_(squares_c).add_(squares_r)
    return squares.masked_fill_(squares < (ROUNDING * centre.abs().amax((-2, -1), keepdim=True)) ** 2, 0)


def _cosine(chosen: Tensor, rejected: Tensor) -> Tensor:
    normal = torch.nn.functional.normalize
    distances = 1 - normal(chosen, dim=-1) @ normal(rejected, dim=-1).mT
    return distances.masked_fill_(distances < ROUNDING, 0)


def _no_shares(mask_BC: Tensor, mask_BR: Tensor) -> _Shares:
    chosen, rejected = (torch.zeros_like(mask, dtype=torch.float64) for mask in (mask_BC, mask_BR))
    return _Shares(chosen, rejected, torch.zeros_like(chosen[:, 0]))


def _relative_change(weights: Tensor, mask: Tensor) -> Tensor:
    """[B, T] weights over their mean, less 1; 0 outside the mask, and where the mean is 0."""
    mean = weights.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    return torch.where(mask & (mean > 0), weights / mean.clamp(min=torch.finfo(mean.dtype).tiny) - 1, 0.0)


def _root_mean_square(change: Tensor, count: Tensor) -> Tensor:
    return (change.square().sum(1) / count.clamp(min=1)).sqrt()
