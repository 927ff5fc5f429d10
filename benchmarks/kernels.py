"""Routed experts against transformers' eager loop and grouped GEMM, and on a GPU against Liger's fused MoE and the
machine's own limits: the bf16 matmul peak and the copy bandwidth, both measured in the same run.

    python -m benchmarks.kernels

On a CPU: a layer of 48 experts, top-4, widths of 256, 1,024 tokens. On an NVIDIA GPU: Compass-v2's layer (H=3072,
I=2048) and 16,384 tokens in bf16, and its norms, rotary embedding and shared experts against torch.
Shapes: T tokens, K experts a token, R = T K rows, E experts, D model dim, I expert width.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import Ernie4_5_MoeConfig
from transformers.integrations.moe import grouped_mm_experts_forward
from transformers.models.ernie4_5_moe.modeling_ernie4_5_moe import Ernie4_5_MoeExperts, apply_rotary_pos_emb

from alignment.kernels import device as kernel_device
from alignment.kernels.dispatch import permute, restore, routes
from alignment.kernels.experts import experts_forward
from alignment.kernels.rms_norm import reference as torch_rms_norm
from alignment.kernels.rms_norm import rms_norm
from alignment.kernels.swiglu import swiglu
from benchmarks import in_turns, report, speedup

Call = Callable[[], object]
Forward = Callable[[Any, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Shape:
    tokens: int
    experts: int
    top_k: int
    width: int
    expert_width: int
    dtype: str

    @property
    def rows(self) -> int:
        return self.tokens * self.top_k

    @property
    def flops(self) -> float:
        """Of the forward pass: two for each weight of gate, up and down that a row passes."""
        return 2.0 * self.rows * 3 * self.width * self.expert_width


CPU_SHAPES = [Shape(1024, 48, 4, 256, 256, dtype) for dtype in ("float32", "bfloat16")]
GPU_SHAPE = Shape(16384, 48, 4, 3072, 2048, "bfloat16")
MATMUL = 8192
ROUNDS = 9


class Layer:
    """The experts of one layer, hidden states and routing by random scores."""

    def __init__(self, shape: Shape, device: str) -> None:
        dtype = getattr(torch, shape.dtype)
        generator = torch.Generator().manual_seed(0)
        config = Ernie4_5_MoeConfig(
            hidden_size=shape.width, moe_intermediate_size=shape.expert_width, moe_num_experts=shape.experts
        )
        config._experts_implementation = "eager"
        with torch.device("meta"):
            module = Ernie4_5_MoeExperts(config)
        self.module = module.to_empty(device=device).to(dtype)
        for parameter in self.module.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        self.hidden_TD = torch.randn(shape.tokens, shape.width, generator=generator).to(device, dtype).requires_grad_()
        probability_TE = torch.randn(shape.tokens, shape.experts, generator=generator).softmax(-1)
        score_TK, expert_TK = probability_TE.topk(shape.top_k)
        score_TK = score_TK / score_TK.sum(-1, keepdim=True)
        self.score_TK, self.expert_TK = score_TK.to(device, dtype).requires_grad_(), expert_TK.to(device)
        self.grad_TD = torch.randn(shape.tokens, shape.width, generator=generator).to(device, dtype)

    def forward(self, run: Forward) -> Call:
        @torch.no_grad()
        def call() -> Tensor:
            return run(self.module, self.hidden_TD, self.expert_TK, self.score_TK)

        return synchronized(call)

    def step(self, run: Forward) -> Call:
        """Forward and backward: gradients of hidden states, scores and weights."""
        inputs = [self.hidden_TD, self.score_TK, *self.module.parameters()]

        def call() -> tuple[Tensor, ...]:
            out_TD = run(self.module, self.hidden_TD, self.expert_TK, self.score_TK)
            return out_TD, *torch.autograd.grad(out_TD, inputs, self.grad_TD)

        return synchronized(call)


def synchronized(call: Callable[[], Any]) -> Callable[[], Any]:
    """A GPU has done its work when the call returns."""
    if not torch.cuda.is_available():
        return call

    def waiting() -> Any:
        out = call()
        torch.cuda.synchronize()
        return out

    return waiting


def eager(module: Any, hidden_TD: Tensor, expert_TK: Tensor, score_TK: Tensor) -> Tensor:
    out_TD: Tensor = module(hidden_TD, expert_TK, score_TK)
    return out_TD


def liger(module: Any, hidden_TD: Tensor, expert_TK: Tensor, score_TK: Tensor) -> Tensor:
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

    weights = (module.gate_up_proj, module.down_proj)
    out_TD: Tensor = LigerFusedMoEFunction.apply(hidden_TD, *weights, expert_TK.int(), score_TK)
    return out_TD


def seconds_of(call: Call, rounds: int = ROUNDS) -> float:
    """Median seconds, after two rounds that do not count."""
    taken = []
    for _ in range(rounds + 2):
        began = time.perf_counter()
        call()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[2:])


def check_equal(ours: Callable[[], Any], peer: Callable[[], Any], tolerance: float) -> None:
    """Outputs and gradients, relative to the largest value of each."""
    for left, right in zip(ours(), peer(), strict=True):
        gap = ((left - right).abs().max() / right.abs().max()).item()
        assert gap < tolerance, f"differs from the peer by {gap:.1e} of the largest value"


def experts_against(claim: str, name: str, peer: Forward, layer: Layer, shape: Shape, rounds: int = ROUNDS) -> None:
    ours, theirs = layer.step(experts_forward), layer.step(peer)
    check_equal(ours, theirs, 1e-4 if shape.dtype == "float32" else 0.05)
    speedup(claim, name, in_turns(ours, theirs, rounds, warm_up=2), rounds, **asdict(shape))


def matmul_share(layer: Layer, shape: Shape, device: str) -> None:
    """What part of the flops a second of one large matrix product the experts reach."""
    left, right = (torch.randn(MATMUL, MATMUL, device=device).to(getattr(torch, shape.dtype)) for _ in range(2))
    peak = 2.0 * MATMUL**3 / seconds_of(synchronized(lambda: left @ right))
    parts = {"forward": (layer.forward, shape.flops), "step": (layer.step, 3 * shape.flops)}
    for part, (call, flops) in parts.items():
        reached = flops / seconds_of(call(experts_forward))
        settings = {
            "peer_value": 1.0,
            "tflops": round(reached / 1e12, 2),
            "peak_tflops": round(peak / 1e12, 2),
            **asdict(shape),
        }
        report(f"kernels.matmul_share_{part}", reached / peak, "share", f"torch.mm of {MATMUL} cubed", **settings)


def bandwidth_share(layer: Layer, shape: Shape) -> None:
    """What part of a copy's bytes a second permute and restore reach; a row that is read K times counts once."""
    to = routes(layer.expert_TK, shape.experts)
    rows_RD = permute(layer.hidden_TD, to).detach().requires_grad_()
    grad_RD, target_RD = torch.randn_like(rows_RD), torch.empty_like(rows_RD)
    size = rows_RD.element_size() * shape.width
    copied = 2 * shape.rows * size / seconds_of(synchronized(lambda: target_RD.copy_(rows_RD.detach())))

    hidden_TD, score_TK = layer.hidden_TD, layer.score_TK
    out_RD, out_TD = permute(hidden_TD, to), restore(rows_RD, score_TK, to)
    once = (shape.tokens + shape.rows) * size
    calls: dict[str, tuple[Call, int]] = {
        "permute": (lambda: permute(hidden_TD.detach(), to), once),
        "permute_backward": (lambda: torch.autograd.grad(out_RD, hidden_TD, grad_RD, retain_graph=True), once),
        "restore": (lambda: restore(rows_RD.detach(), score_TK.detach(), to), once),
        "restore_backward": (
            lambda: torch.autograd.grad(out_TD, [rows_RD, score_TK], layer.grad_TD, retain_graph=True),
            once + shape.rows * size,
        ),
    }
    for name, (call, moved) in calls.items():
        reached = moved / seconds_of(synchronized(call))
        settings = {
            "peer_value": 1.0,
            "gb_s": round(reached / 1e9, 1),
            "copy_gb_s": round(copied / 1e9, 1),
            **asdict(shape),
        }
        report(f"kernels.{name}_bandwidth_share", reached / copied, "share", "torch copy of the rows", **settings)


def elementwise(shape: Shape, device: str, rounds: int = ROUNDS) -> None:
    """Norm, rotary embedding and SwiGLU of Compass-v2 against transformers' expressions, forward and backward."""
    from alignment.kernels.rope import rotate_interleaved

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, device=device).to(getattr(torch, shape.dtype)).requires_grad_()

    def both(call: Callable[..., Any], *inputs: Tensor) -> Call:
        outputs = call(*inputs)
        ones = [torch.ones_like(out) for out in (outputs if isinstance(outputs, tuple) else (outputs,))]
        return synchronized(lambda: torch.autograd.grad(call(*inputs), inputs, ones))

    x_TD, weight_D = normal(shape.tokens, shape.width), normal(shape.width)
    query, key = (normal(1, shape.tokens, n, 128).detach().transpose(1, 2).requires_grad_() for n in (24, 6))
    angle = torch.rand(1, shape.tokens, 64, device=device).repeat(1, 1, 2)
    gate, up = normal(shape.tokens, 2 * shape.expert_width), normal(shape.tokens, 2 * shape.expert_width)
    pairs: dict[str, tuple[Call, Call]] = {
        "rms_norm": (
            both(lambda x, w: rms_norm(x, w, 1e-5), x_TD, weight_D),
            both(lambda x, w: torch_rms_norm(x, w, 1e-5), x_TD, weight_D),
        ),
        "rope": (
            both(lambda q, k: rotate_interleaved(q, k, angle.cos(), angle.sin()), query, key),
            both(lambda q, k: apply_rotary_pos_emb(q, k, angle.cos(), angle.sin()), query, key),
        ),
        "swiglu": (both(swiglu, gate, up), both(lambda g, u: functional.silu(g) * u, gate, up)),
    }
    for name, (ours, theirs) in pairs.items():
        check_equal(ours, theirs, 0.05)
        speedup(f"kernels.{name}", "torch", in_turns(ours, theirs, rounds, warm_up=2), rounds, **asdict(shape))


def on_cpu() -> None:
    for shape in CPU_SHAPES:
        layer = Layer(shape, "cpu")
        claim = f"kernels.experts_over_grouped_mm_{shape.dtype}"
        experts_against(claim, "transformers grouped_mm", grouped_mm_experts_forward, layer, shape, rounds=15)


def on_gpu(shape: Shape, device: str = "cuda") -> None:
    layer = Layer(shape, device)
    experts_against("kernels.experts_over_eager", "transformers eager", eager, layer, shape)
    experts_against(
        "kernels.experts_over_grouped_mm", "transformers grouped_mm", grouped_mm_experts_forward, layer, shape
    )
    experts_against("kernels.experts_over_liger", "Liger fused MoE", liger, layer, shape)
    matmul_share(layer, shape, device)
    bandwidth_share(layer, shape)
    elementwise(shape, device)


def main() -> None:
    missing = kernel_device.why_no_triton()
    if missing is None:
        on_gpu(GPU_SHAPE)
        return
    print(f"the claims about fused kernels were not measured: {missing}", flush=True)
    on_cpu()


if __name__ == "__main__":
    main()
