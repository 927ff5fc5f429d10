"""OT-DPO's token weights against the published code's loop over padded pairs, on equal hidden states.

    python -m benchmarks.transport

The peer solves what POT 0.9.4, which it was written for, solved: `reg_type="entropy"`. Today's default is another plan.
Numbers are compared before the timing on pairs without padding, where the peer's scale is ours too. On a GPU both run
there: the peer launches its kernels pair by pair, ours solves the batch at once.

Suffixes: B pairs, N = 2B rows [chosen; rejected], T tokens, D model dim.
"""

import warnings

import ot
import torch
from torch import Tensor

from benchmarks import in_turns, speedup
from dpo.ot import ot_token_weights

PAIRS, SHORTEST, LONGEST, ROUNDS = 16, 73, 512, 3
REG_M = 0.2
# model dim and reg, and the end of the claim's name
CASES = {"": (1024, 1.0), "_d256": (256, 0.1)}


def published_weights(
    hidden_NTD: Tensor,
    mask_NT: Tensor,
    reg: float,
    reg_m: float,
    reg_type: str = "entropy",
    method: str = "sinkhorn_stabilized",
    tolerance: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Token weights as github.com/Mimasss2/OTPO computes them, `scripts/otpo_trainer.py`, get_ot_weight.

    Its options are POT's defaults there, in POT 0.9.4, and its method.
    """
    weights_c, weights_r = [], []
    for chosen, rejected, mask_c, mask_r in zip(*hidden_NTD.chunk(2), *mask_NT.chunk(2), strict=True):
        chosen, rejected = mask_c.unsqueeze(1) * chosen, mask_r.unsqueeze(1) * rejected
        cost = torch.cdist(chosen, rejected, p=2) + 1e-6
        largest = abs(cost).max()
        if not torch.isnan(largest) and largest.item() > 1:
            cost = cost / largest
        cost = torch.nan_to_num(cost, nan=1e10)
        a, b = torch.ones(len(mask_c)).to(cost) * mask_c, torch.ones(len(mask_r)).to(cost) * mask_r
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "If reg_type = entropy")
            plan = ot.unbalanced.sinkhorn_unbalanced(
                a, b, cost, reg, reg_m, method=method, reg_type=reg_type, stopThr=tolerance
            )
        scale = plan.sum() / min(a.sum(), b.sum())
        weights_c.append(plan.sum(-1) / scale)
        weights_r.append(plan.sum(0) / scale)
    return torch.stack(weights_c), torch.stack(weights_r)


def draw(dim: int, padded: bool, device: str) -> tuple[Tensor, Tensor]:
    """Hidden states of a common offset and scale, as a decoder's last norm leaves them, and the mask."""
    generator = torch.Generator().manual_seed(0)
    hidden_NTD = torch.randn(2 * PAIRS, LONGEST, dim, generator=generator) + torch.randn(dim, generator=generator)
    lengths_N = torch.randint(SHORTEST, LONGEST + 1, (2 * PAIRS,), generator=generator)
    lengths_N[0] = LONGEST
    mask_NT = torch.arange(LONGEST) < (lengths_N if padded else torch.full_like(lengths_N, LONGEST))[:, None]
    return hidden_NTD.to(device), mask_NT.to(device)


def measure(claim: str, dim: int, reg: float, device: str) -> None:
    hidden_NTD, mask_NT = draw(dim, padded=True, device=device)

    def ours(hidden: Tensor = hidden_NTD, mask: Tensor = mask_NT) -> tuple[Tensor, Tensor]:
        weights = ot_token_weights(*hidden.chunk(2), *mask.chunk(2), reg=reg, reg_m=REG_M)[:2]
        return weights[0].cpu(), weights[1].cpu()  # waits for the device

    def peer(hidden: Tensor = hidden_NTD, mask: Tensor = mask_NT) -> tuple[Tensor, Tensor]:
        weights = published_weights(hidden, mask, reg, REG_M)
        return weights[0].cpu(), weights[1].cpu()

    whole = draw(dim, padded=False, device=device)
    torch.testing.assert_close(ours(*whole), peer(*whole), atol=1e-3, rtol=0)
    seconds = in_turns(ours, peer, ROUNDS)
    name = "OTPO's loop over padded pairs, sinkhorn_stabilized"
    lengths = mask_NT.sum(1)
    settings = {"pairs": PAIRS, "tokens": [int(lengths.min()), int(lengths.max())], "dim": dim, "reg": reg}
    speedup(claim, f"{name}, POT {ot.__version__}", seconds, ROUNDS, **settings, device=device, threads=1)


def main() -> None:
    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for ending, (dim, reg) in CASES.items():
        measure(f"dpo.weights_over_reference{ending}", dim, reg, device)


if __name__ == "__main__":
    main()
