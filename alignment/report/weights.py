"""Token weights: a few preference pairs as OT-DPO left them, their tokens shaded by weight."""

from collections.abc import Iterator

from alignment.heat import Side, WeighedPair
from alignment.report.collect import Collected, Run, StageRun
from alignment.report.page import Block, Heading, HeatMap, Section, Shaded

FILE = "token_weights.jsonl"
LEAD = (
    "A token's weight in the loss, by optimal transport between the hidden states of the two answers (OT-DPO). Tokens "
    "with a near counterpart in the other answer keep more mass. Where all shades are close to the even weight, "
    "transport does no more than equalise lengths: look at the range of the weights beside each answer."
)


def sections(collected: Collected) -> list[Section]:
    """One section, with the last training of each stage; none where no stage trained with transport."""
    blocks: list[Block] = []
    for stage in collected.of("dpo.train", "dpo.online"):
        for title, run in _last_run(stage):
            maps = [_heat_map(WeighedPair.from_row(row)) for row in run.reader.lines(run.dir / FILE)]
            blocks += [Heading(title), *maps] if maps else []
    return [Section("Token weights", LEAD, blocks)] if blocks else []


def _last_run(stage: StageRun) -> Iterator[tuple[str, Run]]:
    if stage.job == "dpo.train":
        yield stage.name, stage.run
        return
    for found in reversed(stage.rounds):
        if (found.train.dir / FILE).is_file():
            yield f"{stage.name}, {found.title}", found.train
            return


def _heat_map(pair: WeighedPair) -> HeatMap:
    sides = [_shaded(pair, "chosen", pair.chosen), _shaded(pair, "rejected", pair.rejected)]
    return HeatMap(pair.id, pair.prompt, sides, pair.legend())


def _shaded(pair: WeighedPair, name: str, side: Side) -> Shaded:
    return Shaded(name, side.about(), list(zip(side.texts, pair.shades(side), strict=True)), side.extremes())
