"""How training went: losses, packing, and the diagnostics of preference training."""

from collections.abc import Sequence
from itertools import accumulate
from statistics import median

from markupsafe import Markup

from alignment.report import plots
from alignment.report.accuracy import of_evaluation, tones
from alignment.report.collect import Collected, Run, StageRun, numbers
from alignment.report.page import Block, Cell, Figure, Panel, Section, Table
from alignment.report.plots import Curve
from alignment.report.svg import Point
from alignment.report.tables import compare, meter, missing, percent, plain

TRAINING = ("sft.train", "reward.train", "reward.sweep", "dpo.train")
PREFERENCE = ("dpo.train", "dpo.online")
VALID_SPEED, SPEED = "valid_tokens_per_second", "tokens_per_second"
RANKED_RIGHT = "Pairs ranked right"
# A panel each: its title, and the metrics that it shows with their names.
DIAGNOSTICS = (
    ("Loss", (("preference", "preference_loss"), ("likelihood", "nll"))),
    ("Reward margin", (("", "rewards/margins"),)),
    (RANKED_RIGHT, (("", "rewards/accuracies"),)),
    ("Log-probability a token", (("chosen", "logps_per_token/chosen"), ("rejected", "logps_per_token/rejected"))),
    (
        "Log-probability a token above the reference",
        (("chosen", "logratio_per_token/chosen"), ("rejected", "logratio_per_token/rejected")),
    ),
    ("KL to the reference", (("", "kl"),)),
    ("Implicit rewards", (("chosen", "rewards/chosen"), ("rejected", "rewards/rejected"))),
    ("Tokens of a completion", (("chosen", "tokens/chosen"), ("rejected", "tokens/rejected"))),
    ("Spread of the OT weights", (("", "ot/spread"),)),
    ("Transported mass", (("", "ot/mass"),)),
    ("Pairs that transport changes little", (("", "ot/unchanged"),)),
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
    """A line for each stage that packs, its speed over the steps, and what its sources give."""
    packed = [stage for stage in stages if "packing.utilisation" in numbers(stage.run.metrics)]
    blocks: list[Block] = []
    if packed:
        caption = (
            "Utilisation: tokens over the capacity of all packs. Padding: its share of what the ranks compute on. "
            "Waiting: how much longer the epochs take than on perfectly even ranks, were time proportional to tokens, "
            "or to the cost of attention. Valid tokens/s: those of all ranks without padding, median over the log."
        )
        columns = ["stage", "packing utilisation", "padding", "waiting, tokens", "waiting, attention"]
        columns += ["valid tokens/s", "steps", "mean loss"]
        blocks.append(Table(columns, [_packing_row(stage.run, stage.name) for stage in packed], caption))
    panels = [panel for stage in stages for panel in _speed_panel(stage)]
    if panels:
        caption = "Tokens a second of all ranks, against optimizer steps. The first line of a run holds its warm-up."
        blocks.append(Figure(panels, caption, columns=2))
    return [*blocks, *_mixture(stages)]


def _packing_row(run: Run, name: str) -> list[Cell]:
    known = numbers(run.metrics)
    used = known["packing.utilisation"]
    waste = ("packing.padding_share", "packing.imbalance_tokens", "packing.imbalance_attention")
    speeds = [speed for _, speed in run.curve(VALID_SPEED)]
    return [
        name,
        meter(used) + Markup("&ensp;") + percent(used),
        *(f"{known[key]:.2%}" if key in known else "" for key in waste),
        f"{median(speeds):,.0f}" if speeds else "",
        plain(known.get("train.steps", "")),
        plain(known.get("train.loss", "")),
    ]


def _speed_panel(stage: StageRun) -> list[Panel]:
    found = [("total", stage.run.curve(SPEED), 0.0), ("valid", stage.run.curve(VALID_SPEED), 1.0)]
    lines = [Curve(name, points, tone=tone) for name, points, tone in found if points]
    return [curves_panel(lines, f"{stage.name}: tokens a second")] if lines else []


def _mixture(stages: Sequence[StageRun]) -> list[Block]:
    """What each source gives, of stages that mix several."""
    rows = [
        [stage.name, str(source.get("source", "")), *_mixture_row(numbers(source))]
        for stage in stages
        if len(stage.run.mixture) > 1
        for source in stage.run.mixture
    ]
    if not rows:
        return []
    columns = ["stage", "source", "rows", "drawn", "in an epoch", "tokens", "share"]
    caption = (
        "The mixture: what each source holds, what the run draws of it, and what it gives to an epoch in rows, in "
        "tokens, and as a share of the tokens."
    )
    return [Table(columns, rows, caption, words=(0, 1))]


def _mixture_row(source: dict[str, float]) -> list[Cell]:
    counts = [plain(source.get(key, "")) for key in ("rows", "drawn", "epoch_rows", "epoch_tokens")]
    return [*counts, percent(source["token_share"]) if "token_share" in source else ""]


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
        "Against optimizer steps. The margin and the share of pairs ranked right should rise within a round. The "
        "log-probability of the chosen answers should hold: where it falls, the model forgets what it could do. "
        f"{_alarm(runs)}"
    )
    if not any(run.curve("ot/spread") for _, run in runs):
        return steps.strip()
    if not fallbacks:
        return steps + "Every pair's transport was solved at the first attempt."
    return steps + f"{fallbacks:,.0f} pairs' transport was not solved by POT, and was in the log domain."


def _alarm(runs: Sequence[tuple[str, Run]]) -> str:
    """What the alarm of `dpo.alarm` says of runs that have it."""
    counts = [(name, numbers(run.metrics).get("alarms.both_fall")) for name, run in runs]
    fallen = [name or "the run" for name, count in counts if count]
    if fallen:
        return (
            f"ALARM: chosen and rejected answers have both become less likely than under the reference, in "
            f"{', '.join(fallen)}: raise nll_weight or beta, or lower the learning rate. "
        )
    return "No alarm: they have not both fallen below the reference. " if any(c == 0 for _, c in counts) else ""


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
