"""Tables of products, reviews, pairs and queries: CSV, JSONL, Parquet, and product pairs in Ditto's format.

Ditto's format (Li et al. 2020, arXiv 2004.00584) has a pair a line: `COL name VAL value ...`, the other product, and 1
or 0, parted by tabs. As a table of products it gives both sides.
"""

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from decimal import Decimal
from functools import cached_property
from itertools import islice
from typing import Any, TypeVar

from alignment.answers import to_number
from alignment.errors import UserError, did_you_mean
from alignment.rows import Row, located_rows
from data_builders.ecommerce.config import TableConfig, TablesConfig

T = TypeVar("T")

# table -> its columns, those without which it is nothing first
COLUMNS: dict[str, tuple[str, ...]] = {
    "products": ("title", "id", "brand", "price", "currency", "category", "description", "attributes", "language"),
    "reviews": ("text", "rating", "sentiment", "language"),
    "pairs": ("left", "right", "label", "language"),
    "queries": ("query", "title", "label", "language"),
}
REQUIRED = {"products": 1, "reviews": 1, "pairs": 3, "queries": 3}  # so many of the first
DELIMITED = {".csv": ",", ".csv.gz": ",", ".tsv": "\t", ".tsv.gz": "\t"}
DITTO = (".txt", ".txt.gz")
DITTO_FIELD = re.compile(r"(?:^|\s)COL (\S+) VAL(?=\s|$)")
LABELS = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
SENTIMENTS = {name: name for name in ("positive", "negative", "neutral")} | {"pos": "positive", "neg": "negative"}
SENTIMENTS |= {"neu": "neutral"}
FIRST = 20  # rows that a dry run reads


@dataclass(frozen=True)
class Product:
    """A listing; what is not known is None or empty."""

    place: str
    title: str
    brand: str | None = None
    price: Decimal | None = None  # above 0, in whole cents
    currency: str | None = None
    category: str | None = None
    description: str | None = None
    attributes: dict[str, str] = field(default_factory=dict)
    language: str | None = None
    id: str | None = None


@dataclass(frozen=True)
class Review:
    """A buyer's text, the stars (1 to 5) and the sentiment."""

    place: str
    text: str
    rating: int | None = None
    sentiment: str | None = None
    language: str | None = None


@dataclass(frozen=True)
class Pair:
    """Two listings, each its columns in order, and whether they are one product."""

    place: str
    left: dict[str, str]
    right: dict[str, str]
    label: bool
    language: str | None = None


@dataclass(frozen=True)
class Query:
    """A search, a listing's title, and whether it is relevant."""

    place: str
    query: str
    title: str
    label: bool
    language: str | None = None


Record = Product | Review | Pair | Query


@dataclass(frozen=True)
class Tables:
    """All records, in the order of the tables and their rows."""

    products: list[Product]
    reviews: list[Review]
    pairs: list[Pair]
    queries: list[Query]

    @cached_property
    def by_category(self) -> dict[str, list[Product]]:
        return _grouped(self.products, "category")

    @cached_property
    def by_brand(self) -> dict[str, list[Product]]:
        return _grouped(self.products, "brand")

    def of(self, name: str) -> Sequence[Record]:
        kinds: dict[str, Sequence[Record]] = {"products": self.products, "reviews": self.reviews, "pairs": self.pairs}
        return (kinds | {"queries": self.queries})[name]


def _grouped(products: Sequence[Product], column: str) -> dict[str, list[Product]]:
    """The products by a column's text, its case folded; without those that have none."""
    found: dict[str, list[Product]] = {}
    for product in products:
        name = getattr(product, column)
        if name is not None:
            found.setdefault(name.casefold(), []).append(product)
    return found


def read_tables(config: TablesConfig) -> Tables:
    """Every row of every table, read into memory; a product that several rows repeat counts once.

    Raises:
        UserError: a column that the table lacks, or a value that is not what the column holds (place and column named).
    """
    products: dict[str, Product] = {}
    for product in _all(config.products, "products", _product):
        products.setdefault(repr(replace(product, place="")), product)
    return Tables(
        products=list(products.values()),
        reviews=_all(config.reviews, "reviews", _review),
        pairs=_all(config.pairs, "pairs", _pair),
        queries=_all(config.queries, "queries", _query),
    )


def columns_of(config: TablesConfig) -> dict[str, list[set[str]]]:
    """Of each kind of table, for each of its files, the columns that its first rows have. What is missing is an error.

    Raises:
        UserError: an unknown name in `columns` or `values`, or a table without a column that it must have.
    """
    kinds = {
        "products": config.products,
        "reviews": config.reviews,
        "pairs": config.pairs,
        "queries": config.queries,
    }
    return {kind: [_columns(table, kind) for table in tables] for kind, tables in kinds.items()}


def _columns(table: TableConfig, kind: str) -> set[str]:
    for name in (*table.columns, *table.values):
        if name not in COLUMNS[kind]:
            raise UserError(f"tables.{kind}: {table.rows}: unknown column {name!r}{did_you_mean(name, COLUMNS[kind])}")
    first = list(islice(_located(table, kind), FIRST))
    if not first:
        raise UserError(f"tables.{kind}: {table.rows}: holds no rows")
    theirs = {name for _, row in first for name in row}
    for name, column in table.columns.items():
        if column not in theirs:
            raise UserError(f"tables.{kind}: {table.rows}: no column {column!r} ({name}){did_you_mean(column, theirs)}")
    found = {name for name in COLUMNS[kind] if table.columns.get(name, name) in theirs} | set(table.values)
    for name in COLUMNS[kind][: REQUIRED[kind]]:
        if name not in found:
            raise UserError(
                f"tables.{kind}: {table.rows}: no column {name!r}; name it by columns: {{{name}: ...}}, it has: "
                f"{', '.join(sorted(theirs)[:12])}"
            )
    return found


def _all(tables: Sequence[TableConfig], kind: str, read: Callable[[Row, str], T | None]) -> list[T]:
    records = []
    for table in tables:
        _columns(table, kind)
        for place, row in _located(table, kind):
            own = {name: _value(row, table, name) for name in COLUMNS[kind]}
            record = read(own, place)
            if record is not None:
                records.append(record)
    return records


def _value(row: Row, table: TableConfig, name: str) -> Any:
    """None where there is nothing."""
    value = row.get(table.columns.get(name, name), table.values.get(name))
    if isinstance(value, str):
        return " ".join(value.split()) or None
    return None if value != value else value  # NaN, as pandas writes what is missing


def _located(table: TableConfig, kind: str) -> Iterator[tuple[str, Row]]:
    if table.rows.endswith(tuple(DELIMITED)):
        return _delimited(table.rows)
    if table.rows.endswith(DITTO):
        return _ditto_products(table.rows) if kind == "products" else _ditto(table.rows)
    return located_rows(table.rows)


def _delimited(path: str) -> Iterator[tuple[str, Row]]:
    delimiter = next(sign for suffix, sign in DELIMITED.items() if path.endswith(suffix))
    with _text(path) as file:
        reader = csv.DictReader(file, delimiter=delimiter)
        for row in reader:
            if None in row or None in row.values():
                raise UserError(
                    f"{path}:{reader.line_num}: {len(reader.fieldnames or ())} columns expected, as its head"
                )
            yield f"{path}:{reader.line_num}", row


def _ditto(path: str) -> Iterator[tuple[str, Row]]:
    with _text(path) as file:
        for number, line in enumerate(file, start=1):
            parts = [part.strip() for part in line.split("\t")]
            if len(parts) != 3 or not all(DITTO_FIELD.match(part) for part in parts[:2]):
                raise UserError(f"{path}:{number}: expected `COL name VAL value ...` twice and a label, parted by tabs")
            left, right = map(_ditto_columns, parts[:2])
            yield f"{path}:{number}", {"left": left, "right": right, "label": parts[2]}


def _ditto_columns(text: str) -> dict[str, str]:
    _, *named = DITTO_FIELD.split(text)
    return {name: value.strip() for name, value in zip(named[::2], named[1::2], strict=True)}


def _ditto_products(path: str) -> Iterator[tuple[str, Row]]:
    return ((f"{place} {side}", pair[side]) for place, pair in _ditto(path) for side in ("left", "right"))


@contextmanager
def _text(path: str) -> Iterator[io.TextIOBase]:
    try:
        with gzip.open(path) if path.endswith(".gz") else open(path, "rb") as raw:  # noqa: PTH123 as gzip's
            yield io.TextIOWrapper(raw, encoding="utf-8-sig", newline="")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None


def _product(row: Row, place: str) -> Product | None:
    """None for a listing without a title."""
    if row["title"] is None:
        return None
    language = row["language"]
    return Product(
        place=place,
        title=str(row["title"]),
        brand=_optional(row["brand"]),
        price=_price(row["price"], language, place),
        currency=_optional(row["currency"]),
        category=_optional(row["category"]),
        description=_optional(row["description"]),
        attributes=_attributes(row["attributes"], place),
        language=language,
        id=_optional(row["id"]),
    )


def _review(row: Row, place: str) -> Review | None:
    if row["text"] is None:
        return None
    sentiment = _optional(row["sentiment"])
    if sentiment is not None and sentiment.casefold() not in SENTIMENTS:
        raise UserError(f"{place}: sentiment {sentiment!r}{did_you_mean(sentiment.casefold(), SENTIMENTS)}")
    return Review(
        place=place,
        text=str(row["text"]),
        rating=_rating(row["rating"], place),
        sentiment=None if sentiment is None else SENTIMENTS[sentiment.casefold()],
        language=row["language"],
    )


def _pair(row: Row, place: str) -> Pair | None:
    left, right = (_listing(row[side], place, side) for side in ("left", "right"))
    if not left or not right:
        return None
    return Pair(place, left, right, _label(row["label"], place), row["language"])


def _query(row: Row, place: str) -> Query | None:
    if row["query"] is None or row["title"] is None:
        return None
    return Query(place, str(row["query"]), str(row["title"]), _label(row["label"], place), row["language"])


def _listing(value: Any, place: str, side: str) -> dict[str, str]:
    match value:
        case None:
            return {}
        case str(name):
            return {side: name}
        case dict(columns):
            return {str(name): text for name, content in columns.items() if (text := _optional(content))}
        case other:
            raise UserError(f"{place}: {side} must be a text or an object of columns, found {type(other).__name__}")


def _optional(value: Any) -> str | None:
    return None if value is None else " ".join(str(value).split()) or None


def _label(value: Any, place: str) -> bool:
    text = str(value).casefold().removesuffix(".0")
    if text not in LABELS:
        raise UserError(f"{place}: label {value!r}; expected 1 or 0")
    return LABELS[text]


def _price(value: Any, language: str | None, place: str) -> Decimal | None:
    if value is None:
        return None
    number = to_number(str(value), language or "en")
    if number is None or number < 0:
        raise UserError(f"{place}: price {value!r} is not an amount of money")
    if number == 0 or number.denominator not in (1, 2, 4, 5, 10, 20, 25, 50, 100):
        return None  # no price that anyone pays: free, or in fractions of a cent
    return Decimal(number.numerator) / Decimal(number.denominator)


def _rating(value: Any, place: str) -> int | None:
    if value is None:
        return None
    number = to_number(str(value))
    if number is None or not 1 <= number <= 5:
        raise UserError(f"{place}: rating {value!r}; expected 1 to 5")
    return int(number) if number.denominator == 1 else None


def _attributes(value: Any, place: str) -> dict[str, str]:
    try:
        found = json.loads(value) if isinstance(value, str) else value or {}
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise UserError(f"{place}: attributes must be a JSON object of names to values, found {value!r:.60}")
    return {str(name): text for name, content in found.items() if (text := _optional(content))}
