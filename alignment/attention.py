"""Attention per segment: samples packed into one row never see each other.

Registered with transformers as `segments`. The model must be called with `cu_seq_lens_q`, the ends of the segments; a
call without them is an error, never attention across samples. On CPU this costs the sum of squares of the segments'
lengths, where a block-diagonal mask costs the square of their sum.

Shapes: B rows (1), H query heads, K key-value heads, T tokens, D head width.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

SEGMENTS = "segments"


def segment_attention(
    _module: nn.Module,
    query_BHTD: torch.Tensor,
    key_BKTD: torch.Tensor,
    value_BKTD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    cu_seq_lens_q: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each segment. Returns [B, T, H, D] and no attention weights."""
    if cu_seq_lens_q is None:
        raise ValueError("segment attention needs cu_seq_lens_q: the ends of the packed samples")
    if query_BHTD.shape[0] != 1 or attention_mask is not None:
        raise ValueError("segment attention takes one packed row and no attention mask")
    ends = cu_seq_lens_q.tolist()
    if ends[-1] != query_BHTD.shape[2]:
        raise ValueError(f"cu_seq_lens_q ends at {ends[-1]}, but the row holds {query_BHTD.shape[2]} tokens")
    lengths = [end - start for start, end in pairwise(ends)]
    grouped = query_BHTD.shape[1] != key_BKTD.shape[1]
    out = [
        scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=grouped)
        for q, k, v in zip(*(torch.split(x, lengths, dim=2) for x in (query_BHTD, key_BKTD, value_BKTD)), strict=True)
    ]
    return torch.cat(out, dim=2).transpose(1, 2), None


def register() -> None:
    """Make `attn_implementation="segments"` known to transformers."""
    AttentionInterface.register(SEGMENTS, segment_attention)
    AttentionMaskInterface.register(SEGMENTS, _no_mask)


def _no_mask(*_: Any, **__: Any) -> None:
    """The segments are the mask."""
