"""Sample prompts, chunk by chunk, into a store that survives a kill."""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from alignment.chat import render_prompt, stop_token_id, template_options, tokenizer_hash
from alignment.config import SamplingConfig
from alignment.errors import UserError
from alignment.rollout.budget import Marks, generate_within
from alignment.rollout.samples import Engine, Routed, Sample, generate
from alignment.rollout.seeds import sample_seed
from alignment.rollout.store import Completion, SampleStore
from alignment.rows import Row

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Chunk:
    """Prompts that were sampled together, and beside each its samples; None where it is too long for the model.

    `name` is the chunk's number and its samples' address: no other samples have it. `resampled` where they had been
    stored, but could not be read.
    """

    name: str
    prompts: list[Row]
    samples: list[list[Completion] | None]
    resampled: bool = False


@dataclass(frozen=True)
class Shard:
    """Every `of`-th chunk, from number `number` on, counted from 0: what one of several machines does."""

    number: int = 0
    of: int = 1

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """`I/N`, counted from 1, as people write it."""
        number, of = map(int, text.split("/"))
        return cls(number - 1, of)


WHOLE = Shard()


def sample(
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Iterable[Row],
    root: Path,
    sampling: SamplingConfig,
    *,
    seed: int,
    chunk_prompts: int = 128,
    shard: Shard = WHOLE,
) -> Iterator[Chunk]:
    """`sampling.n` answers to each prompt row (`id`, `prompt`), stored below `root`, a chunk at a time.

    A row's `chat_template_kwargs` and `tools` go to the chat template.

    An engine with adapters answers each row by the one of its language.

    A chunk is `chunk_prompts` consecutive rows; one that is stored is not sampled again. A chunk's samples depend on
    its prompts, the weights, tokenizer, parameters, seed and engine settings alone, so a run that was killed, or spread
    over machines, ends with the same bytes. Prompts that leave no room for `max_tokens` are not sampled.

    Raises:
        UserError: ids that are missing or double, no prompts, or none that fits.
    """
    made_from = {
        "weights": engine.weights,
        "engine": dict(engine.settings),
        "tokenizer": tokenizer_hash(tokenizer),
        "sampling": sampling.model_dump(exclude={"n"}),
        "stop": stop_token_id(tokenizer),
        "seed": seed,
    }
    store = SampleStore(root, made_from, sampling.n)
    room = engine.max_model_len - sampling.max_tokens
    given = too_long = 0
    for number, rows in enumerate(chunks_of(unique_rows(prompts), chunk_prompts)):
        if number % shard.of != shard.number:
            continue
        fitting = _fitting(tokenizer, rows, room)
        given += len(rows)
        too_long += len(rows) - len(fitting)
        adapters = [
            engine.routes.of(row) if isinstance(engine, Routed) else None for row in rows if row["id"] in fitting
        ]
        asked = _asked(engine, fitting, adapters)
        stored = store.shard(asked).exists()
        samples = store.read(asked) if fitting else []
        resampled = stored and samples is None
        if samples is None:
            samples = _draw(engine, tokenizer, fitting, adapters, sampling, seed)
            store.write(asked, samples)
        found = dict(zip(fitting, samples, strict=True))
        name = f"{number:06d}-{store.folder.name}-{store.shard(asked).stem}"
        yield Chunk(name, rows, [found.get(row["id"]) for row in rows], resampled)
    if given and given == too_long:
        raise UserError(
            f"no prompt fits: all have more than {room} tokens, which max_model_len {engine.max_model_len} less "
            f"max_tokens {sampling.max_tokens} leaves"
        )
    if too_long:
        logger.warning("%d of %d prompts exceed %d tokens and are not sampled", too_long, given, room)


def unique_rows(prompts: Iterable[Row]) -> Iterator[Row]:
    seen: set[str] = set()
    for number, row in enumerate(prompts, start=1):
        name = row.get("id")
        if not isinstance(name, str):
            raise UserError(f"prompt {number}: expected an 'id' (text), found {name!r}")
        if name in seen:
            raise UserError(f"prompt {number}: the id {name!r} is given a second time; ids must be unique")
        seen.add(name)
        yield row
    if not seen:
        raise UserError("no prompts to sample")


def chunks_of(rows: Iterator[Row], size: int) -> Iterator[list[Row]]:
    while chunk := list(islice(rows, size)):
        yield chunk


def _fitting(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], room: int) -> dict[str, list[int]]:
    """Id -> tokens of the prompts that leave room for an answer."""
    rendered = {row["id"]: render_prompt(tokenizer, row["prompt"], **template_options(row)) for row in rows}
    return {name: ids for name, ids in rendered.items() if len(ids) <= room}


def _asked(
    engine: Engine, prompts: Mapping[str, Sequence[int]], adapters: Sequence[str | None]
) -> Mapping[str, Sequence[Any]]:
    """What addresses the samples: the prompts and, of an engine with adapters, which of them answers."""
    if not isinstance(engine, Routed):
        return prompts
    return {name: [ids, adapter] for (name, ids), adapter in zip(prompts.items(), adapters, strict=True)}


def _draw(
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Mapping[str, Sequence[int]],
    adapters: Sequence[str | None],
    sampling: SamplingConfig,
    seed: int,
) -> list[list[Completion]]:
    seeds = [[sample_seed(seed, name, index) for index in range(sampling.n)] for name in prompts]
    stop = [stop_token_id(tokenizer)]
    if sampling.thinking_budget is None:
        samples = generate(engine, adapters, list(prompts.values()), seeds, sampling, stop)
    else:
        marks = Marks.of(tokenizer)
        samples = generate_within(engine, list(prompts.values()), seeds, sampling, stop, marks, adapters)
    written = [_written(s) for of_prompt in samples for s in of_prompt]
    texts = iter(tokenizer.batch_decode(written, clean_up_tokenization_spaces=False))
    return [
        [
            Completion(name, index, own[index], s.token_ids, next(texts), s.finish_reason, s.logprob)
            for index, s in enumerate(of_prompt)
        ]
        for name, own, of_prompt in zip(prompts, seeds, samples, strict=True)
    ]


def _written(sample: Sample) -> list[int]:
    """The tokens of the answer proper. Other special tokens stay: thinking may be marked by such."""
    return sample.token_ids[:-1] if sample.finish_reason == "stop" else sample.token_ids
