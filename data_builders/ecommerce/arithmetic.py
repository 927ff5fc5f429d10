"""Tasks of exact arithmetic over prices, each with its reasoning and an answer that can be verified."""

import json
from decimal import Decimal

from data_builders.ecommerce.parts import Draw, Parts, machine
from data_builders.ecommerce.products import round_up
from data_builders.ecommerce.tables import Product

PERCENTS = (5, 10, 15, 20, 25, 30, 40, 50)
CENT = Decimal("0.01")


def total(draw: Draw, product: Product) -> Parts | None:
    """So many of one product and so many of another."""
    others = draw.products(
        lambda p: p.price is not None and p.currency == product.currency and p.title != product.title, 1
    )
    if others is None:
        return None
    counts = {"first": draw.rng.randint(2, 9), "second": draw.rng.randint(2, 9)}
    prices = {"first": _price(product), "second": _price(others[0])}
    totals = {which: counts[which] * prices[which] for which in counts}
    answer = sum(totals.values(), Decimal(0))
    slots = {f"{which}_count": str(count) for which, count in counts.items()}
    slots |= {f"{which}_price": _money(draw, product, price) for which, price in prices.items()}
    slots |= {f"{which}_total": _money(draw, product, amount) for which, amount in totals.items()}
    block = draw.numbered([f"{p.title}: {draw.price(p)}" for p in (product, others[0])])
    return _answered(draw, product, slots, block, answer, others)


def discount(draw: Draw, product: Product) -> Parts | None:
    """A share off, where that is a whole amount, or whole cents of a price that has cents."""
    price = _price(product)
    unit = Decimal(1) if price == price.to_integral_value() else CENT
    percents = [percent for percent in PERCENTS if price * percent / 100 % unit == 0]
    if not percents:
        return None
    percent = draw.rng.choice(percents)
    off = price * percent / 100
    slots = {"percent": str(percent), "price": draw.price(product), "off": _money(draw, product, off)}
    return _answered(draw, product, slots, draw.card(product, ("title", "price")), price - off)


def change(draw: Draw, product: Product) -> Parts | None:
    count = draw.rng.randint(2, 5)
    amount = count * _price(product)
    paid = round_up(amount)
    if paid == amount:
        return None
    slots = {
        "count": str(count),
        "price": draw.price(product),
        "total": _money(draw, product, amount),
        "paid": _money(draw, product, paid),
    }
    return _answered(draw, product, slots, draw.card(product, ("title", "price")), paid - amount)


def order_total(draw: Draw, product: Product) -> Parts | None:
    first, count = draw.rng.sample(range(2, 10), 2)
    slots = _conversation(draw, product, first, count)
    return _answered(draw, product, slots, _spoken(draw, slots), count * _price(product))


def order(draw: Draw, product: Product) -> Parts | None:
    first, count = draw.rng.sample(range(2, 10), 2)
    slots = _conversation(draw, product, first, count)
    found = {"product": product.title, "quantity": count}
    block = f"{_spoken(draw, slots)}\n\n{draw.as_json(found)}"
    return Parts(slots | {"json": json.dumps(found, ensure_ascii=False)}, block)


def _conversation(draw: Draw, product: Product, first: int, count: int) -> dict[str, str]:
    return {"title": product.title, "price": draw.price(product), "first": str(first), "count": str(count)}


def _spoken(draw: Draw, slots: dict[str, str]) -> str:
    return draw.words.words["dialogue"].format(**slots)


def _price(product: Product) -> Decimal:
    assert product.price is not None
    return product.price


def _money(draw: Draw, product: Product, amount: Decimal) -> str:
    return draw.words.money(amount, product.currency)


def _answered(
    draw: Draw, product: Product, slots: dict[str, str], block: str, answer: Decimal, used: list[Product] | None = None
) -> Parts:
    return Parts(slots | {"answer": _money(draw, product, answer)}, block, answer=machine(answer), used=used or [])
