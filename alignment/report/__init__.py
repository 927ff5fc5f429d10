"""The report of a pipeline: one HTML page, the flat metrics.json, the table of the console, the picture of the README.

    alignment report configs/pipelines/demo.yaml

Everything is read from the files that the stages wrote; a stage that is missing or unfinished is shown as that.
"""

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from rich.table import Table

from alignment import atomic
from alignment.report import (
    accuracy,
    cover,
    headline,
    modes,
    pairs,
    ranking,
    record,
    routing,
    sources,
    training,
    weights,
)
from alignment.report.collect import collect
from alignment.report.headline import Row
from alignment.report.page import Page, render

__all__ = ["Row", "build", "picture", "summary", "summary_rows"]


def build(pipeline: Path, overrides: Sequence[str] = ()) -> Path:
    """Write `report.html` and `metrics.json` into the pipeline's output_dir. Returns the page's path.

    `overrides` are those that the pipeline ran with.

    Raises:
        UserError: the pipeline's file, or the config of one of its stages, is missing or wrong.
    """
    collected = collect(pipeline, overrides)
    found = sources.gather(collected)
    values = sources.flat(found)
    page = Page(
        name=collected.name,
        headline=headline.sentence(values),
        deck=headline.deck(values, collected),
        tiles=headline.tiles(values),
        sections=[
            *accuracy.sections(collected),
            *modes.sections(collected),
            *pairs.sections(collected),
            *ranking.sections(collected),
            *training.sections(collected),
            *weights.sections(collected),
            *routing.sections(collected),
            *record.sections(collected, found),
        ],
        footer=f"Made from {pipeline} on {datetime.now(UTC):%Y-%m-%d %H:%M} UTC.",
        notes=collected.reader.problems,
    )
    atomic.write_json(collected.output_dir / "metrics.json", values)
    path = collected.output_dir / "report.html"
    atomic.write_text(path, render(page))
    return path


def summary_rows(pipeline: Path, overrides: Sequence[str] = ()) -> list[Row]:
    """The main results: what was measured, its value, its 95% interval."""
    return headline.rows(_values(pipeline, overrides))


def summary(pipeline: Path, overrides: Sequence[str] = ()) -> Table:
    """The main results as the table that the console prints."""
    prompts = _values(pipeline, overrides).get("pass_at_1.prompts")
    title = f"{pipeline.stem}: {prompts:,.0f} held-out prompts" if prompts else pipeline.stem
    table = Table("", "value", "95% interval", title=title, title_justify="left")
    for row in summary_rows(pipeline, overrides):
        table.add_row(*row)
    return table


def picture(pipeline: Path, file: Path, overrides: Sequence[str] = ()) -> None:
    """Draw pass@1 by round and the best-of-n curves into a PNG.

    Raises:
        UserError: the stages that it shows have not finished.
    """
    cover.draw(collect(pipeline, overrides), file)


def _values(pipeline: Path, overrides: Sequence[str]) -> dict[str, float]:
    return sources.flat(sources.gather(collect(pipeline, overrides)))
