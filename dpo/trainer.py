"""Preference training on TRL's DPOTrainer, with a weight on every token: OT-DPO, and DPO by the same path.

TRL 1.16 has no hook for the loss: its forward returns no hidden states and it caches the reference as sums. So for our
losses `compute_loss` is ours, and the rest (arguments, PEFT, loop, checkpoints, logging) is TRL's. The other losses run
through TRL's own path untouched.

The loss of a step is the sum over its real pairs divided by their number over all ranks and accumulated batches.
`get_batch_samples` counts them before the first forward of the step; `compute_loss` multiplies by the number of ranks,
because DDP and DeepSpeed average gradients over them.

Suffixes: B pairs, N = 2B rows [chosen; rejected], S columns of completions, D model dim.
"""

import dataclasses
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer

from alignment.errors import UserError, did_you_mean
from dpo.data import COLUMNS, PairCollator, ShuffledFillersLast, fill, filler_pair
from dpo.forward import Completions, Way, causal_model, choose_way, completions
from dpo.loss import chosen_nll, weighted_dpo_loss
from dpo.ot import CostNorm, ot_token_weights
from dpo.reference import ReferenceLogps

WEIGHTED_LOSSES = ("ot_dpo", "dpo")
TRL_LOSSES = (
    *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired"),
    *("apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
)
# Settings of TRL's path that the weighted path does not read: refused rather than ignored.
TRL_ONLY = (
    *("ld_alpha", "f_divergence_type", "use_weighting", "label_smoothing", "sync_ref_model", "padding_free"),
    *("loss_weights", "pad_to_multiple_of", "dataloader_drop_last", "train_sampling_strategy"),
)
# Counted, not averaged over pairs.
COUNTERS = ("pairs", "ot/fallbacks", "ot/empty")


@dataclass
class PreferenceArguments(DPOConfig):
    """TRL's DPOConfig with our losses. `loss_type` is one of `ot_dpo`, `dpo`, or any of TRL's."""

    loss_type: list[str] = field(default_factory=lambda: ["ot_dpo"])
    max_length: int | None = None  # no cutting: overlong pairs are dropped where they are tokenized
    ot_reg: float = 1.0
    ot_reg_m: float = 0.2
    ot_mix: float = 1.0
    ot_cost_norm: CostNorm = "max"
    nll_weight: float = 0.0  # of the chosen completion's likelihood, per token

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.loss_type:
            if name not in (*WEIGHTED_LOSSES, *TRL_LOSSES):
                raise UserError(
                    f"loss_type: unknown loss {name!r}{did_you_mean(name, (*WEIGHTED_LOSSES, *TRL_LOSSES))}"
                )
        if len(self.loss_type) > 1 and set(self.loss_type) & set(WEIGHTED_LOSSES):
            raise UserError(f"loss_type: {self.loss_type} mixes ours with TRL's; for a likelihood term set nll_weight")
        if not self.weighted:
            if self.nll_weight:
                raise UserError(f"nll_weight: has no effect on TRL's loss {self.loss_type[0]!r}; its own term is 'sft'")
            return
        for option in dataclasses.fields(self):
            if option.name in TRL_ONLY and getattr(self, option.name) != _default(option):
                raise UserError(f"{option.name}: has no effect on loss_type {self.loss_type[0]!r}; leave it out")
        if self.router_aux_loss_coef:
            raise UserError("router_aux_loss_coef: has no effect on our losses; RouterLossMixin adds router losses")
        self.router_aux_loss_coef = 0.0  # None would be the architecture's own
        # Otherwise TRL keeps a copy of the model as reference; ours is a file of per-token values.
        self.precompute_ref_log_probs = True

    @property
    def weighted(self) -> bool:
        return self.loss_type[0] in WEIGHTED_LOSSES

    @property
    def transport(self) -> bool:
        return self.loss_type[0] == "ot_dpo" and self.ot_mix > 0


def _default(option: "dataclasses.Field[Any]") -> Any:
    # "auto" has become None by now, on everything but Neuron
    return None if option.name == "pad_to_multiple_of" else option.default


class PreferenceTrainer(DPOTrainer):
    """Trains `model` on tokenized pairs (`dpo.data.tokenize_pairs`) with a loss of `PreferenceArguments`.

    For our losses the reference is the model as given. Its per-token log-probabilities are computed through the wrapped
    model before the first step, stored in `output_dir/reference_logps.{train,eval}.safetensors`, and read back on
    resume; a file of other weights or pairs is refused.

    Args:
        model: policy, with its initial weights also when a checkpoint is resumed.
        args: PreferenceArguments.
        train_dataset, eval_dataset: from `tokenize_pairs`, without fillers.
        processing_class: tokenizer.
        weights_hash: identifies the initial weights; computed from `model` when None.
        kwargs: DPOTrainer's (`callbacks`, `optimizers`, `peft_config`, `ref_model` for TRL's losses).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: PreferenceArguments,
        *,
        train_dataset: Dataset,
        processing_class: PreTrainedTokenizerBase,
        eval_dataset: Dataset | None = None,
        weights_hash: str | None = None,
        **kwargs: Any,
    ):
        self.args: PreferenceArguments
        self.model: PreTrainedModel
        self.weighted = args.weighted
        self._pairs = {"train": train_dataset, "eval": eval_dataset}
        self._way: Way | None = None
        self._references: dict[str, ReferenceLogps] = {}
        self._sums: dict[str, defaultdict[str, Tensor | float]] = {k: defaultdict(float) for k in self._pairs}
        if self.weighted:
            if kwargs.get("ref_model") is not None:
                raise UserError(f"ref_model: loss_type {args.loss_type[0]!r} takes the initial weights as reference")
            if weights_hash is None and is_deepspeed_zero3_enabled():
                raise ValueError("weights_hash is needed under ZeRO-3, whose partitioned weights cannot be hashed here")
            token = processing_class.eos_token_id
            pad = processing_class.pad_token_id
            kwargs["data_collator"] = PairCollator(token if pad is None else pad)
            self._filler = filler_pair(token)
            self._real = len(train_dataset)
            micro_batches = args.gradient_accumulation_steps * args.world_size
            train_dataset = fill(train_dataset, args.train_batch_size * micro_batches, token)
            self._filled = len(train_dataset)
            if eval_dataset is not None:
                eval_dataset = fill(eval_dataset, args.eval_batch_size * args.world_size, token)
            # Read by TRL's base class: compute_loss divides by the pairs of the step, the loop must not divide again.
            self.loss_is_scaled_for_ga = True
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        if self.weighted:
            self._weights_hash = str(weights_hash or self._precompute_model_hash)
            self.add_callback(_ReferenceFirst(self))

    # Seams of DPOTrainer.__init__: rows come tokenized, the reference is ours.

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        missing = set(COLUMNS) - set(dataset.column_names)
        if missing:
            raise ValueError(f"dataset lacks {sorted(missing)}: pass it through dpo.data.tokenize_pairs")
        return dataset

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        return dataset if self.weighted else super()._precompute_ref_logps(dataset, name, batch_size)

    def _set_signature_columns_if_needed(self) -> None:
        if self.weighted:
            self._signature_columns = COLUMNS  # type: ignore[assignment]  # transformers types it as None
        else:
            super()._set_signature_columns_if_needed()

    # Batches

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler[int] | None:
        if not self.weighted:
            return super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        # From the state, which a resumed run restores; set_epoch does not reach a sampler behind skipped batches.
        return ShuffledFillersLast(self._real, self._filled, seed, epoch=lambda: int(self.state.epoch or 0))

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """The micro-batches of a step, and its number of real pairs over all ranks."""
        batches, count = super().get_batch_samples(*args, **kwargs)
        if self.weighted and batches:
            pairs = torch.stack([batch["pair_weight"].sum() for batch in batches]).sum()
            count = self.accelerator.reduce(pairs.to(self.args.device), "sum")
        return batches, count

    # Forward

    def _prepare_forward(self) -> None:
        """Find out, once and before the first batch is made, how the model takes pairs. On all ranks."""
        if self._way is None:
            self._way = choose_way(self.model_wrapped, causal_model(self.model))
            cast(PairCollator, self.data_collator).packed = not self._way.padded

    @property
    def forward_metrics(self) -> dict[str, int | str]:
        """Whether pairs took the fast way through the model, and why not; nothing of TRL's losses."""
        return {} if self._way is None else self._way.metrics

    # Reference

    def prepare_references(self) -> None:
        """Compute or read the reference of the training and evaluation pairs. On all ranks, before the first step."""
        self._prepare_forward()
        for name, pairs in self._pairs.items():
            if pairs is None or name in self._references:
                continue
            path = Path(str(self.args.output_dir)) / f"reference_logps.{name}.safetensors"
            # Rank 0 looks, so that no rank waits in a collective that another skips.
            found = [path.exists()]
            broadcast_object_list(found)
            if not found[0]:
                if self.state.global_step > 0:
                    raise UserError(f"{path}: missing, and the weights have moved since step 0; start the run afresh")
                values = self._score_reference(pairs)
                if self.accelerator.is_main_process:
                    ReferenceLogps.save(path, values, pairs, self._weights_hash)
                self.accelerator.wait_for_everyone()
            self._references[name] = ReferenceLogps.load(path, pairs, self._weights_hash)

    def _score_reference(self, pairs: Dataset) -> dict[str, list[Tensor]]:
        """Per side, every pair's log-probabilities in the order of `pairs`; each rank scores its share."""
        model = self.model_wrapped
        model.eval()
        size = self.args.precompute_ref_batch_size or self.args.per_device_train_batch_size
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        lengths = [max(len(c), len(r)) for c, r in zip(pairs["chosen_ids"], pairs["rejected_ids"], strict=True)]
        by_length = sorted(range(len(pairs)), key=lambda row: -lengths[row])
        scored: list[tuple[int, Tensor, Tensor]] = []
        for start in range(0, len(by_length), size * ranks):
            rows = by_length[start : start + size * ranks][rank * size : (rank + 1) * size]
            batch = [pairs[row] for row in rows] + [self._filler] * (size - len(rows))
            inputs = self._prepare_inputs(self.data_collator(batch))
            with torch.no_grad(), self.compute_loss_context_manager():
                completions = self._forward(model, inputs)
            logps, mask = completions.logps.cpu(), completions.mask.cpu()
            for i, row in enumerate(rows):
                scored.append((row, logps[i][mask[i]], logps[size + i][mask[size + i]]))
        scored = sorted(gather_object(scored), key=lambda item: item[0])
        return {"chosen": [item[1] for item in scored], "rejected": [item[2] for item in scored]}

    # Loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Loss of one micro-batch; in training `num_items_in_batch` is the number of real pairs of the whole step."""
        if not self.weighted:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if return_outputs:
            raise NotImplementedError("compute_metrics needs logits, which are not kept")
        mode = "train" if self.model.training else "eval"
        policy = self._forward(model, inputs, hidden=self.args.transport)
        reference = self._references[mode].batch(inputs["row"], policy.mask)
        policy_c, policy_r = policy.logps.chunk(2)
        reference_c, reference_r = reference.chunk(2)
        mask_c, mask_r = policy.mask.chunk(2)
        w_c, w_r, transport = self._token_weights(policy)
        pairs = weighted_dpo_loss(policy_c, policy_r, reference_c, reference_r, w_c, w_r, self.beta)
        nll = chosen_nll(policy_c, mask_c)
        objective = pairs.losses + self.args.nll_weight * nll
        self._add_metrics(
            mode,
            inputs["pair_weight"],
            {
                "objective": objective,
                "preference_loss": pairs.losses,
                "nll": nll,
                "rewards/chosen": pairs.rewards_chosen,
                "rewards/rejected": pairs.rewards_rejected,
                "rewards/margins": pairs.rewards_chosen - pairs.rewards_rejected,
                "rewards/accuracies": (pairs.rewards_chosen > pairs.rewards_rejected).float(),
                "logps_per_token/chosen": _token_mean(policy_c, mask_c),
                "logps_per_token/rejected": _token_mean(policy_r, mask_r),
                "kl": (_k2(policy_c - reference_c, mask_c) + _k2(policy_r - reference_r, mask_r)) / 2,
                **{f"ot/{name}": value for name, value in transport.items()},
            },
        )
        total = (inputs["pair_weight"] * objective).sum()
        if num_items_in_batch is None:
            return total / inputs["pair_weight"].sum().clamp(min=1)
        return total * self.accelerator.num_processes / num_items_in_batch

    def _forward(self, model: nn.Module, inputs: dict[str, Any], hidden: bool = False) -> Completions:
        assert self._way is not None
        return completions(model, causal_model(self.accelerator.unwrap_model(model)), inputs, self._way, hidden)

    def _token_weights(self, policy: Completions) -> tuple[Tensor, Tensor, dict[str, Tensor | float]]:
        mask_c, mask_r = policy.mask.chunk(2)
        if policy.hidden is None:
            return mask_c.float(), mask_r.float(), {}
        hidden_c, hidden_r = policy.hidden.chunk(2)
        w_c, w_r, stats = ot_token_weights(
            hidden_c,
            hidden_r,
            mask_c,
            mask_r,
            reg=self.args.ot_reg,
            reg_m=self.args.ot_reg_m,
            mix=self.args.ot_mix,
            cost_norm=self.args.ot_cost_norm,
        )
        return w_c, w_r, vars(stats)

    # Metrics: summed here, reduced over the ranks once a log line

    def _add_metrics(self, mode: str, pair_weight: Tensor, values: dict[str, Tensor | float]) -> None:
        sums = self._sums[mode]
        sums["pairs"] += pair_weight.sum()
        for name, value in values.items():
            sums[name] += (pair_weight * value.detach()).sum() if isinstance(value, Tensor) else value

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = "train" if self.model.training else "eval"
        if self._sums[mode]:
            metrics = self._drain_metrics(mode)
            objective = metrics.pop("objective")
            if mode == "eval":
                # Trainer's mean over batches would give the pairs beside fillers more weight
                metrics = {f"eval_{name}": value for name, value in metrics.items()} | {"eval_loss": objective}
            logs.update(metrics)
        super().log(logs, start_time)

    def _drain_metrics(self, mode: str) -> dict[str, float]:
        sums = self._sums[mode]
        names = list(sums)
        local = torch.tensor([float(sums[name]) for name in names], dtype=torch.float64, device=self.args.device)
        totals = dict(zip(names, self.accelerator.reduce(local, "sum").tolist(), strict=True))
        sums.clear()
        return {name: value if name in COUNTERS else value / totals["pairs"] for name, value in totals.items()}

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        if self.weighted:
            if eval_dataset is not None:
                raise ValueError(
                    "pass eval_dataset to the constructor: its reference is computed before the first step"
                )
            self.prepare_references()
        metrics: dict[str, float] = super().evaluate(eval_dataset, *args, **kwargs)
        return metrics


class _ReferenceFirst(TrainerCallback):
    """Prepares the reference once the model is wrapped and sharded, before the first step."""

    def __init__(self, trainer: PreferenceTrainer):
        self.trainer = trainer

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.trainer.prepare_references()


def _token_mean(values: Tensor, mask: Tensor) -> Tensor:
    return (values * mask).sum(1) / mask.sum(1).clamp(min=1)


def _k2(logratio: Tensor, mask: Tensor) -> Tensor:
    """Schulman's k2 estimate of the KL per token, on the pairs' tokens rather than the policy's own samples."""
    return _token_mean(logratio.square() / 2, mask)
