"""One forward of a policy over the pairs of a micro-batch: log-probabilities and states of the completion tokens alone.

The rows are those of `dpo.data.PairCollator`: all sequences in one row under segment attention, nothing padded, or,
where a model does not keep samples of one row apart, padded ones under its own attention. Either way the call goes
through whatever wraps the model (DDP, DeepSpeed, peft, autocast), and a hook on the output head picks the states that
predict completion tokens. The head then returns their log-probabilities instead of logits, from a chunk of tokens at a
time. Models that change their logits behind the head (soft caps, scales), or whose head is not a plain linear layer,
project the completion tokens whole.

Suffixes: N = 2B rows [chosen; rejected], S columns, n completion tokens of all rows in order, D model dim,
V vocabulary.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from alignment import attention
from alignment.errors import UserError
from alignment.isolation import check_isolation
from dpo.data import packed_row
from dpo.logps import token_logps

MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids", "cu_seq_lens_q", "max_length_q")
PROBE_TOKENS = 8

log = logging.getLogger(__name__)


class Completions(NamedTuple):
    """What one forward says of the completions of a batch; a completion's first token stands in column 0."""

    logps: Tensor  # [N, S] float32 (float64 of a float64 model), 0 outside the completions
    mask: Tensor  # [N, S]
    hidden: Tensor | None  # [N, S, D] last-layer states that predict the tokens, without gradient, 0 outside


@dataclass(frozen=True)
class Way:
    """How a model takes pairs: why its rows are padded, and why its logits are whole; empty where they are not."""

    padded: str = ""
    whole_logits: str = ""

    @property
    def metrics(self) -> dict[str, int | str]:
        found: dict[str, int | str] = {
            "forward.padded": int(bool(self.padded)),
            "forward.whole_logits": int(bool(self.whole_logits)),
        }
        reason = "; ".join(filter(None, (self.padded, self.whole_logits)))
        return found | ({"forward.reason": reason} if reason else {})


def choose_way(model: nn.Module, module: PreTrainedModel) -> Way:
    """Probe how `model` (as training calls it) takes pairs; `module` is the transformers model within it.

    Collective: every rank must call it, before the first batch is made. A slower way is logged.
    """
    padded = _why_padded(model, module)
    way = Way(padded, _why_whole_logits(model, module, padded=bool(padded)))
    if way.padded:
        log.warning("pairs run in padded rows: %s", way.padded)
    if way.whole_logits:
        log.warning("completion tokens keep whole logits: %s", way.whole_logits)
    return way


def causal_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside an adapter's, or `model` itself."""
    return cast(PreTrainedModel, model.get_base_model() if isinstance(model, PeftModel) else model)


def completions(
    model: nn.Module, module: PreTrainedModel, inputs: dict[str, Any], way: Way, hidden: bool = False
) -> Completions:
    """Run `model` over a batch of `PairCollator` and return what it says of the completions.

    Args:
        model: what training calls, wrapped or not.
        module: the transformers model within it.
        hidden: keep the states too.

    Raises:
        UserError: the model does not call its output head, so nothing can be read there.
    """
    if not way.padded:
        _use_segments(module)  # a frozen copy of the policy too
    predictor_n, target_n, mask_NS = inputs["predictors"], inputs["targets"], inputs["completion_mask"]
    head = module.get_output_embeddings()
    with _states_of(head, predictor_n) as states, _log_probabilities(head, target_n, way):
        output = model(**{name: inputs[name] for name in MODEL_INPUTS if name in inputs}, use_cache=False)
    if not states:
        raise UserError(f"{type(module).__name__}: does not call its output head, expected a causal language model")
    logps_n = _picked(output.logits[0], target_n) if way.whole_logits else output.logits[0, :, 0]
    return Completions(
        logps=logps_n.new_zeros(mask_NS.shape).masked_scatter(mask_NS, logps_n),
        mask=mask_NS,
        hidden=_scattered(states[0], mask_NS) if hidden else None,
    )


@contextmanager
def _states_of(head: nn.Module, predictor_n: Tensor) -> Iterator[list[Tensor]]:
    """Inside, the head sees only the states at these places, [1, n, D]; yields them without their graph, [n, D]."""
    states: list[Tensor] = []

    def select(_: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor]:
        state_nD = given[0].flatten(0, -2)[predictor_n]
        states.append(state_nD.detach())
        return (state_nD[None],)

    handle = head.register_forward_pre_hook(select)
    try:
        yield states
    finally:
        handle.remove()


@contextmanager
def _log_probabilities(head: Any, target_n: Tensor, way: Way) -> Iterator[None]:
    """Inside, the head returns the targets' log-probabilities [1, n, 1] in place of logits.

    Only its own forward is replaced: what surrounds the call (ZeRO-3 gathers the weight there and before its backward)
    stays.
    """
    if way.whole_logits:
        yield
        return
    before = vars(head).get("forward")
    vars(head)["forward"] = lambda state_1nD: token_logps(state_1nD[0], head.weight, target_n, head.bias)[None, :, None]
    try:
        yield
    finally:
        del vars(head)["forward"]
        if before is not None:
            vars(head)["forward"] = before


def _picked(logits_nV: Tensor, target_n: Tensor) -> Tensor:
    logits_nV = logits_nV.to(torch.promote_types(logits_nV.dtype, torch.float32))
    return logits_nV.gather(-1, target_n[:, None])[:, 0] - logits_nV.logsumexp(-1)


def _scattered(state_nD: Tensor, mask_NS: Tensor) -> Tensor:
    hidden_NSD = state_nD.new_zeros(*mask_NS.shape, state_nD.shape[-1])
    hidden_NSD[mask_NS] = state_nD
    return hidden_NSD


def _use_segments(module: PreTrainedModel) -> None:
    if module.config._attn_implementation != attention.SEGMENTS:
        attention.register()
        module.set_attn_implementation(attention.SEGMENTS)


def _why_padded(model: nn.Module, module: PreTrainedModel) -> str:
    """Why packed pairs would not be kept apart; then the model's attention stays its own. Empty where they are."""
    before = module.config._attn_implementation
    vocabulary = module.config.get_text_config().vocab_size
    try:
        _use_segments(module)
        check_isolation(model, module, vocabulary, lambda samples: packed_row([ids.tolist() for ids in samples]))
    except (UserError, ValueError) as error:  # ValueError: transformers knows no attention but the model's own
        module.set_attn_implementation(before)
        return " ".join(str(error).splitlines()[:2])
    return ""


def _why_whole_logits(model: nn.Module, module: PreTrainedModel, padded: bool) -> str:
    """Why logits cannot be left out: compares what the head returned with what the model makes of it."""
    head = module.get_output_embeddings()
    name = type(module).__name__
    if type(head) is not nn.Linear:
        return f"the head of {name} is a {type(head).__name__}, not a linear layer"
    ids = list(range(PROBE_TOKENS))
    inputs: dict[str, Any] = {"input_ids": torch.tensor([ids])} if padded else packed_row([ids])
    there = {name: x.to(cast(Any, model).device) if isinstance(x, Tensor) else x for name, x in inputs.items()}
    made: list[Tensor] = []
    handle = head.register_forward_hook(lambda _module, _inputs, output: made.append(output.detach()))
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            logits = model(**there, use_cache=False).logits
    finally:
        handle.remove()
        model.train(training)
    same = bool(made) and made[0].shape == logits.shape and torch.equal(made[0].float(), logits.float())
    return "" if same else f"{name} changes its logits behind the head"
