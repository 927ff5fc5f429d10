"""Shapes: B rows (1), H query heads, K key-value heads, T tokens, D head width."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from alignment import attention

LENGTHS = [1, 7, 4, 12, 1]
D = 8


def packed(heads: int, kv_heads: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(1, h, sum(LENGTHS), D, dtype=torch.float64, generator=generator, requires_grad=True)
        for h in (heads, kv_heads, kv_heads)
    ]


def ends(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def written_out(q_BHTD: torch.Tensor, k_BKTD: torch.Tensor, v_BKTD: torch.Tensor, scaling: float) -> torch.Tensor:
    """Causal attention of one sample, by its definition. Returns [B, T, H, D]."""
    groups = q_BHTD.shape[1] // k_BKTD.shape[1]
    k, v = k_BKTD.repeat_interleave(groups, 1), v_BKTD.repeat_interleave(groups, 1)
    scores = q_BHTD @ k.transpose(-1, -2) * scaling
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return (scores.masked_fill(later, -torch.inf).softmax(-1) @ v).transpose(1, 2)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1)])
def test_equals_attention_of_each_sample_alone_in_values_and_gradients(heads: int, kv_heads: int) -> None:
    inputs = packed(heads, kv_heads)
    out, weights = attention.segment_attention(nn.Module(), *inputs, None, scaling=0.3, cu_seq_lens_q=ends(LENGTHS))
    assert weights is None
    direction = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad((out * direction).sum(), inputs)

    alone = [x.detach().clone().requires_grad_() for x in inputs]
    expected = torch.cat(
        [written_out(*parts, 0.3) for parts in zip(*(x.split(LENGTHS, 2) for x in alone), strict=True)], 1
    )
    expected_gradients = torch.autograd.grad((expected * direction).sum(), alone)

    torch.testing.assert_close(out, expected, rtol=0, atol=1e-10)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-10)


def test_no_gradient_crosses_a_border() -> None:
    inputs = packed(4, 2)
    out, _ = attention.segment_attention(nn.Module(), *inputs, None, scaling=1.0, cu_seq_lens_q=ends(LENGTHS))
    second = slice(LENGTHS[0], LENGTHS[0] + LENGTHS[1])
    for gradient in torch.autograd.grad(out[:, second].pow(2).sum(), inputs):
        assert gradient[:, :, second].abs().sum() > 0
        gradient[:, :, second] = 0
        assert torch.count_nonzero(gradient) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cu_seq_lens_q": None}, "needs cu_seq_lens_q"),
        ({"cu_seq_lens_q": ends([1, 7])}, "from 0 to 8, but the row holds 25 tokens"),
        ({"attention_mask": torch.ones(1, 25)}, "takes one packed row and no attention mask"),
        ({"rows": 2}, "takes one packed row"),
    ],
)
def test_call_that_would_mix_samples_is_an_error(change: dict[str, torch.Tensor | int | None], message: str) -> None:
    options = {"cu_seq_lens_q": ends(LENGTHS), "attention_mask": None, "rows": 1} | change
    query, key, value = (
        x.expand(int(options.pop("rows") if i == 0 else 1), -1, -1, -1) for i, x in enumerate(packed(4, 2))
    )
    with pytest.raises(ValueError, match=message):
        attention.segment_attention(nn.Module(), query, key, value, scaling=1.0, **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def models(tiny_model_folder: Path) -> tuple[nn.Module, nn.Module]:
    """The same weights under segment attention and under transformers' own eager attention."""
    attention.register()
    segments, eager = (
        AutoModelForCausalLM.from_pretrained(tiny_model_folder, attn_implementation=name).eval()
        for name in (attention.SEGMENTS, "eager")
    )
    return segments, eager


def pack_inputs(samples: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    lengths = [len(sample) for sample in samples]
    return {
        "input_ids": torch.cat(samples)[None],
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "cu_seq_lens_q": ends(lengths),
    }


def some_samples(vocab: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(5, vocab, (length,), generator=generator) for length in (9, 3, 17, 1)]


def test_packed_logits_and_gradients_equal_those_of_samples_alone(models: tuple[nn.Module, nn.Module]) -> None:
    segments, eager = models
    samples = some_samples(segments.config.vocab_size)
    together = segments(**pack_inputs(samples), use_cache=False).logits[0]
    alone = torch.cat([eager(sample[None], use_cache=False).logits[0] for sample in samples])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)

    direction = torch.randn(alone.shape, generator=torch.Generator().manual_seed(1)) / len(alone)
    for model, logits in ((segments, together), (eager, alone)):
        model.zero_grad()
        (logits * direction).sum().backward()
    for (name, ours), theirs in zip(segments.named_parameters(), eager.parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_a_sample_does_not_see_its_neighbours(models: tuple[nn.Module, nn.Module]) -> None:
    segments, _ = models
    samples = some_samples(segments.config.vocab_size)
    others = [samples[0].flip(0), samples[1], samples[2].flip(0), samples[3]]
    kept = slice(9, 12)
    with torch.no_grad():
        first = segments(**pack_inputs(samples), use_cache=False).logits[0]
        second = segments(**pack_inputs(others), use_cache=False).logits[0]
    torch.testing.assert_close(first[kept], second[kept], rtol=0, atol=1e-6)
    assert (first[:9] - second[:9]).abs().max() > 1e-2


def test_model_called_without_segments_is_an_error(models: tuple[nn.Module, nn.Module]) -> None:
    with pytest.raises(ValueError, match="needs cu_seq_lens_q"):
        models[0](torch.ones(1, 4, dtype=torch.long))
