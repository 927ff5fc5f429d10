"""SwiGLU (Shazeer, arXiv:2002.05202, eq. 6): silu(gate) * up.

DeepSpeed's kernels, which AutoEP's experts run too; Liger's write the gradients over the inputs. They compute in
float32 and round once, where torch rounds silu(gate) first.
Shapes: I expert or MLP width, leading dimensions arbitrary.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

from alignment.kernels import device


def swiglu(gate_I: torch.Tensor, up_I: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, of the shape and dtype of both."""
    if not device.takes_triton(gate_I):
        return functional.silu(gate_I) * up_I
    from deepspeed.ops.triton_ops import swiglu as fused

    return fused(gate_I, up_I)


def swiglu_packed(gate_up: torch.Tensor) -> torch.Tensor:
    """The same where gate and up lie side by side: [..., 2 I] to [..., I]."""
    if not device.takes_triton(gate_up):
        return _Packed.apply(gate_up)
    from deepspeed.ops.triton_ops.swiglu_triton import swiglu_packed as fused

    return fused(gate_up)


class _Packed(torch.autograd.Function):
    """Keeps its input only, and writes both gradients into one tensor; autograd keeps three tensors and joins two."""

    @staticmethod
    def forward(ctx: Any, gate_up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate_up)
        gate_I, up_I = gate_up.chunk(2, dim=-1)
        return functional.silu(gate_I).mul_(up_I)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_I: torch.Tensor) -> torch.Tensor:
        (gate_up,) = ctx.saved_tensors
        gate_I, up_I = gate_up.chunk(2, dim=-1)
        grad_gate_up = torch.empty_like(gate_up)
        grad_gate_I, grad_up_I = grad_gate_up.chunk(2, dim=-1)
        scratch_I = functional.silu(gate_I)
        torch.mul(grad_I, scratch_I, out=grad_up_I)
        torch.mul(grad_I, up_I, out=scratch_I)
        torch.ops.aten.silu_backward.grad_input(scratch_I, gate_I, grad_input=grad_gate_I)
        return grad_gate_up
