"""Thinking switched off and on: how often each mode is right, what it spends, and whether it obeys."""

from collections.abc import Sequence

from alignment.report import accuracy
from alignment.report.accuracy import Model
from alignment.report.collect import Collected, Run, StageRun
from alignment.report.headline import SWITCH
from alignment.report.page import Block, Section, Table
from alignment.report.sources import interval, modes_of
from alignment.report.tables import compare, missing, plain, point_span, points, with_span

NAMES = {mode: f"thinking {switch}" for mode, switch in SWITCH.items()}


def sections(collected: Collected) -> list[Section]:
    return [_section(collected, stage) for stage in collected.of("alignment.evaluate") if modes_of(stage)]


def _section(collected: Collected, stage: StageRun) -> Section:
    title = "Thinking" if stage is next(filter(modes_of, collected.stages)) else f"Thinking: {stage.name}"
    found = [_model(stage, mode) for mode in modes_of(stage)]
    evaluated = [model for model in found if model.accuracy is not None]
    if not evaluated:
        return Section(title, "", [missing("evaluation of the modes", stage)])
    lead = (
        "The same prompts with the chat template's thinking switch off and on. A sample obeys when it thinks where it "
        "should, before it says anything, and does not where it should not."
    )
    blocks: list[Block] = [
        _overall(stage, evaluated),
        *accuracy.by_group(evaluated, "template"),
        *accuracy.by_group(evaluated, "language"),
        *accuracy.side_by_side(evaluated, stage.run.config.get("prompts"), collected.reader),
        compare([(model.name, model.metrics) for model in evaluated], fold="Everything that was measured of the modes"),
    ]
    return Section(title, lead, blocks)


def _model(stage: StageRun, mode: str) -> Model:
    prefix = f"{mode}."
    metrics = {k.removeprefix(prefix): v for k, v in stage.run.metrics.items() if k.startswith(prefix)}
    return Model(NAMES[mode], Run(stage.run.dir / mode, stage.run.reader), metrics)


def _overall(stage: StageRun, evaluated: Sequence[Model]) -> Table:
    rows = [
        [
            model.name,
            with_span(model.accuracy) if model.accuracy else "",
            with_span(obedience) if (obedience := interval(model.metrics, "obeys")) else "",
            plain(model.metrics.get("tokens.mean", "")),
            plain(model.metrics.get("truncated", "")),
        ]
        for model in evaluated
    ]
    change = interval(stage.run.metrics, "thinking.change")
    caption = (
        f"Thinking changes pass@1 by {points(change.value)} points ({point_span(change)}), paired by prompt."
        if change
        else ""
    )
    return Table(["", "pass@1", "obeys the switch", "tokens a sample", "cut off"], rows, caption)
