"""Log-probabilities from chunks of logits: by hand, and against the whole softmax."""

import math

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import dpo.logps
from dpo.logps import token_logps

TOKENS, DIM, VOCAB = 100, 16, 50


def leaves(bias: bool, dtype: torch.dtype = torch.float64, tokens: int = TOKENS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(tokens, DIM), (VOCAB, DIM), *([(VOCAB,)] if bias else [])]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def targets(tokens: int = TOKENS) -> Tensor:
    return torch.randint(VOCAB, (tokens,), generator=torch.Generator().manual_seed(1))


def ours(given: list[Tensor], target: Tensor) -> Tensor:
    return token_logps(given[0], given[1], target, *given[2:])


def whole(given: list[Tensor], target: Tensor) -> Tensor:
    return torch.nn.functional.linear(*given).log_softmax(-1).gather(-1, target[:, None])[:, 0]


@pytest.fixture
def chunk_of_32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dpo.logps, "CHUNK", {"cpu": 32})


def test_two_tokens_by_hand() -> None:
    """Logits (0, ln 3) and (ln 3, 0), both for token 1: probabilities 3/4 and 1/4.

    The gradient of a token's logits is g (onehot - p): with g = 2 and -1, (-1/2, 1/2) and (3/4, -3/4). With W the
    identity that is its state's; W's row v gathers sum_n grad_nv h_n.
    """
    ln3 = math.log(3)
    hidden = torch.tensor([[0.0, ln3], [ln3, 0.0]], dtype=torch.float64, requires_grad=True)
    weight = torch.eye(2, dtype=torch.float64, requires_grad=True)
    logps = token_logps(hidden, weight, torch.tensor([1, 1]))
    logps.backward(torch.tensor([2.0, -1.0], dtype=torch.float64))
    assert logps.tolist() == pytest.approx([math.log(3 / 4), math.log(1 / 4)], abs=1e-12)
    expected = torch.tensor([[-0.5, 0.5], [0.75, -0.75]], dtype=torch.float64)
    torch.testing.assert_close(hidden.grad, expected, atol=1e-12, rtol=0)
    rows_of_w = torch.tensor([[0.75 * ln3, -0.5 * ln3], [-0.75 * ln3, 0.5 * ln3]], dtype=torch.float64)
    torch.testing.assert_close(weight.grad, rows_of_w, atol=1e-12, rtol=0)


@pytest.mark.parametrize("chunk", [1, 32, 100, 256])
@pytest.mark.parametrize("bias", [False, True])
def test_values_and_gradients_are_those_of_the_whole_softmax(
    chunk: int, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dpo.logps, "CHUNK", {"cpu": chunk})
    given, target = leaves(bias), targets()
    weight = torch.randn(TOKENS, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    logps, reference = ours(given, target), whole(given, target)
    torch.testing.assert_close(logps, reference, atol=1e-10, rtol=0)
    for mine, theirs in zip(*(torch.autograd.grad(x, given, weight) for x in (logps, reference)), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-10, rtol=0)


@pytest.mark.usefixtures("chunk_of_32")
def test_finite_differences() -> None:
    given, target = leaves(bias=True, tokens=40), targets(40)
    assert torch.autograd.gradcheck(lambda *x: ours(list(x), target), given, fast_mode=True)


@pytest.mark.usefixtures("chunk_of_32")
def test_a_frozen_head_costs_no_gradient_of_its_weight() -> None:
    (hidden, weight), target = leaves(bias=False), targets()
    ours([hidden, weight.detach()], target).sum().backward()
    (expected,) = torch.autograd.grad(whole([hidden, weight], target).sum(), hidden)
    torch.testing.assert_close(hidden.grad, expected, atol=1e-10, rtol=0)
    assert weight.grad is None


def test_no_token_at_all_has_zero_gradients() -> None:
    given = leaves(bias=True, tokens=0)
    ours(given, targets(0)).sum().backward()
    assert all(torch.equal(leaf.grad, torch.zeros_like(leaf)) for leaf in given)


@pytest.mark.usefixtures("chunk_of_32")
def test_huge_logits_stay_finite() -> None:
    (hidden, weight), target = leaves(bias=False, dtype=torch.float32), targets()
    scaled = [hidden * 1e4, weight]
    torch.testing.assert_close(ours(scaled, target), whole(scaled, target), atol=0, rtol=1e-6)
    assert all(x.isfinite().all() for x in torch.autograd.grad(ours(scaled, target).sum(), [hidden, weight]))


@pytest.mark.usefixtures("chunk_of_32")
def test_bfloat16_under_autocast_sums_in_float32() -> None:
    """The logits are rounded to bfloat16, as a linear layer's are; nothing after them is."""
    given, target = leaves(bias=True, dtype=torch.float32), targets()
    with torch.autocast("cpu", torch.bfloat16):
        logps = ours(given, target)
        logits = torch.nn.functional.linear(*given)
    assert logps.dtype == torch.float32 and logits.dtype == torch.bfloat16
    reference = logits.float().log_softmax(-1).gather(-1, target[:, None])[:, 0]
    torch.testing.assert_close(logps, reference, atol=1e-5, rtol=0)
    for mine, theirs in zip(*(torch.autograd.grad(x.sum(), given) for x in (logps, reference)), strict=True):
        assert mine.dtype == torch.float32
        assert (mine - theirs).norm() / theirs.norm() < 0.02


class Largest(TorchDispatchMode):
    """The most elements that any tensor inside has."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.elements = max(self.elements, out.numel())
        return out


@pytest.mark.usefixtures("chunk_of_32")
@pytest.mark.parametrize(("way", "most"), [(ours, 32 * VOCAB), (whole, TOKENS * VOCAB)])
def test_logits_of_a_chunk_exist_at_a_time(way: object, most: int) -> None:
    assert callable(way)
    given, target = leaves(bias=False), targets()
    with Largest() as seen:
        way(given, target).sum().backward()
    assert seen.elements == max(most, TOKENS * DIM)
