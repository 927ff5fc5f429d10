"""The router losses for any transformers Trainer, scaled right over ranks and accumulated micro-batches.

    class Trainer(RouterLossMixin, ExpertParallelTrainerMixin, SFTTrainer): ...

The loss that a trainer logs stays its own; the router losses are logged beside it, each with its coefficient.

Scaling. The step's loss is a mean over all of its tokens, of all ranks and micro-batches. Each micro-batch adds its
part, divided by the step's tokens, and times the number of ranks: DDP and DeepSpeed average gradients over them.
In scope `micro` a part is the micro-batch's own loss, weighted by its share of the tokens. In scope `global` the load
is that of the whole step, so that neither value nor gradient depends on how the step is cut into ranks and
micro-batches (Qiu et al. 2025, arXiv:2501.11873, who use a running estimate under accumulation; here it is exact). With
several micro-batches that takes a forward of each without gradients before the first; with one, an all-reduce.

Shapes: L layers, E experts.
"""

from collections.abc import Iterator
from inspect import signature
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Trainer

from alignment.config import RouterConfig
from alignment.moe.autoep import moe_blocks
from alignment.moe.router_losses import (
    SIGMOID_FAMILIES,
    Coefficients,
    Score,
    coefficients,
    expert_counts,
    load_share,
    router_losses,
)
from alignment.moe.routing import RouterWatch, Routing

# What a forward needs to route its tokens; the rest of a batch (labels, margins) is for the loss.
ROUTING_INPUTS = ("input_ids", "attention_mask", "position_ids", "cu_seq_lens_q", "max_length_q")


class RouterLossMixin(Trainer):
    """Put before a Trainer class; see the module's docstring. Dense models train as without it.

    Args:
        router: the losses' settings; None leaves the model's routers alone.
    """

    def __init__(self, *args: Any, router: RouterConfig | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.router = router if router is not None and any(moe_blocks(cast(nn.Module, self.model))) else None
        self.expert_load: list[list[float]] | None = None  # of each layer, at the last log line; 1 is an even share
        # Only the balance loss knows a scope: without it nothing has to be counted ahead.
        self._router_scope = router.scope if router is not None and router.balance else "micro"
        self._router_watch: RouterWatch | None = None
        self._router_sums: dict[str, Tensor] = {}  # since the last log line, on this rank
        self._router_steps = 0  # since the last log line

    def routed_tokens(self, inputs: dict[str, Any]) -> Tensor:
        """[B, T], true for the tokens of a batch that count; a trainer with fillers of its own leaves them out."""
        if "attention_mask" in inputs:
            return cast(Tensor, inputs["attention_mask"]).bool()
        return torch.ones_like(inputs["input_ids"], dtype=torch.bool)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """The micro-batches of a step; counts their tokens, and in global scope their experts' load, over all ranks."""
        batches, items = super().get_batch_samples(*args, **kwargs)
        if self.router is not None and batches:
            if self._router_watch is None:  # AutoEP has replaced the layers by now
                self._router_watch = RouterWatch(cast(nn.Module, self.model))
            self._router_steps += 1
            tokens = torch.stack([self.routed_tokens(batch).sum() for batch in batches]).sum().to(self.args.device)
            self._router_tokens = cast(Tensor, self.accelerator.reduce(tokens, "sum"))
            ahead = self._router_scope == "global" and len(batches) > 1
            counts = list(self._counts_ahead(batches)) if ahead else []
            self._router_share_LE = self._global_share(torch.stack(counts).sum(0)) if ahead else None
        return batches, items

    def _counts_ahead(self, batches: list[Any]) -> Iterator[Tensor]:
        """The experts' counts of each micro-batch, by a forward without gradients: [L, E]."""
        model = self.model_wrapped
        model.eval()  # no checkpointing; training_step switches back
        assert self._router_watch is not None
        takes = signature(cast(Any, self.accelerator.unwrap_model(model)).forward).parameters
        head = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
        for batch in batches:
            inputs = self._prepare_inputs(batch)
            routed = {name: inputs[name] for name in ROUTING_INPUTS if name in inputs}
            with torch.no_grad(), self._router_watch.recording(gradient=False) as routing:
                model(**routed, **head, use_cache=False)
            yield self._counts(routing, self.routed_tokens(inputs))

    def _counts(self, routing: Routing, mask: Tensor) -> Tensor:
        return expert_counts(routing.selected_LTK, mask.flatten(), routing.logits[0].shape[-1])

    def _global_share(self, counts_LE: Tensor) -> Tensor:
        return load_share(cast(Tensor, self.accelerator.reduce(counts_LE, "sum")))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The trainer's own loss plus, in training, the router losses' part of this micro-batch."""
        if self._router_watch is None or not cast(nn.Module, self.model).training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        mask = self.routed_tokens(inputs)  # now: trainers take things out of the batch
        with self._router_watch.recording() as routing:
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        added = self._added_loss(routing, mask)
        # The loop divides what it takes for a mean of the micro-batch, as in Trainer.training_step.
        if (not self.model_accepts_loss_kwargs or num_items_in_batch is None) and self.compute_loss_func is None:
            added = added * self.current_gradient_accumulation_steps
        return (result[0] + added, result[1]) if isinstance(result, tuple) else result + added

    def _added_loss(self, routing: Routing, mask: Tensor) -> Tensor:
        assert self.router is not None
        logits_LTE = routing.logits_LTE
        if logits_LTE.shape[1] != mask.numel():
            raise RuntimeError(f"the routers saw {logits_LTE.shape[1]} tokens, the batch holds {mask.numel()}")
        counts_LE = self._counts(routing, mask)
        losses = router_losses(logits_LTE, self._share(counts_LE), mask.flatten(), self._router_tokens, self._score())
        now = self._coefficients(self.router, self.state.global_step)
        part = (now.balance * losses.balance + now.z * losses.z).sum()
        self._add(counts=counts_LE, balance=losses.balance, z=losses.z, entropy=losses.entropy, added=part)
        return part * self.accelerator.num_processes

    def _share(self, counts_LE: Tensor) -> Tensor:
        """The load that the balance loss weighs probabilities by: [L, E]."""
        if self._router_share_LE is not None:
            return self._router_share_LE
        return self._global_share(counts_LE) if self._router_scope == "global" else load_share(counts_LE)

    def _coefficients(self, config: RouterConfig, step: int) -> Coefficients:
        """Those of the optimizer step that follows `step` others."""
        return coefficients(config, step / max(1, self.state.max_steps))

    def _score(self) -> Score:
        return "sigmoid" if cast(Any, self.model).config.model_type in SIGMOID_FAMILIES else "softmax"

    # Logging: summed here, reduced over the ranks once a log line

    def _add(self, **values: Tensor) -> None:
        for name, value in values.items():
            self._router_sums[name] = self._router_sums.get(name, 0) + value.detach().double()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self._router_sums and "loss" in logs:
            logs.update(self._drained())
            logs["loss"] -= logs["router/added_loss"]
        super().log(logs, start_time)

    def _drained(self) -> dict[str, float]:
        assert self.router is not None
        flat = cast(
            Tensor, self.accelerator.reduce(torch.cat([v.flatten() for v in self._router_sums.values()]), "sum")
        )
        pieces = flat.cpu().split([value.numel() for value in self._router_sums.values()])
        sums = {
            name: piece.view(old.shape) for (name, old), piece in zip(self._router_sums.items(), pieces, strict=True)
        }
        self._router_sums = {}
        steps, self._router_steps = self._router_steps, 0
        self._total_loss_scalar -= float(sums["added"])  # of transformers: the mean loss that it states at the end
        load_LE = load_share(sums["counts"]) * sums["counts"].shape[-1]
        self.expert_load = [[round(load, 3) for load in layer] for layer in load_LE.tolist()]
        now = self._coefficients(self.router, self.state.global_step - 1)
        return {
            "router/balance_loss": float(sums["balance"].mean()) / steps,
            "router/balance_coefficient": now.balance,
            "router/z_loss": float(sums["z"].mean()) / steps,
            "router/z_coefficient": now.z,
            "router/added_loss": float(sums["added"]) / steps,
            "router/entropy": float(sums["entropy"].mean()) / steps,
            "router/load_max": float(load_LE.max()),
            "router/dead_experts": int((sums["counts"] == 0).sum()),
        }
