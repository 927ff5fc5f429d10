"""What a page is made of, and its rendering: one HTML file that needs nothing else.

Text is escaped by the template; only drawings, which escape their own, pass as they are.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

HERE = Path(__file__).parent
# Pixels that a panel has: on a desktop by the panels beside each other, and on a phone.
DESKTOP = {1: 800, 2: 384, 3: 248}
PHONE = 342

Draw = Callable[[float], Markup]
Cell = str | Markup
Key = Sequence[tuple[str, str]]  # (class of the swatch, what it stands for)


@dataclass(frozen=True)
class Panel:
    """One drawing, made for each of the widths that it is shown at."""

    draw: Draw
    title: str = ""
    key: Key = ()


@dataclass(frozen=True)
class Figure:
    """Panels beside each other, and what is to be seen in them."""

    panels: Sequence[Panel]
    caption: str
    columns: Literal[1, 2, 3] = 1
    key: Key = ()
    block: str = "figure"

    def widths(self) -> list[tuple[str, float]]:
        return [("desktop", DESKTOP[self.columns]), ("phone", PHONE)]


@dataclass(frozen=True)
class Table:
    """Rows of cells. Columns in `words` hold words, the others numbers; those in `wrap` may break their lines."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""
    words: Sequence[int] = (0,)
    wrap: Sequence[int] = ()
    fold: str = ""  # where given, the table is folded behind these words
    block: str = "table"


@dataclass(frozen=True)
class Note:
    """A line about what is missing."""

    text: str
    command: str = ""
    block: str = "note"


@dataclass(frozen=True)
class Heading:
    text: str
    block: str = "heading"


@dataclass(frozen=True)
class Commands:
    """Commands to copy, each with what it is for."""

    rows: Sequence[tuple[str, str]]
    fold: str = ""
    block: str = "commands"


@dataclass(frozen=True)
class Answer:
    """One model's answer to a prompt."""

    model: str
    text: str
    verdict: str
    extracted: str

    @property
    def correct(self) -> bool:
        return self.verdict in ("correct", "chosen")


@dataclass(frozen=True)
class Comparison:
    """One prompt and the answers of several models, side by side."""

    language: str
    title: str
    prompt: str
    gold: str
    answers: Sequence[Answer]
    block: str = "comparison"


@dataclass(frozen=True)
class Shaded:
    """A completion as pieces of text with a shade from 0 to 1 each."""

    name: str
    about: str
    pieces: Sequence[tuple[str, float]]
    words: str


@dataclass(frozen=True)
class HeatMap:
    """One prompt and two completions, their tokens shaded by weight."""

    title: str
    prompt: str
    sides: Sequence[Shaded]
    legend: str
    block: str = "heat"


Block = Figure | Table | Note | Heading | Commands | Comparison | HeatMap


@dataclass(frozen=True)
class Section:
    title: str
    lead: str
    blocks: Sequence[Block]

    @property
    def anchor(self) -> str:
        return self.title.lower().replace(" ", "-")


@dataclass(frozen=True)
class Tile:
    """One headline number."""

    name: str
    value: str
    note: str
    strong: bool = False


@dataclass(frozen=True)
class Page:
    name: str
    headline: str
    deck: str
    tiles: Sequence[Tile]
    sections: Sequence[Section]
    footer: str
    notes: Sequence[str] = field(default_factory=list)


def render(page: Page) -> str:
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    css = Markup((HERE / "style.css").read_text(encoding="utf-8"))
    return environment.get_template("page.html").render(page=page, css=css) + "\n"
