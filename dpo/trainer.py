"""Preference training on TRL's DPOTrainer, with a weight on every token: OT-DPO, and DPO by the same path.

TRL 1.16 has no hook for the loss: its forward returns no hidden states and it caches the reference as sums. So for our
losses `compute_loss` is ours, and the rest (arguments, PEFT, loop, checkpoints, logging) is TRL's. The other losses run
through TRL's own path, with our stored reference summed over tokens, or with TRL's live one.

The loss of a step is the sum over its real pairs divided by their number over all ranks and accumulated batches.
`get_batch_samples` counts them before the first forward of the step; `compute_loss` multiplies by the number of ranks,
because DDP and DeepSpeed average gradients over them.

`aot` and `aot_unpaired` in scope `global` compare the sorted values of all pairs of the step, so all are needed before
the first backward: `get_batch_samples` runs every micro-batch without gradient, gathers the sums over the ranks, and
leaves each micro-batch the slopes of its own pairs (dpo.loss.aot_slopes).

Suffixes: B pairs, N = 2B rows [chosen; rejected], S columns of completions, D model dim.
"""

import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import broadcast_object_list, gather_object, is_peft_model
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from trl.models.utils import prepare_deepspeed
from trl.trainer.dpo_trainer import DataCollatorForPreference, DPOTrainer
from trl.trainer.utils import use_adapter

from alignment.errors import UserError
from dpo.alarm import ALARM_MARGIN, ALARM_STEPS, both_fall
from dpo.arguments import PreferenceArguments
from dpo.data import COLUMNS, PairCollator, ShuffledFillersLast, fill, filler_pair
from dpo.forward import Completions, Way, causal_model, choose_way, completions
from dpo.loss import Slopes, aot_slopes, chosen_nll, weighted_dpo_loss
from dpo.ot import PairError
from dpo.reference import ReferenceLogps
from dpo.weights import TokenWeights, WeightedLoss, token_weights

logger = logging.getLogger(__name__)

# How TRL's own path takes pairs: its reference must run as its policy does.
TRLS_WAY = Way(padded="TRL's losses take padded rows", whole_logits="and whole logits")
# Counted, not averaged over pairs.
COUNTERS = ("pairs", "ot/fallbacks", "ot/empty")


@dataclass(frozen=True)
class Ahead:
    """What the pass before a step found out about one of its micro-batches.

    Not a tensor of the batch: DeepSpeed's preparation of inputs would round those to the model's dtype.
    """

    reference: Tensor  # [N, S]
    slopes: Slopes  # of this micro-batch's pairs; the loss is that of the step


class PreferenceTrainer(DPOTrainer):
    """Trains `model` on tokenized pairs (`dpo.data.tokenize_pairs`) with a loss of `PreferenceArguments`.

    A stored reference is, without `reference_hash`, the model as given: its per-token log-probabilities are computed
    through the wrapped model before the first step, stored in `output_dir/reference_logps.{train,eval}.safetensors`,
    and read back on resume; a file of other weights or pairs is refused. A live reference is `ref_model`, or a
    PeftModel with its adapter switched off.

    Args:
        model: policy, with its initial weights also when a checkpoint is resumed.
        args: PreferenceArguments.
        train_dataset, eval_dataset: from `tokenize_pairs`, without fillers.
        processing_class: tokenizer.
        weights_hash: identifies the initial weights; computed from `model` when None.
        reference_hash: of another model that the stored reference is of; its files must be there already, which
            `store_references` of a trainer of that model sees to.
        kwargs: DPOTrainer's (`callbacks`, `optimizers`, `peft_config`, `ref_model`).
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
        reference_hash: str | None = None,
        **kwargs: Any,
    ):
        self.args: PreferenceArguments
        self.model: PreTrainedModel
        self.ours = args.ours
        self._check_reference(model, args, weights_hash or reference_hash, kwargs)
        self._pairs = {"train": train_dataset, "eval": eval_dataset}
        self._way: Way | None = None
        self._references: dict[str, ReferenceLogps] = {}
        self._sums: dict[str, defaultdict[str, Tensor | float]] = {k: defaultdict(float) for k in self._pairs}
        token = processing_class.eos_token_id
        pad = token if processing_class.pad_token_id is None else processing_class.pad_token_id
        self._filler = filler_pair(token)
        self._collate = PairCollator(pad)
        kwargs["data_collator"] = self._collate if self.ours else SequenceCollator(pad)
        if self.ours:
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
        self._from_elsewhere = reference_hash is not None
        self._weights_hash = str(reference_hash or weights_hash or self._precompute_model_hash)
        self._alarms = 0
        self.add_callback(_ReferenceFirst(self))
        if args.loss_scope == "global":
            _check_no_dropout(self.model)

    @staticmethod
    def _check_reference(
        model: nn.Module, args: PreferenceArguments, known_hash: str | None, kwargs: dict[str, Any]
    ) -> None:
        copy, adapted = kwargs.get("ref_model") is not None, is_peft_model(model) or kwargs.get("peft_config")
        if args.reference == "stored" and copy:
            raise ValueError("ref_model: a stored reference is computed by `store_references`; or set reference='live'")
        if args.reference == "stored" and known_hash is None and is_deepspeed_zero3_enabled():
            raise ValueError("weights_hash is needed under ZeRO-3, whose partitioned weights cannot be hashed here")
        if args.reference == "live" and not (copy or adapted):
            raise ValueError("ref_model: a live reference without an adapter to switch off is a copy of the model")

    # Seams of DPOTrainer.__init__: rows come tokenized, the reference is ours.

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        missing = set(COLUMNS) - set(dataset.column_names)
        if missing:
            raise ValueError(f"dataset lacks {sorted(missing)}: pass it through dpo.data.tokenize_pairs")
        return dataset

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        return dataset

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = COLUMNS  # type: ignore[assignment]  # transformers types it as None

    # Batches

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler[int] | None:
        if not self.ours:
            return super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        # From the state, which a resumed run restores; set_epoch does not reach a sampler behind skipped batches.
        return ShuffledFillersLast(self._real, self._filled, seed, epoch=lambda: int(self.state.epoch or 0))

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """The micro-batches of a step, and its number of real pairs over all ranks."""
        batches, count = super().get_batch_samples(*args, **kwargs)
        if self.ours and batches:
            pairs = torch.stack([batch["pair_weight"].sum() for batch in batches]).sum()
            count = self.accelerator.reduce(pairs.to(self.args.device), "sum")
        if self.args.loss_scope == "global" and batches:
            self._look_ahead(batches)
        return batches, count

    @torch.no_grad()
    def _look_ahead(self, batches: list[dict[str, Any]]) -> None:
        """Sort all pairs of the step, of all ranks, and leave every micro-batch the slopes of its own; collective."""
        model = self.model_wrapped
        model.eval()  # no checkpointing; training_step switches back
        references, sums = [], []
        for batch in batches:
            inputs = self._prepare_inputs(batch)
            with self.compute_loss_context_manager():
                policy = self._forward(model, inputs)
                reference = self._reference(model, inputs, policy.mask, "train")
            references.append(reference)
            pairs = [inputs["pair_weight"], *policy.logps.sum(1).chunk(2), *reference.sum(1).chunk(2)]
            sums.append(torch.stack([values.double() for values in pairs], dim=1))
        own = torch.cat(sums)  # as many on every rank
        step = self.accelerator.gather(own)
        real = step[:, 0] > 0
        loss, slopes_c, slopes_r = self._aot(*step[real, 1:].T)
        slopes = torch.zeros_like(step[:, :2])
        slopes[real] = torch.stack([slopes_c, slopes_r], dim=1)
        mine = slopes[self.accelerator.process_index * len(own) :][: len(own)].float()
        parts = mine.split([len(part) for part in sums])
        for batch, reference, part in zip(batches, references, parts, strict=True):
            batch["ahead"] = Ahead(reference, Slopes(loss.float(), *part.unbind(1)))

    def _aot(self, *sums: Tensor) -> Slopes:
        """Of whole completions' log-probabilities: the policy's chosen and rejected, and the reference's; [B] each."""
        paired = self.args.loss_type[0] == "aot"
        return aot_slopes(torch.cat(sums[:2]), torch.cat(sums[2:]), self.beta, paired=paired)

    # Forward

    def _prepare_forward(self) -> None:
        """Find out, once and before the first batch is made, how the model takes pairs. On all ranks."""
        if not self.ours:
            self._way = TRLS_WAY
        if self._way is None:
            self._way = choose_way(self.model_wrapped, causal_model(self.model))
            self._collate.packed = not self._way.padded

    @property
    def forward_metrics(self) -> dict[str, int | str]:
        """Whether pairs took the fast way through the model, and why not; nothing of TRL's losses."""
        return self._way.metrics if self.ours and self._way is not None else {}

    # Reference

    def store_references(self) -> None:
        """Write the reference's files with this trainer's model, for a trainer of another; on all ranks."""
        if self.is_deepspeed_enabled:
            self.model_wrapped = prepare_deepspeed(self.model, self.accelerator)
        else:
            self.model_wrapped = self.accelerator.prepare_model(self.model, evaluation_mode=True)
        self.prepare_references()

    def prepare_references(self) -> None:
        """Compute or read the reference of the training and evaluation pairs. On all ranks, before the first step."""
        if self.ours or self.args.reference == "stored":
            self._prepare_forward()
        if self.args.reference == "live":
            return
        for name, pairs in self._pairs.items():
            if pairs is None or name in self._references:
                continue
            path = reference_file(Path(str(self.args.output_dir)), name)
            # Rank 0 looks, so that no rank waits in a collective that another skips.
            found = [path.exists()]
            broadcast_object_list(found)
            if not found[0]:
                if self.state.global_step > 0:
                    raise UserError(f"{path}: missing, and the weights have moved since step 0; start the run afresh")
                if self._from_elsewhere:
                    raise UserError(f"{path}: missing: the reference is another model, which has to be run first")
                with self._as_reference(self.model_wrapped):
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
            inputs = self._prepare_inputs(self._collate(batch))
            with torch.no_grad(), self.compute_loss_context_manager():
                completions = self._forward(model, inputs)
            logps, mask = completions.logps.cpu(), completions.mask.cpu()
            for i, row in enumerate(rows):
                scored.append((row, logps[i][mask[i]], logps[size + i][mask[size + i]]))
        scored = sorted(gather_object(scored), key=lambda item: item[0])
        return {"chosen": [item[1] for item in scored], "rejected": [item[2] for item in scored]}

    def _reference(self, model: nn.Module, inputs: dict[str, Any], mask_NS: Tensor, mode: str) -> Tensor:
        """[N, S] log-probabilities of the reference at the completion tokens, 0 elsewhere."""
        if self.args.reference == "stored":
            return self._references[mode].batch(inputs["row"], mask_NS)
        with torch.no_grad(), self._as_reference(model) as reference:
            return self._forward(reference, inputs).logps

    @contextmanager
    def _as_reference(self, model: nn.Module) -> Iterator[nn.Module]:
        """The model that answers as the reference does: the frozen copy, or the policy without its adapter.

        Before the first step that is the policy itself.
        """
        policy = self.accelerator.unwrap_model(model)
        if self.ref_model is not None:
            yield self.ref_model
        elif is_peft_model(policy):
            with use_adapter(policy, "ref" if "ref" in policy.peft_config else None):
                yield model
        else:
            yield model

    # Loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Loss of one micro-batch; in training `num_items_in_batch` is the number of real pairs of the whole step."""
        mode = "train" if self.model.training else "eval"
        if not self.ours:
            rows = inputs.pop("row")
            if self.args.reference == "stored":
                inputs["ref_chosen_logps"], inputs["ref_rejected_logps"] = self._references[mode].sums(rows)
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if return_outputs:
            raise NotImplementedError("compute_metrics needs logits, which are not kept")
        policy = self._forward(model, inputs, hidden=self.args.transport)
        ahead: Ahead | None = inputs.get("ahead")
        reference = ahead.reference if ahead else self._reference(model, inputs, policy.mask, mode)
        policy_c, policy_r = policy.logps.chunk(2)
        reference_c, reference_r = reference.chunk(2)
        mask_c, mask_r = policy.mask.chunk(2)
        if self.args.weighted:
            w_c, w_r, transport = self._token_weights(policy, inputs["row"])
        else:
            w_c, w_r, transport = mask_c.float(), mask_r.float(), {}
        pairs = weighted_dpo_loss(policy_c, policy_r, reference_c, reference_r, w_c, w_r, self.beta)
        if not self.args.weighted:
            pairs = pairs._replace(losses=self._sorted_losses(policy, reference, inputs["pair_weight"], ahead))
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
                "logratio_per_token/chosen": _token_mean(policy_c - reference_c, mask_c),
                "logratio_per_token/rejected": _token_mean(policy_r - reference_r, mask_r),
                "tokens/chosen": mask_c.sum(1).float(),
                "tokens/rejected": mask_r.sum(1).float(),
                "kl": (_k2(policy_c - reference_c, mask_c) + _k2(policy_r - reference_r, mask_r)) / 2,
                **{f"ot/{name}": value for name, value in transport.items()},
            },
        )
        total = (inputs["pair_weight"] * objective).sum()
        if num_items_in_batch is None:
            return total / inputs["pair_weight"].sum().clamp(min=1)
        return total * self.accelerator.num_processes / num_items_in_batch

    def _sorted_losses(
        self, policy: Completions, reference: Tensor, pair_weight: Tensor, ahead: Ahead | None
    ) -> Tensor:
        """[B] at every pair the loss of the step, with this pair's own part of its gradient.

        In evaluation, where no pass goes before, the loss of this rank's batch.
        """
        chosen, rejected = policy.logps.sum(1).chunk(2)
        if ahead is None:
            real = pair_weight > 0
            sums = (chosen, rejected, *reference.sum(1).chunk(2))
            loss = self._aot(*(values[real] for values in sums)).loss if real.any() else pair_weight.sum()
            return loss.expand_as(chosen)
        surrogate = ahead.slopes.chosen * chosen + ahead.slopes.rejected * rejected
        return ahead.slopes.loss + surrogate - surrogate.detach()

    def _forward(self, model: nn.Module, inputs: dict[str, Any], hidden: bool = False) -> Completions:
        assert self._way is not None
        return completions(model, causal_model(self.accelerator.unwrap_model(model)), inputs, self._way, hidden)

    def _token_weights(self, policy: Completions, row: Tensor) -> TokenWeights:
        """`row` [B]: the pairs' places in their set, to name the one that has no weights."""
        loss = cast(WeightedLoss, self.args.loss_type[0])
        try:
            return token_weights(loss, policy.mask, policy.hidden, self.args.transport_config)
        except PairError as error:
            pairs = self._pairs["train" if self.model.training else "eval"]
            assert pairs is not None
            place = int(row[error.pair])
            raise UserError(f"row {pairs[place].get('id', place)}: {error.reason}") from None

    def weigh(self, pairs: Sequence[dict[str, Any]]) -> tuple[Tensor, TokenWeights]:
        """The completion mask [N, S] of a few tokenized pairs, and their weights under the present policy.

        On all ranks, with the same pairs.
        """
        inputs = self._prepare_inputs(self.data_collator(list(pairs)))
        self.model_wrapped.eval()
        with torch.no_grad(), self.compute_loss_context_manager():
            policy = self._forward(self.model_wrapped, inputs, hidden=self.args.transport)
        loss = cast(WeightedLoss, self.args.loss_type[0])
        return policy.mask, token_weights(loss, policy.mask, policy.hidden, self.args.transport_config)

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
        if mode == "train":
            self._watch_for_falls()

    def _watch_for_falls(self) -> None:
        before, self._alarms = self._alarms, both_fall(self.state.log_history)
        if self._alarms > before == 0 and self.accelerator.is_main_process:
            logger.warning(
                "step %d: chosen and rejected completions have both been more than %g nats a token less likely than "
                "under the reference for %d steps: raise nll_weight or beta, or lower the learning rate",
                *(self.state.global_step, ALARM_MARGIN, ALARM_STEPS),
            )

    def _drain_metrics(self, mode: str) -> dict[str, float]:
        sums = self._sums[mode]
        names = list(sums)
        local = torch.tensor([float(sums[name]) for name in names], dtype=torch.float64, device=self.args.device)
        totals = dict(zip(names, self.accelerator.reduce(local, "sum").tolist(), strict=True))
        sums.clear()
        return {name: value if name in COUNTERS else value / totals["pairs"] for name, value in totals.items()}

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        if eval_dataset is not None:
            raise ValueError("pass eval_dataset to the constructor: its reference is computed before the first step")
        self.prepare_references()
        metrics: dict[str, float] = super().evaluate(eval_dataset, *args, **kwargs)
        return metrics


class _ReferenceFirst(TrainerCallback):
    """Prepares the reference once the model is wrapped and sharded, before the first step."""

    def __init__(self, trainer: PreferenceTrainer):
        self.trainer = trainer

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.trainer.prepare_references()


class SequenceCollator(DataCollatorForPreference):
    """TRL's batches, with each pair's place in the set."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        return super().torch_call(examples) | {"row": torch.tensor([example["row"] for example in examples])}


def reference_file(output_dir: Path, name: str) -> Path:
    """Where the stored reference of the pairs `train` or `eval` lies."""
    return output_dir / f"reference_logps.{name}.safetensors"


def _check_no_dropout(model: nn.Module) -> None:
    """The pass before a step and the step itself must see the same model. TRL has set the layers of dropout to 0."""
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if "dropout" in key and isinstance(value, float) and value > 0:
                raise UserError(f"loss.scope: 'global' needs a model without dropout, but {name}.{key} is {value}")
        if isinstance(module, nn.Dropout) and module.p > 0:
            raise UserError(f"loss.scope: 'global' needs a model without dropout, but {name} has {module.p}")


def _token_mean(values: Tensor, mask: Tensor) -> Tensor:
    return (values * mask).sum(1) / mask.sum(1).clamp(min=1)


def _k2(logratio: Tensor, mask: Tensor) -> Tensor:
    """Schulman's k2 estimate of the KL per token, on the pairs' tokens rather than the policy's own samples."""
    return _token_mean(logratio.square() / 2, mask)
