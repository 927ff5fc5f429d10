"""RMSNorm (Zhang and Sennrich, arXiv:1910.07467, eq. 4) as the Llama family rounds it.

Liger's kernels, because they round where transformers' modules round and take any width; DeepSpeed's stop at 2,048.
Shapes: D model dim, leading dimensions arbitrary.
"""

import torch

from alignment.kernels import device


def rms_norm(x_D: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """weight * x / sqrt(mean(x^2) + eps); statistics in float32, the quotient rounded to x's dtype. Shape of x."""
    if not device.takes_triton(x_D):
        return reference(x_D, weight_D, eps)
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    # Liger returns x's dtype; a weight of another dtype is left out of the kernel, so that torch promotes as always.
    # Not in place: Liger would overwrite the gradient it is given, which may be someone else's too.
    fused = weight_D if weight_D.dtype == x_D.dtype else None
    out_D: torch.Tensor = LigerRMSNormFunction.apply(x_D, fused, eps, 0.0, "llama", False)
    return out_D if fused is not None else weight_D * out_D


def reference(x_D: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    wide_D = x_D.float()
    return weight_D * (wide_D * torch.rsqrt(wide_D.pow(2).mean(-1, keepdim=True) + eps)).to(x_D.dtype)
