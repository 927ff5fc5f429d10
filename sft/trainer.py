"""TRL's SFT trainer over packs: their order, the summed loss, the probe before the first step, and live figures."""

import time
from collections.abc import Sized
from typing import Any, cast

import torch
import trl.trainer.utils
from peft import PeftModel
from torch import nn
from torch.utils.data import SequentialSampler
from transformers import PreTrainedModel
from trl.trainer.sft_trainer import SFTTrainer
from trl.trainer.utils import add_fused_lm_head

from alignment.isolation import check_isolation
from alignment.moe.router_trainer import RouterLossMixin
from alignment.moe.trainer import ExpertParallelTrainerMixin
from sft.data import PackedRows, collate, probe
from sft.loss import add_summed_loss, takes_summed_loss

# TRL projects all positions through its fused head unless Triton runs, where it projects the labelled ones only. On a
# CPU that is right too; the name decides nothing else in that module.
vars(trl.trainer.utils).update(_use_triton=lambda _: True)


class SummedLossTrainer(SFTTrainer):
    """The loss of a step: -log p summed over its labelled tokens, of all ranks and micro-batches, over their number.

    What TRL logs besides (entropy, token accuracy) takes the head twice the time, and is left out.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._sums = takes_summed_loss(self._causal_model) and not self.args.bf16
        if self._sums:
            add_summed_loss(self._causal_model)
        else:
            add_fused_lm_head(self._causal_model)  # anew: of its outputs log-probabilities alone

    @property
    def _causal_model(self) -> PreTrainedModel:
        return cast(PreTrainedModel, self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        if return_outputs or num_items_in_batch is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        nll = self._nll(model, inputs)
        # DDP and DeepSpeed average gradients over the ranks. A step of fillers alone has no labels.
        return nll * self.accelerator.num_processes / torch.as_tensor(num_items_in_batch).clamp(min=1)

    def _nll(self, model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        return model(**inputs, summed_loss=True).loss if self._sums else self._fused_nll(model, inputs)

    def _fused_nll(self, model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        return -cast(torch.Tensor, model(**inputs, fused_lm_head=True).log_probs).float().sum()


class PackedSFTTrainer(RouterLossMixin, ExpertParallelTrainerMixin, SummedLossTrainer):
    """Packs in the order of their plan: rank r takes pack i * world + r."""

    def __init__(self, *args: Any, packs: PackedRows, **kwargs: Any) -> None:
        self.plan = packs.plan
        super().__init__(*args, train_dataset=packs.as_dataset(), data_collator=collate, **kwargs)

    def _get_train_sampler(self, *_: Any, **__: Any) -> SequentialSampler:
        return SequentialSampler(cast(Sized, self.train_dataset))

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_for_training(*args, **kwargs)
        model, _ = prepared
        module = self._causal_model
        check_isolation(model, module, module.config.get_text_config().vocab_size, probe)
        self._logged = (self.state.global_step, time.perf_counter())
        return prepared

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs.update(self._figures())
        super().log(logs, start_time)

    def _figures(self) -> dict[str, float]:
        """Speed and packing of the steps since the last line; tokens are those of all ranks."""
        (first, began), (last, now) = self._logged, (self.state.global_step, time.perf_counter())
        self._logged = (last, now)
        steps = self.plan.of_steps(first, last)
        imbalance = steps.imbalance(self.args.world_size)
        return {
            "valid_tokens_per_second": int(steps.tokens.sum()) / (now - began),
            "tokens_per_second": int(steps.widths.sum()) / (now - began),
            "packing/padding_share": steps.padding_share,
            "packing/utilisation": steps.utilisation,
            "packing/imbalance_tokens": imbalance.tokens,
            "packing/imbalance_attention": imbalance.attention,
        }
