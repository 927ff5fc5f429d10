"""Judge reward models by what they pick: expected correctness of the best-scored of n samples, for n = 1, 2, 4 ... N.

    python -m reward.best_of_n --config configs/reward/best_of_n.yaml

Reads samples (reward/samples.py says how they are graded) and scores them with reward models, or takes scores that
stand in their columns. Beside the models stand the majority vote, plain and weighted by scores, the oracle (pass@n) and
the first sample (pass@1). Writes scores.parquet, curves.json, table.md, best_of_n.png, ledger.json, the metrics, and
`selected`, a link to the model that was chosen. Models whose scores are there are not run again when the job resumes.
"""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerBase

from alignment import atomic, chat, job, models, verify
from alignment.config import ModelConfig
from alignment.errors import UserError, did_you_mean
from alignment.questions import check_columns, read_ids
from alignment.rows import Row, first_rows, local_inputs
from alignment.stats import Array
from reward import curves, picture, tables
from reward.config import BestOfNConfig
from reward.judged import ensemble, judge
from reward.samples import Samples, check_sample, read_samples
from reward.scorer import Scorer
from reward.selection import read_pairwise, select

log = logging.getLogger(__name__)

PROBED = 20  # samples that the reward model's tokenizer must read as the policy's did


def run(config: BestOfNConfig) -> None:
    pairwise = [config.pairwise / "metrics.json"] if config.pairwise is not None else []
    inputs = [*config.inputs(), *local_inputs(*config.models.values()), *pairwise]
    with job.Job.open("reward.best_of_n", config, list(dict.fromkeys(inputs))) as this:
        if this.done:
            return
        candidates = [*config.models, *config.score_columns]
        accuracies = read_pairwise(config.pairwise, candidates) if config.pairwise is not None else {}
        samples = read_samples(config, this.dir)
        verify.warn_of_alarms(str(config.samples), samples.verdicts)
        scores = all_scores(samples, config, this.dir)
        _write_scores(this.dir / "scores.parquet", samples, scores)
        judged = judge(samples, scores, seed=config.seed, resamples=config.resamples)
        selection = select(judged, candidates, accuracies)
        atomic.write_json(this.dir / "curves.json", judged.as_json())
        text = f"{tables.best_of_n(judged)}\n\n{_account(samples)}\n\n{selection}\n"
        atomic.write_text(this.dir / "table.md", text)
        print(text)
        picture.draw(judged, selection.chosen.model, this.dir / "best_of_n.png")
        samples.ledger.write(this.dir / "ledger.json")
        if selection.chosen.model in config.models:
            _link(this.dir / "selected", Path(config.models[selection.chosen.model]))
        this.finish({**judged.metrics(), **_counts(samples), **selection.metrics()})


def all_scores(samples: Samples, config: BestOfNConfig, folder: Path) -> dict[str, Array]:
    """The scores [P, N] of each model, column and ensemble; each model's are kept in `folder`."""
    scores = {name: column(samples, source, config.samples) for name, source in config.score_columns.items()}
    for name, model in config.models.items():
        path = folder / "scores" / f"{name}.parquet"
        if not path.exists():
            found = score(samples, Path(model), config.batch_tokens)
            with atomic.replacing(path) as temporary:
                pq.write_table(pa.table({"score": found.ravel()}), temporary)
        scores[name] = samples.by_prompt(pq.read_table(path)["score"].to_pylist())
    scores |= {name: ensemble([scores[m] for m in members]) for name, members in config.ensembles.items()}
    return {name: scores[name] for name in (*config.models, *config.score_columns, *config.ensembles)}


def column(samples: Samples, name: str, source: Path) -> Array:
    """Scores [P, N] that stand beside the samples."""
    for row in samples.rows:
        if isinstance(row.get(name), bool) or not isinstance(row.get(name), int | float) or not np.isfinite(row[name]):
            hint = did_you_mean(name, row) if name not in row else ""
            raise UserError(
                f"{source}: sample {row['index']} of {row['id']!r}: expected a finite number in column {name!r}, "
                f"found {row.get(name)!r}{hint}"
            )
    return samples.by_prompt([row[name] for row in samples.rows])


def score(samples: Samples, folder: Path, batch_tokens: int) -> Array:
    """A reward model's scores [P, N]. It reads the sampled token ids where the samples have them, else their texts."""
    tokenizer = models.load_tokenizer(ModelConfig(path=str(folder)))
    reads_tokens = _reads_tokens(tokenizer, folder, samples.rows)
    prompts = {
        name: chat.render_prompt(tokenizer, row["prompt"], **chat.template_options(row))
        for name, row in samples.prompts.items()
    }
    answers = [
        row["token_ids"]
        if reads_tokens and row.get("token_ids") is not None
        else chat.render_completion(tokenizer, row["completion"])
        for row in samples.rows
    ]
    scores = Scorer(folder, batch_tokens).score([prompts[row["id"]] for row in samples.rows], answers)
    if not np.isfinite(scores).all():
        raise UserError(f"{folder}: {np.sum(~np.isfinite(scores))} of its scores are not finite")
    return samples.by_prompt(scores)


def metric(samples: Samples, batch_tokens: int) -> Callable[[Path], float]:
    """From a reward model's folder to its best-of-n accuracy on these samples: what greedy averaging raises.

    Scores are not kept: each call runs the model.
    """

    def accuracy(folder: Path) -> float:
        picked_P1 = curves.best_of(score(samples, folder, batch_tokens), samples.correct(), [samples.n])
        return float(picked_P1.mean())

    return accuracy


def _reads_tokens(tokenizer: PreTrainedTokenizerBase, folder: Path, rows: Sequence[Row]) -> bool:
    """Whether the sampled token ids are to this tokenizer what the samples' texts are; else it is given the texts."""
    sampled = [row for row in rows if row.get("token_ids") is not None][:PROBED]
    alike = all(
        tokenizer.decode(_written(row, tokenizer), clean_up_tokenization_spaces=False) == row["completion"]
        for row in sampled
    )
    if not alike:
        log.warning("%s: its tokenizer is not the one that sampled: it reads the samples' texts", folder)
    return bool(sampled) and alike


def _written(row: Row, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The sampled tokens without the stop token."""
    ids: list[int] = row["token_ids"]
    stopped = row["finish_reason"] == "stop" if row.get("finish_reason") else ids[-1:] == [tokenizer.eos_token_id]
    return ids[:-1] if stopped else ids


def _write_scores(path: Path, samples: Samples, scores: Mapping[str, Array]) -> None:
    table: dict[str, Any] = {name: [row[name] for row in samples.rows] for name in ("id", "index")}
    table |= {name: found.ravel() for name, found in scores.items()}
    with atomic.replacing(path) as temporary:
        pq.write_table(pa.table(table | {"verdict": [str(row["verdict"]) for row in samples.rows]}), temporary)


def _link(path: Path, folder: Path) -> None:
    """Make `path` a link to `folder`, relative to where it lies."""
    path.unlink(missing_ok=True)
    path.symlink_to(os.path.relpath(folder.resolve(), path.parent.resolve()), target_is_directory=True)


def _counts(samples: Samples) -> dict[str, float]:
    return {
        "prompts.unsampled": samples.unsampled,
        "samples.left_out": samples.ledger.dropped.total(),
        **verify.verdict_metrics(samples.verdicts),
    }


def _account(samples: Samples) -> str:
    """What the samples were, and which are not judged."""
    verdicts = ", ".join(f"{verdict} {count}" for verdict, count in sorted(samples.verdicts.items()))
    text = f"Verdicts: {verdicts}; all but correct count as 0."
    if samples.ledger.dropped:
        reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(samples.ledger.dropped.items()))
        text += f" Samples left out: {reasons}."
    return text + (f" Prompts without samples: {samples.unsampled}." if samples.unsampled else "")


def plan(config: BestOfNConfig) -> list[str]:
    for folder in config.models.values():
        models.check_model_folder(Path(folder))
    for number, row in enumerate(first_rows(config.samples, "any"), start=1):
        check_sample(row, f"{config.samples} row {number}")
        absent = next((name for name in config.score_columns.values() if name not in row), None)
        if absent is not None:
            raise UserError(f"{config.samples} row {number}: no column {absent!r}{did_you_mean(absent, row)}")
    if config.prompts is not None:
        first_rows(config.prompts, "prompt")
    if config.questions is not None:
        for number, row in enumerate(first_rows(config.questions.rows, "any"), start=1):
            check_columns(config.questions.dataset, row, f"{config.questions.rows} row {number}")
        if config.questions.verified_ids is not None:
            read_ids(config.questions.verified_ids)
    if config.pairwise is not None:
        read_pairwise(config.pairwise, [*config.models, *config.score_columns])
    return [f"judge {', '.join((*config.models, *config.score_columns, *config.ensembles))} by {config.samples}"]


def main(argv: Sequence[str] | None = None) -> int:
    return job.main(BestOfNConfig, run, plan, argv)


if __name__ == "__main__":
    raise SystemExit(main())
