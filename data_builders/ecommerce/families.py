"""The twelve families, their tasks, and what each task needs of the tables.

The families are those of the Compass-v2 report. By it query-product matching, product questions and
product similarity make over half of the data; SHARES keep to it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from alignment.errors import UserError, did_you_mean
from data_builders.ecommerce import arithmetic, matches, products
from data_builders.ecommerce.parts import Draw, Parts
from data_builders.ecommerce.tables import Record

# family -> its share of the rows, where the config names none
SHARES: dict[str, float] = {
    "product_information": 0.05,
    "attribute_extraction": 0.05,
    "classification": 0.05,
    "recommendation": 0.05,
    "product_similarity": 0.17,
    "numerical_reasoning": 0.05,
    "information_generation": 0.05,
    "product_questions": 0.18,
    "query_product_matching": 0.20,
    "review_understanding": 0.05,
    "query_rewriting": 0.05,
    "dialogue_understanding": 0.05,
}


@dataclass(frozen=True)
class Task:
    """A kind of instruction, made of a row of `table` that has all of `needs`.

    `words` names its entry in the templates. `native`: the reply is the table's own text, so it is asked in that
    text's language alone. `written`: a model replies.
    """

    name: str
    family: str
    table: str
    needs: tuple[str, ...]
    make: Callable[[Draw, Any], Parts | None]
    words: str
    native: bool = False
    written: bool = False

    def suits(self, record: Record) -> bool:
        return all(getattr(record, column) not in (None, {}) for column in self.needs)


def _task(
    family: str, table: str, needs: str, make: Callable[[Draw, Any], Parts | None], name: str = "", **others: Any
) -> Task:
    name = name or make.__name__
    return Task(name, family, table, tuple(needs.split()), make, **{"words": name, **others})


TASKS: tuple[Task, ...] = (
    _task("product_information", "products", "title brand", products.brand),
    _task("product_information", "products", "title brand", products.brand_range),
    _task("attribute_extraction", "products", "title attributes", products.attributes),
    _task("attribute_extraction", "products", "title brand", products.brand_in_title, words="attributes"),
    _task("classification", "products", "title category", products.category),
    _task("recommendation", "products", "title category price", products.within_budget),
    _task("recommendation", "products", "title category", products.shown, "pitch", written=True),
    _task("product_similarity", "pairs", "left right label", matches.same_product),
    _task("product_similarity", "products", "title category", products.same_category),
    _task("numerical_reasoning", "products", "title price", arithmetic.total),
    _task("numerical_reasoning", "products", "title price", arithmetic.discount),
    _task("numerical_reasoning", "products", "title price", arithmetic.change),
    _task(
        "information_generation",
        "products",
        "title description language",
        products.described,
        "description",
        native=True,
    ),
    _task("information_generation", "products", "title", products.shown, "advertisement", written=True),
    _task("product_questions", "products", "title price", products.under_budget),
    _task("product_questions", "products", "title brand", products.is_brand),
    _task("product_questions", "products", "title attributes", products.attribute_asked),
    _task("product_questions", "products", "title", products.not_stated),
    _task("query_product_matching", "queries", "query title label", matches.query),
    _task("query_product_matching", "pairs", "left right label", matches.pair_as_query, words="query"),
    _task("query_product_matching", "products", "title category", products.request, words="query"),
    _task("review_understanding", "reviews", "text sentiment", matches.sentiment),
    _task("review_understanding", "reviews", "text rating", matches.rating),
    _task("query_rewriting", "products", "title", products.typos),
    _task("query_rewriting", "products", "title category price", products.filters),
    _task("dialogue_understanding", "products", "title price", arithmetic.order_total),
    _task("dialogue_understanding", "products", "title price", arithmetic.order),
)


def tasks_for(columns: Mapping[str, Sequence[set[str]]], written: bool) -> list[Task]:
    """The tasks that tables with these columns allow; those that a model replies to only with `written`."""
    return [task for task in TASKS if _held(task, columns) and (written or not task.written)]


def missing(family: str, columns: Mapping[str, Sequence[set[str]]], written: bool) -> str:
    """What each task of the family lacks, in words."""
    return "; ".join(
        f"{task.name} needs {task.table} with {', '.join(task.needs)}" + (" and mixture_of_agents" * task.written)
        for task in TASKS
        if task.family == family and task not in tasks_for(columns, written)
    )


def shares_of(
    given: Mapping[str, float] | None, columns: Mapping[str, Sequence[set[str]]], written: bool
) -> dict[str, float]:
    """Family -> share, in the order of SHARES; those of share 0 are left out.

    Raises:
        UserError: an unknown family, one that is asked for and that the tables do not allow, or none that they do.
    """
    possible = {task.family for task in tasks_for(columns, written)}
    for family in given or {}:
        if family not in SHARES:
            raise UserError(f"families: unknown family {family!r}{did_you_mean(family, SHARES)}")
    wanted = SHARES if given is None else given
    for family, share in (given or {}).items():
        if share > 0 and family not in possible:
            raise UserError(
                f"families.{family}: the tables do not hold what it needs: {missing(family, columns, written)}"
            )
    shares = {family: wanted[family] for family in SHARES if family in possible and wanted.get(family, 0) > 0}
    if not shares:
        raise UserError("tables: they hold what no family needs; see docs/multilingual.md for the columns of each")
    return shares


def _held(task: Task, columns: Mapping[str, Sequence[set[str]]]) -> bool:
    return any(set(task.needs) <= held for held in columns[task.table])
