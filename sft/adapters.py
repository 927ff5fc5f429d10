"""Train one adapter for each language, or group of languages, and measure what each does to the other languages.

    python -m sft.adapters --config configs/sft/adapters.yaml
    python -m sft.train --config runs/adapters/configs/th.yaml      # one of them, here or on another machine

The rows are split by their `language` (sft.by_language: rows/, rejects.jsonl, ledger.json). Each group is then a run
of sft.train in `output_dir/GROUP`, resumed on its own, its adapter in `output_dir/GROUP/adapter`; so is `joint`, on the
rows of all groups together, by the same recipe and in as many steps as they take one by one. With `evaluation` every
adapter is measured on every language (sft.interference): interference.md, interference.png and losses/, row by row.
With `launch` each is trained on the ranks of that launcher config, in processes of its own.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from alignment import atomic, job, languages, launch, models, training
from alignment.rows import first_rows, local_inputs
from sft import by_language, interference, interference_picture, train
from sft.config import JOINT, AdaptersConfig, SFTConfig


def run(config: AdaptersConfig) -> None:
    """Train and measure what is not done yet.

    Raises:
        UserError: the job itself was launched on several ranks; rows that sft.by_language or sft.interference refuse.
        RankFailed: a launch failed; its message stands above.
    """
    training.check_one_process("sft.adapters")
    with job.Job.open("sft.adapters", config, _inputs(config)) as this:
        if this.done:
            return
        by_language.split(config, this.dir)
        groups = by_language.groups(config, this.dir)
        metrics: dict[str, float | int | str | None] = {}
        for name in [*groups, *([JOINT] if config.joint else [])]:
            variant = config.variant(name, by_language.sources(config, this.dir, name))
            _train(this.dir, name, variant, config.launch)
            done = job.Job("sft.train", variant.output_dir, variant, {}).metrics
            metrics |= {f"{name}.{key}": value for key, value in done.items()}
        if config.evaluation is not None:
            metrics |= _interference(config, this.dir, groups)
        ledger = json.loads((this.dir / "ledger.json").read_text(encoding="utf-8"))
        counts = {"rows.in": ledger["rows_in"], "rows.out": ledger["rows_out"], "groups": len(groups)}
        this.finish(counts | metrics)


def _inputs(config: AdaptersConfig) -> list[Path]:
    model = config.base.model
    sources = [source.rows for source in config.base.sources]
    return local_inputs(*sources, *filter(None, (model.path, model.tokenizer, config.evaluation)))


def _train(folder: Path, name: str, variant: SFTConfig, launcher: Path | None) -> None:
    """Run sft.train on a group, with its config as a file beside the runs."""
    if (variant.output_dir / "DONE").exists():
        return
    print(f"sft.adapters: {name}", flush=True)
    path = folder / "configs" / f"{name}.yaml"
    atomic.write_text(path, variant.as_yaml())
    if launcher is None:
        train.run(variant)
        return
    launch.run_job("sft.train", path, launcher)


def _interference(config: AdaptersConfig, folder: Path, groups: dict[str, list[str]]) -> dict[str, float | int]:
    """Measure, write the report, and return its metrics."""
    assert config.evaluation is not None
    tokenizer = models.load_tokenizer(config.base.model)
    held = interference.held_out(config.evaluation, config.base, tokenizer)
    folders = {name: folder / name / "adapter" for name in [*groups, *([JOINT] if config.joint else [])]}
    losses = interference.measure(config.base, folders, held, tokenizer, folder / "losses")
    found = interference.matrix(losses, held.languages)
    text = interference.table(found, groups)
    atomic.write_text(folder / "interference.md", text)
    interference_picture.draw(found, groups, folder / "interference.png")
    print(text)
    return interference.as_metrics(found, groups)


def plan(config: AdaptersConfig) -> list[str]:
    training.check_one_process("sft.adapters")
    if config.identify:
        languages.detector(config.identify)
    with launch.planned_ranks(config.launch):
        lines = train.plan(config.variant(JOINT, config.base.sources))
    for source in config.base.sources:
        _check_languages(source.rows, bool(config.identify))
    if config.evaluation is not None:
        _check_languages(config.evaluation, False)
    groups = config.groups or {}
    named = "; ".join(f"{name}: {', '.join(members)}" for name, members in groups.items())
    return [*lines, f"groups: {named or 'each language of the rows'}{'; and joint' if config.joint else ''}"]


def _check_languages(source: str, identified: bool) -> None:
    for number, row in enumerate(first_rows(source, "messages"), start=1):
        if not identified:
            by_language.given_language(row, f"{source} row {number}")


def main(argv: Sequence[str] | None = None) -> int:
    return job.main(AdaptersConfig, run, plan, argv)


if __name__ == "__main__":
    raise SystemExit(main())
