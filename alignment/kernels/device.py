"""Whether Triton's kernels can run, and on which tensors."""

import functools

import torch

CAPABILITY = (8, 0)  # bf16, and torch's grouped GEMM


@functools.cache
def why_no_triton() -> str | None:
    """Why no Triton kernel can run in this process; None where they can."""
    if not torch.cuda.is_available():
        return "Triton needs an NVIDIA GPU"
    if torch.version.hip is not None:
        return "checked for NVIDIA GPUs only"
    found = torch.cuda.get_device_capability()
    if found < CAPABILITY:
        return f"needs sm_{CAPABILITY[0]}{CAPABILITY[1]}, found sm_{found[0]}{found[1]}"
    return None


def takes_triton(tensor: torch.Tensor) -> bool:
    """Whether kernels take this tensor: a model that was loaded for a GPU may still be called on a CPU."""
    return tensor.is_cuda and why_no_triton() is None
