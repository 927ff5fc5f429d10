"""Puts the kernels into a model, module by module: other models of the process stay as they are."""

import logging
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.activations import SiLUActivation

from alignment.kernels import experts
from alignment.kernels.device import why_no_triton
from alignment.kernels.rms_norm import rms_norm
from alignment.kernels.swiglu import swiglu

logger = logging.getLogger(__name__)

# Families whose norms, MLPs and rotary functions were compared with the kernels, by the layout of their rotary pairs.
INTERLEAVED = ("ernie4_5", "ernie4_5_moe")
HALVES = ("llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe")


def use_kernels(model: PreTrainedModel, kernels: Literal["auto", "torch"]) -> PreTrainedModel:
    """Let `model` run the kernels that this machine can; `torch` leaves it as transformers made it.

    Weights, names and the saved config stay the same. Returns the model.
    """
    if kernels == "torch":
        return model
    _use_experts(model)
    if why_no_triton() is None:
        _use_triton(model)
    return model


def _use_experts(model: PreTrainedModel) -> None:
    found = [module for module in model.modules() if hasattr(module, "_apply_gate")]
    reasons = {experts.why_not(module, on_gpu=why_no_triton() is None) for module in found} - {None}
    if reasons:
        logger.warning("experts stay with transformers' %s: %s", model.config._experts_implementation, reasons.pop())
    elif found:
        experts.register()
        model.set_experts_implementation(experts.FUSED)


def _use_triton(model: PreTrainedModel) -> None:
    kind = str(model.config.model_type)
    if kind not in INTERLEAVED + HALVES:
        logger.warning("norms, rotary embedding and MLPs stay with transformers' own: %s was not compared", kind)
        return
    for module in model.modules():
        forward = _fused_forward(module, kind)
        if forward is not None:
            vars(module)["forward"] = MethodType(forward, module)


def _fused_forward(module: nn.Module, kind: str) -> Callable[..., Any] | None:
    name = type(module).__name__
    if name.endswith("RMSNorm"):
        return _norm_forward
    if name.endswith("MLP") and isinstance(getattr(module, "act_fn", None), SiLUActivation | nn.SiLU):
        return _mlp_forward
    if "apply_rotary_pos_emb" in type(module).forward.__code__.co_names:
        return _attention_forward(type(module).forward, kind)
    return None


def _norm_forward(module: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    return rms_norm(hidden_states, module.weight, module.variance_epsilon)


def _mlp_forward(module: Any, x: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = module.down_proj(swiglu(module.gate_proj(x), module.up_proj(x)))
    return out


def _attention_forward(forward: Any, kind: str) -> FunctionType:
    """transformers' forward with another rotary function: it looks that up among its globals, so it gets its own."""
    from alignment.kernels.rope import rotate_halves, rotate_interleaved

    rotate = rotate_interleaved if kind in INTERLEAVED else rotate_halves
    names = {**forward.__globals__, "apply_rotary_pos_emb": rotate}
    copy = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    copy.__kwdefaults__ = forward.__kwdefaults__
    return copy
