"""Judge reward models by pairs: how often the chosen answer of a prompt scores above the rejected ones.

    python -m reward.pairwise --config configs/reward/pairwise.yaml

As RewardBench does (Lambert et al. 2024, arXiv 2403.13787): accuracy by subset; by category the average of its subsets
weighted by their rows; overall the plain mean of the categories. With several rejected answers the chosen one must
score above them all (RewardBench 2: Malik et al. 2025, arXiv 2506.01937). Intervals are of the bootstrap over prompts
within each category, with the same resamples for all models, so that differences are paired. Writes pairwise.json,
table.md, judged.parquet (each row's credit), ledger.json and the metrics. Models whose scores are there are not run
again when the job resumes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerBase

from alignment import atomic, chat, job, models, stats
from alignment.config import ModelConfig
from alignment.errors import UserError, did_you_mean
from alignment.ledger import Ledger
from alignment.rows import first_rows, local_inputs
from alignment.stats import Array, Interval
from reward import tables
from reward.comparisons import Comparison, comparison_of, credit, read_comparisons
from reward.config import PairwiseConfig
from reward.scorer import Scorer
from reward.selection import points

Scores = list[list[float]]  # of each row: the chosen answer's, then those of the rejected


@dataclass(frozen=True)
class Group:
    """Accuracies of all models [M] on some rows, and in each resample [R, M]."""

    rows: int
    prompts: int
    values_M: Array
    means_RM: Array

    def interval(self, model: int) -> Interval:
        return stats.bootstrap_interval(float(self.values_M[model]), self.means_RM[:, model], self.prompts)

    def gain(self, one: int, other: int) -> Interval:
        value = float(self.values_M[one] - self.values_M[other])
        return stats.bootstrap_interval(value, self.means_RM[:, one] - self.means_RM[:, other], self.prompts)


@dataclass(frozen=True)
class Accuracies:
    """Of each model: overall, by category and by subset."""

    models: list[str]
    overall: Group
    categories: dict[str, Group]
    subsets: dict[str, Group]

    def gains(self) -> list[tuple[str, str, Interval]]:
        """Of each model over each that is named before it."""
        pairs = combinations(range(len(self.models)), 2)
        return [(self.models[one], self.models[other], self.overall.gain(one, other)) for other, one in pairs]


def run(config: PairwiseConfig) -> None:
    with job.Job.open("reward.pairwise", config, local_inputs(config.rows, *config.models.values())) as this:
        if this.done:
            return
        ledger = Ledger()
        rows = without_overlong(read_comparisons(config, ledger), config, ledger)
        if not rows:
            raise UserError(f"{config.rows}: no row is left to judge: {dict(ledger.dropped)}")
        scores = all_scores(rows, config, this.dir)
        credits = {name: [credit(row[0], row[1:]) for row in found] for name, found in scores.items()}
        found = judge(rows, credits, seed=config.seed, resamples=config.resamples)
        _write_credits(this.dir / "judged.parquet", rows, credits)
        ledger.write(this.dir / "ledger.json")
        atomic.write_json(this.dir / "pairwise.json", as_json(found))
        text = table(found)
        atomic.write_text(this.dir / "table.md", text + "\n")
        print(text)
        this.finish(metrics(found, scores, ledger))


def without_overlong(rows: Sequence[Comparison], config: PairwiseConfig, ledger: Ledger) -> list[Comparison]:
    """The rows that every model can read: all are judged on the same ones."""
    kept = list(rows)
    for folder in config.models.values():
        tokenizer = models.load_tokenizer(ModelConfig(path=folder))
        kept = [row for row in kept if _length(row, tokenizer) <= config.max_length]
    for _ in range(len(rows) - len(kept)):
        ledger.rows_out -= 1
        ledger.drop("overlong")
    return kept


def _length(row: Comparison, tokenizer: PreTrainedTokenizerBase) -> int:
    answers = [chat.render_completion(tokenizer, text) for text in (row.chosen, *row.rejected)]
    return len(_prompt(tokenizer, row)) + max(map(len, answers))


def _prompt(tokenizer: PreTrainedTokenizerBase, row: Comparison) -> list[int]:
    return chat.render_prompt(tokenizer, row.prompt, **chat.template_options(row.row))


def all_scores(rows: Sequence[Comparison], config: PairwiseConfig, folder: Path) -> dict[str, Scores]:
    """The scores of each model, kept in `folder`, and of each pair of columns."""
    found = {}
    for name, model in config.models.items():
        path = folder / "scores" / f"{name}.parquet"
        if not path.exists():
            scores = score(rows, Path(model), config.batch_tokens)
            with atomic.replacing(path) as temporary:
                pq.write_table(pa.table({"scores": scores}), temporary)
        found[name] = pq.read_table(path)["scores"].to_pylist()
    return found | {name: columns(rows, *names) for name, names in config.score_columns.items()}


def score(rows: Sequence[Comparison], folder: Path, batch_tokens: int) -> Scores:
    tokenizer = models.load_tokenizer(ModelConfig(path=str(folder)))
    prompts, answers = [], []
    for row in rows:
        prompts += [_prompt(tokenizer, row)] * (1 + len(row.rejected))
        answers += [chat.render_completion(tokenizer, text) for text in (row.chosen, *row.rejected)]
    scores = iter(Scorer(folder, batch_tokens).score(prompts, answers))
    return [[next(scores) for _ in range(1 + len(row.rejected))] for row in rows]


def columns(rows: Sequence[Comparison], chosen: str, rejected: str) -> Scores:
    """Scores that stand beside the answers: a number for the chosen one, a number or a list for the rejected."""
    found = []
    for row in rows:
        for name in (chosen, rejected):
            if name not in row.row:
                raise UserError(f"{row.where}: no column {name!r}{did_you_mean(name, row.row)}")
        worse = row.row[rejected] if isinstance(row.row[rejected], list) else [row.row[rejected]]
        values = [row.row[chosen], *worse]
        numbers = all(isinstance(v, int | float) and not isinstance(v, bool) and np.isfinite(v) for v in values)
        if not numbers or len(worse) != len(row.rejected):
            raise UserError(
                f"{row.where}: expected a finite number in {chosen!r} and {len(row.rejected)} in {rejected!r}, "
                f"found {row.row[chosen]!r} and {row.row[rejected]!r}"
            )
        found.append([float(v) for v in values])
    return found


def judge(
    rows: Sequence[Comparison], credits: Mapping[str, Sequence[float]], *, seed: int, resamples: int
) -> Accuracies:
    """Accuracies from each row's credit by each model."""
    credits_CM = np.array(list(credits.values()), dtype=np.float64).T

    def groups(name_of: Callable[[Comparison], str]) -> dict[str, Group]:
        names = sorted({name_of(row) for row in rows})
        chosen = {name: [i for i, row in enumerate(rows) if name_of(row) == name] for name in names}
        # A seed for each: groups with as many prompts must not be resampled alike.
        return {
            name: _group([rows[i].key for i in members], credits_CM[members], [seed, number], resamples)
            for number, (name, members) in enumerate(chosen.items())
        }

    categories = groups(lambda row: row.category)
    parts = list(categories.values())
    overall = Group(
        rows=sum(part.rows for part in parts),
        prompts=sum(part.prompts for part in parts),
        values_M=np.mean([part.values_M for part in parts], axis=0),
        means_RM=np.mean([part.means_RM for part in parts], axis=0),
    )
    return Accuracies(list(credits), overall, categories, groups(lambda row: row.subset))


def _group(keys: Sequence[str], credits_CM: Array, seed: Sequence[int], resamples: int) -> Group:
    prompts = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    prompt_C = [prompts[key] for key in keys]
    sums_PM = np.zeros((len(prompts), credits_CM.shape[1]))
    np.add.at(sums_PM, prompt_C, credits_CM)
    sizes_P = np.bincount(prompt_C).astype(np.float64)
    means_RM = stats.resampled_means(sums_PM, sizes_P, seed=seed, resamples=resamples)
    return Group(len(keys), len(prompts), credits_CM.mean(axis=0), means_RM)


def metrics(found: Accuracies, scores: Mapping[str, Scores], ledger: Ledger) -> dict[str, float]:
    values: dict[str, float] = {"rows": found.overall.rows, "rows.dropped": ledger.dropped.total()}
    values["prompts"] = found.overall.prompts
    for number, name in enumerate(found.models):
        values |= found.overall.interval(number).as_metrics(f"accuracy.{name}")
        for category, group in found.categories.items():
            values |= group.interval(number).as_metrics(f"category.{category}.{name}")
        values[f"ties.{name}"] = sum(max(row[1:]) == row[0] for row in scores[name])
    for one, other, gain in found.gains():
        values |= gain.as_metrics(f"gain.{one}.over.{other}")
    return values


def as_json(found: Accuracies) -> dict[str, Any]:
    def part(group: Group) -> dict[str, Any]:
        intervals = {name: group.interval(number) for number, name in enumerate(found.models)}
        accuracies = {name: {"value": i.value, "low": i.low, "high": i.high} for name, i in intervals.items()}
        return {"rows": group.rows, "prompts": group.prompts, "accuracy": accuracies}

    return {
        "overall": part(found.overall),
        "categories": {name: part(group) for name, group in found.categories.items()},
        "subsets": {name: part(group) for name, group in found.subsets.items() if name},
        "gains": [
            {"of": one, "over": other, "value": gain.value, "low": gain.low, "high": gain.high}
            for one, other, gain in found.gains()
        ],
    }


def table(found: Accuracies) -> str:
    """Overall, categories and subsets; then the differences."""
    groups = {"overall": found.overall, **found.categories}
    groups |= {f"- {name}": group for name, group in found.subsets.items() if name}
    rows = [
        [name, str(group.rows), *(_cell(group.interval(number)) for number in range(len(found.models)))]
        for name, group in groups.items()
    ]
    gains = [[f"{one} over {other}", points(gain)] for one, other, gain in found.gains()]
    parts = ["Pairs ranked right", tables.table(["", "rows", *found.models], rows)]
    parts += ["Differences overall, paired by prompt", tables.table(["", "points [95%]"], gains)] if gains else []
    return "\n\n".join(parts)


def _cell(interval: Interval) -> str:
    return f"{100 * interval.value:.1f} {tables.span(interval)}"


def _write_credits(path: Path, rows: Sequence[Comparison], credits: Mapping[str, Sequence[float]]) -> None:
    about = {name: [getattr(row, name) for row in rows] for name in ("where", "category", "subset")}
    with atomic.replacing(path) as temporary:
        pq.write_table(
            pa.table({**about, **{f"credit.{name}": list(found) for name, found in credits.items()}}), temporary
        )


def plan(config: PairwiseConfig) -> list[str]:
    for folder in config.models.values():
        models.check_model_folder(Path(folder))
    category_of = {subset: category for category, subsets in config.categories.items() for subset in subsets}
    first = first_rows(config.rows, "any")
    rows = [comparison_of(row, f"{config.rows} row {i}", category_of)[0] for i, row in enumerate(first, start=1)]
    for names in config.score_columns.values():
        columns(rows, *names)
    return [f"judge {', '.join((*config.models, *config.score_columns))} by {config.rows}"]


def main(argv: Sequence[str] | None = None) -> int:
    return job.main(PairwiseConfig, run, plan, argv)


if __name__ == "__main__":
    raise SystemExit(main())
