"""Drafts: instances of tasks, drawn without replacement from the tables, so many for each family and language."""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from alignment.apportion import apportion
from alignment.fingerprint import text_hash
from alignment.rows import Row
from data_builders.ecommerce.families import Task
from data_builders.ecommerce.parts import Draw, Parts
from data_builders.ecommerce.tables import Product, Record, Tables
from data_builders.ecommerce.wordings import Words, slots, words_of
from data_builders.synthesis.locales import Language

T = TypeVar("T")
Cell = tuple[str, Language]  # family and language


@dataclass(frozen=True)
class Draft:
    """A row on its way. `ask` is the question in words, `block` the data below it; no `reply`: a model writes it.

    `kept` are the names and numbers in `ask` that other words have to keep. `think` is the reasoning before the reply,
    `style` that of a rewriting, `author` who wrote the reply: the table, or the models by their roles.
    """

    id: str
    family: str
    task: str
    language: Language
    ask: str
    block: str
    reply: str | None
    kept: tuple[str, ...]
    answer: str | None
    options: tuple[str, ...]
    sources: tuple[str, ...]
    reasoning: str | None = None  # what the template has, whether it is used or not
    think: str | None = None
    style: str | None = None
    author: str = "table"

    @property
    def question(self) -> str:
        return "\n\n".join(filter(None, [self.ask, self.block]))

    def head(self) -> Row:
        """What a row says of itself beside its conversation."""
        found: Row = {"id": self.id, "kind": "ecommerce", "language": self.language, "family": self.family}
        found |= {"task": self.task, "sources": list(self.sources), "author": self.author}
        extras = {"answer": self.answer, "options": list(self.options) or None, "style": self.style}
        return found | {key: value for key, value in extras.items() if value is not None}


def quotas(total: int, shares: Mapping[Cell, float]) -> dict[Cell, int]:
    """`total` by shares, which need not add up to 1."""
    counts = apportion(list(shares.values()), total, [total] * len(shares))
    return dict(zip(shares, counts.tolist(), strict=True))


def draw_drafts(
    tables: Tables, tasks: Sequence[Task], cell: Cell, count: int, *, seed: int, cross_lingual: bool
) -> list[Draft]:
    """At most `count` drafts of one cell: its tasks in turns, each over its table's rows in a drawn order, a row once.

    A cell's drafts depend on the tables, the tasks, the seed and the cell alone.
    """
    family, language = cell
    turns = [
        _instances(task, tables, words_of(language), f"{seed}/{family}/{language}/{task.name}", cross_lingual)
        for task in tasks
        if task.family == family
    ]
    found: list[Draft] = []
    while turns and len(found) < count:
        turn = turns.pop(0)
        draft = next(turn, None)
        if draft is not None:
            found.append(draft)
            turns.append(turn)
    return found


def _instances(task: Task, tables: Tables, words: Words, seed: str, cross_lingual: bool) -> Iterator[Draft]:
    for row in shuffled(tables.of(task.table), random.Random(seed)):
        if not task.suits(row) or not _speaks(row, task, words, cross_lingual):
            continue
        key = f"{seed}/{row.place}"
        draw = Draw(words, tables, random.Random(key))
        parts = task.make(draw, row)
        if parts is not None:
            yield _draft(task, draw, row, parts, text_hash(key)[:12])


def shuffled(rows: Sequence[T], rng: random.Random) -> Iterator[T]:
    """The rows in a drawn order, drawn as they are asked for (Fisher and Yates): of a long table few are."""
    moved: dict[int, int] = {}
    for place in range(len(rows)):
        drawn = rng.randrange(place, len(rows))
        yield rows[moved.get(drawn, drawn)]
        moved[drawn] = moved.pop(place, place)


def _speaks(row: Record, task: Task, words: Words, cross_lingual: bool) -> bool:
    """Whether the row serves an instruction in this language."""
    if cross_lingual and not task.native:
        return True
    return row.language in (words.language, None)


def _draft(task: Task, draw: Draw, row: Record, parts: Parts, name: str) -> Draft:
    words = draw.words.tasks[task.words]
    ask = draw.rng.choice(words.ask)
    reply = None if task.written else words.reply[parts.outcome].format(**parts.slots)
    return Draft(
        id=f"{task.family}/{task.name}/{draw.words.language}/{name}",
        family=task.family,
        task=task.name,
        language=draw.words.language,
        ask=ask.format(**parts.slots),
        block=parts.block,
        reply=reply,
        kept=tuple(sorted(parts.slots[name] for name in slots(ask))),
        answer=parts.answer,
        options=parts.options,
        sources=tuple(dict.fromkeys(map(_source, [row, *parts.used]))),
        reasoning=None if words.think is None else words.think.format(**parts.slots),
    )


def _source(row: Record) -> str:
    return row.id if isinstance(row, Product) and row.id is not None else row.place
