"""Shapes: B rows (1), H query heads, K key-value heads, T tokens, D head width."""

import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from alignment import attention
from alignment.attention import Choice, choose
from alignment.errors import UserError

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


def written_out(
    q_BHTD: torch.Tensor, k_BKTD: torch.Tensor, v_BKTD: torch.Tensor, scaling: float, window: int | None = None
) -> torch.Tensor:
    """Causal attention of one sample, by its definition. Returns [B, T, H, D]."""
    groups = q_BHTD.shape[1] // k_BKTD.shape[1]
    k, v = k_BKTD.repeat_interleave(groups, 1), v_BKTD.repeat_interleave(groups, 1)
    scores = q_BHTD @ k.transpose(-1, -2) * scaling
    at = torch.arange(scores.shape[-1])
    back = at[:, None] - at
    unseen = (back < 0) | (back >= (window or len(at)))
    return (scores.masked_fill(unseen, -torch.inf).softmax(-1) @ v).transpose(1, 2)


def samples_alone(inputs: list[torch.Tensor], scaling: float, window: int | None = None) -> torch.Tensor:
    parts = zip(*(x.split(LENGTHS, 2) for x in inputs), strict=True)
    return torch.cat([written_out(*part, scaling, window) for part in parts], 1)


KERNELS = ("per segment", "block-diagonal", "torch varlen", "flash-attn")


@pytest.fixture
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """One kernel for all calls; the two of CUDA stand in for themselves, with the arguments that they document."""
    monkeypatch.setattr(attention, "choose", lambda *_: Choice(request.param))
    if request.param in ("torch varlen", "flash-attn"):
        import torch.nn.attention.varlen

        monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", varlen_attn)
        monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func))
    return request.param


def varlen_attn(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seq_q: torch.Tensor, cu_seq_k: torch.Tensor,
    max_q: int, max_k: int, *, scale: float, window_size: tuple[int, int], enable_gqa: bool,
) -> torch.Tensor:  # fmt: skip
    """torch's, on [T, heads, D]: a query sees `window_size[0]` tokens before itself, all where that is -1."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert torch.equal(cu_seq_q, cu_seq_k)
    assert max_q == max_k == max(LENGTHS)
    assert enable_gqa == (query.shape[1] != key.shape[1])
    left, right = window_size
    assert right == 0
    rows = [x.transpose(0, 1)[None] for x in (query, key, value)]
    outs = [
        written_out(*(x[:, :, start:end] for x in rows), scale, None if left == -1 else left + 1)
        for start, end in pairwise(cu_seq_q.tolist())
    ]
    return torch.cat(outs, 1)[0]


def flash_attn_varlen_func(
    *inputs: Any, dropout_p: float, softmax_scale: float, causal: bool, window_size: tuple[int, int]
) -> torch.Tensor:
    assert causal
    assert dropout_p == 0.0
    grouped = inputs[0].shape[1] != inputs[1].shape[1]
    return varlen_attn(*inputs, scale=softmax_scale, window_size=window_size, enable_gqa=grouped)


@pytest.mark.parametrize("kernel", KERNELS, indirect=True)
@pytest.mark.parametrize("window", [None, 1, 5, 7, 12])  # the longest segment has 12
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2)])
def test_equals_attention_of_each_sample_alone_in_values_and_gradients(
    kernel: str, window: int | None, heads: int, kv_heads: int
) -> None:
    inputs = packed(heads, kv_heads)
    out, weights = attention.segment_attention(
        nn.Module(), *inputs, None, scaling=0.3, sliding_window=window, cu_seq_lens_q=ends(LENGTHS)
    )
    assert weights is None
    direction = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad((out * direction).sum(), inputs)

    expected = samples_alone(inputs, 0.3, window)
    expected_gradients = torch.autograd.grad((expected * direction).sum(), inputs)

    torch.testing.assert_close(out, expected, rtol=0, atol=1e-10)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kernel", ["per segment", "block-diagonal"], indirect=True)
def test_values_may_be_narrower_than_keys(kernel: str) -> None:
    """As latent attention has it."""
    query, key, value = packed(4, 4)
    inputs = [query, key, value[..., :3]]
    out, _ = attention.segment_attention(nn.Module(), *inputs, None, cu_seq_lens_q=ends(LENGTHS))
    torch.testing.assert_close(out, samples_alone(inputs, D**-0.5), rtol=0, atol=1e-10)


def test_torch_varlen_takes_what_it_is_given() -> None:
    """The real function on tensors without data: its schema holds the arguments, there and back."""
    inputs = [torch.empty(1, h, 25, D, dtype=torch.bfloat16, device="meta", requires_grad=True) for h in (4, 2, 2)]
    end = torch.empty(6, dtype=torch.int32, device="meta")
    out = attention._torch_varlen(attention.Call(*inputs, ends=end, longest=12, window=5, scaling=0.3, dropout=0.0))
    gradients = torch.autograd.grad(out.sum(), inputs)
    assert out.shape == (1, 25, 4, D)
    assert [gradient.shape for gradient in gradients] == [x.shape for x in inputs]


def gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], flash_attn: bool = False) -> None:
    choose.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(attention, "find_spec", lambda name: name if flash_attn else None)


HALF, FULL = torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    ("capability", "flash_attn", "asked", "kernel", "reason"),
    [
        ((9, 0), False, (HALF, 128, 128), "torch varlen", ""),
        ((9, 0), True, (HALF, 128, 128), "torch varlen", ""),
        ((9, 0), True, (FULL, 128, 128), "per segment", ""),
        ((8, 6), False, (HALF, 192, 192), "torch varlen", ""),
        ((8, 6), True, (HALF, 256, 256), "flash-attn", ""),
        ((8, 6), False, (HALF, 256, 256), "per segment", "heads of at most 192 on sm_86; flash-attn can"),
        ((9, 0), True, (HALF, 100, 100), "flash-attn", ""),
        ((9, 0), True, (HALF, 128, 128, 0.1), "flash-attn", ""),
        ((9, 0), False, (HALF, 128, 128, 0.1), "per segment", "no dropout"),
        ((9, 0), True, (HALF, 192, 128), "per segment", "heads of 192 and 128"),
        ((9, 0), True, (HALF, 512, 512), "per segment", "up to 256"),
        ((7, 5), True, (HALF, 128, 128), "per segment", "sm_75 is older than sm_80"),
    ],
)
def test_kernel_on_cuda(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], flash_attn: bool, asked: Any, kernel: str, reason: str
) -> None:
    gpu(monkeypatch, capability, flash_attn)
    choice = choose(torch.device("cuda", 0), *asked)
    choose.cache_clear()
    assert choice.kernel == kernel
    assert reason in choice.reason
    assert bool(reason) == bool(choice.reason)


def test_kernel_elsewhere() -> None:
    assert choose(torch.device("cpu"), HALF, 64, 64) == Choice("per segment")
    assert choose(torch.device("mps"), HALF, 64, 64) == Choice(
        "block-diagonal", "no kernel for segments is known on mps"
    )


def test_fallback_is_counted_and_logged_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(attention, "choose", lambda *_: Choice("block-diagonal", "for a test"))
    monkeypatch.setattr(attention, "fallbacks", attention.Counter())
    for _ in range(3):
        attention.segment_attention(nn.Module(), *packed(4, 2), None, cu_seq_lens_q=ends(LENGTHS))
    assert attention.fallbacks == {"torch's fused attention under a block-diagonal mask: for a test": 3}
    assert len(caplog.records) == 1
    assert "block-diagonal mask: for a test" in caplog.text


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"softcap": 50.0}, "softcap=50.0"),
        ({"s_aux": torch.zeros(4)}, "s_aux"),
        ({"position_bias": torch.zeros(1)}, "position_bias"),
        ({"output_attentions": True}, "output_attentions=True"),
        ({"is_causal": False}, "is_causal=False"),
        ({"a_new_thing": 3}, "a_new_thing=3"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(asked: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=f"Module asks its attention for {named}, which packed training cannot honour"):
        attention.segment_attention(nn.Module(), *packed(4, 2), None, cu_seq_lens_q=ends(LENGTHS), **asked)


def test_what_says_nothing_is_let_through() -> None:
    asked = {"softcap": None, "s_aux": None, "output_attentions": False, "num_items_in_batch": 3, "is_causal": True}
    inputs = packed(4, 2)
    out, _ = attention.segment_attention(nn.Module(), *inputs, None, cu_seq_lens_q=ends(LENGTHS), **asked)
    torch.testing.assert_close(out, samples_alone(inputs, D**-0.5), rtol=0, atol=1e-10)


def test_autocast_reaches_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms of queries and keys leave them in float32, which only fused attention would cast by itself."""
    seen: list[torch.dtype] = []
    monkeypatch.setattr(attention, "choose", lambda _, dtype, *__: seen.append(dtype) or Choice("per segment"))
    query, key, value = (x.float() for x in packed(4, 2))
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = attention.segment_attention(
            nn.Module(), query, key, value.bfloat16(), None, cu_seq_lens_q=ends(LENGTHS)
        )
    assert (seen, out.dtype) == ([torch.bfloat16], torch.bfloat16)


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
        ({"cu_seq_lens_q": ends([1, 24])[1:]}, "from 1 to 25"),
        ({"cu_seq_lens_k": ends([25])}, "queries and keys have the same segments"),
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


FAMILIES: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 5},
    "qwen2": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    # Its attention is told of no window: only the mask says it.
    "qwen2_moe": {
        "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1, "num_experts": 4,
        "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
    },
    "gemma3_text": {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
}  # fmt: skip


def tiny(family: str, attn: str, **options: Any) -> PreTrainedModel:
    attention.register()
    config = AutoConfig.for_model(
        family, vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, pad_token_id=0, initializer_range=0.2, **options,
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attn).eval()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("reference", ["sdpa", "eager"])
def test_sliding_windows_are_those_of_transformers(family: str, reference: str) -> None:
    ours, theirs = (tiny(family, attn, **FAMILIES[family]) for attn in (attention.SEGMENTS, reference))
    samples = some_samples(64)
    with torch.no_grad():
        together = ours(**pack_inputs(samples), use_cache=False).logits[0]
        alone = torch.cat([theirs(sample[None], use_cache=False).logits[0] for sample in samples])
        wide = tiny(family, reference, **FAMILIES[family] | {"sliding_window": 64})
        without = torch.cat([wide(sample[None], use_cache=False).logits[0] for sample in samples])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    assert (without - alone).abs().max() > 1e-2  # the window makes a difference


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("gemma2", {"sliding_window": 5}, "Gemma2Attention asks its attention for softcap=50.0"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "by a rule of its own"),
        ("llama4_text", {"attention_chunk_size": 5, "num_local_experts": 2, "intermediate_size_mlp": 32},
         "attends in chunks of 5"),
        ("gpt_oss", {"num_local_experts": 2, "num_experts_per_tok": 1}, "GptOssAttention asks its attention for s_aux"),
    ],
)  # fmt: skip
def test_models_that_ask_for_more_are_refused(family: str, options: dict[str, Any], message: str) -> None:
    with torch.no_grad(), pytest.raises(UserError, match=message):
        tiny(family, attention.SEGMENTS, **options)(**pack_inputs(some_samples(64)), use_cache=False)
