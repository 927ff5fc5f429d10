"""Turns a training checkpoint into a clean model folder, and compares what vLLM and transformers make of it.

    alignment export runs/demo/sft/checkpoints/checkpoint-1894 models/sft --check-prompts rows.jsonl

A checkpoint of our trainers holds the model as an ordinary folder (alignment/moe/export.py) beside the optimizer's
state. What is left is to take the model out of it, and to see that an engine serves the same distribution.
"""

import shutil
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from alignment import atomic, chat, models
from alignment.config import EngineConfig, ModelConfig
from alignment.errors import UserError
from alignment.rows import read_rows
from alignment.training import WHOLE

WEIGHTS_AND_CONFIG = ("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json")
# Mean absolute gap between vLLM's and transformers' log-probabilities, in nats. docs/moe.md has the measurements.
GATE = {"float32": 2e-5, "bfloat16": 0.04}
MAX_TOKENS = 1024
DRAWN_SEQUENCES, DRAWN_TOKENS = 8, 96


class GapError(RuntimeError):
    """vLLM does not serve the model that transformers loads from the folder."""


@dataclass(frozen=True)
class Gap:
    """Absolute differences of log-probabilities on the same tokens, in nats."""

    mean: float
    largest: float
    tokens: int


def export(
    source: Path,
    target: Path,
    prompts: str | None = None,
    limit: int = 32,
    gate: float | None = None,
    dtype: str | None = None,
) -> str:
    """Write the model of `source` to `target`, checked against vLLM. Returns the line to print.

    `source` is a checkpoint or a model folder. The check runs on the first `limit` rows of `prompts` (`messages` or
    `prompt`) or, without them, on tokens drawn at random. Both engines compute in `dtype` (default: the weights' own);
    `gate` bounds the mean gap (default: `GATE` of the dtype).

    Raises:
        UserError: a checkpoint that was not written to its end, no causal language model, or a target in use.
        GapError: the mean gap exceeds the gate; `target` is then not written.
    """
    config = check_source(source)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target}: exists already; choose another folder")
    dtype = dtype or str(config.dtype).removeprefix("torch.")
    if dtype not in GATE:
        raise UserError(f"{source}: cannot be compared in {dtype}: expected {' or '.join(GATE)}; give --dtype")
    bound = GATE[dtype] if gate is None else gate
    tokenizer = models.load_tokenizer(ModelConfig(path=str(source)))
    token_ids = check_tokens(config, tokenizer, prompts, limit)
    with atomic.replacing_folder(target) as folder:
        copy_model(source, folder, tokenizer)
        gap = logprob_gap(folder, token_ids, dtype)
        found = f"{dtype} log-probs of vLLM and transformers on {gap.tokens} tokens: max gap {gap.largest:.2g}, mean"
        if not gap.mean <= bound:
            raise GapError(f"{source}: {found} {gap.mean:.2g}, expected at most {bound:.2g}; {target} is not written")
    return f"{target}: exported from {source}; {found} {gap.mean:.2g} (gate {bound:.2g})"


def check_source(folder: Path) -> PreTrainedConfig:
    """The model's config, where the folder is a whole checkpoint or a model folder.

    Raises:
        UserError: a torn checkpoint, no model folder, or a model that is not a causal language model.
    """
    is_checkpoint = folder.name.startswith("checkpoint-") or (folder / "trainer_state.json").exists()
    if folder.is_dir() and is_checkpoint and not (folder / WHOLE).exists():
        raise UserError(
            f"{folder}: a checkpoint that was not written to its end: it has no {WHOLE} marker\n"
            "take an earlier one, or resume the run"
        )
    if (folder / "adapter_config.json").exists():
        raise UserError(f"{folder}: holds an adapter; merge it into its base model first")
    models.check_model_folder(folder)
    config = models.config_of(ModelConfig(path=str(folder)))
    [architecture] = config.architectures or ["no architecture"]
    if not architecture.endswith("ForCausalLM"):
        raise UserError(f"{folder}: holds {architecture}, expected a causal language model: vLLM compares log-probs")
    return config


def copy_model(source: Path, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Weights, configs and tokenizer; nothing of the optimizer."""
    for pattern in WEIGHTS_AND_CONFIG:
        for path in source.glob(pattern):
            shutil.copyfile(path, folder / path.name)
    tokenizer.save_pretrained(folder)
    for path in folder.iterdir():
        atomic.sync(path)


def check_tokens(
    config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, prompts: str | None, limit: int
) -> list[list[int]]:
    """The sequences to compare on, cut to what the model's context and `MAX_TOKENS` allow."""
    room = min(MAX_TOKENS, config.max_position_embeddings) - 1  # vLLM must generate one token
    if prompts is None:
        drawn = np.random.default_rng(0).integers(config.vocab_size, size=(DRAWN_SEQUENCES, min(DRAWN_TOKENS, room)))
        return [[int(token) for token in sequence] for sequence in drawn]
    return [_render(tokenizer, row, prompts)[:room] for row in islice(read_rows(prompts), limit)]


def _render(tokenizer: PreTrainedTokenizerBase, row: dict[str, object], source: str) -> list[int]:
    options = chat.template_options(row)
    if "messages" in row:
        return chat.render(tokenizer, row["messages"], **options).input_ids  # type: ignore[arg-type]
    if "prompt" in row:
        return chat.render_prompt(tokenizer, row["prompt"], **options)  # type: ignore[arg-type]
    raise UserError(f"{source}: a row has neither 'messages' nor 'prompt'; it has {', '.join(row)}")


def logprob_gap(folder: Path, token_ids: list[list[int]], dtype: str) -> Gap:
    """Log-probabilities of every token but a sequence's first, by transformers and by vLLM, one after the other."""
    from alignment.rollout.engine import VLLMEngine
    from alignment.rollout.proof import reference_logprobs

    reference = reference_logprobs(folder, token_ids, dtype)
    settings = EngineConfig(max_model_len=max(16, *(len(ids) + 1 for ids in token_ids)), max_num_seqs=len(token_ids))
    with VLLMEngine(folder, settings, dtype=dtype, verify=False) as engine:
        served = engine.logprobs(token_ids)
    gaps = np.abs(np.concatenate(served) - np.concatenate(reference))
    return Gap(float(gaps.mean()), float(gaps.max()), len(gaps))
