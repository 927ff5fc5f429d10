"""A linear layer that is small and decides much: a router's gate, a reward model's head."""

import torch
from torch import nn
from torch.nn import functional


class Fp32Linear(nn.Linear):
    """Computes in float32 whatever the dtype of its input and its weight; DeepSpeed holds both in the model's."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features] to float32 [..., out_features]."""
        bias = None if self.bias is None else self.bias.float()
        with torch.autocast(x.device.type, enabled=False):
            return functional.linear(x.float(), self.weight.float(), bias)
