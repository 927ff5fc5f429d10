"""Fused kernels, each beside its torch reference, and their choice for a model: `kernels: auto | torch`."""
