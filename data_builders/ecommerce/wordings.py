"""The words of the tasks in each language, from templates/LANGUAGE.yaml."""

from dataclasses import dataclass, replace
from decimal import Decimal
from functools import cache
from importlib.resources import files
from string import Formatter
from typing import Any

import yaml

from data_builders.synthesis.locales import LOCALES, Language


@dataclass(frozen=True)
class TaskWords:
    """One task in one language; `reply` by outcome ("" where there is only one), none where a model replies."""

    ask: tuple[str, ...]
    reply: dict[str, str]
    think: str | None


@dataclass(frozen=True)
class Words:
    """A language."""

    language: Language
    words: dict[str, str]
    tasks: dict[str, TaskWords]

    def money(self, amount: Decimal, currency: str | None) -> str:
        """1234.5 -> `USD 1,234.50`, as the language writes numbers; a whole amount has no decimals."""
        return replace(LOCALES[self.language], currency=f"{currency} {{}}" if currency else "{}").money(amount)


@cache
def words_of(language: Language) -> Words:
    text = (files("data_builders.ecommerce") / "templates" / f"{language}.yaml").read_text(encoding="utf-8")
    given = yaml.safe_load(text)
    return Words(language, given["words"], {name: _task(task) for name, task in given["tasks"].items()})


def _task(given: dict[str, Any]) -> TaskWords:
    reply = given.get("reply", {})
    return TaskWords(tuple(given["ask"]), {"": reply} if isinstance(reply, str) else reply, given.get("think"))


def slots(template: str) -> set[str]:
    """The names in braces."""
    return {name for _, name, _, _ in Formatter().parse(template) if name}
