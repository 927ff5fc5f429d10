"""Elastic weight consolidation: what was learnt is held where it matters (Kirkpatrick et al. 2017, arXiv 1612.00796).

    L(theta) = L_new(theta) + lambda / 2 * sum_i F_i (theta_i - theta*_i)^2                         (their equation 3)

F is the diagonal of the Fisher information of the past rows, per trained token as L_new is. So the sum is, to second
order, twice the rise of the mean KL divergence from the old model on a past token: at lambda = 2 a nat of it costs two.
It is the true Fisher: the labels are drawn from the model at the rows' own contexts, one draw a row. With the rows' own
labels it would be the empirical one, which is another thing where the model does not fit them (Kunstner et al. 2019,
arXiv 1905.12558). Gradients are of one row at a time, before they are squared.

Shapes: T tokens, V vocabulary, N trained tokens of a row.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from alignment import atomic
from sft import data

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Anchor:
    """Where the weights were, and how much each matters to the past rows."""

    weights: Weights
    fisher: Weights

    def penalty(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """sum_i F_i (theta_i - theta*_i)^2 / 2, a scalar."""
        terms = [(self.fisher[name] * (parameters[name] - self.weights[name]) ** 2).sum() for name in self.fisher]
        return torch.stack(terms).sum() / 2

    def to(self, device: torch.device) -> "Anchor":
        return Anchor(
            *({name: value.to(device) for name, value in part.items()} for part in (self.weights, self.fisher))
        )

    def save(self, path: Path) -> None:
        parts = {"weights": self.weights, "fisher": self.fisher}
        flat = {f"{part}/{name}": value for part, values in parts.items() for name, value in values.items()}
        with atomic.replacing(path) as temporary:
            save_file({name: value.cpu().contiguous() for name, value in flat.items()}, temporary)

    @classmethod
    def load(cls, path: Path) -> "Anchor":
        flat = load_file(path)

        def part(name: str) -> Weights:
            return {key.partition("/")[2]: value for key, value in flat.items() if key.startswith(f"{name}/")}

        return cls(part("weights"), part("fisher"))


def diagonal_fisher(parameters: Mapping[str, nn.Parameter], rows: Iterable[tuple[Tensor, int]]) -> Weights:
    """Sum over rows of the squared gradient of each one's log-likelihood, over the number of all tokens.

    Args:
        rows: of each the log-likelihood of labels drawn from the model, a scalar, and how many labels those are.
    """
    sums = {name: torch.zeros_like(weight) for name, weight in parameters.items()}
    tokens = 0
    for log_likelihood, count in rows:
        gradients = torch.autograd.grad(log_likelihood, list(parameters.values()), materialize_grads=True)
        for total, gradient in zip(sums.values(), gradients, strict=True):
            total += gradient.detach() ** 2
        tokens += count
    return {name: total / max(1, tokens) for name, total in sums.items()}


def drawn_log_likelihood(
    model: nn.Module, ids_T: np.ndarray, trained_T: np.ndarray, pad_id: int, generator: torch.Generator
) -> tuple[Tensor, int]:
    """Log-likelihood of labels drawn from the model in the place of a row's trained tokens, and their number."""
    logits_NV = trained_logits(model, ids_T, trained_T, pad_id)
    log_probs_NV = logits_NV.log_softmax(-1)
    drawn_N1 = torch.multinomial(log_probs_NV.detach().exp().cpu(), 1, generator=generator).to(log_probs_NV.device)
    return log_probs_NV.gather(-1, drawn_N1).sum(), len(drawn_N1)


def trained_logits(model: nn.Module, ids_T: np.ndarray, trained_T: np.ndarray, pad_id: int) -> Tensor:
    """[N, V] in float32, those from which a row's trained tokens are predicted."""
    device = next(model.parameters()).device
    made = data.batch(ids_T, trained_T, [len(ids_T)], len(ids_T), pad_id)
    inputs: dict[str, Any] = {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in made.items()
        if name != "labels"
    }
    logits_TV = model(**inputs).logits[0, :-1]
    return logits_TV[torch.from_numpy(trained_T[1:]).to(device)].float()
