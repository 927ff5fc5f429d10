"""The pipeline's numbers: each with its flat key, and the file and key that it was read from."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignment.report.collect import Collected, Round, Run, StageRun, is_number, numbers
from alignment.stats import Interval

ENDS = ("", ".low", ".high")
ROUND = re.compile(r"round_\d+")
BEST_OF = re.compile(r"best_of_(\d+)\.(.+?)(\.low|\.high)?")
# Ways to choose among samples that are not a reward model.
NOT_A_MODEL = ("majority", "oracle", "first")


@dataclass(frozen=True)
class Number:
    """One entry of the pipeline's metrics.json, and where it comes from."""

    key: str
    value: float
    stage: str
    file: Path
    source: str


def gather(collected: Collected) -> list[Number]:
    """Every number that the finished and unfinished stages hold; what is absent there is absent here."""
    found = [number for stage in collected.stages for number in _of_stage(collected, stage)]
    return [*found, *_packing(collected), *_seconds(collected)]


def flat(found: Iterable[Number]) -> dict[str, float]:
    return {number.key: number.value for number in found}


def interval(values: Mapping[str, Any], key: str) -> Interval | None:
    """The estimate at `key` with its interval; bounds that are not known are NaN."""
    if not is_number(values.get(key)):
        return None
    low, high = (values.get(f"{key}{end}") for end in ENDS[1:])
    if not is_number(low) or not is_number(high):
        return Interval(float(values[key]), math.nan, math.nan)
    return Interval(float(values[key]), float(low), float(high))


def rounds(values: Mapping[str, float]) -> list[str]:
    """`round_1`, `round_2`, ... as far as they were evaluated."""
    names = [key.removeprefix("pass_at_1.") for key in values if key.startswith("pass_at_1.round_")]
    return sorted(filter(ROUND.fullmatch, names), key=lambda name: int(name.removeprefix("round_")))


def best_of(values: Mapping[str, float]) -> tuple[int, list[str]]:
    """The number of samples chosen from, and what chose: reward models, their average, majority, oracle."""
    matches = [match for match in map(BEST_OF.fullmatch, values) if match]
    if not matches:
        return 0, []
    most = max(int(match[1]) for match in matches)
    names = dict.fromkeys(match[2] for match in matches if int(match[1]) == most)
    return most, sorted(names, key=_reading_order)


def modes_of(stage: StageRun) -> list[str]:
    """The modes that an evaluation asked for; none where it set no switch."""
    return [str(mode) for mode in stage.run.config.get("modes") or []]


def is_average(name: str) -> bool:
    return "average" in name


def is_single(name: str) -> bool:
    """One trained model, neither an average of weights nor an ensemble of scores."""
    return name not in NOT_A_MODEL and not is_average(name) and "ensemble" not in name


def _reading_order(name: str) -> tuple[int, str]:
    if name in NOT_A_MODEL:
        return 2 + NOT_A_MODEL.index(name), name
    return int(not is_single(name)), name


def _of_stage(collected: Collected, stage: StageRun) -> list[Number]:
    # These keys name no stage, so only the first stage of a kind has them bare.
    first = next(other for other in collected.of(stage.job) if _kind(other) == _kind(stage)) is stage
    prefix = "" if first else f"{stage.name}."
    match stage.job:
        case "alignment.evaluate" if modes_of(stage):
            names = _names_of_modes(stage)
        case "alignment.evaluate":
            names = {f"pass_at_1{end}": f"pass_at_1.{'sft' if first else stage.name}{end}" for end in ENDS}
            if first:
                names["pass_at_1.prompts"] = "pass_at_1.prompts"
            prefix = ""
        case "reward.best_of_n":
            names = {key: key for key in stage.run.metrics if BEST_OF.fullmatch(key)}
        case "dpo.online":
            return [number for found in stage.rounds for number in _of_round(stage, found, prefix)]
        case _:
            return []
    return _read(stage, stage.run, names, prefix)


def _kind(stage: StageRun) -> tuple[str, bool]:
    return stage.job, bool(modes_of(stage))


def _names_of_modes(stage: StageRun) -> dict[str, str]:
    """What each mode reaches, whether it obeys and what it spends, and what thinking changes."""
    keys = [f"{mode}.{key}{end}" for mode in modes_of(stage) for key in ("pass_at_1", "obeys") for end in ENDS]
    names = {key: f"modes.{key}" for key in keys}
    names |= {f"{mode}.tokens.mean": f"modes.{mode}.tokens" for mode in modes_of(stage)}
    return names | {f"thinking.change{end}": f"modes.change{end}" for end in ENDS}


def _of_round(stage: StageRun, found: Round, prefix: str) -> list[Number]:
    known = numbers(found.metrics)
    keys = [(measure, measure + end, end) for measure in ("pass_at_1", "change") for end in ENDS]
    return [
        Number(f"{prefix}{measure}.{found.name}{end}", known[key], stage.name, *found.source(key))
        for measure, key, end in keys
        if key in known
    ]


def _read(stage: StageRun, run: Run, names: Mapping[str, str], prefix: str) -> list[Number]:
    known = numbers(run.metrics)
    file = run.dir / "metrics.json"
    return [Number(prefix + ours, known[key], stage.name, file, key) for key, ours in names.items() if key in known]


def _packing(collected: Collected) -> list[Number]:
    """Utilisation of every SFT stage, and of all: tokens over capacity."""
    key = "packing.utilisation"
    found: list[Number] = []
    capacity = filled = 0.0
    for stage in collected.of("sft.train"):
        known = numbers(stage.run.metrics)
        if key not in known:
            continue
        found.append(Number(f"{key}.{stage.name}", known[key], stage.name, stage.run.dir / "metrics.json", key))
        size = known.get("packing.packs", 0) * stage.run.config.get("packing", {}).get("capacity", 0)
        capacity, filled = capacity + size, filled + known[key] * size
    if len(found) == 1:
        return [Number(key, found[0].value, found[0].stage, found[0].file, key), *found]
    if not capacity:
        return found
    names = " + ".join(number.stage for number in found)
    return [
        Number(key, filled / capacity, names, collected.output_dir / "metrics.json", f"{key}.* by capacity"),
        *found,
    ]


def _seconds(collected: Collected) -> list[Number]:
    found = [
        Number(f"seconds.{stage.name}", stage.run.record["seconds"], stage.name, stage.run.dir / "run.json", "seconds")
        for stage in collected.stages
        if is_number(stage.run.record.get("seconds"))
    ]
    if not found:
        return []
    total = sum(number.value for number in found)
    return [*found, Number("seconds.total", total, "all", collected.output_dir / "metrics.json", "sum of seconds.*")]
