"""The words of the tasks in each language, from templates/LANGUAGE.yaml."""

import random
from dataclasses import dataclass
from decimal import Decimal
from functools import cache
from importlib.resources import files
from string import Formatter

import yaml

from data_builders.synthesis.locales import LANGUAGES, LOCALES, Language


@dataclass(frozen=True)
class TaskWords:
    """One task in one language; `reply` by outcome ("" where there is one outcome), none where a model replies."""

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
        locale = LOCALES[self.language]
        digits = f"{amount:,.0f}" if amount == amount.to_integral_value() else f"{amount:,.2f}"
        separated = digits.translate(str.maketrans(",.", locale.thousands + locale.decimal))
        return f"{currency} {separated}" if currency else separated

    def asks(self, task: str, rng: random.Random) -> str:
        return rng.choice(self.tasks[task].ask)


@cache
def words_of(language: Language) -> Words:
    text = (files("data_builders.ecommerce") / "templates" / f"{language}.yaml").read_text(encoding="utf-8")
    given = yaml.safe_load(text)
    return Words(language, given["words"], {name: _task(task) for name, task in given["tasks"].items()})


def _task(given: dict[str, object]) -> TaskWords:
    ask, reply, think = given["ask"], given.get("reply", {}), given.get("think")
    assert isinstance(ask, list) and (think is None or isinstance(think, str))
    # YAML reads the outcomes' bare names as booleans.
    outcomes = {"": reply} if isinstance(reply, str) else {_outcome(k): v for k, v in dict(reply).items()}  # type: ignore[call-overload]
    return TaskWords(tuple(ask), outcomes, think)


def _outcome(key: object) -> str:
    match key:
        case True:
            return "yes"
        case False:
            return "no"
        case other:
            return str(other)


def slots(template: str) -> set[str]:
    """The names in braces."""
    return {name for _, name, _, _ in Formatter().parse(template) if name}


__all__ = ["LANGUAGES", "Language", "TaskWords", "Words", "slots", "words_of"]
