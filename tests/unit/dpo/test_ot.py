"""Token weights: their invariants, hostile pairs, and the published code, in float64."""

import math
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from dpo import ot, transport
from dpo.config import TransportConfig
from dpo.loss import weighted_dpo_loss
from dpo.ot import CostNorm, Metric, PairError, Total, batched_shares, ot_token_weights, pairwise_cost


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


def batched(*states: Tensor, **given: Any) -> Any:
    """`ot_token_weights` by the path of GPUs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ot, "_one_by_one", batched_shares)
        return ot_token_weights(*states, **given)


Weigh = Callable[..., Any]
PATHS = pytest.mark.parametrize("weigh", [ot_token_weights, batched], ids=["pot", "batched"])


def assert_same(ours: Any, theirs: Any) -> None:
    torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=1e-10)
    torch.testing.assert_close(ours[1], theirs[1], rtol=0, atol=1e-10)


@pytest.mark.parametrize("metric", get_args(Metric))
@pytest.mark.parametrize("cost_norm", get_args(CostNorm))
@pytest.mark.parametrize("total", get_args(Total))
def test_the_batched_path_agrees_with_pot(metric: Metric, cost_norm: CostNorm, total: Total) -> None:
    data, options = batch(), {"reg": 0.3, "metric": metric, "cost_norm": cost_norm, "total": total}
    if cost_norm == "reference" and metric != "euclidean":
        with pytest.raises(ValueError, match="reference is defined for metric euclidean"):
            TransportConfig.model_validate(options)
        return
    ours, theirs = batched(**data, **options), ot_token_weights(**data, **options)
    assert_same(ours, theirs)
    for name, value in vars(theirs[2]).items():
        torch.testing.assert_close(getattr(ours[2], name), value, rtol=0, atol=1e-10)


def test_the_batched_path_takes_what_does_not_fit_at_once_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = batched(**batch())
    monkeypatch.setattr(ot, "BATCH_CELLS", 2 * 6 * 7)
    assert_same(batched(**batch()), whole)


def test_the_batched_path_solves_what_needs_the_fallback() -> None:
    ours, theirs = (weigh(**batch(), reg=0.002) for weigh in (batched, ot_token_weights))
    assert theirs[2].fallbacks > 0
    assert_same(ours, theirs)


@PATHS
def test_totals_are_tau_and_padding_is_exactly_zero(weigh: Weigh) -> None:
    data = batch()
    w_chosen, w_rejected, stats = weigh(**data, reg=0.1)
    tau = torch.tensor([4.0, 3.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(w_chosen.sum(1), tau, rtol=0, atol=1e-10)
    torch.testing.assert_close(w_rejected.sum(1), tau, rtol=0, atol=1e-10)
    assert (w_chosen >= 0).all()
    assert (w_rejected >= 0).all()
    assert (w_chosen[~data["mask_chosen"]] == 0).all()
    assert (w_rejected[~data["mask_rejected"]] == 0).all()
    assert stats.fallbacks == stats.empty == 0
    assert (stats.spread > 0.01).all()
    assert (stats.unchanged == 0).all()


def test_other_totals_scale_each_side() -> None:
    data = batch()
    ours = ot_token_weights(**data, reg=0.1)
    n, m, tau = torch.tensor([[6.0], [3], [1]]), torch.tensor([[4.0], [7], [5]]), torch.tensor([[4.0], [3], [1]])
    own = ot_token_weights(**data, reg=0.1, total="own")
    assert_same(own, (ours[0] * n / tau, ours[1] * m / tau))
    raw = ot_token_weights(**data, reg=0.1, total="none")
    assert_same(raw, [weights * ours[2].mass[:, None] for weights in ours[:2]])
    assert (ours[2].mass - 1).abs().min() > 0.01


def test_own_totals_lead_to_dpo_as_entropy_grows() -> None:
    data = batch()
    w_chosen, w_rejected, stats = ot_token_weights(**data, reg=1e9, total="own")
    torch.testing.assert_close(w_chosen, data["mask_chosen"].double(), rtol=0, atol=1e-8)
    torch.testing.assert_close(w_rejected, data["mask_rejected"].double(), rtol=0, atol=1e-8)
    assert (stats.unchanged == 1).all()


def test_uniform_weights_equal_dpo_only_at_equal_length() -> None:
    """tau/n and tau/m are 1 on both sides where n = m, and not otherwise: 4/6 on the first pair's chosen side."""
    data = batch()
    w_chosen, w_rejected, _ = ot_token_weights(**data, reg=1e9)
    assert w_chosen[0, 0].item() == pytest.approx(4 / 6, abs=1e-8)
    data["mask_chosen"][0, 4:] = False
    w_chosen, w_rejected, _ = ot_token_weights(**data, reg=1e9)
    torch.testing.assert_close(w_chosen[0], data["mask_chosen"][0].double(), rtol=0, atol=1e-8)
    torch.testing.assert_close(w_rejected[0], data["mask_rejected"][0].double(), rtol=0, atol=1e-8)


def test_mass_is_the_transported_share() -> None:
    """Identical hidden states: cost 0, G = exp(-.2 ln(2 * 3) / 1.4) on 2 x 3 = .774170, 6 * .774170 / 2 = 2.322511."""
    ones = torch.ones(1, 3, 4)
    mask = torch.tensor([[1, 1, 0]])
    w_chosen, _, stats = ot_token_weights(ones, ones, mask, torch.ones(1, 3))
    assert w_chosen.dtype == torch.float32
    assert stats.mass.item() == pytest.approx(3 * math.exp(-0.2 * math.log(6) / 1.4), abs=1e-10)
    assert stats.spread.item() == pytest.approx(0, abs=1e-10)
    assert stats.unchanged.item() == 1


def test_no_gradient_into_the_hidden_states() -> None:
    data = batch()
    data["h_chosen"].requires_grad_()
    w_chosen, w_rejected, _ = ot_token_weights(**data)
    assert not w_chosen.requires_grad
    assert not w_rejected.requires_grad


@PATHS
@pytest.mark.parametrize("change", ["scale", "shift", "rotate"])
def test_invariant_to_the_frame_of_the_hidden_states(weigh: Weigh, change: str) -> None:
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
    assert_same(weigh(**moved, reg=0.1), weigh(**data, reg=0.1))


def test_costs_and_their_scales() -> None:
    data = batch()
    chosen, rejected = data["h_chosen"][0], data["h_rejected"][0]
    distance = (chosen[:, None] - rejected[None]).norm(dim=-1)
    cosine = 1 - torch.cosine_similarity(chosen[:, None], rejected[None], dim=-1)
    largest_norm = max(chosen.norm(dim=-1).max(), rejected.norm(dim=-1).max())
    for metric, cost_norm, expected in [
        ("euclidean", "none", distance),
        ("euclidean", "max", distance / distance.max()),
        ("euclidean", "reference", (distance + 1e-6) / (max(distance.max(), largest_norm) + 1e-6)),
        ("sqeuclidean", "none", distance**2),
        ("sqeuclidean", "max", (distance / distance.max()) ** 2),
        ("cosine", "none", cosine),
    ]:
        ours = pairwise_cost(chosen, rejected, metric, cost_norm)
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-10)


def test_float32_states_with_a_large_offset_keep_their_distances() -> None:
    """cdist by matrix product in float32 gives such a vector a distance to itself; 40 rows so that it is used."""
    states = torch.randn(40, 64, generator=torch.Generator().manual_seed(1)) + 1000.0
    assert torch.cdist(states, states).diagonal().max() > 0.1
    assert pairwise_cost(states, states, "euclidean", "none").diagonal().max() < 1e-5


@PATHS
def test_invariant_to_padding_and_to_the_batch(weigh: Weigh) -> None:
    data = batch()
    whole = weigh(**data)
    # left padding, and other content in it
    left = {key: value.flip(1) for key, value in data.items()}
    left["h_chosen"] = left["h_chosen"].masked_fill(~left["mask_chosen"][..., None], math.nan)
    left["h_rejected"] = left["h_rejected"].masked_fill(~left["mask_rejected"][..., None], -1e6)
    flipped = weigh(**left)
    assert_same([w.flip(1) for w in flipped[:2]], whole)
    alone = weigh(**{key: value[1:2] for key, value in data.items()})
    assert_same(alone, [w[1:2] for w in whole[:2]])


@PATHS
def test_permuting_rejected_tokens_permutes_their_weights_only(weigh: Weigh) -> None:
    data = batch()
    data["mask_rejected"][:] = True
    order = torch.tensor([3, 0, 6, 1, 5, 2, 4])
    w_chosen, w_rejected, _ = weigh(**data, reg=0.1)
    permuted = weigh(**(data | {"h_rejected": data["h_rejected"][:, order]}), reg=0.1)
    assert_same(permuted, (w_chosen, w_rejected[:, order]))
    assert (w_rejected - w_rejected[:, order]).abs().max() > 0.01


def test_mix_runs_from_plain_dpo_to_transport() -> None:
    data = batch()
    plain = ot_token_weights(**data, mix=0.0)
    assert torch.equal(plain[0], data["mask_chosen"].double())
    assert torch.equal(plain[1], data["mask_rejected"].double())
    full = ot_token_weights(**data)
    quarter = ot_token_weights(**data, mix=0.25)
    assert_same(quarter, [0.25 * full[i] + 0.75 * plain[i] for i in (0, 1)])


def test_finite_differences_of_the_loss_have_the_closed_form_and_its_signs() -> None:
    """dloss/dlogp_c,t = -beta sigmoid(-beta D) w_t; the opposite sign for rejected; 0 where the weight is."""
    data, beta, step = batch(), 0.7, 1e-5
    w_chosen, w_rejected, _ = ot_token_weights(**data, reg=0.1)
    generator = torch.Generator().manual_seed(2)
    policy_c, reference_c = torch.randn(2, 3, 6, dtype=torch.float64, generator=generator)
    policy_r, reference_r = torch.randn(2, 3, 7, dtype=torch.float64, generator=generator)

    def loss(chosen: Tensor, rejected: Tensor) -> Tensor:
        return weighted_dpo_loss(chosen, rejected, reference_c, reference_r, w_chosen, w_rejected, beta).losses

    margin = (w_chosen * (policy_c - reference_c)).sum(1) - (w_rejected * (policy_r - reference_r)).sum(1)
    torch.testing.assert_close(loss(policy_c, policy_r), -logsigmoid(beta * margin), rtol=0, atol=1e-10)
    slope = beta * torch.sigmoid(-beta * margin)
    for token in range(6):
        nudge = torch.zeros(3, 6, dtype=torch.float64)
        nudge[:, token] = step
        difference = (loss(policy_c + nudge, policy_r) - loss(policy_c - nudge, policy_r)) / (2 * step)
        torch.testing.assert_close(difference, -slope * w_chosen[:, token], rtol=0, atol=1e-9)
        assert ((difference < 0) == data["mask_chosen"][:, token]).all()
    for token in range(7):
        nudge = torch.zeros(3, 7, dtype=torch.float64)
        nudge[:, token] = step
        difference = (loss(policy_c, policy_r + nudge) - loss(policy_c, policy_r - nudge)) / (2 * step)
        torch.testing.assert_close(difference, slope * w_rejected[:, token], rtol=0, atol=1e-9)
        assert ((difference > 0) == data["mask_rejected"][:, token]).all()


# Hostile pairs


@PATHS
def test_an_empty_completion_has_no_weights_and_is_counted(weigh: Weigh) -> None:
    data = batch()
    data["mask_chosen"][1] = False
    w_chosen, w_rejected, stats = weigh(**data)
    assert stats.empty == 1
    assert w_chosen[1].sum() == w_rejected[1].sum() == 0
    assert stats.mass[1] == stats.spread[1] == stats.unchanged[1] == 0
    assert w_chosen[0].sum() == pytest.approx(4.0)


@PATHS
def test_a_batch_of_nothing_but_empty_completions(weigh: Weigh) -> None:
    data = batch()
    data["mask_rejected"][:] = False
    w_chosen, w_rejected, stats = weigh(**data)
    assert stats.empty == 3
    assert w_chosen.abs().sum() == w_rejected.abs().sum() == 0


@PATHS
def test_identical_completions_have_identical_weights(weigh: Weigh) -> None:
    data = batch()
    same = {"h_rejected": data["h_chosen"], "mask_rejected": data["mask_chosen"]}
    w_chosen, w_rejected, _ = weigh(**(data | same), reg=0.1)
    torch.testing.assert_close(w_chosen, w_rejected, rtol=0, atol=1e-10)
    assert w_chosen.isfinite().all()


@PATHS
def test_one_token_against_one_has_weight_1(weigh: Weigh) -> None:
    states, mask = torch.randn(2, 1, 1, 8, dtype=torch.float64), torch.ones(1, 1)
    w_chosen, w_rejected, _ = weigh(states[0], states[1], mask, mask)
    assert w_chosen.item() == pytest.approx(1, abs=1e-10)
    assert w_rejected.item() == pytest.approx(1, abs=1e-10)


@PATHS
@pytest.mark.parametrize("reg", [1.0, 0.1, 0.01])
def test_2000_tokens_against_3(weigh: Weigh, reg: float) -> None:
    generator = torch.Generator().manual_seed(6)
    long, short = torch.randn(1, 2000, 16, generator=generator), torch.randn(1, 3, 16, generator=generator)
    w_chosen, w_rejected, _ = weigh(long, short, torch.ones(1, 2000), torch.ones(1, 3), reg=reg)
    assert w_chosen.sum().item() == pytest.approx(3, abs=1e-5)
    assert w_rejected.sum().item() == pytest.approx(3, abs=1e-5)
    assert (w_chosen >= 0).all()


@PATHS
@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0, 1e4])
@pytest.mark.parametrize("metric", get_args(Metric))
def test_constant_hidden_states_have_uniform_weights(weigh: Weigh, scale: float, metric: Metric) -> None:
    """Also where rounding gives equal states a distance, which their largest would blow up to 1."""
    state = scale * torch.randn(333, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    chosen, rejected = state.expand(1, 17, 333), state.expand(1, 129, 333)
    w_chosen, w_rejected, stats = weigh(chosen, rejected, torch.ones(1, 17), torch.ones(1, 129), metric=metric)
    torch.testing.assert_close(w_chosen, torch.ones(1, 17, dtype=torch.float64), rtol=0, atol=1e-10)
    torch.testing.assert_close(w_rejected, torch.full((1, 129), 17 / 129, dtype=torch.float64), rtol=0, atol=1e-10)
    assert stats.unchanged.item() == 1


@PATHS
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("key", ["h_chosen", "h_rejected"])
@pytest.mark.parametrize("metric", get_args(Metric))
def test_bfloat16_that_is_not_finite_is_refused(weigh: Weigh, value: float, key: str, metric: Metric) -> None:
    data = batch()
    for name in ("h_chosen", "h_rejected"):
        data[name] = data[name].bfloat16()
    data[key][2, 0, 0] = value
    with pytest.raises(PairError, match="pair 2 of the batch: its hidden states are not finite") as error:
        weigh(**data, metric=metric)
    assert error.value.pair == 2
    data[key.replace("h_", "mask_")][2, 0] = False  # in padding it does not matter
    w_chosen, w_rejected, _ = weigh(**data, metric=metric)
    assert w_chosen.isfinite().all()
    assert w_rejected.isfinite().all()


@PATHS
def test_the_largest_bfloat16_is_finite(weigh: Weigh) -> None:
    data = batch()
    data["h_chosen"] = data["h_chosen"].bfloat16()
    data["h_chosen"][0, 0, 0] = torch.finfo(torch.bfloat16).max
    w_chosen = weigh(**data)[0]
    assert w_chosen.isfinite().all()
    assert w_chosen[0].sum().item() == pytest.approx(4)


@PATHS
def test_a_transport_that_does_not_converge_names_its_pair(weigh: Weigh, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "LOG_ITERATIONS", 8)
    with pytest.raises(PairError, match="pair 0 of the batch: transport of 6 x 4 tokens .* does not converge"):
        weigh(**batch(), reg=0.0005)
