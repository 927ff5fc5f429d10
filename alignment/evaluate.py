"""Sample a model's answers to prompts with known answers, grade them, and report pass@1 with its interval.

    python -m alignment.evaluate --config configs/data/demo-evaluate.yaml

Writes graded.parquet (every sample with its verdict) and by_prompt.jsonl (one line a prompt); with `modes` a folder of
each mode holds them.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from alignment import job, models
from alignment.config import EngineConfig, JobConfig, ModelConfig, SamplingConfig
from alignment.errors import UserError
from alignment.grading import grade, language_of, read_graded, writing
from alignment.rollout import engine_inputs, open_engine, place
from alignment.rollout.overlap import overlapped
from alignment.rollout.samples import engine_metrics
from alignment.rollout.sampling import sample
from alignment.rollout.served import rank_of
from alignment.rows import Row, first_rows, local_inputs, read_rows, write_rows
from alignment.stats import mean_interval, paired_interval
from alignment.tally import Tally
from alignment.thinking import Mode, check_switch, in_mode, obeys
from alignment.verify import Verifier, alarms, warn_of_alarms


class EvaluateConfig(JobConfig):
    """Evaluate a model by its samples' verdicts."""

    model: str = Field(description="a model folder")
    dtype: Literal["float32", "bfloat16"] = "float32"
    prompts: str = Field(description="rows with `prompt` and `answer`")
    modes: list[Mode] = Field(
        [],
        description="fast, deep: evaluate each with the template's thinking switch set; default: neither",
    )
    sampling: SamplingConfig = SamplingConfig()
    engine: EngineConfig = EngineConfig()

    @field_validator("modes")
    @classmethod
    def _each_once(cls, given: list[Mode]) -> list[Mode]:
        if len(set(given)) < len(given):
            raise ValueError("each mode once")
        return given


def run(config: EvaluateConfig) -> None:
    with job.Job.open("alignment.evaluate", config, _inputs(config)) as this:
        if this.done:
            return
        prompts = read_prompts(config.prompts)
        with open_engine(Path(config.model), config.engine, config.dtype) as engine:
            settings = (config.sampling, config.engine, config.seed)
            if config.modes:
                metrics = evaluate_modes(engine, Path(config.model), prompts, *settings, this.dir, config.modes)
            else:
                metrics = evaluate(engine, Path(config.model), prompts, *settings, this.dir)
        this.finish(metrics)


def _inputs(config: EvaluateConfig) -> list[Path]:
    return [*engine_inputs(config.model, config.engine), *local_inputs(config.prompts)]


def read_prompts(source: str) -> list[Row]:
    """Prompts with answers, all of them; a prompt without one cannot be evaluated."""
    prompts = list(read_rows(source, "prompt"))
    for number, prompt in enumerate(prompts, start=1):
        if prompt.get("answer") is None:
            raise UserError(f"{source}: row {number} ({prompt.get('id')}) has no 'answer' to verify samples against")
    return prompts


def evaluate(
    engine: Any,
    model: Path,
    prompts: Sequence[Row],
    sampling: SamplingConfig,
    settings: EngineConfig,
    seed: int,
    folder: Path,
) -> dict[str, float | int]:
    """Sample, grade, write graded.parquet and by_prompt.jsonl into `folder`, and return the metrics."""
    tokenizer = models.load_tokenizer(ModelConfig(path=str(model)))
    tally = Tally()
    with Verifier() as verifier, writing(folder / "graded.parquet") as write:
        chunks = sample(
            engine, tokenizer, prompts, folder / "samples", sampling, seed=seed, chunk_prompts=settings.chunk_prompts
        )
        for chunk in tally.watch(overlapped(chunks, lambda chunk: grade(chunk, verifier)), len(prompts), "evaluate"):
            write(chunk.flat)
    warn_of_alarms(str(folder / "graded.parquet"), tally.verdicts)
    write_rows(folder / "by_prompt.jsonl", by_prompt(folder / "graded.parquet", prompts))
    counts = {"prompts.too_long": tally.too_long, "samples.resampled": tally.resampled}
    return summarize(folder) | counts | engine_metrics(engine)


def evaluate_modes(
    engine: Any,
    model: Path,
    prompts: Sequence[Row],
    sampling: SamplingConfig,
    settings: EngineConfig,
    seed: int,
    folder: Path,
    modes: Sequence[Mode],
) -> dict[str, float | int]:
    """Evaluate each mode into a folder of its name; of both, also what thinking changes, prompt by prompt.

    The metrics are those of `evaluate` behind `fast.` and `deep.`, with `obeys`, the share of the samples that think
    where they should and do not where they should not.
    """
    metrics: dict[str, float | int] = {}
    for mode in modes:
        asked = [in_mode(prompt, mode) for prompt in prompts]
        found = evaluate(engine, model, asked, sampling, settings, seed, folder / mode)
        obedient = [
            sum(obeys(s.completion, mode) for s in samples) / len(samples)
            for _, samples in read_graded(folder / mode / "graded.parquet")
        ]
        found |= mean_interval(obedient).as_metrics("obeys")
        metrics |= {f"{mode}.{key}": value for key, value in found.items()}
    if len(modes) == 2:
        rates = {mode: [pass_rate(row) for row in read_rows(folder / mode / "by_prompt.jsonl")] for mode in modes}
        metrics |= paired_interval(rates["fast"], rates["deep"]).as_metrics("thinking.change")
    return metrics


def by_prompt(graded: Path, prompts: Sequence[Row]) -> Iterator[Row]:
    """One row a prompt: how many of its samples are correct, and their length."""
    rows = {prompt["id"]: prompt for prompt in prompts}
    for name, samples in read_graded(graded):
        yield {
            "id": name,
            "language": language_of(rows[name]),
            "template": rows[name].get("template"),
            "n": len(samples),
            "correct": sum(s.correct for s in samples),
            "tokens": sum(len(s.token_ids) for s in samples),
            "truncated": sum(s.finish_reason == "length" for s in samples),
            "verdicts": dict(Counter(str(s.verdict) for s in samples)),
        }


def summarize(folder: Path) -> dict[str, float | int]:
    """The metrics of an evaluated folder, from its by_prompt.jsonl."""
    rows = list(read_rows(folder / "by_prompt.jsonl"))
    rates = [pass_rate(row) for row in rows]
    total = sum(row["n"] for row in rows)
    verdicts: Counter[str] = Counter()
    for row in rows:
        verdicts.update(row["verdicts"])
    groups: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        groups[f"language.{row['language']}"].append(pass_rate(row))
        if row["template"] is not None:
            groups[f"template.{row['template']}"].append(pass_rate(row))
    return (
        mean_interval(rates).as_metrics("pass_at_1")
        | {"pass_at_1.prompts": len(rows), "samples": total}
        | {f"pass_at_1.{name}": sum(values) / len(values) for name, values in sorted(groups.items())}
        | {f"verdict.{name}": count for name, count in sorted(verdicts.items())}
        | alarms(verdicts)
        | {"tokens.mean": sum(row["tokens"] for row in rows) / total}
        | {"truncated": sum(row["truncated"] for row in rows)}
    )


def pass_rate(row: Row) -> float:
    """Share of correct samples in a row of by_prompt.jsonl."""
    return float(row["correct"] / row["n"])


def plan(config: EvaluateConfig) -> list[str]:
    models.check_model(ModelConfig(path=config.model))
    if config.modes:
        check_switch(models.load_tokenizer(ModelConfig(path=config.model)))
    first_rows(config.prompts, "prompt")
    for folder in config.engine.adapters.values():
        rank_of(folder)
    check_room(config.engine, config.sampling)
    where = place(config.engine)
    return [f"{config.sampling.n} samples a prompt of {config.prompts} from {config.model}, drawn {where}"]


def check_room(engine: EngineConfig, sampling: SamplingConfig) -> None:
    """Refuse answers that leave no room for a prompt."""
    if sampling.max_tokens >= engine.max_model_len:
        raise UserError(
            f"sampling.max_tokens: {sampling.max_tokens} leaves no room for a prompt in engine.max_model_len "
            f"{engine.max_model_len}"
        )


def main(argv: Sequence[str] | None = None) -> int:
    return job.main(EvaluateConfig, run, plan, argv)


if __name__ == "__main__":
    raise SystemExit(main())
