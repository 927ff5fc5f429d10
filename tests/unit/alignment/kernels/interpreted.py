"""Runs the fused kernels under Triton's interpreter on a CPU, beside what they stand for, and prints the gaps as JSON.

    python interpreted.py    {case: {"gap": largest difference, relative to the largest value, "launched": kernels}}

Not a test module: it changes Triton, DeepSpeed's guard and torch.cuda for its whole process.
"""

# ruff: noqa: E402 (what is changed has to be changed before it is imported)

import contextlib
import json
import os

os.environ |= {"TRITON_INTERPRET": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}

from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM
from transformers.models.ernie4_5_moe import modeling_ernie4_5_moe as ernie
from transformers.models.qwen3 import modeling_qwen3 as qwen
from triton.backends import backends
from triton.runtime import interpreter

# What stands between the interpreter and kernels written for a GPU: DeepSpeed asks for a driver and a CUDA device, the
# interpreter leaves float arguments as they are, takes some masks for integers and adds bf16 numbers as their bits, and
# it has no libdevice.
for backend in backends.values():
    backend.driver.is_active = staticmethod(lambda: True)
torch.cuda.device = lambda _: contextlib.nullcontext()
Builder, Handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
convert, load, store = interpreter._implicit_cvt, Builder.create_masked_load, Builder.create_masked_store
binary = Builder.binary_op


def as_argument(value: Any) -> Any:
    if isinstance(value, float):
        return tl.tensor(Handle(np.array([value], np.float32), tl.float32), tl.float32)
    return convert(value)


def as_mask(mask: Any) -> Any:
    return Handle(mask.data.astype(bool), tl.int1)


def in_bf16(self: Any, left: Any, right: Any, operation: Any) -> Any:
    if left.dtype.scalar != tl.bfloat16:
        return binary(self, left, right, operation)
    wide = [self.cast_impl(side, tl.float32) for side in (left, right)]
    return self.cast_impl(binary(self, *wide, operation), tl.bfloat16)


interpreter._implicit_cvt = as_argument
Builder.binary_op = in_bf16
Builder.create_masked_load = lambda self, at, mask, *rest: load(self, at, as_mask(mask), *rest)
Builder.create_masked_store = lambda self, at, value, mask, *rest: store(self, at, value, as_mask(mask), *rest)

LAUNCHED: list[str] = []
run = interpreter.InterpretedFunction.run


def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
    LAUNCHED.append(self.fn.__name__)
    return run(self, *args, **kwargs)


interpreter.InterpretedFunction.run = counted

import liger_kernel.ops.rms_norm

from alignment.kernels import device

device.why_no_triton = lambda: None
device.takes_triton = lambda _: True
liger_kernel.ops.rms_norm.rsqrt = lambda x: tl.rsqrt(x)  # noqa: PLW0108 (the interpreter replaces tl.rsqrt later)

from alignment.kernels import dispatch, experts, model, rms_norm, rope, swiglu
from alignment.models import preset_config

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
draw = torch.Generator().manual_seed(0)


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=draw).to(dtype).requires_grad_()


@torch.no_grad()
def largest_gap(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Relative to each tensor's largest value, or absolute where that is below 1; NaN where anything is."""
    gaps = []
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype, (ours.dtype, theirs.dtype)
        gaps.append((ours.float() - theirs.float()).abs().max() / theirs.float().abs().max().clamp(min=1))
    return float(torch.stack(gaps).max())


def compare(ours: Callable[..., Any], reference: Callable[..., Any], *inputs: Tensor) -> dict[str, Any]:
    """The largest gap of outputs and of the gradients of all inputs; the second call's launches do not count."""
    results = []
    for call in (ours, reference):
        outputs = call(*(x.clone() for x in inputs))
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        directions = [torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype) for y in outputs]
        results.append((*outputs, *torch.autograd.grad(outputs, inputs, directions)))
        if call is ours:
            launched = sorted(set(LAUNCHED))
    LAUNCHED.clear()
    return {"gap": largest_gap(*results), "launched": launched}


def angles(rows: int, tokens: int, width: int) -> tuple[Tensor, Tensor]:
    """cos and sin of other positions in every row, as transformers lays them out."""
    half = torch.rand(rows, tokens, width // 2, generator=draw) * 6
    both = torch.cat((half, half), -1)
    return both.cos(), both.sin()


def heads(rows: int, tokens: int, number: int, width: int, dtype: torch.dtype) -> Tensor:
    """[B, H, T, D] as attention makes it: heads lie within a token."""
    return normal(rows, tokens, number, width, dtype=dtype).detach().transpose(1, 2).requires_grad_()


def rotary(ours: Any, theirs: Any, dtype: torch.dtype, rows: int) -> dict[str, Any]:
    cos, sin = angles(rows, 5, 12)
    cos, sin = (cos, sin) if theirs is ernie.apply_rotary_pos_emb else (cos.to(dtype), sin.to(dtype))
    query, key = heads(2, 5, 3, 12, dtype), heads(2, 5, 1, 12, dtype)
    return compare(lambda q, k: ours(q, k, cos, sin), lambda q, k: theirs(q, k, cos, sin), query, key)


# Which experts 6 tokens go to, 2 each, of 5: any, one that is never chosen, all to one.
ROUTES = {
    "any": [[0, 3], [4, 1], [2, 0], [3, 2], [1, 4], [0, 1]],
    "empty": [[0, 4], [4, 0], [0, 2], [2, 4], [0, 4], [2, 0]],
    "one": [[3, 3]] * 6,
}


def permuted(expert: Tensor, x: Tensor) -> Tensor:
    order = expert.reshape(-1).sort(stable=True).indices
    return x[order // 2]


def restored(expert: Tensor, rows: Tensor, score: Tensor) -> Tensor:
    inverse = expert.reshape(-1).sort(stable=True).indices.argsort()
    return (rows[inverse].float().view(6, 2, -1) * score[..., None].float()).sum(1).to(rows.dtype)


def experts_module(dtype: torch.dtype) -> Any:
    config = ernie.Ernie4_5_MoeConfig(hidden_size=24, moe_intermediate_size=16, moe_num_experts=5, moe_k=2)
    config._experts_implementation = "eager"
    module = ernie.Ernie4_5_MoeExperts(config)
    for parameter in module.parameters():
        parameter.data = normal(*parameter.shape).detach() * 0.3
    return module.to(dtype)


def expert_case(name: str, dtype: torch.dtype) -> dict[str, Any]:
    module, expert = experts_module(dtype), torch.tensor(ROUTES[name])
    weights = list(module.parameters())

    def ours(x: Tensor, score: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        stand_in = SimpleNamespace(num_experts=5, gate_up_proj=gate_up, down_proj=down)
        return experts.experts_forward(stand_in, x, expert, score)

    def eager(x: Tensor, score: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        parameters = {"gate_up_proj": gate_up, "down_proj": down}
        return torch.func.functional_call(module, parameters, (x, expert, score))

    x, score = normal(6, 24, dtype=dtype), torch.rand(6, 2, generator=draw).to(dtype).requires_grad_()
    return compare(ours, eager, x, score, *weights)


def whole_model(architecture: str) -> dict[str, Any]:
    """Logits and every gradient of a small model with kernels against the same without; one row is left-padded."""
    small = {"num_hidden_layers": 2, "vocab_size": 50, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}
    make = qwen3_moe_config if architecture == "qwen3_moe" else partial(preset_config, "compass-tiny")
    torch.manual_seed(0)
    plain, fused = (AutoModelForCausalLM.from_config(make(**small)) for _ in range(2))
    fused.load_state_dict(plain.state_dict())
    model.use_kernels(fused, "auto")
    ids = torch.randint(2, 50, (2, 5), generator=draw)
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    results = []
    for network in (fused, plain):
        logits = network(input_ids=ids, attention_mask=mask).logits
        logits[mask.bool()].log_softmax(-1)[:, 7].sum().backward()
        results.append([logits[mask.bool()], *(p.grad for p in network.parameters() if p.grad is not None)])
        if network is fused:
            launched = sorted(set(LAUNCHED))
            LAUNCHED.clear()
    assert not LAUNCHED, f"the plain model ran {LAUNCHED}"
    return {"gap": largest_gap(*results), "launched": launched}


def qwen3_moe_config(**small: Any) -> Any:
    from transformers import Qwen3MoeConfig

    return Qwen3MoeConfig(
        hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=8, intermediate_size=24,
        moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2, mlp_only_layers=[0], **small,
    )  # fmt: skip


def cases() -> dict[str, dict[str, Any]]:
    found = {}
    for name, dtype in DTYPES.items():
        x, weight = normal(2, 3, 33, dtype=dtype), normal(33, dtype=dtype)
        found[f"rms_norm {name}"] = compare(
            lambda x, w: rms_norm.rms_norm(x, w, 1e-5), lambda x, w: rms_norm.reference(x, w, 1e-5), x, weight
        )
        found[f"rope interleaved {name}"] = rotary(rope.rotate_interleaved, ernie.apply_rotary_pos_emb, dtype, 2)
        found[f"rope halves {name}"] = rotary(rope.rotate_halves, qwen.apply_rotary_pos_emb, dtype, 2)
        gate, up = normal(7, 5, dtype=dtype), normal(7, 5, dtype=dtype)
        found[f"swiglu {name}"] = compare(swiglu.swiglu, lambda g, u: functional.silu(g) * u, gate, up)
        found[f"swiglu packed {name}"] = compare(
            swiglu.swiglu_packed, lambda y: functional.silu(y[:, :5]) * y[:, 5:], normal(7, 10, dtype=dtype)
        )
        for route, chosen in ROUTES.items():
            expert = torch.tensor(chosen)
            to = dispatch.routes(expert, 5)
            x, rows, score = normal(6, 19, dtype=dtype), normal(12, 19, dtype=dtype), normal(6, 2, dtype=dtype)
            found[f"permute {route} {name}"] = compare(
                lambda x, to=to: dispatch.permute(x, to), lambda x, e=expert: permuted(e, x), x
            )
            found[f"restore {route} {name}"] = compare(
                lambda r, s, to=to: dispatch.restore(r, s, to), lambda r, s, e=expert: restored(e, r, s), rows, score
            )
            found[f"experts {route} {name}"] = expert_case(route, dtype)
    found["rope interleaved, one table for all rows float32"] = rotary(
        rope.rotate_interleaved, ernie.apply_rotary_pos_emb, torch.float32, 1
    )
    found["rms_norm, weight of another dtype bfloat16"] = compare(
        lambda x, w: rms_norm.rms_norm(x, w, 1e-5),
        lambda x, w: rms_norm.reference(x, w, 1e-5),
        normal(3, 33, dtype=torch.bfloat16),
        normal(33),
    )
    found["model ernie4_5_moe float32"] = whole_model("ernie4_5_moe")
    found["model qwen3_moe float32"] = whole_model("qwen3_moe")
    return found


if __name__ == "__main__":
    print(json.dumps(cases()))
