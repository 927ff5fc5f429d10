"""What ran, on what, with which rows, and how to run it again."""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from alignment import doctor
from alignment.report.collect import Collected, StageRun, numbers
from alignment.report.page import Block, Cell, Commands, Figure, Heading, Section, Table
from alignment.report.plots import Curve
from alignment.report.sources import Number, flat, interval
from alignment.report.tables import duration, is_change, meter, missing, percent, plain, point_span, points, span
from alignment.report.training import curves_panel
from alignment.stats import Interval

# Jobs whose results have a section of their own.
KNOWN = (
    "sft.train",
    "reward.train",
    "reward.sweep",
    "reward.best_of_n",
    "dpo.train",
    "dpo.online",
    "alignment.evaluate",
)
MOST_PANELS = 12


def sections(collected: Collected, found: Sequence[Number]) -> list[Section]:
    return [
        *_ledgers(collected),
        *_other_stages(collected),
        _pipeline(collected, flat(found)),
        _environment(collected),
        _reproduce(collected, found),
    ]


def _ledgers(collected: Collected) -> list[Section]:
    files = [(stage, file) for stage in collected.stages for file in stage.run.files("*ledger.json")]
    ledgers = [(_ledger_name(stage, file), collected.reader.json(file)) for stage, file in files]
    rows = [_ledger_row(name, ledger) for name, ledger in ledgers]
    if not rows:
        return []
    wrong = [name for name, ledger in ledgers if not _adds_up(ledger)]
    lead = "No row is dropped silently: the rows that went into a stage came out of it, or were dropped for a reason."
    caption = f"These do not add up: {', '.join(wrong)}." if wrong else "Checked: every line adds up."
    columns = ["stage", "rows in", "rows out", "dropped", "why", "tokens in", "trained on", "tokens dropped"]
    return [Section("Rows and tokens", lead, [Table(columns, rows, caption, words=(0, 4), wrap=(4,))])]


def _ledger_name(stage: StageRun, file: Path) -> str:
    places = [stage.name, *file.parent.relative_to(stage.run.dir).parts]
    part = file.stem.removesuffix("ledger").strip("_")
    return " / ".join([*places, part] if part else places)


def _ledger_row(name: str, ledger: dict[str, Any]) -> list[Cell]:
    dropped = numbers(ledger.get("dropped") or {})
    most_first = sorted(dropped.items(), key=lambda item: -item[1])
    reasons = ", ".join(f"{reason} {count:,.0f}" for reason, count in most_first)
    if ledger.get("truncated"):
        reasons += f"{'; ' if reasons else ''}{plain(ledger['truncated'])} rows came out truncated"
    rows = [plain(ledger.get(key, "")) for key in ("rows_in", "rows_out")]
    tokens = [plain(ledger.get(key) or "") for key in ("tokens_in", "tokens_trained", "tokens_dropped")]
    return [name, *rows, plain(sum(dropped.values())), reasons, *tokens]


def _adds_up(ledger: dict[str, Any]) -> bool:
    dropped = sum(numbers(ledger.get("dropped") or {}).values())
    return bool(ledger.get("rows_in", 0) == ledger.get("rows_out", 0) + dropped)


def _other_stages(collected: Collected) -> list[Section]:
    """Stages whose job the report does not know: their metrics, and a curve of each thing that they logged."""
    stages = [stage for stage in collected.stages if stage.job not in KNOWN]
    blocks: list[Block] = []
    for stage in stages:
        blocks += [Heading(f"{stage.name}: {stage.job}"), *_generic(stage)]
    return [Section("Other stages", "", blocks)] if stages else []


def _generic(stage: StageRun) -> list[Block]:
    blocks: list[Block] = []
    logged = dict.fromkeys(key for line in stage.run.history for key in numbers(line) if key not in ("step", "epoch"))
    panels = [curves_panel([Curve("", stage.run.curve(key))], key) for key in list(logged)[:MOST_PANELS]]
    if panels:
        shown = f"The first {MOST_PANELS} of" if len(logged) > MOST_PANELS else "All"
        blocks.append(Figure(panels, f"{shown} {len(logged)} logged values, from metrics.jsonl.", columns=3))
    if stage.run.metrics:
        blocks.append(Table(["metric", "value"], [[key, plain(value)] for key, value in stage.run.metrics.items()]))
    return blocks or [missing("metrics", stage)]


def _pipeline(collected: Collected, values: dict[str, float]) -> Section:
    seconds = [values.get(f"seconds.{stage.name}") for stage in collected.stages]
    longest = max((value for value in seconds if value), default=1.0)
    rows: list[list[Cell]] = []
    for number, (stage, value) in enumerate(zip(collected.stages, seconds, strict=True), start=1):
        attempts = stage.run.record.get("attempts", 1)
        state = f"done at attempt {attempts}" if stage.state == "done" and attempts > 1 else stage.state
        spent: list[Cell] = [duration(value), meter(value / longest)] if value is not None else ["", ""]
        rows.append([str(number), stage.name, *spent, state, stage.job])
    total = values.get("seconds.total")
    resumed = any(stage.run.record.get("attempts", 1) > 1 for stage in collected.stages)
    caption = "Of a stage that was interrupted and resumed, the time is that of its last attempt." if resumed else ""
    took = f", {duration(total)} in all" if total else ""
    lead = f"{collected.finished}{took}. Anyone can run one stage alone, by its command."
    commands = Commands([(stage.name, stage.command) for stage in collected.stages], fold="The stages' commands")
    table = Table(["", "stage", "time", "", "state", "job"], rows, caption, words=(0, 1, 3, 4, 5))
    return Section("Pipeline", lead, [table, commands])


def _environment(collected: Collected) -> Section:
    records = [(stage.name, stage.run.record) for stage in collected.stages if stage.run.record]
    rows: list[list[Cell]] = [
        ["machine of this report", f"{doctor.cpu().detail}; {doctor.memory().detail.split(',')[0]}"],
        ["git commit", _common(records, lambda record: record.get("git_commit") or "not a checkout")],
        ["Python", _common(records, lambda record: record.get("python"))],
        ["ranks", _common(records, lambda record: record.get("world_size"))],
        ["seed", _common(records, lambda record: record.get("seed"))],
    ]
    packages = dict.fromkeys(package for _, record in records for package in record.get("versions", {}))
    rows += [[package, _common(records, partial(_version, package))] for package in packages]
    lead = "As each stage recorded it in its run.json. Where stages differ, each value names its stages."
    return Section("Environment", lead, [Table(["", ""], rows, words=(0, 1), wrap=(1,))])


def _version(package: str, record: dict[str, Any]) -> str:
    return record.get("versions", {}).get(package) or "absent"


def _common(records: Iterable[tuple[str, dict[str, Any]]], value_of: Callable[[dict[str, Any]], Any]) -> str:
    """The value that the stages recorded; where they differ, each with its stages."""
    stages: dict[str, list[str]] = {}
    for name, record in records:
        value = value_of(record)
        if value is not None:
            stages.setdefault(str(value), []).append(name)
    if len(stages) < 2:
        return "".join(stages)
    return "; ".join(f"{value} ({', '.join(names)})" for value, names in stages.items())


def _reproduce(collected: Collected, found: Sequence[Number]) -> Section:
    """Every number of metrics.json, the command that makes it, and the file that holds it."""
    whole = Commands(
        [
            ("everything; finished stages are skipped", f"alignment run {collected.path}"),
            ("this page alone", f"alignment report {collected.path}"),
        ]
    )
    values = flat(found)
    commands = {stage.name: stage.command for stage in collected.stages}
    blocks: list[Block] = [whole]
    aside = (".low", ".high")  # they stand beside their estimate
    shown = [n for n in found if not n.key.endswith(aside) and not n.key.startswith("seconds.")]
    for stage in dict.fromkeys(number.stage for number in shown):
        rows = [_source(number, values) for number in shown if number.stage == stage]
        blocks.append(Heading(stage))
        if stage in commands:
            blocks.append(Commands([("", commands[stage])]))
        blocks.append(Table(["number", "value", "95% interval", "file", "its key"], rows, words=(0, 3, 4)))
    lead = (
        "Every number on this page is read from files of this run. The main ones stand in "
        f"{collected.output_dir}/metrics.json under the names below, copied from the file and key beside each; "
        "seconds.STAGE is the time in that stage's run.json."
    )
    return Section("Reproduce", lead, blocks)


def _source(number: Number, values: dict[str, float]) -> list[Cell]:
    estimate = interval(values, number.key) or Interval(number.value, math.nan, math.nan)
    if number.key.endswith(".prompts"):
        shown = [plain(number.value), ""]
    elif is_change(number.key):
        shown = [f"{points(number.value)} points", point_span(estimate)]
    else:
        shown = [percent(number.value), span(estimate)]
    return [number.key, *shown, str(number.file), number.source]
