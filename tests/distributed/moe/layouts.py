"""Many parallel layouts in one launch, each against one process without DeepSpeed; trainers.py runs it.

A step is two micro-batches of four rows. They are hard on an expert-parallel layout: the rows differ in length, so
ranks get unequal numbers of tokens; one is padding from end to end; one layer sends every token to the same two
experts, so the others get none.
"""

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch.nn import functional
from transformers import Ernie4_5_MoeConfig, Ernie4_5_MoeForCausalLM, PreTrainedModel

from alignment.moe.autoep import autoep_layers, freeze_correction_bias
from alignment.moe.engine import prepare_engine

STEPS, MICRO, ROWS, WIDTH, VOCAB = 5, 2, 4, 12, 48
LR, CLIP = 1e-3, 0.1
ADAM: dict[str, Any] = {"lr": LR, "betas": (0.9, 0.95), "eps": 1e-6, "weight_decay": 0.01}
Weights = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Layout:
    ep: int
    zero: int
    dtype: str = "float32"
    checkpointing: bool = False

    @property
    def name(self) -> str:
        return f"ep{self.ep}-zero{self.zero}-{self.dtype}" + ("-checkpointing" if self.checkpointing else "")


@dataclass
class Trace:
    """What a run did: the loss, the gradients before clipping and their norm at each step, and the last weights."""

    losses: list[float]
    gradients: list[Weights]
    norms: list[float]
    weights: Weights


def layouts() -> list[Layout]:
    """What is run on the ranks of this launch: two, or four."""
    if dist.get_world_size() == 2:
        fp32 = [Layout(ep, zero) for ep in (1, 2) for zero in range(4)]
        bf16 = [Layout(2, zero, "bfloat16") for zero in (1, 2, 3)]
        return [*fp32, *bf16, Layout(2, 1, checkpointing=True)]
    fp32 = [Layout(ep, zero) for ep in (2, 4) for zero in range(4)]
    return [*fp32, Layout(2, 1, "bfloat16"), Layout(4, 3, checkpointing=True)]


def make_model() -> PreTrainedModel:
    torch.manual_seed(0)
    config = Ernie4_5_MoeConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, moe_intermediate_size=16, moe_num_experts=4,
        moe_k=2, moe_num_shared_experts=1, moe_layer_start_index=1, initializer_range=0.2, tie_word_embeddings=True,
    )  # fmt: skip
    model: PreTrainedModel = Ernie4_5_MoeForCausalLM(config)
    # The last layer's correction bias outweighs any score: its tokens all go to experts 2 and 3, none to 0 and 1.
    bias = model.get_parameter("model.layers.2.mlp.gate.moe_statics.e_score_correction_bias")
    bias.data.copy_(torch.tensor([[-9.0, -9.0, 9.0, 9.0]]))
    freeze_correction_bias(model)
    return model


def micro_batch(step: int, micro: int) -> dict[str, torch.Tensor]:
    """Four rows of unequal length, padded right; the second of every micro-batch is padding from end to end."""
    generator = torch.Generator().manual_seed(100 * step + micro)
    ids = torch.randint(3, VOCAB, (ROWS, WIDTH), generator=generator)
    lengths = torch.tensor([WIDTH, 0, 5, 9])[:, None]
    mask = (torch.arange(WIDTH)[None] < lengths).long()
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": torch.where(mask.bool(), ids, -100)}


def tokens_of(step: int) -> int:
    return sum(int((micro_batch(step, micro)["labels"][:, 1:] != -100).sum()) for micro in range(MICRO))


def summed_loss(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The summed cross-entropy of the labelled tokens, in float32."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    labels = batch["labels"][:, 1:].flatten()
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels, ignore_index=-100, reduction="sum")


def reference(dtype: torch.dtype) -> Trace:
    """One process, no DeepSpeed: AdamW on float32 copies of `dtype` weights, gradients summed in float32."""
    masters = make_model().to(dtype).float()
    model = make_model().to(dtype)
    optimizer = torch.optim.AdamW([p for p in masters.parameters() if p.requires_grad], **ADAM)
    trace = Trace([], [], [], {})
    for step in range(STEPS):
        optimizer.zero_grad()
        total = 0.0
        for micro in range(MICRO):
            loss = summed_loss(model, micro_batch(step, micro)) / tokens_of(step)
            loss.backward()
            total += loss.item()
            for master, copy in zip(masters.parameters(), model.parameters(), strict=True):
                if copy.grad is not None:
                    master.grad = copy.grad.float() + (0 if master.grad is None else master.grad)
                    copy.grad = None
        trace.losses.append(total)
        trace.gradients.append({n: p.grad.clone() for n, p in masters.named_parameters() if p.grad is not None})
        trace.norms.append(float(torch.nn.utils.clip_grad_norm_(masters.parameters(), CLIP)))
        optimizer.step()
        for master, copy in zip(masters.parameters(), model.parameters(), strict=True):
            copy.data.copy_(master.data)
    trace.weights = {name: p.detach().clone() for name, p in masters.named_parameters() if p.requires_grad}
    return trace


def ds_config(layout: Layout) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": ROWS // dist.get_world_size(),
        "gradient_accumulation_steps": MICRO,
        "gradient_clipping": CLIP,
        "steps_per_print": 10**9,
        "zero_optimization": {"stage": layout.zero},
        "bf16": {"enabled": layout.dtype == "bfloat16"},
        "expert_parallel": {"enabled": True, "autoep_size": layout.ep},
        "optimizer": {"type": "AdamW", "params": ADAM | {"torch_adam": True}},
    }


def trainable_by_hf_name(model: PreTrainedModel, read: Callable[[torch.nn.Parameter], Any]) -> Weights:
    """`read` of every trainable parameter under its Hugging Face name, the experts of all ranks together."""
    layers = dict(autoep_layers(model))
    values: Weights = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and ".experts.w" not in name:
            values[name.replace(".mlp.router.gate.", ".mlp.gate.")] = read(parameter).float().clone()
    for prefix, layer in layers.items():
        experts: Any = layer
        w1, w2, w3 = (gathered(read(getattr(experts.experts, w)), experts.ep_group) for w in ("w1", "w2", "w3"))
        values[f"{prefix}.experts.gate_up_proj"] = torch.cat([w1, w3], dim=1)
        values[f"{prefix}.experts.down_proj"] = w2
    return values


def gathered(local: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    parts = [torch.empty_like(local, dtype=torch.float32) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, local.detach().float().contiguous(), group=group)
    return torch.cat(parts)


def parameter_value(parameter: torch.nn.Parameter) -> torch.Tensor:
    master = deepspeed.utils.safe_get_full_fp32_param(parameter)
    return parameter.detach() if master is None else master


def parallel(layout: Layout) -> Trace:
    """The same steps on all ranks; a rank's micro-batch is every W-th row."""
    rank, world = dist.get_rank(), dist.get_world_size()
    model = make_model()
    if layout.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=[p for p in model.parameters() if p.requires_grad], config=ds_config(layout)
    )
    prepare_engine(engine)
    engine.train()
    trace = Trace([], [], [], {})
    for step in range(STEPS):
        total = torch.zeros(())
        for micro in range(MICRO):
            batch = {key: value[rank::world] for key, value in micro_batch(step, micro).items()}
            loss = summed_loss(engine, batch) / tokens_of(step)
            engine.backward(loss * world * MICRO)  # DeepSpeed averages over ranks and micro-batches
            total += loss.detach()
            if micro == MICRO - 1:
                trace.gradients.append(trainable_by_hf_name(model, deepspeed.utils.safe_get_full_grad))
            engine.step()
        dist.all_reduce(total)
        trace.losses.append(total.item())
        trace.norms.append(float(engine.get_global_grad_norm()))
    trace.weights = trainable_by_hf_name(model, parameter_value)
    engine.destroy()
    del engine, model
    gc.collect()
    return trace


def difference(found: Trace, expected: Trace) -> dict[str, float]:
    """The largest absolute differences over steps and tensors; the last three are shares.

    Of the first step's gradient and its norm, and `drift`: of how far the weights have moved in all steps.
    """

    def largest(left: Weights, right: Weights) -> float:
        assert left.keys() == right.keys(), sorted(left.keys() ^ right.keys())
        return max((left[name] - right[name]).abs().max().item() for name in left)

    def distance(left: Weights, right: Weights) -> float:
        return float(torch.stack([(left[name] - right[name]).norm() for name in left]).norm())

    initial = make_model().state_dict()
    zero = {name: torch.zeros(()) for name in expected.gradients[0]}
    return {
        "losses": max(abs(a - b) for a, b in zip(found.losses, expected.losses, strict=True)),
        "gradients": max(largest(a, b) for a, b in zip(found.gradients, expected.gradients, strict=True)),
        "norms": max(abs(a - b) for a, b in zip(found.norms, expected.norms, strict=True)),
        "weights": largest(found.weights, expected.weights),
        "first_gradients": distance(found.gradients[0], expected.gradients[0]) / distance(expected.gradients[0], zero),
        "first_norm": abs(found.norms[0] - expected.norms[0]) / expected.norms[0],
        "drift": distance(found.weights, expected.weights) / distance(expected.weights, initial),
    }


def measure() -> dict[str, dict[str, float]]:
    """Every layout of this launch against its reference, by name; collective."""
    references = {name: reference(getattr(torch, name)) for name in ("float32", "bfloat16")}
    found = {layout.name: difference(parallel(layout), references[layout.dtype]) for layout in layouts()}
    found["bfloat16 reference"] = difference(references["bfloat16"], references["float32"])
    return found
