"""Elastic weight consolidation by hand, in float64; and the trainer's loss from its three terms."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sft.ewc import Anchor, diagonal_fisher, drawn_log_likelihood

ROWS = [(1.5, 1.0), (-0.5, 1.0), (2.0, 0.0)]  # x and y
W, B = 0.7, -0.2


def parameters() -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(torch.tensor(value, dtype=torch.float64)) for name, value in (("w", W), ("b", B))}


def likelihood(weights: dict[str, nn.Parameter], x: float, y: float) -> Tensor:
    """log p(y | x) of p(1 | x) = sigmoid(w x + b)."""
    score = weights["w"] * x + weights["b"]
    return nn.functional.logsigmoid(score if y else -score)


def test_fisher_of_two_parameters_by_hand() -> None:
    """The gradient of log p(y | x) is (y - p) x for w and y - p for b; squared, summed, over 3 tokens."""
    weights = parameters()
    found = diagonal_fisher(weights, ((likelihood(weights, x, y), 1) for x, y in ROWS))
    errors = [(y - 1 / (1 + math.exp(-(W * x + B))), x) for x, y in ROWS]
    assert found["w"].item() == pytest.approx(sum((e * x) ** 2 for e, x in errors) / 3, abs=1e-10)
    assert found["b"].item() == pytest.approx(sum(e**2 for e, _ in errors) / 3, abs=1e-10)


def test_gradients_are_squared_row_by_row() -> None:
    """Two rows whose gradients cancel: of their sum the Fisher would be 0."""
    weights = parameters()
    rows = [(likelihood(weights, 1.0, 1.0), 2), (likelihood(weights, 1.0, 0.0), 2)]
    p = 1 / (1 + math.exp(-(W + B)))
    assert diagonal_fisher(weights, rows)["b"].item() == pytest.approx(((1 - p) ** 2 + p**2) / 4, abs=1e-10)


def test_penalty_and_its_gradient_by_hand() -> None:
    """F = (2, 0.5), away by (0.3, -0.4): 1/2 (2 x 0.09 + 0.5 x 0.16) = 0.13, gradient (0.6, -0.2)."""
    weights = parameters()
    anchor = Anchor(
        {"w": torch.tensor(W - 0.3, dtype=torch.float64), "b": torch.tensor(B + 0.4, dtype=torch.float64)},
        {"w": torch.tensor(2.0, dtype=torch.float64), "b": torch.tensor(0.5, dtype=torch.float64)},
    )
    penalty = anchor.penalty(weights)
    penalty.backward()
    assert penalty.item() == pytest.approx(0.13, abs=1e-10)
    assert [weights[name].grad.item() for name in "wb"] == pytest.approx([0.6, -0.2], abs=1e-10)  # type: ignore[union-attr]


def test_twice_the_penalty_is_the_divergence_to_second_order() -> None:
    """With the exact Fisher, mean KL(old | new) over the rows' x is F d^2 / 2 for a small step of one weight."""
    step, xs = 1e-4, [x for x, _ in ROWS]

    def p(w: float, x: float) -> float:
        return 1 / (1 + math.exp(-(w * x + B)))

    exact = sum(p(W, x) * (1 - p(W, x)) * x**2 for x in xs) / 3
    kl = sum(
        q * math.log(q / p(W + step, x)) + (1 - q) * math.log((1 - q) / (1 - p(W + step, x)))
        for x in xs
        for q in [p(W, x)]
    )
    assert kl / 3 == pytest.approx(exact * step**2 / 2, rel=1e-3)


def test_an_anchor_is_read_as_it_was_written(tmp_path: Path) -> None:
    anchor = Anchor({"a.b/c": torch.randn(2, 3)}, {"a.b/c": torch.rand(2, 3)})
    anchor.save(tmp_path / "anchor.safetensors")
    read = Anchor.load(tmp_path / "anchor.safetensors")
    for part, other in ((anchor.weights, read.weights), (anchor.fisher, read.fisher)):
        assert part.keys() == other.keys() and torch.equal(part["a.b/c"], other["a.b/c"])


class Fixed(nn.Module):
    """Logits that do not depend on the input."""

    def __init__(self, logits_V: list[float]) -> None:
        super().__init__()
        self.logits_V = nn.Parameter(torch.tensor(logits_V))

    def forward(self, input_ids: Tensor, **_: object) -> object:
        logits = self.logits_V.expand(*input_ids.shape, -1)
        return type("Output", (), {"logits": logits})


def test_labels_are_drawn_from_the_model_not_from_the_row() -> None:
    """The row's labels are token 3, which the model never says; its own are 0 and 1, as often the one as the other."""
    model, ids = Fixed([5.0, 5.0, -50.0, -50.0]), np.array([2, 3, 3, 2, 3], np.int32)
    trained = np.array([False, True, True, False, True])
    drawn, tokens = drawn_log_likelihood(model, ids, trained, 0, torch.Generator().manual_seed(0))
    assert tokens == 3 and drawn.item() == pytest.approx(3 * math.log(0.5), abs=1e-5)
    many = np.full(2001, 3, np.int32), np.arange(2001) > 0
    rows = (drawn_log_likelihood(model, *many, 0, torch.Generator().manual_seed(seed)) for seed in range(40))
    fisher = diagonal_fisher({"logits_V": model.logits_V}, rows)["logits_V"]
    # Of one token p (1 - p) = 1/4; the squared gradient of a row of N tokens is N/4 on average.
    assert fisher[:2].tolist() == pytest.approx([0.25, 0.25], rel=0.5) and fisher[2:].abs().max() < 1e-8
