"""Transport plans against an independent solver's numbers, closed forms, a second solver of POT, and each other."""

import math
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from ot.unbalanced import mm_unbalanced, sinkhorn_unbalanced

from alignment.errors import UserError
from dpo import transport
from dpo.transport import log_domain_plans, transport_plan

Solve = Callable[[np.ndarray, float, float], np.ndarray]

COST = np.array([[0.0, 1.0, 1.0], [1.0, 0.0, 0.5]])
REGIMES = [(1.0, 0.2), (0.1, 0.2), (0.02, 0.2), (0.05, 2.0)]


def by_knopp(cost: np.ndarray, reg: float, reg_m: float) -> np.ndarray:
    plan = transport_plan(cost, reg, reg_m)
    assert not plan.fell_back
    return plan.shares * plan.mass


def by_log_domain(cost: np.ndarray, reg: float, reg_m: float) -> np.ndarray:
    log_plans, converged = log_domain_plans(torch.from_numpy(cost)[None], reg, reg_m)
    assert converged.all()
    return log_plans[0].exp().numpy()


SOLVERS = pytest.mark.parametrize("solve", [by_knopp, by_log_domain])


def weights_of(plan: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scale = min(plan.shape) / plan.sum()
    return plan.sum(1) * scale, plan.sum(0) * scale


@SOLVERS
@pytest.mark.parametrize(
    ("reg", "w_chosen", "w_rejected"),
    [
        (1.0, [0.94384623, 1.05615377], [0.72987668, 0.72358419, 0.54653913]),
        (0.1, [0.94884587, 1.05115413], [0.94745704, 0.88494256, 0.16760040]),
    ],
)
def test_oracle_of_an_independent_primal_solver(
    solve: Solve, reg: float, w_chosen: list[float], w_rejected: list[float]
) -> None:
    for ours, oracle in zip(weights_of(solve(COST, reg, 0.2)), (w_chosen, w_rejected), strict=True):
        np.testing.assert_allclose(ours, oracle, rtol=0, atol=1e-8)


@SOLVERS
def test_constant_cost_has_a_closed_form(solve: Solve) -> None:
    """exp(-(.7 + .2 ln 15) / (.1 + .4)) = exp(-(.7 + .541610) / .5) = exp(-2.483220) = .083474."""
    plan = solve(np.full((3, 5), 0.7), 0.1, 0.2)
    np.testing.assert_allclose(plan, 0.08347399936709282, rtol=0, atol=1e-10)


@SOLVERS
def test_one_token_against_one_has_a_closed_form(solve: Solve) -> None:
    """exp(-.9 / (.3 + 2 * .2)) = exp(-1.285714) = .276453."""
    assert solve(np.array([[0.9]]), 0.3, 0.2).item() == pytest.approx(math.exp(-0.9 / 0.7), abs=1e-10)


@SOLVERS
def test_free_marginals_leave_the_kernel(solve: Solve) -> None:
    np.testing.assert_allclose(solve(COST, 0.5, 1e-12), np.exp(-COST / 0.5), rtol=0, atol=1e-10)


@SOLVERS
def test_much_entropy_leaves_uniform_weights(solve: Solve) -> None:
    w_chosen, w_rejected = weights_of(solve(COST, 1e8, 0.2))
    np.testing.assert_allclose(w_chosen, 2 / 2, atol=1e-7)
    np.testing.assert_allclose(w_rejected, 2 / 3, atol=1e-7)


@SOLVERS
@pytest.mark.parametrize(("reg", "reg_m"), [(1.0, 0.2), (0.1, 0.2), (0.05, 1.0)])
def test_second_oracle_majorisation_minimisation(solve: Solve, reg: float, reg_m: float) -> None:
    cost = np.random.default_rng(3).random((5, 8))
    n, m = cost.shape
    oracle = mm_unbalanced(
        np.ones(n), np.ones(m), cost, reg_m, c=np.ones((n, m)), reg=reg, numItermax=100_000, stopThr=1e-15
    )
    np.testing.assert_allclose(solve(cost, reg, reg_m), oracle, rtol=0, atol=1e-9)


def test_the_batch_in_the_log_domain_agrees_with_pot_pair_by_pair() -> None:
    """Pairs of unequal lengths in one batch; infinite costs where there is no token."""
    rng = np.random.default_rng(4)
    costs = [rng.random(shape) for shape in [(7, 4), (1, 9), (30, 2), (1, 1), (12, 31)]]
    batch = np.full((len(costs), 30, 31), np.inf)
    for pair, cost in enumerate(costs):
        batch[pair, : cost.shape[0], -cost.shape[1] :] = cost  # tokens need not come first
    for reg, reg_m in REGIMES:
        log_plans, converged = log_domain_plans(torch.from_numpy(batch), reg, reg_m)
        assert converged.all()
        for log_plan, cost in zip(log_plans.numpy(), costs, strict=True):
            n, m = cost.shape
            np.testing.assert_allclose(np.exp(log_plan[:n, -m:]), by_knopp(cost, reg, reg_m), rtol=0, atol=1e-10)
            assert np.isneginf(log_plan).sum() == log_plan.size - n * m


def test_a_pair_in_the_log_domain_does_not_depend_on_its_batch() -> None:
    """Bit by bit: an easy pair stops when it has converged, whatever a hard one beside it needs."""
    easy = torch.full((3, 4), 0.5, dtype=torch.float64)
    hard = torch.from_numpy(np.random.default_rng(5).random((3, 4)))
    alone, _ = log_domain_plans(easy[None], 0.01, 0.5)
    together, _ = log_domain_plans(torch.stack([hard, easy]), 0.01, 0.5)
    assert torch.equal(alone[0], together[1])


@pytest.mark.parametrize(("reg", "reg_m"), [(0.01, 10.0), (0.0005, 0.2)])
def test_fallback_solves_what_sinkhorn_does_not(reg: float, reg_m: float) -> None:
    """The optimum satisfies G = exp(-M/reg) * (G1)^(-reg_m/reg) * (G'1)^(-reg_m/reg) for unit masses."""
    shares, mass, fell_back = transport_plan(COST, reg, reg_m)
    assert fell_back
    plan = shares * mass
    log_rows, log_columns = np.log(plan.sum(1, keepdims=True)), np.log(plan.sum(0, keepdims=True))
    stationary = np.exp((-COST - reg_m * (log_rows + log_columns)) / reg)
    np.testing.assert_allclose(plan, stationary, rtol=1e-6, atol=1e-12)


def test_shares_outlive_a_mass_that_underflows() -> None:
    """A constant cost of 10,000 at reg .1, reg_m .2 leaves exp(-20,000) of the mass, evenly."""
    plan = transport_plan(np.full((2, 3), 1e4), 0.1, 0.2)
    assert plan.fell_back
    assert plan.mass == 0
    np.testing.assert_allclose(plan.shares, 1 / 6, rtol=0, atol=1e-10)


def test_what_no_solver_solves_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "LOG_ITERATIONS", 8)
    with pytest.raises(UserError, match=r"transport of 2 x 3 tokens \(largest cost 1\) .* raise reg, or normalise"):
        transport_plan(COST, 0.0005, 0.2)


def test_zero_mass_padding_of_current_pot_is_another_plan() -> None:
    """What the published code does: under POT >= 0.9.5, whose default became reg_type="kl", the plan is another; with
    reg_type="entropy", the default of POT 0.9.4, it is ours."""
    padded, masses = np.pad(COST, ((0, 0), (0, 2))), np.array([1.0, 1, 1, 0, 0])
    ours = transport_plan(COST, 1.0, 0.2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrong = sinkhorn_unbalanced(np.ones(2), masses, padded, 1.0, 0.2, stopThr=1e-14)
        right = sinkhorn_unbalanced(np.ones(2), masses, padded, 1.0, 0.2, stopThr=1e-14, reg_type="entropy")
    assert np.abs(wrong[:, :3] - ours.shares * ours.mass).max() > 0.1
    assert np.abs(np.array(weights_of(wrong[:, :3])[1]) - weights_of(ours.shares)[1]).max() > 0.01
    np.testing.assert_allclose(right[:, :3], ours.shares * ours.mass, rtol=0, atol=1e-10)
