"""Preference pairs from a policy's own samples.

    python -m data_builders.preferences --config configs/data/preferences.yaml
    python -m data_builders.preferences --config configs/data/preferences.yaml --shard 2/8   # of eight machines

Samples every prompt; those that are sampled are verified, scored and paired (data_builders.pairs) meanwhile. Writes
samples/ and graded/ (every sample with its verdict and score, a Parquet file for each chunk of prompts), pairs.jsonl
(rows for TRL's DPOTrainer and RewardTrainer), evaluation.jsonl where a share of the prompts is set aside, rejects.jsonl
(each prompt without a pair, with the reason) and ledger.json. A shard only samples and judges; the command without
`--shard` then finds everything there and pairs it.
"""

import json
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TextIO

from transformers import PreTrainedTokenizerBase

from alignment import atomic, chat, job, models
from alignment.config import ModelConfig
from alignment.evaluate import check_room
from alignment.fingerprint import text_hash
from alignment.grading import GradedChunk, GradedSample
from alignment.ledger import Ledger
from alignment.rollout import engine_inputs, open_engine, place
from alignment.rollout.overlap import overlapped
from alignment.rollout.samples import Engine, engine_metrics
from alignment.rollout.sampling import WHOLE, Shard, sample
from alignment.rows import Row, first_rows, local_inputs
from alignment.tally import Tally
from alignment.verify import alarms, verdict_metrics, warn_of_alarms
from data_builders.config import BuildConfig, PairingConfig, PreferencesConfig
from data_builders.judge import judging
from data_builders.pairs import Candidate, Discard, Origin, choose, eligible, pair_row
from data_builders.sources import draw_prompts, expected_prompts

Numbers = dict[str, float | int]

BY_SHARDS = ("samples", "graded", "shards")  # folders that runs with `--shard` make
MEASURED = 8  # prompts that a dry run samples


def run(config: PreferencesConfig) -> None:
    rows = (source.rows for source in config.all_sources.values())
    inputs = [*engine_inputs(config.model, config.engine), *local_inputs(*rows, *config.reward_models)]
    own = config.model_copy(update={"output_dir": config.run_dir})
    with job.Job.open("data_builders.preferences", own, list(dict.fromkeys(inputs)), BY_SHARDS) as this:
        if this.done:
            return
        ledger = Ledger()
        prompts = draw_prompts(config.all_sources, config.seed, ledger)
        total = expected_prompts(config.all_sources)
        tokenizer = models.load_tokenizer(ModelConfig(path=config.model))
        with open_engine(Path(config.model), config.engine, config.dtype) as engine:
            options: dict[str, Any] = {"seed": config.seed, "total": total}
            if config.shard is not None:
                metrics = judge_shard(engine, tokenizer, prompts, config, Shard.parse(config.shard), **options)
            else:
                origin = origin_of(engine, tokenizer)
                writer = PairWriter(this.dir, config.pairing, config.evaluation_share, config.seed, ledger, origin)
                metrics = build(engine, tokenizer, prompts, config, this.dir, writer, **options)
        this.finish(metrics)


def build(
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Iterable[Row],
    config: BuildConfig,
    folder: Path,
    writer: "PairWriter",
    *,
    seed: int,
    total: int | None,
) -> Numbers:
    """Sample, judge and pair `prompts` into `folder`; what is there already is kept. Returns the counts."""
    tally = Tally()
    with writer.files():
        for chunk in judged(engine, tokenizer, prompts, config, folder, tally, seed=seed, total=total):
            writer.add(chunk)
    warn_of_alarms(str(folder), tally.verdicts)
    return {**writer.counts(), **_sampled(tally), **engine_metrics(engine)}


def judged(
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Iterable[Row],
    config: BuildConfig,
    folder: Path,
    tally: Tally,
    *,
    seed: int,
    total: int | None,
    shard: Shard = WHOLE,
) -> Iterator[GradedChunk]:
    """Chunks with verdicts and scores, in order; each is judged while the next is sampled."""
    with judging(config.reward_models, config.score_batch_tokens, tokenizer, folder / "graded") as judge:
        chunks = sample(
            engine,
            tokenizer,
            prompts,
            folder / "samples",
            config.sampling,
            seed=seed,
            chunk_prompts=config.engine.chunk_prompts,
            shard=shard,
        )
        yield from tally.watch(overlapped(chunks, judge), total, "sampling")


def judge_shard(
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Iterable[Row],
    config: PreferencesConfig,
    shard: Shard,
    *,
    seed: int,
    total: int | None,
) -> Numbers:
    """Sample and judge one machine's chunks into the folder that all share."""
    tally = Tally()
    expected = None if total is None else total // shard.of
    chunks = judged(
        engine, tokenizer, prompts, config, config.output_dir, tally, seed=seed, total=expected, shard=shard
    )
    for _ in chunks:
        pass
    return {**_sampled(tally), **engine_metrics(engine)}


def _sampled(tally: Tally) -> Numbers:
    return {
        "samples": tally.samples,
        "samples.resampled": tally.resampled,
        "samples.cut_off": tally.cut_off,
        "samples.tokens": tally.tokens,
        **(verdict_metrics(tally.verdicts) | alarms(tally.verdicts) if tally.verdicts else {}),
    }


def origin_of(engine: Engine, tokenizer: PreTrainedTokenizerBase) -> Origin:
    """What the engine's samples come from, at present."""
    return Origin(engine.weights, chat.tokenizer_hash(tokenizer))


class PairWriter:
    """Pairs and rejects to their files, chunk by chunk, and the account of every prompt and sampled token."""

    def __init__(
        self,
        folder: Path,
        pairing: PairingConfig,
        evaluation_share: float,
        seed: int,
        ledger: Ledger,
        origin: Origin,
    ) -> None:
        self._folder, self._pairing, self._share, self._seed = folder, pairing, evaluation_share, seed
        self.ledger, self._origin = ledger, origin
        self._files: dict[str, TextIO] = {}
        self._counts: Counter[str] = Counter()
        self._pass_rates: list[float] = []

    @contextmanager
    def files(self) -> Iterator[None]:
        """Inside the block `add` may be called; after it the files are whole, or as they were."""
        names = ["pairs", "rejects", *(["evaluation"] if self._share > 0 else [])]
        with ExitStack() as stack:
            for name in names:
                temporary = stack.enter_context(atomic.replacing(self._folder / f"{name}.jsonl"))
                self._files[name] = stack.enter_context(temporary.open("w", encoding="utf-8"))
            yield
        self.ledger.write(self._folder / "ledger.json")

    def add(self, chunk: GradedChunk) -> None:
        for prompt, samples in zip(chunk.prompts, chunk.samples, strict=True):
            self._add(prompt, samples)

    def counts(self) -> Numbers:
        known = ("pairs", "pairs.evaluation", "samples.duplicate")
        rates = {"pass_rate": sum(self._pass_rates) / len(self._pass_rates)} if self._pass_rates else {}
        return {
            "prompts": self.ledger.rows_in,
            **{key: self._counts[key] for key in known},
            **self.ledger.dropped_metrics(),
            **rates,
        }

    def _add(self, prompt: Row, samples: Sequence[GradedSample] | None) -> None:
        tokens = sum(len(s.token_ids) for s in samples or ())
        self.ledger.rows_in += 1
        self.ledger.tokens_in += tokens
        if samples is None:
            self._reject(prompt, "prompt too long", 0)
            return
        if prompt.get("answer") is not None:
            self._pass_rates.append(sum(s.correct for s in samples) / len(samples))
        whole = [s for s in samples if s.finish_reason == "stop"]
        candidates = eligible([_candidate(s) for s in samples])
        self._counts["samples.duplicate"] += len(whole) - len(candidates)
        pairs = choose(candidates, self._pairing, f"{self._seed}/{prompt['id']}")
        if isinstance(pairs, Discard):
            self._reject(prompt, pairs.reason, tokens)
            return
        aside = _falls_aside(prompt["id"], self._share, self._seed)
        for pair in pairs:
            self._write("evaluation" if aside else "pairs", pair_row(prompt, pair, self._origin))
        self._counts["pairs.evaluation" if aside else "pairs"] += len(pairs)
        trained = sum({c.index: c.tokens for pair in pairs for c in (pair.chosen, pair.rejected)}.values())
        self.ledger.rows_out += 1
        self.ledger.tokens_trained += trained
        self.ledger.tokens_dropped += tokens - trained

    def _reject(self, prompt: Row, reason: str, tokens: int) -> None:
        self.ledger.drop(reason, tokens)
        self._write("rejects", prompt | {"reason": reason})

    def _write(self, name: str, row: Row) -> None:
        self._files[name].write(json.dumps(row, ensure_ascii=False) + "\n")


def _candidate(sample: GradedSample) -> Candidate:
    return Candidate(
        sample.index, sample.completion, sample.token_ids, sample.finish_reason, sample.verdict, sample.score
    )


def _falls_aside(name: str, share: float, seed: int) -> bool:
    return int(text_hash(f"{seed}/{name}")[:8], 16) < share * 2**32


def plan(config: PreferencesConfig) -> list[str]:
    for folder in (config.model, *config.reward_models):
        models.check_model(ModelConfig(path=folder))
    for source in config.all_sources.values():
        first_rows(source.rows, "prompt")
    check_room(config.engine, config.sampling)
    names = ", ".join(f"{s.rows}{f' ({s.quota})' if s.quota else ''}" for s in config.all_sources.values())
    return [
        f"{config.sampling.n} samples a prompt of {names} from {config.model}, drawn {place(config.engine)}",
        f"paired by {rule(config)}",
    ]


def rule(config: BuildConfig) -> str:
    """In words, by what samples are paired."""
    if not config.pairing.math_rule:
        return f"reward models alone, {config.pairing.policy}"
    return f"the math rule, {'reward models' if config.reward_models else 'at random'}"


def forecast(config: PreferencesConfig) -> list[str]:
    """Tokens, time and disk of the whole job, from the first prompts, sampled and judged for real."""
    prompts = draw_prompts(config.all_sources, config.seed, Ledger())
    return measured(config, config.model, config.dtype, prompts, config.seed, expected_prompts(config.all_sources))


def measured(
    config: BuildConfig, model: str, dtype: str, prompts: Iterable[Row], seed: int, total: int | None
) -> list[str]:
    """What `total` prompts will take, from the first of `prompts`, sampled and judged for real."""
    tokenizer = models.load_tokenizer(ModelConfig(path=model))
    first = islice(prompts, MEASURED)
    tally = Tally()
    with (
        TemporaryDirectory() as scratch,
        open_engine(Path(model), config.engine, dtype) as engine,
    ):
        began = time.monotonic()
        for _ in judged(engine, tokenizer, first, config, Path(scratch), tally, seed=seed, total=None):
            pass
        seconds = (time.monotonic() - began) / tally.prompts
        size = sum(path.stat().st_size for path in Path(scratch).rglob("*") if path.is_file()) / tally.prompts
    tokens = tally.tokens / tally.prompts
    many = total or tally.prompts
    return [
        f"measured on {tally.prompts} prompts: {tokens:,.0f} tokens, {seconds:.2f} s and {size / 1e3:,.0f} kB a prompt",
        f"all {many:,} prompts: {tokens * many:,.0f} tokens, {seconds * many / 3600:,.2f} hours at this speed (a full "
        f"engine is faster), {size * many / 1e9:,.3f} GB of disk",
    ]


def main(argv: Sequence[str] | None = None) -> int:
    return job.main(PreferencesConfig, run, plan, with_shard(sys.argv[1:] if argv is None else argv), forecast)


def with_shard(argv: Sequence[str]) -> list[str]:
    """`--shard I/N` as the override that it stands for."""
    given = list(argv)
    if "--shard" in given[:-1]:
        at = given.index("--shard")
        given[at : at + 2] = [f"shard={given[at + 1]}"]
    return given


if __name__ == "__main__":
    raise SystemExit(main())
