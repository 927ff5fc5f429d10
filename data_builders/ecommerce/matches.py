"""Tasks over pairs of listings, searches and reviews, whose labels the tables give."""

from data_builders.ecommerce.parts import Draw, Parts
from data_builders.ecommerce.tables import Pair, Query, Review


def same_product(draw: Draw, pair: Pair) -> Parts | None:
    block = draw.numbered([listing(pair.left), listing(pair.right)])
    return Parts({}, block, outcome(pair.label))


def pair_as_query(_draw: Draw, pair: Pair) -> Parts | None:
    """One listing's name is searched for, the other is found."""
    return Parts({"query": name_of(pair.left)}, listing(pair.right), outcome(pair.label))


def query(draw: Draw, found: Query) -> Parts | None:
    return Parts({"query": found.query}, f"{draw.words.words['title']}: {found.title}", outcome(found.label))


def sentiment(draw: Draw, review: Review) -> Parts | None:
    assert review.sentiment is not None
    return Parts({"sentiment": draw.words.words[review.sentiment]}, _shown(draw, review))


def rating(draw: Draw, review: Review) -> Parts | None:
    return Parts({"answer": str(review.rating)}, _shown(draw, review), answer=str(review.rating))


def outcome(label: bool) -> str:
    return "right" if label else "wrong"


def listing(columns: dict[str, str]) -> str:
    """The first column, then the others by name."""
    name, *others = columns.items()
    return "; ".join([name[1], *(f"{key}: {value}" for key, value in others)])


def name_of(columns: dict[str, str]) -> str:
    return next(iter(columns.values()))


def _shown(draw: Draw, review: Review) -> str:
    return f"{draw.words.words['review']}: {review.text}"
