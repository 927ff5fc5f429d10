"""How training went: losses, packing, and the diagnostics of preference training."""

from collections.abc import Sequence
from itertools import accumulate

from markupsafe import Markup

from alignment.report import plots
from alignment.report.accuracy import of_evaluation, tones
from alignment.report.collect import Collected, Run, StageRun, numbers
from alignment.report.page import Block, Figure, Panel, Section, Table
from alignment.report.plots import Curve
from alignment.report.svg import Point
from alignment.report.tables import compare, meter, missing, percent, plain

TRAINING = ("sft.train", "reward.train", "reward.sweep", "dpo.train")
PREFERENCE = ("dpo.train", "dpo.online")
RANKED_RIGHT = "Pairs ranked right"
# A panel each: its title, and the metrics that it shows with their names.
DIAGNOSTICS = (
    ("Loss", (("preference", "preference_loss"), ("likelihood", "nll"))),
    ("Reward margin", (("", "rewards/margins"),)),
    (RANKED_RIGHT, (("", "rewards/accuracies"),)),
    ("Log-probability a token", (("chosen", "logps_per_token/chosen"), ("rejected", "logps_per_token/rejected"))),
    ("KL to the round's start", (("", "kl"),)),
    ("Spread of the OT weights", (("", "ot/spread"),)),
)


def sections(collected: Collected) -> list[Section]:
    return [*_preference(collected), *_losses(collected)]


def _losses(collected: Collected) -> list[Section]:
    stages = collected.of(*TRAINING)
    if not stages:
        return []
    panels = [panel for stage in stages for panel in _loss_panel(stage)]
    blocks: list[Block] = [missing("loss", stage) for stage in stages if not _loss_panel(stage)]
    if panels:
        caption = "Training loss against optimizer steps. A loss that ends flat has little left to give at this size."
        blocks.append(Figure(panels, caption, columns=3))
    blocks += _packing(collected.of("sft.train"))
    return [Section("Losses and packing", "", blocks)]


def _loss_panel(stage: StageRun) -> list[Panel]:
    """The loss of a stage; for a sweep, of each of its runs."""
    runs = stage.run.below("*") if stage.job == "reward.sweep" else [stage.run]
    found = [(run.dir.name, run.curve("loss")) for run in runs]
    found = [(name, points) for name, points in found if points]
    if not found:
        return []
    several = len(found) > 1
    lines = [
        Curve(name if several else "", points, tone=tone)
        for (name, points), tone in zip(found, tones(len(found)), strict=True)
    ]
    return [curves_panel(lines, stage.name)]


def curves_panel(lines: Sequence[Curve], title: str, marks: Sequence[tuple[float, str]] = ()) -> Panel:
    return Panel(lambda width: plots.curves(lines, width, title, percent=title == RANKED_RIGHT, marks=marks), title)


def _packing(stages: Sequence[StageRun]) -> list[Block]:
    rows = []
    for stage in stages:
        known = numbers(stage.run.metrics)
        if "packing.utilisation" in known:
            used = known["packing.utilisation"]
            bar = meter(used) + Markup("&ensp;") + percent(used)
            rest = [plain(known.get(key, "")) for key in ("packing.packs", "train.steps", "rows.tokens_trained")]
            rows.append([stage.name, bar, *rest, plain(known.get("train.loss", ""))])
    if not rows:
        return []
    caption = (
        "Utilisation: tokens over the capacity of all packs, the filling of the last step included. "
        "Tokens trained on: those of one epoch that bear loss."
    )
    columns = ["stage", "packing utilisation", "packs", "steps", "tokens trained on", "mean loss"]
    return [Table(columns, rows, caption)]


def _preference(collected: Collected) -> list[Section]:
    stages = collected.of(*PREFERENCE)
    if not stages:
        return []
    blocks: list[Block] = []
    for stage in stages:
        runs = _training_runs(stage)
        panels = [panel for title, metrics in DIAGNOSTICS for panel in _diagnostic(title, metrics, runs)]
        blocks.append(Figure(panels, _caption(runs), columns=3) if panels else missing("training steps", stage))
        blocks += _measured(stage)
    return [Section("Preference training", "", blocks)]


def _training_runs(stage: StageRun) -> list[tuple[str, Run]]:
    if stage.job == "dpo.train":
        return [("", stage.run)]
    return [(found.title, found.train) for found in stage.rounds if found.train.history]


def _diagnostic(title: str, metrics: Sequence[tuple[str, str]], runs: Sequence[tuple[str, Run]]) -> list[Panel]:
    """One panel; the rounds follow one another on a common count of steps."""
    offsets = _offsets([run for _, run in runs])
    marks = [(offset, name) for offset, (name, _) in zip(offsets, runs, strict=True) if name]
    shades = list(reversed(tones(len(metrics))))
    lines = []
    for (name, key), tone in zip(metrics, shades, strict=True):
        pieces = [_moved(run.curve(key), offset) for (_, run), offset in zip(runs, offsets, strict=True)]
        pieces = [piece for piece in pieces if piece]
        lines += [Curve(name if piece is pieces[-1] and len(metrics) > 1 else "", piece, tone=tone) for piece in pieces]
    return [curves_panel(lines, title, marks)] if lines else []


def _offsets(runs: Sequence[Run]) -> list[float]:
    """Steps before each run."""
    lengths = [max((float(line.get("step", 0)) for line in run.history), default=0.0) for run in runs]
    return [0.0, *accumulate(lengths)][: len(runs)]


def _moved(points: Sequence[Point], offset: float) -> list[Point]:
    return [(x + offset, y) for x, y in points]


def _caption(runs: Sequence[tuple[str, Run]]) -> str:
    fallbacks = sum(y for _, run in runs for _, y in run.curve("ot/fallbacks"))
    steps = (
        "Against optimizer steps. The margin and the share of pairs ranked right should rise within a round; each "
        "round has its own reference. The log-probability of the chosen answers should hold: where it falls, the "
        "model forgets what it could do. "
    )
    if not any(run.curve("ot/spread") for _, run in runs):
        return steps.strip()
    if not fallbacks:
        return steps + "Every pair's transport was solved; none fell back to even weights."
    return steps + f"{fallbacks:,.0f} pairs' transport was not solved and fell back to even weights."


def _measured(stage: StageRun) -> list[Block]:
    """What an offline run measured, or what the online job measured of each round besides its evaluation."""
    if stage.job == "dpo.train":
        return [compare([(stage.name, stage.run.metrics)])] if stage.run.metrics else []
    found = [
        (r.title, {key: value for key, value in r.metrics.items() if not of_evaluation(key)}) for r in stage.rounds
    ]
    found = [(title, metrics) for title, metrics in found if metrics]
    caption = (
        "What each round measured; the change is that of pass@1 against the model that the first round began with."
    )
    return [compare(found, caption)] if found else []
