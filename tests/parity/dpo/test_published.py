"""`cost_norm="reference"` against the published code, with its padding, in float64."""

import warnings

import pytest
import torch
from torch import Tensor

from benchmarks.transport import published_weights
from dpo.ot import ot_token_weights


def padded_batch() -> tuple[Tensor, Tensor]:
    """Four rows [2 chosen; 2 rejected] of prompt, completion and padding; states with a common offset."""
    generator = torch.Generator().manual_seed(0)
    hidden_NTD = torch.randn(4, 12, 8, generator=generator, dtype=torch.float64) + 3
    starts, ends = torch.tensor([2, 3, 2, 3])[:, None], torch.tensor([9, 12, 12, 5])[:, None]
    place_T = torch.arange(12)
    return hidden_NTD, (place_T >= starts) & (place_T < ends)


def ours(hidden_NTD: Tensor, mask_NT: Tensor, cost_norm: str) -> tuple[Tensor, Tensor]:
    return ot_token_weights(*hidden_NTD.chunk(2), *mask_NT.chunk(2), reg=0.1, cost_norm=cost_norm)[:2]


@pytest.mark.parametrize("scale", [1.0, 0.01])
def test_reference_scale_reproduces_the_published_weights(scale: float) -> None:
    """Also where all distances are below 1, and it does not normalise at all."""
    hidden_NTD, mask_NT = padded_batch()
    hidden_NTD *= scale
    exact = published_weights(hidden_NTD, mask_NT, 0.1, 0.2, method="sinkhorn", tolerance=1e-14)
    torch.testing.assert_close(ours(hidden_NTD, mask_NT, "reference"), exact, rtol=0, atol=1e-10)
    as_published = published_weights(hidden_NTD, mask_NT, 0.1, 0.2)
    torch.testing.assert_close(ours(hidden_NTD, mask_NT, "reference"), as_published, rtol=0, atol=1e-4)


def test_padding_sets_the_published_scale() -> None:
    """The offset of all states makes them far from the zero rows, and so all distances look small."""
    hidden_NTD, mask_NT = padded_batch()
    published, normed = ours(hidden_NTD, mask_NT, "reference"), ours(hidden_NTD, mask_NT, "max")
    assert (published[0] - normed[0]).abs().max() > 0.05


def test_without_padding_a_largest_distance_above_1_is_the_same_scale() -> None:
    hidden_NTD, mask_NT = padded_batch()
    mask_NT[:] = True
    exact = published_weights(hidden_NTD, mask_NT, 0.1, 0.2, method="sinkhorn", tolerance=1e-14)
    torch.testing.assert_close(ours(hidden_NTD, mask_NT, "max"), exact, rtol=0, atol=1e-5)  # it adds 1e-6 to the costs


def test_the_published_call_under_current_pot_is_another_plan() -> None:
    """POT >= 0.9.5 defaults to reg_type="kl", and then zero masses of the padding spoil it; it says so, and goes on."""
    hidden_NTD, mask_NT = padded_batch()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrong = published_weights(hidden_NTD, mask_NT, 0.1, 0.2, reg_type="kl")
    right = ours(hidden_NTD, mask_NT, "reference")
    assert max((wrong[i] - right[i]).abs().max() for i in (0, 1)) > 0.01
