"""The token exchange of AutoEP's layer on a CPU, with half the passes over memory of DeepSpeed's own.

DeepSpeed 0.19.8 brings tokens into the order of experts with Triton on CUDA; for CPU tensors it fills index lists in a
Python loop, pads every expert to a multiple of 8 rows, and scatters into zeroed buffers, whose gradients accumulate row
by row. Here rows that belong together move as blocks, sums over a token's experts are one pass each way, and nothing is
padded. Router, split sizes, all-to-all and grouped GEMM remain DeepSpeed's, and so does the whole layer on CUDA.

Shapes: B rows, S positions, T = B * S tokens, D model dim, K experts a token, N = T * K routed rows, R rows received,
W ranks of the expert group, L experts of a rank.
"""

from typing import Any

import torch

from alignment.errors import UserError
from alignment.kernels.dispatch import permute, restore, routes


def install_cpu_dispatch() -> None:
    """Give AutoEP's layer this module's forward for CPU tensors; doing it twice changes nothing.

    Raises:
        UserError: DeepSpeed's private names have moved.
    """
    try:
        from deepspeed.module_inject.auto_ep_layer import (
            COMM_BACKEND,
            AutoEPMoELayer,
            RouterOutput,
            _AllToAllV,
            compute_split_plan,
        )

        stock = AutoEPMoELayer._forward
    except (ImportError, AttributeError) as error:
        raise UserError(f"the deepspeed installed here lacks a name that expert parallelism needs: {error}") from error
    if getattr(stock, "is_cpu_dispatch", False):
        return

    def applies(layer: Any, hidden_BSD: torch.Tensor) -> bool:
        folded = layer.folding_group_handles is not None and layer.folding_group_handles.spec.tp_size > 1
        usual = (layer.score_apply, layer.combine_impl, layer.comm_backend) == ("post", "weighted_sum", COMM_BACKEND)
        return hidden_BSD.device.type == "cpu" and usual and not folded and not layer.async_split_plan

    def forward(layer: Any, hidden_BSD: torch.Tensor) -> Any:
        if not applies(layer, hidden_BSD):
            return stock(layer, hidden_BSD)
        x_TD = hidden_BSD.reshape(-1, hidden_BSD.shape[-1])
        routed = RouterOutput(*layer.router(x_TD, layer.expert_bias))
        with torch.no_grad():
            layer.tokens_per_expert.add_(routed.num_tokens_per_expert)
            to = routes(routed.selected_experts, layer.num_experts)
        sizes = (layer.num_experts, layer.ep_size, layer.num_local_experts, layer.ep_group)
        plan = compute_split_plan(routed.selected_experts, *sizes, routed.num_tokens_per_expert)
        sent, received, counts_WL = plan.input_splits, plan.output_splits, plan.local_counts_by_source
        rows_ND = permute(x_TD, to)
        if layer.ep_size > 1:
            rows_ND = _AllToAllV.apply(layer.ep_group, rows_ND, sent, received)  # [R, D] from here
        rows_ND = layer.experts(transpose_blocks(rows_ND, counts_WL), counts_WL.sum(0))
        rows_ND = transpose_blocks(rows_ND, counts_WL.T)
        if layer.ep_size > 1:
            rows_ND = _AllToAllV.apply(layer.ep_group, rows_ND, received, sent)
        out_BSD = restore(rows_ND, routed.top_scores, to).view_as(hidden_BSD)
        return layer._finalize_output(out_BSD, x_TD, hidden_BSD, hidden_BSD.shape[-1])

    forward.is_cpu_dispatch = True  # type: ignore[attr-defined]
    AutoEPMoELayer._forward = forward


def transpose_blocks(rows_RD: torch.Tensor, counts_XY: torch.Tensor) -> torch.Tensor:
    """Rows in blocks (x, y) of these counts, x outermost, with y outermost instead: ranks to experts, or back."""
    if counts_XY.shape[0] == 1 or counts_XY.shape[1] == 1:
        return rows_RD
    blocks = rows_RD.split(counts_XY.flatten().tolist())
    width = counts_XY.shape[1]
    return torch.cat([block for y in range(width) for block in blocks[y::width]])
