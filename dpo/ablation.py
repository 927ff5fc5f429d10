"""The table of an ablation: pass@1 of every arm over its seeds, with paired intervals, as markdown.

    python -m dpo.ablation configs/pipelines/ablation.yaml [--against online_dpo]

A stage named ARM_NUMBER is one seed of an arm, and all are dpo.online runs that were measured on the same prompts, with
one `evaluation.baseline`. What counts is the model that a run gives. Two intervals stand side by side, both 95% and
Student's: by prompt, of the mean over seeds (what other prompts might say of these models), and over seeds, of the
seeds' own means (what other seeds might say; with three seeds it is wide). Arms differ only where both do.
"""

import argparse
import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from alignment import job
from alignment.errors import UserError, did_you_mean
from alignment.evaluate import pass_rate
from alignment.pipeline import load_pipeline, stage_dir
from alignment.rows import read_rows
from alignment.stats import Interval, mean_interval, paired_interval

SEED = re.compile(r"(.+)_(\d+)")
Rates = dict[str, float]


@dataclass(frozen=True)
class Arm:
    """One entry a seed: pass rates of the prompts, and the KL divergence from the starting policy in nats an answer."""

    rates: list[Rates]
    kls: list[float]

    @property
    def mean(self) -> Rates:
        """Of each prompt, the mean over seeds."""
        return {name: sum(rates[name] for rates in self.rates) / len(self.rates) for name in self.rates[0]}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline", type=Path)
    parser.add_argument("--against", default="online_dpo", metavar="ARM", help="the arm that all are compared with")
    arguments = parser.parse_args(argv)
    return job.guarded(lambda: print("\n".join(table(arguments.pipeline, arguments.against))))


def table(pipeline: Path, against: str) -> list[str]:
    """The lines of the table, of the runs that are done.

    Raises:
        UserError: no run is done, two were measured on other prompts or against other baselines, or no such arm.
    """
    arms, baselines, unfinished = _read(pipeline)
    if not arms:
        raise UserError(f"{pipeline}: none of its runs is done")
    if against not in arms:
        raise UserError(f"--against {against}: no such arm that is done{did_you_mean(against, arms)}")
    if len(baselines) > 1:
        raise UserError(f"{pipeline}: its runs have several baselines: {', '.join(map(str, sorted(baselines)))}")
    start = _pass_rates(baselines.pop())
    for name, arm in arms.items():
        if any(rates.keys() != start.keys() for rates in arm.rates):
            raise UserError(f"{pipeline}: {name} was evaluated on other prompts than the baseline")
    head = ["arm", "seeds", "pass@1", "- start, by prompt", "- start, over seeds", f"- {against}, by prompt", "KL"]
    lines = [_line(head), _line(["---"] * len(head)), _line(["start", "", f"{_mean(start):.1%}", "", "", "", ""])]
    lines += [_line([name, *_cells(arm, start, arms[against])]) for name, arm in arms.items()]
    return [*lines, *([f"\nNot done: {', '.join(unfinished)}."] if unfinished else [])]


def _read(pipeline: Path) -> tuple[dict[str, Arm], set[Path], list[str]]:
    """The arms by name, the baselines' folders, and the stages that are not done."""
    arms: dict[str, Arm] = {}
    baselines: set[Path] = set()
    unfinished: list[str] = []
    for stage in load_pipeline(pipeline).stages:
        matched, folder = SEED.fullmatch(stage.name), stage_dir(stage)
        if matched is None or stage.job != "dpo.online":
            raise UserError(f"{pipeline}: stage {stage.name!r}: expected a dpo.online run named ARM_NUMBER")
        if not (folder / "DONE").exists():
            unfinished.append(stage.name)
            continue
        metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        arm, number = arms.setdefault(matched[1], Arm([], [])), metrics["model.round"]
        baseline = _baseline(folder)
        baselines.add(baseline)
        arm.rates.append(_pass_rates(folder / f"round_{number}" / "evaluation" if number else baseline))
        arm.kls.append(metrics[f"round_{number}.kl"] if number else 0.0)
    return arms, baselines, unfinished


def _baseline(folder: Path) -> Path:
    config = yaml.safe_load((folder / "resolved_config.yaml").read_text(encoding="utf-8"))
    return Path(config["evaluation"]["baseline"] or folder / "baseline")


def _pass_rates(evaluation: Path) -> Rates:
    return {row["id"]: pass_rate(row) for row in read_rows(evaluation / "by_prompt.jsonl")}


def _cells(arm: Arm, start: Rates, against: Arm) -> list[str]:
    by_seed = [_mean(rates) - _mean(start) for rates in arm.rates]
    other = "" if arm is against else _points(_paired(against.mean, arm.mean))
    return [
        str(len(arm.rates)),
        f"{_mean(arm.mean):.1%}",
        _points(_paired(start, arm.mean)),
        _points(mean_interval(by_seed)),
        other,
        f"{sum(arm.kls) / len(arm.kls):.2f}",
    ]


def _paired(before: Rates, after: Rates) -> Interval:
    return paired_interval(list(before.values()), [after[name] for name in before])


def _mean(rates: Mapping[str, float]) -> float:
    return sum(rates.values()) / len(rates)


def _points(interval: Interval) -> str:
    """In percentage points; of a single seed there is no interval."""
    value, low, high = (100 * part for part in (interval.value, interval.low, interval.high))
    return f"{value:+.1f}" if math.isnan(low) else f"{value:+.1f} ({low:+.1f} to {high:+.1f})"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
