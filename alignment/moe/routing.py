"""Watches the routers of a model: their logits and choices in the forwards that one asks for.

Works on transformers' blocks (a `gate` that returns logits, weights and choices) and on AutoEP's (a `router` with a
`gate` of its own). Hooks, because `output_router_logits` gives no choices, and makes transformers add its own loss.

Shapes: L layers, T tokens (rows times columns, padding included), E experts, K experts a token.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from alignment.errors import UserError
from alignment.moe.autoep import is_autoep_layer, moe_blocks


@dataclass
class Routing:
    """What the routers of one forward did, by layer."""

    logits: dict[int, Tensor] = field(default_factory=dict)  # [T, E], part of the graph
    selected: dict[int, Tensor] = field(default_factory=dict)  # [T, K]

    @property
    def logits_LTE(self) -> Tensor:  # noqa: N802
        return torch.stack([self.logits[layer] for layer in sorted(self.logits)])

    @property
    def selected_LTK(self) -> Tensor:  # noqa: N802
        return torch.stack([self.selected[layer] for layer in sorted(self.selected)])


class RouterWatch:
    """Hooks on every router of `model`, once it is in the shape in which it trains (AutoEP replaces layers)."""

    def __init__(self, model: nn.Module) -> None:
        self.gates: list[nn.Module] = []
        self._routing: Routing | None = None  # while recording
        self._with_gradient = True
        for name, block in moe_blocks(model):
            self._hook(name, cast(Any, block))

    def _hook(self, name: str, block: Any) -> None:
        layer = len(self.gates)
        if is_autoep_layer(block):
            block.router.gate.register_forward_hook(lambda _m, _i, logits: self._note(layer, logits=logits))
            block.router.register_forward_hook(lambda _m, _i, output: self._note(layer, selected=output[1]))
            self.gates.append(block.router.gate)
        elif isinstance(getattr(block, "gate", None), nn.Module):
            block.gate.register_forward_hook(lambda _m, _i, out: self._note(layer, logits=out[0], selected=out[2]))
            self.gates.append(block.gate)
        else:
            raise UserError(f"router losses: {name} ({type(block).__name__}) has no router named `gate`")

    def _note(self, layer: int, logits: Tensor | None = None, selected: Tensor | None = None) -> None:
        # Forwards without a gradient inside a training step are the reference's, or only for a metric.
        if self._routing is None or torch.is_grad_enabled() != self._with_gradient:
            return
        if logits is not None:
            self._routing.logits[layer] = logits
        if selected is not None:
            self._routing.selected[layer] = selected

    @contextmanager
    def recording(self, gradient: bool = True) -> Iterator[Routing]:
        """Yields the routing of the one forward inside, of those with (or without) gradients.

        Raises:
            RuntimeError: no forward ran inside, or none that kept the routers' graph.
        """
        self._routing, self._with_gradient = Routing(), gradient
        try:
            yield self._routing
            self._check(self._routing, gradient)
        finally:
            self._routing = None

    def _check(self, routing: Routing, gradient: bool) -> None:
        missing = set(range(len(self.gates))) - (routing.logits.keys() & routing.selected.keys())
        if missing:
            raise RuntimeError(f"the routers of layers {sorted(missing)[:3]} were not seen in the forward")
        for layer, gate in enumerate(self.gates):
            if gradient and cast(Tensor, gate.weight).requires_grad and not routing.logits[layer].requires_grad:
                raise RuntimeError(
                    "router logits carry no gradient: reentrant gradient checkpointing detaches them; "
                    'set gradient_checkpointing_kwargs={"use_reentrant": False}'
                )
