"""Sample every prompt, chunk by chunk, into a store that survives a kill."""

import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from alignment.chat import render_prompt, stop_token_id
from alignment.config import SamplingConfig
from alignment.errors import UserError
from alignment.fingerprint import value_hash
from alignment.progress import track
from alignment.rollout.samples import Engine, Sample, chunk_seed
from alignment.rollout.store import Completion, SampleReader, SampleStore

Row = dict[str, Any]
logger = logging.getLogger(__name__)


def sample(
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Row],
    root: Path,
    sampling: SamplingConfig,
    *,
    seed: int,
    chunk_prompts: int = 128,
) -> SampleReader:
    """`sampling.n` answers to each prompt row (`id`, `prompt`), stored below `root` and read from there.

    The store's address holds the weights, tokenizer, prompts, parameters, seed and engine settings; chunks that are
    there are not sampled again. A chunk's samples depend on these and on nothing else, so a run that was killed ends
    with the same bytes. Prompts that leave no room for `max_tokens` are not sampled: `SampleReader.too_long`.

    Raises:
        UserError: ids that are missing or double, or no prompt that fits.
    """
    _check_ids(prompts)
    rendered = {row["id"]: render_prompt(tokenizer, row["prompt"]) for row in prompts}
    room = engine.max_model_len - sampling.max_tokens
    fitting = {name: ids for name, ids in rendered.items() if len(ids) <= room}
    too_long = [name for name in rendered if name not in fitting]
    if not fitting:
        raise UserError(
            f"no prompt fits: the shortest has {min(map(len, rendered.values()))} tokens and max_model_len "
            f"{engine.max_model_len} less max_tokens {sampling.max_tokens} leaves {room}"
        )
    if too_long:
        logger.warning("%d of %d prompts exceed %d tokens and are not sampled", len(too_long), len(prompts), room)
    stop = [stop_token_id(tokenizer)]
    made_from = {
        "weights": engine.weights,
        "engine": dict(engine.settings),
        "tokenizer": value_hash([tokenizer.get_vocab(), tokenizer.chat_template]),
        "prompts": value_hash(list(rendered.items())),
        "sampling": sampling.model_dump(),
        "stop": stop,
        "seed": seed,
        "chunk_prompts": chunk_prompts,
    }
    store = SampleStore.create(root, made_from, list(fitting), chunk_prompts, sampling.n, too_long)
    missing = [chunk for chunk in range(len(store.chunks)) if not store.has(chunk)]
    for chunk in track(missing, total=len(missing), label="sampling"):
        ids, own_seed = store.chunks[chunk], chunk_seed(seed, chunk)
        samples = engine.generate([fitting[name] for name in ids], sampling, stop, own_seed)
        store.write(chunk, _completions(tokenizer, ids, samples, own_seed))
    return SampleReader(store.folder)


def _check_ids(prompts: Sequence[Row]) -> None:
    if not prompts:
        raise UserError("no prompts to sample")
    for number, row in enumerate(prompts, start=1):
        if not isinstance(row.get("id"), str):
            raise UserError(f"prompt {number}: expected an 'id' (text), found {row.get('id')!r}")
    name, count = Counter(row["id"] for row in prompts).most_common(1)[0]
    if count > 1:
        raise UserError(f"prompt id {name!r} is given {count} times; ids must be unique")


def _completions(
    tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[str], samples: Sequence[Sequence[Sample]], seed: int
) -> list[Completion]:
    flat = [(name, i, s) for name, of_prompt in zip(prompt_ids, samples, strict=True) for i, s in enumerate(of_prompt)]
    texts = tokenizer.batch_decode([_written(s) for _, _, s in flat], clean_up_tokenization_spaces=False)
    return [
        Completion(name, index, seed, s.token_ids, text, s.finish_reason, s.logprob)
        for (name, index, s), text in zip(flat, texts, strict=True)
    ]


def _written(sample: Sample) -> list[int]:
    """The tokens of the answer proper. Other special tokens stay: thinking may be marked by such."""
    return sample.token_ids[:-1] if sample.finish_reason == "stop" else sample.token_ids
