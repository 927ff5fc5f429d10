"""A packed row in which all answers to a prompt share one copy of it, and nothing is padded.

Each group is a prompt, perhaps empty, and its answers. A prompt's tokens see the prompt, an answer's tokens see the
prompt and their own answer, so every answer gets the states it would have alone. With 32 answers to a prompt as long as
they are, half of the tokens are saved. The attention is registered with transformers as `shared_prompt`.

Shapes: H query heads, K key-value heads, T tokens of the row, A answers of a group, L longest answer, P prompt length,
D head width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

SHARED_PROMPT = "shared_prompt"


@dataclass(frozen=True)
class Group:
    """Token ids of a prompt and of its answers, none of them empty."""

    prompt: list[int]
    answers: list[list[int]]

    @property
    def tokens(self) -> int:
        return len(self.prompt) + sum(map(len, self.answers))


@dataclass(frozen=True)
class Span:
    """Where a group lies in the row, and how its answers are laid side by side for attention."""

    start: int
    answers_start: int
    end: int
    index_AL: torch.Tensor  # place in the row of each answer's tokens; anything behind its end
    real_AL: torch.Tensor
    visible_LS: torch.Tensor  # an answer's token l sees the prompt and the answer up to l; S = P + L


def pack(groups: Sequence[Group], device: torch.device) -> dict[str, Any]:
    """The model's inputs for one row of groups; `last_tokens` are the ends of the answers, in order."""
    ids: list[int] = []
    positions: list[int] = []
    last: list[int] = []
    spans = []
    for group in groups:
        start, prompt = len(ids), len(group.prompt)
        lengths = torch.tensor([len(answer) for answer in group.answers], device=device)
        starts = start + prompt + lengths.cumsum(0) - lengths
        columns = torch.arange(int(lengths.max()), device=device)
        real = columns < lengths[:, None]
        visible = torch.ones(len(columns), prompt + len(columns), dtype=torch.bool, device=device).tril(prompt)
        ids += group.prompt
        positions += range(prompt)
        for answer in group.answers:
            ids += answer
            positions += range(prompt, prompt + len(answer))
            last.append(len(ids) - 1)
        index = torch.where(real, starts[:, None] + columns, starts[:, None])
        spans.append(Span(start, start + prompt, len(ids), index, real, visible))
    return {
        "input_ids": torch.tensor([ids], device=device),
        "position_ids": torch.tensor([positions], device=device),
        "last_tokens": torch.tensor(last, device=device),
        "spans": spans,
    }


def shared_prompt_attention(
    _module: nn.Module,
    query_1HTD: torch.Tensor,
    key_1KTD: torch.Tensor,
    value_1KTD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    spans: Sequence[Span] | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of a row laid out by `pack`. Returns [1, T, H, D] and no attention weights."""
    if spans is None or attention_mask is not None:
        raise ValueError("shared-prompt attention takes the spans of `pack` and no attention mask")
    grouped = query_1HTD.shape[1] != key_1KTD.shape[1]
    out_1HTD = torch.empty_like(query_1HTD)
    for span in spans:
        prompt = slice(span.start, span.answers_start)
        q, k, v = (x[:, :, prompt] for x in (query_1HTD, key_1KTD, value_1KTD))
        if span.answers_start > span.start:
            out_1HTD[:, :, prompt] = scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=scaling, enable_gqa=grouped
            )
        query, key, value = (x[0][:, span.index_AL].transpose(0, 1) for x in (query_1HTD, key_1KTD, value_1KTD))
        key, value = (
            torch.cat([shared.expand(len(own), -1, -1, -1), own], dim=2) for shared, own in ((k, key), (v, value))
        )
        answers_AHLD = scaled_dot_product_attention(
            query, key, value, attn_mask=span.visible_LS, scale=scaling, enable_gqa=grouped
        )
        out_1HTD[0, :, span.answers_start : span.end] = answers_AHLD.transpose(0, 1)[:, span.real_AL]
    return out_1HTD.transpose(1, 2), None


def register() -> None:
    """Make `attn_implementation="shared_prompt"` known to transformers."""
    AttentionInterface.register(SHARED_PROMPT, shared_prompt_attention)
    AttentionMaskInterface.register(SHARED_PROMPT, _no_mask)


def _no_mask(*_: Any, **__: Any) -> None:
    """The spans are the mask."""
