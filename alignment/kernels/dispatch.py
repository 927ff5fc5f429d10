"""The dispatch of tokens to experts and back, one pass over the rows each way.

    permute   forward: gather of each token's row into expert order; backward: per token the sum over its K rows
    restore   forward: per token the weighted sum over its K rows; backward: gradients of rows and scores together

Sums are float32 and in slot order: no atomics, the same bits each time. On a GPU they are DeepSpeed's AutoEP kernels
(`fused_weighted_restore`); the sum without weights is the same kernel with ones.
Shapes: T tokens, K experts a token, R = T K rows in expert order, E experts, D model dim.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding_bag

from alignment.kernels import device


@dataclass(frozen=True)
class Routes:
    """Which row every slot of a token goes to, and where each expert's rows end (int32, as grouped GEMMs want)."""

    slot_R: torch.Tensor
    row_TK: torch.Tensor
    ends_E: torch.Tensor

    def tokens(self) -> torch.Tensor:
        """The token of each row: [R]."""
        return self.slot_R // self.row_TK.shape[1]


def routes(expert_TK: torch.Tensor, num_experts: int) -> Routes:
    """Rows sorted by expert, in token order within each. Nothing waits for a GPU.

    Every entry of `expert_TK` lies in [0, num_experts).
    """
    expert_R, slot_R = expert_TK.reshape(-1).sort(stable=True)
    row_R = torch.empty_like(slot_R)
    row_R[slot_R] = torch.arange(len(slot_R), device=slot_R.device)
    experts_E = torch.arange(num_experts, device=expert_R.device, dtype=expert_R.dtype)
    ends_E = torch.searchsorted(expert_R, experts_E, right=True, out_int32=True)
    return Routes(slot_R, row_R.view(expert_TK.shape), ends_E)


def permute(x_TD: torch.Tensor, to: Routes) -> torch.Tensor:
    """Each token's row once for each of its experts, in expert order: [R, D]."""
    return _Permute.apply(x_TD, to)


def restore(rows_RD: torch.Tensor, score_TK: torch.Tensor, to: Routes) -> torch.Tensor:
    """The sum of each token's rows weighted by its scores: [T, D], in the rows' dtype."""
    if device.takes_triton(rows_RD):
        return _fused_weighted_sum(rows_RD, score_TK, to)
    return _Restore.apply(rows_RD, score_TK, to)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: torch.Tensor, to: Routes) -> torch.Tensor:
        ctx.to = to
        return x_TD.index_select(0, to.tokens())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RD: torch.Tensor) -> tuple[torch.Tensor, None]:
        if not device.takes_triton(grad_RD):
            return _weighted_sum(grad_RD, None, ctx.to), None
        ones_TK = torch.ones(ctx.to.row_TK.shape, device=grad_RD.device)
        return _fused_weighted_sum(grad_RD, ones_TK, ctx.to), None


class _Restore(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_RD: torch.Tensor, score_TK: torch.Tensor, to: Routes) -> torch.Tensor:
        ctx.save_for_backward(rows_RD, score_TK)
        ctx.to = to
        return _weighted_sum(rows_RD, score_TK, to)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        rows_RD, score_TK = ctx.saved_tensors
        grad_RD = grad_TD.index_select(0, ctx.to.tokens()).float()
        grad_score_R = (rows_RD * grad_RD).sum(1)
        score_R = score_TK.reshape(-1)[ctx.to.slot_R].float()
        grad_rows_RD = grad_RD.mul_(score_R[:, None]).to(rows_RD.dtype)
        return grad_rows_RD, grad_score_R[ctx.to.row_TK].to(score_TK.dtype), None


def _weighted_sum(rows_RD: torch.Tensor, score_TK: torch.Tensor | None, to: Routes) -> torch.Tensor:
    score_TK = None if score_TK is None else score_TK.float()
    summed_TD = embedding_bag(to.row_TK, rows_RD.float(), mode="sum", per_sample_weights=score_TK)
    return summed_TD.to(rows_RD.dtype)


def _fused_weighted_sum(rows_RD: torch.Tensor, score_TK: torch.Tensor, to: Routes) -> torch.Tensor:
    from deepspeed.ops.triton_ops.autoep_fused_token_ops import fused_weighted_restore

    tokens, top_k = score_TK.shape
    out_1TD = fused_weighted_restore(rows_RD, score_TK, to.slot_R, top_k, (1, tokens, rows_RD.shape[1]))
    return out_1TD[0]
