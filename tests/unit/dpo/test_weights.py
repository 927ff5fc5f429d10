"""Providers of token weights, by hand."""

import pytest
import torch

from dpo.config import TransportConfig
from dpo.ot import ot_token_weights
from dpo.weights import WeightedLoss, token_weights

# Two pairs of 2 against 4 tokens, and of 3 against none.
MASK = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0]]).bool()


@pytest.mark.parametrize(
    ("loss", "chosen", "rejected"),
    [
        ("dpo", [[1, 1, 0, 0], [0, 1, 1, 1]], [[1, 1, 1, 1], [0, 0, 0, 0]]),
        ("dpo_uniform", [[1, 1, 0, 0], [0, 0, 0, 0]], [[0.5, 0.5, 0.5, 0.5], [0, 0, 0, 0]]),
        ("dpo_norm", [[0.5, 0.5, 0, 0], [0, 1 / 3, 1 / 3, 1 / 3]], [[0.25, 0.25, 0.25, 0.25], [0, 0, 0, 0]]),
    ],
)
def test_weights_of_lengths(loss: WeightedLoss, chosen: list[list[float]], rejected: list[list[float]]) -> None:
    weights = token_weights(loss, MASK, None, TransportConfig())
    torch.testing.assert_close(weights.chosen, torch.tensor(chosen, dtype=torch.float32))
    torch.testing.assert_close(weights.rejected, torch.tensor(rejected, dtype=torch.float32))
    assert weights.stats == {}


def test_transport_takes_every_option() -> None:
    hidden = torch.randn(4, 4, 8, generator=torch.Generator().manual_seed(0))
    options = {"reg": 0.3, "reg_m": 0.5, "metric": "cosine", "cost_norm": "none", "total": "own", "mix": 0.7}
    weights = token_weights("ot_dpo", MASK, hidden, TransportConfig.model_validate(options))
    expected = ot_token_weights(hidden[:2], hidden[2:], MASK[:2], MASK[2:], **options)
    assert torch.equal(weights.chosen, expected[0])
    assert torch.equal(weights.rejected, expected[1])
    assert set(weights.stats) == {"mass", "spread", "unchanged", "fallbacks", "empty"}
    assert weights.stats["empty"] == 1


def test_transport_without_mix_is_dpo_and_needs_no_states() -> None:
    weights = token_weights("ot_dpo", MASK, None, TransportConfig(mix=0))
    assert torch.equal(weights.chosen, MASK[:2].float())
    assert torch.equal(weights.rejected, MASK[2:].float())
