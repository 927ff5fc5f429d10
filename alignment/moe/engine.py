"""A DeepSpeed engine with AutoEP layers, once it is made: what is checked, put right and shut off."""

from collections.abc import Callable
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel

from alignment.errors import UserError
from alignment.moe.autoep import autoep_layers, check_replaced, expert_parameters

# They write, or return, one rank's experts as if they were all.
HALF_SAVES = (
    "save_16bit_model",
    "save_fp16_model",
    "_zero3_consolidated_16bit_state_dict",
    "_consolidated_16bit_state_dict",
)


def prepare_engine(engine: Any) -> None:
    """Check an engine that AutoEP has just changed the model of, close its half saves and mend its clipping.

    Raises:
        UserError: AutoEP left layers alone, or the optimizer would treat experts as if every rank held the same ones.
    """
    check_replaced(engine.module)
    check_expert_groups(engine.module, engine.basic_optimizer)
    for name in HALF_SAVES:
        setattr(engine, name, refusal(f"engine.{name}"))
    if isinstance(engine.module, PreTrainedModel):  # an adapter's own save is another matter
        vars(engine.module)["save_pretrained"] = refusal("model.save_pretrained")
    if engine.zero_optimization_stage() == 0:
        engine.clip_fp32_gradients = lambda: clip_gradients(engine)


def mend_universal_load(engine: Any) -> None:
    """Put right what loading a universal checkpoint leaves wrong in DeepSpeed 0.19.8.

    At ZeRO 3 all groups of parameters share one step counter, which then counts every group's step; and the groups of
    experts bear the name that they had in the old layout.
    """
    layer: Any = next(layer for _, layer in autoep_layers(engine.module))
    for group in engine.basic_optimizer.param_groups:
        if group.get("moe"):
            group["name"] = layer.ep_group_name
    for state in engine.basic_optimizer.state.values():
        if torch.is_tensor(state.get("step")):  # torch's AdamW counts in place; others hold a number
            state["step"] = state["step"].clone()


def check_expert_groups(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Raise UserError where experts train but no group of the optimizer is marked as experts (`moe`)."""
    trained = any(parameter.requires_grad for parameter in expert_parameters(model))
    if trained and not any(group.get("moe") for group in optimizer.param_groups):
        raise UserError(
            f"no parameter group of {type(optimizer).__name__} is marked as experts: their gradients would be\n"
            "averaged over ranks that hold different ones; add an `optimizer` block to the DeepSpeed config"
        )


def refusal(name: str) -> Callable[..., NoReturn]:
    """A function in place of `name` that says why it is shut and what to call instead."""

    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise UserError(
            f"{name} would save one rank's experts under expert parallelism and report success\n"
            "call trainer.save_model(folder) on every rank"
        )

    return refuse


def clip_gradients(engine: Any) -> None:
    """Clip by the norm of all gradients, the experts of all ranks counted once each. For ZeRO 0, in place.

    DeepSpeed 0.19.8 takes each rank's norm, of its own experts and everything else, and clips by the ranks' mean.
    """
    experts = expert_parameters(engine.module)
    own = {id(parameter) for parameter in experts}
    others = [p for p in engine.module.parameters() if id(p) not in own]
    layer: Any = next(layer for _, layer in autoep_layers(engine.module))
    square_of_experts = _square(experts, engine.device)
    dist.all_reduce(square_of_experts, group=layer.ep_group)
    norm = (square_of_experts + _square(others, engine.device)).sqrt()
    torch.nn.utils.clip_grads_with_norm_([*experts, *others], engine.gradient_clipping(), norm)
    engine._global_grad_norm = norm.item()


def _square(parameters: list[nn.Parameter], device: torch.device) -> torch.Tensor:
    squares = (p.grad.float().square().sum() for p in parameters if p.grad is not None)
    return sum(squares, torch.zeros((), device=device))
