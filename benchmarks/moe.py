"""The expert layer under AutoEP against DeepSpeed's classic MoE and transformers' eager experts, on two gloo ranks,
each on its own cores; and the share that the router losses have of a training step, in one process.

    python -m benchmarks.moe

Every expert layer has the same experts, router weights and tokens, and computes the same outputs and input gradients
(checked before anything is timed). Balanced routing is that of random routers, the mean over several of them; skewed,
one expert is among the choices of every token. The classic layer pads every expert to the fullest of any rank: it
computes `fullest_over_mean` times the rows that there are.

Shapes: T tokens of a rank, D model dim, F expert width, E experts, K experts a token, L experts of a rank.
"""

import ctypes
import gc
import logging
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import nn
from torch.multiprocessing.spawn import spawn
from torch.nn.functional import silu

from alignment import cores
from alignment.models import preset_config
from alignment.moe.autoep import autoep_layers, install_autoep
from alignment.moe.router_losses import expert_counts, load_share, router_losses
from alignment.moe.routing import RouterWatch, Routing
from alignment.moe.trainer import ddp_backend
from benchmarks import in_turns, report, speedup

RANKS, HIDDEN, WIDTH, EXPERTS, TOP_K = 2, 384, 256, 48, 4
TOKENS = 512  # of a rank; the demo's packs
ROUTERS, ROUNDS, SHARE_ROUNDS = 7, 9, 21
PASSES = 20  # on own cores or on any, before the ranks are moved
EVERY_CORE = os.sched_getaffinity(0)
SKEW = 8.0  # added to one expert's logit, where the others have a standard deviation of 1
SETTINGS = {
    "ranks": RANKS, "threads_a_rank": 1, "dtype": "float32", "hidden": HIDDEN,
    "expert_width": WIDTH, "experts": EXPERTS, "top_k": TOP_K, "tokens_a_rank": TOKENS,
}  # fmt: skip


class Expert(nn.Module):
    """The SwiGLU expert that the classic layer is given."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, WIDTH, bias=False)
        self.up = nn.Linear(HIDDEN, WIDTH, bias=False)
        self.down = nn.Linear(WIDTH, HIDDEN, bias=False)

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        out_TD: torch.Tensor = self.down(silu(self.gate(x_TD)) * self.up(x_TD))
        return out_TD


class Layers:
    """One rank's three layers with the same weights, and its tokens."""

    def __init__(self, rank: int) -> None:
        self.eager = one_layer().model.layers[0].mlp
        self.ours = under_autoep(one_layer())
        self.classic = classic_layer(self.eager.experts, rank)
        generator = torch.Generator().manual_seed(rank)
        self.x_1TD, self.gradient_1TD = torch.randn(2, 1, TOKENS, HIDDEN, generator=generator)
        self.x_1TD[..., -1] = 1  # so that the last column of the router's weights is a bias

    def route(self, router: int, skew: float = 0.0) -> None:
        """Draw the router's weights, and add `skew` to the first expert's logit."""
        gate_ED = torch.randn(EXPERTS, HIDDEN, generator=torch.Generator().manual_seed(router)) / HIDDEN**0.5
        gate_ED[:, -1] = 0
        gate_ED[0, -1] = skew
        for weight in (self.eager.gate.weight, self.ours.router.gate.weight, self.classic.deepspeed_moe.gate.wg.weight):
            with torch.no_grad():
                weight.copy_(gate_ED)
        self.check()

    def run(self, layer: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        """Forward and backward from gradients that are not there; the ranks begin and end together."""
        layer.zero_grad()
        x_1TD = self.x_1TD.detach().requires_grad_()
        dist.barrier()
        out = layer(x_1TD)
        out_1TD = out[0] if isinstance(out, tuple) else out  # the classic layer returns its loss too
        out_1TD.backward(self.gradient_1TD)
        dist.barrier()
        assert x_1TD.grad is not None
        return out_1TD.detach(), x_1TD.grad

    def check(self) -> None:
        expected = self.run(self.eager)
        torch.testing.assert_close(self.run(self.ours), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(self.run(self.classic), expected, atol=1e-5, rtol=1e-5)

    def on_own_cores_and_any(self) -> tuple[float, float]:
        """Median seconds of some passes with this rank on its own cores, and on all."""
        own, every = os.sched_getaffinity(0), EVERY_CORE

        def passes(on: set[int]) -> None:
            cores.keep_to(on)
            for _ in range(PASSES):
                self.run(self.ours)

        seconds = in_turns(lambda: passes(own), lambda: passes(every), ROUNDS)
        cores.keep_to(own)
        return seconds

    def peak_bytes(self, layer: nn.Module) -> float:
        """What the layer adds to resident memory at its peak, the larger of the ranks; of three, the median."""
        peaks = []
        for _ in range(3):
            layer.zero_grad()
            gc.collect()
            ctypes.CDLL("libc.so.6").malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
            before = resident("VmRSS")
            self.run(layer)
            peaks.append(resident("VmHWM") - before)
        worst = torch.tensor(sorted(peaks)[1], dtype=torch.float64)
        dist.all_reduce(worst, op=dist.ReduceOp.MAX)
        return worst.item()

    def fullest_over_mean(self) -> float:
        fullest = self.classic.deepspeed_moe.exp_counts.max().clone()
        dist.all_reduce(fullest, op=dist.ReduceOp.MAX)
        return fullest.item() / (TOKENS * TOP_K / EXPERTS)


def resident(field: str) -> int:
    """VmRSS, or its peak VmHWM, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


def one_layer() -> Any:
    """One layer of Ernie4_5_Moe without shared experts, which the classic layer has not either; the same every time."""
    torch.manual_seed(1)
    config = transformers.Ernie4_5_MoeConfig(
        vocab_size=8, hidden_size=HIDDEN, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1,
        moe_num_experts=EXPERTS, moe_k=TOP_K, moe_intermediate_size=WIDTH, moe_num_shared_experts=0,
        moe_layer_start_index=0, initializer_range=0.05,
    )  # fmt: skip
    return transformers.Ernie4_5_MoeForCausalLM._from_config(config, experts_implementation="eager")


def under_autoep(model: Any) -> Any:
    """The layer that training uses."""
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "expert_parallel": {"enabled": True, "autoep_size": RANKS},
        "optimizer": {"type": "AdamW", "params": {"torch_adam": True}},
    }
    deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=config)
    ((_, layer),) = autoep_layers(model)
    return layer


def classic_layer(experts: Any, rank: int) -> Any:
    from deepspeed.moe.layer import MoE

    layer = MoE(HIDDEN, Expert(), EXPERTS, ep_size=RANKS, k=TOP_K, drop_tokens=False)
    layer.set_deepspeed_parallelism()
    local = layer.deepspeed_moe.experts.deepspeed_experts
    with torch.no_grad():
        for number, expert in enumerate(local, start=rank * len(local)):
            gate, up = experts.gate_up_proj[number].chunk(2)
            expert.gate.weight.copy_(gate)
            expert.up.weight.copy_(up)
            expert.down.weight.copy_(experts.down_proj[number])
    return layer


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def measure(rank: int) -> None:
    import deepspeed

    layers = Layers(rank)

    def compare(peer: nn.Module) -> tuple[float, float]:
        return in_turns(lambda: layers.run(layers.ours), lambda: layers.run(peer), ROUNDS)

    balanced, fullest = [], []
    for router in range(ROUTERS):
        layers.route(router)
        balanced.append(compare(layers.classic))
        fullest.append(layers.fullest_over_mean())
    over_eager = compare(layers.eager)
    own_cores = layers.on_own_cores_and_any()
    layers.route(0, SKEW)
    skewed, skewed_fullest = compare(layers.classic), layers.fullest_over_mean()
    ours_bytes, classic_bytes = layers.peak_bytes(layers.ours), layers.peak_bytes(layers.classic)
    if rank > 0:
        return
    classic = f"deepspeed {deepspeed.__version__} moe.layer.MoE, k=4, no tokens dropped"
    eager = f"transformers {transformers.__version__} eager experts, all of them on each rank"
    ours, peers = (mean([pair[side] for pair in balanced]) for side in (0, 1))
    speedup("moe.experts_over_eager", eager, over_eager, ROUNDS, **SETTINGS)
    anywhere = "ranks where the system puts them"
    speedup("moe.own_cores_over_any", anywhere, own_cores, ROUNDS, passes=PASSES, **SETTINGS)
    settings = SETTINGS | {"routers": ROUTERS, "fullest_over_mean": round(mean(fullest), 2)}
    speedup("moe.autoep_over_classic_balanced", classic, (ours, peers), ROUNDS, **settings)
    settings = SETTINGS | {"fullest_over_mean": round(skewed_fullest, 2)}
    speedup("moe.autoep_over_classic_skewed", classic, skewed, ROUNDS, **settings)
    settings |= {"measure": "peak resident bytes that a pass adds", "bytes": ours_bytes, "peer_bytes": classic_bytes}
    settings["peer_value"] = 1.0
    report("moe.skewed_memory_ratio", ours_bytes / classic_bytes, "of its memory", classic, better="lower", **settings)


def router_loss_share() -> None:
    """The losses' own work, from logits and choices to the logits' gradient, against a step of the demo's model.

    Not counted: the all-reduces of a log line and, in global scope, of the load.
    """
    config = preset_config("compass-tiny", vocab_size=2048)
    model = transformers.AutoModelForCausalLM.from_config(config, experts_implementation="grouped_mm")
    optimizer = torch.optim.AdamW(model.parameters())
    watch = RouterWatch(model)
    ids = torch.randint(2048, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    mask_T = torch.ones(TOKENS, dtype=torch.bool)
    with watch.recording() as routing:
        model(input_ids=ids)
    logits = {layer: logits_TE.detach().requires_grad_() for layer, logits_TE in routing.logits.items()}
    seen = Routing(logits, routing.selected)

    def step() -> None:
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()

    def losses() -> tuple[torch.Tensor, ...]:
        logits_LTE = seen.logits_LTE
        share_LE = load_share(expert_counts(seen.selected_LTK, mask_T, logits_LTE.shape[-1]))
        found = router_losses(logits_LTE, share_LE, mask_T, TOKENS)
        return torch.autograd.grad((0.01 * found.balance + 0.001 * found.z).sum(), list(logits.values()))

    added, whole = in_turns(losses, step, SHARE_ROUNDS, warm_up=3)
    settings = {
        "model": "compass-tiny", "tokens": TOKENS, "layers": config.num_hidden_layers, "threads": 1,
        "dtype": "float32", "seconds": round(added, 5), "step_seconds": round(whole, 4), "rounds": SHARE_ROUNDS,
        "peer_value": 1.0,
    }  # fmt: skip
    share = added / (added + whole)
    report("moe.router_loss_share", share, "of a step", "a training step without them", better="lower", **settings)


def rank_main(rank: int, store: str) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS), ACCELERATE_USE_DEEPSPEED="true")
    torch.set_num_threads(1)
    cores.give_to_ranks(RANKS)
    cores.keep_to_own()
    backend = ddp_backend()
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=RANKS)
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    deepspeed.init_distributed(dist_backend=backend)
    install_autoep()
    measure(rank)
    dist.destroy_process_group()


def main() -> None:
    torch.set_num_threads(1)
    router_loss_share()
    with tempfile.TemporaryDirectory() as folder:
        spawn(rank_main, args=(f"{folder}/store",), nprocs=RANKS)


if __name__ == "__main__":
    main()
