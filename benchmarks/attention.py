"""Segment attention against SDPA with a block-diagonal mask, forward and backward, on one thread.

    python -m benchmarks.attention

The peer's mask is made beforehand, as transformers makes it once for all layers. Shapes: T tokens, H heads, D width.
"""

import numpy as np
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from alignment.attention import segment_attention
from benchmarks import in_turns, speedup

SEGMENTS, HEADS, WIDTH, SIGMA = 16, 8, 32, 0.5
CASES = {1024: ("attention.segments_speedup_1k", 21), 4096: ("attention.segments_speedup_4k", 5)}


def draw_lengths(tokens: int) -> list[int]:
    """Log-normal lengths of the segments, which add up to `tokens`."""
    shares = np.exp(np.random.default_rng(0).normal(0, SIGMA, SEGMENTS))
    ends = np.rint(shares.cumsum() / shares.sum() * tokens).astype(int)
    return [int(length) for length in np.diff(ends, prepend=0)]


def block_diagonal(lengths: list[int]) -> torch.Tensor:
    """[1, 1, T, T]: a token sees its own segment, up to itself."""
    segment_T = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return (segment_T[:, None] == segment_T).tril()[None, None]


def measure(tokens: int, claim: str, rounds: int) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, HEADS, tokens, WIDTH, generator=generator).requires_grad_() for _ in range(3)]
    query, key, value = inputs
    gradient_1THD = torch.randn(1, tokens, HEADS, WIDTH, generator=generator)
    lengths = draw_lengths(tokens)
    ends = torch.tensor([0, *lengths]).cumsum(0)
    mask = block_diagonal(lengths)
    module = nn.Module()

    def ours() -> tuple[torch.Tensor, ...]:
        out, _ = segment_attention(module, query, key, value, None, scaling=WIDTH**-0.5, cu_seq_lens_q=ends)
        return out, *torch.autograd.grad(out, inputs, gradient_1THD)

    def theirs() -> tuple[torch.Tensor, ...]:
        out = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=WIDTH**-0.5).transpose(1, 2)
        return out, *torch.autograd.grad(out, inputs, gradient_1THD)

    torch.testing.assert_close(ours(), theirs(), atol=1e-5, rtol=1e-5)
    seconds = in_turns(ours, theirs, rounds)
    settings = {"tokens": tokens, "segments": SEGMENTS, "longest": max(lengths), "heads": HEADS, "head_dim": WIDTH}
    peer = f"torch {torch.__version__} SDPA, block-diagonal mask"
    speedup(claim, peer, seconds, rounds, **settings, threads=1, dtype="float32")


def main() -> None:
    torch.set_num_threads(1)
    for tokens, (claim, rounds) in CASES.items():
        measure(tokens, claim, rounds)


if __name__ == "__main__":
    main()
