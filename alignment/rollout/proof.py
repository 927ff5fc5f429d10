"""Proof that an engine serves the weights of a model folder: its log-probabilities of a probe against transformers'."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from alignment.config import ModelConfig
from alignment.errors import UserError
from alignment.models import load_pretrained

PROBE_TOKENS = 96
# Mean absolute gap between vLLM's and transformers' log-probabilities of the probe.
GATE = {"float32": 1e-4, "bfloat16": 0.1}
# Entries of config.json that say nothing about the shape of the weights.
UNSHAPED = ("transformers_version", "dtype", "torch_dtype", "_name_or_path", "use_cache", "eos_token_id")


@dataclass(frozen=True)
class Proof:
    """Mean absolute gaps, in nats, between the engine's log-probabilities of a probe and transformers'.

    `before` is the gap that the engine's former weights have to the same reference: what staleness would look like.
    """

    gap: float
    before: float | None


def probe(folder: Path, max_model_len: int) -> list[int]:
    """Token ids of the model's vocabulary, the same ones each time."""
    length = min(PROBE_TOKENS, max_model_len - 1)
    return [int(i) for i in np.random.default_rng(0).integers(shape_of(folder)["vocab_size"], size=length)]


def mean_gap(left: Sequence[float], right: Sequence[float]) -> float:
    return float(np.abs(np.subtract(left, right)).mean())


def mismatch(what: str, gap: float, dtype: str) -> str:
    """What to say of a gap above the gate of `dtype`."""
    return (
        f"{what}: log-probabilities of vLLM and transformers differ by {gap:.2g} on average, "
        f"expected at most {GATE[dtype]:.2g}: the engine does not serve these weights"
    )


@torch.no_grad()
def reference_logprobs(folder: Path, token_ids: Sequence[Sequence[int]], dtype: str) -> list[list[float]]:
    """What an engine's are measured against: transformers' log-probabilities of every token but the first.

    Raises:
        UserError: a folder that transformers cannot load, or not with every weight accounted for.
    """
    source = ModelConfig.model_validate({"path": str(folder), "dtype": dtype})
    model = load_pretrained(AutoModelForCausalLM, source, dtype=getattr(torch, dtype))
    model.train(False)
    return [logprobs_of(model, ids) for ids in token_ids]


@torch.no_grad()
def logprobs_of(model: nn.Module, token_ids: Sequence[int]) -> list[float]:
    """A model's log-probabilities of every token but the first."""
    ids = torch.tensor([token_ids])
    logprobs = model(ids).logits[0, :-1].float().log_softmax(-1)
    return [float(value) for value in logprobs.gather(-1, ids[0, 1:, None])]


def shape_of(folder: Path) -> dict[str, Any]:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return {key: value for key, value in config.items() if key not in UNSHAPED}


def check_shape(old: dict[str, Any], new: dict[str, Any], folder: Path) -> None:
    changed = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    if changed:
        key = changed[0]
        raise UserError(
            f"{folder}: not of the shape of the model in the engine: {key} is {new.get(key)!r}, "
            f"expected {old.get(key)!r}"
        )
