"""Routed experts: permute, grouped GEMM, SwiGLU, grouped GEMM, restore.

Registered with transformers' interface for experts, so every family takes it whose experts are SwiGLU without biases in
stacked weights. Expert parallelism has experts of DeepSpeed's own.
Shapes: T tokens, K experts a token, R = T K rows, E experts, D model dim, I expert width.
"""

from typing import Any

import torch
from torch import nn
from transformers.activations import SiLUActivation
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _default_apply_gate

from alignment.kernels.dispatch import permute, restore, routes
from alignment.kernels.swiglu import swiglu_packed

FUSED = "one_pass"
ALIGNMENT = 16  # bytes: what torch's grouped GEMM wants of strides on a GPU; the groups themselves may be ragged


def register() -> None:
    """Make `experts_implementation="one_pass"` known to transformers."""
    ALL_EXPERTS_FUNCTIONS.register(FUSED, experts_forward)


def experts_forward(
    module: Any, hidden_TD: torch.Tensor, expert_TK: torch.Tensor, score_TK: torch.Tensor
) -> torch.Tensor:
    """sum_k score[t, k] * down_e(silu(gate_e(x_t)) * up_e(x_t)) with e = expert[t, k], which lies in [0, E).

    `module` holds gate_up_proj [E, 2 I, D] and down_proj [E, D, I]. Returns [T, D] in the dtype of `hidden_TD`.
    """
    dtype = _compute_dtype(module.gate_up_proj)
    to = routes(expert_TK, module.num_experts)
    rows_RD = permute(hidden_TD.to(dtype), to)
    gate_up_R = _grouped_linear(rows_RD, module.gate_up_proj, to.ends_E)
    rows_RD = _grouped_linear(swiglu_packed(gate_up_R), module.down_proj, to.ends_E)
    return restore(rows_RD, score_TK, to).to(hidden_TD.dtype)


def _grouped_linear(rows: torch.Tensor, weight_E: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    # Its backward refuses gradients of stride 0, such as those of `sum`: what follows here always writes dense ones.
    return nn.functional.grouped_mm(rows, weight_E.to(rows.dtype).transpose(-2, -1), offs=ends_E)


def _compute_dtype(weight: torch.Tensor) -> torch.dtype:
    """Autocast does not know grouped GEMMs, and in float32 a GPU has no fast one."""
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


def why_not(module: nn.Module, on_gpu: bool) -> str | None:
    """Why these experts cannot run here; None where they can."""
    experts: Any = module
    weight = getattr(module, "gate_up_proj", None)
    if weight is None or experts.has_bias or experts.is_transposed or not experts.is_concatenated:
        return "their weights are not gate and up stacked in one tensor without biases"
    if type(experts)._apply_gate is not _default_apply_gate or not isinstance(experts.act_fn, SiLUActivation | nn.SiLU):
        return "their activation is not SwiGLU"
    _, packed, model_dim = getattr(weight, "ds_shape", weight.shape)  # ZeRO-3 keeps an empty tensor here
    widths = (model_dim, packed // 2)
    if on_gpu and any(width * weight.element_size() % ALIGNMENT for width in widths):
        return f"grouped GEMMs want rows of a multiple of {ALIGNMENT} bytes, not widths of {widths[0]} and {widths[1]}"
    return None
