"""Router losses against numbers worked by hand, and the gradient that they must have.

Two tokens, three experts, K = 2, one layer. Token 1's logits are (ln 1, ln 2, ln 1): probabilities (1/4, 1/2, 1/4),
logsumexp ln 4. Token 2's are (ln 6, ln 1, ln 1): (3/4, 1/8, 1/8), logsumexp ln 8.
Token 1 chooses experts 1 and 0, token 2 experts 0 and 2: counts (2, 1, 1), shares (1/2, 1/4, 1/4).
Mean probabilities: (1/2, 5/16, 3/16). balance = 3 * (1/4 + 5/64 + 3/64) = 3 * 24/64 = 9/8.
z = (ln(4)^2 + ln(8)^2) / 2 = ln(2)^2 * (4 + 9) / 2.
"""

import math

import pytest
import torch
from torch import Tensor

from alignment.config import RouterConfig
from alignment.moe.router_losses import Coefficients, coefficients, expert_counts, load_share, router_losses

LOGITS = torch.tensor([[[1, 2, 1], [6, 1, 1]]], dtype=torch.float64).log()
SELECTED = torch.tensor([[[1, 0], [0, 2]]])
ALL = torch.tensor([True, True])


def test_values_worked_by_hand() -> None:
    counts = expert_counts(SELECTED, ALL, experts=3)
    assert counts.tolist() == [[2, 1, 1]]
    losses = router_losses(LOGITS, load_share(counts), ALL, tokens=2)
    assert losses.balance.item() == pytest.approx(9 / 8, abs=1e-6)
    assert losses.z.item() == pytest.approx(math.log(2) ** 2 * 13 / 2, abs=1e-6)
    first, second = 1.5 * math.log(2), 0.75 * math.log(4 / 3) + 0.25 * math.log(8)
    assert losses.entropy.item() == pytest.approx((first + second) / 2 / math.log(3), abs=1e-6)


def test_padding_counts_nowhere() -> None:
    mask = torch.tensor([True, False])
    counts = expert_counts(SELECTED, mask, experts=3)
    assert counts.tolist() == [[1, 1, 0]]
    padded = router_losses(LOGITS, load_share(counts), mask, tokens=1)
    alone = router_losses(LOGITS[:, :1], load_share(counts), ALL[:1], tokens=1)
    for ours, theirs in zip(padded, alone, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-7)


def test_even_load_is_one_and_a_single_expert_is_their_number() -> None:
    even = router_losses(torch.zeros(1, 4, 4), torch.full((1, 4), 0.25), torch.ones(4), tokens=4)
    assert even.balance.item() == pytest.approx(1)
    assert even.entropy.item() == pytest.approx(1)
    certain = torch.tensor([[[40.0, 0, 0, 0]]])
    share = load_share(expert_counts(torch.tensor([[[0]]]), torch.ones(1), experts=4))
    assert router_losses(certain, share, torch.ones(1), tokens=1).balance.item() == pytest.approx(4)


def test_a_part_without_tokens_adds_nothing() -> None:
    losses = router_losses(LOGITS, torch.zeros(1, 3), torch.zeros(2), tokens=0)
    assert [value.item() for value in losses] == [0, 0, 0]


def test_parts_with_the_whole_load_add_up_to_the_whole() -> None:
    """What global scope rests on: values and gradients of the parts are those of the whole."""
    torch.manual_seed(0)
    logits = torch.randn(2, 12, 5)
    selected = logits.topk(2).indices
    mask = torch.rand(12) > 0.3
    share = load_share(expert_counts(selected, mask, 5))

    def losses(part: slice) -> tuple[Tensor, Tensor]:
        leaf = logits[:, part].clone().requires_grad_()
        found = router_losses(leaf, share, mask[part], int(mask.sum()))
        total = (found.balance + found.z).sum()
        total.backward()
        assert leaf.grad is not None
        return total.detach(), leaf.grad

    whole, gradient = losses(slice(None))
    parts = [losses(part) for part in (slice(0, 3), slice(3, 10), slice(10, 12))]
    torch.testing.assert_close(torch.stack([value for value, _ in parts]).sum(), whole, rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.cat([piece for _, piece in parts], 1), gradient, rtol=0, atol=1e-7)


def test_gradient_is_that_of_the_formula_written_out() -> None:
    torch.manual_seed(1)
    logits = torch.randn(1, 6, 4, dtype=torch.float64)
    mask = torch.tensor([True] * 5 + [False])
    share = load_share(expert_counts(logits.topk(2).indices, mask, 4))
    ours = logits.float().requires_grad_()
    found = router_losses(ours, share, mask, tokens=5)
    (found.balance + found.z).sum().backward()
    p = logits[0, :5].softmax(-1)
    lse = logits[0, :5].logsumexp(-1, keepdim=True)
    # dbalance/dlogit_j = N/B p_j (f_j - sum_i p_i f_i); dz/dlogit_j = 2/B logsumexp p_j
    expected = 4 / 5 * p * (share - (p * share).sum(-1, keepdim=True)) + 2 / 5 * lse * p
    assert ours.grad is not None
    torch.testing.assert_close(ours.grad[0, :5].double(), expected, rtol=0, atol=1e-6)
    assert ours.grad[0, 5].abs().max() == 0


def test_sigmoid_routers_share_their_scores() -> None:
    """Scores 1/2, 1/4, 1/4: shares of 1 already; with an even load the loss is 1."""
    logits = torch.tensor([[[0.0, math.log(1 / 3), math.log(1 / 3)]]])
    share = torch.tensor([[0.5, 0.25, 0.25]])
    losses = router_losses(logits, share, torch.ones(1), tokens=1, score="sigmoid")
    assert losses.balance.item() == pytest.approx(3 * (1 / 4 + 1 / 16 + 1 / 16))


@pytest.mark.parametrize(
    ("decay", "halfway"), [("constant", 1.0), ("linear", 0.2 + 0.8 / 2), ("cosine", 0.2 + 0.8 / 2)]
)
def test_coefficients_fall_to_their_last_share(decay: str, halfway: float) -> None:
    config = RouterConfig.model_validate({"decay": decay, "final_share": 0.2})
    assert coefficients(config, 0) == Coefficients(0.01, 0.001)
    assert coefficients(config, 0.5) == pytest.approx((0.01 * halfway, 0.001 * halfway))
    assert coefficients(config, 1) == pytest.approx((0.01, 0.001) if decay == "constant" else (0.002, 0.0002))
