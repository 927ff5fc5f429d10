"""What a task puts together from table rows, and what it draws with."""

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import TypeVar

from alignment.answers import letters_of
from data_builders.ecommerce.tables import Product, Record, Tables
from data_builders.ecommerce.wordings import Words

R = TypeVar("R", bound=Record)

TRIES = 60  # draws of another row before a task gives up
LISTED = ("title", "brand", "price", "category")
OPTIONS = 4


@dataclass(frozen=True)
class Parts:
    """One instance of a task: what fills the slots of its words, and the data below the question.

    `outcome` chooses the reply. `answer` is in machine form, or a letter where there are `options`. `used` are further
    table rows that it is made of.
    """

    slots: Mapping[str, str]
    block: str = ""
    outcome: str = ""
    answer: str | None = None
    options: tuple[str, ...] = ()
    used: Sequence[Record] = field(default=())


@dataclass(frozen=True)
class Draw:
    """The words and tables at hand, and the randomness of one instance."""

    words: Words
    tables: Tables
    rng: random.Random

    def others(self, rows: Sequence[R], fits: Callable[[R], bool], count: int) -> list[R] | None:
        """`count` different rows that fit; None where so many do not turn up in TRIES draws each."""
        found: dict[str, R] = {}
        for _ in range(TRIES * count):
            row = self.rng.choice(rows)
            if fits(row):
                found.setdefault(_key(row), row)
            if len(found) == count:
                return list(found.values())
        return None

    def products(self, fits: Callable[[Product], bool], count: int) -> list[Product] | None:
        return self.others(self.tables.products, fits, count)

    def price(self, product: Product) -> str:
        assert product.price is not None
        return self.words.money(product.price, product.currency)

    def card(self, product: Product, columns: Iterable[str] = LISTED) -> str:
        """The listing, a line for each column that is known."""
        values = {
            "title": product.title,
            "brand": product.brand,
            "price": None if product.price is None else self.price(product),
            "category": product.category,
        }
        lines = [f"{self.words.words[name]}: {values[name]}" for name in columns if values[name] is not None]
        return "\n".join([*lines, *(f"{name}: {value}" for name, value in product.attributes.items())])

    def numbered(self, texts: Sequence[str]) -> str:
        return "\n".join(f"{number}. {text}" for number, text in enumerate(texts, start=1))

    def choose(self, right: str, wrong: Sequence[str]) -> tuple[str, str, tuple[str, ...]]:
        """The options in a drawn order: as a block, the letter of the right one, and their texts."""
        options = self.rng.sample([right, *wrong], 1 + len(wrong))
        letters = letters_of(options)
        [letter] = [letter for letter, text in letters.items() if text == right]
        lines = [f"{letter}. {text}" for letter, text in letters.items()]
        return "\n".join([*lines, "", self.words.words["choose"]]), letter, tuple(options)

    def as_json(self, keys: Iterable[str]) -> str:
        return self.words.words["as_json"].format(keys=", ".join(keys))


def _key(row: Record) -> str:
    return row.title.casefold() if isinstance(row, Product) else row.place


def same(a: str | None, b: str | None) -> bool:
    """Whether two names are known and one."""
    return a is not None and b is not None and a.casefold() == b.casefold()


def machine(amount: Decimal) -> str:
    return f"{amount.normalize():f}"
