"""Rotary position embedding (Su et al., arXiv:2104.09864, eq. 34), in the two layouts that checkpoints have.

    interleaved   pairs (0, 1), (2, 3), ...: Ernie 4.5
    halves        pairs (0, D/2), (1, D/2 + 1), ...: Llama, Mistral, Qwen

One kernel of ours for both. Liger's for the first layout (llama4_rope) has one position a column for all rows of a
batch, which is wrong for left-padded rows; its other one computes in bf16; both write over query and key. DeepSpeed's
knows the second layout only, not in float32.
Shapes: B rows, H heads, T tokens, D head width, P = D / 2 pairs; cos and sin are [B or 1, T, D] and repeat themselves
after the first P.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from alignment.kernels import device

Pair = tuple[torch.Tensor, torch.Tensor]


def rotate_interleaved(
    query_BHTD: torch.Tensor, key_BHTD: torch.Tensor, cos_BTD: torch.Tensor, sin_BTD: torch.Tensor
) -> Pair:
    """Query and key rotated by their positions' angles, in float32 and rounded to their own dtype."""
    return _rotated(query_BHTD, cos_BTD, sin_BTD, True), _rotated(key_BHTD, cos_BTD, sin_BTD, True)


def rotate_halves(
    query_BHTD: torch.Tensor, key_BHTD: torch.Tensor, cos_BTD: torch.Tensor, sin_BTD: torch.Tensor
) -> Pair:
    """The same for the other layout; transformers rounds the products too where cos and sin are bf16."""
    return _rotated(query_BHTD, cos_BTD, sin_BTD, False), _rotated(key_BHTD, cos_BTD, sin_BTD, False)


def _rotated(x_BHTD: torch.Tensor, cos_BTD: torch.Tensor, sin_BTD: torch.Tensor, interleaved: bool) -> torch.Tensor:
    if device.takes_triton(x_BHTD):
        return _Rotate.apply(x_BHTD, cos_BTD, sin_BTD, interleaved)
    return reference(x_BHTD, cos_BTD, sin_BTD, interleaved)


def reference(x_BHTD: torch.Tensor, cos_BTD: torch.Tensor, sin_BTD: torch.Tensor, interleaved: bool) -> torch.Tensor:
    pairs = x_BHTD.shape[-1] // 2
    cos_B1TP, sin_B1TP = cos_BTD[:, None, :, :pairs].float(), sin_BTD[:, None, :, :pairs].float()
    sides = x_BHTD.float().unflatten(-1, (pairs, 2) if interleaved else (2, pairs))
    dim = -1 if interleaved else -2
    first, second = sides.unbind(dim)
    rotated = torch.stack((first * cos_B1TP - second * sin_B1TP, second * cos_B1TP + first * sin_B1TP), dim)
    return rotated.flatten(-2).to(x_BHTD.dtype)


class _Rotate(torch.autograd.Function):
    """The gradient is the rotation by the opposite angle."""

    @staticmethod
    def forward(
        ctx: Any, x_BHTD: torch.Tensor, cos_BTD: torch.Tensor, sin_BTD: torch.Tensor, interleaved: bool
    ) -> torch.Tensor:
        ctx.save_for_backward(cos_BTD, sin_BTD)
        ctx.interleaved = interleaved
        return _launch(x_BHTD, cos_BTD, sin_BTD, interleaved, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BHTD: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        cos_BTD, sin_BTD = ctx.saved_tensors
        return _launch(grad_BHTD, cos_BTD, sin_BTD, ctx.interleaved, -1), None, None, None


def _launch(
    x_BHTD: torch.Tensor, cos_BTD: torch.Tensor, sin_BTD: torch.Tensor, interleaved: bool, sign: int
) -> torch.Tensor:
    x_BHTD = x_BHTD if x_BHTD.stride(-1) == 1 else x_BHTD.contiguous()
    out_BHTD = torch.empty_like(x_BHTD)  # keeps the strides: heads lie within a token, as projections write them
    rows, heads, tokens, width = x_BHTD.shape
    cos_BTD, sin_BTD = (table.expand(rows, -1, -1) for table in (cos_BTD, sin_BTD))
    assert cos_BTD.stride() == sin_BTD.stride() and cos_BTD.stride(-1) == 1
    if x_BHTD.numel() == 0:
        return out_BHTD
    _rotate_kernel[(rows * tokens,)](
        x_BHTD,
        out_BHTD,
        cos_BTD,
        sin_BTD,
        tokens,
        heads,
        width // 2,
        *x_BHTD.stride()[:3],
        *out_BHTD.stride()[:3],
        *cos_BTD.stride()[:2],
        SIGN=sign,
        STEP=2 if interleaved else 1,
        ACROSS=1 if interleaved else width // 2,
        HEADS=triton.next_power_of_2(heads),
        PAIRS=triton.next_power_of_2(width // 2),
    )
    return out_BHTD


@triton.jit  # type: ignore[untyped-decorator]
def _rotate_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    out_ptr,
    cos_ptr,
    sin_ptr,
    tokens,
    heads,
    pairs,
    x_row,
    x_head,
    x_token,
    out_row,
    out_head,
    out_token,
    table_row,
    table_token,
    SIGN: tl.constexpr,
    STEP: tl.constexpr,
    ACROSS: tl.constexpr,
    HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """One program a token: its angles are read once for all heads. Pair p is at p * STEP and p * STEP + ACROSS."""
    row = tl.program_id(0).to(tl.int64) // tokens
    token = tl.program_id(0).to(tl.int64) % tokens
    pair = tl.arange(0, PAIRS)
    angle = row * table_row + token * table_token + pair
    cos = tl.load(cos_ptr + angle, mask=pair < pairs, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(sin_ptr + angle, mask=pair < pairs, other=0.0).to(tl.float32)[None, :] * SIGN

    head = tl.arange(0, HEADS)[:, None, None]
    column = pair[None, :, None] * STEP + tl.arange(0, 2)[None, None, :] * ACROSS
    inside = (head < heads) & (pair[None, :, None] < pairs)
    x = tl.load(x_ptr + row * x_row + token * x_token + head * x_head + column, mask=inside, other=0.0)
    first, second = tl.split(x.to(tl.float32))
    rotated = tl.join(first * cos - second * sin, second * cos + first * sin)
    target = out_ptr + row * out_row + token * out_token + head * out_head + column
    tl.store(target, rotated.to(out_ptr.dtype.element_ty), mask=inside)
