"""The packed trainer with what keeps an adapter's past.

    L = L_new + beta L_replay + lambda / 2 sum_i F_i (theta_i - theta*_i)^2

Each micro-batch of new rows goes with one pack of replayed rows, in turns; both losses are means over trained tokens.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn

from sft.data import PackedRows
from sft.ewc import Anchor
from sft.loss import IGNORED
from sft.trainer import PackedSFTTrainer


class UpdateTrainer(PackedSFTTrainer):
    """One process.

    Args:
        replay: packs of past rows; None for none.
        replay_weight: beta.
        anchor: the weights to stay near and their Fisher information; None for no such term.
        anchor_weight: lambda.
    """

    def __init__(
        self,
        *args: Any,
        replay: PackedRows | None,
        replay_weight: float,
        anchor: Anchor | None,
        anchor_weight: float,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.replay, self.replay_weight, self.anchor_weight = replay, replay_weight, anchor_weight
        self.anchor = None if anchor is None else anchor.to(self.args.device)
        self._micro = 0
        self._sums_of_terms = {"replay": 0.0, "ewc": 0.0}  # since the last log line
        self._micros_of_terms = 0

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        self._micro = 0  # of the step that begins
        return super().get_batch_samples(*args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if return_outputs or num_items_in_batch is None:
            return loss
        accumulation = self.args.gradient_accumulation_steps
        replayed = self._replay_loss(model, self.state.global_step * accumulation + self._micro)
        penalty = torch.zeros_like(replayed) if self.anchor is None else self.anchor.penalty(trained_parameters(model))
        self._micro += 1
        self._micros_of_terms += 1
        self._sums_of_terms["replay"] += replayed.item()
        self._sums_of_terms["ewc"] += penalty.item()
        return loss + (self.replay_weight * replayed + self.anchor_weight * penalty) / accumulation

    def _replay_loss(self, model: nn.Module, number: int) -> Tensor:
        if self.replay is None:
            return torch.zeros((), device=self.args.device)
        batch = cast(dict[str, Any], self._prepare_inputs(cast(Any, self.replay[number % len(self.replay)])))
        return self._nll(model, batch) / (batch["labels"][:, 1:] != IGNORED).sum()

    def _figures(self) -> dict[str, float]:
        terms = {name: total / max(1, self._micros_of_terms) for name, total in self._sums_of_terms.items()}
        self._sums_of_terms, self._micros_of_terms = dict.fromkeys(terms, 0.0), 0
        return super()._figures() | terms


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Those of the adapter, by name."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
