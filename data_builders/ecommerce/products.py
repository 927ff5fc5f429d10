"""Tasks over the columns of one listing, and over listings that share them. None: the row does not lend itself."""

import json
import re
from collections.abc import Mapping
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal

from data_builders.ecommerce.parts import OPTIONS, Draw, Parts, same
from data_builders.ecommerce.tables import Product

# In any language of the tables: a listing with such a word does say something about a warranty.
WARRANTY = re.compile(
    "warrant|guarant|garansi|jaminan|waranti|garant|bảo hành|ประกัน|保修|质保|保固|保証|garantiya", re.IGNORECASE
)
NOISY = re.compile(r"[A-Za-z]{5,}")  # words of a search that may be misspelt
SEARCH_WORDS = 4


def brand(draw: Draw, product: Product) -> Parts | None:
    assert product.brand is not None
    return Parts({"title": product.title, "brand": product.brand}, draw.card(product))


def brand_range(draw: Draw, product: Product) -> Parts | None:
    brand = product.brand
    assert brand is not None
    others = draw.products(lambda p: p.brand is not None and not _alike(p.brand, brand), 2)
    if others is None:
        return None
    alike = draw.tables.by_brand[brand.casefold()]
    more = draw.others(alike, lambda p: not same(p.title, product.title), 1) or []
    listed = draw.rng.sample([product, *more, *others], 3 + len(more))
    label = draw.words.words["brand"]
    block = draw.numbered([f"{p.title} ({label}: {p.brand})" for p in listed])
    titles = "\n".join(f"- {p.title}" for p in listed if same(p.brand, brand))
    return Parts({"brand": brand, "titles": titles}, block, used=[*more, *others])


def attributes(draw: Draw, product: Product) -> Parts | None:
    """Those attributes whose value the text names."""
    text = product.title if product.description is None else f"{product.title}\n{product.description}"
    found = {name: value for name, value in product.attributes.items() if _names(text, value)}
    return _extraction(draw, text, found) if found else None


def brand_in_title(draw: Draw, product: Product) -> Parts | None:
    assert product.brand is not None
    if not _names(product.title, product.brand):
        return None
    return _extraction(draw, product.title, {"brand": product.brand})


def _extraction(draw: Draw, text: str, found: dict[str, str]) -> Parts:
    return Parts({"json": _json(found)}, f"{text}\n\n{draw.as_json(found)}")


def category(draw: Draw, product: Product) -> Parts | None:
    assert product.category is not None
    others = _other_categories(draw, product.category, OPTIONS - 1)
    if others is None:
        return None
    block, letter, options = draw.choose(product.category, others)
    slots = {"letter": letter, "category": product.category}
    return Parts(slots, f"{draw.card(product, ('title', 'brand'))}\n\n{block}", answer=letter, options=options)


def same_category(draw: Draw, product: Product) -> Parts | None:
    category = product.category
    assert category is not None
    near = draw.others(draw.tables.by_category[category.casefold()], lambda p: not same(p.title, product.title), 1)
    far = draw.products(lambda p: p.category is not None and not same(p.category, category), OPTIONS - 1)
    if near is None or far is None:
        return None
    block, letter, options = draw.choose(near[0].title, [p.title for p in far])
    slots = {"title": product.title, "letter": letter, "category": category}
    return Parts(slots, block, answer=letter, options=options, used=[*near, *far])


def within_budget(draw: Draw, product: Product) -> Parts | None:
    """One product has both the category and the price; of the others one has the category alone, where there is one."""
    price, category = product.price, product.category
    assert price is not None and category is not None
    budget = round_up(price)

    def priced(other: Product) -> bool:
        comparable = other.price is not None and other.category is not None and other.currency == product.currency
        return comparable and not same(other.title, product.title)

    alike = draw.tables.by_category[category.casefold()]
    dear = draw.others(alike, lambda p: priced(p) and (p.price or 0) > budget, 1) or []
    far = draw.products(lambda p: priced(p) and not same(p.category, category), OPTIONS - 1 - len(dear))
    if far is None:
        return None

    def line(p: Product) -> str:
        return f"{p.title} ({p.category}, {draw.price(p)})"

    block, letter, options = draw.choose(line(product), [line(p) for p in (*dear, *far)])
    slots = {
        "category": category,
        "budget": draw.words.money(budget, product.currency),
        "letter": letter,
        "title": product.title,
        "price": draw.price(product),
    }
    return Parts(slots, block, answer=letter, options=options, used=[*dear, *far])


def described(draw: Draw, product: Product) -> Parts | None:
    assert product.description is not None
    return Parts({"description": product.description}, draw.card(product))


def shown(draw: Draw, product: Product) -> Parts | None:
    """The listing alone: a model writes about it."""
    return Parts({"category": product.category or ""}, draw.card(product))


def under_budget(draw: Draw, product: Product) -> Parts | None:
    assert product.price is not None
    enough = draw.rng.random() < 0.5
    budget = round_up(product.price) if enough else round_down(product.price)
    slots = {"budget": draw.words.money(budget, product.currency), "price": draw.price(product)}
    return Parts(slots, draw.card(product), "right" if enough else "wrong")


def is_brand(draw: Draw, product: Product) -> Parts | None:
    brand = product.brand
    assert brand is not None
    if draw.rng.random() < 0.5:
        return Parts({"asked": brand, "brand": brand}, draw.card(product), "right")
    others = draw.products(lambda p: p.brand is not None and not _alike(p.brand, brand), 1)
    if others is None or others[0].brand is None or _names(product.title, others[0].brand):
        return None
    return Parts({"asked": others[0].brand, "brand": brand}, draw.card(product), "wrong", used=others)


def attribute_asked(draw: Draw, product: Product) -> Parts | None:
    if not product.attributes:
        return None
    name = draw.rng.choice(list(product.attributes))
    return Parts({"attribute": name, "value": product.attributes[name]}, draw.card(product))


def not_stated(draw: Draw, product: Product) -> Parts | None:
    card = draw.card(product)
    return None if WARRANTY.search(card) else Parts({}, card)


def typos(draw: Draw, product: Product) -> Parts | None:
    """The first words of the title, two of them misspelt."""
    words = re.findall(r"\w[\w.-]*", product.title.casefold())[:SEARCH_WORDS]
    places = [place for place, word in enumerate(words) if NOISY.fullmatch(word)]
    if not places:
        return None
    wrong = list(words)
    for place in draw.rng.sample(places, min(2, len(places))):
        wrong[place] = _misspelt(draw, words[place])
    if wrong == words:
        return None
    return Parts({"query": " ".join(wrong), "corrected": " ".join(words)})


def filters(draw: Draw, product: Product) -> Parts | None:
    assert product.price is not None and product.category is not None
    budget = round_up(product.price)
    slots = {"category": product.category, "budget": draw.words.money(budget, product.currency)}
    request = f"{draw.words.words['request']}: {draw.words.words['wanted'].format(**slots)}"
    found: dict[str, str | int | float] = {"category": product.category, "max_price": _number(budget)}
    if product.currency is not None:
        found["currency"] = product.currency
    return Parts({"json": _json(found)}, f"{request}\n\n{draw.as_json(found)}")


def request(draw: Draw, product: Product) -> Parts | None:
    """A search for a category, and for a brand where it is known: the listing's own, or of another category."""
    category = product.category
    assert category is not None
    right = draw.rng.random() < 0.5
    wanted = [category] if right else _other_categories(draw, category, 1)
    if wanted is None:
        return None
    query = " ".join(filter(None, [product.brand, wanted[0]]))
    return Parts({"query": query}, draw.card(product), "right" if right else "wrong")


def round_up(price: Decimal) -> Decimal:
    """The next amount of two digits and noughts that is at least `price`: 53,500 -> 54,000."""
    return _rounded(price, ROUND_CEILING)


def round_down(price: Decimal) -> Decimal:
    """One of two digits and noughts below `price`: at least a tenth below it where it is such an amount itself."""
    lower = _rounded(price, ROUND_FLOOR)
    return lower if lower < price else _rounded(price * Decimal("0.9"), ROUND_FLOOR)


def _rounded(amount: Decimal, rounding: str) -> Decimal:
    unit = Decimal(1).scaleb(amount.adjusted() - 1)
    return (amount / unit).to_integral_value(rounding) * unit


def _number(amount: Decimal) -> int | float:
    return int(amount) if amount == amount.to_integral_value() else float(amount)


def _misspelt(draw: Draw, word: str) -> str:
    """Two letters inside the word in the other order, or one left out."""
    at = draw.rng.randrange(1, len(word) - 2)
    if draw.rng.random() < 0.5:
        return word[:at] + word[at + 1 :]
    return word[:at] + word[at + 1] + word[at] + word[at + 2 :]


def _other_categories(draw: Draw, category: str, count: int) -> list[str] | None:
    others = [rows[0].category or "" for name, rows in draw.tables.by_category.items() if name != category.casefold()]
    return draw.rng.sample(others, count) if len(others) >= count else None


def _alike(a: str, b: str) -> bool:
    """Whether two names of brands share a word, as `topics entertainment` and `topics-entertainment` do."""
    return not set(re.findall(r"\w{3,}", a.casefold())).isdisjoint(re.findall(r"\w{3,}", b.casefold())) or same(a, b)


def _names(text: str, value: str) -> bool:
    """Whether the value stands in the text as words of its own."""
    return re.search(rf"(?<!\w){re.escape(value)}(?!\w)", text, re.IGNORECASE) is not None


def _json(values: Mapping[str, str | int | float]) -> str:
    return json.dumps(dict(values), ensure_ascii=False)
