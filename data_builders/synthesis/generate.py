"""Seeded tasks, in splits that cannot share a problem: the split is a function of the problem's key."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import count as count_from
from itertools import islice
from random import Random
from typing import Literal

from alignment.errors import UserError
from data_builders.synthesis.languages import WORDINGS
from data_builders.synthesis.locales import LANGUAGES, LOCALES, Language, plain
from data_builders.synthesis.problems import (
    NOT_MONEY,
    TEMPLATES,
    Numbers,
    Template,
    draw,
    in_currency,
    pick,
    reverse,
    solve,
)
from data_builders.synthesis.wording import Wording

Split = Literal["train", "held_out"]
HELD_OUT_ONE_IN = 8
MOST_DRAWS = 10_000  # without a new problem: the template is used up


@dataclass(frozen=True)
class Task:
    """One worded problem with its answers.

    `key` names the problem in every language: the template and the drawn numbers. `id` is the language and the key,
    unique within and across splits. Numbers in texts are written as the language's locale writes them; `answer` is
    canonical ("1234.5"). Every answer ends in the boxed number; `direct_answer` is that alone, and
    follows `thinking`.
    """

    id: str
    key: str
    language: Language
    template: Template
    question: str
    direct_answer: str
    short_answer: str
    thinking: str
    answer: str


def generate(
    split: Split,
    count: int,
    *,
    seed: int,
    languages: Sequence[Language] = LANGUAGES,
    templates: Sequence[Template] = TEMPLATES,
) -> Iterator[Task]:
    """Yield `count` tasks, the same for the same seed on any Python, balanced over languages and templates.

    No problem comes twice in one language. Each round holds one task of every language and template, in random order. A
    longer run starts with the tasks of a shorter one.

    Raises UserError when no language or template is named, or when one has no new problem left.
    """
    if not languages or not templates:
        raise UserError("languages and templates: expected at least one of each")
    cells = {
        (language, template): _cell(split, seed, language, template) for language in languages for template in templates
    }
    order = Random(f"{seed}/{split}")
    turns = (cell for _ in count_from() for cell in sorted(cells, key=lambda _: order.random()))
    for cell in islice(turns, count):
        yield next(cells[cell])


def split_of(key: str) -> Split:
    """The split that owns a problem, by a stable hash of its key: one problem in eight is held out."""
    return "held_out" if int(sha256(key.encode()).hexdigest(), 16) % HELD_OUT_ONE_IN == 0 else "train"


def check_disjoint(train: Iterable[Task], held_out: Iterable[Task]) -> None:
    """Raise ValueError, naming the first one, when a held-out problem or question text is also in train."""
    seen = {value: task.id for task in train for value in (task.key, task.question)}
    for task in held_out:
        for value in (task.key, task.question):
            if value in seen:
                raise ValueError(f"held-out task {task.id} is also in train, as {seen[value]}: {value}")


def _cell(split: Split, seed: int, language: Language, template: Template) -> Iterator[Task]:
    """Endless distinct tasks of one language and template, from a random stream of their own."""
    rng = Random(f"{seed}/{split}/{language}/{template}")
    seen: set[str] = set()
    while True:
        for _ in range(MOST_DRAWS):
            numbers = draw(template, rng)
            key = "-".join([template, *map(plain, numbers.values())])
            if key not in seen and split_of(key) == split:
                break
        else:
            raise UserError(
                f"{language}/{template}: only {len(seen)} distinct {split} problems; ask for fewer tasks, or for more "
                "languages or templates"
            )
        seen.add(key)
        yield _word(key, language, template, numbers, rng)


def _word(key: str, language: Language, template: Template, numbers: Numbers, rng: Random) -> Task:
    locale, wording = LOCALES[language], WORDINGS[language]
    numbers = in_currency(numbers, locale.money_unit)
    solution = solve(template, numbers)
    working = "; ".join(line.written(locale.number) for line in solution.lines) + wording.stop
    slots = _things(wording, rng) | {
        name: (locale.number if name in NOT_MONEY else locale.money)(value) for name, value in numbers.items()
    }
    check = pick(rng, wording.checks).format(check=reverse(solution.last_step).written(locale.number))
    boxed = f"{wording.answer}\\boxed{{{locale.number(solution.answer)}}}"
    return Task(
        id=f"{language}-{key}",
        key=key,
        language=language,
        template=template,
        question=pick(rng, wording.questions[template]).format(**slots),
        direct_answer=boxed,
        short_answer=wording.space.join([working, boxed]),
        thinking=wording.space.join([working, check]),
        answer=plain(solution.answer),
    )


def _things(wording: Wording, rng: Random) -> dict[str, str]:
    """Who buys what."""
    first = pick(rng, wording.products)
    other = pick(rng, [product for product in wording.products if product != first])
    name, good = pick(rng, wording.names), pick(rng, wording.goods)
    return {"name": name, "item": first.one, "items": first.many, "other": other.one, "good": good}
