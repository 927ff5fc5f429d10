"""What the stages of a pipeline have written so far.

Absent files are normal: a stage may be unfinished or not begun. A file that is there but cannot be read counts as
absent and is named in `Reader.problems`, which the page shows.
"""

import json
import math
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeGuard, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from alignment.pipeline import Stage, load_pipeline, stage_command, stage_dir

T = TypeVar("T")
State = Literal["done", "unfinished", "not started"]
Columns = dict[str, list[Any]]
Filters = list[tuple[str, str, Any]] | None


@dataclass
class Reader:
    """Reads what is there. `problems` says which files are there and cannot be read, and what else is amiss."""

    problems: list[str] = field(default_factory=list)

    def json(self, path: Path) -> dict[str, Any]:
        return self._read(path, lambda: dict(json.loads(path.read_text(encoding="utf-8"))), {})

    def objects(self, path: Path) -> list[dict[str, Any]]:
        """A JSON file that holds a list of objects."""
        return self._read(path, lambda: [dict(item) for item in json.loads(path.read_text(encoding="utf-8"))], [])

    def yaml(self, path: Path) -> dict[str, Any]:
        return self._read(path, lambda: dict(yaml.safe_load(path.read_text(encoding="utf-8"))), {})

    def lines(self, path: Path) -> list[dict[str, Any]]:
        """The rows of a JSONL file; a last line that is still being written is left out."""
        return self._read(path, lambda: [json.loads(line) for line in _whole_lines(path)], [])

    def columns(self, path: Path, names: Sequence[str] | None = None, filters: Filters = None) -> Columns:
        """Columns of a Parquet file, all of them by default, of the rows that pass `filters`."""
        return self._read(path, lambda: dict(pq.read_table(path, columns=names, filters=filters).to_pydict()), {})

    def _read(self, path: Path, read: Callable[[], T], absent: T) -> T:
        if not path.is_file():
            return absent
        try:
            return read()
        except (ValueError, TypeError, OSError, yaml.YAMLError, pa.ArrowException) as error:
            problem = f"{path} cannot be read and is left out: {str(error).splitlines()[0]}"
            if problem not in self.problems:
                self.problems.append(problem)
            return absent


@dataclass(frozen=True)
class Run:
    """The folder of one job: a stage's own, or one inside it, such as a round's training."""

    dir: Path
    reader: Reader

    @cached_property
    def record(self) -> dict[str, Any]:
        return self.reader.json(self.dir / "run.json")

    @cached_property
    def metrics(self) -> dict[str, Any]:
        return self.reader.json(self.dir / "metrics.json")

    @cached_property
    def config(self) -> dict[str, Any]:
        return self.reader.yaml(self.dir / "resolved_config.yaml")

    @cached_property
    def history(self) -> list[dict[str, Any]]:
        """metrics.jsonl, one mapping a line."""
        return self.reader.lines(self.dir / "metrics.jsonl")

    @cached_property
    def prompts(self) -> list[dict[str, Any]]:
        """by_prompt.jsonl of an evaluation."""
        return self.reader.lines(self.dir / "by_prompt.jsonl")

    @cached_property
    def mixture(self) -> list[dict[str, Any]]:
        """mixture.json of SFT: what each source gives to an epoch."""
        return self.reader.objects(self.dir / "mixture.json")

    def curve(self, key: str) -> list[tuple[float, float]]:
        """(step, value) of every line of the history that has `key`."""
        return [
            (float(line.get("step", number)), float(line[key]))
            for number, line in enumerate(self.history)
            if is_number(line.get(key))
        ]

    def files(self, pattern: str) -> list[Path]:
        """Files of this folder and of the two levels of folders inside it."""
        found = [path for depth in ("", "*/", "*/*/") for path in sorted(self.dir.glob(depth + pattern), key=_natural)]
        return [path for path in found if path.is_file()]

    def below(self, pattern: str) -> "list[Run]":
        """The runs in folders inside this one, in the order of their names, numbers read as numbers."""
        folders = [path for path in self.dir.glob(pattern) if path.is_dir()]
        return [Run(path, self.reader) for path in sorted(folders, key=_natural)]


@dataclass(frozen=True)
class Round:
    """One round of an online job: its folder, and what the job measured of it."""

    number: int
    dir: Path
    job: Run

    @property
    def name(self) -> str:
        return self.dir.name

    @property
    def title(self) -> str:
        return f"round {self.number}"

    @property
    def train(self) -> Run:
        return Run(self.dir / "train", self.job.reader)

    @property
    def evaluation(self) -> Run:
        return Run(self.dir / "evaluation", self.job.reader)

    @property
    def metrics(self) -> dict[str, Any]:
        """From the job's final metrics or, while it runs, from its log, which has one line a round."""
        prefix = f"{self.name}."
        final = {key.removeprefix(prefix): value for key, value in self.job.metrics.items() if key.startswith(prefix)}
        logged = [line for line in self.job.history if line.get("step") == self.number]
        return final or {key: value for line in logged for key, value in line.items() if key != "step"}

    def source(self, key: str) -> tuple[Path, str]:
        """The file that holds the metric `key` of this round, and the place in it."""
        if self.job.metrics:
            return self.job.dir / "metrics.json", f"{self.name}.{key}"
        return self.job.dir / "metrics.jsonl", f"{key} of step {self.number}"


@dataclass(frozen=True)
class StageRun:
    """A stage of the pipeline and its folder."""

    stage: Stage
    run: Run

    @property
    def name(self) -> str:
        return self.stage.name

    @property
    def job(self) -> str:
        return self.stage.job

    @property
    def command(self) -> str:
        return shlex.join(stage_command(self.stage))

    @property
    def state(self) -> State:
        if (self.run.dir / "DONE").exists():
            return "done"
        return "unfinished" if (self.run.dir / "resolved_config.yaml").exists() else "not started"

    @property
    def rounds(self) -> list[Round]:
        """The rounds of online training, the unfinished one included."""
        folders = [run.dir for run in self.run.below("round_*")]
        numbered = [(folder, folder.name.removeprefix("round_")) for folder in folders]
        return [Round(int(number), folder, self.run) for folder, number in numbered if number.isdigit()]


@dataclass(frozen=True)
class Collected:
    """A pipeline and all that its stages have written."""

    path: Path
    output_dir: Path
    stages: list[StageRun]
    reader: Reader

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def finished(self) -> str:
        """How far the pipeline is, as the beginning of a sentence."""
        done = sum(stage.state == "done" for stage in self.stages)
        return f"{done} of {len(self.stages)} stages have finished"

    def of(self, *jobs: str) -> list[StageRun]:
        return [stage for stage in self.stages if stage.job in jobs]


def collect(path: Path, overrides: Sequence[str] = ()) -> Collected:
    """Read the pipeline at `path`, run with these overrides.

    Raises:
        UserError: the pipeline's file, or the config of one of its stages, is missing or wrong.
    """
    pipeline = load_pipeline(path, overrides)
    reader = Reader()
    stages = [StageRun(stage, Run(stage_dir(stage), reader)) for stage in pipeline.stages]
    for stage in stages:
        found = stage.run.record.get("job", stage.job)
        if found != stage.job:
            reader.problems.append(f"{stage.run.dir}: expected a run of {stage.job}, found one of {found}")
    return Collected(path, pipeline.output_dir, stages, reader)


def is_number(value: object) -> TypeGuard[int | float]:
    """A finite number: what can be shown and drawn."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {key: value for key, value in values.items() if is_number(value)}


def _whole_lines(path: Path) -> list[str]:
    lines = path.read_text(encoding="utf-8").split("\n")
    return [line for line in lines[:-1] if line.strip()]


def _natural(path: Path) -> list[tuple[int, str]]:
    parts = re.split(r"(\d+)", path.as_posix())
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]
