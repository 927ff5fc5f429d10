"""Which implementation each operation takes here, and why not another one."""

from dataclasses import dataclass

from alignment.kernels.device import why_no_triton


@dataclass(frozen=True)
class Choice:
    """What `kernels: auto` runs for an operation; `instead_of` is the fused one that cannot run."""

    operation: str
    implementation: str
    instead_of: str = ""
    reason: str = ""

    @property
    def detail(self) -> str:
        return f"{self.implementation}, not {self.instead_of}: {self.reason}" if self.reason else self.implementation


# operation, fused, what stands in where Triton cannot run
TABLE = (
    ("RMSNorm", "Liger", "torch"),
    ("RoPE", "a Triton kernel of ours", "torch"),
    ("SwiGLU", "DeepSpeed", "torch"),
    ("Cross-entropy", "TRL's chunked LM head on Triton", "TRL's chunked LM head in torch"),
    ("Expert GEMM", "torch grouped_mm", "torch grouped_mm"),
    ("Token permute", "torch gather, backward by DeepSpeed", "torch gather and embedding_bag"),
    ("Token restore", "DeepSpeed", "torch embedding_bag"),
)


def choices() -> list[Choice]:
    """One for each operation."""
    reason = why_no_triton()
    if reason is None:
        return [Choice(operation, fused) for operation, fused, _ in TABLE]
    return [
        Choice(operation, torch) if fused == torch else Choice(operation, torch, fused, reason)
        for operation, fused, torch in TABLE
    ]
