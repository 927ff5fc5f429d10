"""Log-probabilities of given tokens from the states that predict them, without the logits of all of them.

Logits exist for a chunk of tokens at a time, in one buffer that every step of the softmax overwrites. The backward
makes them again, so that each token may have a gradient of its own: four matrix products of the head in place of
three, and no [n, V] tensor. Sums over the vocabulary are float32 (float64 of float64), and so is the weight's
gradient until it holds all chunks.

Suffixes: n tokens, c tokens of a chunk, D model dim, V vocabulary.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK = {"cpu": 256}  # tokens whose logits exist at a time
CHUNK_ELSEWHERE = 2048


def token_logps(hidden_nD: Tensor, weight_VD: Tensor, target_n: Tensor, bias_V: Tensor | None = None) -> Tensor:
    """log softmax(W h_n + b)[target_n] for each n: [n], float32 or wider.

    Computed in autocast's dtype where that is on, as a linear layer is, else in that of `hidden_nD`. The gradient of a
    token's logits is g_n (onehot(target_n) - softmax), with g_n that of its log-probability.
    """
    kind = hidden_nD.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden_nD.dtype
    logps_n: Tensor = _TokenLogps.apply(hidden_nD, weight_VD, bias_V, target_n, dtype)
    return logps_n


class _TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_nD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, target_n: Tensor, dtype: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(hidden_nD, weight_VD, bias_V, target_n)
        ctx.dtype = dtype
        picked_n, normaliser_n = hidden_nD.new_empty(2, len(hidden_nD), dtype=_wide(dtype))
        for part, logits_cV in _chunks(hidden_nD.to(dtype), weight_VD.to(dtype), bias_V):
            picked_n[part] = logits_cV.gather(1, target_n[part, None])[:, 0]
            highest_c = logits_cV.amax(1)
            normaliser_n[part] = logits_cV.sub_(highest_c[:, None]).exp_().sum(1).log_() + highest_c
        ctx.normaliser_n = normaliser_n
        return picked_n - normaliser_n

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_n: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, target_n = ctx.saved_tensors
        hidden_nD, weight_VD = hidden.to(ctx.dtype), weight.to(ctx.dtype)
        grad_hidden, grad_weight, grad_bias = (
            torch.zeros_like(x, dtype=_wide(ctx.dtype)) if needed else None
            for x, needed in zip((hidden, weight, bias), ctx.needs_input_grad[:3], strict=True)
        )
        for part, logits_cV in _chunks(hidden_nD, weight_VD, bias):
            grad_c1 = grad_n[part, None]
            wide_cV = logits_cV.sub_(ctx.normaliser_n[part, None]).exp_().mul_(-grad_c1)
            wide_cV.scatter_add_(1, target_n[part, None], grad_c1)
            grad_cV = wide_cV.to(ctx.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = grad_cV @ weight_VD
            if grad_weight is not None:
                _add_product(grad_weight, grad_cV.t(), hidden_nD[part])
            if grad_bias is not None:
                grad_bias += wide_cV.sum(0)
        return _like(grad_hidden, hidden), _like(grad_weight, weight), _like(grad_bias, bias), None, None


def _chunks(hidden_nD: Tensor, weight_VD: Tensor, bias_V: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
    """The logits [c, V] of the tokens of each slice; they last until the next."""
    tokens = len(hidden_nD)
    size = min(tokens, CHUNK.get(hidden_nD.device.type, CHUNK_ELSEWHERE))
    buffer_cV = hidden_nD.new_empty(size, len(weight_VD))
    for start in range(0, tokens, max(1, size)):
        part = slice(start, min(start + size, tokens))
        logits_cV = buffer_cV[: part.stop - start]
        if bias_V is None:
            torch.mm(hidden_nD[part], weight_VD.t(), out=logits_cV)
        else:
            torch.addmm(bias_V.to(logits_cV.dtype), hidden_nD[part], weight_VD.t(), out=logits_cV)
        yield part, logits_cV.to(_wide(logits_cV.dtype))


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, without rounding the product of half-precision tensors before it is added."""
    if total.is_cuda and left.dtype != total.dtype:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(left.to(total.dtype), right.to(total.dtype))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _like(gradient: Tensor | None, given: Tensor) -> Tensor | None:
    return None if gradient is None else gradient.to(given.dtype)
