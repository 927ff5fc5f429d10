"""Transport weights against an independent solver's numbers, a second solver of POT, and their invariants."""

import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from ot.unbalanced import mm_unbalanced, sinkhorn_unbalanced
from torch import Tensor

from alignment.errors import UserError
from dpo.ot import _log_domain_plan, ot_token_weights, pairwise_cost, transport_plan

COST = np.array([[0.0, 1.0, 1.0], [1.0, 0.0, 0.5]])


def weights_of(plan: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scale = min(plan.shape) / plan.sum()
    return plan.sum(1) * scale, plan.sum(0) * scale


@pytest.mark.parametrize(
    ("reg", "w_chosen", "w_rejected"),
    [
        (1.0, [0.94384623, 1.05615377], [0.72987668, 0.72358419, 0.54653913]),
        (0.1, [0.94884587, 1.05115413], [0.94745704, 0.88494256, 0.16760040]),
    ],
)
def test_oracle_of_an_independent_primal_solver(reg: float, w_chosen: list[float], w_rejected: list[float]) -> None:
    plan, fell_back = transport_plan(COST, reg, 0.2)
    assert not fell_back
    for ours, oracle in zip(weights_of(plan), (w_chosen, w_rejected), strict=True):
        np.testing.assert_allclose(ours, oracle, rtol=0, atol=1e-8)


def test_constant_cost_has_a_closed_form() -> None:
    """exp(-(.7 + .2 ln 15) / (.1 + .4)) = exp(-(.7 + .541610) / .5) = exp(-2.483220) = .083474."""
    plan, _ = transport_plan(np.full((3, 5), 0.7), 0.1, 0.2)
    np.testing.assert_allclose(plan, 0.08347399936709282, rtol=0, atol=1e-10)


def test_one_token_against_one_has_a_closed_form() -> None:
    """exp(-.9 / (.3 + 2 * .2)) = exp(-1.285714) = .276453."""
    plan, _ = transport_plan(np.array([[0.9]]), 0.3, 0.2)
    assert plan.item() == pytest.approx(math.exp(-0.9 / 0.7), abs=1e-10)


def test_free_marginals_leave_the_kernel_and_much_entropy_leaves_uniform_weights() -> None:
    plan, _ = transport_plan(COST, 0.5, 1e-12)
    np.testing.assert_allclose(plan, np.exp(-COST / 0.5), rtol=0, atol=1e-10)
    w_chosen, w_rejected = weights_of(transport_plan(COST, 1e8, 0.2)[0])
    np.testing.assert_allclose(w_chosen, 2 / 2, atol=1e-7)
    np.testing.assert_allclose(w_rejected, 2 / 3, atol=1e-7)


@pytest.mark.parametrize(("reg", "reg_m"), [(1.0, 0.2), (0.1, 0.2), (0.05, 1.0)])
def test_second_oracle_majorisation_minimisation(reg: float, reg_m: float) -> None:
    rng = np.random.default_rng(3)
    cost = rng.random((5, 8))
    n, m = cost.shape
    oracle = mm_unbalanced(
        np.ones(n), np.ones(m), cost, reg_m, c=np.ones((n, m)), reg=reg, numItermax=100_000, stopThr=1e-15
    )
    np.testing.assert_allclose(transport_plan(cost, reg, reg_m)[0], oracle, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("reg", "reg_m"), [(1.0, 0.2), (0.1, 0.2), (0.02, 0.2), (0.05, 2.0)])
def test_log_domain_agrees_with_pot(reg: float, reg_m: float) -> None:
    cost = np.random.default_rng(4).random((7, 4))
    plan, fell_back = transport_plan(cost, reg, reg_m)
    log_plan = _log_domain_plan(cost, reg, reg_m)
    assert not fell_back
    assert log_plan is not None
    np.testing.assert_allclose(log_plan, plan, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("reg", "reg_m"), [(0.01, 10.0), (0.0005, 0.2)])
def test_fallback_solves_what_sinkhorn_does_not(reg: float, reg_m: float) -> None:
    """The optimum satisfies G = exp(-M/reg) * (G1)^(-reg_m/reg) * (G'1)^(-reg_m/reg) for unit masses."""
    plan, fell_back = transport_plan(COST, reg, reg_m)
    assert fell_back
    log_rows, log_columns = np.log(plan.sum(1, keepdims=True)), np.log(plan.sum(0, keepdims=True))
    stationary = np.exp((-COST - reg_m * (log_rows + log_columns)) / reg)
    np.testing.assert_allclose(plan, stationary, rtol=1e-6, atol=1e-12)


def test_vanishing_mass_is_a_clear_error() -> None:
    with pytest.raises(UserError, match="raise reg, or normalise the cost"):
        transport_plan(np.full((2, 2), 1e4), 0.1, 0.2)


def test_zero_mass_padding_of_current_pot_is_another_plan() -> None:
    """What the published code does under POT >= 0.9.5: pads with zero mass and leaves reg_type at its default."""
    padded = np.pad(COST, ((0, 0), (0, 2)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plan = sinkhorn_unbalanced(np.ones(2), np.array([1.0, 1, 1, 0, 0]), padded, 1.0, 0.2)
    assert np.abs(plan[:, :3] - transport_plan(COST, 1.0, 0.2)[0]).max() > 0.1


# The batched function


def batch(seed: int = 0) -> dict[str, Tensor]:
    """Three pairs of unequal lengths, right-padded."""
    generator = torch.Generator().manual_seed(seed)
    lengths_c, lengths_r = torch.tensor([6, 3, 1]), torch.tensor([4, 7, 5])
    return {
        "h_chosen": torch.randn(3, 6, 8, generator=generator, dtype=torch.float64),
        "h_rejected": torch.randn(3, 7, 8, generator=generator, dtype=torch.float64),
        "mask_chosen": torch.arange(6) < lengths_c[:, None],
        "mask_rejected": torch.arange(7) < lengths_r[:, None],
    }


def assert_same(ours: Any, theirs: Any) -> None:
    torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=1e-7)
    torch.testing.assert_close(ours[1], theirs[1], rtol=0, atol=1e-7)


def test_totals_are_tau_and_padding_is_exactly_zero() -> None:
    data = batch()
    w_chosen, w_rejected, stats = ot_token_weights(**data, reg=0.1)
    tau = torch.tensor([4.0, 3.0, 1.0])
    torch.testing.assert_close(w_chosen.sum(1), tau)
    torch.testing.assert_close(w_rejected.sum(1), tau)
    assert (w_chosen >= 0).all()
    assert (w_rejected >= 0).all()
    assert (w_chosen[~data["mask_chosen"]] == 0).all()
    assert (w_rejected[~data["mask_rejected"]] == 0).all()
    assert stats.fallbacks == stats.empty == 0
    assert (stats.spread > 0.01).all()


def test_mass_is_the_transported_share() -> None:
    """Identical hidden states: cost 0, G = exp(-.2 ln(2 * 3) / 1.4) on 2 x 3 = .774170, 6 * .774170 / 2 = 2.322511."""
    ones = torch.ones(1, 3, 4)
    mask = torch.tensor([[1, 1, 0]])
    _, _, stats = ot_token_weights(ones, ones, mask, torch.ones(1, 3))
    assert stats.mass.item() == pytest.approx(3 * math.exp(-0.2 * math.log(6) / 1.4), abs=1e-6)
    assert stats.spread.item() == pytest.approx(0, abs=1e-6)


def test_no_gradient_into_the_hidden_states() -> None:
    data = batch()
    data["h_chosen"].requires_grad_()
    w_chosen, w_rejected, _ = ot_token_weights(**data)
    assert not w_chosen.requires_grad
    assert not w_rejected.requires_grad


@pytest.mark.parametrize("change", ["scale", "shift", "rotate"])
def test_invariant_to_the_frame_of_the_hidden_states(change: str) -> None:
    data = batch()
    moved = dict(data)
    rotation = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(9)))[0]
    for key in ("h_chosen", "h_rejected"):
        match change:
            case "scale":
                moved[key] = data[key] * 37.0
            case "shift":
                moved[key] = data[key] + 100.0
            case "rotate":
                moved[key] = data[key] @ rotation
    assert_same(ot_token_weights(**moved, reg=0.1), ot_token_weights(**data, reg=0.1))


def test_without_normalisation_the_cost_is_the_distance() -> None:
    data = batch()
    chosen, rejected = data["h_chosen"][0], data["h_rejected"][0]
    expected = (chosen[:, None] - rejected[None]).norm(dim=-1).numpy()
    np.testing.assert_allclose(pairwise_cost(chosen, rejected, "none"), expected, rtol=0, atol=1e-10)
    np.testing.assert_allclose(pairwise_cost(chosen, rejected, "max"), expected / expected.max(), rtol=0, atol=1e-10)


def test_float32_states_with_a_large_offset_keep_their_distances() -> None:
    """cdist by matrix product in float32 gives such a vector a distance to itself; 40 rows so that it is used."""
    states = torch.randn(40, 64, generator=torch.Generator().manual_seed(1)) + 1000.0
    assert torch.cdist(states, states).diagonal().max() > 0.1
    assert pairwise_cost(states, states, "none").diagonal().max() < 1e-5


def test_invariant_to_padding_and_to_the_batch() -> None:
    data = batch()
    whole = ot_token_weights(**data)
    # left padding, and other content in it
    left = {key: value.flip(1) for key, value in data.items()}
    left["h_chosen"] = left["h_chosen"].masked_fill(~left["mask_chosen"][..., None], 1e6)
    flipped = ot_token_weights(**left)
    assert_same([w.flip(1) for w in flipped[:2]], whole)
    alone = ot_token_weights(**{key: value[1:2] for key, value in data.items()})
    assert_same(alone, [w[1:2] for w in whole[:2]])


def test_permuting_rejected_tokens_permutes_their_weights_only() -> None:
    data = batch()
    data["mask_rejected"][:] = True
    order = torch.tensor([3, 0, 6, 1, 5, 2, 4])
    w_chosen, w_rejected, _ = ot_token_weights(**data, reg=0.1)
    permuted = ot_token_weights(**(data | {"h_rejected": data["h_rejected"][:, order]}), reg=0.1)
    assert_same(permuted, (w_chosen, w_rejected[:, order]))
    assert (w_rejected - w_rejected[:, order]).abs().max() > 0.01


def test_mix_runs_from_plain_dpo_to_transport() -> None:
    data = batch()
    plain = ot_token_weights(**data, mix=0.0)
    assert torch.equal(plain[0], data["mask_chosen"].float())
    assert torch.equal(plain[1], data["mask_rejected"].float())
    full = ot_token_weights(**data)
    quarter = ot_token_weights(**data, mix=0.25)
    assert_same(quarter, [0.25 * full[i] + 0.75 * plain[i] for i in (0, 1)])


def test_an_empty_completion_has_no_weights_and_is_counted() -> None:
    data = batch()
    data["mask_chosen"][1] = False
    w_chosen, w_rejected, stats = ot_token_weights(**data)
    assert stats.empty == 1
    assert w_chosen[1].sum() == w_rejected[1].sum() == stats.mass[1] == stats.spread[1] == 0
    assert w_chosen[0].sum() == pytest.approx(4.0)


def test_hidden_states_that_are_not_finite_are_refused() -> None:
    data = batch()
    data["h_rejected"][2, 0, 0] = math.inf
    with pytest.raises(UserError, match="pair 2 of the batch"):
        ot_token_weights(**data)
    data["mask_rejected"][2, 0] = False  # in padding it does not matter
    assert ot_token_weights(**data)[1].isfinite().all()
