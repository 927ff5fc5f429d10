"""The weighted loss and the likelihood term, by hand and by gradient."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dpo.loss import aot_losses, aot_slopes, chosen_nll, weighted_dpo_loss


def example(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(3, 4), (3, 6), (3, 4), (3, 6)]
    logps = [-torch.rand(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    weights = [torch.rand(shape, generator=generator, dtype=torch.float64) for shape in shapes[:2]]
    return logps + weights


def test_by_hand() -> None:
    """q_c = (-1+1.5, -2+2) = (.5, 0), q_r = (-.5+.1) = -.4; weights (2, 1) and 1.5, beta .5.

    reward_c = .5 * (2 * .5 + 0) = .5; reward_r = .5 * 1.5 * -.4 = -.3; loss = log(1 + exp(-.8)) = .371101.
    """
    one = [[-1.0, -2.0]], [[-0.5]], [[-1.5, -2.0]], [[-0.1]], [[2.0, 1.0]], [[1.5]]
    pairs = weighted_dpo_loss(*(torch.tensor(value, dtype=torch.float64) for value in one), beta=0.5)
    assert pairs.rewards_chosen.item() == pytest.approx(0.5, abs=1e-10)
    assert pairs.rewards_rejected.item() == pytest.approx(-0.3, abs=1e-10)
    assert pairs.losses.item() == pytest.approx(math.log1p(math.exp(-0.8)), abs=1e-10)


def test_weights_of_one_are_dpo() -> None:
    policy_c, policy_r, reference_c, reference_r, w_c, w_r = example()
    ours = weighted_dpo_loss(
        policy_c, policy_r, reference_c, reference_r, torch.ones_like(w_c), torch.ones_like(w_r), beta=0.1
    )
    margin = (policy_c.sum(1) - reference_c.sum(1)) - (policy_r.sum(1) - reference_r.sum(1))
    torch.testing.assert_close(ours.losses, -F.logsigmoid(0.1 * margin), rtol=0, atol=1e-10)


def test_gradient_is_the_formula() -> None:
    """dloss/dlogp_c,t = -beta sigmoid(-beta D) w_t; the other sign for rejected; none into the reference's side."""
    policy_c, policy_r, reference_c, reference_r, w_c, w_r = example(1)
    policy_c.requires_grad_()
    policy_r.requires_grad_()
    pairs = weighted_dpo_loss(policy_c, policy_r, reference_c, reference_r, w_c, w_r, beta=0.3)
    pairs.losses.sum().backward()
    slope = 0.3 * torch.sigmoid(-(pairs.rewards_chosen - pairs.rewards_rejected))[:, None]
    torch.testing.assert_close(policy_c.grad, -slope * w_c, rtol=0, atol=1e-10)
    torch.testing.assert_close(policy_r.grad, slope * w_r, rtol=0, atol=1e-10)
    assert not pairs.rewards_chosen.requires_grad


def test_gradient_by_finite_differences() -> None:
    policy_c, policy_r, *rest = example(2)
    policy_c.requires_grad_()
    policy_r.requires_grad_()
    assert torch.autograd.gradcheck(lambda c, r: weighted_dpo_loss(c, r, *rest, beta=0.3).losses, (policy_c, policy_r))


def test_nll_is_a_mean_over_the_completions_tokens() -> None:
    """(1 + 3) / 2 = 2 and 5 / 1; an empty completion gives 0, not 0/0."""
    logps = torch.tensor([[-1.0, -3.0], [-5.0, -7.0], [-1.0, -1.0]])
    mask = torch.tensor([[1, 1], [1, 0], [0, 0]])
    assert chosen_nll(logps, mask).tolist() == [2.0, 5.0, 0.0]


def test_aot_by_hand() -> None:
    """Chosen sorted (1, 3) against rejected sorted (0, 2): both ranks differ by 1, though the pairs by 3 and -1.

    -log sigmoid(0.5) = 0.474077. Paired: differences (3, -1) sorted (-1, 3), reference's (0.5, 0) sorted (0, 0.5):
    gaps -1 and 2.5, -log sigmoid(-0.5) = 0.974077 and -log sigmoid(1.25) = 0.251929.
    """
    chosen, rejected = torch.tensor([3.0, 1.0]), torch.tensor([0.0, 2.0])
    assert aot_losses(chosen, rejected, beta=0.5).tolist() == pytest.approx([0.474077, 0.474077], abs=1e-6)
    reference = torch.tensor([0.5, 0.0, 0.0, 0.0])
    paired = aot_slopes(torch.cat([chosen, rejected]), reference, 0.5, paired=True)
    assert paired.loss.item() == pytest.approx((0.974077 + 0.251929) / 2, abs=1e-6)
    # slope: -beta sigmoid(-beta gap), at the pair whose difference has that rank
    assert paired.chosen.tolist() == pytest.approx([-0.5 * 0.222700, -0.5 * 0.622459], abs=1e-6)
    assert paired.rejected.tolist() == pytest.approx([0.5 * 0.222700, 0.5 * 0.622459], abs=1e-6)


@pytest.mark.parametrize("paired", [True, False])
def test_slopes_are_the_gradient_of_the_whole_batch(paired: bool) -> None:
    """Backpropagated pair by pair, they give what finite differences of the loss of all pairs give."""
    generator = torch.Generator().manual_seed(0)
    inputs, reference, theta = (torch.randn(10, generator=generator, dtype=torch.float64) for _ in range(3))
    theta.requires_grad_()
    slopes = aot_slopes((inputs * theta).detach(), reference, 0.7, paired=paired)
    surrogate = (torch.cat([slopes.chosen, slopes.rejected]) * inputs * theta).sum() / 5
    (cut,) = torch.autograd.grad(surrogate, theta)

    def loss(values: torch.Tensor) -> float:
        return aot_slopes(inputs * values, reference, 0.7, paired=paired).loss.item()

    step = 1e-6 * torch.eye(10, dtype=torch.float64)
    numeric = [(loss(theta.detach() + e) - loss(theta.detach() - e)) / 2e-6 for e in step]
    assert cut.tolist() == pytest.approx(numeric, abs=1e-7)
    assert cut.abs().max() > 0.01
