"""Run the stages of a pipeline in order, each as the command that anyone could type.

Finished stages are skipped; the first failure ends the run with that stage's message and exit code.
"""

import json
import re
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field
from rich.console import Console

from alignment import atomic, job, launch
from alignment.config import Config, load_config, parse_override, read_yaml
from alignment.errors import UserError, did_you_mean
from alignment.fingerprint import file_hash, value_hash

RECORD = "pipeline.json"


class Stage(Config):
    """One job of a pipeline."""

    name: str = Field(pattern=r"^[a-z0-9_]+$")
    job: str = Field(description="a module, such as sft.train")
    config: Path
    set: dict[str, Any] = Field(default_factory=dict, description="overrides: section.key to value")
    accelerate: Path | None = Field(None, description="a launcher config, for training on several ranks")


class PipelineConfig(Config):
    """Stages that run one after the other; their records and report go to `output_dir`."""

    output_dir: Path
    stages: list[Stage] = Field(min_length=1)


def load_pipeline(path: Path, overrides: Sequence[str] = ()) -> PipelineConfig:
    """The stages of a recipe; an override is `STAGE.section.key=value` and changes that stage's config."""
    pipeline = load_config(PipelineConfig, path)
    for override in overrides:
        (name, *key), value = parse_override(override)
        if not key:
            raise UserError(f"override {override!r}: expected STAGE.section.key=value")
        (stage,) = _selected(pipeline, name, path)
        stage.set[".".join(key)] = value
    names = [stage.name for stage in pipeline.stages]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{path}: two stages are named {name!r}")
    for stage in pipeline.stages:
        for file in (stage.config, *filter(None, [stage.accelerate])):
            if not file.is_file():
                hint = did_you_mean(file.name, [p.name for p in file.parent.glob("*.yaml")])
                raise UserError(f"{path}: stage {stage.name!r}: {file}: no such file{hint}")
    return pipeline


def run_pipeline(path: Path, only: str | None, dry_run: bool, console: Console, overrides: Sequence[str] = ()) -> None:
    """Run every stage, or the one named `only`."""
    pipeline = load_pipeline(path, overrides)
    stages = _selected(pipeline, only, path)
    record = Record(pipeline.output_dir / RECORD)
    upstream_changed = False
    for number, stage in enumerate(stages, start=1):
        command = stage_command(stage)
        console.print(f"\n[bold]({number}/{len(stages)}) {stage.name}[/bold]")
        console.print("$ " + shlex.join(command), style="dim", highlight=False, soft_wrap=True, markup=False)
        if dry_run:
            continue
        if not upstream_changed and record.finished(stage):
            console.print(f"done already, see {stage_dir(stage)}", style="green", highlight=False)
            continue
        upstream_changed = True
        began = time.monotonic()
        code = launch.run_command(command)
        if code != job.EXIT_OK:
            print(f"stage {stage.name} failed with exit code {code}; its message stands above", file=sys.stderr)
            raise job.RankFailed(code)
        record.add(stage)
        console.print(f"done in {time.monotonic() - began:.0f} s", style="green", highlight=False)


def stage_command(stage: Stage) -> list[str]:
    """The stage's command line."""
    overrides = [f"{key}={_yaml_value(value)}" for key, value in stage.set.items()]
    return launch.job_command(stage.job, stage.config, overrides, stage.accelerate)


def stage_dir(stage: Stage) -> Path:
    """The output folder that the stage's config names."""
    values, _ = read_yaml(stage.config)
    folder = stage.set.get("output_dir", values.get("output_dir"))
    if folder is None:
        raise UserError(f"{stage.config}: missing key 'output_dir'")
    return Path(folder)


class Record:
    """Which stages have finished, and with which settings: enough to skip them without starting them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.stages: dict[str, str] = _read_record(path)

    def finished(self, stage: Stage) -> bool:
        return self.stages.get(stage.name) == _settings(stage) and (stage_dir(stage) / "DONE").exists()

    def add(self, stage: Stage) -> None:
        self.stages[stage.name] = _settings(stage)
        atomic.write_json(self.path, self.stages)


def _read_record(path: Path) -> dict[str, str]:
    return dict(json.loads(path.read_text())) if path.exists() else {}


def _settings(stage: Stage) -> str:
    files = [file_hash(file) for file in (stage.config, *filter(None, [stage.accelerate]))]
    return value_hash([stage_command(stage), files])


def _selected(pipeline: PipelineConfig, only: str | None, path: Path) -> list[Stage]:
    if only is None:
        return pipeline.stages
    names = [stage.name for stage in pipeline.stages]
    if only not in names:
        raise UserError(f"{path}: no stage {only!r}{did_you_mean(only, names)}")
    return [stage for stage in pipeline.stages if stage.name == only]


def _yaml_value(value: Any) -> str:
    """Text that YAML reads back as `value`: bare where it can be."""
    bare = isinstance(value, str) and re.fullmatch(r"[\w./-]+", value) and yaml.safe_load(value) == value
    return value if bare else json.dumps(value, ensure_ascii=False)
