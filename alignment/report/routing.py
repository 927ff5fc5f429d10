"""How the experts of mixture-of-experts models were used: their load, and the router losses over training."""

from collections.abc import Sequence
from typing import Any

from alignment.report import plots
from alignment.report.collect import Collected, Run, StageRun
from alignment.report.page import Block, Figure, Heading, Panel, Section
from alignment.report.plots import Curve
from alignment.report.training import curves_panel

# A panel each: its title, and the metric that it shows.
CURVES = (
    ("Balance loss: 1 is even", "router/balance_loss"),
    ("z-loss", "router/z_loss"),
    ("Largest load of an expert: 1 is even", "router/load_max"),
    ("Router entropy: 1 is undecided", "router/entropy"),
    ("Dead experts", "router/dead_experts"),
    ("Coefficient of the balance loss", "router/balance_coefficient"),
)
KEY = (("cold", "no token"), ("warm", "an even share"), ("accent", "twice its share or more"))


def sections(collected: Collected) -> list[Section]:
    """One section; training whose model has no experts is not in it."""
    blocks: list[Block] = []
    for name, run in _routed(collected):
        blocks += [Heading(name), *_blocks(run, name)]
    return [Section("Experts", "", blocks)] if blocks else []


def _routed(collected: Collected) -> list[tuple[str, Run]]:
    found = [(stage.name, stage.run) for stage in collected.of("sft.train", "reward.train", "dpo.train")]
    found += [named for stage in collected.of("dpo.online") for named in _rounds(stage)]
    return [(name, run) for name, run in found if load(run)]


def _rounds(stage: StageRun) -> list[tuple[str, Run]]:
    return [(f"{stage.name}, {found.title}", found.train) for found in stage.rounds]


def load(run: Run) -> list[list[float]]:
    """The experts' load by layer at the last log line, 1 an even share; empty where none was logged."""
    logged: Sequence[Any] = [line["expert_load"] for line in run.history if line.get("expert_load")]
    return list(logged[-1]) if logged else []


def _blocks(run: Run, name: str) -> list[Block]:
    rows = load(run)
    dead = sum(share == 0 for layer in rows for share in layer)
    words = f"{dead} of {sum(map(len, rows))} experts got no token" if dead else "every expert got tokens"
    steps = _window(run)
    over = "the last step" if steps == 1 else f"the last {steps} steps"
    caption = f"Tokens of each expert against an even share, over {over}: {words}."
    heat = Panel(lambda width: plots.heat(rows, width, f"load of the experts, {name}"))
    curves = [(title, run.curve(key)) for title, key in CURVES]
    panels = [curves_panel([Curve("", points)], title) for title, points in curves if any(y for _, y in points)]
    return [
        Figure([heat], caption, key=KEY),
        Figure(panels, "Against optimizer steps; the losses are means over the layers.", columns=3),
    ]


def _window(run: Run) -> int:
    """Steps that the last load was counted over."""
    steps = [0, *(int(line["step"]) for line in run.history if line.get("expert_load"))]
    return steps[-1] - steps[-2]
