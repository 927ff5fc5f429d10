"""What a language must supply to word the problems."""

from collections.abc import Mapping
from dataclasses import dataclass

from data_builders.synthesis.problems import Template


@dataclass(frozen=True)
class Product:
    """A thing in a shop, counted by the piece: one of it, and many."""

    one: str
    many: str


@dataclass(frozen=True)
class Wording:
    """All text of one language.

    Slots are the problem's numbers by name, {name}, {item}, {items}, {other} (a second product) and {good} (sold by
    weight); in checks {check}: the sum that checks the last.
    """

    answer: str  # stands before the boxed number
    names: tuple[str, ...]
    products: tuple[Product, ...]
    goods: tuple[str, ...]
    questions: Mapping[Template, tuple[str, ...]]
    checks: tuple[str, ...]
    stop: str = "."
    space: str = " "


def uninflected(*names: str) -> tuple[Product, ...]:
    """Products of a language whose nouns have no plural form."""
    return tuple(Product(name, name) for name in names)
