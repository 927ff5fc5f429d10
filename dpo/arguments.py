"""The arguments of preference training: TRL's DPOConfig with our losses, and what goes with none of them refused."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from trl.trainer.dpo_config import DPOConfig

from alignment.errors import UserError, did_you_mean
from dpo.config import TransportConfig
from dpo.ot import CostNorm, Metric, Total
from dpo.weights import WeightedLoss

WEIGHTED_LOSSES: tuple[str, ...] = get_args(WeightedLoss)
TRL_LOSSES = (
    *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired"),
    *("apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
)
SORTED_LOSSES = ("aot", "aot_unpaired")
# Settings of TRL's path that ours does not read: refused rather than ignored.
TRL_ONLY = (
    *("ld_alpha", "f_divergence_type", "use_weighting", "label_smoothing", "sync_ref_model", "padding_free"),
    *("loss_weights", "pad_to_multiple_of", "dataloader_drop_last", "train_sampling_strategy"),
)


@dataclass
class PreferenceArguments(DPOConfig):
    """TRL's DPOConfig with our losses. `loss_type` is one of WEIGHTED_LOSSES, or any of TRL's."""

    loss_type: list[str] = field(default_factory=lambda: ["ot_dpo"])
    max_length: int | None = None  # no cutting: overlong pairs are dropped where they are tokenized
    ot_reg: float = 1.0
    ot_reg_m: float = 0.2
    ot_metric: Metric = "euclidean"
    ot_cost_norm: CostNorm = "max"
    ot_total: Total = "min"
    ot_mix: float = 1.0
    nll_weight: float = 0.0  # of the chosen completion's likelihood, per token
    loss_scope: Literal["micro", "global"] = "micro"  # what SORTED_LOSSES sort: TRL's, or all pairs of the step
    reference: Literal["stored", "live"] = "stored"  # a file of per-token values, or a forward at every step

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.loss_type:
            if name not in (*WEIGHTED_LOSSES, *TRL_LOSSES):
                raise UserError(
                    f"loss_type: unknown loss {name!r}{did_you_mean(name, (*WEIGHTED_LOSSES, *TRL_LOSSES))}"
                )
        if len(self.loss_type) > 1 and set(self.loss_type) & set(WEIGHTED_LOSSES):
            raise UserError(f"loss_type: {self.loss_type} mixes ours with TRL's; for a likelihood term set nll_weight")
        if self.loss_scope == "global" and (len(self.loss_type) > 1 or self.loss_type[0] not in SORTED_LOSSES):
            raise UserError(
                f"loss_scope: 'global' has no effect on {self.loss_type}: only {SORTED_LOSSES} compare pairs"
            )
        if self.max_length is not None:
            raise UserError("max_length: nothing is cut here; overlong pairs are dropped by dpo.data.tokenize_pairs")
        # Of TRL's: whether batches bring the reference's values along. What it would compute itself is ours.
        self.precompute_ref_log_probs = self.reference == "stored"
        if not self.ours:
            if self.nll_weight:
                raise UserError(f"nll_weight: has no effect on TRL's loss {self.loss_type[0]!r}; its own term is 'sft'")
            if self.ld_alpha is not None and self.reference == "stored":
                raise UserError("ld_alpha: weighs tokens of the reference too, which takes a live one")
            return
        for option in dataclasses.fields(self):
            if option.name in TRL_ONLY and getattr(self, option.name) != _default(option):
                raise UserError(f"{option.name}: has no effect on loss_type {self.loss_type[0]!r}; leave it out")
        if self.router_aux_loss_coef:
            raise UserError("router_aux_loss_coef: has no effect on our losses; RouterLossMixin adds router losses")
        self.router_aux_loss_coef = 0.0  # None would be the architecture's own

    @property
    def weighted(self) -> bool:
        return self.loss_type[0] in WEIGHTED_LOSSES

    @property
    def ours(self) -> bool:
        """Whether the loss runs through our path; the others through TRL's."""
        return self.weighted or self.loss_scope == "global"

    @property
    def transport(self) -> bool:
        return self.loss_type[0] == "ot_dpo" and self.ot_mix > 0

    @property
    def transport_config(self) -> TransportConfig:
        return TransportConfig(
            reg=self.ot_reg,
            reg_m=self.ot_reg_m,
            metric=self.ot_metric,
            cost_norm=self.ot_cost_norm,
            total=self.ot_total,
            mix=self.ot_mix,
        )


def _default(option: "dataclasses.Field[Any]") -> Any:
    # "auto" has become None by now, on everything but Neuron
    return None if option.name == "pad_to_multiple_of" else option.default
